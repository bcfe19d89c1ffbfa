"""The step's arithmetic in plain PyTorch: the specification that a fused kernel has to meet.

Everything here works on log weights, takes its randomness as counters or uniforms (never from
a global generator) and is free of Python loops over lanes, groups or the vocabulary, so that it
runs on any device without leaving it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SYSTEMATIC, STRATIFIED, MULTINOMIAL, RESIDUAL = range(4)
#: Scheme names in the order of their codes.
SCHEMES = ("systematic", "stratified", "multinomial", "residual")

# Streams of random numbers that never meet: one for tokens, one for resampling.
TOKEN_STREAM, RESAMPLE_STREAM = 0, 1

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 words right as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """Scramble int64 words (the finaliser of SplitMix64; Steele, Lea & Flood 2014)."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def lane_keys(seeds: Tensor, stream: int, lanes: Tensor) -> Tensor:
    """Return one int64 key per (seed, stream, lane), [N] for int64 ``seeds`` and ``lanes`` [N]."""
    return _mix64(_mix64(_mix64(seeds * _GOLDEN) ^ (stream + 1)) ^ (lanes * _GOLDEN))


def at_position(keys: Tensor, positions: Tensor) -> Tensor:
    """Return the keys [N] of ``lane_keys`` at token positions [N], int64.

    Such a key names a sequence of random numbers that depends on nothing else: not on the batch,
    the device or what was drawn before.
    """
    return _mix64(keys ^ (positions * _GOLDEN))


def _scramble32_(x: Tensor) -> Tensor:
    """Scramble int32 words in place (two wrapping multiplies, three logical xor-shifts)."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -2073254261  # 0x846CA68B
    x ^= (x >> 16) & 0xFFFF
    return x


def counter_uniforms(keys: Tensor, n: int) -> Tensor:
    """Return float32 uniforms [N, n] on (0, 1), both ends excluded: entry (i, j) depends on (keys[i], j) alone.

    Values near 0 are resolved to 2**-32; the largest is 1 - 2**-24.
    """
    counters = torch.arange(n, dtype=torch.int32, device=keys.device) * -1640531527  # 0x9E3779B9
    low, high = keys.to(torch.int32), _shift_right(keys, 32).to(torch.int32)
    words = _scramble32_(counters + low[:, None])
    words ^= high[:, None]
    words = _scramble32_(words).bitwise_and_(0x7FFFFFFF)
    # A factor one ulp below 2**-31: words that round to 2**31 would give 1, and 1 a noise of -inf,
    # with which an allowed token ties with a forbidden one.
    return words.to(torch.float32).add_(0.5).mul_(2.0**-31 - 2.0**-55)


def twist_softmax(logits: Tensor, log_psi: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (lse0, lse_psi), float32 [N]: the log-sums of the base and of the twisted logits.

        lse0[i]    = log sum_v exp(logits[i, v])
        lse_psi[i] = log sum_v exp(logits[i, v] + log_psi[i, v])

    Args:
        logits: base logits [N, V], -inf where a token is forbidden.
        log_psi: log twist values [N, V] in nats, or None for a twist of one everywhere.

    ``lse_psi - lse0`` is log Z^pi of the twist-induced proposal (Zhao et al. 2024, Eq. 15).
    """
    lse0 = torch.logsumexp(logits.float(), dim=-1)
    if log_psi is None:
        return lse0, lse0
    return lse0, torch.logsumexp(logits.float() + log_psi.float(), dim=-1)


def twist_sample(
    logits: Tensor, log_psi: Tensor, lse0: Tensor, ancestors: Tensor | None, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per lane from the twist-induced proposal of the lane's ancestor.

        token[i] ~ softmax(logits[a] + log_psi[a])   with a = ancestors[i]   (Eq. 14)

    Gumbel-max with the counter noise of ``keys``: lanes that share an ancestor draw different
    tokens.

    Args:
        logits, log_psi: float32 [N, V].
        lse0: log-sum of ``logits``, [N].
        ancestors: row to draw from, int64 [N]; None draws every lane from its own.
        keys: one key per lane, int64 [N] (``at_position``).

    Returns:
        token int64 [N], log p0(token) [N], log psi(token) [N].
    """
    # -log(-log1p(-u)): the race is won at small u, where the uniforms are finest.
    noise = counter_uniforms(keys, logits.shape[-1]).neg_().log1p_().neg_().log_().neg_()
    if ancestors is None:
        token = noise.add_(logits).add_(log_psi).argmax(dim=-1)
        ancestors = torch.arange(len(token), device=token.device)
    else:
        token = noise.add_(logits[ancestors]).add_(log_psi[ancestors]).argmax(dim=-1)
    log_p = logits[ancestors, token] - lse0[ancestors]
    return token, log_p, log_psi[ancestors, token]


def effective_sample_size(log_w: Tensor, live: Tensor) -> Tensor:
    """Return 1 / sum of squared normalised weights over the live lanes, [G] (Kish).

    Args:
        log_w: log weights [G, K].
        live: bool [G, K]; lanes outside count for nothing.
    """
    # Weights of long outputs lie thousands of nats from zero, where float32 has three decimals.
    masked = log_w.to(torch.float64).masked_fill(~live, float("-inf"))
    size = torch.exp(2 * torch.logsumexp(masked, -1) - torch.logsumexp(2 * masked, -1))
    return size.to(log_w.dtype)


def _invert(cumulative: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds the point, never a weightless one.

    A point at or beyond the total, by its own rounding or the sum's, goes to the last one with weight.
    """
    index = torch.searchsorted(cumulative, points, right=True)
    lanes = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, lanes, -1).amax(-1, keepdim=True)
    return torch.minimum(index, last).clamp_(min=0)


def _offspring(weights: Tensor, live: Tensor, schemes: Tensor, uniforms: Tensor) -> Tensor:
    """Return how many children each lane gets, int64 [G, K]; rows sum to the number of live lanes."""
    n = live.sum(-1, keepdim=True)
    # A live lane's place among the live ones, 0..n-1.
    rank = live.cumsum(-1) - 1
    scheme = schemes[:, None]
    expected = n * weights
    sure = torch.where(scheme == RESIDUAL, torch.floor(expected + 1e-9), 0.0)
    rest = torch.where(scheme == RESIDUAL, (expected - sure).clamp(min=0), weights)
    draws = n - sure.sum(-1, keepdim=True)
    points = torch.where(
        scheme == SYSTEMATIC,
        (rank + uniforms[:, :1]) / n,
        torch.where(scheme == STRATIFIED, (rank + uniforms) / n, uniforms),
    )
    total = rest.sum(-1, keepdim=True)
    chosen = _invert(rest.cumsum(-1), points * total, rest)
    drawn = (live & (rank < draws)).to(torch.int64)
    return sure.to(torch.int64).scatter_add_(-1, chosen, drawn)


def should_resample(log_w: Tensor, live: Tensor, allowed: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Decide which groups resample.

        resampled = allowed and (ESS < threshold * n  or  threshold >= 1),  n = live lanes >= 2

    Args and shapes as in ``resample``. Returns resampled bool [G] and the ESS of the live lanes
    [G], NaN where the live weights are NaN, +inf or all -inf.
    """
    masked = log_w.to(torch.float64).masked_fill(~live, float("-inf"))
    most = masked.amax(-1)  # propagates NaN
    ess = torch.where(torch.isfinite(most), effective_sample_size(masked, live), float("nan"))
    n = live.sum(-1)
    thresholds = thresholds.to(torch.float64)
    uneven = (ess < thresholds * n) | (thresholds >= 1.0)
    return allowed & torch.isfinite(ess) & (n >= 2) & uneven, ess


def resample(
    log_w: Tensor,
    live: Tensor,
    allowed: Tensor,
    thresholds: Tensor,
    schemes: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Resample the live lanes of every group whose weights have become too uneven.

        resampled = allowed and (ESS < threshold * n  or  threshold >= 1),  n = live lanes >= 2
        ancestors ~ scheme(softmax(log_w over live))      lane i keeps itself where it has a child
        log_w     = log mean exp(log_w over live)         on the live lanes

    Setting the weights to their log-mean (not to zero) keeps the whole population properly
    weighted when other lanes have ended: log Z is the log-mean of all final log weights.

    Args:
        log_w: log weights [G, K].
        live: bool [G, K], any subset of the slots.
        allowed: bool [G], False where this step must not resample.
        thresholds: [G], as a fraction of the live lanes.
        schemes: int64 [G], codes into ``SCHEMES``.
        uniforms: [G, K] on [0, 1]; systematic uses the first of each row only.

    Returns:
        ancestors int64 [G, K] (a lane's own index where nothing changes), the new log_w [G, K],
        ESS of the live lanes before resampling [G], and resampled bool [G]. A group whose live
        weights are NaN, +inf or all -inf is left as it is, with an ESS of NaN.
    """
    resampled, ess = should_resample(log_w, live, allowed, thresholds)
    lanes = torch.arange(log_w.shape[-1], device=log_w.device).expand_as(log_w)
    n = live.sum(-1)
    masked = log_w.to(torch.float64).masked_fill(~live, float("-inf"))
    lse = torch.logsumexp(masked, -1, keepdim=True)
    weights = torch.where(torch.isfinite(ess)[:, None], torch.exp(masked - lse), 0.0)
    counts = _offspring(weights, live, schemes, uniforms.to(torch.float64))
    # Survivors keep their lane; the d-th lane left without a child takes the d-th surplus child.
    surplus = (counts - 1).clamp(min=0).cumsum(-1)
    orphan = live & (counts == 0)
    place = orphan.cumsum(-1) - 1
    parent = torch.searchsorted(surplus, place, right=True).clamp_(max=log_w.shape[-1] - 1)
    ancestors = torch.where(orphan & resampled[:, None], parent, lanes)
    log_mean = (lse - n[:, None].to(torch.float64).log()).to(log_w.dtype)
    return (
        ancestors,
        torch.where(live & resampled[:, None], log_mean, log_w),
        ess.to(log_w.dtype),
        resampled,
    )
