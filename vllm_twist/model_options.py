"""How a base model is loaded: the same way by transformers, by the engine, and for a potential that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_twist.options import check_fields, flag, one_of, option

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _revision(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"`{name}` must be a branch, tag or commit, got {value!r}: pass its name, or leave it out.")
    return value


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which files of a base model are loaded, and how; each field is a flag of ``vllm-twist``.

    Attributes:
        trust_remote_code: whether to run the Python code that comes with the model.
        revision: branch, tag or commit of the model and its tokenizer on the hub.
        dtype: one of ``DTYPES``.

    Raises:
        ValueError: a value out of range.
    """

    trust_remote_code: bool = option(flag, "run the Python code that comes with the base model", default=False)
    revision: str | None = option(
        _revision,
        "branch, tag or commit of the base model and its tokenizer on the hub",
        flags=("--model-revision",),
        default=None,
    )
    dtype: str = option(one_of(DTYPES), "of the base model; auto: what vLLM makes of the model's own", default="auto")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def files(self) -> dict[str, Any]:
        """Keywords that say which files to load, for ``from_pretrained`` and ``vllm.LLM`` alike."""
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}

    def load_tokenizer(self, name: str | Path) -> Any:
        """Return the tokenizer of the model.

        Raises:
            ValueError: there is none that transformers can load.
        """
        from transformers import AutoTokenizer

        return self._loaded(AutoTokenizer, name)

    def load_model(self, name: str | Path, **options: Any) -> Any:
        """Return the causal language model; ``options`` are further ones of ``from_pretrained``.

        Raises:
            ValueError: there is none that transformers can load.
        """
        from transformers import AutoModelForCausalLM

        return self._loaded(AutoModelForCausalLM, name, **{"dtype": self.dtype, **options})

    def _loaded(self, kind: Any, name: str | Path, **options: Any) -> Any:
        try:
            return kind.from_pretrained(name, **self.files, **options)
        except (OSError, ImportError, ValueError) as error:
            remedy = "check the name, and the connection if it is a hub id"
            if "trust_remote_code" in str(error):
                remedy = "pass `trust_remote_code` if you trust its code"
            raise ValueError(
                f"`model` {str(name)!r} is no causal language model that transformers can load "
                f"({type(error).__name__}: {error}): {remedy}."
            ) from error
