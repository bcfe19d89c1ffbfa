"""Where groups meet the rest of the scheduler: block tables, prefix caches, pauses, metrics; all on small engines."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from support.engines import EVERY_STEP, assert_rescored, generate, params, prompt_of, scheduler_of
from support.models import Tiny
from support.runners import RUNNER
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from vllm_twist import results
from vllm_twist.engine.scheduler import TwistSchedulerMixin
from vllm_twist.engine.worker import TwistWorkerMixin

#: 24 blocks: one group below at its full length even if its particles share nothing, and two hardly ever.
TIGHT = {"num_gpu_blocks_override": 25}
ENGINES = {
    "caching": TIGHT,
    "no-caching": {**TIGHT, "enable_prefix_caching": False},
    "parts": {**TIGHT, "long_prefill_token_threshold": 40, "max_num_batched_tokens": 512},
}


def worker_tables(worker: Any, request_id: str) -> list[list[int]]:
    """Return a request's blocks as the worker knows them, once for every place where it keeps them."""
    runner = worker.model_runner
    if RUNNER == "v1":
        row = runner.input_batch.req_id_to_index[request_id]
        table = runner.input_batch.block_table.block_tables[0].get_numpy_array()[row].tolist()
        return [table, runner.requests[request_id].block_ids[0]]
    row = runner.req_states.req_id_to_index[request_id]
    return [runner.block_tables.block_tables[0].gpu[row].tolist()]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compare the worker's block tables with the scheduler's, for every request and step; return how many differed.

    The worker's are noted when it has done a step, the scheduler's when it has heard of that step: under asynchronous
    scheduling the worker has done another one by then.
    """
    noted: dict[int, dict[str, tuple[int, list[list[int]]]]] = {}
    changed: list[int] = []
    execute, sample = TwistWorkerMixin.execute_model, TwistWorkerMixin.sample_tokens
    update, schedule = TwistSchedulerMixin.update_from_output, TwistSchedulerMixin.schedule
    scheduler: Any = None
    current: Any = None

    def schedule_(self: Any, *args: Any) -> Any:
        nonlocal scheduler
        scheduler = self
        return schedule(self, *args)

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        nonlocal current
        current = scheduler_output
        return execute(self, scheduler_output)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = sample(self, grammar_output)
        step = noted[id(current)] = {}
        for request_id in current.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            count = -(-request.num_computed_tokens // 32)
            tables = [table[:count] for table in worker_tables(self, request_id)]
            step[request_id] = request.num_preemptions, tables
        return output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        held = self.blocks.tables.req_to_blocks
        before = {name: [block.block_id for block in blocks] for name, blocks in held.items()}
        outputs = update(self, scheduler_output, model_runner_output)
        for request_id, (preemptions, tables) in noted.pop(id(scheduler_output), {}).items():
            request = self.requests.get(request_id)
            if request is None or request.num_preemptions != preemptions:
                continue
            own = [block.block_id for block in self.blocks.tables.req_to_blocks[request_id]]
            changed.append(own != before[request_id])
            assert all(table == own[: len(table)] for table in tables), f"{request_id}: {tables} in the worker, {own}"
        return outputs

    for owner, spies in (
        (TwistSchedulerMixin, {"schedule": schedule_, "update_from_output": update_from_output}),
        (TwistWorkerMixin, {"execute_model": execute_model, "sample_tokens": sample_tokens}),
    ):
        for name, spy in spies.items():
            monkeypatch.setattr(owner, name, spy)
    return changed


@pytest.mark.v2("no-caching")
@pytest.mark.parametrize("kind", ENGINES)
def test_worker_and_scheduler_hold_the_same_tables(clean, wide: Tiny, compared: list[int], kind: str):
    """Whatever was preempted, and however prompts are computed, a fork gives a lane the same blocks on both sides."""
    llm, rng = clean(wide, **ENGINES[kind]), random.Random(kind)
    core, outputs = llm.llm_engine, []
    for index in range(12 if RUNNER == "v1" else 3):
        options = {"max_tokens": rng.choice([20, 40]), "ignore_eos": rng.random() < 0.7}
        if index % 4 == 3:
            options["twist"] = 0
        else:
            options |= {"seed": index, "twist_particles": 4, "twist_return_particles": 1}
            options["twist_ess_threshold"] = rng.choice([0.6, 1.0])
        prompt = {"prompt_token_ids": prompt_of(rng.choice([33, 70, 97]))}
        core.add_request(f"{kind}-{index}", prompt, params(**options))
    for step in range(2000):
        outputs += [output for output in core.step() if output.finished]
        if rng.random() < 0.03 or step == 6:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if not core.has_unfinished_requests():
            break
    core.step()
    assert len(outputs) == index + 1 and any(compared), "the test must fork whole blocks"
    for output in outputs:
        if output.kv_transfer_params:
            assert_rescored(wide, output)


#: Engine, options, and how many blocks nine lanes of four blocks each need at most; None if they fit.
SHARING: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "skipped": ("caching", {"skip_reading_prefix_cache": True}, 36),
    "salted": ("caching", {}, None),
    "parts": ("parts", {}, 36),
    "no-caching": ("no-caching", {}, 36),
}


@pytest.mark.parametrize("case", SHARING)
def test_lanes_that_share_nothing_are_counted_one_by_one(clean, wide: Tiny, case: str):
    """Preempted lanes share their prompt again where they find it in the prefix cache at once, and only there.

    Prompts of 97 tokens, outputs of 30: groups for which too few blocks are set aside never finish.
    """
    kind, options, needed = SHARING[case]
    llm = clean(wide, **ENGINES[kind])
    core = llm.llm_engine
    common = {"max_tokens": 30, "ignore_eos": True, "twist_particles": 5, "twist_ess_threshold": 0.0, **options}
    for index in range(3):
        prompt = {"prompt_token_ids": prompt_of(97), **({"cache_salt": f"{index}"} if case == "salted" else {})}
        core.add_request(f"{case}-{index}", prompt, params(seed=index, **common))
    finished = []
    for step in range(300):
        finished += [output for output in core.step() if output.finished]
        if step in (8, 20, 30):
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if not core.has_unfinished_requests():
            break
    assert len(finished) == 3
    many = params(**{**common, "twist_particles": 9})
    if needed is None:
        generate(llm, [prompt_of(97)], many)
    else:
        message = rf"`twist_particles`=9 can never fit into the KV cache: .* need up to {needed} blocks of 32 tokens"
        with pytest.raises(ValueError, match=message):
            generate(llm, [prompt_of(97)], many)


def drain(core: Any, scheduler: Any, most: int = 400) -> list[Any]:
    """Step until the engine has nothing to do, as its loop would; return what finished."""
    finished = []
    for _ in range(most):
        if not scheduler.has_requests():
            return finished
        finished += [output for output in core.step() if output.finished]
    pytest.fail(f"still {scheduler.get_num_unfinished_requests()} unfinished requests after {most} steps")


@pytest.mark.v2("1-wait")
@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
@pytest.mark.parametrize("length", [1, 40])
def test_pause_at_any_moment(clean, wide: Tiny, mode: str, length: int):
    """What is under way drains, is kept or aborted; what waits goes on afterwards. Nothing is lost, nothing hangs."""
    llm = clean(wide, max_num_batched_tokens=16, max_num_seqs=16)
    core, scheduler, inner = llm.llm_engine, scheduler_of(llm), llm.llm_engine.engine_core.engine_core
    requests = [
        params(max_tokens=8, ignore_eos=True, seed=1, twist_particles=9, **EVERY_STEP),
        params(max_tokens=8, ignore_eos=True, twist=0),
        params(max_tokens=8, ignore_eos=True, seed=2, twist_particles=9, **EVERY_STEP),
    ]
    for moment in (0, 1, 2, 3, 4, 6, 9) if RUNNER == "v1" else (1,):
        names = [f"{mode}-{length}-{moment}-{index}" for index in range(3)]
        for name, request in zip(names, requests, strict=True):
            core.add_request(name, {"prompt_token_ids": prompt_of(length)}, request)
        finished = []
        for _ in range(moment):
            finished += [output for output in core.step() if output.finished]
        if mode == "wait":
            # As EngineCoreProc does, whose loop calls back when there is no more work.
            scheduler.set_pause_state(PauseState.PAUSED_NEW)
            finished += drain(core, scheduler)
            assert not scheduler.running and not scheduler.group_of
            inner._finish_pause(True)
        else:
            inner.pause_scheduler(mode)
            finished += drain(core, scheduler)
        if mode == "abort":
            assert not scheduler.groups and not scheduler.staged
            core.abort_request(names)
        core.add_request(f"late-{names[0]}", {"prompt_token_ids": prompt_of(length)}, requests[0])
        finished += drain(core, scheduler)
        assert not any(output.request_id.startswith("late") for output in finished)
        inner.resume_scheduler()
        finished += drain(core, scheduler)
        ended = [output.request_id for output in finished]
        assert len(set(ended)) == len(ended)
        assert set(ended) >= {f"late-{names[0]}", *(names if mode != "abort" else ())}
        for output in finished:
            if output.kv_transfer_params:
                assert_rescored(wide, output)


def test_a_lane_preempted_alone_drains_with_its_group(clean, wide: Tiny):
    llm = clean(wide)
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    core.add_request(
        "g", {"prompt_token_ids": prompt_of(40)}, params(max_tokens=8, seed=1, twist_particles=4, **EVERY_STEP)
    )
    for _ in range(3):
        core.step()
    lane = scheduler.running[-1]
    scheduler.running.remove(lane)
    scheduler._preempt_request(lane, time.monotonic())
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    (output,) = drain(core, scheduler)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert_rescored(wide, output)


@pytest.fixture
def statistics(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[RequestStateStats, Any]]:
    """Return what the engine's loggers get of each finished request, by id, and what that was computed from."""
    found = {}
    real = IterationStats.update_from_finished_request

    def spy(self: IterationStats, **given: Any) -> None:
        real(self, **given)
        found[given["request_id"]] = given["req_stats"], self.finished_requests[-1]

    monkeypatch.setattr(IterationStats, "update_from_finished_request", spy)
    return found


def test_metrics_of_groups_and_of_those_behind_them(clean, wide: Tiny, statistics: Any):
    """Times are in order and lie within the test's own; what waits behind a group waits since it came."""
    llm = clean(wide, disable_log_stats=False, max_num_seqs=16)
    core = llm.llm_engine
    start, sent = time.monotonic(), {}
    for name, request in {
        "group": params(max_tokens=12, ignore_eos=True, seed=1, twist_particles=10, twist_ess_threshold=0.0),
        "parked": params(max_tokens=12, ignore_eos=True, seed=2, twist_particles=12),
        "plain": params(max_tokens=5, ignore_eos=True, twist=0),
        "failed": params(max_tokens=5, seed=3, twist_particles=4, twist_scale=3e38),
        "single": params(max_tokens=1, seed=4, twist_particles=1),
    }.items():
        core.add_request(name, {"prompt_token_ids": prompt_of(20)}, request)
        sent[name] = time.monotonic()
    steps = 0
    while core.has_unfinished_requests():
        core.step()
        steps += 1
        if steps == 6:
            assert llm.reset_prefix_cache(reset_running_requests=True)
    end = time.monotonic()
    assert len(statistics) == 5
    lengths = {"group": 12, "parked": 12, "plain": 5, "failed": 0, "single": 1}
    for name, (stats, summary) in statistics.items():
        assert start <= stats.queued_ts <= sent[name], name
        assert stats.queued_ts <= stats.scheduled_ts <= stats.first_token_ts <= stats.last_token_ts <= end, name
        assert summary.num_generation_tokens == lengths[name] and summary.num_prompt_tokens == 20
        for value in (summary.queued_time, summary.prefill_time, summary.decode_time, summary.inference_time):
            assert 0 <= value <= end - start
    preemptions = {name: stats.num_preemptions for name, (stats, _) in statistics.items()}
    assert preemptions == {"group": 1, "parked": 0, "plain": 0, "failed": 0, "single": 0}
    group, parked = statistics["group"][0], statistics["parked"][0]
    assert parked.scheduled_ts >= group.last_token_ts > statistics["plain"][0].queued_ts


def test_preemptions_are_counted_when_the_first_particle_has_ended(clean, wide: Tiny, statistics: Any):
    llm = clean(wide, disable_log_stats=False, max_num_seqs=16)
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    options = {"twist_particles": 3, "twist_ess_threshold": 0.0, "twist_pinned": [5, 1], "twist_resampling": "residual"}
    core.add_request("g", {"prompt_token_ids": prompt_of(20)}, params(max_tokens=20, seed=6, **options))
    while not scheduler.groups or next(iter(scheduler.groups.values())).lanes[next(iter(scheduler.groups))].live:
        core.step()
    assert llm.reset_prefix_cache(reset_running_requests=True)
    while core.has_unfinished_requests():
        core.step()
    ((stats, _),) = statistics.values()
    assert stats.num_preemptions == 1


def test_failure_before_the_first_step_reaches_the_client(clean, wide: Tiny, statistics: Any, monkeypatch):
    """A group that the engine refuses, not the frontend, is answered although there is nothing to run."""
    llm = clean(wide, disable_log_stats=False, max_num_seqs=16)
    monkeypatch.setattr("vllm_twist.engine.scheduler.fit_length", refuse)
    (output,) = generate(llm, [prompt_of(5)], params(twist_particles=2))
    with pytest.raises(RuntimeError, match="too rosy"):
        results(output)
    ((stats, _),) = statistics.values()
    assert 0 < stats.queued_ts <= stats.scheduled_ts <= stats.first_token_ts


def refuse(*args: Any, **kwargs: Any) -> int:
    raise ValueError("too rosy")


def test_long_continuations_take_their_own_size_and_leave_with_their_lanes():
    """Under Model Runner V2 a pinned lane costs its own tokens, once, and the lanes beside it nothing."""
    from vllm_twist.engine.v2.state import SlotTable
    from vllm_twist.engine.wire import LaneSpec

    def spec(name: str, pinned: tuple[int, ...] | None = None) -> LaneSpec:
        return LaneSpec(name, name, 0, 1, 2**15, 0.5, 0, 1.0, pinned=pinned, group_size=1)

    def size() -> int:
        values = [x for owner in (table, table.pins, table.lanes) for x in vars_of(owner)]
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)

    table = SlotTable(256, torch.device("cpu"))
    table.add(0, spec("a"), ())
    table.flush()
    before = size()
    table.add(1, spec("b", tuple(range(2**15))), ())
    table.add(2, spec("c", (7, 8, 9)), ())
    table.flush()
    assert size() - before <= 2 * (2**15 + 3) * 8
    assert [table.pins.lengths[slot].item() for slot in (0, 1, 2)] == [0, 2**15, 3]
    start = table.pins.starts[2]
    assert table.pins.tokens[start : start + 3].tolist() == [7, 8, 9]
    table.remove(["b"])
    table.add(3, spec("d"), ())
    table.flush()
    assert table.pins.tokens.tolist() == [7, 8, 9]
    table.add(2, spec("e"), ())  # a slot given to another before its lane is known to have left
    table.remove(["c"])
    table.flush()
    assert table.pins is None and size() == before


def vars_of(owner: Any) -> list[Any]:
    return [] if owner is None else list(owner) if isinstance(owner, tuple) else list(vars(owner).values())
