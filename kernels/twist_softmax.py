"""Twisted softmax and Gumbel-max draw in Triton; ``reference`` has the specification.

Each row is cut into pieces, one program each, so that a few rows still fill the device; a second,
small launch merges the pieces. Nothing of the size of the vocabulary is ever written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))

#: Sums and products round as written, as in the reference; a fused multiply-add is asked for where it pays.
OPTIONS = {"enable_fp_fusion": False}
#: Arguments that change with the number of rows: a kernel must not be compiled anew for them while it serves.
_VARYING = ["n_pieces", "tiles_per_piece"]
#: Vocabulary entries per step of the streaming loops.
SOFTMAX_TILE, RACE_TILE = 4096, 2048
#: Programs that one multiprocessor should get: several rounds of what fits at once, so that the last is short.
PROGRAMS_PER_PROCESSOR = 16
#: A shorter piece costs more to start and to merge than it gains.
MIN_PIECE = 8192


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; off the GPU, where Triton is interpreted, that of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def most_pieces(vocab: int) -> int:
    """Return a power of two that ``pieces`` does not exceed for any number of rows."""
    return triton.next_power_of_2(triton.cdiv(vocab, MIN_PIECE))


def pieces(rows: int, vocab: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Return (programs per row, tiles per program) for rows of ``vocab`` entries."""
    tiles = triton.cdiv(vocab, tile)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(device), max(rows, 1))
    share = max(triton.cdiv(tiles, wanted), min(MIN_PIECE // tile, tiles), 1)
    return triton.cdiv(tiles, share), share


# The log-sums.


@triton.jit
def _anchor(peak):
    """Return a finite point to measure from: 0 where the peak is infinite, so that no inf - inf is formed."""
    return tl.where((peak == _INF) | (peak == -_INF), 0.0, peak)


@triton.jit
def _fold(x, peak, total):
    """Add the rows of a tile [R, VEC] of log values to R running sums ``total * 2**anchor(peak)``."""
    top = tl.maximum(peak, tl.max(x, axis=1) * _LOG2E)
    anchor = _anchor(top)
    total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(tl.fma(x, _LOG2E, -anchor[:, None])), axis=1)
    return top, total


@triton.jit
def _join(peak, total):
    """Add up running sums [R]; return theirs as one."""
    top = tl.max(peak, axis=0)
    return top, tl.sum(total * tl.exp2(peak - _anchor(top)), axis=0)


@triton.jit
def _log_sum(peak, total):
    return _anchor(peak) * _LN2 + tl.log(total)


@triton.jit
def _weighted(log_psi, scale):
    """Return ``scale * log_psi`` in float32; a scale of zero is no twist, whatever log psi."""
    return tl.where(scale == 0.0, 0.0, log_psi.to(tl.float32) * scale)


@triton.jit
def _row_of(rows, row):
    """Return the row of the logits that belongs to a row of the twist."""
    if rows is not None:
        row = tl.load(rows + row)
    return row


@triton.jit
def _fold_tile(base, twist, mask, beta, scale, peak0, total0, peak1, total1, TWISTED: tl.constexpr):
    """Load one tile and add it to the base and to the twisted sums; ``mask`` is None for a full tile."""
    # Both loads first: they are in flight together.
    if mask is None:
        x = tl.load(base)
    else:
        x = tl.load(base, mask=mask, other=-float("inf"))
    if TWISTED:
        if mask is None:
            g = tl.load(twist)
        else:
            g = tl.load(twist, mask=mask, other=0.0)
    x = x.to(tl.float32) * beta
    peak0, total0 = _fold(x, peak0, total0)
    if TWISTED:
        peak1, total1 = _fold(x + _weighted(g, scale), peak1, total1)
    return peak0, total0, peak1, total1


@triton.jit
def _per_row(values, row):
    """Return the parameter of a row, or of a block of rows; None is 1 everywhere."""
    if values is None:
        return row.to(tl.float32) * 0.0 + 1.0
    else:
        return tl.load(values + row)


@triton.jit
def _store_sums(peak, total, slot, mask, out_peak, out_total, FINAL: tl.constexpr):
    if FINAL:
        tl.store(out_peak + slot, _log_sum(peak, total), mask=mask)
    else:
        tl.store(out_peak + slot, peak, mask=mask)
        tl.store(out_total + slot, total, mask=mask)


@triton.jit(do_not_specialize=["logits_shift", "log_psi_shift", *_VARYING])
def softmax_pieces_kernel(
    logits,
    log_psi,
    inverse_temperature,
    scale,
    rows,
    peak0,
    total0,
    peak1,
    total1,
    logits_stride,
    log_psi_stride,
    logits_shift,
    log_psi_shift,
    vocab,
    n_pieces,
    tiles_per_piece,
    ALIGNED: tl.constexpr,
    ALIKE: tl.constexpr,
    FINAL: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
):
    """Sum one piece of one row.

    Streamed: the logits and the twist, once. Saved: (peak, total) of each sum and piece, from which
    ``softmax_merge_kernel`` makes the log-sums; the log-sums themselves where there is one piece (FINAL).

    Loads are VEC entries (16 bytes of the narrower type) wide whatever the row stride: tiles start at the aligned
    address at or before the row, and only the first and the last tile are masked. ALIGNED: every
    row starts at such an address. ALIKE: twist rows are as far from theirs as logits rows are.
    """
    program = tl.program_id(0)
    row = (program // n_pieces).to(tl.int64)
    piece = program % n_pieces
    TWISTED: tl.constexpr = log_psi is not None
    beta = 1.0
    if inverse_temperature is not None:
        beta = tl.load(inverse_temperature + row)
    s = 1.0
    if scale is not None:
        s = tl.load(scale + row)

    begin = _row_of(rows, row) * logits_stride + logits_shift
    base = logits + begin // VEC * VEC
    if ALIGNED:
        lead = 0
        end = vocab
    else:
        lead = (begin % VEC).to(tl.int32)
        end = lead + vocab
    if TWISTED:
        begin = row * log_psi_stride + log_psi_shift
        if ALIKE:
            twist = log_psi + begin // VEC * VEC
        else:
            twist = log_psi + (begin - lead)
    else:
        twist = base

    entries = tl.arange(0, TILE // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    p0 = tl.full([TILE // VEC], -float("inf"), tl.float32)
    t0 = tl.zeros([TILE // VEC], tl.float32)
    p1, t1 = p0, t0
    whole = end // TILE
    low = piece * tiles_per_piece
    high = tl.cdiv(end, TILE)
    if piece < n_pieces - 1:  # the last one takes what a row that begins in a tile has beyond its vocabulary's tiles
        high = tl.minimum(low + tiles_per_piece, high)
    first = low
    if not ALIGNED:
        if (low == 0) & (lead > 0):
            first = low + 1
    for tile in range(first, tl.minimum(high, whole)):
        at = tile * TILE + entries
        p0, t0, p1, t1 = _fold_tile(base + at, twist + at, None, beta, s, p0, t0, p1, t1, TWISTED)
    if high > whole:
        at = whole * TILE + entries
        mask = at < end
        if not ALIGNED:
            mask = mask & (at >= lead)
        p0, t0, p1, t1 = _fold_tile(base + at, twist + at, mask, beta, s, p0, t0, p1, t1, TWISTED)
    if not ALIGNED:
        if (first > low) & (whole > 0):
            mask = entries >= lead
            p0, t0, p1, t1 = _fold_tile(base + entries, twist + entries, mask, beta, s, p0, t0, p1, t1, TWISTED)

    p0, t0 = _join(p0, t0)
    _store_sums(p0, t0, program, None, peak0, total0, FINAL)
    if TWISTED:
        p1, t1 = _join(p1, t1)
        _store_sums(p1, t1, program, None, peak1, total1, FINAL)


@triton.jit(do_not_specialize=["n_pieces"])
def softmax_merge_kernel(
    peak0, total0, peak1, total1, lse0, lse_psi, n_pieces, TWISTED: tl.constexpr, PIECES: tl.constexpr
):
    """Merge the pieces of one row. Streamed: (peak, total) of each. Saved: lse0 and lse_psi."""
    row = tl.program_id(0)
    piece = tl.arange(0, PIECES)
    mask = piece < n_pieces
    at = row * n_pieces + piece
    p, t = _join(tl.load(peak0 + at, mask=mask, other=-float("inf")), tl.load(total0 + at, mask=mask, other=0.0))
    tl.store(lse0 + row, _log_sum(p, t))
    if TWISTED:
        p, t = _join(tl.load(peak1 + at, mask=mask, other=-float("inf")), tl.load(total1 + at, mask=mask, other=0.0))
        tl.store(lse_psi + row, _log_sum(p, t))


def _from_aligned(x: Tensor) -> tuple[Tensor, int]:
    """Return a view of the storage from the 16-byte boundary at or before ``x``, and how many entries lie between."""
    shift = x.data_ptr() % 16 // x.element_size()
    if shift > x.storage_offset():  # memory that some other library has placed
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - shift), shift


def twist_softmax(
    logits: Tensor,
    log_psi: Tensor | None,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (lse0, lse_psi) as ``reference.twist_softmax`` does, in one pass over the vocabulary."""
    n, vocab = len(logits if rows is None else rows), logits.shape[1]
    n_pieces, share = pieces(n, vocab, SOFTMAX_TILE, logits.device)
    twisted = log_psi is not None
    outputs = torch.empty(2 if twisted else 1, n, dtype=torch.float32, device=logits.device)
    lse0, lse_psi = outputs[0], outputs[-1]
    if n == 0:
        return lse0, lse_psi
    sums: tuple[Tensor | None, ...] = lse0, None, lse_psi, None
    if n_pieces > 1:
        sums = torch.empty(4, n, n_pieces, dtype=torch.float32, device=logits.device).unbind()

    logits, shift0 = _from_aligned(logits)
    stride0, shift1, stride1 = logits.stride(0), 0, 0
    vec = 16 // logits.element_size()
    alike = True
    if log_psi is not None:
        log_psi, shift1 = _from_aligned(log_psi)
        stride1 = log_psi.stride(0)
        vec = max(vec, 16 // log_psi.element_size())
        even = (stride0 - stride1) % vec == 0 if rows is None else stride0 % vec == stride1 % vec == 0
        alike = (shift0 - shift1) % vec == 0 and (n == 1 and rows is None or even)
    softmax_pieces_kernel[(n * n_pieces,)](
        logits,
        log_psi,
        inverse_temperature,
        scale,
        rows,
        *sums,
        stride0,
        stride1,
        shift0,
        shift1,
        vocab,
        n_pieces,
        share,
        ALIGNED=shift0 % vec == 0 and (n == 1 and rows is None or stride0 % vec == 0),
        ALIKE=alike,
        FINAL=n_pieces == 1,
        TILE=SOFTMAX_TILE,
        VEC=vec,
        num_warps=4,
        **OPTIONS,
    )
    if n_pieces > 1:
        softmax_merge_kernel[(n,)](
            *sums,
            lse0,
            lse_psi,
            n_pieces,
            TWISTED=twisted,
            PIECES=most_pieces(vocab),
            num_warps=1,
            **OPTIONS,
        )
    return lse0, lse_psi


# The draw.


@triton.jit
def _scramble(x):
    """Scramble uint32 words, bit for bit as ``reference.counter_uniforms`` does with int32 ones."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def counter_uniform(key, counters):
    """Return the float32 uniforms that ``reference.counter_uniforms`` has for an int64 key at int32 counters."""
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    words = _scramble(_scramble(counters.to(tl.uint32) * 0x9E3779B9 + low) ^ high)
    # Exact in float32: the float before 2**-31.
    return ((words & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612595521636e-10


@triton.jit
def _gumbel(u):
    """Return -log(-log1p(-u)), to a few roundings: log1p by the ratio that cancels the rounding of 1 - u."""
    rest = 1.0 - u
    direct = -tl.log(rest) * (u / (1.0 - rest))
    return -tl.log(tl.where(rest == 1.0, u, direct))


@triton.jit
def _score(u, x, g):
    """Return what an entry runs the race with; NaN beats nothing on a GPU: make it so everywhere."""
    score = _gumbel(u) + x
    if g is not None:
        score += g
    return tl.where(score == score, score, -float("inf"))


@triton.jit
def _value_at(log_psi, row, stride, token, scale):
    """Return the weighted log psi of a token; 0 without a twist."""
    if log_psi is not None:
        return _weighted(tl.load(log_psi + row * stride + token), scale)
    else:
        return 0.0


@triton.jit
def _winner(best_scores, best_tokens, lane, n_pieces, PIECES: tl.constexpr):
    """Return the token that won the race of one lane's pieces, the first where several did."""
    piece = tl.arange(0, PIECES)
    mask = piece < n_pieces
    scores = tl.load(best_scores + lane * n_pieces + piece, mask=mask, other=-float("inf"))
    winners = tl.load(best_tokens + lane * n_pieces + piece, mask=mask, other=0)
    return tl.min(tl.where(scores == tl.max(scores, axis=0), winners, 0x7FFFFFFF), axis=0)


@triton.jit
def _finish_draw(token, lane, row, value, logits, lse0, beta, rows, logits_stride, tokens, log_ps, log_psis):
    """Store the token of a lane with its log p0 and its log psi, ``value``."""
    log_p = tl.load(logits + _row_of(rows, row) * logits_stride + token).to(tl.float32) * beta - tl.load(lse0 + row)
    tl.store(tokens + lane, token.to(tl.int64))
    tl.store(log_ps + lane, log_p)
    tl.store(log_psis + lane, value)


@triton.jit(do_not_specialize=_VARYING)
def race_kernel(
    logits,
    log_psi,
    inverse_temperature,
    scale,
    lse0,
    ancestors,
    rows,
    keys,
    tokens,
    log_ps,
    log_psis,
    best_scores,
    best_tokens,
    logits_stride,
    log_psi_stride,
    vocab,
    n_pieces,
    tiles_per_piece,
    FINAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Find the winner of one piece of one lane's Gumbel race, in the ancestor's row.

    Streamed: the ancestor's logits and twist, once; the noise is computed where it is used.
    Saved: the best score and its token, from which ``race_merge_kernel`` makes the draw; the draw
    itself where there is one piece (FINAL).
    """
    program = tl.program_id(0)
    lane = (program // n_pieces).to(tl.int64)
    piece = program % n_pieces
    row = lane
    if ancestors is not None:
        row = tl.load(ancestors + lane)
    key = tl.load(keys + lane)
    beta = 1.0
    if inverse_temperature is not None:
        beta = tl.load(inverse_temperature + row)
    s = 1.0
    if scale is not None:
        s = tl.load(scale + row)

    # A score that is -inf or NaN never wins, and a race without a winner stands at token 0.
    best = tl.full([], -float("inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    base = logits + _row_of(rows, row) * logits_stride
    low = piece * tiles_per_piece * TILE
    for start in range(low, tl.minimum(low + tiles_per_piece * TILE, vocab), TILE):
        at = start + tl.arange(0, TILE)
        mask = at < vocab
        x = tl.load(base + at, mask=mask, other=-float("inf"))
        g = None
        if log_psi is not None:
            g = tl.load(log_psi + row * log_psi_stride + at, mask=mask, other=0.0)
        u = counter_uniform(key, at)
        x = x.to(tl.float32) * beta
        ahead = x - best
        if log_psi is not None:
            g = _weighted(g, s)
            ahead += g
        # Noise is at most -log(u), and nearly that where it can win: few tiles hold an entry that
        # could, and the two logarithms are left to them. One per cent covers all roundings.
        if tl.max((u < tl.exp2(ahead * _LOG2E) * 1.01).to(tl.int32), axis=0) > 0:
            score = _score(u, x, g)
            top = tl.max(score, axis=0)
            if top > best:
                best = top
                token = tl.min(tl.where(score == top, at, 0x7FFFFFFF), axis=0)
    if FINAL:
        value = _value_at(log_psi, row, log_psi_stride, token, s)
        _finish_draw(token, lane, row, value, logits, lse0, beta, rows, logits_stride, tokens, log_ps, log_psis)
    else:
        tl.store(best_scores + program, best)
        tl.store(best_tokens + program, token)


@triton.jit(do_not_specialize=["n_pieces"])
def race_merge_kernel(
    logits,
    log_psi,
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
    log_psi_stride,
    n_pieces,
    PIECES: tl.constexpr,
):
    """Let the winners of one lane's pieces race. Streamed: their scores. Saved: token, log p0 and log psi."""
    lane = tl.program_id(0).to(tl.int64)
    row = lane
    if ancestors is not None:
        row = tl.load(ancestors + lane)
    beta = 1.0
    if inverse_temperature is not None:
        beta = tl.load(inverse_temperature + row)
    s = 1.0
    if scale is not None:
        s = tl.load(scale + row)
    token = _winner(best_scores, best_tokens, lane, n_pieces, PIECES)
    value = _value_at(log_psi, row, log_psi_stride, token, s)
    _finish_draw(token, lane, row, value, logits, lse0, beta, rows, logits_stride, tokens, log_ps, log_psis)


def twist_sample(
    logits: Tensor,
    log_psi: Tensor | None,
    lse0: Tensor,
    ancestors: Tensor | None,
    keys: Tensor,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per lane as ``reference.twist_sample`` does, without writing noise or scores."""
    lanes, vocab, device = len(keys), logits.shape[1], logits.device
    n_pieces, share = pieces(lanes, vocab, RACE_TILE, device)
    tokens = torch.empty(lanes, dtype=torch.int64, device=device)
    log_p, token_log_psi = torch.empty(2, lanes, dtype=torch.float32, device=device).unbind()
    if lanes == 0:
        return tokens, log_p, token_log_psi
    final = n_pieces == 1
    scores = None if final else torch.empty(lanes, n_pieces, dtype=torch.float32, device=device)
    winners = None if final else torch.empty(lanes, n_pieces, dtype=torch.int32, device=device)
    per_row = logits, log_psi, inverse_temperature, scale, lse0, ancestors, rows
    strides = logits.stride(0), 0 if log_psi is None else log_psi.stride(0)
    race_kernel[(lanes * n_pieces,)](
        *per_row,
        keys,
        tokens,
        log_p,
        token_log_psi,
        scores,
        winners,
        *strides,
        vocab,
        n_pieces,
        share,
        FINAL=final,
        TILE=RACE_TILE,
        num_warps=4,
        **OPTIONS,
    )
    if not final:
        race_merge_kernel[(lanes,)](
            *per_row,
            tokens,
            log_p,
            token_log_psi,
            scores,
            winners,
            *strides,
            n_pieces,
            PIECES=most_pieces(vocab),
            num_warps=1,
            **OPTIONS,
        )
    return tokens, log_p, token_log_psi
