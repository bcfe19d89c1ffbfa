"""Resampling: exact laws of all four schemes, and the edges where such code breaks.

No test here samples: uniforms are an argument, so expectations are sums over a grid of them on
which the number of children is constant between neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_twist.kernels import reference
from vllm_twist.resampling import SCHEMES, Resampled, ess, log_mean_exp, resample

INF = float("inf")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def counts_of(ancestors: Tensor, live: Tensor | None = None) -> Tensor:
    """Children per lane [..., K], among the live lanes."""
    live = torch.ones_like(ancestors, dtype=torch.bool) if live is None else live
    return torch.zeros_like(ancestors).scatter_add_(-1, ancestors, live.long())


def textbook(scheme: str, weights: list[float], uniforms: list[float]) -> list[int]:
    """Count children as the books do, one point at a time (Douc, Cappé & Moulines 2005)."""
    n = len(weights)
    counts, rest = [0] * n, list(weights)
    points = [
        (i + uniforms[0]) / n if scheme == "systematic" else (i + u) / n if scheme == "stratified" else u
        for i, u in enumerate(uniforms)
    ]
    if scheme == "residual":
        counts = [math.floor(n * w + 1e-9) for w in weights]
        rest = [n * w - c for w, c in zip(weights, counts, strict=True)]
        points = points[: n - sum(counts)]
    for point in points:
        point *= sum(rest)
        chosen = 0
        while point >= rest[chosen]:
            point -= rest[chosen]
            chosen += 1
        counts[chosen] += 1
    return counts


def expected_counts(resampler: Callable[[Tensor, Tensor], Tensor], parts: list[int]) -> Tensor:
    """Return E[children] for the weights ``parts / sum(parts)`` over uniform uniforms, exactly.

    The mean is linear in the points, so all of them may share one uniform. With integer parts a
    point moves to another lane only at multiples of 1 / (A R), A = sum(parts), R <= K points.
    """
    cells = sum(parts) * math.lcm(*range(1, len(parts) + 1))
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    log_w = torch.tensor(parts, dtype=torch.float64).log().expand(cells, -1)
    return resampler(log_w, middles[:, None].expand(log_w.shape)).double().mean(0)


@every_scheme
@pytest.mark.parametrize("parts", [[3, 0, 5, 1, 7], [1, 1, 1, 1], [0, 0, 12, 1], [2, 1]])
def test_offspring_is_unbiased(scheme: str, parts: list[int]) -> None:
    """E[children of k] = K w_k, on which the unbiasedness of Z-hat rests; to float64 round-off."""
    got = expected_counts(lambda log_w, u: counts_of(resample(log_w, scheme, uniforms=u).ancestors), parts)
    want = torch.tensor(parts, dtype=torch.float64) * len(parts) / sum(parts)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "broken",
    [lambda u: u / 2, lambda u: 1 - u / 4],
    ids=["first half", "last quarter"],
)
@every_scheme
def test_offspring_of_broken_uniforms_is_biased(scheme: str, broken: Callable[[Tensor], Tensor]) -> None:
    """The test above has power: points that do not cover their range show."""
    parts = [3, 0, 5, 1, 7]
    got = expected_counts(lambda log_w, u: counts_of(resample(log_w, scheme, uniforms=broken(u)).ancestors), parts)
    want = torch.tensor(parts, dtype=torch.float64) * len(parts) / sum(parts)
    assert (got - want).abs().max() > 0.02


@every_scheme
def test_counts_equal_the_textbook(scheme: str) -> None:
    """With a uniform of its own for every point: fixes the joint law, not only the mean."""
    generator = torch.Generator().manual_seed(0)
    for k in (2, 3, 7, 64):
        log_w = 2 * torch.randn(50, k, generator=generator, dtype=torch.float64)
        log_w[:, 0] = -INF
        uniforms = torch.rand(50, k, generator=generator, dtype=torch.float64)
        got = counts_of(resample(log_w, scheme, uniforms=uniforms).ancestors)
        weights = log_w.softmax(-1)
        want = [textbook(scheme, w, u) for w, u in zip(weights.tolist(), uniforms.tolist(), strict=True)]
        assert got.tolist() == want


@every_scheme
def test_any_subset_may_be_live(scheme: str) -> None:
    """Live lanes resample as if the others were not there, and the others stay as they are."""
    generator = torch.Generator().manual_seed(1)
    log_w = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    live = torch.rand(200, 9, generator=generator) < 0.6
    live[:, :2] = torch.tensor([False, True])
    uniforms = torch.rand(200, 9, generator=generator, dtype=torch.float64)
    got = resample(log_w, scheme, uniforms=uniforms, live=live)
    for i in range(200):
        index = live[i].nonzero()[:, 0]
        # Point number r of a scheme belongs to the r-th live lane; only residual and systematic
        # read fewer, from the first live lane on and from slot 0.
        own = uniforms[i, index].clone()
        if scheme == "systematic":
            own[0] = uniforms[i, 0]
        alone = resample(log_w[i, index], scheme, uniforms=own)
        assert torch.equal(got.ancestors[i, index], index[alone.ancestors])
        torch.testing.assert_close(got.log_w[i, index], alone.log_w)
        assert got.resampled[i] == alone.resampled
        torch.testing.assert_close(got.ess[i], alone.ess)
    lanes = torch.arange(9).expand_as(log_w)
    assert torch.equal(got.ancestors[~live], lanes[~live])
    assert torch.equal(got.log_w[~live], log_w[~live])


@pytest.mark.parametrize("k", [2, 5, 64, 1024])
def test_batch_of_groups(k: int) -> None:
    """Groups with schemes, thresholds and permissions of their own, in one call, float32 as in the engine.

    Survivors keep their lanes, the number of children equals the number of live lanes, the log-mean
    is preserved, and no group can tell who shares its batch.
    """
    generator = torch.Generator().manual_seed(k)
    g = 96
    log_w = 3 * torch.rand(g, 1, generator=generator) * torch.randn(g, k, generator=generator) - 500
    live = torch.rand(g, k, generator=generator) < torch.rand(g, 1, generator=generator) * 1.5
    allowed = torch.rand(g, generator=generator) < 0.8
    thresholds = torch.tensor([0.0, 0.3, 0.7, 1.0]).repeat_interleave(g // 4)
    schemes = torch.arange(g) % 4
    uniforms = torch.rand(g, k, generator=generator)
    arguments = (log_w, live, allowed, thresholds, schemes, uniforms)
    ancestors, new_log_w, sizes, resampled = reference.resample(*arguments)

    for i in range(g):
        alone = reference.resample(*(x[i : i + 1] for x in arguments))
        for got, want in zip((ancestors, new_log_w, sizes, resampled), alone, strict=True):
            torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=0, equal_nan=True)

    lanes = torch.arange(k).expand(g, k)
    counts = counts_of(ancestors, live)
    assert torch.equal(ancestors[(counts > 0) & live], lanes[(counts > 0) & live])
    assert live.gather(1, ancestors)[live].all() and torch.equal(ancestors[~live], lanes[~live])
    assert torch.equal(ancestors[~resampled], lanes[~resampled])
    assert torch.equal(new_log_w[~resampled], log_w[~resampled])
    assert torch.equal(new_log_w[~live], log_w[~live])

    n = live.sum(-1)
    weights = log_w.double().masked_fill(~live, -INF).softmax(-1)
    torch.testing.assert_close(sizes[n > 0].double(), 1 / (weights**2).sum(-1)[n > 0], rtol=1e-5, atol=0)
    rule = (sizes < thresholds * n) | (thresholds >= 1)
    assert torch.equal(resampled, allowed & (n >= 2) & rule)
    assert resampled.any() and (~resampled & (n >= 2) & allowed).any()
    for i in resampled.nonzero()[:, 0].tolist():
        before, after = log_w[i, live[i]].double(), new_log_w[i, live[i]].double()
        assert float(log_mean_exp(after)) == pytest.approx(float(log_mean_exp(before)), abs=1e-4)  # float32 near 500
        assert after.min() == after.max()
        expected = n[i] * weights[i]
        if SCHEMES[schemes[i]] in ("systematic", "residual"):
            assert (counts[i] >= torch.floor(expected - 1e-9)).all()
        if SCHEMES[schemes[i]] == "systematic":
            assert (counts[i] <= torch.ceil(expected + 1e-9)).all()


@every_scheme
@pytest.mark.parametrize("u", [0.0, 2.0**-33, 0.5, 1 - 2.0**-24, 1.0])
def test_weightless_lanes_have_no_children(scheme: str, u: float) -> None:
    """Points at both ends of the range, with zero weights at both ends and in between."""
    log_w = torch.tensor([-INF, 0.0, -INF, -INF, 1.0, -30.0, -INF])
    got = resample(log_w, scheme, uniforms=torch.full((7,), u))
    assert (log_w[got.ancestors] > -INF).all()


@every_scheme
def test_float32_cumulative_sum_below_one(scheme: str) -> None:
    """A sum of float32 weights that ends below the last point must not spill into the weightless tail."""
    log_w = torch.full((1024,), -INF)
    log_w[:1000] = torch.sin(4 * torch.arange(1000.0))
    point = 1 - 2.0**-24
    assert np.cumsum(log_w.double().softmax(-1).float().numpy())[-1] < point  # the premise
    got = resample(log_w, scheme, uniforms=torch.full((1024,), point))
    assert got.resampled and got.ancestors.max() < 1000


@every_scheme
@pytest.mark.parametrize("bad", [[-INF, -INF, -INF], [0.0, math.nan, 1.0], [0.0, INF, 1.0]])
def test_weights_that_cannot_be_normalised(scheme: str, bad: list[float]) -> None:
    """All zero, NaN or infinite: the group is left alone, says so by its ESS, and spoils no neighbour."""
    log_w = torch.tensor([bad, [0.0, -9.0, -9.0]])
    got = resample(log_w, scheme, uniforms=torch.full((2, 3), 0.5))
    assert got.resampled.tolist() == [False, True]
    assert got.ancestors.tolist() == [[0, 1, 2], [0, 0, 0]]
    torch.testing.assert_close(got.log_w[0], log_w[0], equal_nan=True)
    assert got.ess[0].isnan() and got.ess[1] == pytest.approx(1, abs=1e-3)


@every_scheme
def test_bad_weights_outside_the_live_lanes_do_not_matter(scheme: str) -> None:
    log_w = torch.tensor([math.nan, 0.0, 0.0, INF])
    live = torch.tensor([False, True, True, False])
    got = resample(log_w, scheme, uniforms=torch.tensor([0.3, 0.2, 0.7, 0.1]), live=live)
    assert got.resampled and float(got.ess) == 2
    assert got.log_w[1:3].tolist() == [0, 0] and got.ancestors[[0, 3]].tolist() == [0, 3]


@every_scheme
def test_one_particle(scheme: str) -> None:
    """K = 1, and K = 3 with one live: nothing to choose from, so nothing happens."""
    alone = resample(torch.tensor([-2.5]), scheme, uniforms=torch.tensor([0.9]))
    assert (alone.ancestors.tolist(), alone.log_w.tolist(), float(alone.ess)) == ([0], [-2.5], 1)
    assert not alone.resampled
    live = torch.tensor([False, True, False])
    one = resample(torch.tensor([3.0, -2.5, 3.0]), scheme, uniforms=torch.full((3,), 0.9), live=live)
    assert one.ancestors.tolist() == [0, 1, 2] and not one.resampled and float(one.ess) == 1
    none = resample(torch.zeros(3), scheme, uniforms=torch.full((3,), 0.9), live=torch.zeros(3, dtype=torch.bool))
    assert none.ancestors.tolist() == [0, 1, 2] and not none.resampled


@every_scheme
def test_equal_weights(scheme: str) -> None:
    """Low-variance schemes copy nothing when there is nothing to gain, whatever the round-off of 1/K."""
    for k in (2, 3, 49, 1000):
        got = resample(torch.full((k,), -1.7), scheme, uniforms=torch.full((k,), 0.5))
        if scheme != "multinomial":
            assert got.ancestors.tolist() == list(range(k))
        assert float(got.ess) == pytest.approx(k)


def test_threshold() -> None:
    """The rule is strict below one: an ESS of exactly threshold * K does not resample."""
    log_w = torch.tensor([0.0, 0.0, -INF, -INF])  # ESS 2 of 4
    uniforms = torch.full((4,), 0.5)
    fired = {
        threshold: bool(resample(log_w, uniforms=uniforms, threshold=threshold).resampled)
        for threshold in (0, 0.49, 0.51, 1, 2)
    }
    assert fired == {0: False, 0.49: False, 0.51: True, 1: True, 2: True}
    even = resample(torch.zeros(4), uniforms=uniforms, threshold=0.999)
    assert not even.resampled
    assert resample(torch.zeros(4), uniforms=uniforms, threshold=1).resampled


def test_systematic_reads_one_uniform() -> None:
    log_w = torch.tensor([0.3, -1.0, 0.0, -2.0])
    first = resample(log_w, uniforms=torch.tensor([0.4, 0.1, 0.2, 0.3]))
    second = resample(log_w, uniforms=torch.tensor([0.4, 0.9, 0.8, 0.7]))
    assert torch.equal(first.ancestors, second.ancestors)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """Leading dimensions are groups; dtype stays."""
    log_w = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got: Resampled = resample(log_w, "residual", uniforms=torch.full(shape, 0.3))
    assert got.ancestors.shape == got.log_w.shape == shape
    assert got.ess.shape == got.resampled.shape == shape[:-1]
    assert got.ancestors.dtype == torch.int64 and got.log_w.dtype == torch.float64
    torch.testing.assert_close(got.ess, ess(log_w))
    torch.testing.assert_close(log_mean_exp(got.log_w), log_mean_exp(log_w))


def test_ess() -> None:
    """Between 1 and K, and the same far from zero, where long outputs have their weights."""
    assert ess(torch.zeros(8)) == pytest.approx(8)
    assert ess(torch.tensor([0.0, -INF, -INF])) == pytest.approx(1)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ess(weights.log()) == pytest.approx(100 / 30)
    far = torch.tensor([0.0, 1.0, 2.0]) - 2.0**15  # exact in float32, as are the differences
    assert ess(far) == pytest.approx(float(ess(torch.tensor([0.0, 1.0, 2.0]))), rel=1e-6)
    assert ess(torch.full((3,), -INF)).isnan()


def test_log_mean_exp() -> None:
    assert log_mean_exp(torch.tensor([1.0, 3.0]).log()) == pytest.approx(math.log(2))
    assert log_mean_exp(torch.tensor([-1000.0, -1000.0, -INF, -INF])) == pytest.approx(-1000 - math.log(2))
    assert log_mean_exp(torch.full((2,), -INF)) == -INF


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scheme": "systemic"},
            r"`scheme` must be one of systematic, stratified, multinomial, residual, got 'systemic' "
            r"\(did you mean 'systematic'\?\): pass one of these",
        ),
        ({"log_w": torch.zeros(3, dtype=torch.int64)}, r"`log_w` must hold floating-point .* got torch.int64 \[3\]"),
        ({"log_w": torch.zeros(2, 0)}, r"`log_w` must .* got torch.float32 \[2, 0\]: pass at least one particle"),
        ({"log_w": torch.tensor(0.0)}, r"`log_w` must hold .* got torch.float32 \[\]"),
        ({"uniforms": torch.zeros(4)}, r"`uniforms` must have the shape of `log_w`, \[3\], got \[4\]: pass torch.rand"),
        ({"uniforms": torch.tensor([0.5, 1.5, 0.5])}, r"`uniforms` must lie in \[0, 1\], got values outside: pass"),
        ({"uniforms": torch.tensor([0.5, math.nan, 0.5])}, r"`uniforms` must lie in \[0, 1\]"),
        ({"live": torch.ones(3)}, r"`live` must be bool and have the shape of `log_w`, \[3\], got torch.float32 \[3\]"),
        ({"live": torch.ones(2, dtype=torch.bool)}, r"`live` must be bool .* got torch.bool \[2\]: pass a mask"),
        ({"threshold": -1.0}, r"`threshold` must lie in \[0, inf\), got -1.0: 0 never resamples, 1 always does"),
        ({"threshold": math.nan}, "`threshold` must lie in .* got nan"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resample(**{"log_w": torch.zeros(3), "uniforms": torch.full((3,), 0.5), **changes})


def law(scheme: str, parts: list[int], live: list[bool], pinned: bool) -> dict[tuple[int, ...], float]:
    """Return the probability of every vector of children for K = 3, exactly: a sum over cells of uniforms."""
    sizes = (108, 36, 36)  # multiples of all that the cuts can be, for the parts below
    grid = [(torch.arange(size, dtype=torch.float64) + 0.5) / size for size in sizes]
    uniforms = torch.cartesian_prod(*grid)
    groups = len(uniforms)
    ancestors, *_ = reference.resample(
        torch.tensor(parts, dtype=torch.float64).log().expand(groups, 3),
        torch.tensor(live).expand(groups, 3),
        torch.ones(groups, dtype=torch.bool),
        torch.ones(groups),
        torch.full((groups,), SCHEMES.index(scheme)),
        uniforms,
        torch.full((groups,), pinned),
    )
    if pinned and live[0]:
        assert (ancestors[:, 0] == 0).all()
    found, how_often = counts_of(ancestors, torch.tensor(live).expand(groups, 3)).unique(dim=0, return_counts=True)
    return {tuple(row): count / groups for row, count in zip(found.tolist(), how_often.tolist(), strict=True)}


@pytest.mark.parametrize("live", [[True] * 3, [True, False, True], [False, True, True]])
@pytest.mark.parametrize("parts", [[3, 2, 1], [1, 2, 3], [1, 0, 5]])
@pytest.mark.parametrize("scheme", ["multinomial", "residual"])
def test_pinned_law(scheme: str, parts: list[int], live: list[bool]) -> None:
    """P(children) is that of the scheme times the children of the pinned lane over their mean (while it lives)."""
    n = sum(live)
    mean = n * parts[0] / sum(p for p, alive in zip(parts, live, strict=True) if alive)
    expected = {
        children: p * (children[0] / mean if live[0] else 1)
        for children, p in law(scheme, parts, live, pinned=False).items()
        if children[0] or not live[0]
    }
    assert law(scheme, parts, live, pinned=True) == pytest.approx(expected, abs=1e-12)


def test_a_weightless_pinned_lane_keeps_itself() -> None:
    """Whatever its weight: what is pinned must not be replaced."""
    for scheme in ("multinomial", "residual"):
        for children in law(scheme, [0, 1, 5], [True] * 3, pinned=True):
            assert children[0] == 1
