"""Conditional twists in the engine: psi(s, o_T), with the state of o_T computed by the engine once per group.

Statistical checks as in ``test_engine_exact``: fixed seeds, 4 standard errors, 6e-5 each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from support.engines import EVERY_STEP, PROMPTS, generate, params, run, run_pinned, scheduler_of, worker_of
from support.laws import assert_samples_the_law, enumerate_law, exact_samples, within
from support.models import Tiny
from support.runners import fewer

from vllm_twist import TwistHead, results

CONDITIONS = [[2, 3, 3], [3], [1, 0] * 30]


@pytest.mark.v2("3")
@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: str(len(condition)))
def test_samples_the_conditional_target(engine, conditional: Tiny, condition: list[int]) -> None:
    law = enumerate_law(conditional, PROMPTS["below"], 4, condition=condition)
    outputs = run(
        engine(conditional),
        PROMPTS["below"],
        500,
        particles=6,
        horizon=4,
        twist_condition=condition,
        twist_ess_threshold=1.0,
    )
    assert any(results(output)[0].num_resamplings for output in outputs)
    assert_samples_the_law(outputs, law, first=2)


@pytest.mark.v2
def test_conditions_are_not_mixed_up(engine, conditional: Tiny) -> None:
    """In one batch every group is twisted by its own condition: log psi is what a teacher-forced pass gives."""
    llm, prompt = engine(conditional), PROMPTS["below"]
    requests = [
        params(seed=seed, max_tokens=3, twist_particles=4, twist_condition=condition, **EVERY_STEP)
        for seed in range(6)
        for condition in CONDITIONS
    ]
    mixed = [*requests, params(seed=5, max_tokens=3, twist=0)]
    outputs = generate(llm, [prompt] * len(mixed), mixed)
    for i, output in enumerate(outputs[:-1]):
        for particle in results(output)[0].particles:
            prefix, last = [prompt + particle.token_ids[:-1]], particle.token_ids[-1]
            values = [conditional.logits_and_log_psi(prefix, condition)[1][0, last].item() for condition in CONDITIONS]
            own = values.pop(i % 3)
            assert particle.log_psi == pytest.approx(own, abs=2e-4)
            assert min(abs(value - own) for value in values) > 1e-3
    (alone,) = generate(llm, [prompt], requests[0])
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert results(alone)[0].log_z == pytest.approx(results(outputs[0])[0].log_z, abs=1e-4)


def test_pinned_with_a_condition(engine, conditional: Tiny) -> None:
    law = enumerate_law(conditional, PROMPTS["below"], 4, condition=[2, 3])
    pinned = exact_samples(law, fewer(400))
    options = {"twist_particles": 3, "twist_ess_threshold": 1.0, "twist_condition": [2, 3]}
    outputs = run_pinned(engine(conditional), PROMPTS["below"], pinned, horizon=4, **options)
    assert within([math.exp(law.log_z - results(output)[0].log_z) for output in outputs], 1.0)


def test_one_pass_per_group(engine, conditional: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The condition is one more prompt of the batch: its own tokens are computed, once, whatever K is."""
    scheduler, counts = scheduler_of(engine(conditional)), []
    real = scheduler._take_conditions
    monkeypatch.setattr(scheduler, "_take_conditions", lambda step: (counts.append(len(step.conditions)), real(step)))
    request = params(seed=1, max_tokens=6, ignore_eos=True, twist_particles=16, twist_condition=[2, 3], **EVERY_STEP)
    generate(engine(conditional), [PROMPTS["below"]], request)
    assert sum(counts) == 1
    assert not scheduler.reading


@pytest.mark.v2
def test_preemption_keeps_the_condition(engine, conditional: Tiny) -> None:
    """A cache that is reset under way throws the KV of the lanes away; the groups come out the same."""
    llm, condition = engine(conditional), [3, 2, 2]
    options = {"max_tokens": 20, "ignore_eos": True, "twist_particles": 4, "twist_condition": condition, "seed": 3}
    (undisturbed,) = generate(llm, [PROMPTS["below"]], params(**options))
    core = llm.llm_engine
    core.add_request("disturbed", {"prompt_token_ids": PROMPTS["below"]}, params(**options))
    outputs: list[Any] = []
    for step in range(200):
        if step in (1, 5):  # while o_T is being read, and later
            core.reset_prefix_cache(reset_running_requests=True)
        outputs += [output for output in core.step() if output.finished]
        if outputs:
            break
    assert outputs[0].outputs[0].token_ids == undisturbed.outputs[0].token_ids
    assert results(outputs[0])[0].log_z == pytest.approx(results(undisturbed)[0].log_z, abs=1e-3)
    assert not scheduler_of(llm).reading


@pytest.mark.v2("2")
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_abort(engine, conditional: Tiny, steps: int) -> None:
    """Nothing is left of a group that is aborted, while its condition is read or later."""
    llm = engine(conditional)
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    request = params(max_tokens=30, ignore_eos=True, twist_particles=4, twist_condition=[2, 3])
    internal = core.add_request("gone", {"prompt_token_ids": PROMPTS["below"]}, request)
    for _ in range(steps):
        core.step()
    core.abort_request([internal], internal=True)
    for _ in range(4):
        core.step()
    assert not core.has_unfinished_requests()
    assert not scheduler.reading and not scheduler.groups and not scheduler.staged and not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1


def test_full_batch_waits_for_the_condition(engine, conditional: Tiny) -> None:
    """Groups as large as the batch: the next one's condition is read when a slot is free, and nobody waits for ever."""
    requests = [
        params(seed=seed, max_tokens=4, twist_particles=64, twist_condition=condition)
        for seed, condition in enumerate(CONDITIONS)
    ]
    outputs = generate(engine(conditional), [PROMPTS["below"]] * 3, requests)
    assert [len(results(output)[0].particles or ()) for output in outputs] == [0] * 3
    assert all(output.outputs[0].finish_reason in ("stop", "length") for output in outputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "`twist_condition` is missing, got none, but the twist head is conditional: pass the token ids of o_T"),
        ({"twist_condition": []}, r"`twist_condition` must be a list of at least one token id, got \[\]"),
        ({"twist_condition": "great"}, "`twist_condition` must be a list of at least one token id, got 'great'"),
        ({"twist_condition": [4]}, "`twist_condition` must hold token ids below 4, got 4: use the model's tokenizer"),
        ({"twist_condition": [2] * 256}, "must have fewer than `max_model_len`=256 tokens, got 256: shorten it"),
    ],
)
def test_bad_conditions_are_refused(engine, conditional: Tiny, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(engine(conditional), [[0, 2]], params(**options))


def test_condition_without_a_conditional_head_is_refused(engine, small: Tiny) -> None:
    message = "`twist_condition` needs a conditional twist head, got 2 token ids for one that is not: drop it"
    with pytest.raises(ValueError, match=message):
        generate(engine(small), [[0, 2]], params(twist_condition=[2, 3]))


def test_plain_requests_need_no_condition(engine, conditional: Tiny) -> None:
    (output,) = generate(engine(conditional), [[0, 2]], params(twist=0, max_tokens=3, seed=1))
    assert output.outputs[0].token_ids


def test_head_of_the_other_kind_is_refused(engine, conditional: Tiny, small: Tiny, tmp_path) -> None:
    worker = worker_of(engine(conditional))
    with pytest.raises(ValueError, match="is not conditional, the engine was started with one that is conditional: st"):
        worker.load_twist_head(str(small.head_path))
    other = TwistHead.create(dataclasses.replace(conditional.head.config), seed=9)
    other.save_pretrained(tmp_path)
    before = worker.readout.head
    worker.load_twist_head(str(tmp_path))
    assert torch.equal(worker.readout.head.weight, other.weight)
    worker.readout.head = before


@pytest.mark.v2
def test_prompt_logprobs_beside_a_condition(engine, conditional: Tiny) -> None:
    """vLLM reads a prompt's hidden states out after the step's own, which must not take the condition along."""
    core, scheduler = engine(conditional).llm_engine, scheduler_of(engine(conditional))
    prompt, condition, outputs = [3, 2, 0, 2], [2, 3, 3], {}
    twisted = params(max_tokens=4, seed=1, twist_particles=4, twist_condition=condition, **EVERY_STEP)
    core.add_request("twisted", {"prompt_token_ids": PROMPTS["below"]}, twisted)
    core.add_request("plain", {"prompt_token_ids": prompt}, params(max_tokens=2, twist=0, prompt_logprobs=2))
    for _ in range(50):
        outputs.update({output.request_id: output for output in core.step() if output.finished})
        if not core.has_unfinished_requests():
            break
    assert set(outputs) == {"twisted", "plain"} and not scheduler.reading
    for particle in results(outputs["twisted"])[0].particles:
        prefix, last = [PROMPTS["below"] + particle.token_ids[:-1]], particle.token_ids[-1]
        expected = conditional.logits_and_log_psi(prefix, condition)[1][0, last].item()
        assert particle.log_psi == pytest.approx(expected, abs=2e-4)
    expected_log_p = conditional.log_p([prompt])[0]
    for row, (token, entry) in enumerate(zip(prompt[1:], outputs["plain"].prompt_logprobs[1:], strict=True)):
        assert entry[token].logprob == pytest.approx(expected_log_p[row, token].item(), abs=2e-4)
