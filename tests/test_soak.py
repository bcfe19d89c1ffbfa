"""Random load on small engines: whatever comes together, everything is answered right and nothing is left over."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.engines import assert_rescored, params, prompt_of, scheduler_of, worker_of
from support.models import Tiny
from support.runners import RUNNER

from vllm_twist import results
from vllm_twist.engine.groups import Group

#: Requests per load.
LOAD = 100 if RUNNER == "v1" else 10
SCHEMES = ["systematic", "stratified", "multinomial", "residual"]


def random_request(rng: random.Random, index: int) -> tuple[list[int], dict[str, Any]]:
    prompt = prompt_of(rng.choice([1, 5, 31, 32, 33, 64, 70]))
    options: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 5, 40, 100]),
        "ignore_eos": rng.random() < 0.4,
        "twist": int(rng.random() < 0.7),
    }
    if options["twist"]:
        options |= {
            "seed": rng.choice([None, index]),
            "twist_particles": rng.choice([1, 2, 5, 8, 16, 40]),
            "twist_ess_threshold": rng.choice([0, 0.5, 1.0]),
            "twist_resampling": rng.choice(SCHEMES),
            "twist_return_particles": 1,
        }
    return prompt, options


@pytest.mark.v2("1")
@pytest.mark.parametrize("seed", range(8))
def test_random_load(engine, wide: Tiny, totals: list[Group], seed: int):
    """Requests, aborts and cache resets at random, with too few slots, blocks or tokens a step for all of them.

    Every particle is rescored by a teacher-forced pass; in the end no request, lane, slot or
    block may be left. A scheduler that stalls fails by the number of steps.
    """
    rng = random.Random(seed)
    policy = rng.choice(["fcfs", "priority"])
    llm = engine(
        wide,
        twist_particles=2,
        num_gpu_blocks_override=rng.choice([40, 70, 200]),
        max_num_seqs=rng.choice([8, 20, 48]),
        enable_prefix_caching=rng.random() < 0.6,
        max_num_batched_tokens=rng.choice([48, 64, 512]),
        scheduling_policy=policy,
    )
    core = llm.llm_engine
    waiting: dict[str, dict[str, Any]] = {}
    finished = refused = sent = 0
    for _ in range(10_000):
        if sent < LOAD and len(waiting) < 12 and rng.random() < 0.5:
            prompt, options = random_request(rng, sent)
            name, sent = f"soak-{seed}-{sent}", sent + 1
            priority = rng.choice([0, 1, 2]) if policy == "priority" else 0
            try:
                core.add_request(name, {"prompt_token_ids": prompt}, params(**options), priority=priority)
                waiting[name] = options
            except ValueError as error:
                assert "`twist_particles`" in str(error)
                refused += 1
        for output in core.step():
            if output.finished:
                options = waiting.pop(output.request_id)
                finished += 1
                if options["twist"]:
                    assert len(results(output)[0].particles) == options["twist_particles"]
                    assert_rescored(wide, output)
        if waiting and rng.random() < 0.02:
            name = rng.choice(sorted(waiting))
            core.abort_request([name])
            del waiting[name]
        if rng.random() < 0.01:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if sent == LOAD and not waiting:
            break
    else:
        pytest.fail(f"stalled with {sorted(waiting)}")
    assert finished > 0.4 * LOAD and finished + refused <= sent and totals
    core.step()
    scheduler = scheduler_of(llm)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1
    assert not scheduler.requests and not scheduler.groups and not scheduler.group_of
    assert scheduler.get_request_counts() == (0, 0)
    assert not worker_of(llm).twist.table.slots
