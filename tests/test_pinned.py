"""Conditional SMC in the engine: a pinned lane, and the upper bound of log Z that comes with it.

Pinned continuations are drawn from sigma by enumeration. Statistical checks use fixed seeds and 4
standard errors, a false-alarm probability of 6e-5 each; the engine with plain systematic
resampling fails them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.engines import PROMPTS, run, run_pinned
from support.laws import enumerate_law, exact_samples, within
from support.models import Tiny
from support.runners import fewer

from vllm_twist import results

CASES = [
    # particles, groups, threshold, scheme, proposal
    (1, 1500, 0.5, "multinomial", "twist"),
    (2, 1500, 1.0, "multinomial", "twist"),
    (3, 1000, 1.0, "multinomial", "base"),
    (3, 1000, 0.8, "multinomial", "twist"),
    (3, 1000, 0.0, "multinomial", "base"),
    (8, 500, 1.0, "multinomial", "twist"),
    (3, 1000, 1.0, "residual", "base"),
    (8, 500, 1.0, "residual", "twist"),
]


@pytest.mark.v2("8-500-1.0-residual-twist")
@pytest.mark.parametrize("particles, groups, threshold, scheme, proposal", CASES)
def test_reciprocal_unbiased(
    engine, small: Tiny, particles: int, groups: int, threshold: float, scheme: str, proposal: str
):
    """Z E[1 / Z-hat] = 1 around exact samples, with EOS inside the horizon; LB <= log Z <= UB."""
    llm, prompt, horizon = engine(small), PROMPTS["below"], 5
    law = enumerate_law(small, prompt, horizon)
    options = {
        "twist_particles": particles,
        "twist_ess_threshold": threshold,
        "twist_resampling": scheme,
        "twist_proposal": proposal,
        "twist_return_particles": True,
    }
    pinned = exact_samples(law, fewer(groups))
    outputs = run_pinned(llm, prompt, pinned, horizon=horizon, **options)
    found = [results(output)[0] for output in outputs]
    for group, tokens in zip(found, pinned, strict=True):
        assert group.particles[0].token_ids == tokens
        for particle in group.particles:
            assert particle.log_prob == pytest.approx(law.log_p[tuple(particle.token_ids)], abs=2e-4)
    reciprocals = [math.exp(law.log_z - group.log_z) for group in found]
    assert within(reciprocals, 1.0), sum(reciprocals) / len(reciprocals)
    assert any(group.num_resamplings for group in found) == (threshold > 0 and particles > 1)
    del options["twist_particles"], options["twist_return_particles"]
    plain = run(llm, prompt, groups, horizon=horizon, particles=particles, **options)
    lower = [results(output)[0].log_z for output in plain]
    assert within([math.exp(value - law.log_z) for value in lower], 1.0)
    # E log Z-hat is below log Z without, and above it with a pinned exact sample (Prop. 5.1).
    upper = [group.log_z for group in found]
    for values, sign in ((lower, -1), (upper, 1)):
        bound = torch.tensor(values, dtype=torch.float64)
        assert sign * (bound.mean() - law.log_z) > -4 * bound.std() / len(values) ** 0.5


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_plain_systematic_resampling_is_caught(engine, small: Tiny, monkeypatch, scheme: str):
    """With the check on the scheme lifted the bound is wrong, and the test above sees it."""
    monkeypatch.setattr("vllm_twist.config.PINNED_SCHEMES", ("multinomial", "systematic"))
    options = {"twist_particles": 2, "twist_ess_threshold": 1.0, "twist_proposal": "base", "twist_scale": 0.3}
    law = enumerate_law(small, PROMPTS["below"], 6, ends=(), scale=0.3)
    outputs = run_pinned(
        engine(small),
        PROMPTS["below"],
        exact_samples(law, 3000),
        horizon=6,
        ignore_eos=True,
        twist_resampling=scheme,
        **options,
    )
    reciprocals = [math.exp(law.log_z - results(output)[0].log_z) for output in outputs]
    assert within(reciprocals, 1.0) == (scheme == "multinomial")


@pytest.mark.parametrize("particles", [1, 2, 16])
def test_optimal_twist_has_no_variance(engine, bigram: Tiny, particles: int):
    """Around any continuation, exact sample or not, every Z-hat is Z: lower and upper bound meet."""
    prompt = [0, 3]
    pinned = [[1], [2, 1], [3, 4, 2, 0, 1], [2, 3, 4, 0] * 3]
    outputs = run_pinned(
        engine(bigram), prompt, pinned, horizon=12, twist_particles=particles, twist_return_particles=True
    )
    expected = enumerate_law(bigram, prompt, 3).log_z
    for output, tokens in zip(outputs, pinned, strict=True):
        (group,) = results(output)
        assert group.log_z == pytest.approx(expected, abs=1e-4)
        assert group.num_resamplings == 0
        assert group.particles[0].token_ids == tokens
        assert group.particles[0].finished == (tokens[-1] == bigram.eos)


def test_base_proposal_is_unbiased(engine, small: Tiny):
    """Tokens from p0, weights from the twist: E[Z-hat] = Z, and more of the ESS is lost than with q^pi."""
    law = enumerate_law(small, PROMPTS["below"], 4)
    sizes = {}
    for proposal in ("base", "twist"):
        outputs = run(
            engine(small), PROMPTS["below"], 800, particles=8, horizon=4, twist_proposal=proposal, temperature=1.0
        )
        groups = [results(output)[0] for output in outputs]
        assert within([math.exp(group.log_z - law.log_z) for group in groups], 1.0)
        starts = [
            math.exp(group.log_z - law.log_z)
            * sum(math.exp(p.log_weight) for p in group.particles if p.token_ids[0] == 2)
            for group in groups
        ]
        assert within(starts, law.expectation(lambda s: s[0] == 2))
        sizes[proposal] = sum(group.ess for group in groups) / len(groups)
    assert sizes["base"] < sizes["twist"] - 0.5


def test_pinned_groups_are_preempted_whole(engine, wide: Tiny, monkeypatch):
    """A pinned continuation survives preemption, blocks and all."""
    pinned = [[2 + (i * j) % 38 for i in range(60)] for j in range(3, 7)]
    options = {"twist_particles": 8, "twist_ess_threshold": 1.0, "twist_return_particles": True, "horizon": 60}
    roomy = run_pinned(engine(wide), [0, 2, 3], pinned, ignore_eos=True, **options)
    tight = engine(wide, num_gpu_blocks_override=40)
    scheduler = tight.llm_engine.engine_core.engine_core.scheduler
    parked = []
    park = scheduler._park
    monkeypatch.setattr(scheduler, "_park", lambda group: (parked.append(group.id), park(group)))
    squeezed = run_pinned(tight, [0, 2, 3], pinned, ignore_eos=True, **options)
    assert parked
    for before, after, tokens in zip(roomy, squeezed, pinned, strict=True):
        (old,), (new,) = results(before), results(after)
        assert new.particles[0].token_ids == tokens
        assert new.log_z == pytest.approx(old.log_z, abs=1e-2)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1


@pytest.mark.parametrize(
    "pinned, options, message",
    [
        ([2, 3, 2, 3, 2], {}, "`twist_pinned` must have at most `max_tokens`=4 tokens, got 5: raise `max_tokens`"),
        ([2, 1, 3, 2], {}, r"must end with the first token that ends an output \(1\), got 1 at index 1 of 4: cut it"),
        ([2, 3], {}, r"must end with a token that ends an output \(1\) or have `max_tokens`=4 tokens, got 2 tokens"),
        ([2, 3], {"stop_token_ids": [2]}, r"first token that ends an output \(1, 2\), got 2 at index 0 of 2"),
        ([2, 1], {"ignore_eos": True}, r"must end with a token that ends an output \(none\) or have `max_tokens`=4"),
        ([2, 4, 1], {}, "`twist_pinned` must hold token ids below 4, got 4: use the model's tokenizer"),
        ([], {}, r"`twist_pinned` must be a list of at least one token id, got \[\]: pass token ids"),
        ("2,1", {}, "`twist_pinned` must be a list of at least one token id, got '2,1'"),
        ([2, -1], {}, "`twist_pinned` must be at least 0, got -1"),
        ([2, 1], {"twist_resampling": "systematic"}, "`twist_resampling` must be one of multinomial, residual with"),
        ([2, 1], {"twist_resampling": "stratified"}, "`twist_resampling` .* got 'stratified', which would bias the"),
    ],
)
def test_bad_continuations_are_refused(engine, small: Tiny, pinned: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run_pinned(engine(small), PROMPTS["below"], [pinned], horizon=4, **options)


@pytest.mark.v2("options0")
@pytest.mark.parametrize(
    "options", [{"allowed_token_ids": [1, 2]}, {"min_tokens": 3}, {"temperature": 0.1, "min_p": 0.9}]
)
def test_impossible_continuations_end_their_request_alone(engine, small: Tiny, options: dict[str, Any]):
    """p0 = 0 somewhere along the way: the group fails and says why, the next request works."""
    pinned = [[3, 1] if "min_tokens" in options else [3, 2, 3, 1]]
    (output,) = run_pinned(engine(small), PROMPTS["below"], pinned, horizon=4, **options)
    assert output.outputs[0].finish_reason == "error"
    with pytest.raises(RuntimeError, match="`twist_pinned` holds a continuation that the model .* probability zero"):
        results(output)
    (output,) = run_pinned(engine(small), PROMPTS["below"], [[3, 1]], horizon=4)
    assert results(output)[0].log_z < 10


def test_multinomial_is_the_default_around_a_pinned_lane():
    from vllm_twist import RequestConfig

    defaults = RequestConfig()
    assert defaults.override({"twist_pinned": [1, 2]}).resampling == "multinomial"
    assert defaults.override({"twist_pinned": [1], "twist_resampling": "residual"}).resampling == "residual"
    assert defaults.override({}).resampling == "systematic"
    assert RequestConfig(pinned=[3, 4], resampling="residual").pinned == (3, 4)
