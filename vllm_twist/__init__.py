"""Twisted sequential Monte Carlo inside vLLM.

Importing this package (or merely having it installed) teaches vLLM the ``twist_*`` options; an
engine that is given none of them behaves exactly as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_twist._import_hook import activate

# This makes ``results`` the module, which can be called: ``results(output)`` is ``results_of(output)``.
from vllm_twist.results import Particle as Particle
from vllm_twist.results import TwistResult as TwistResult
from vllm_twist.results import results_of as results_of

__version__ = "0.2.0"
#: The range of vLLM that the engine part supports, and the only place that says so.
SUPPORTED_VLLM = ">=0.32,<0.34"

if TYPE_CHECKING:
    from vllm_twist.config import RequestConfig as RequestConfig
    from vllm_twist.config import TwistConfig as TwistConfig
    from vllm_twist.potentials import Potential as Potential
    from vllm_twist.potentials import load_potential as load_potential
    from vllm_twist.results import results as results
    from vllm_twist.training import TrainingConfig as TrainingConfig
    from vllm_twist.training import TwistTrainer as TwistTrainer
    from vllm_twist.twist import TwistHead as TwistHead
    from vllm_twist.twist import TwistHeadConfig as TwistHeadConfig

_HOME = {
    "Potential": "potentials",
    "RequestConfig": "config",
    "TrainingConfig": "training",
    "TwistConfig": "config",
    "TwistHead": "twist",
    "TwistHeadConfig": "twist",
    "TwistTrainer": "training",
    "load_potential": "potentials",
}
__all__ = ["SUPPORTED_VLLM", "Particle", "TwistResult", "__version__", "results", "results_of", *_HOME]


def __getattr__(name: str) -> Any:
    # Loaded on first use: every vLLM process imports this package, most of them for nothing.
    if name in _HOME:
        import importlib

        value = getattr(importlib.import_module(f"vllm_twist.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


activate()
