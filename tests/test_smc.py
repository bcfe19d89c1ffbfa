"""Twisted SMC against exact expectations: every branch is visited, nothing is sampled.

The golden figures below were computed by an independent program. Tolerances are those of the
figures' ten printed digits, or float64 round-off over at most 5,000 branches (1e-12).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.branches import Outcomes, Tabular, independent
from support.toy_target import (
    EXACT,
    LOG_Z,
    PRINTED,
    SUB,
    TARGETS,
    TOY,
    free,
    held,
    mean,
    toy_log_p,
    toy_log_phi,
    toy_log_psi,
)
from torch import Tensor

from vllm_twist.smc import Population, Target, categorical, smc


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of two rows: handing them to a thread pool costs a hundred times the work on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_z(population: Population) -> float:
    return math.exp(float(population.log_z) - LOG_Z)


def test_branches_add_up_and_visit_everything() -> None:
    """The oracle itself: probabilities sum to one over V^(KT) * (K^K)^(T-1) branches."""
    runs = free(SUB, 2, order="sample_first")
    assert len(runs) == 2 ** (2 * 3) * (2**2) ** 2
    assert math.fsum(p for p, _ in runs) == pytest.approx(1, abs=EXACT)


def test_toy_target() -> None:
    """Z and the optimal twists: the toy is the one the golden figures belong to."""
    assert TOY.log_z.exp() == pytest.approx(0.2957288441690963, abs=1e-15)
    assert LOG_Z == pytest.approx(-1.2183123115, abs=PRINTED)
    psi = [0.2960177684, 0.2909664919, 0.2786516416, 0.3286507941, 0.1008712035, 0.3011942119]
    prefixes = [torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[0], [1]])]
    got = torch.cat([TOY.optimal_log_psi(prefix).exp().flatten() for prefix in prefixes])
    assert got.tolist() == pytest.approx(psi, abs=PRINTED)
    # At t = T the optimal twist is the potential itself.
    last = TOY.optimal_log_psi(torch.tensor([[0, 1]]))[0]
    assert last.tolist() == pytest.approx(toy_log_phi(torch.tensor([[0, 1, 0], [0, 1, 1]])).tolist(), abs=EXACT)


@pytest.mark.parametrize(
    ("twist", "proposal", "particles", "threshold", "lower", "upper", "deviation"),
    [
        ("sub", "twist", 1, 1, -1.3496788756, -1.1010333741, 0.4838),
        ("sub", "twist", 2, 1, -1.2866968254, -1.1562510865, 0.3507),
        ("sub", "twist", 2, 0, -1.2811625545, -1.1595012790, 0.3421),
        ("sub", "base", 1, 1, -1.4697254797, -0.9665842559, 0.7971),
        ("sub", "base", 2, 1, -1.3696310302, -1.0761297046, 0.5589),
        ("sub", "base", 2, 0, -1.3567408388, -1.0789013923, 0.5636),
        ("opt", "twist", 1, 1, -1.2183123115, -1.2183123115, 0),
        ("opt", "twist", 2, 1, -1.2183123115, -1.2183123115, 0),
        ("opt", "twist", 2, 0, -1.2183123115, -1.2183123115, 0),
        # Optimal twists do not help a proposal that ignores them: zero variance here would be a bug.
        ("opt", "base", 2, 1, -1.3672114000, -1.0793862458, 0.5506),
    ],
)
def test_golden_table(
    twist: str, proposal: str, particles: int, threshold: float, lower: float, upper: float, deviation: float
) -> None:
    """The paper's order: both bounds, the spread, E[Z-hat] = Z and E_sigma[1/Z-hat] = 1/Z."""
    options = {"proposal": proposal, "order": "sample_first", "threshold": threshold}
    runs = free(TARGETS[twist], particles, **options)
    assert mean(runs, lambda r: r.log_z) == pytest.approx(lower, abs=PRINTED)
    assert mean(runs, relative_z) == pytest.approx(1, abs=EXACT)
    variance = mean(runs, lambda r: (relative_z(r) - 1) ** 2)
    assert math.sqrt(variance) == pytest.approx(deviation, abs=5e-5 if deviation else EXACT)
    conditional = held(TARGETS[twist], particles, **options)
    assert mean(conditional, lambda r: r.log_z) == pytest.approx(upper, abs=PRINTED)
    assert mean(conditional, lambda r: 1 / relative_z(r)) == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize(
    ("resample_at", "lower"),
    [(None, -1.2824227915), ((2, 3), -1.2949328647)],
    ids=["between", "at T as well"],
)
def test_golden_weigh_first(resample_at: tuple[int, ...] | None, lower: float) -> None:
    """The engine's order, which must not resample at t = 1 nor, by default, at t = T."""
    runs = free(SUB, 2, resample_at=resample_at)
    assert mean(runs, lambda r: r.log_z) == pytest.approx(lower, abs=PRINTED)
    assert {r.num_resamplings for _, r in runs} == {1 if resample_at is None else 2}


@pytest.mark.parametrize("order", ["sample_first", "weigh_first"])
@pytest.mark.parametrize("proposal", ["twist", "base"])
@pytest.mark.parametrize("twist", TARGETS)
@pytest.mark.parametrize("threshold", [0, 0.95, 1])
def test_unbiased(twist: str, proposal: str, order: str, threshold: float) -> None:
    """For any twist, proposal, order and rule: E[Z-hat] = Z, E_sigma[1/Z-hat] = 1/Z, and weighted functionals.

    E[Z-hat sum_k W_k 1(s_k = s)] = Z sigma(s) for every s catches weights that have parted from
    their sequences at a resampling, to which E[Z-hat] is blind.
    """
    options = {"proposal": proposal, "order": order, "threshold": threshold}
    runs = free(TARGETS[twist], 2, **options)
    conditional = held(TARGETS[twist], 2, **options)
    assert mean(runs, relative_z) == pytest.approx(1, abs=EXACT)
    assert mean(conditional, lambda r: 1 / relative_z(r)) == pytest.approx(1, abs=EXACT)
    powers = 2 ** torch.arange(2, -1, -1)
    found = torch.zeros(8, dtype=torch.float64)
    for p, r in runs:
        found.index_add_(0, r.sequences @ powers, p * torch.softmax(r.log_w, 0) * relative_z(r))
    torch.testing.assert_close(found, TOY.sigma, rtol=0, atol=EXACT)


def test_adaptive_rule_does_both() -> None:
    """The threshold of the test above separates branches: some resample, some do not."""
    for order in ("sample_first", "weigh_first"):
        counts = {r.num_resamplings for _, r in free(SUB, 2, order=order, threshold=0.95)}
        assert 0 in counts and len(counts) > 1


def test_three_particles() -> None:
    """Slots 1 and 2 choose ancestors independently, among all three: K = 2 cannot tell."""
    assert mean(held(SUB, 3, proposal="base"), lambda r: 1 / relative_z(r)) == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize(("order", "wrong"), [("weigh_first", 0.9991), ("sample_first", 0.9933)])
def test_systematic_ancestors_would_break_the_upper_bound(order: str, wrong: float) -> None:
    """Two free slots filled by plain systematic resampling are not exact: the test above has power."""

    def systematic(log_probs: Tensor) -> Outcomes:
        if log_probs.shape[-1] == 2:  # tokens
            return independent(log_probs)
        rows, cumulative = len(log_probs), log_probs[0].softmax(-1).cumsum(-1)
        # Between two cuts every uniform gives the same ancestors.
        cuts = sorted({0.0, *(float(c) * rows % 1 for c in cumulative[:-1]), 1.0})
        pieces = [(high - low, (low + high) / 2) for low, high in zip(cuts, cuts[1:], strict=False)]
        points = (torch.arange(rows, dtype=torch.float64) + torch.tensor([[middle] for _, middle in pieces])) / rows
        chosen = torch.searchsorted(cumulative, points, right=True)
        return [(p, row) for (p, _), row in zip(pieces, chosen, strict=True)]

    conditional = held(SUB, 3, systematic, proposal="base", order=order)
    assert mean(conditional, lambda r: 1 / relative_z(r)) == pytest.approx(wrong, abs=5e-5)


EOS = 1


def ending(horizon: int, log_psi: Callable[[Tensor], Tensor] = toy_log_psi) -> Target:
    """Return the toy with token 1 as EOS: for T = 3 its sequences are 1, 01, 001 and 000, filled up with 1."""

    def log_p(prefixes: Tensor) -> Tensor:
        over = (prefixes == EOS).any(-1, keepdim=True)
        return torch.where(over, torch.tensor([-torch.inf, 0.0], dtype=torch.float64), toy_log_p(prefixes))

    def log_phi(sequences: Tensor) -> Tensor:
        return torch.cos(2.0 * (sequences * torch.arange(1, horizon + 1)).sum(-1).double()) * 1.5

    return Target(log_p, log_psi, log_phi, horizon, eos=EOS)


@pytest.mark.parametrize(
    ("particles", "horizon", "order"), [(2, 4, "sample_first"), (2, 4, "weigh_first"), (3, 3, "weigh_first")]
)
@pytest.mark.parametrize("proposal", ["twist", "base"])
@pytest.mark.parametrize("threshold", [0, 0.95, 1])
def test_particles_that_end(particles: int, horizon: int, proposal: str, order: str, threshold: float) -> None:
    """The live ones resample among themselves, the pinned one among them until it ends: both estimates stay exact."""
    target = ending(horizon)
    exact = Tabular(target, 2)
    options = {"proposal": proposal, "order": order, "threshold": threshold}
    runs = free(target, particles, **options)
    ratio = [(p, math.exp(float(r.log_z - exact.log_z))) for p, r in runs]
    assert math.fsum(p * z for p, z in ratio) == pytest.approx(1, abs=EXACT)
    found = torch.zeros(2**horizon, dtype=torch.float64)
    for p, r in runs:
        found.index_add_(0, r.sequences @ 2 ** torch.arange(horizon - 1, -1, -1), p * torch.exp(r.log_w - exact.log_z))
    torch.testing.assert_close(found / particles, exact.sigma, rtol=0, atol=EXACT)
    conditional = held(target, particles, exact=exact, **options)
    assert math.fsum(p / math.exp(float(r.log_z - exact.log_z)) for p, r in conditional) == pytest.approx(1, abs=EXACT)
    lower, upper = mean(runs, lambda r: r.log_z), mean(conditional, lambda r: r.log_z)
    assert lower < float(exact.log_z) < upper


def test_particles_that_end_without_variance() -> None:
    """The optimal twist keeps every weight at Z, whenever a particle ends, pinned or not."""
    exact = Tabular(ending(4), 2)
    target = ending(4, lambda prefixes: exact.optimal_log_psi(prefixes).nan_to_num(nan=0.0))
    for r in [r for _, r in free(target, 2)] + [r for _, r in held(target, 2, exact=exact)]:
        assert r.log_w.tolist() == pytest.approx([float(exact.log_z)] * 2, abs=EXACT)


def test_divergences() -> None:
    """At K = 1 the bounds' gaps are KL(q || sigma) and KL(sigma || q) of the proposal (Eq. 23)."""
    runs = free(SUB, 1)
    log_q = {tuple(r.sequences[0].tolist()): math.log(p) for p, r in runs}
    forward = sum(math.exp(q) * (q - math.log(TOY.sigma[i])) for i, q in enumerate(log_q[s] for s in sorted(log_q)))
    backward = sum(float(TOY.sigma[i]) * (math.log(TOY.sigma[i]) - log_q[s]) for i, s in enumerate(sorted(log_q)))
    assert forward == pytest.approx(0.1313665641, abs=PRINTED)
    assert backward == pytest.approx(0.1172789374, abs=PRINTED)
    assert LOG_Z - mean(runs, lambda r: r.log_z) == pytest.approx(forward, abs=EXACT)
    assert mean(held(SUB, 1), lambda r: r.log_z) - LOG_Z == pytest.approx(backward, abs=EXACT)


def test_one_particle_never_resamples() -> None:
    """K = 1: resampling is a no-op, and the tokens follow the one-step softmax of p0 psi."""
    for order in ("sample_first", "weigh_first"):
        runs = free(SUB, 1, order=order)
        assert len(runs) == 8 and {r.num_resamplings for _, r in runs} == {0}
        first = torch.softmax(toy_log_p(torch.zeros(1, 0)) + toy_log_psi(torch.zeros(1, 0)), -1)[0]
        drawn = [math.fsum(p for p, r in runs if r.sequences[0, 0] == v) for v in range(2)]
        assert drawn == pytest.approx(first.tolist(), abs=EXACT)


@pytest.mark.parametrize("order", ["sample_first", "weigh_first"])
@pytest.mark.parametrize("proposal", ["twist", "base"])
def test_scale_is_free(proposal: str, order: str) -> None:
    """log psi_t + c_t changes neither tokens nor Z-hat, branch by branch: no psi may be left uncancelled."""
    shifted = dataclasses.replace(SUB, log_psi=lambda s: toy_log_psi(s) + (3.0, -7.0, 11.0)[s.shape[1]])
    for (p, a), (q, b) in zip(
        free(SUB, 2, proposal=proposal, order=order),
        free(shifted, 2, proposal=proposal, order=order),
        strict=True,
    ):
        assert p == pytest.approx(q, abs=EXACT) and torch.equal(a.sequences, b.sequences)
        torch.testing.assert_close(a.log_w, b.log_w, rtol=0, atol=EXACT)


@pytest.mark.parametrize("proposal", ["twist", "base"])
@pytest.mark.parametrize("order", ["sample_first", "weigh_first"])
def test_hard_constraint(proposal: str, order: str) -> None:
    """phi = 0 and psi* = 0 on most sequences: dead particles keep weight zero, and nothing becomes NaN."""

    def log_phi(sequences: Tensor) -> Tensor:
        allowed = (sequences == torch.tensor([1, 0, 1])).all(-1) | (sequences == torch.tensor([1, 1, 0])).all(-1)
        return torch.where(allowed, 0.0, float("-inf")).double()

    base = dataclasses.replace(SUB, log_phi=log_phi)
    exact = Tabular(base, 2)
    runs = free(dataclasses.replace(base, log_psi=exact.optimal_log_psi), 2, proposal=proposal, order=order)
    ratios = [(p, math.exp(float(r.log_z - exact.log_z))) for p, r in runs]
    assert math.fsum(p * ratio for p, ratio in ratios) == pytest.approx(1, abs=EXACT)
    if proposal == "twist":
        assert [ratio for _, ratio in ratios] == pytest.approx([1] * len(ratios), abs=EXACT)
    else:
        assert min(ratio for _, ratio in ratios) == 0


def test_particles_without_a_future() -> None:
    """A wrong twist may lead where every psi is zero: such particles go on at weight zero."""

    def log_psi(prefixes: Tensor) -> Tensor:
        # After a first token 1 no second token has a value; phi agrees.
        dead = (prefixes[:, :1] == 1).any(-1)[:, None]
        return toy_log_psi(prefixes).masked_fill(dead, float("-inf"))

    target = dataclasses.replace(
        SUB, log_psi=log_psi, log_phi=lambda s: toy_log_phi(s).masked_fill(s[:, 0] == 1, float("-inf"))
    )
    log_z = Tabular(target, 2).log_z
    for order in ("sample_first", "weigh_first"):
        runs = free(target, 2, order=order)
        total = mean(runs, lambda r: torch.exp(r.log_z - log_z))
        assert total == pytest.approx(1, abs=EXACT)


# Markov targets, whose twists and Z have a closed form at any length.

MARKOV = torch.softmax(torch.sin(torch.arange(16, dtype=torch.float64) ** 2).reshape(4, 4) * 2, -1)
GAIN = torch.tensor([0.2, 1.0, 1.7, 0.6], dtype=torch.float64)
START = 2


def last_tokens(prefixes: Tensor) -> Tensor:
    return prefixes[:, -1] if prefixes.shape[1] else torch.full((len(prefixes),), START)


def gain_so_far(prefixes: Tensor) -> Tensor:
    return GAIN.log()[prefixes].sum(-1, keepdim=True)


def perron(horizon: int) -> tuple[Target, float]:
    """phi = prod_t g(s_t) u(s_T), where M u = lam u, M = P diag(g).

    Then psi*_t = prod_{tau<=t} g(s_tau) lam^(T-t) u(s_t), and Z = lam^T u(s_0).
    """
    values, vectors = torch.linalg.eig(MARKOV * GAIN)
    index = values.real.argmax()
    lam, u = values.real[index], vectors.real[:, index].abs()

    def log_psi(prefixes: Tensor) -> Tensor:
        ahead = horizon - prefixes.shape[1] - 1
        return gain_so_far(prefixes) + GAIN.log() + ahead * lam.log() + u.log()

    target = Target(
        log_p=lambda s: MARKOV.log()[last_tokens(s)],
        log_psi=log_psi,
        log_phi=lambda s: gain_so_far(s)[:, 0] + u.log()[s[:, -1]],
        horizon=horizon,
    )
    return target, float(horizon * lam.log() + u.log()[START])


def backward(horizon: int) -> tuple[Target, float]:
    """phi = prod_t g(s_t): psi*_t = prod g h_{T-t}(s_t) with h_0 = 1, h_{n+1}(a) = sum_b P(a, b) g(b) h_n(b)."""
    h = [torch.ones(4, dtype=torch.float64)]
    for _ in range(horizon):
        h.append((MARKOV * GAIN) @ h[-1])
    target = Target(
        log_p=lambda s: MARKOV.log()[last_tokens(s)],
        log_psi=lambda s: gain_so_far(s) + GAIN.log() + h[horizon - s.shape[1] - 1].log(),
        log_phi=lambda s: gain_so_far(s)[:, 0],
        horizon=horizon,
    )
    return target, float(h[horizon][START].log())


@pytest.mark.parametrize("family", [perron, backward])
def test_closed_forms_agree_with_enumeration(family: Callable[[int], tuple[Target, float]]) -> None:
    target, log_z = family(4)
    exact = Tabular(target, vocab_size=4)
    assert log_z == pytest.approx(float(exact.log_z), abs=EXACT)
    prefixes = torch.tensor([[0, 3], [2, 1]])
    torch.testing.assert_close(target.log_psi(prefixes), exact.optimal_log_psi(prefixes), rtol=0, atol=EXACT)


@pytest.mark.parametrize("order", ["sample_first", "weigh_first"])
@pytest.mark.parametrize("horizon", [1, 2, 40])
@pytest.mark.parametrize("family", [perron, backward])
def test_optimal_twists_have_no_variance(
    family: Callable[[int], tuple[Target, float]], horizon: int, order: str
) -> None:
    """Every run gives Z, all weights stay equal and no rule on the ESS ever fires, at any length."""
    target, log_z = family(horizon)
    draw = categorical(torch.Generator().manual_seed(0))
    runs = [smc(target, 5, draw, order=order, threshold=0.999) for _ in range(4)]
    for run in runs:
        assert run.log_w.tolist() == pytest.approx([log_z] * 5, abs=1e-10)
        assert float(run.ess) == pytest.approx(5, abs=1e-9) and run.num_resamplings == 0
    assert len({tuple(s) for run in runs for s in run.sequences.tolist()}) > 1


def test_generator_is_the_only_randomness() -> None:
    """The same seed gives the same run, whatever happens to torch's global generator."""
    target, _ = backward(12)
    target = dataclasses.replace(target, log_psi=lambda s: torch.zeros(len(s), 4, dtype=torch.float64))
    runs = []
    for _ in range(2):
        torch.rand(3)
        runs.append(smc(target, 6, categorical(torch.Generator().manual_seed(7))))
    assert torch.equal(runs[0].sequences, runs[1].sequences) and torch.equal(runs[0].log_w, runs[1].log_w)
    other = smc(target, 6, categorical(torch.Generator().manual_seed(8)))
    assert not torch.equal(runs[0].sequences, other.sequences)
    assert runs[0].num_resamplings == 10 and runs[0].sequences.shape == (6, 12)


def test_categorical_draws_from_its_rows() -> None:
    """Pearson's chi-square against the row, fixed seed, false alarm 1e-4; a zero is never drawn; no rows are fine."""
    log_probs = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log() + 3
    drawn = categorical(torch.Generator().manual_seed(1))(log_probs.expand(20_000, 4))
    counts = torch.bincount(drawn, minlength=4).double()
    assert counts[3] == 0
    expected = 20_000 * torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert float(((counts[:3] - expected) ** 2 / expected).sum()) < 18.42  # chi-square, 2 degrees, 1e-4
    assert categorical(torch.Generator())(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "`particles` must be at least 1, got 0: raise it"),
        ({"proposal": "twists"}, r"`proposal` must be one of twist, base, got 'twists' \(did you mean 'twist'\?\)"),
        ({"order": "paper"}, "`order` must be one of weigh_first, sample_first, got 'paper': pass one"),
        ({"threshold": -0.5}, r"`threshold` must lie in \[0, inf\), got -0.5: 0 never resamples"),
        ({"threshold": math.nan}, "`threshold` must lie in .* got nan"),
        ({"pinned": torch.zeros(2, dtype=torch.int64)}, r"`pinned` must hold one token per step, \[3\], got \[2\]"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smc(SUB, **{"particles": 2, "draw": categorical(torch.Generator()), **options})
