"""The step's operations, each with a Triton and a PyTorch backend that give the same results.

``backend="auto"`` takes Triton on CUDA tensors and PyTorch (``reference``) elsewhere; "triton" on
CPU tensors needs Triton's interpreter. Nothing here waits for the device, so values are not checked, only
types, shapes and places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference import Advance, Groups, Lanes, LowRank, Totals

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTS = (torch.int32, torch.int64)

BACKENDS = ("auto", "triton", "torch")
#: Lanes per group that the Triton resampler holds in one program's registers.
MAX_LANES = 1024
#: Fewest rows for which a low-rank twist stays in factors (``keeps_factors``): more than a batch has. On an H100 it is
#: 2 to 3.7 times as fast to write the values out, at 16 to 512 rows of 128,256 tokens and rank 64
#: (benchmarks/results/kernels.csv).
FUSED_ROWS = 2**16


def _triton(backend: str, device: torch.device) -> bool:
    """Decide between the backends."""
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}: pass one of these.")
    if backend == "triton" and device.type != "cuda":
        from triton import JITFunction

        from .twist_softmax import softmax_pieces_kernel

        if isinstance(softmax_pieces_kernel, JITFunction):
            raise ValueError(
                f"`backend` 'triton' needs tensors on a CUDA device, got {device}: pass backend='auto', or set "
                "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels."
            )
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _check(
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    remedy: str,
    *,
    dense: bool = False,
) -> None:
    """Refuse a tensor of another shape (None: any length), type or device, or (``dense``) one with gaps in its rows."""
    fits = x.ndim == len(shape) and all(b is None or a == b for a, b in zip(x.shape, shape, strict=True))
    gaps = dense and x.ndim > 0 and x.shape[-1] > 1 and x.stride(-1) != 1
    if fits and x.dtype in dtypes and x.device == device and not gaps:
        return
    types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    got = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    if gaps:
        got += f" with strides {list(x.stride())}"
    layout = ", dense along the last dimension" if dense else ""
    raise ValueError(f"`{name}` must be {types} {sizes} on {device}{layout}, got {got}: {remedy}.")


def _check_rows(
    logits: Tensor,
    log_psi: Tensor | LowRank | None,
    inverse_temperature: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
) -> int:
    """Check what the two passes over the vocabulary have in common; return N."""
    device = logits.device
    _check("logits", logits, (None, None), FLOATS, device, "pass one row of logits per lane", dense=True)
    n, vocab = logits.shape
    if vocab == 0:
        raise ValueError("`logits` must hold at least one token, got a vocabulary of 0: pass [N, V] with V >= 1.")
    if rows is not None:
        _check("rows", rows, (None,), (torch.int64,), device, "pass a row of the logits per row of the twist")
        n = len(rows)
    remedy = "pass log psi of every token, or None for no twist"
    if isinstance(log_psi, LowRank):
        z, up, bias = log_psi
        _check("log_psi.up", up, (vocab, None), FLOATS, device, "pass one row per token", dense=True)
        remedy = "pass a row of as many factors as those of `up`, and of their type, per row of the twist"
        _check("log_psi.z", z, (n, up.shape[1]), (up.dtype,), device, remedy, dense=True)
        _check("log_psi.bias", bias, (vocab,), FLOATS, device, "pass one value per token", dense=True)
    elif log_psi is not None:
        _check("log_psi", log_psi, (n, vocab), FLOATS, device, remedy, dense=True)
    for name, x in (("inverse_temperature", inverse_temperature), ("scale", scale)):
        if x is not None:
            _check(name, x, (n,), (torch.float32,), device, "pass one value per row, or None for 1")
    return n


def _fused(log_psi: Tensor | LowRank | None) -> Any:
    """Return the module of Triton kernels for a twist given whole, or in factors."""
    if not isinstance(log_psi, LowRank):
        from . import twist_softmax

        return twist_softmax
    from . import low_rank

    rank = log_psi.up.shape[1]
    if rank > low_rank.MAX_RANK:
        raise ValueError(
            f"`log_psi.up` must have a rank of at most {low_rank.MAX_RANK} for Triton, got {rank}: pass "
            "log_psi.values()."
        )
    return low_rank


def keeps_factors(rows: int, rank: int, device: torch.device, backend: str = "auto") -> bool:
    """Decide whether a low-rank twist of so many rows should stay in factors, as ``LowRank``.

        2 ceil(rows / ROW_BLOCK) rank <= 3 rows  and  rows >= FUSED_ROWS  and  the kernels are used

    Both passes over the vocabulary read ``up`` for every block of rows, in place of one write and two reads of
    log psi: fewer bytes, but not faster so far (``FUSED_ROWS``).
    """
    if rows < FUSED_ROWS or not _triton(backend, device):
        return False
    from .low_rank import MAX_RANK, ROW_BLOCK

    return rank <= MAX_RANK and 2 * -(-rows // ROW_BLOCK) * rank <= 3 * rows


def _dense(*tensors: Tensor | None) -> list[Any]:
    """Return small tensors as the kernels index them: without gaps along the last dimension."""
    return [x if x is None or x.ndim == 0 or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def twist_softmax(
    logits: Tensor,
    log_psi: Tensor | LowRank | None,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (lse0, lse_psi), float32 [N]: the log-sums of the base and of the twisted logits.

        x[i, v]    = beta[i] * logits[rows[i], v]
        g[i, v]    = scale[i] * log_psi[i, v]                     0 where scale[i] is 0
        lse0[i]    = log sum_v exp(x[i, v])
        lse_psi[i] = log sum_v exp(x[i, v] + g[i, v])             log Z^pi = lse_psi - lse0 (Zhao et al. 2024, Eq. 15)

    Args:
        logits: bfloat16, float16 or float32 [M, V], any row stride; -inf where a token is forbidden.
        log_psi: the same [N, V], of its own type and stride, in nats; or in factors, ``LowRank`` of z [N, r], up [V, r]
            and bias [V], which are multiplied while streaming; None for a twist of one.
        inverse_temperature: beta > 0, float32 [N]; None is 1.
        scale: float32 [N]; None is 1.
        rows: the logits' row of each row of the twist, int64 [N], so that lanes need not be gathered out of a
            batch; None is the same row (M = N).
        backend: "auto", "triton" or "torch".

    A token with -inf counts for nothing whatever its (finite) twist. A row without a token gives -inf, one with NaN
    gives NaN, one with +inf gives +inf. Both backends sum in float32, products of factors included.

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    _check_rows(logits, log_psi, inverse_temperature, scale, rows)
    if not _triton(backend, logits.device):
        return reference.twist_softmax(logits, log_psi, inverse_temperature, scale, rows)
    return _fused(log_psi).twist_softmax(logits, log_psi, *_dense(inverse_temperature, scale, rows))


def twist_sample(
    logits: Tensor,
    log_psi: Tensor | LowRank | None,
    lse0: Tensor,
    ancestors: Tensor | None,
    keys: Tensor,
    inverse_temperature: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per lane from the twist-induced proposal of the lane's ancestor; return (token, log_p, log_psi).

        a        = ancestors[i]                                   x and g as in ``twist_softmax``
        token[i] = argmax_v x[a, v] + g[a, v] - log(-log1p(-u))   u = counter_uniforms(keys)[i, v]
        log_p[i] = x[a, token[i]] - lse0[a]
        log_psi[i] = g[a, token[i]]

    Args:
        logits, log_psi, inverse_temperature, scale, rows: as in ``twist_softmax``.
        lse0: its first result, float32 [N].
        ancestors: row of the twist to draw from, int64 [L]; None draws lane i from row i (then L = N).
        keys: one key per lane, int64 [L] (``reference.at_position``).
        backend: "auto", "triton" or "torch".

    Returns:
        token int64 [L], log p0(token) float32 [L], log psi(token) float32 [L].

    A forbidden token is drawn only where no other is left: then it is token 0, with log_p NaN if
    the base logits are all -inf. A row with NaN gives some token of the vocabulary; its log-sums
    are NaN. The backends draw the same token unless two scores are within float32 rounding.

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    n, device = _check_rows(logits, log_psi, inverse_temperature, scale, rows), logits.device
    _check("lse0", lse0, (n,), (torch.float32,), device, "pass what twist_softmax returned")
    lanes = (n if ancestors is None else None,)
    _check("keys", keys, lanes, (torch.int64,), device, "pass one key per lane, from at_position")
    if ancestors is not None:
        _check("ancestors", ancestors, (len(keys),), (torch.int64,), device, "pass one row index per lane")
    if not _triton(backend, device):
        return reference.twist_sample(logits, log_psi, lse0, ancestors, keys, inverse_temperature, scale, rows)
    small = _dense(lse0, ancestors, keys, inverse_temperature, scale, rows)
    return _fused(log_psi).twist_sample(logits, log_psi, *small)


def resample(
    log_w: Tensor,
    live: Tensor,
    allowed: Tensor,
    thresholds: Tensor,
    schemes: Tensor,
    uniforms: Tensor,
    pinned: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Resample the live lanes of every group whose weights have become too uneven.

        ess       = (sum w)^2 / sum w^2                           w = exp(log_w) over the n live lanes
        resampled = allowed and n >= 2 and (ess < threshold * n  or  threshold >= 1)
        ancestors ~ scheme(w / sum w)                             a lane that has a child keeps itself
        log_w     = log(sum w / n)                                on the live lanes, where resampled

    Args:
        log_w: float32 or float64 [G, K].
        live: bool [G, K], any subset of the slots.
        allowed: bool [G].
        thresholds: float32 or float64 [G], as a fraction of the live lanes.
        schemes: int64 [G], codes into ``reference.SCHEMES``.
        uniforms: float32 or float64 [G, K] on [0, 1].
        pinned: bool [G], groups whose lane 0 keeps itself while the others resample conditionally on it
            (``reference.resample``); with multinomial or residual resampling only.
        backend: "auto", "triton" (K up to 1,024) or "torch".

    Returns:
        ancestors int64 [G, K], log_w [G, K], ESS [G] and resampled bool [G]. A group whose live
        weights are NaN, +inf or all -inf is left as it is, with an ESS of NaN. No lane without weight is chosen.

    Both backends compute in float64, whatever the type of ``log_w``. They may differ in an ESS that equals the
    threshold and in a point that equals a cumulative weight, to K * 2**-52 in both cases.

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    device, reals = log_w.device, (torch.float32, torch.float64)
    _check("log_w", log_w, (None, None), reals, device, "pass one row of log weights per group")
    groups, lanes = log_w.shape
    if lanes == 0:
        raise ValueError("`log_w` must hold at least one lane per group, got K = 0: pass [G, K] with K >= 1.")
    _check("live", live, (groups, lanes), (torch.bool,), device, "pass a mask of the lanes that take part")
    _check("allowed", allowed, (groups,), (torch.bool,), device, "pass one flag per group")
    _check("thresholds", thresholds, (groups,), reals, device, "pass one threshold per group")
    _check("schemes", schemes, (groups,), (torch.int64,), device, "pass one code of reference.SCHEMES per group")
    _check("uniforms", uniforms, (groups, lanes), reals, device, "pass counter_uniforms(keys, K)")
    if pinned is not None:
        _check(
            "pinned", pinned, (groups,), (torch.bool,), device, "pass one flag per group, or None for no pinned lane"
        )
    if not _triton(backend, device):
        return reference.resample(log_w, live, allowed, thresholds, schemes, uniforms, pinned)
    if lanes > MAX_LANES:
        raise ValueError(
            f"`log_w` must have at most {MAX_LANES} lanes per group for Triton, got {lanes}: pass backend='torch'."
        )
    from . import resample as fused

    return fused.resample(*_dense(log_w, live, allowed, thresholds, schemes, uniforms, pinned))


def _check_state(lanes: Lanes, device: torch.device) -> None:
    slots = (len(lanes.log_w),)
    types = (torch.float64, torch.float64, torch.float32, torch.int32, torch.int32, torch.bool, torch.int64)
    for name, x, dtype in zip(Lanes._fields[:-1], lanes, types, strict=False):
        _check(f"lanes.{name}", x, slots, (dtype,), device, "pass one value per slot", dense=True)
    remedy = "pass the tokens that end each lane, -1 for none"
    _check("lanes.stops", lanes.stops, (*slots, None), (torch.int32,), device, remedy, dense=True)
    width = lanes.stops.shape[1]
    if width & (width - 1) or width == 0 or not lanes.stops.is_contiguous():
        raise ValueError(
            "`lanes.stops` must be contiguous and hold a power of two of tokens per slot, got "
            f"{list(lanes.stops.shape)} with strides {list(lanes.stops.stride())}: fill it up with -1."
        )


def _check_groups(groups: Groups, row_of: Tensor, slots: int, device: torch.device) -> int:
    """Return K of groups whose tensors fit together."""
    _check(
        "groups.members", groups.members, (None, None), (torch.int32,), device, "pass slots, -1 for none", dense=True
    )
    count, width = groups.members.shape
    types = (torch.int32, torch.float64, torch.int64, torch.int64, torch.int32, torch.int32, torch.bool)
    for name, x, dtype in zip(Groups._fields[1:], groups[1:], types, strict=True):
        if x is not None:
            _check(f"groups.{name}", x, (count,), (dtype,), device, "pass one value per group", dense=True)
    _check("row_of", row_of, (slots,), (torch.int32,), device, "pass a row per slot, or -1", dense=True)
    return width


def _check_width(width: int) -> None:
    if width > MAX_LANES:
        raise ValueError(
            f"`groups.members` must have at most {MAX_LANES} lanes per group for Triton, got {width}: pass "
            "backend='torch'."
        )


def advance(
    lanes: Lanes, groups: Groups, row_of: Tensor, lse0: Tensor, lse_psi: Tensor, *, backend: str = "auto"
) -> Advance:
    """Weigh the lanes in the batch by the token about to be drawn, and resample the groups that need it.

        here      = the members of a group that are in the batch and have not ended
        position += 1,  log_w += lse_psi - lse0 - log_psi           here      (Zhao et al. 2024, Prop. 3.3)
        allowed   = all live members are here, at one position t with 1 < t < last
        ancestors, log_w = resample(log_w, here, allowed, ...)                with counter_uniforms of the group's key

    Args:
        lanes: the state by slot; ``log_w`` and ``position`` are updated in place.
        groups: every lane in the batch is a member of one of them.
        row_of: index of each slot's lane in the batch, int32 [R], -1 where it is not in it.
        lse0, lse_psi: of each lane in the batch, float32 [L] (``twist_softmax``).
        backend: "auto", "triton" (K up to 1,024) or "torch".

    Returns:
        ancestors, keys for the draw, log p0 of the ancestors and whether their group resampled, [L] each.

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    device = lse0.device
    _check_state(lanes, device)
    width = _check_groups(groups, row_of, len(lanes.log_w), device)
    _check("lse0", lse0, (None,), (torch.float32,), device, "pass what twist_softmax returned")
    _check("lse_psi", lse_psi, (len(lse0),), (torch.float32,), device, "pass what twist_softmax returned")
    if not _triton(backend, device):
        return reference.advance(lanes, groups, row_of, lse0, lse_psi)
    _check_width(width)
    from . import advance as fused

    return fused.advance(lanes, groups, row_of, *_dense(lse0, lse_psi))


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
    *,
    backend: str = "auto",
) -> Tensor:
    """Record the token that each lane has drawn; return a report, float64 [len(reference.REPORT), L].

        log_p   = that of the ancestor + log p0(token)
        log_psi = log psi(token)                             0 where that is not finite: the weight is zero, or NaN
        log_w  += gain
        ended   = token in stops  or  position = last

    A lane that had ended before stays as it is. Then, for the groups that have a lane in the batch:

        log_z            = log(sum of the weights of all members + exp(left)) - log(particles)
        num_resamplings += whether the group resampled

    Args:
        lanes: the state by slot; ``log_w``, ``log_p``, ``log_psi`` and ``ended`` are updated in place.
        groups, row_of: as in ``advance``.
        totals: of the groups, by ``groups.rows``; ``log_z`` and ``num_resamplings`` are updated in place.
        moved: what ``advance`` returned.
        token, log_p, log_psi: int64, float32 and float32 [L] (``twist_sample``).
        gain: what the token adds to the weight, float32 [L]; None for nothing.
        backend: "auto", "triton" (K up to 1,024) or "torch".

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    device = token.device
    _check_state(lanes, device)
    width = _check_groups(groups, row_of, len(lanes.log_w), device)
    for name, x, dtype in zip(Totals._fields, totals, (torch.float64, torch.float64, torch.int32), strict=True):
        remedy = "pass one value per row of `groups.rows`"
        _check(f"totals.{name}", x, (len(totals.log_w_ended),), (dtype,), device, remedy, dense=True)
    drawn = (("token", token, torch.int64), ("log_p", log_p, torch.float32), ("log_psi", log_psi, torch.float32))
    for name, x, dtype in drawn:
        _check(name, x, (len(token),), (dtype,), device, "pass what twist_sample returned", dense=True)
    if gain is not None:
        _check("gain", gain, (len(token),), (torch.float32,), device, "pass one value per lane, or None", dense=True)
    if not _triton(backend, device):
        return reference.settle(lanes, groups, totals, row_of, moved, token, log_p, log_psi, gain)
    _check_width(width)
    from . import advance as fused

    return fused.settle(lanes, groups, totals, row_of, moved, token, log_p, log_psi, gain)


class BlockSegments(NamedTuple):
    """Where the bytes of a KV block are: from ``block_segments``.

    Attributes:
        table: (address, bytes from block to block, bytes to copy) of each run of bytes, int64 [S, 3].
        aligned: whether all of them are multiples of 16.
    """

    table: Tensor
    aligned: bool


def row_pointers(tables: Sequence[Tensor]) -> Tensor:
    """Return (address, row stride) of each int32 table, int64 [T, 2] on their device.

    Valid as long as the tables are neither freed nor reallocated; make it once and keep it.
    """
    _check_tables(tables)
    values = [(table.data_ptr(), table.stride(0)) for table in tables]
    return torch.tensor(values, dtype=torch.int64).reshape(-1, 2).to(tables[0].device if tables else "cpu")


def block_segments(caches: Sequence[Tensor], num_blocks: int) -> BlockSegments:
    """Describe the caches to ``copy_partial_blocks``; valid as long as they stay in place.

    Args:
        caches: KV caches whose dim 0 counts ``num_blocks`` blocks, or several kernel blocks to each;
            any strides. Layers that share memory are found out and copied once.

    Raises:
        ValueError: a dim 0 that is not a multiple of ``num_blocks``.
    """
    _check_caches(caches, num_blocks)
    runs = set()
    for cache in caches:
        blocks, width = cache.unflatten(0, (num_blocks, -1)), cache.element_size()
        dims = sorted(
            (step, size) for step, size in zip(blocks.stride()[1:], blocks.shape[1:], strict=True) if size > 1
        )
        run = 1
        while dims and dims[0][0] == run:
            run *= dims.pop(0)[1]
        for index in itertools.product(*(range(size if step else 1) for step, size in dims)):
            offset = sum(i * step for i, (step, _) in zip(index, dims, strict=True))
            runs.add((blocks.stride(0) * width, blocks.data_ptr() + offset * width, run * width))
    merged: list[list[int]] = []
    for stride, address, run in sorted(runs):
        if merged and merged[-1][1] == stride and merged[-1][0] + merged[-1][2] >= address:
            joined = max(merged[-1][2], address + run - merged[-1][0])
            if joined <= stride:
                merged[-1][2] = joined
                continue
        merged.append([address, stride, run])
    table = torch.tensor(merged, dtype=torch.int64).reshape(-1, 3)
    return BlockSegments(
        table.to(caches[0].device if caches else "cpu"), all(x % 16 == 0 for row in merged for x in row)
    )


def _check_tables(tables: Sequence[Tensor]) -> None:
    for i, table in enumerate(tables):
        remedy = "pass int32 tables on one device, one row per request"
        _check(f"tables[{i}]", table, (None, None), (torch.int32,), tables[0].device, remedy, dense=True)


def _check_caches(caches: Sequence[Tensor], num_blocks: int) -> None:
    for i, cache in enumerate(caches):
        if num_blocks < 1 or cache.ndim == 0 or cache.shape[0] % num_blocks:
            raise ValueError(
                f"`caches[{i}]` must have a multiple of `num_blocks` = {num_blocks} as its first size, got "
                f"{list(cache.shape)}: permute the dimension that counts blocks to the front."
            )


def _check_lanes(
    tables: Sequence[Tensor], block_sizes: Tensor, rows: Tensor, ancestors: Tensor, **lengths: Tensor
) -> None:
    _check_tables(tables)
    device, lanes = ancestors.device, (len(ancestors),)
    _check("ancestors", ancestors, (None,), (torch.int64,), tables[0].device if tables else device, "pass lane indices")
    _check("block_sizes", block_sizes, (len(tables),), INTS, device, "pass the tokens per entry of each table")
    _check("rows", rows, lanes, INTS, device, "pass the row of each lane")
    for name, x in lengths.items():
        _check(name, x, lanes, INTS, device, "pass a number of tokens per lane")


def fork_rows(
    tables: Sequence[Tensor],
    block_sizes: Tensor,
    rows: Tensor,
    ancestors: Tensor,
    first: Tensor,
    computed: Tensor,
    *,
    pointers: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Give every dead lane its parent's block-table entries and token history, in place.

        for each table t, lane i with a = ancestors[i] != i:      b = block_sizes[t]
            start, stop = first[i] // b, computed[i] // b
            tables[t][rows[i], start:stop] = tables[t][rows[a], start:stop]

    Only full blocks: the entry of the partial block stays the lane's own. A token history is a
    table with one token per entry.

    Args:
        tables: int32 [R, M_t] each, T of them.
        block_sizes: tokens per entry, int32 or int64 [T].
        rows: row of each lane in all tables, int32 or int64 [L], no two alike.
        ancestors: int64 [L]; a parent keeps itself (``resample`` sees to it).
        first: tokens that lane and parent share from the start, usually the prompt's, [L].
        computed: tokens in the parent's history, [L].
        pointers: ``row_pointers(tables)``, made once; None makes it anew, which waits for the device.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    _check_lanes(tables, block_sizes, rows, ancestors, first=first, computed=computed)
    if not tables or not _triton(backend, ancestors.device):
        return reference.fork_rows(tables, block_sizes, rows, ancestors, first, computed)
    from . import fork as fused

    pointers = row_pointers(tables) if pointers is None else pointers
    _check("pointers", pointers, (len(tables), 2), (torch.int64,), ancestors.device, "pass row_pointers(tables)")
    fused.fork_rows(*_dense(block_sizes, rows, ancestors, first, computed, pointers))


def copy_partial_blocks(
    caches: Sequence[Tensor],
    num_blocks: int,
    tables: Sequence[Tensor],
    block_sizes: Tensor,
    rows: Tensor,
    ancestors: Tensor,
    computed: Tensor,
    *,
    pointers: Tensor | None = None,
    segments: BlockSegments | None = None,
    backend: str = "auto",
) -> None:
    """Overwrite every dead lane's partial KV block with its parent's, in all layers, in place.

        for each table t, lane i with a = ancestors[i] != i and computed[i] % block_sizes[t] > 0:
            column = computed[i] // block_sizes[t]
            for each cache:
                cache[tables[t][rows[i], column]] = cache[tables[t][rows[a], column]]

    Before or after ``fork_rows``, which leaves these entries alone.

    Args:
        caches: any dtype, shape and strides; dim 0 counts blocks (``block_segments``).
        num_blocks: blocks that the tables number.
        tables, block_sizes, rows, ancestors, computed: as in ``fork_rows``; block tables only.
        pointers: ``row_pointers(tables)``, made once; None makes it anew, which waits for the device.
        segments: ``block_segments(caches, num_blocks)``, likewise.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a type, shape, device or backend that does not fit.
    """
    _check_lanes(tables, block_sizes, rows, ancestors, computed=computed)
    _check_caches(caches, num_blocks)
    if not tables or not _triton(backend, ancestors.device):
        return reference.copy_partial_blocks(caches, num_blocks, tables, block_sizes, rows, ancestors, computed)
    from . import fork as fused

    pointers = row_pointers(tables) if pointers is None else pointers
    _check("pointers", pointers, (len(tables), 2), (torch.int64,), ancestors.device, "pass row_pointers(tables)")
    table, aligned = block_segments(caches, num_blocks) if segments is None else segments
    block_sizes, rows, ancestors, computed = _dense(block_sizes, rows, ancestors, computed)
    fused.copy_partial_blocks(block_sizes, rows, ancestors, computed, pointers, table, aligned)
