"""Command-line flags made of a config class."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any


def add_options(parser: argparse.ArgumentParser, config: Any) -> None:
    """Add a flag for each field of a config class that has a ``help``, those of its base class last."""
    for option in sorted(dataclasses.fields(config), key=lambda option: bool(option.kw_only)):
        if "help" not in option.metadata:
            continue
        flag = f"--{option.name.replace('_', '-')}"
        text = f"{option.metadata['help']} (default: {option.default})".replace("%", "%%")
        if isinstance(option.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        else:
            kind = str if option.default is None else type(option.default)
            parser.add_argument(flag, type=kind, default=option.default, help=text)
