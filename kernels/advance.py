"""The bookkeeping of one step in two Triton launches; ``reference`` has the specification.

Both hold one group in one program, as ``resample`` does. The state lies in tensors by slot, so that neither
launch depends on who is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import REPORT, Advance, Groups, Lanes, Totals
from .resample import _resample, program_of
from .twist_softmax import OPTIONS, counter_uniform


@triton.jit
def _mix64(x):
    """Scramble uint64 words, bit for bit as the reference does with int64 ones."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def key_at(key, position):
    """Return the int64 key that ``reference.at_position`` has for int64 keys at int32 positions."""
    return _mix64(key.to(tl.uint64) ^ (position.to(tl.uint64) * 0x9E3779B97F4A7C15)).to(tl.int64)


@triton.jit
def _seats(members, row_of, group, members_stride, width, K: tl.constexpr):
    """Return (lane, slot, is a member, row of the batch, is in the batch) [K] of a group; 0 where there is none."""
    lane = tl.arange(0, K)
    slot = tl.load(members + group * members_stride + lane, mask=lane < width, other=-1).to(tl.int64)
    member = slot >= 0
    slot = tl.where(member, slot, 0)
    row = tl.load(row_of + slot, mask=member, other=-1).to(tl.int64)
    inside = row >= 0
    return lane, slot, member, tl.where(inside, row, 0), inside


@triton.jit(do_not_specialize=["members_stride", "width"])
def advance_kernel(
    log_w,
    log_p,
    log_psi,
    positions,
    lasts,
    ended,
    keys,
    members,
    group_sizes,
    thresholds,
    schemes,
    group_keys,
    pinned,
    row_of,
    lse0,
    lse_psi,
    out_ancestors,
    out_keys,
    out_log_p,
    out_resampled,
    members_stride,
    width,
    K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Weigh and resample one group.

    Streamed: the state of its members and the log-sums of those in the batch, once. Saved: their weights and
    positions, in place, and (ancestor, key, log p of the ancestor, resampled) by row of the batch.
    """
    group = tl.program_id(0).to(tl.int64)
    lane, slot, member, row, inside = _seats(members, row_of, group, members_stride, width, K)
    gone = member & (tl.load(ended + slot, mask=member, other=0) != 0)
    here = inside & ~gone

    step = tl.load(lse_psi + row, mask=here, other=0.0) - tl.load(lse0 + row, mask=here, other=0.0)
    step -= tl.load(log_psi + slot, mask=here, other=0.0)
    own = tl.load(log_w + slot, mask=member, other=0.0) + tl.where(here, step, 0.0).to(tl.float64)
    position = tl.load(positions + slot, mask=member, other=0) + here.to(tl.int32)
    highest = tl.max(tl.where(here, position, 0), axis=0)
    lowest = tl.min(tl.where(here, position, highest), axis=0)
    last = tl.max(tl.load(lasts + slot, mask=here, other=0), axis=0)
    accounted = tl.sum(here.to(tl.int32), axis=0) + tl.sum(gone.to(tl.int32), axis=0)
    complete = accounted == tl.load(group_sizes + group)
    allowed = complete & (lowest == highest) & (lowest > 1) & (lowest < last)

    group_key = key_at(tl.load(group_keys + group), lowest)
    u = counter_uniform(group_key, lane).to(tl.float64)
    u0 = tl.sum(tl.where(lane == 0, u, 0.0), axis=0)
    x = tl.where(here, own, -float("inf"))
    scheme, threshold = tl.load(schemes + group), tl.load(thresholds + group)
    hold = tl.full((), 0, tl.int1)
    if pinned is not None:
        hold = tl.load(pinned + group) != 0
    parent, fires, log_mean, _ = _resample(x, here, u, u0, scheme, threshold, allowed, hold, width, K, STEPS)

    tl.store(log_w + slot, tl.where(fires, log_mean, own), mask=here)
    tl.store(positions + slot, position, mask=here)
    ancestor = tl.gather(slot, parent, 0)
    tl.store(out_ancestors + row, tl.gather(row, parent, 0), mask=inside)
    tl.store(out_keys + row, key_at(tl.load(keys + slot, mask=inside, other=0), position), mask=inside)
    tl.store(out_log_p + row, tl.load(log_p + ancestor, mask=inside, other=0.0), mask=inside)
    tl.store(out_resampled + row, here & fires, mask=inside)


@triton.jit(do_not_specialize=["members_stride", "width", "lanes"])
def settle_kernel(
    log_w,
    log_ps,
    log_psis,
    positions,
    lasts,
    ended,
    stops,
    members,
    particles,
    total_rows,
    log_w_ended,
    log_z,
    num_resamplings,
    row_of,
    ancestors,
    carried,
    resampled,
    tokens,
    token_log_ps,
    token_log_psis,
    gains,
    report,
    members_stride,
    width,
    lanes,
    K: tl.constexpr,
    S: tl.constexpr,
):
    """Record what the lanes of one group have drawn.

    Streamed: their draws and their state, once. Saved: their state and the group's totals, in place, and their
    columns of the report.
    """
    group = tl.program_id(0).to(tl.int64)
    _, slot, member, row, inside = _seats(members, row_of, group, members_stride, width, K)
    here = inside & (tl.load(ended + slot, mask=member, other=0) == 0)

    token = tl.load(tokens + row, mask=here, other=-1)
    stopped = tl.load(positions + slot, mask=here, other=0) >= tl.load(lasts + slot, mask=here, other=0)
    for i in range(S):
        stopped = stopped | (tl.load(stops + slot * S + i, mask=here, other=-1) == token)
    tl.store(ended + slot, stopped, mask=here)

    weight = tl.load(log_w + slot, mask=member, other=-float("inf"))
    if gains is not None:
        weight += tl.load(gains + row, mask=here, other=0.0).to(tl.float64)
        tl.store(log_w + slot, weight, mask=here)
    log_p = tl.load(carried + row, mask=here, other=0.0)
    log_p += tl.load(token_log_ps + row, mask=here, other=0.0).to(tl.float64)
    tl.store(log_ps + slot, log_p, mask=here)
    log_p = tl.where(here, log_p, tl.load(log_ps + slot, mask=inside & ~here, other=0.0))
    log_psi = tl.load(token_log_psis + row, mask=here, other=0.0)
    log_psi = tl.where((log_psi == log_psi) & (tl.abs(log_psi) < float("inf")), log_psi, 0.0)
    tl.store(log_psis + slot, log_psi, mask=here)
    log_psi = tl.where(here, log_psi, tl.load(log_psis + slot, mask=inside & ~here, other=0.0))

    # Sums with a NaN are NaN, whatever the maximum says; with +inf they are +inf.
    place = tl.load(total_rows + group).to(tl.int64)
    outside = tl.load(log_w_ended + place)
    top = tl.maximum(tl.max(weight, axis=0), outside)
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    total = tl.sum(tl.exp(weight - shift), axis=0) + tl.exp(outside - shift)
    estimate = shift + tl.log(total) - tl.log(tl.load(particles + group).to(tl.float64))
    fired = tl.load(resampled + row, mask=inside, other=0) != 0
    count = tl.load(num_resamplings + place) + tl.max(fired.to(tl.int32), axis=0)
    touched = tl.max(inside.to(tl.int32), axis=0) > 0
    tl.store(log_z + place, estimate, mask=touched)
    tl.store(num_resamplings + place, count, mask=touched)

    # In the order of ``reference.Report``.
    tl.store(report + row, tl.load(ancestors + row, mask=inside, other=0).to(tl.float64), mask=inside)
    tl.store(report + lanes + row, weight, mask=inside)
    tl.store(report + 2 * lanes + row, log_p, mask=inside)
    tl.store(report + 3 * lanes + row, log_psi.to(tl.float64), mask=inside)
    tl.store(report + 4 * lanes + row, fired.to(tl.float64), mask=inside)
    tl.store(report + 5 * lanes + row, tl.zeros_like(weight) + estimate, mask=inside)
    tl.store(report + 6 * lanes + row, tl.zeros_like(weight) + count, mask=inside)


def advance(lanes: Lanes, groups: Groups, row_of: Tensor, lse0: Tensor, lse_psi: Tensor) -> Advance:
    """Advance as ``reference.advance`` does, all groups in one launch; at most 1,024 lanes each."""
    count, device = len(lse0), lse0.device
    ancestors, keys = torch.empty(2, count, dtype=torch.int64, device=device).unbind()
    log_p = torch.empty(count, dtype=torch.float64, device=device)
    resampled = torch.empty(count, dtype=torch.bool, device=device)
    moved = Advance(ancestors, keys, log_p, resampled)
    n, width = groups.members.shape
    if n and count:
        k, warps = program_of(width)
        advance_kernel[(n,)](
            *lanes[:-1],
            groups.members,
            groups.sizes,
            groups.thresholds,
            groups.schemes,
            groups.keys,
            groups.pinned,
            row_of,
            lse0,
            lse_psi,
            *moved,
            groups.members.stride(0),
            width,
            K=k,
            STEPS=k.bit_length(),
            num_warps=warps,
            **OPTIONS,
        )
    return moved


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
    """Settle as ``reference.settle`` does, all groups in one launch; the number of stops is a power of two."""
    count = len(token)
    report = torch.empty(len(REPORT), count, dtype=torch.float64, device=token.device)
    n, width = groups.members.shape
    if n and count:
        k, warps = program_of(width)
        settle_kernel[(n,)](
            lanes.log_w,
            lanes.log_p,
            lanes.log_psi,
            lanes.position,
            lanes.last,
            lanes.ended,
            lanes.stops,
            groups.members,
            groups.particles,
            groups.rows,
            *totals,
            row_of,
            moved.ancestors,
            moved.log_p,
            moved.resampled,
            token,
            log_p,
            log_psi,
            gain,
            report,
            groups.members.stride(0),
            width,
            count,
            K=k,
            S=lanes.stops.shape[1],
            num_warps=warps,
            **OPTIONS,
        )
    return report
