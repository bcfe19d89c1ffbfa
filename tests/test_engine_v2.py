"""The engine on Model Runner V2, with the synchronous and with the asynchronous scheduler.

Without a GPU that runner works under Triton's interpreter, which has to be chosen before anything imports Triton: so
each scheduler has a pytest process of its own, in which tests of any file that are marked ``pytest.mark.v2`` run again,
with fewer groups. Here ``test_on_model_runner_v2`` stands for all cases of one of them.

The tests below it are about that runner alone: only those processes collect them. On a CPU the runner's own operations
take the PyTorch backend unless a test says otherwise; vLLM's are interpreted.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import light_interpreter
from support.engines import EVERY_STEP, assert_rescored, generate, params, prompt_of, scheduler_of, worker_of
from support.models import Tiny, random_model
from support.processes import Line
from support.runners import ENVIRONMENT, RUNNER, marked_v2
from support.scenarios import SCENARIOS, Scenario, outcome
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_twist import results

MODES = ("v2", "v2-async")


def start_elsewhere(line: Line, request: pytest.FixtureRequest) -> None:
    """Run what was selected in a process per mode, after one that finds the outcomes of the scenarios on V1."""
    if RUNNER != "v1":
        return
    items = [item for item in request.session.items if item.path == Path(__file__)]
    make_folder = request.getfixturevalue("tmp_path_factory").mktemp
    reference = make_folder("reference") / "outcomes.json"
    write = ["tests/support/reference_outcomes.py"]
    line.add_tests("v1", write, {"TWIST_TEST_REFERENCE": str(reference)}, make_folder("v1"))
    for mode in MODES:
        chosen = [f"tests/{item.callspec.params['test']}" for item in items if item.callspec.params["mode"] == mode]
        if chosen:
            environment = {**ENVIRONMENT, "TWIST_TEST_RUNNER": mode, "TWIST_TEST_REFERENCE": str(reference)}
            line.add_tests(mode, chosen, environment, make_folder(mode), after="v1")


@pytest.fixture(scope="module")
def outcomes(line: Line) -> Callable[[str], dict[str, str]]:
    """Return what gives the outcomes of a mode's tests."""
    return functools.cache(line.outcomes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_on_model_runner_v2:
        metafunc.parametrize("mode", MODES)
        metafunc.parametrize("test", marked_v2(Path(__file__).parent))


def test_on_model_runner_v2(outcomes: Callable[[str], dict[str, str]], line: Line, mode: str, test: str):
    assert line.exit_code("v1") == 0, line.said("v1")
    name = test.replace(".py::", ".")
    cases = {case: failure for case, failure in outcomes(mode).items() if case == name or case.startswith(f"{name}[")}
    assert cases, f"It did not run. {line.said(mode)}"
    failed = {case: failure for case, failure in cases.items() if failure}
    assert not failed, "\n".join(f"{case}:\n{failure}" for case, failure in failed.items())
    assert line.exit_code(mode) == any(outcomes(mode).values()), line.said(mode)


def lane_table(llm: Any) -> Any:
    return worker_of(llm).twist.table


@pytest.mark.v2
def test_runner_and_scheduler_are_the_ones_meant(engine, wide: Tiny) -> None:
    llm = engine(wide)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    assert type(scheduler_of(llm)).__name__ == {"v2": "TwistScheduler", "v2-async": "TwistAsyncScheduler"}[RUNNER]
    assert type(worker_of(llm).model_runner.sampler).__name__ == "TwistSampler"


@pytest.mark.v2
def test_light_kernels_store_what_triton_says(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the light interpreter, all of them, and its check sees one that stores something else."""
    from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected

    generate(engine(wide), [prompt_of(5)], params(max_tokens=2, twist_particles=2))
    assert {"_gather_block_tables_kernel", "_post_update_kernel"} < set(light_interpreter.launches)
    assert not light_interpreter.left
    monkeypatch.setattr(light_interpreter, "launches", collections.Counter())
    monkeypatch.setattr(light_interpreter.language, "where", lambda condition, then, otherwise: then)
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match="another outcome in Triton's interpreter"):
        get_num_sampled_and_rejected(one.clone(), one, torch.arange(2, dtype=torch.int32), one - 1, one)


@pytest.mark.v2
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_same_as_model_runner_v1(engine, request: pytest.FixtureRequest, scenario: Scenario) -> None:
    """The same seeds give the same tokens, ancestors and all, and the same numbers up to float32 rounding."""
    expected = json.loads(Path(os.environ["TWIST_TEST_REFERENCE"]).read_text())[scenario.name]
    got = outcome(engine, request, scenario)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["counts"] == theirs["counts"]
        assert mine["numbers"] == pytest.approx(theirs["numbers"], abs=2e-4)


@pytest.mark.v2
def test_same_with_the_kernels(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels, interpreted, in the place of the PyTorch operations: the same steps, forks and all."""
    requests = [
        params(max_tokens=6, seed=1, twist_particles=5, temperature=0.8, frequency_penalty=0.5, **EVERY_STEP),
        params(max_tokens=6, seed=2, twist_particles=3, twist_scale=0.5, logprobs=2, **EVERY_STEP),
        params(max_tokens=6, seed=3, twist=0),
    ]
    prompts, llm = [prompt_of(30), prompt_of(31), prompt_of(9)], engine(wide)
    plain = generate(llm, prompts, requests)
    table, fork = lane_table(llm), worker_of(llm).twist.sampler.fork
    monkeypatch.setattr(table, "backend", "triton")
    monkeypatch.setattr(fork, "backend", "triton")
    for mine, theirs in zip(generate(llm, prompts, requests), plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        if theirs.kv_transfer_params:
            a, b = results(mine)[0], results(theirs)[0]
            assert [p.token_ids for p in a.particles] == [p.token_ids for p in b.particles]
            assert a.log_z == pytest.approx(b.log_z, abs=1e-4) and a.num_resamplings == b.num_resamplings > 0
            assert_rescored_unless_penalised(wide, mine)


@pytest.mark.v2
def test_same_with_a_low_rank_head_in_factors(engine, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values written out or multiplied in the kernels: the same steps, with scales, base proposals and pins."""
    from vllm_twist.engine.v2.state import SlotTable
    from vllm_twist.kernels import reference

    tiny = random_model(tmp_path_factory.mktemp("factors"), vocab=40, eos=1, head_type="low_rank")
    common = {"max_tokens": 4, "ignore_eos": True, **EVERY_STEP}
    requests = [
        params(seed=1, twist_particles=5, temperature=0.8, twist_scale=0.5, **common),
        params(seed=2, twist_particles=3, twist_proposal="base", **common),
        params(seed=3, twist_particles=4, twist_pinned=[5, 9, 8, 4], **common),
        params(max_tokens=4, seed=4, twist=0),
    ]
    prompts, llm = [prompt_of(30), prompt_of(31), prompt_of(9), prompt_of(5)], engine(tiny)
    plain, seen, real = generate(llm, prompts, requests), [], SlotTable.step

    def spy(self: Any, logits: torch.Tensor, found: Any, log_psi: Any) -> Any:
        seen.append(isinstance(log_psi, reference.LowRank))
        return real(self, logits, found, log_psi)

    monkeypatch.setattr(SlotTable, "step", spy)
    monkeypatch.setattr(lane_table(llm), "backend", "triton")
    monkeypatch.setattr("vllm_twist.kernels.ops.FUSED_ROWS", 1)
    for mine, theirs in zip(generate(llm, prompts, requests), plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        if theirs.kv_transfer_params:
            a, b = results(mine)[0], results(theirs)[0]
            assert [p.token_ids for p in a.particles] == [p.token_ids for p in b.particles]
            assert a.log_z == pytest.approx(b.log_z, abs=1e-4)
    assert sum(seen) >= 4


def assert_rescored_unless_penalised(tiny: Tiny, output: Any) -> None:
    """Penalties and temperatures change p0; where there are none, one teacher-forced pass gives it."""
    if len(output.prompt_token_ids) == 31:
        assert_rescored(tiny, output)


@pytest.mark.v2
def test_rescoring_sees_a_wrong_fork(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails when partial blocks are not copied."""
    monkeypatch.setattr("vllm_twist.kernels.ops.copy_partial_blocks", lambda *args, **kwargs: None)
    (output,) = generate(
        engine(wide), [prompt_of(40)], params(max_tokens=12, ignore_eos=True, seed=5, twist_particles=8, **EVERY_STEP)
    )
    with pytest.raises(AssertionError):
        assert_rescored(wide, output)


@pytest.mark.v2
def test_memory_is_measured_with_the_head(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's trial runs, by which it sizes the KV cache, evaluate the head and pass over the vocabulary."""
    llm, values = engine(wide), []
    twist = worker_of(llm).twist
    monkeypatch.setattr(twist.sampler, "fork", None)
    real = twist.readout.log_psi
    monkeypatch.setattr(twist.readout, "log_psi", lambda condition: values.append(real(condition)) or values[-1])
    worker_of(llm).model_runner._dummy_sampler_run(torch.randn(5, 64))
    assert [x.shape for x in values] == [(5, wide.vocab)]


@pytest.mark.v2
def test_particle_that_ends_leaves_one_step_later(engine, wide: Tiny) -> None:
    """A lane whose particle has ended is in the batch once more at most, takes no part, and is then gone."""
    llm = engine(wide)
    core, scheduler, table = llm.llm_engine, scheduler_of(llm), lane_table(llm)
    core.add_request("leaving", {"prompt_token_ids": prompt_of(20)}, params(max_tokens=20, seed=2, twist_particles=16))
    real, lingering, seen = table.step, {}, []

    def step(logits: Any, found: Any, log_psi: Any) -> Any:
        before = table.lanes.ended[found.slots].tolist()
        weights = table.lanes.log_w[found.slots].tolist()
        drawn = real(logits, found, log_psi)
        for slot, ended, weight in zip(found.slots_np.tolist(), before, weights, strict=True):
            if ended:
                lingering[slot] = lingering.get(slot, 0) + 1
                assert table.lanes.log_w[slot] == weight
            else:
                lingering.pop(slot, None)
        seen.append(sum(before))
        assert max(lingering.values(), default=0) <= (1 if RUNNER == "v2-async" else 0)
        return drawn

    table.step = step
    try:
        while core.has_unfinished_requests():
            core.step()
    finally:
        del table.step
    assert not scheduler.groups
    assert any(seen) == (RUNNER == "v2-async"), "the test must see particles end"


@pytest.mark.v2
def test_plain_rows_are_drawn_by_vllm(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a mixed batch the logits of plain requests are neither written to nor drawn from by the step."""
    from vllm_twist.engine.v2.state import SlotTable

    seen, real = [], SlotTable.step

    def spy(self: Any, logits: torch.Tensor, found: Any, log_psi: torch.Tensor) -> Any:
        before = logits.clone()
        drawn = real(self, logits, found, log_psi)
        assert torch.equal(logits, before)
        seen.append((len(found.rows_np), len(logits)))
        return drawn

    monkeypatch.setattr(SlotTable, "step", spy)
    plain = [params(max_tokens=8, ignore_eos=True, seed=1, twist=0), params(max_tokens=8, temperature=0.0, twist=0)]
    prompts = [prompt_of(9), prompt_of(17)]
    alone = generate(engine(wide), prompts, plain)
    assert not seen
    group = params(max_tokens=6, ignore_eos=True, twist_particles=7)
    mixed = generate(engine(wide), [*prompts, prompt_of(5)], [*plain, group])
    assert (7, 9) in seen
    for a, b in zip(alone, mixed, strict=False):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids


class Waits(TorchFunctionMode):
    """Raise where Python reads a tensor: the device would have to be waited for."""

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS:
            raise AssertionError(f"Tensor.{name} waits for the device")
        return func(*args, **(kwargs or {}))


class Synchronises(TorchDispatchMode):
    """Raise at operations whose result has a size or a value that only the device knows."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.OPERATIONS:
            raise AssertionError(f"aten.{name} waits for the device")
        if name in ("index", "index_put_", "index_put") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ):
            raise AssertionError("indexing by a mask waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse everything that would wait for a device, but for what Triton's interpreter does in a kernel's place."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    real = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return real(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    try:
        with Waits(), Synchronises():
            yield
    finally:
        GridExecutor.__call__ = real


@pytest.mark.v2
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_fill_(x > 0, 1.0)[torch.tensor([True, False])],
    ],
    ids=["item", "tolist", "cpu", "bool", "mask", "nonzero", "mask made here"],
)
def test_the_check_for_waiting_sees_it(read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), no_waiting():
        read(torch.tensor([1.0, -1.0]))


@pytest.mark.v2
def test_the_step_never_waits_for_the_device(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding lanes, weighing, resampling, drawing, forking and preparing the output: no read, no mask, no loop.

    With the kernels, as on a GPU; on mixed and on pure batches, with temperatures, scales, penalties and logprobs,
    pinned lanes and the base proposal.
    """
    from vllm_twist.engine.v2.sampler import StepOutputs, TwistSampler
    from vllm_twist.engine.v2.state import SlotTable

    llm, entered = engine(wide), []
    generate(llm, [prompt_of(5)], params(max_tokens=2, twist_particles=2))  # sets the fork up
    for owner, name in ((TwistSampler, "find_lanes"), (SlotTable, "step"), (StepOutputs, "prepare_output")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), name, entered))
    fork = type(worker_of(llm).twist.sampler.fork)
    monkeypatch.setattr(fork, "__call__", watched(fork.__call__, "fork", entered))
    monkeypatch.setattr(lane_table(llm), "backend", "triton")
    monkeypatch.setattr(worker_of(llm).twist.sampler.fork, "backend", "triton")
    group = params(
        max_tokens=4, seed=1, twist_particles=3, temperature=0.7, presence_penalty=0.1, twist_scale=0.9, logprobs=1,
        **EVERY_STEP,
    )  # fmt: skip
    generate(llm, [prompt_of(9), prompt_of(5)], [group, params(max_tokens=3, twist=0)])
    generate(llm, [prompt_of(9)], params(max_tokens=4, twist_particles=3, **EVERY_STEP))
    held = params(max_tokens=4, twist_particles=3, twist_pinned=[5, 9, 8, 4], **EVERY_STEP)
    base = params(max_tokens=4, twist_particles=3, twist_proposal="base", **EVERY_STEP)
    generate(llm, [prompt_of(9), prompt_of(8)], [held, base])
    assert {"find_lanes", "step", "prepare_output", "fork"} == set(entered)


def watched(real: Callable[..., Any], name: str, entered: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        entered.append(name)
        with no_waiting():
            return real(*args, **kwargs)

    return call


@pytest.mark.v2
def test_state_survives_a_preemption(engine, wide: Tiny) -> None:
    """A group that is parked mid-way goes on with its weights, and draws what it would have drawn.

    Not while it is forking: its leader would come back a token ahead, and lanes do not resample out of step.
    """
    llm = engine(wide)
    request = params(max_tokens=14, ignore_eos=True, seed=4, twist_particles=4, twist_return_particles=1)
    (expected,) = generate(llm, [prompt_of(30)], request)
    core = llm.llm_engine
    core.add_request("parked", {"prompt_token_ids": prompt_of(30)}, request)
    outputs = []
    for step in range(200):
        outputs += [output for output in core.step() if output.finished]
        if step in (5, 9):
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if not core.has_unfinished_requests():
            break
    got, want = results(outputs[0])[0], results(expected)[0]
    assert [p.token_ids for p in got.particles] == [p.token_ids for p in want.particles]
    assert got.log_z == pytest.approx(want.log_z, abs=1e-4) and got.num_resamplings == want.num_resamplings
    assert not set(lane_table(llm).slots) - scheduler_of(llm).finished_req_ids
