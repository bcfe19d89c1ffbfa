"""The step's arithmetic in plain PyTorch: the specification that a fused kernel has to meet.

Everything here works on log weights, takes its randomness as counters or uniforms (never from
a global generator) and is free of Python loops over lanes, groups or the vocabulary, so that it
runs on any device without leaving it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schemes import MULTINOMIAL as MULTINOMIAL
from .schemes import RESIDUAL, STRATIFIED, SYSTEMATIC, is_uneven, may_resample
from .schemes import SCHEMES as SCHEMES

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
    """Return the keys [N] of ``lane_keys`` at token positions [N], int64, or [S, N] at S positions each.

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


class LowRank(NamedTuple):
    """Log psi of N rows in factors, ``z @ up.T + bias``: it stands where log psi [N, V] would.

    Attributes:
        z: [N, r].
        up: [V, r], of the same type.
        bias: [V].
    """

    z: Tensor
    up: Tensor
    bias: Tensor

    def values(self) -> Tensor:
        """Return log psi, float32 [N, V]."""
        return torch.nn.functional.linear(self.z.float(), self.up.float(), self.bias.float())

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return log psi of one token each of some rows, both int64 [L]; float32 [L]."""
        return (self.z[rows].float() * self.up[tokens].float()).sum(-1) + self.bias[tokens].float()


def _scaled(
    logits: Tensor,
    log_psi: Tensor | LowRank | None,
    inverse_temperature: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return float32 logits and twists as they enter p0 and psi; a scale of zero is no twist, whatever log psi."""
    logits = (logits if rows is None else logits[rows]).float()
    if inverse_temperature is not None:
        logits = logits * inverse_temperature[:, None]
    if log_psi is not None:
        log_psi = log_psi.values() if isinstance(log_psi, LowRank) else log_psi.float()
        if scale is not None:
            log_psi = torch.where(scale[:, None] == 0, 0.0, log_psi * scale[:, None])
    return logits, log_psi


def twist_softmax(
    logits: Tensor,
    log_psi: Tensor | LowRank | None,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (lse0, lse_psi), float32 [N]: the log-sums of the base and of the twisted logits.

        lse0[i]    = log sum_v exp(beta[i] * logits[r, v])                                with r = rows[i]
        lse_psi[i] = log sum_v exp(beta[i] * logits[r, v] + scale[i] * log_psi[i, v])

    Args:
        logits: base logits [M, V], -inf where a token is forbidden.
        log_psi: log twist values [N, V] in nats, whole or in factors, or None for a twist of one everywhere.
        inverse_temperature: beta > 0 of each row, float32 [N]; None is 1 everywhere.
        scale: exponent of each row's twist, float32 [N]; None is 1 everywhere.
        rows: row of the logits that belongs to each row of the twist, int64 [N]; None is the same (M = N).

    ``lse_psi - lse0`` is log Z^pi of the twist-induced proposal (Zhao et al. 2024, Eq. 15).
    """
    logits, log_psi = _scaled(logits, log_psi, inverse_temperature, scale, rows)
    lse0 = torch.logsumexp(logits, dim=-1)
    if log_psi is None:
        return lse0, lse0
    return lse0, torch.logsumexp(logits + log_psi, dim=-1)


def twist_sample(
    logits: Tensor,
    log_psi: Tensor | LowRank | None,
    lse0: Tensor,
    ancestors: Tensor | None,
    keys: Tensor,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per lane from the twist-induced proposal of the lane's ancestor.

        token[i] ~ softmax(beta[a] * logits[r] + scale[a] * log_psi[a])   with a = ancestors[i], r = rows[a]   (Eq. 14)

    Gumbel-max with the counter noise of ``keys``: lanes that share an ancestor draw different
    tokens.

    Args:
        logits: [M, V].
        log_psi: [N, V], or None for a twist of one everywhere.
        lse0: log-sum of ``beta * logits``, [N].
        ancestors: row to draw from, int64 [N]; None draws every lane from its own.
        keys: one key per lane, int64 [N] (``at_position``).
        inverse_temperature, scale, rows: of each row, as in ``twist_softmax``.

    Returns:
        token int64 [N], log p0(token) [N], log psi(token) [N].
    """
    logits, log_psi = _scaled(logits, log_psi, inverse_temperature, scale, rows)
    # -log(-log1p(-u)): the race is won at small u, where the uniforms are finest.
    scores = counter_uniforms(keys, logits.shape[-1]).neg_().log1p_().neg_().log_().neg_()
    scores.add_(logits if ancestors is None else logits[ancestors])
    if log_psi is not None:
        scores.add_(log_psi if ancestors is None else log_psi[ancestors])
    token = scores.argmax(dim=-1)

    def at(values: Tensor) -> Tensor:
        return values.gather(1, token[:, None])[:, 0] if ancestors is None else values[ancestors, token]

    log_p = at(logits) - (lse0 if ancestors is None else lse0[ancestors])
    return token, log_p, torch.zeros_like(log_p) if log_psi is None else at(log_psi)


def weigh_and_sample(
    logits: Tensor, log_psi: Tensor, keys: Tensor, log_w: Tensor, log_psi_before: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weigh and draw for lanes that all go on with their own particle: ``twist_softmax`` and ``twist_sample`` in one.

        log_w += lse_psi - lse0 - log psi_{t-1}          (Zhao et al. 2024, Prop. 3.3)

    Args:
        logits, log_psi, keys: as there.
        log_w: log weights, float64 [N].
        log_psi_before: log psi of the last tokens, float32 [N].

    Returns:
        lse0 [N], the new log weights [N], token int64 [N], log p0(token) [N], log psi(token) [N].
    """
    lse0, lse_psi = twist_softmax(logits, log_psi)
    return lse0, log_w + (lse_psi - lse0 - log_psi_before), *twist_sample(logits, log_psi, lse0, None, keys)


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


def _offspring(
    weights: Tensor, live: Tensor, schemes: Tensor, uniforms: Tensor, pinned: Tensor | None = None
) -> Tensor:
    """Return how many children each lane gets, int64 [G, K]; rows sum to the number of live lanes.

    In a pinned group the law is weighted by the children of lane 0, as ``resample`` says. Those
    are ``sure`` ones and hits among ``draws`` points: with probability sure / (n w) they already
    carry the weighting, else the first point is lane 0's.
    """
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
    if pinned is not None:
        held = (pinned & live[:, 0])[:, None]
        share = sure[:, :1] / torch.where(expected[:, :1] > 0, expected[:, :1], 1.0)
        forced = held & (uniforms[:, :1] >= share)
        # What is left of the uniform is one again.
        points[:, :1] = torch.where(held & ~forced, uniforms[:, :1] / share, points[:, :1])
    chosen = _invert(rest.cumsum(-1), points * total, rest)
    if pinned is not None:
        chosen[:, :1] = torch.where(forced, 0, chosen[:, :1])
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
    return allowed & (n >= 2) & is_uneven(ess, thresholds.to(torch.float64), n), ess


def resample(
    log_w: Tensor,
    live: Tensor,
    allowed: Tensor,
    thresholds: Tensor,
    schemes: Tensor,
    uniforms: Tensor,
    pinned: Tensor | None = None,
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
        pinned: bool [G], groups whose lane 0 carries a given particle: while it lives it keeps itself,
            and the others resample conditionally on that (conditional SMC; Zhao et al. 2024, Alg. 2).
            P(children) is then P_scheme(children) * children of lane 0 / (n * weight of lane 0): for
            multinomial, n - 1 draws from all. Multinomial and residual only: the others depend on the
            order of the lanes, and lane 0 would have to change its place.

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
    counts = _offspring(weights, live, schemes, uniforms.to(torch.float64), pinned)
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


class Lanes(NamedTuple):
    """SMC state of R slots, some of which hold a lane.

    Attributes:
        log_w: log weights, float64 [R] (nats).
        log_p: sum of log p0 over the tokens drawn, float64 [R].
        log_psi: log psi of the last token drawn, float32 [R].
        position: index of the last token drawn, from 1, int32 [R]; 0 before the first.
        last: index of the last token that the lane may draw, int32 [R].
        ended: whether the particle has ended, bool [R].
        keys: of ``lane_keys``, for the tokens, int64 [R].
        stops: tokens that end a particle, int32 [R, S], filled up with -1.
    """

    log_w: Tensor
    log_p: Tensor
    log_psi: Tensor
    position: Tensor
    last: Tensor
    ended: Tensor
    keys: Tensor
    stops: Tensor


class Groups(NamedTuple):
    """G groups of at most K lanes each.

    Attributes:
        members: slot of each lane, by its index in the group, int32 [G, K]; -1 where there is none.
        sizes: how many lanes each group has, ended ones that are members included, int32 [G]. A
            group with fewer members is not all there.
        thresholds: of the ESS, as a fraction of the live lanes, float64 [G].
        schemes: codes into ``SCHEMES``, int64 [G].
        keys: of ``lane_keys``, for resampling, int64 [G].
        particles: how many lanes each group had when it began, int32 [G].
        rows: of each group in ``Totals``, int32 [G], no two alike.
        pinned: whether lane 0 carries a given particle, bool [G] (``resample``); None where it never does.
    """

    members: Tensor
    sizes: Tensor
    thresholds: Tensor
    schemes: Tensor
    keys: Tensor
    particles: Tensor
    rows: Tensor
    pinned: Tensor | None = None


class Totals(NamedTuple):
    """What has come of whole groups so far, in R rows; written in place.

    Attributes:
        log_w_ended: log of the summed weights of particles that have ended and are members no more, float64 [R];
            -inf for none.
        log_z: log of the estimate of Z, float64 [R] (nats).
        num_resamplings: how often each group has resampled, int32 [R].
    """

    log_w_ended: Tensor
    log_z: Tensor
    num_resamplings: Tensor


class Advance(NamedTuple):
    """What ``advance`` decided for the L lanes in the batch.

    Attributes:
        ancestors: whose child each lane becomes, int64 [L]; its own index where it survives.
        keys: for the lane's next token, int64 [L].
        log_p: sum of log p0 over the ancestor's tokens, float64 [L].
        resampled: whether the lane's group resampled, bool [L].
    """

    ancestors: Tensor
    keys: Tensor
    log_p: Tensor
    resampled: Tensor


def advance(lanes: Lanes, groups: Groups, row_of: Tensor, lse0: Tensor, lse_psi: Tensor) -> Advance:
    """Weigh the lanes in the batch by the token about to be drawn, and resample the groups that need it.

        here      = the members in the batch that have not ended
        position += 1,  log_w += lse_psi - lse0 - log_psi           here      (Zhao et al. 2024, Prop. 3.3)
        allowed   = all live members are here, at one position t with 1 < t < last
        ancestors, log_w = resample(log_w, here, allowed, ...)

    Args:
        lanes: updated in place: ``log_w`` and ``position``.
        groups: every lane in the batch is a member of one of them.
        row_of: index of each slot's lane in the batch, int32 [R], -1 where it is not in it.
        lse0, lse_psi: of each lane in the batch, float32 [L] (``twist_softmax``).
    """
    slot, member = groups.members.long().clamp(min=0), groups.members >= 0
    row = torch.where(member, row_of[slot].long(), -1)
    ended = member & lanes.ended[slot]
    here = (row >= 0) & ~ended
    increment = (lse_psi - lse0)[row.clamp(min=0)] - lanes.log_psi[slot]
    log_w = lanes.log_w[slot] + torch.where(here, increment, 0.0)
    position = lanes.position[slot] + here
    highest = torch.where(here, position, 0).amax(-1)
    lowest = torch.where(here, position, highest[:, None]).amin(-1)
    last = torch.where(here, lanes.last[slot], 0).amax(-1)
    complete = here.sum(-1) + ended.sum(-1) == groups.sizes
    allowed = complete & (lowest == highest) & may_resample(lowest, last)
    uniforms = counter_uniforms(at_position(groups.keys, lowest.long()), slot.shape[-1])
    parent, log_w, _, resampled = resample(
        log_w, here, allowed, groups.thresholds, groups.schemes, uniforms, groups.pinned
    )
    lanes.log_w[slot[here]] = log_w[here]
    lanes.position[slot[here]] = position[here]

    batch = torch.zeros(len(lse0), dtype=torch.int64, device=lse0.device)
    inside = row >= 0
    at = row[inside]
    return Advance(
        batch.scatter(0, at, row.gather(-1, parent)[inside]),
        batch.scatter(0, at, at_position(lanes.keys[slot], position.long())[inside]),
        batch.double().scatter(0, at, lanes.log_p[slot.gather(-1, parent)][inside]),
        batch.bool().scatter(0, at, (resampled[:, None] & here)[inside]),
    )


def base_gain(base: Tensor, log_psi: Tensor, before: Tensor) -> Tensor:
    """Return what a drawn token adds to the weight where the proposal is p0 (``base``); all [L].

    With q = p0 it is psi_t / psi_{t-1} (Zhao et al. 2024, Eq. 10), known only once the token is. With the twist-induced
    proposal the weight was complete before the draw: nothing.
    """
    return torch.where(base, log_psi - before, 0.0)


def kept_log_psi(log_psi: Tensor) -> Tensor:
    """Return log psi of the tokens drawn as the next step divides by it: 0 where it is not finite.

    A particle of weight zero keeps it; a twist of zero must not turn it into NaN.
    """
    return torch.nan_to_num(log_psi, nan=0.0, posinf=0.0, neginf=0.0)


class Report(NamedTuple):
    """Rows of the report of ``settle``, [L] each; the last two are of the lane's group."""

    ancestors: Any
    log_w: Any
    log_p: Any
    log_psi: Any
    resampled: Any
    log_z: Any
    num_resamplings: Any


REPORT = Report._fields


def settle(
    lanes: Lanes,
    groups: Groups,
    totals: Totals,
    row_of: Tensor,
    moved: Advance,
    token: Tensor,
    log_p: Tensor,
    log_psi: Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    """Record the token that each lane has drawn; return a report, float64 [len(REPORT), L].

        log_p   = that of the ancestor + log p0(token)
        log_psi = log psi(token)                             0 where that is not finite: the weight is zero, or NaN
        log_w  += gain
        ended   = token in stops  or  position = last

    A lane that had ended before stays as it is. Then, for the groups that have a lane in the batch:

        log_z            = log(sum of the weights of all members + exp(log_w_ended)) - log(particles)
        num_resamplings += whether the group resampled

    Args:
        lanes: updated in place: ``log_w``, ``log_p``, ``log_psi`` and ``ended``.
        groups, row_of: as in ``advance``.
        totals: updated in place: ``log_z`` and ``num_resamplings``.
        moved: what ``advance`` returned.
        token, log_p, log_psi: int64, float32 and float32 [L] (``twist_sample``).
        gain: what the token adds to the weight, float32 [L]; None for nothing.
    """
    slot, member = groups.members.long().clamp(min=0), groups.members >= 0
    row = torch.where(member, row_of[slot].long(), -1)
    inside = row >= 0
    order = torch.zeros_like(token)
    slots = order.scatter(0, row[inside], slot[inside])
    before = lanes.ended[slots]
    lanes.log_p[slots] = torch.where(before, lanes.log_p[slots], moved.log_p + log_p)
    log_psi = kept_log_psi(log_psi)
    lanes.log_psi[slots] = torch.where(before, lanes.log_psi[slots], log_psi)
    if gain is not None:
        lanes.log_w[slots] += torch.where(before, 0.0, gain)
    stopped = (lanes.stops[slots] == token[:, None]).any(-1)
    lanes.ended[slots] = before | stopped | (lanes.position[slots] >= lanes.last[slots])

    of_group = order.scatter(0, row[inside], inside.nonzero()[:, 0])
    touched, at = inside.any(-1), groups.rows.long()
    weights = torch.where(member, lanes.log_w[slot], float("-inf"))
    log_z = torch.logsumexp(torch.cat([weights, totals.log_w_ended[at, None]], 1), -1) - groups.particles.double().log()
    fired = torch.zeros_like(touched).index_put((of_group[moved.resampled],), torch.ones_like(touched[:1]))
    totals.log_z[at] = torch.where(touched, log_z, totals.log_z[at])
    totals.num_resamplings[at] += fired
    of_total = at[of_group]
    report = Report(
        ancestors=moved.ancestors,
        log_w=lanes.log_w[slots],
        log_p=lanes.log_p[slots],
        log_psi=lanes.log_psi[slots],
        resampled=moved.resampled,
        log_z=totals.log_z[of_total],
        num_resamplings=totals.num_resamplings[of_total],
    )
    return torch.stack([row.double() for row in report])


def fork_rows(
    tables: Sequence[Tensor],
    block_sizes: Tensor,
    rows: Tensor,
    ancestors: Tensor,
    first: Tensor,
    computed: Tensor,
) -> None:
    """Give every dead lane its parent's block-table entries and token history, in place.

        for each table t with b tokens per entry, each lane i with a = ancestors[i] != i:
            tables[t][rows[i], first[i] // b : computed[i] // b] = the same entries of tables[t][rows[a]]

    Only full blocks: the entry of the partial block stays the lane's own. A token history is a
    table with one token per entry.

    Args:
        tables: T int32 tables [R, M_t].
        block_sizes: tokens per entry of each table, int32 [T].
        rows: row of each lane, the same in all tables, int32 or int64 [N].
        ancestors: parent of each lane, int64 [N]; a parent keeps itself (``resample`` sees to it).
        first: tokens that lane and parent share from the start, usually the prompt's length, [N].
        computed: tokens in the parent's history, [N].
    """
    dead = ancestors != torch.arange(len(ancestors), device=ancestors.device)
    children, parents = rows.long()[dead], rows.long()[ancestors[dead]]
    first, computed = first[dead, None], computed[dead, None]
    for table, size in zip(tables, block_sizes, strict=True):
        column = torch.arange(table.shape[1], device=table.device)
        inside = (column >= first // size) & (column < computed // size)
        table[children] = torch.where(inside, table[parents], table[children])


def copy_partial_blocks(
    caches: Sequence[Tensor],
    num_blocks: int,
    tables: Sequence[Tensor],
    block_sizes: Tensor,
    rows: Tensor,
    ancestors: Tensor,
    computed: Tensor,
) -> None:
    """Overwrite every dead lane's partial KV block with its parent's, in all layers, in place.

        for each table t with blocks of b tokens, each lane i with a = ancestors[i] != i and computed[i] % b > 0:
            block tables[t][rows[i], computed[i] // b] of every cache = block tables[t][rows[a], computed[i] // b]

    Args:
        caches: KV caches whose dim 0 counts blocks, possibly several kernel blocks to one block of
            the table; any strides, any dtype. Layers that share memory may appear repeatedly.
        num_blocks: blocks that the tables number.
        tables, block_sizes, rows, ancestors, computed: as in ``fork_rows``; block tables only.
    """
    rows, lanes = rows.long(), torch.arange(len(ancestors), device=ancestors.device)
    source, target = [], []
    for table, size in zip(tables, block_sizes, strict=True):
        copied = (ancestors != lanes) & (computed % size > 0)
        column = (computed // size)[copied].long()
        target.append(table[rows[copied], column].long())
        source.append(table[rows[ancestors[copied]], column].long())
    if not source:
        return
    from_, to = torch.cat(source), torch.cat(target)
    seen = set()
    for cache in caches:
        view = (cache.data_ptr(), cache.shape, cache.stride())
        if view not in seen:
            seen.add(view)
            blocks = cache.unflatten(0, (num_blocks, -1))
            blocks[to] = blocks[from_]
