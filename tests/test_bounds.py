"""Bounds and divergences: exact where the law can be listed, intervals that cover as often as they say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from support.branches import Tabular
from support.toy_target import EXACT, LOG_Z, PRINTED, SUB, TOY, free, held, mean
from torch import Tensor

from vllm_twist.bounds import (
    Estimate,
    Sandwich,
    ancestral,
    estimate,
    iwae,
    kl_q_sigma,
    kl_sigma_q,
    paired_midpoint,
    rejection,
    tightest,
    unbiased_log_z,
)
from vllm_twist.smc import categorical, smc


def proposal_law(base: bool = False) -> tuple[Tensor, Tensor]:
    """Return q of every sequence of the toy and its log p0 phi / q."""
    log_q = torch.zeros(8, dtype=torch.float64)
    for t in range(3):
        prefix = TOY.sequences[:, :t]
        step = SUB.log_p(prefix) if base else torch.log_softmax(SUB.log_p(prefix) + SUB.log_psi(prefix), -1)
        log_q += step.gather(-1, TOY.sequences[:, t : t + 1])[:, 0]
    return log_q.exp(), TOY.log_joint - log_q


def test_midpoint_of_pairs_keeps_what_the_targets_differ_in() -> None:
    """Targets that differ by far more than their bounds: the interval holds the mean in 95% of 2,000 runs.

    Between 93.5% and 96.5%, three standard errors. Bounds taken for independent are sure of too much.
    """
    generator = torch.Generator().manual_seed(0)
    covered = {"paired": 0, "independent": 0}
    for _ in range(2000):
        log_z = 3 * torch.randn(200, generator=generator, dtype=torch.float64)
        lower, upper = (log_z + 0.02 * torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(2))
        for name, found in (
            ("paired", paired_midpoint(lower.tolist(), upper.tolist())),
            ("independent", Sandwich(estimate(lower), estimate(upper)).log_z),
        ):
            covered[name] += abs(found.mean) <= found.ci95
    assert 1870 <= covered["paired"] <= 1930 and covered["independent"] < 1750, covered


@pytest.mark.parametrize(
    ("base", "lower", "upper"), [(False, -1.2811625545, -1.1595012790), (True, -1.3567408388, -1.0789013923)]
)
def test_iwae_golden(base: bool, lower: float, upper: float) -> None:
    """K = 2, all 64 pairs with their probabilities: the golden rows without resampling, both bounds."""
    q, log_w = proposal_law(base)
    pairs = torch.tensor(list(itertools.product(range(8), repeat=2)))
    below = iwae(log_w[pairs])
    assert float((q[pairs].prod(-1) * below).sum()) == pytest.approx(lower, abs=PRINTED)
    above = iwae(log_w[pairs], exact=log_w[pairs[:, 0]])
    weights = TOY.sigma[pairs[:, 0]] * q[pairs[:, 1]]
    assert float((weights * above).sum()) == pytest.approx(upper, abs=PRINTED)
    # E[Z-hat] = Z and E_sigma[1 / Z-hat] = 1 / Z.
    assert float((q[pairs].prod(-1) * below.exp()).sum()) == pytest.approx(math.exp(LOG_Z), abs=EXACT)
    assert float((weights / above.exp()).sum()) == pytest.approx(math.exp(-LOG_Z), abs=1e-11)


def test_divergences_golden() -> None:
    """F_q and G_q as exact means."""
    q, log_w = proposal_law()
    log_z = Estimate(LOG_Z, 0.0)
    forward = kl_q_sigma(Estimate(float((q * log_w).sum()), 0.3), log_z)
    assert forward.mean == pytest.approx(0.1313665641, abs=PRINTED) and forward.ci95 == 0.3
    backward = kl_sigma_q(Estimate(float((TOY.sigma * log_w).sum()), 0.3), Estimate(LOG_Z, 0.4))
    assert backward.mean == pytest.approx(0.1172789374, abs=PRINTED) and backward.ci95 == pytest.approx(0.5)


@pytest.mark.parametrize("proposal", ["twist", "base"])
@pytest.mark.parametrize("threshold", [0, 1])
def test_data_processing(proposal: str, threshold: float) -> None:
    """The law of the sample that SMC returns is closer to sigma than the bounds are to log Z, in both directions."""
    options = {"proposal": proposal, "threshold": threshold}
    returned = torch.zeros(8, dtype=torch.float64)
    runs = free(SUB, 2, **options)
    for p, r in runs:
        returned.index_add_(0, r.sequences @ torch.tensor([4, 2, 1]), p * torch.softmax(r.log_w, 0))
    sandwich = Sandwich(
        Estimate(mean(runs, lambda r: r.log_z), 0), Estimate(mean(held(SUB, 2, **options), lambda r: r.log_z), 0)
    )
    forward = float((returned * (returned / TOY.sigma).log()).sum())
    backward = float((TOY.sigma * (TOY.sigma / returned).log()).sum())
    assert 0 < forward < LOG_Z - sandwich.lower.mean
    assert 0 < backward < sandwich.upper.mean - LOG_Z
    assert forward + backward < sandwich.gap.mean
    assert abs(sandwich.log_z.mean - LOG_Z) < sandwich.log_z.ci95 == pytest.approx(sandwich.gap.mean / 2)


def test_intervals_cover() -> None:
    """Means of 12 runs of SMC, 400 times over: the intervals hold the exact bound as often as they should.

    With 12 values 1.96 standard errors cover 92%: three standard deviations of Binomial(400, 0.92)
    below, odds of a false alarm 1e-3. Half or twice the width would cover 65% or 99.6%.
    """
    draw = categorical(torch.Generator().manual_seed(3))
    exact = mean(free(SUB, 2), lambda r: r.log_z)
    inside = 0
    for _ in range(400):
        found = estimate([float(smc(SUB, 2, draw).log_z) for _ in range(12)])
        inside += abs(found.mean - exact) <= found.ci95
    assert 352 <= inside <= 394, inside


def test_sandwich_of_samples() -> None:
    """Both bounds from sampled runs enclose log Z; more particles make the gap smaller."""
    generator = torch.Generator().manual_seed(0)
    draw = categorical(generator)
    sandwiches = []
    for particles in (1, 8):
        lower = [float(smc(SUB, particles, draw).log_z) for _ in range(300)]
        exact = torch.multinomial(TOY.sigma, 300, replacement=True, generator=generator)
        upper = [float(smc(SUB, particles, draw, pinned=TOY.sequences[i]).log_z) for i in exact]
        sandwich = Sandwich(estimate(lower), estimate(upper))
        assert sandwich.lower.mean - sandwich.lower.ci95 < LOG_Z < sandwich.upper.mean + sandwich.upper.ci95
        sandwiches.append(sandwich)
        log_z = unbiased_log_z(lower)
        assert abs(log_z.mean - LOG_Z) < 2 * log_z.ci95
    assert sandwiches[1].gap.mean < sandwiches[0].gap.mean / 3
    assert tightest(sandwiches) is sandwiches[1]


def test_rejection_gives_sigma() -> None:
    """Accepted samples of p0 follow sigma: chi-square with 7 degrees, odds of a false alarm 1e-4."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[list[int]]:
        drawn = torch.multinomial(TOY.log_p.exp(), n, replacement=True, generator=generator)
        return TOY.sequences[drawn].tolist()

    def log_phi(samples: list[list[int]]) -> list[float]:
        return SUB.log_phi(torch.tensor(samples)).tolist()

    samples, drawn = rejection(draw, log_phi, 0.0, count=4000, max_draws=10**6, generator=generator)
    assert len(samples) == 4000
    # Each draw is accepted with probability Z.
    assert abs(drawn * math.exp(LOG_Z) - 4000) < 4 * math.sqrt(4000) + 256
    counts = torch.bincount(torch.tensor(samples) @ torch.tensor([4, 2, 1]), minlength=8).double()
    assert float(((counts - 4000 * TOY.sigma) ** 2 / (4000 * TOY.sigma)).sum()) < 29.9
    plain = TOY.log_p.exp()
    assert float(((counts - 4000 * plain) ** 2 / (4000 * plain)).sum()) > 29.9
    few, drawn = rejection(draw, log_phi, 3.0, count=4000, max_draws=1000, generator=generator)
    assert drawn == 1000 and len(few) < 100
    with pytest.raises(ValueError, match="`log_bound` must be an upper bound of log phi, got -0.5, but a sample has"):
        rejection(draw, log_phi, -0.5, count=10, max_draws=1000, generator=generator)


def test_ancestral_pairs_are_exact() -> None:
    """All sequences of T + c tokens with their probabilities: given o, what comes before it follows sigma(s | o)."""
    law: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for sequence, log_p in zip(TOY.sequences.tolist(), TOY.log_p.tolist(), strict=True):
        ((start, end),) = ancestral([sequence], 2, 1)
        law.setdefault(tuple(end), {})[tuple(start)] = math.exp(log_p)

    for end, joint in law.items():

        def log_phi(sequences: Tensor, token: int = end[0]) -> Tensor:
            return SUB.log_p(sequences)[:, token]

        exact = Tabular(dataclasses.replace(SUB, log_phi=log_phi, horizon=2), 2)
        total = sum(joint.values())
        assert math.log(total) == pytest.approx(float(exact.log_z), abs=EXACT)
        assert [joint[tuple(s)] / total for s in exact.sequences.tolist()] == pytest.approx(
            exact.sigma.tolist(), abs=EXACT
        )
    assert list(ancestral([[1, 2], [1, 2, 3, 4]], 2, 2)) == [([1, 2], [3, 4])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate([1.0]), "`values` must hold at least 2 values for an interval, got 1: run more repeats"),
        (lambda: estimate([1.0, -math.inf, 2.0]), "`values` must be finite, got -inf in 1 of 3: a log Z-hat of -inf"),
        (lambda: unbiased_log_z([-math.inf] * 3), "`log_z` must hold a finite value, got -inf at most: no particle"),
        (lambda: iwae(torch.zeros(3)), r"`log_w` must have the shape \[R, K\] with K >= 1, got \[3\]: pass one row"),
        (
            lambda: iwae(torch.zeros(3, 2), torch.zeros(2)),
            r"`exact` must hold one log weight per run, \[3\], got \[2\]",
        ),
    ],
)
def test_arguments_are_checked(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
