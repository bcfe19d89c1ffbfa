"""The step's arithmetic: counter-based noise, the twisted softmax and the Gumbel-max draw.

Statistical tests are Pearson chi-squares at fixed seeds, against the quantile that a sound
generator exceeds once in 10,000 times; each has a twin that shows what a wrong law would give.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_twist.kernels.reference import (
    RESAMPLE_STREAM,
    TOKEN_STREAM,
    at_position,
    counter_uniforms,
    lane_keys,
    twist_sample,
    twist_softmax,
)


def stream_keys(seeds: Tensor, stream: int, positions: Tensor, lanes: Tensor) -> Tensor:
    return at_position(lane_keys(seeds, stream, lanes), positions)


INF = float("inf")
#: Keys whose first and second word is 2**31 - 1, the one that is nearest to a uniform of 1.
TOP_KEYS = (-2573957223134789632, -2469218509977026560)


def keys_for(n: int, *, seed: int = 1234, stream: int = TOKEN_STREAM, position: int = 5) -> Tensor:
    """One key per lane 0..n-1 of one request at one position."""
    return stream_keys(torch.full((n,), seed), stream, torch.full((n,), position), torch.arange(n))


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Return Pearson's statistic and its 1 - 1e-4 quantile (Wilson & Hilferty 1931)."""
    expected = counts.sum() * probabilities.double()
    assert expected.min() >= 5  # below, the statistic has another law
    df = len(counts) - 1
    quantile = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), quantile


def histogram(uniforms: Tensor, bins: int = 128) -> Tensor:
    return torch.histc(uniforms.double().flatten(), bins, 0, 1)


# Counter-based uniforms.


def test_uniforms_depend_on_their_key_alone() -> None:
    """Batch, row and length must not matter: a request gives the same tokens whoever shares its batch."""
    keys = keys_for(7)
    whole = counter_uniforms(keys, 1000)
    assert whole.dtype == torch.float32 and whole.shape == (7, 1000)
    for i in range(7):
        assert torch.equal(counter_uniforms(keys[i : i + 1], 1000)[0], whole[i])
    assert torch.equal(counter_uniforms(keys.flip(0), 1000), whole.flip(0))
    assert torch.equal(counter_uniforms(keys, 17), whole[:, :17])


def test_uniforms_are_pinned() -> None:
    """A seed means the same samples in every version and on every device: a change here is a breaking one."""
    keys = stream_keys(torch.tensor([0, 42, -1]), TOKEN_STREAM, torch.tensor([1, 2, 2**31]), torch.tensor([0, 3, 1023]))
    assert keys.tolist() == [8715465295809484313, -3952699904024346078, -6985992721275477675]
    other = stream_keys(torch.tensor([42]), RESAMPLE_STREAM, torch.tensor([2]), torch.tensor([0]))
    assert other.tolist() == [7166722570998464371]
    expected = torch.tensor(
        [
            [0.186464965, 0.369171411, 0.114642203],
            [0.129728243, 0.095795326, 0.014005108],
            [0.648953915, 0.943782806, 0.703539908],
        ]
    )
    torch.testing.assert_close(counter_uniforms(keys, 3), expected, rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63), -1])
@pytest.mark.parametrize("stream", [TOKEN_STREAM, RESAMPLE_STREAM])
def test_any_seed_and_stream(seed: int, stream: int) -> None:
    """int64 wraps around: no seed and neither stream may overflow (the second one did)."""
    keys = keys_for(64, seed=seed, stream=stream)
    assert len(set(keys.tolist())) == 64


def test_keys_never_meet() -> None:
    """Every argument counts: seeds, streams, positions and lanes that differ by little give other numbers."""
    seeds, positions, lanes = torch.meshgrid(torch.arange(20), torch.arange(1, 61), torch.arange(30), indexing="ij")
    flat = [x.reshape(-1) for x in (seeds, positions, lanes)]
    keys = torch.cat([stream_keys(flat[0], stream, flat[1], flat[2]) for stream in (TOKEN_STREAM, RESAMPLE_STREAM)])
    assert len(keys.unique()) == 2 * 20 * 60 * 30
    # Nor do their sequences: two equal pairs of numbers among them have odds of 1e-5.
    first = counter_uniforms(keys, 2)
    assert len(first.unique(dim=0)) == len(keys)


@pytest.mark.parametrize("vary", ["seed", "position", "lane", "counter"])
def test_uniforms_are_uniform(vary: str) -> None:
    """Along each coordinate with the others fixed: 2^18 numbers in 128 bins; false alarm 1e-4 each."""
    n = 2**18
    index, fixed = torch.arange(n), torch.full((n,), 3)
    if vary == "counter":
        uniforms = counter_uniforms(keys_for(1), n)[0]
    else:
        seeds, positions, lanes = (index if vary == name else fixed for name in ("seed", "position", "lane"))
        uniforms = counter_uniforms(stream_keys(seeds, TOKEN_STREAM, positions, lanes), 1)[:, 0]
    uniform = torch.full((128,), 1 / 128)
    statistic, quantile = chi_square(histogram(uniforms), uniform)
    assert statistic < quantile
    # And in the last seven of its 24 bits.
    low = (uniforms.double() * 2**17).remainder(1)
    statistic, quantile = chi_square(histogram(low), uniform)
    assert statistic < quantile
    # Power: numbers biased by three per cent.
    statistic, quantile = chi_square(histogram(uniforms**1.03), uniform)
    assert statistic > quantile


@pytest.mark.parametrize("vary", ["seed", "position", "lane", "counter"])
def test_neighbours_are_independent(vary: str) -> None:
    """Pairs of neighbours fill the square evenly: 2^18 pairs in 16 x 16 bins; false alarm 1e-4 each."""
    n = 2**18
    if vary == "counter":
        pairs = counter_uniforms(keys_for(1), 2 * n)[0].reshape(n, 2)
    else:
        index, fixed = torch.arange(2 * n), torch.full((2 * n,), 3)
        seeds, positions, lanes = (index if vary == name else fixed for name in ("seed", "position", "lane"))
        pairs = counter_uniforms(stream_keys(seeds, TOKEN_STREAM, positions, lanes), 1).reshape(n, 2)
    cells = (pairs.double() * 16).long() @ torch.tensor([16, 1])
    counts = torch.bincount(cells, minlength=256).double()
    statistic, quantile = chi_square(counts, torch.full((256,), 1 / 256))
    assert statistic < quantile


def test_uniforms_exclude_both_ends() -> None:
    """The largest word rounds up to 2**31 in float32, and must not become a uniform of 1."""
    uniforms = counter_uniforms(torch.tensor(TOP_KEYS), 2)
    assert uniforms[0, 0] == uniforms[1, 1] == 1 - 2.0**-24
    many = counter_uniforms(keys_for(64), 50_000)
    assert many.min() > 0 and many.max() < 1


# The twisted softmax.


@pytest.mark.parametrize("vocab", [1, 3, 151_936, 128_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_twist_softmax_against_float64(vocab: int, dtype: torch.dtype, scale: float) -> None:
    """Saturated logits, half-precision input and long vocabularies; tolerance: ten float32 roundings."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (scale * torch.randn(2, vocab, generator=generator)).to(dtype)
    log_psi = (scale * torch.randn(2, vocab, generator=generator)).to(dtype)
    logits[:, 1::3] = -INF
    lse0, lse_psi = twist_softmax(logits, log_psi)
    assert lse0.dtype == lse_psi.dtype == torch.float32
    close = {"rtol": 1.2e-6, "atol": 1.2e-6, "check_dtype": False}
    torch.testing.assert_close(lse0, torch.logsumexp(logits.double(), -1), **close)
    torch.testing.assert_close(lse_psi, torch.logsumexp(logits.double() + log_psi.double(), -1), **close)


def test_twist_softmax_edges() -> None:
    """No twist is a twist of one; a constant twist moves log Z^pi by that constant; no token left is log 0."""
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, -INF, 1.0]])
    lse0, lse_psi = twist_softmax(logits, None)
    assert torch.equal(lse0, lse_psi)
    torch.testing.assert_close(lse0, logits.logsumexp(-1))
    lse0, lse_psi = twist_softmax(logits, torch.full_like(logits, 2.5))
    torch.testing.assert_close(lse_psi - lse0, torch.tensor([2.5, 2.5]))
    lse0, lse_psi = twist_softmax(logits, torch.full_like(logits, -INF))
    assert torch.isfinite(lse0).all() and (lse_psi == -INF).all()


# The draw.

LOGITS = torch.tensor([[1.0, 0.0, -0.5, 0.4, -1.0, -INF], [-1.0, 0.5, 0.5, -INF, 2.0, 0.0]])
LOG_PSI = torch.tensor([[-1.0, 0.3, 0.8, -0.2, 1.5, 9.0], [0.2, -0.7, 1.0, 5.0, -1.5, 0.1]])


def draw(logits: Tensor, log_psi: Tensor, ancestors: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return twist_sample(logits, log_psi, twist_softmax(logits, None)[0], ancestors, keys)


def test_twist_sample_draws_from_the_twisted_row() -> None:
    """40,000 lanes on two rows follow softmax(l + g) of their ancestor's row; false alarm 1e-4 each.

    The untwisted law, the other row's, and the row's own without its ancestor are all refused.
    """
    n = 40_000
    ancestors = (torch.arange(n) % 3 == 0).long()
    logits, log_psi = LOGITS[torch.arange(n) % 2], LOG_PSI[torch.arange(n) % 2]  # row i is that of i mod 2
    token, _, _ = draw(logits, log_psi, ancestors, keys_for(n))
    for row in (0, 1):
        counts = torch.bincount(token[ancestors == row], minlength=6).double()
        allowed = LOGITS[row] > -INF
        assert counts[~allowed].sum() == 0
        right = (LOGITS[row] + LOG_PSI[row]).softmax(-1)[allowed]
        statistic, quantile = chi_square(counts[allowed], right)
        assert statistic < quantile
        slightly_wrong = (LOGITS[row] + 1.1 * LOG_PSI[row]).softmax(-1)[allowed]
        for wrong in (LOGITS[row].softmax(-1)[allowed], slightly_wrong):
            statistic, quantile = chi_square(counts[allowed], wrong)
            assert statistic > quantile


def test_twist_sample_over_positions() -> None:
    """One lane over 40,000 positions: successive tokens of a sequence follow the law too; false alarm 1e-4."""
    n = 40_000
    keys = stream_keys(torch.full((n,), 9), TOKEN_STREAM, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    token, _, _ = draw(LOGITS[:1].expand(n, -1), LOG_PSI[:1].expand(n, -1), torch.arange(n), keys)
    right = (LOGITS[0] + LOG_PSI[0]).softmax(-1)[:5]
    statistic, quantile = chi_square(torch.bincount(token, minlength=5).double(), right)
    assert statistic < quantile


def test_twist_sample_returns_the_ancestor_rows_values() -> None:
    """log p0 is normalised and of the ancestor's row, log psi as given: swapped rows would spoil every weight."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(8, 50, generator=generator)
    log_psi = torch.randn(8, 50, generator=generator)
    ancestors = torch.tensor([3, 3, 0, 7, 7, 7, 2, 1])
    token, log_p, token_psi = draw(logits, log_psi, ancestors, keys_for(8))
    for i, (a, v) in enumerate(zip(ancestors.tolist(), token.tolist(), strict=True)):
        assert float(log_p[i]) == pytest.approx(float(logits[a].log_softmax(-1)[v]), abs=1e-5)
        assert token_psi[i] == log_psi[a, v]
    assert token.dtype == torch.int64


def test_own_row_when_nothing_was_resampled() -> None:
    """No ancestors means every lane its own."""
    own = draw(LOGITS, LOG_PSI, torch.tensor([0, 1]), keys_for(2))
    for got, want in zip(draw(LOGITS, LOG_PSI, None, keys_for(2)), own, strict=True):
        assert torch.equal(got, want)


def test_twist_sample_leaves_its_inputs() -> None:
    """The noise is added in place, but not into the logits."""
    logits, log_psi = LOGITS.clone(), LOG_PSI.clone()
    for ancestors in (torch.tensor([0, 1]), None):
        draw(logits, log_psi, ancestors, keys_for(2))
    assert torch.equal(logits, LOGITS) and torch.equal(log_psi, LOG_PSI)


def test_siblings_draw_different_tokens() -> None:
    """Lanes with one ancestor have noise of their own: resampling followed by equal draws would gain nothing."""
    logits = torch.zeros(64, 1000)
    token, _, _ = draw(logits, logits, torch.zeros(64, dtype=torch.int64), keys_for(64))
    # 64 draws from 1,000 tokens collide twice on average; 20 times or more with odds below 1e-12.
    assert len(token.unique()) > 44


def test_lane_draws_alike_in_any_batch() -> None:
    """Alone or among others, a lane gets the same token."""
    generator = torch.Generator().manual_seed(4)
    logits, log_psi = torch.randn(16, 300, generator=generator), torch.randn(16, 300, generator=generator)
    keys = keys_for(16)
    together, _, _ = draw(logits, log_psi, torch.arange(16), keys)
    for i in range(16):
        alone, _, _ = draw(logits[i : i + 1], log_psi[i : i + 1], torch.tensor([0]), keys[i : i + 1])
        assert alone[0] == together[i]


@pytest.mark.parametrize("only", [0, 3])
def test_forbidden_tokens_are_never_drawn(only: int) -> None:
    """With one token allowed it is drawn, also by a high twist on the others."""
    logits = torch.full((5000, 4), -INF)
    logits[:, only] = -40.0
    log_psi = torch.full((5000, 4), 50.0)
    log_psi[:, only] = -50.0
    token, log_p, _ = draw(logits, log_psi, torch.arange(5000), keys_for(5000))
    assert (token == only).all() and (log_p == 0).all()


def test_forbidden_tokens_lose_to_the_worst_noise() -> None:
    """The smallest noise there is must be finite: at -inf the allowed token would tie with forbidden ones."""
    keys = torch.tensor(TOP_KEYS)
    logits = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    token, log_p, _ = draw(logits, torch.zeros(2, 2), torch.arange(2), keys)
    assert token.tolist() == [0, 1] and log_p.tolist() == [0, 0]


def test_one_token_vocabulary() -> None:
    token, log_p, log_psi = draw(torch.tensor([[3.0]]), torch.tensor([[0.7]]), torch.tensor([0]), keys_for(1))
    assert (token.tolist(), log_p.tolist()) == ([0], [0.0]) and float(log_psi) == pytest.approx(0.7)
