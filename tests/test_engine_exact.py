"""The engine against enumeration: what it samples is the target, and log Z is unbiased.

Statistical checks use fixed seeds and 4 standard errors, a false-alarm probability of 6e-5 each
for a correct engine; the last test shows that broken engines fail them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import PROMPTS, run
from support.laws import assert_samples_the_law, enumerate_law
from support.models import Tiny, random_model
from support.runners import RUNNER, fewer
from support.scenarios import PARAMETERS, named

from vllm_twist import results

CASES = [
    # particles, groups, threshold, scheme
    (1, 1500, 0.5, "systematic"),
    (2, 1500, 0.0, "systematic"),
    (2, 1500, 0.5, "multinomial"),
    (2, 1500, 1.0, "systematic"),
    (8, 500, 0.5, "systematic"),
    (8, 500, 1.0, "systematic"),
    (8, 500, 1.0, "stratified"),
    (8, 500, 1.0, "multinomial"),
    (8, 500, 1.0, "residual"),
    (64, 60, 1.0, "systematic"),
    (64, 60, 0.5, "residual"),
]


@pytest.mark.v2
@pytest.mark.parametrize("particles, groups, threshold, scheme", CASES)
def test_unbiased(engine, small: Tiny, particles: int, groups: int, threshold: float, scheme: str):
    """Every K, threshold and scheme, with EOS inside the horizon. Catches wrong weights and wrong ancestors."""
    outputs = run(
        engine(small),
        PROMPTS["below"],
        groups,
        particles=particles,
        horizon=4,
        twist_ess_threshold=threshold,
        twist_resampling=scheme,
    )
    if threshold == 0 or particles == 1:
        assert all(results(output)[0].num_resamplings == 0 for output in outputs)
    elif threshold == 1:
        assert any(results(output)[0].num_resamplings == 2 for output in outputs)
    assert_samples_the_law(outputs, enumerate_law(small, PROMPTS["below"], 4), first=2)


@pytest.mark.v2
@pytest.mark.parametrize("options", PARAMETERS, ids=named)
def test_sampling_parameters_define_p0(engine, small: Tiny, options: dict[str, Any]):
    """p0 is the model after the request's parameters, in the proposal and in the weights alike.

    Truncating the proposal alone would bias Z.
    """
    law_options = {
        key: options[key] for key in ("temperature", "min_p", "top_p", "top_k", "min_tokens") if key in options
    }
    ends = () if options.get("ignore_eos") else (small.eos, *options.get("stop_token_ids", ()))
    law = enumerate_law(
        small,
        PROMPTS["below"],
        3,
        ends=ends,
        bias=options.get("logit_bias"),
        allowed=options.get("allowed_token_ids"),
        penalties=(
            options.get("repetition_penalty", 1.0),
            options.get("presence_penalty", 0.0),
            options.get("frequency_penalty", 0.0),
        ),
        scale=options.get("twist_scale", 1.0),
        **law_options,
    )
    outputs = run(engine(small), PROMPTS["below"], 600, particles=4, horizon=3, twist_ess_threshold=1.0, **options)
    assert_samples_the_law(outputs, law, first=2)


@pytest.mark.v2
@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
def test_prompt_against_block(engine, small: Tiny, length: str, caching: bool):
    """Prompts below, at and above a block: the lanes' copy of the partial block, or none, is right."""
    llm = engine(small, enable_prefix_caching=caching)
    outputs = run(llm, PROMPTS[length], 400, particles=4, horizon=4, twist_ess_threshold=1.0)
    assert_samples_the_law(outputs, enumerate_law(small, PROMPTS[length], 4), first=2)


HEADS = [(kind, "identity") for kind in ("mlp", "low_rank", "tied")] + [(k, "log_sigmoid") for k in ("linear", "tied")]


@pytest.mark.v2
@pytest.mark.parametrize("head_type, activation", HEADS)
def test_every_kind_of_head(engine, tmp_path_factory, head_type: str, activation: str):
    """Each kind gives the engine the values it gives in PyTorch."""
    folder = tmp_path_factory.mktemp(head_type)
    tiny = random_model(folder, vocab=4, eos=1, head_type=head_type, activation=activation)
    outputs = run(engine(tiny), PROMPTS["below"], 300, particles=4, horizon=3, twist_ess_threshold=1.0)
    assert_samples_the_law(outputs, enumerate_law(tiny, PROMPTS["below"], 3), first=2)


@pytest.mark.v2
@pytest.mark.parametrize("particles", [1, 2, 8, 64])
def test_optimal_twist_has_no_variance(engine, bigram: Tiny, particles: int):
    """The optimal twist makes every Z-hat exact, every ESS K, and never resamples."""
    prompt = [0, 3]
    # Every group is exact: one of many particles says as much as many of one.
    outputs = run(engine(bigram), prompt, 20, particles=particles, horizon=40, least=1 if particles == 64 else 6)
    expected = enumerate_law(bigram, prompt, 3).log_z
    assert expected == pytest.approx(enumerate_law(bigram, prompt, 5).log_z, abs=1e-6)
    lengths = set()
    for output in outputs:
        group = results(output)[0]
        assert group.log_z == pytest.approx(expected, abs=1e-4)
        assert group.ess == pytest.approx(particles, rel=1e-4)
        assert group.num_resamplings == 0
        lengths.update(len(p.token_ids) for p in group.particles)
    assert len(lengths) > 5, "particles should have ended at many lengths"


@pytest.mark.v2
def test_optimal_twist_with_the_base_model_as_proposal_has_variance(engine, bigram: Tiny):
    """Guards against a Z-hat that is constant whatever is done: scale 0 proposes from p0 without a twist."""
    outputs = run(engine(bigram), [0, 3], 20, particles=4, horizon=10, twist_scale=0.5)
    assert torch.tensor([results(output)[0].log_z for output in outputs]).std() > 1e-3


@pytest.mark.v2
def test_scale_invariance(engine, small: Tiny, tmp_path):
    """A constant added to log psi changes no token; Z, whose target has it once, moves by just that."""
    llm = engine(small)
    before = run(llm, PROMPTS["below"], 30, particles=8, horizon=4, twist_ess_threshold=1.0)
    shift = 1.75
    small.head.bias.data += shift
    try:
        small.head.save_pretrained(tmp_path)
    finally:
        small.head.bias.data -= shift
    llm.collective_rpc("load_twist_head", args=(str(tmp_path),))
    try:
        after = run(llm, PROMPTS["below"], 30, particles=8, horizon=4, twist_ess_threshold=1.0)
    finally:
        llm.collective_rpc("load_twist_head", args=(str(small.head_path),))
    for old, new in zip(before, after, strict=True):
        assert old.outputs[0].token_ids == new.outputs[0].token_ids
        assert results(new)[0].log_z == pytest.approx(results(old)[0].log_z + shift, abs=1e-4)


@pytest.mark.v2
def test_single_particle_is_the_twist_induced_proposal(engine, small: Tiny):
    """K = 1 draws from softmax(log p0 + log psi): chi-square over four tokens, odds of a false alarm 1e-4."""
    n = fewer(4000)
    outputs = run(engine(small), PROMPTS["below"], 4000, particles=1, horizon=1)
    logits, log_psi = small.logits_and_log_psi([PROMPTS["below"]])
    expected = (logits + log_psi).double().softmax(-1)[0] * n
    counts = torch.zeros(small.vocab, dtype=torch.float64)
    for output in outputs:
        counts[output.outputs[0].token_ids[0]] += 1
    assert ((counts - expected) ** 2 / expected).sum() < 21.1
    base = logits.double().softmax(-1)[0] * n
    assert ((counts - base) ** 2 / base).sum() > 21.1, "the test must tell the twist from none"


def _without_fork(*arguments: Any) -> None:
    """A worker that forgets to fork."""


def _identity_resample(real: Any) -> Any:
    def resample(log_w, live, allowed, *rest):
        ancestors, new_log_w, ess, resampled = real(log_w, live, allowed, *rest)
        return torch.arange(log_w.shape[-1]).expand_as(ancestors), new_log_w, ess, resampled

    return resample


@pytest.mark.v2
@pytest.mark.parametrize("fault", ["no fork", "weights lost", "twist left out of the weights"])
def test_broken_engines_fail(engine, small: Tiny, monkeypatch, fault: str):
    """The checks above can fail: each fault breaks them."""
    from vllm_twist.kernels import reference

    if fault == "no fork":
        name = "v1.runner.fork" if RUNNER == "v1" else "v2.fork.Fork.__call__"
        monkeypatch.setattr(f"vllm_twist.engine.{name}", _without_fork)
    elif fault == "weights lost":
        monkeypatch.setattr(reference, "resample", _identity_resample(reference.resample))
    else:
        softmax = reference.twist_softmax
        monkeypatch.setattr(reference, "twist_softmax", lambda logits, psi, *rest: (softmax(logits, psi)[0],) * 2)
    options = {"particles": 8, "horizon": 4, "twist_ess_threshold": 1.0, "least": 80 if fault == "weights lost" else 20}
    outputs = run(engine(small), PROMPTS["below"], 500, **options)
    with pytest.raises(AssertionError):
        assert_samples_the_law(outputs, enumerate_law(small, PROMPTS["below"], 4), first=2)
