"""Teach vLLM the ``twist_*`` options as soon as it defines its engine arguments.

vLLM loads general plugins while it builds the command-line parser, which is early enough for
``vllm serve``, but only inside the construction of its engine arguments, which is too late for
``LLM(model, twist_head=...)``: the unknown keyword has been refused by then. So the patches are
applied right after ``vllm.engine.arg_utils`` has been imported. Standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "vllm.engine.arg_utils"


def register() -> None:
    """Apply the patches, logging instead of raising: people who use no twists must not be hurt."""
    try:
        from vllm_twist.engine.plugin import register as apply

        apply()
    except Exception:
        logging.getLogger(__name__).exception("vllm-twist could not be activated; vLLM runs without it")


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # Hand the module back to its real loader; nothing of this hook stays behind.
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        register()


class _Spec(ModuleSpec):
    """The spec of a module that is being imported: importlib ends with ``_initializing = False``."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if hasattr(sys.modules.get(TARGET), "EngineArgs"):
                register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def activate() -> None:
    """Register now if vLLM's engine arguments exist, else when they come to be. Re-entrant."""
    module = sys.modules.get(TARGET)
    if module is not None:
        spec = module.__spec__
        if hasattr(module, "EngineArgs"):
            register()
        elif type(spec) is ModuleSpec:
            # It is among its own first imports, where vLLM looks for its platform: too late for a finder.
            spec.__class__ = _Spec  # type: ignore[assignment]
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def platform_plugin() -> None:
    """Entry point in ``vllm.platform_plugins``: activate, and be no platform."""
    activate()
