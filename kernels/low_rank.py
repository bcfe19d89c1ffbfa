"""Twisted softmax and Gumbel-max draw with a low-rank twist in factors; ``reference`` has the specification.

A program takes a block of rows and a piece of the vocabulary: ``up`` is read once per block, and multiplied on
the tensor cores. Log psi is never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LowRank
from .twist_softmax import (
    OPTIONS,
    _finish_draw,
    _fold,
    _per_row,
    _row_of,
    _score,
    _store_sums,
    _weighted,
    _winner,
    counter_uniform,
    most_pieces,
    pieces,
    softmax_merge_kernel,
)

#: Rows per program: what one tensor-core instruction of four warps takes.
ROW_BLOCK = 64
#: Vocabulary entries per step of the streaming loops.
SOFTMAX_TILE, RACE_TILE = 64, 64
#: Factors of a block of rows and of a tile have to fit on the chip.
MAX_RANK = 128
#: The interpreter multiplies bfloat16 as if they were integers; float32 has all of their products.
_WIDEN = tl.constexpr(not isinstance(softmax_merge_kernel, triton.JITFunction))


@triton.jit
def _factor(z, z_stride, row, inside, rank, R: tl.constexpr, EVEN: tl.constexpr):
    """Load rows of z [ROWS, R], 0 outside."""
    k = tl.arange(0, R)
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (k < rank)[None, :]
    return tl.load(z + row[:, None] * z_stride + k[None, :], mask=mask, other=0.0)


@triton.jit
def _values(zs, up, bias, up_stride, start, vocab, rank, TILE: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr):
    """Return log psi [ROWS, TILE] in float32 of the tile that begins at ``start``."""
    k, at = tl.arange(0, R), start + tl.arange(0, TILE)
    allowed = at < vocab
    mask = allowed[None, :]
    if not EVEN:
        mask = mask & (k < rank)[:, None]
    u = tl.load(up + at.to(tl.int64)[None, :] * up_stride + k[:, None], mask=mask, other=0.0)
    if _WIDEN:
        g = tl.dot(zs.to(tl.float32), u.to(tl.float32), input_precision="ieee")
    else:
        g = tl.dot(zs, u, input_precision="ieee")
    return g + tl.load(bias + at, mask=allowed, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["n", "n_blocks", "tiles_per_piece"])
def low_rank_softmax_kernel(
    logits,
    z,
    up,
    bias,
    inverse_temperature,
    scale,
    rows,
    peak0,
    total0,
    peak1,
    total1,
    logits_stride,
    z_stride,
    up_stride,
    n,
    vocab,
    rank,
    n_blocks,
    n_pieces,
    tiles_per_piece,
    FINAL: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Sum one piece of a block of rows.

    Streamed: the logits once, ``up`` and the bias once per block. Saved: as ``softmax_pieces_kernel`` does.
    Programs of one piece follow each other, so that its part of ``up`` is still in the cache.
    """
    piece = tl.program_id(0) // n_blocks
    row = (tl.program_id(0) % n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    row = tl.where(inside, row, 0)
    beta = _per_row(inverse_temperature, row)
    s = _per_row(scale, row)
    zs = _factor(z, z_stride, row, inside, rank, R, EVEN)
    base = logits + (_row_of(rows, row) * logits_stride)[:, None]
    p0 = tl.full([ROWS], -float("inf"), tl.float32)
    t0 = tl.zeros([ROWS], tl.float32)
    p1, t1 = p0, t0
    low = piece * tiles_per_piece * TILE
    for start in range(low, tl.minimum(low + tiles_per_piece * TILE, vocab), TILE):
        at = start + tl.arange(0, TILE)[None, :]
        x = tl.load(base + at, mask=inside[:, None] & (at < vocab), other=-float("inf"))
        g = _values(zs, up, bias, up_stride, start, vocab, rank, TILE, R, EVEN)
        x = x.to(tl.float32) * beta[:, None]
        p0, t0 = _fold(x, p0, t0)
        p1, t1 = _fold(x + _weighted(g, s[:, None]), p1, t1)
    slot = row * n_pieces + piece
    _store_sums(p0, t0, slot, inside, peak0, total0, FINAL)
    _store_sums(p1, t1, slot, inside, peak1, total1, FINAL)


@triton.jit(do_not_specialize=["lanes", "n_blocks", "n_pieces", "tiles_per_piece"])
def low_rank_race_kernel(
    logits,
    z,
    up,
    bias,
    inverse_temperature,
    scale,
    ancestors,
    rows,
    keys,
    best_scores,
    best_tokens,
    logits_stride,
    z_stride,
    up_stride,
    lanes,
    vocab,
    rank,
    n_blocks,
    n_pieces,
    tiles_per_piece,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Find the winners of one piece of a block of lanes' Gumbel races, each in its ancestor's row.

    Streamed: the ancestors' logits once, ``up`` and the bias once per block. Saved: the best scores and
    their tokens, from which ``low_rank_merge_kernel`` makes the draws.
    """
    piece = tl.program_id(0) // n_blocks
    lane = (tl.program_id(0) % n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = lane < lanes
    lane = tl.where(inside, lane, 0)
    row = lane
    if ancestors is not None:
        row = tl.load(ancestors + lane)
    key = tl.load(keys + lane)[:, None]
    beta = _per_row(inverse_temperature, row)
    s = _per_row(scale, row)
    zs = _factor(z, z_stride, row, inside, rank, R, EVEN)
    base = logits + (_row_of(rows, row) * logits_stride)[:, None]
    best = tl.full([ROWS], -float("inf"), tl.float32)
    token = tl.zeros([ROWS], tl.int32)
    low = piece * tiles_per_piece * TILE
    for start in range(low, tl.minimum(low + tiles_per_piece * TILE, vocab), TILE):
        at = start + tl.arange(0, TILE)[None, :]
        x = tl.load(base + at, mask=inside[:, None] & (at < vocab), other=-float("inf"))
        g = _weighted(_values(zs, up, bias, up_stride, start, vocab, rank, TILE, R, EVEN), s[:, None])
        score = _score(counter_uniform(key, at), x.to(tl.float32) * beta[:, None], g)
        top = tl.max(score, axis=1)
        first = tl.min(tl.where(score == top[:, None], at, 0x7FFFFFFF), axis=1)
        token = tl.where(top > best, first, token)
        best = tl.maximum(best, top)
    slot = lane * n_pieces + piece
    tl.store(best_scores + slot, best, mask=inside)
    tl.store(best_tokens + slot, token, mask=inside)


@triton.jit(do_not_specialize=["n_pieces"])
def low_rank_merge_kernel(
    logits,
    z,
    up,
    bias,
    inverse_temperature,
    scale,
    lse0,
    ancestors,
    rows,
    tokens,
    log_ps,
    log_psis,
    best_scores,
    best_tokens,
    logits_stride,
    z_stride,
    up_stride,
    rank,
    n_pieces,
    PIECES: tl.constexpr,
    R: tl.constexpr,
):
    """Let the winners of one lane's pieces race. Streamed: their scores. Saved: token, log p0 and log psi."""
    lane = tl.program_id(0).to(tl.int64)
    row = lane
    if ancestors is not None:
        row = tl.load(ancestors + lane)
    beta = _per_row(inverse_temperature, row)
    token = _winner(best_scores, best_tokens, lane, n_pieces, PIECES)
    k = tl.arange(0, R)
    a = tl.load(z + row * z_stride + k, mask=k < rank, other=0.0).to(tl.float32)
    b = tl.load(up + token.to(tl.int64) * up_stride + k, mask=k < rank, other=0.0).to(tl.float32)
    value = _weighted(tl.sum(a * b, axis=0) + tl.load(bias + token).to(tl.float32), _per_row(scale, row))
    _finish_draw(token, lane, row, value, logits, lse0, beta, rows, logits_stride, tokens, log_ps, log_psis)


def twist_softmax(
    logits: Tensor,
    log_psi: LowRank,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (lse0, lse_psi) as ``reference.twist_softmax`` does, in one pass over the vocabulary and ``up``."""
    z, up, bias = log_psi
    (n, rank), vocab, device = z.shape, len(up), logits.device
    blocks = triton.cdiv(n, ROW_BLOCK)
    n_pieces, share = pieces(blocks, vocab, SOFTMAX_TILE, device)
    lse0, lse_psi = torch.empty(2, n, dtype=torch.float32, device=device).unbind()
    if n == 0:
        return lse0, lse_psi
    sums: tuple[Tensor | None, ...] = lse0, None, lse_psi, None
    if n_pieces > 1:
        sums = torch.empty(4, n, n_pieces, dtype=torch.float32, device=device).unbind()
    low_rank_softmax_kernel[(blocks * n_pieces,)](
        logits,
        *log_psi,
        inverse_temperature,
        scale,
        rows,
        *sums,
        logits.stride(0),
        z.stride(0),
        up.stride(0),
        n,
        vocab,
        rank,
        blocks,
        n_pieces,
        share,
        FINAL=n_pieces == 1,
        ROWS=ROW_BLOCK,
        TILE=SOFTMAX_TILE,
        R=padded(rank),
        EVEN=padded(rank) == rank,
        num_warps=warps_for(up),
        **OPTIONS,
    )
    if n_pieces > 1:
        softmax_merge_kernel[(n,)](
            *sums, lse0, lse_psi, n_pieces, TWISTED=True, PIECES=most_pieces(vocab), num_warps=1, **OPTIONS
        )
    return lse0, lse_psi


def twist_sample(
    logits: Tensor,
    log_psi: LowRank,
    lse0: Tensor,
    ancestors: Tensor | None,
    keys: Tensor,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per lane as ``reference.twist_sample`` does, without writing log psi, noise or scores."""
    z, up, _ = log_psi
    lanes, (vocab, rank), device = len(keys), up.shape, logits.device
    blocks = triton.cdiv(lanes, ROW_BLOCK)
    n_pieces, share = pieces(blocks, vocab, RACE_TILE, device)
    tokens = torch.empty(lanes, dtype=torch.int64, device=device)
    log_p, token_log_psi = torch.empty(2, lanes, dtype=torch.float32, device=device).unbind()
    if lanes == 0:
        return tokens, log_p, token_log_psi
    best = torch.empty(lanes, n_pieces, device=device), torch.empty(lanes, n_pieces, dtype=torch.int32, device=device)
    factors = logits, *log_psi, inverse_temperature, scale
    strides = logits.stride(0), z.stride(0), up.stride(0)
    low_rank_race_kernel[(blocks * n_pieces,)](
        *factors,
        ancestors,
        rows,
        keys,
        *best,
        *strides,
        lanes,
        vocab,
        rank,
        blocks,
        n_pieces,
        share,
        ROWS=ROW_BLOCK,
        TILE=RACE_TILE,
        R=padded(rank),
        EVEN=padded(rank) == rank,
        num_warps=warps_for(up),
        **OPTIONS,
    )
    low_rank_merge_kernel[(lanes,)](
        *factors,
        lse0,
        ancestors,
        rows,
        tokens,
        log_p,
        token_log_psi,
        *best,
        *strides,
        rank,
        n_pieces,
        PIECES=most_pieces(vocab),
        R=padded(rank),
        num_warps=1,
        **OPTIONS,
    )
    return tokens, log_p, token_log_psi


def warps_for(up: Tensor) -> int:
    """Return the warps per program: float32 is multiplied in registers, which four warps have too few of."""
    return 8 if up.dtype == torch.float32 else 4


def padded(rank: int) -> int:
    """Return the rank as the kernels hold it: a power of two that a tensor core takes."""
    return max(triton.next_power_of_2(rank), 16)
