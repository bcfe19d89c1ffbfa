"""The seams to vLLM: each overridden, patched or used internal is still what it was written against.

A failure here after an upgrade names what moved, before anything subtler goes wrong.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runners import VLLM
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector, PendingAuxOutput
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu_worker import Worker

from vllm_twist.engine import compat, sampler_v2, versions
from vllm_twist.engine.logits_processor import TwistLogitsProcessor
from vllm_twist.engine.logits_processor_v2 import TwistLogitsProcessorV2
from vllm_twist.engine.sampler_v1 import LaneSampler
from vllm_twist.engine.sampler_v2 import StepOutput, StepOutputs, TwistSampler
from vllm_twist.engine.scheduler import TwistAsyncScheduler, TwistScheduler, TwistSchedulerMixin
from vllm_twist.engine.worker import TwistWorkerMixin


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Return name, kind and default of each parameter, of the original if the function is wrapped."""
    signature = inspect.signature(inspect.unwrap(function))
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


OVERRIDDEN = [
    *((TwistSchedulerMixin, Scheduler, name) for name in (
        "add_request", "schedule", "update_from_output", "finish_requests", "reset_prefix_cache",
        "get_request_counts", "has_finished_requests", *(["has_request"] if VLLM >= (0, 33) else []),
    )),
    *((TwistWorkerMixin, base, name) for base in (Worker, CPUWorker) for name in (
        "load_model", "execute_model", "sample_tokens",
    )),
    *((TwistLogitsProcessor, LogitsProcessor, name) for name in (
        "__init__", "is_argmax_invariant", "update_state", "apply",
    )),
    *((TwistLogitsProcessorV2, LogitsProcessorV2, name) for name in (
        "__init__", "add_request", "apply_staged_writes", "apply",
    )),
    (TwistSampler, Sampler, "__call__"),
    # Not bases, but what the runner expects in their places.
    *((StepOutputs, AuxOutputWorkerConnector, name) for name in ("begin_step", "prepare_output", "close")),
    *((StepOutput, PendingAuxOutput, name) for name in ("enqueue_cpu_copy", "process_output")),
]  # fmt: skip


@pytest.mark.parametrize("ours, theirs, name", OVERRIDDEN, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_overrides_have_the_signatures_of_what_they_override(ours: type, theirs: type, name: str):
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


#: What moved between the supported versions, by the minor version from which on it is so: parameters, fields, methods.
FLAGS = {(0, 32): ["use_fused_sampler"], (0, 33): ["has_topp_only_rows", "use_fused_sampler"]}
TRUNCATION = {(0, 32): ["logits", "k", "p"], (0, 33): ["logits", "k", "p", "has_topp_only_rows"]}
NEW = {(0, 33): [(EngineCoreOutput, "error"), (Scheduler, "has_request")]}


def test_the_sampler_hands_over_its_flags_as_it_did():
    """``TwistSampler._sample_random`` takes them by place: those of its version, the sampler that truncates last."""
    theirs, ours = (list(inspect.signature(owner._sample_random).parameters) for owner in (Sampler, TwistSampler))
    assert ours[-1] == "flags" and theirs[: len(ours) - 1] == ours[:-1]
    assert theirs[len(ours) - 1 :] == FLAGS[VLLM]
    assert list(inspect.signature(apply_top_k_top_p).parameters) == TRUNCATION[VLLM]
    (call,) = [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(Sampler.sample))))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_sample_random"
    ]
    assert [arg.id for arg in call.args if isinstance(arg, ast.Name)] == theirs[1:] and not call.keywords


def test_what_is_new_is_there_from_its_version_on():
    for version, news in NEW.items():
        for owner, name in news:
            assert hasattr(owner, name) == (version <= VLLM), f"{name} of {owner.__name__}"
    # Every abstract method of a scheduler has its place in the class that we derive from.
    assert not getattr(TwistAsyncScheduler, "__abstractmethods__", None)


@pytest.mark.parametrize("told", [False, True])
def test_flags_reach_the_truncation_and_vllms_own_draw(monkeypatch: pytest.MonkeyPatch, told: bool):
    flags = (told,) * len(FLAGS[VLLM])
    sampler, got = object.__new__(TwistSampler), []
    sampler.found = None
    monkeypatch.setattr(Sampler, "_sample_random", lambda self, *args: got.append(args))
    sampler._sample_random(*range(6), *flags)
    sampler.found = SimpleNamespace(rows=None)
    sampler.readout = SimpleNamespace(twist=lambda *args: None)
    sampler.table = SimpleNamespace(
        conditions_of=lambda found: None, backend=None, step=lambda *args: SimpleNamespace(token=0)
    )
    monkeypatch.setattr(sampler_v2, "apply_top_k_top_p", lambda *args: got.append(args))
    sampler._sample_random(*range(6), *flags)
    assert got == [(*range(6), *flags), (0, 4, 5, *flags[:-1])]


def test_failures_reach_the_client_by_vllms_own_way_where_there_is_one():
    compat.patch_frontend()
    assert hasattr(GenerateBaseServing._raise_if_error, "__wrapped__") == (VLLM < (0, 33))
    fields = versions.error_fields("why")
    assert [error.to_exception().args for error in fields.values()] == ([("why",)] if VLLM >= (0, 33) else [])


@pytest.mark.parametrize("name", ["forward_native", "forward_cpu", "forward_cuda"])
def test_draw_is_called_as_vllm_calls_its_own(name: str):
    """vLLM picks one of these as ``forward`` when its sampler is made."""
    assert parameters(LaneSampler.forward) == parameters(getattr(TopKTopPSampler, name))


def test_every_override_is_listed():
    """A method that shares its name with the base but is missing above would drift unseen."""
    listed = {(ours, name) for ours, _, name in OVERRIDDEN} | {(TwistSchedulerMixin, "__init__")}
    listed |= {(TwistSampler, "__init__"), (TwistSampler, "_sample_random")}
    bases = (
        (TwistSchedulerMixin, Scheduler),
        (TwistSchedulerMixin, AsyncScheduler),
        (TwistWorkerMixin, Worker),
        (TwistSampler, Sampler),
    )
    for ours, theirs in bases:
        for name in vars(ours):
            if callable(getattr(ours, name)) and hasattr(theirs, name) and name not in dir(object):
                assert (ours, name) in listed, name
    assert issubclass(TwistScheduler, Scheduler) and not issubclass(TwistScheduler, AsyncScheduler)
    assert issubclass(TwistAsyncScheduler, AsyncScheduler)
    for scheduler in (TwistScheduler, TwistAsyncScheduler):
        assert scheduler.schedule is TwistSchedulerMixin.schedule


PATCHED = [
    (EngineArgs, "create_engine_config", ["self", "usage_context", "headless"]),
    (EngineArgs, "from_cli_args", ["cls", "args"]),
    (EngineArgs, "add_cli_args", ["parser"]),
    (AsyncEngineArgs, "add_cli_args", ["parser", "async_args_only"]),
    (
        RequestState,
        "make_request_output",
        ["self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params",
         "ec_transfer_params", "error"],
    ),
    (GenerateBaseServing, "_raise_if_error", ["self", "finish_reason", "request_id"]),
]  # fmt: skip


@pytest.mark.parametrize("owner, name, expected", PATCHED, ids=lambda v: v if isinstance(v, str) else None)
def test_patched_functions_take_what_they_took(owner: type, name: str, expected: list[str]):
    assert list(inspect.signature(inspect.unwrap(getattr(owner, name))).parameters) == expected


def test_patched_functions_start_as_they_did():
    """The wrappers pass the rest through, whatever it is."""
    for function, first in (
        (InputProcessor.process_inputs, ["self", "request_id", "prompt", "params"]),
        (OpenAIServingCompletion.request_output_to_completion_response, ["self", "final_res_batch"]),
        (EngineArgs.__init__, ["self", "model"]),
    ):
        assert list(inspect.signature(inspect.unwrap(function)).parameters)[: len(first)] == first


def test_patching_twice_wraps_once():
    compat.patch_frontend()
    once = InputProcessor.process_inputs
    compat.patch_frontend()
    assert InputProcessor.process_inputs is once
    assert inspect.unwrap(once) is once.__wrapped__


SOURCES = {
    Scheduler: ["kv_holding_waiting", "deferred_waiting", "max_num_active_reqs", "_pause_state",
                "finished_req_ids_dict", "_enqueue_waiting_request(self, request", "_preempt_request(",
                "drop_stale_output",
                "request.next_decode_eligible_step"],
    ParentRequest: ["child_requests"],
    AsyncScheduler: ["request.num_output_placeholders"],
    GPUModelRunner: ["self.execute_model_state", "self.aux_output_connector.prepare_output(input_batch)",
                     "self.aux_output_connector: AuxOutputWorkerConnector | None = None",
                     "self.sampler(logits, input_batch)",
                     "self.model.compute_logits(sample_hidden_states)"],
    AsyncOutput: ["self.pending_aux_output.enqueue_cpu_copy(", "aux_output_connector_output"],
    Sampler: ["self.logits_processors", "self.penalties_state", "self._sample_random("],
}  # fmt: skip


@pytest.mark.parametrize("owner", SOURCES, ids=lambda owner: owner.__name__)
def test_internals_in_use_still_exist(owner: type):
    source = inspect.getsource(owner)
    for name in SOURCES[owner]:
        assert name in source, f"{owner.__name__} no longer has {name}"


def test_the_step_comes_between_the_draw_and_the_runners_own_update():
    """Forks are right only there: the KV cache holds the step's tokens, and the histories do not hold the new one."""
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    calls = ("self.sample(", "async_output = AsyncOutput(", "self.postprocess_sampled(")
    assert [source.index(call) for call in calls] == sorted(source.index(call) for call in calls)


def test_copy_on_write_list_keeps_and_frees_both_ends():
    """Lanes' partial blocks are queued the way the KV manager queues its own."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    apply_cow = inspect.getsource(SingleTypeKVCacheManager._apply_cow)
    assert "self._pending_cow_copies.append((source_block, cow_block))" in apply_cow
    assert "retained_blocks = [block for pair in pending_copies for block in pair]" in inspect.getsource(
        KVCacheManager.take_kv_cache_block_copies
    )


#: Modules of the product in the order in which they may import each other.
LAYERS = [
    "kernels", "config", "resampling", "smc", "results", "twist", "potentials", "objectives", "attention", "sampling",
    "teacher_forcing", "engine", "processes", "training_config", "training", "cli_train", "cli",
]  # fmt: skip


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "vllm_twist" and parts[1] in LAYERS else None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_imports_point_one_way(repo_root: Path):
    for path in [*(repo_root / "vllm_twist").rglob("*.py"), *(repo_root / "kernels").glob("*.py")]:
        relative = path.relative_to(repo_root)
        module = ".".join(relative.with_suffix("").parts)
        own = "kernels" if relative.parts[0] == "kernels" else layer_of(module)
        imports = imports_of(path)
        if own is not None:
            if own != "engine":
                assert not any(name == "vllm" or name.startswith("vllm.") for name in imports), relative
            for name in imports:
                layer = layer_of(name)
                assert layer is None or LAYERS.index(layer) <= LAYERS.index(own), f"{relative} imports {name}"
        if relative.parts[0] == "kernels":
            assert not any(name.startswith("vllm") for name in imports), relative


def test_bookkeeping_knows_neither_torch_nor_vllm(repo_root: Path):
    imports = imports_of(repo_root / "vllm_twist/engine/groups.py")
    assert not any(name.split(".")[0] in ("torch", "vllm") for name in imports)
