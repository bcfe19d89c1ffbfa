"""Resampling of all groups in one Triton launch; ``reference.resample`` has the specification.

One program holds one group in registers and works in float64, as the reference does. Weights are
turned into 52-bit integers before they are summed up. Integer sums come out the same in any order, so the
cumulative weights never decrease, stay level at a lane without weight, and end exactly at the
total: a parallel float sum promises none of this, and could pick a dead lane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import schemes
from .twist_softmax import OPTIONS

SYSTEMATIC, STRATIFIED = tl.constexpr(schemes.SYSTEMATIC), tl.constexpr(schemes.STRATIFIED)
RESIDUAL = tl.constexpr(schemes.RESIDUAL)


@triton.jit
def _count_up_to(sums, points, K: tl.constexpr, STEPS: tl.constexpr):
    """Return how many of the non-decreasing ``sums`` [K] are at most each point, by binary search."""
    count = tl.zeros([K], tl.int32)
    step = K
    for _ in tl.static_range(STEPS):
        probe = tl.minimum(count + step, K) - 1
        inside = (count + step <= K) & (tl.gather(sums, probe, 0) <= points)
        count = tl.where(inside, count + step, count)
        step = step // 2
    return count


@triton.jit
def _resample(x, alive, u, u0, scheme, threshold, allowed, pinned, lanes, K: tl.constexpr, STEPS: tl.constexpr):
    """Resample one group of K lanes (a power of two, of which the first ``lanes`` exist).

    ``x`` holds the log weights in float64, -inf where not ``alive``; ``pinned`` says whether lane 0
    is. Returns (parents, whether the group resamples, its log-mean weight, its ESS).
    """
    lane = tl.arange(0, K)
    # Normalise. A NaN, a +inf or nothing but -inf among the live lanes leaves the group as it is.
    n = tl.sum(alive.to(tl.int32), axis=0)
    top = tl.max(tl.where(x == x, x, -float("inf")), axis=0)
    sound = (tl.max((x != x).to(tl.int32), axis=0) == 0) & (top > -float("inf")) & (top < float("inf"))
    e = tl.where(sound & alive, tl.exp(tl.where(sound & alive, x - tl.where(sound, top, 0.0), 0.0)), 0.0)
    total = tl.sum(e, axis=0)
    safe = tl.where(sound, total, 1.0)
    size = tl.where(sound, total * total / tl.where(sound, tl.sum(e * e, axis=0), 1.0), float("nan"))
    uneven = (size < threshold * n.to(tl.float64)) | (threshold >= 1.0)
    fires = allowed & sound & (n >= 2) & uneven

    # Children per lane: those that are sure (residual), then one for each point.
    count = n.to(tl.float64)
    weights = e / safe
    expected = count * weights
    is_residual = scheme == RESIDUAL
    sure = tl.where(is_residual, tl.floor(expected + 1e-9), 0.0)
    rest = tl.where(is_residual, tl.maximum(expected - sure, 0.0), weights)
    # At most K in total: 2**52 of them fit into the 53 bits of a float64.
    unit = tl.where(is_residual, 4398046511104.0, 4503599627370496.0)
    parts = (rest * unit + 0.5).to(tl.int64)
    draws = n - tl.sum(sure, axis=0).to(tl.int32)
    rank = tl.cumsum(alive.to(tl.int32), axis=0) - 1
    divisor = tl.maximum(count, 1.0)
    spread = rank.to(tl.float64)
    even = (spread + u0) / divisor
    layered = (spread + u) / divisor
    points = tl.where(scheme == SYSTEMATIC, even, tl.where(scheme == STRATIFIED, layered, u))
    held = (lane == 0) & alive & pinned
    hoped = tl.sum(tl.where(lane == 0, expected, 0.0), axis=0)
    share = tl.sum(tl.where(lane == 0, sure, 0.0), axis=0) / tl.where(hoped > 0, hoped, 1.0)
    points = tl.where(held & (u < share), u / tl.where(share > 0, share, 1.0), points)
    points = points * tl.sum(parts, axis=0).to(tl.float64)
    chosen = _count_up_to(tl.cumsum(parts, axis=0), points, K, STEPS)
    # A point at the total or beyond goes to the last lane with weight.
    last = tl.max(tl.where(parts > 0, lane, 0), axis=0)
    chosen = tl.where(held & (u >= share), 0, tl.minimum(chosen, last))
    drawn = alive & (rank < draws)
    children = sure.to(tl.int32) + tl.histogram(chosen, K, mask=drawn)

    # Survivors keep their lane; the d-th lane left without a child takes the d-th surplus child.
    orphan = alive & (children == 0)
    place = tl.cumsum(orphan.to(tl.int32), axis=0) - 1
    surplus = tl.cumsum(tl.maximum(children - 1, 0), axis=0)
    parent = tl.minimum(_count_up_to(surplus, place, K, STEPS), lanes - 1)
    parent = tl.where(orphan & fires, parent, lane)
    log_mean = tl.where(sound, top, 0.0) + tl.log(safe) - tl.log(divisor)
    return parent, fires, log_mean, size


@triton.jit(do_not_specialize=["log_w_stride", "live_stride", "uniforms_stride", "lanes"])
def resample_kernel(
    log_w,
    live,
    allowed,
    thresholds,
    schemes,
    uniforms,
    pinned,
    ancestors,
    new_log_w,
    sizes,
    resampled,
    log_w_stride,
    live_stride,
    uniforms_stride,
    lanes,
    K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Resample one group.

    Streamed: its log weights, live lanes and uniforms, once. Saved: ancestors, new log weights,
    ESS and whether it resampled. K is a power of two, at least the number of lanes; STEPS is log2(K) + 1.
    """
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, K)
    inside = lane < lanes
    own = tl.load(log_w + group * log_w_stride + lane, mask=inside, other=0.0)
    alive = (tl.load(live + group * live_stride + lane, mask=inside, other=0) != 0) & inside
    u = tl.load(uniforms + group * uniforms_stride + lane, mask=inside, other=0.0).to(tl.float64)
    u0 = tl.load(uniforms + group * uniforms_stride).to(tl.float64)
    scheme = tl.load(schemes + group)
    threshold = tl.load(thresholds + group).to(tl.float64)

    x = tl.where(alive, own.to(tl.float64), -float("inf"))
    may = tl.load(allowed + group) != 0
    hold = tl.full((), 0, tl.int1)
    if pinned is not None:
        hold = tl.load(pinned + group) != 0
    parent, fires, log_mean, size = _resample(x, alive, u, u0, scheme, threshold, may, hold, lanes, K, STEPS)
    tl.store(ancestors + group * lanes + lane, parent.to(tl.int64), mask=inside)
    new = tl.where(alive & fires, log_mean.to(own.dtype), own)
    tl.store(new_log_w + group * lanes + lane, new, mask=inside)
    tl.store(sizes + group, size.to(own.dtype))
    tl.store(resampled + group, fires)


def program_of(lanes: int) -> tuple[int, int]:
    """Return (lanes, warps) of the program that holds a group of that many lanes."""
    k = max(triton.next_power_of_2(lanes), 32)
    return k, 1 if k <= 64 else 4 if k <= 256 else 8


def resample(
    log_w: Tensor,
    live: Tensor,
    allowed: Tensor,
    thresholds: Tensor,
    schemes: Tensor,
    uniforms: Tensor,
    pinned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Resample as ``reference.resample`` does, all groups in one launch; at most 1,024 lanes each."""
    groups, lanes = log_w.shape
    ancestors = torch.empty(groups, lanes, dtype=torch.int64, device=log_w.device)
    new_log_w = torch.empty(groups, lanes, dtype=log_w.dtype, device=log_w.device)
    sizes = torch.empty(groups, dtype=log_w.dtype, device=log_w.device)
    resampled = torch.empty(groups, dtype=torch.bool, device=log_w.device)
    if groups:
        k, warps = program_of(lanes)
        resample_kernel[(groups,)](
            log_w,
            live,
            allowed,
            thresholds,
            schemes,
            uniforms,
            pinned,
            ancestors,
            new_log_w,
            sizes,
            resampled,
            log_w.stride(0),
            live.stride(0),
            uniforms.stride(0),
            lanes,
            K=k,
            STEPS=k.bit_length(),
            num_warps=warps,
            **OPTIONS,
        )
    return ancestors, new_log_w, sizes, resampled
