"""Make a potential from what a user can name on a command line."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_twist.config import did_you_mean
from vllm_twist.potentials.base import Function, LogPhi, Potential, TokenLogistic
from vllm_twist.potentials.models import Classifier, Continuation

POTENTIAL_NAME = "potential.json"


def load_potential(spec: str | Path | LogPhi | Potential, *, model: Any = None, tokenizer: Any = None) -> Potential:
    """Return the potential that ``spec`` names.

    It is one of

        module:attribute     a ``Potential``, or a callable log_phi(token_ids, texts) -> list[float]
        path.py:attribute    likewise, from a file
        potential.json       or a folder with such a file, holding one of
                             {"bias": b, "weights": [...]}               a ``TokenLogistic``
                             {"type": "classifier", "model": folder or hub id, "label": ..., ...}
                             {"type": "continuation", "text": "..."}
        a callable, or a ``Potential``, which is returned as it is

    Further keys of a classifier are the options of ``Classifier`` and of its ``from_pretrained``.

    Args:
        spec: what to load. Code that it names is run.
        model: the language model that is sampled, for a continuation.
        tokenizer: its tokenizer, for a continuation.

    Raises:
        ValueError: anything that is missing, malformed or unknown.
    """
    if isinstance(spec, Potential):
        return spec
    if isinstance(spec, str | Path):
        path = Path(spec)
        if path.suffix == ".json" or path.is_dir():
            return _from_json(path / POTENTIAL_NAME if path.is_dir() else path, model, tokenizer)
        source, colon, attribute = str(spec).rpartition(":")
        if not colon or not source or not attribute:
            raise ValueError(
                f"`potential` must be module:attribute, path.py:attribute, a {POTENTIAL_NAME} or a folder with one, "
                f"got {str(spec)!r}: name where log_phi is found."
            )
        found = _attribute(source, attribute)
    else:
        found = spec
    if isinstance(found, Potential):
        return found
    if isinstance(found, type) or not callable(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise ValueError(
            f"`potential` {spec} must be a callable log_phi(token_ids, texts) or a Potential, got {what}: "
            "pass a function or an instance."
        )
    return Function(found, str(spec) if isinstance(spec, str | Path) else None)


def reads_model(spec: Any) -> bool:
    """Return whether ``load_potential`` needs the language model for this: a file that says "continuation"."""
    if not isinstance(spec, str | Path):
        return False
    path = Path(spec) / POTENTIAL_NAME if Path(spec).is_dir() else Path(spec)
    try:
        fields = json.loads(path.read_text()) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return False  # load_potential says what is wrong
    return isinstance(fields, dict) and fields.get("type") == "continuation"


def _attribute(source: str, attribute: str) -> Any:
    """Return an attribute, possibly dotted, of a module or of a Python file."""
    where = f"`potential` {source}:{attribute}"
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise ValueError(f"{where} must name a Python file, got none at {source!r}: check the path.")
    try:
        module = _from_file(Path(source)) if is_file else importlib.import_module(source)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{source}.".startswith(f"{absent}."):
            raise ValueError(
                f"{where} must name a module that can be imported, got {source!r}, which is not found: check "
                "the name, put it on PYTHONPATH, or give the file as path.py:attribute."
            ) from error
        raise ValueError(
            f"{where} must be importable, but that raised {type(error).__name__}: {error}: fix the module."
        ) from error
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [known for known in dir(found) if not known.startswith("_")]
            raise ValueError(
                f"{where} must name an attribute of {source}, got {name!r}, which it has not"
                f"{did_you_mean(name, known)}: check the name."
            )
        found = getattr(found, name)
    return found


def _from_file(path: Path) -> Any:
    name = f"_vllm_twist_potential_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclass(frozen=True)
class _Kind:
    """A type of JSON potential: how it is built, and the keys it needs and may have."""

    build: Callable[[dict[str, Any], Any, Any], Potential]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def _classifier(fields: dict[str, Any], model: Any, tokenizer: Any) -> Potential:
    return Classifier.from_pretrained(fields.pop("model"), fields.pop("label"), **fields)


def _continuation(fields: dict[str, Any], model: Any, tokenizer: Any) -> Potential:
    if model is None or tokenizer is None:
        raise ValueError(
            "`model` and `tokenizer` must be given for a continuation, got None: its phi is the language model's own."
        )
    return Continuation(model, tokenizer(fields["text"], add_special_tokens=False).input_ids)


KINDS = {
    "token_logistic": _Kind(lambda fields, model, tokenizer: TokenLogistic(**fields), ("bias", "weights")),
    "classifier": _Kind(
        _classifier,
        ("model", "label"),
        (
            "score", "beta", "threshold", "epsilon", "with_prompt", "batch_size", "max_length", "trust_remote_code",
            "revision", "dtype",
        ),
    ),
    "continuation": _Kind(_continuation, ("text",)),
}


def _from_json(path: Path, model: Any, tokenizer: Any) -> Potential:
    where = f"`potential` {str(path)!r}"
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({type(error).__name__}): check the path.") from error
    except ValueError as error:
        raise ValueError(f"{where} must hold JSON, got otherwise ({error}): write it anew.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(fields).__name__}: write it anew.")
    name = fields.pop("type", "token_logistic")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"{where}: `type` must be one of {', '.join(KINDS)}, got {name!r}{did_you_mean(name, list(KINDS))}: "
            "pass one of these."
        )
    known = kind.required + kind.optional
    for key in fields:
        if key not in known:
            raise ValueError(
                f"{where}: the keys of a {name} must be among {', '.join(known)}, got {key!r}"
                f"{did_you_mean(key, known)}: rename or remove it."
            )
    for key in kind.required:
        if key not in fields:
            raise ValueError(f"{where}: a {name} must have the key `{key}`, got none: add it.")
    return kind.build(fields, model, tokenizer)
