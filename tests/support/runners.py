"""The model runner and scheduler that the engine tests run on.

Model Runner V2 needs Triton; without a GPU it runs under Triton's interpreter, some hundred times slower, so
that tests there take fewer groups. With one it runs as it is, eager or, with TWIST_TEST_GRAPHS=1, in CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from support import light_interpreter

#: "v1", "v2" (synchronous scheduler) or "v2-async".
RUNNER = os.environ.get("TWIST_TEST_RUNNER", "v1")
#: Major and minor version of the installed vLLM.
VLLM = Version(metadata.version("vllm")).release[:2]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def fewer(n: int, least: int = 6) -> int:
    """Return how many of ``n`` groups a statistical test affords."""
    if RUNNER == "v1":
        return n
    return max(n // (4 if on_gpu() else 25), least)


def on_gpu() -> bool:
    """Whether engines run on a GPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


def emulate() -> None:
    """Make vLLM believe, before it is imported, that this machine's Triton has a CPU backend: the interpreter."""
    from triton.backends import backends
    from triton.runtime import interpreter

    class Interpreter:
        class driver:
            @staticmethod
            def is_active() -> bool:
                return False

    backends["cpu"] = Interpreter  # type: ignore[assignment]
    # Nor are compiled kernels watched for integer overflow; ours are in their own tests. A seventh of the time.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    light_interpreter.install()


def keep_async() -> None:
    """Leave asynchronous scheduling on, which vLLM turns off on a CPU for want of a use, not of ability."""
    from vllm.platforms.cpu import CpuPlatform

    real = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        real(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def truncate_in_torch() -> None:
    """Truncate by vLLM's PyTorch function: its kernel for top-k and top-p is beyond the interpreter."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def gpu_options() -> dict[str, Any]:
    """Return what an engine on a GPU needs, where others of the same process have their memory too."""
    made: dict[str, Any] = {"async_scheduling": RUNNER == "v2-async", "gpu_memory_utilization": 0.3}
    if os.environ.get("TWIST_TEST_GRAPHS") == "1":
        sizes = [1, 2, 4, 8, 16, 32, 64]
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        made |= {"enforce_eager": False, "compilation_config": graphs}
    return made


def options() -> dict[str, Any]:
    """Set the process up for ``RUNNER``; return what an engine needs for it."""
    if RUNNER == "v1":
        return {}
    if os.environ.get("TRITON_INTERPRET") != "1" and on_gpu():
        return gpu_options()
    emulate()
    truncate_in_torch()
    if RUNNER == "v2-async":
        keep_async()
    return {"async_scheduling": RUNNER == "v2-async"}


def marks_v2(value: Any) -> list[Any]:
    """Return a test function's marks ``pytest.mark.v2(*cases)``."""
    marks = value.pytestmark if inspect.isfunction(value) and hasattr(value, "pytestmark") else ()
    return [mark for mark in marks if mark.name == "v2"]


def marked_v2(folder: Path) -> list[str]:
    """Return "file::test" of every test marked for Model Runner V2, or "file::test[case]" if its mark names cases.

    Tests about that runner alone, in ``test_engine_v2``, come last.
    """
    found = []
    for path in sorted(folder.glob("test_*.py"), key=lambda path: (path.stem == "test_engine_v2", path)):
        if "mark.v2" in path.read_text():
            for name, value in vars(importlib.import_module(path.stem)).items():
                for mark in marks_v2(value):
                    found += [f"{path.name}::{name}[{case}]" for case in mark.args] or [f"{path.name}::{name}"]
    return found
