"""Requests that nobody would write, on an engine of its own: each ends once, and nothing is left of any.

Derandomised: the examples are the same in every run. A failure prints the requests, smallest first.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.engines import params, prompt_of, scheduler_of, worker_of
from support.models import Tiny, random_model
from support.runners import RUNNER
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from vllm_twist import results

VOCAB, SLOTS = 40, 8
tokens = st.integers(0, VOCAB - 1)
token_lists = st.lists(tokens, min_size=1, max_size=4, unique=True)


def sometimes(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for any subset of options."""
    return st.fixed_dictionaries({}, optional=options)


SAMPLING = sometimes(
    temperature=st.sampled_from([0.0, 1e-6, 0.01, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, VOCAB, 10**6, 2**31 - 1]),
    top_p=st.sampled_from([1e-9, 0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    repetition_penalty=st.sampled_from([1e-3, 0.5, 1.0, 2.0, 1e30]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 100.0]), min_size=1, max_size=3),
    allowed_token_ids=token_lists,
    min_tokens=st.integers(0, 3),
    logprobs=st.sampled_from([0, 1, 5, -1]),
    stop_token_ids=token_lists,
    ignore_eos=st.booleans(),
    n=st.integers(1, 3),
    seed=st.sampled_from([0, 1, -1, 2**31, 2**62, 2**63 - 1, 2**63]),
    skip_reading_prefix_cache=st.booleans(),
)
TWIST = st.fixed_dictionaries(
    {"twist_particles": st.integers(1, SLOTS)},
    optional={
        "twist_scale": st.sampled_from([0, 0.0, -1.0, 1.0, 3e38, -3e38, 1e-30, 1e308, -1e308]),
        "twist_ess_threshold": st.sampled_from([0, 0.5, 1, 5, 1e300]),
        "twist_resampling": st.sampled_from(["systematic", "stratified", "multinomial", "residual"]),
        "twist_proposal": st.sampled_from(["twist", "base"]),
        # Repeated to `max_tokens` tokens: most are valid, if not possible.
        "twist_pinned": st.lists(st.integers(2, VOCAB), min_size=1, max_size=6),
        "twist_return_particles": st.booleans(),
        "twist_trace": st.booleans(),
    },
)
PLAIN = st.one_of(st.just({"twist": 0}), st.just({"twist": 0, "prompt_logprobs": 2}))
CONDITION = st.fixed_dictionaries({"twist_condition": st.lists(tokens, min_size=1, max_size=40)})
REQUEST = st.fixed_dictionaries(
    {
        "length": st.sampled_from([1, 2, 31, 32, 33, 65]),
        "max_tokens": st.integers(1, 6),
        "priority": st.sampled_from([0, 0, -(2**31), 2**31]),
        "sampling": SAMPLING,
        "twist": st.one_of(TWIST, TWIST, PLAIN),
        "condition": CONDITION,
        "arrives": st.integers(0, 4),
        # Steps until it is aborted.
        "leaves": st.one_of(st.none(), st.none(), st.integers(0, 6)),
    }
)


SIMPLE = {"length": 2, "max_tokens": 3, "priority": 0, "arrives": 0, "leaves": None}
SIMPLE |= {"condition": {"twist_condition": [2]}}
#: Weights that are no numbers, and a continuation that is forbidden besides.
TWICE_WRONG = {"twist_particles": 1, "twist_scale": 3e38, "twist_pinned": [7, 8, 9]}
#: Names of the requests, of which a failed example may leave some.
EXAMPLE = itertools.count()


def fuzzed(llm: Any, requests: list[dict[str, Any]], resets: set[int], conditional: bool) -> None:
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    waiting: dict[str, dict[str, Any]] = {}
    prefix = next(EXAMPLE)
    for step in range(600):
        for i, request in enumerate(requests):
            if request["arrives"] != step:
                continue
            options = {**request["sampling"], **request["twist"], "max_tokens": request["max_tokens"]}
            if "twist_pinned" in options:
                options["twist_pinned"] = (options["twist_pinned"] * 6)[: request["max_tokens"]]
                if options.get("twist_resampling") != "residual":
                    options.pop("twist_resampling", None)
            if conditional and "twist" not in options:
                options |= request["condition"]
            try:
                parameters = params(output_kind=RequestOutputKind.FINAL_ONLY, **options)
                prompt = {"prompt_token_ids": prompt_of(request["length"])}
                core.add_request(f"{prefix}-{i}", prompt, parameters, priority=request["priority"])
            except (ValueError, VLLMValidationError) as error:
                assert str(error)
                continue
            waiting[f"{prefix}-{i}"] = request
        for output in core.step():
            if output.finished:
                request = waiting.pop(output.request_id)
                if "twist_particles" in request["twist"]:
                    check(output, request)
        for name in [n for n, r in waiting.items() if r["leaves"] is not None and r["arrives"] + r["leaves"] == step]:
            core.abort_request([name])
            del waiting[name]
        if step in resets:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if step > 4 and not core.has_unfinished_requests() and not scheduler.has_requests():
            break
    assert not waiting
    # What is left would be the next example's.
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1
    assert not scheduler.requests and not scheduler.groups and not scheduler.group_of and not scheduler.reading
    assert not scheduler.staged and not scheduler.ready and scheduler.get_request_counts() == (0, 0)
    assert not worker_of(llm).twist.table.slots


def forget(llm: Any) -> None:
    """Clear up after an example that failed, so that the next ones, which narrow it down, start afresh."""
    core = llm.llm_engine
    core.abort_request(list(core.output_processor.request_states), internal=True)
    for _ in range(3):
        core.step()


def check(output: Any, request: dict[str, Any]) -> None:
    n = request["sampling"].get("n", 1)
    assert len(output.outputs) == n
    if any(completion.finish_reason == "error" for completion in output.outputs):
        with pytest.raises(RuntimeError, match="was ended"):
            results(output)
        return
    for completion, group in zip(output.outputs, results(output), strict=True):
        assert 1 <= len(completion.token_ids) <= request["max_tokens"]
        assert math.isfinite(group.log_z) and 0 < group.ess <= request["twist"]["twist_particles"] + 1e-6


EXAMPLES = 150 if RUNNER == "v1" else 3


@pytest.mark.v2("wide")
@pytest.mark.parametrize("kind", ["wide", "conditional"])
def test_every_request_ends_once(engine, request: pytest.FixtureRequest, kind: str) -> None:
    """Whatever a request holds it is refused, fails or is answered; aborts and cache resets come in between."""
    conditional = kind == "conditional"
    if conditional:
        make = request.getfixturevalue("tmp_path_factory").mktemp
        tiny: Tiny = random_model(make("conditional"), vocab=VOCAB, eos=1, conditional=True)
    else:
        tiny = request.getfixturevalue("wide")
    llm = engine(
        tiny, twist_particles=2, max_num_seqs=SLOTS, num_gpu_blocks_override=31, scheduling_policy="priority",
        max_logprobs=VOCAB,
    )  # fmt: skip

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @example([{**SIMPLE, "sampling": {"allowed_token_ids": [4, 5, 6]}, "twist": TWICE_WRONG}], set())
    @example([{**SIMPLE, "sampling": {"top_k": 10**6}, "twist": {"twist_particles": 2}}], set())
    @given(st.lists(REQUEST, min_size=1, max_size=4), st.sets(st.integers(1, 8), max_size=1))
    def run(requests: list[dict[str, Any]], resets: set[int]) -> None:
        try:
            fuzzed(llm, requests, resets, conditional)
        except BaseException:
            forget(llm)
            raise

    run()
