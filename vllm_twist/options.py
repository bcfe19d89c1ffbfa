"""Options as fields of dataclasses: a check, a help text, and the flag of a command line that both make.

``option`` declares a field, ``check_fields`` checks all of them, ``add_flags`` adds their flags to a parser. A check
takes a name and a value, and returns the value as it is kept, or raises ValueError.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

Check = Callable[[str, Any], Any]


def integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be an integer of at least {low}, got {value!r}: pass a whole number.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}: raise it to {low} or more.")
    return value


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`{name}` must be a number, got {value!r}: pass a plain number.")
    try:
        return float(value)
    except OverflowError:  # an integer of 309 digits or more, which JSON allows
        return math.inf


def one_of(known: tuple[str, ...]) -> Any:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise ValueError(
                f"`{name}` must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}: "
                "pass one of these."
            )
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"`{name}` must be 0 or 1 (false or true), got {value!r}: pass 0 or 1.")
    return bool(value)


def did_you_mean(word: Any, known: tuple[str, ...] | list[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or nothing."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def at_least(low: int) -> Check:
    """Return the check for integers of at least ``low``."""
    return lambda name, value: integer(name, value, low)


def option(
    check: Check,
    help: str,
    *,
    request_only: bool = False,
    flags: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Declare a field.

    Args:
        check: of its values.
        help: of its flag.
        request_only: whether only requests have it, an engine has no default for it.
        flags: other names of its flag.
        parse: text of a command line to value; the type of the default by default, text without one.
        kwargs: of ``dataclasses.field``.
    """
    metadata = {"check": check, "help": help, "request_only": request_only, "flags": flags, "parse": parse}
    return field(metadata=metadata, **kwargs)


def options_of(config: Any) -> list[dataclasses.Field]:
    """Return the fields that are options, those of the base class last."""
    fields = (one for one in dataclasses.fields(config) if "check" in one.metadata)
    return sorted(fields, key=lambda one: bool(one.kw_only))


def check_fields(config: Any, *, prefix: str = "") -> None:
    """Check every option of a frozen dataclass on construction; ``prefix`` is that of the names in messages.

    Raises:
        ValueError: a value out of range.
    """
    for one in options_of(config):
        checked = one.metadata["check"](f"{prefix}{one.name}", getattr(config, one.name))
        object.__setattr__(config, one.name, checked)


def add_flags(parser: Any, options: Iterable[dataclasses.Field], *, prefix: str = "", suppress: bool = False) -> None:
    """Add the flag of each option: its name with dashes, and yes and no of truth values.

    Args:
        parser: of argparse, or a group of one.
        options: from ``options_of``.
        prefix: of the flags' names.
        suppress: whether what is not given is absent from the arguments, instead of at its default.
    """
    for one in options:
        flags = [f"--{prefix}{one.name.replace('_', '-')}", *one.metadata["flags"]]
        default, parse = one.default, one.metadata["parse"]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        given: dict[str, Any] = {
            "default": argparse.SUPPRESS if suppress else default,
            "help": f"{one.metadata['help']} (default: {shown})".replace("%", "%%"),
        }
        if isinstance(default, bool):
            given["action"] = argparse.BooleanOptionalAction
        else:
            given["type"] = parse or (str if default is None else type(default))
            given["dest"] = f"{prefix}{one.name}".replace("-", "_")
        parser.add_argument(*flags, **given)
