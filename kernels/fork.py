"""Forking of particles in two Triton launches; ``reference`` has the specification.

Tables and caches are reached through small device tables of addresses and strides, which are made
once (``ops.row_pointers``, ``ops.block_segments``): a launch is the same however many there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .twist_softmax import OPTIONS, PROGRAMS_PER_PROCESSOR, processors

#: Entries and words of four bytes per step; a quarter of the latter in single bytes.
ROWS_TILE, COPY_TILE = 1024, 4096


@triton.jit
def _table_at(pointers, table):
    """Return (address, row stride) of an int32 table."""
    address = tl.load(pointers + 2 * table)
    return address.to(tl.pointer_type(tl.int32)), tl.load(pointers + 2 * table + 1)


@triton.jit
def fork_rows_kernel(pointers, block_sizes, rows, ancestors, first, computed, TILE: tl.constexpr):
    """Copy the parent's row of one table over one dead lane's.

    Streamed: the entries of the full blocks past ``first``. Saved: the same, in place. Survivors
    leave at once; they alone are read, so that no lane reads what another one writes.
    """
    lane = tl.program_id(0).to(tl.int64)
    table = tl.program_id(1)
    parent = tl.load(ancestors + lane)
    if parent != lane:
        size = tl.load(block_sizes + table)
        start = (tl.load(first + lane) // size).to(tl.int32)
        stop = (tl.load(computed + lane) // size).to(tl.int32)
        entries, stride = _table_at(pointers, table)
        source = entries + tl.load(rows + parent) * stride
        target = entries + tl.load(rows + lane) * stride
        for low in range(start, stop, TILE):
            at = low + tl.arange(0, TILE)
            tl.store(target + at, tl.load(source + at, mask=at < stop), mask=at < stop)


@triton.jit(do_not_specialize=["n_segments", "n_shares"])
def copy_partial_blocks_kernel(
    segments,
    n_segments,
    pointers,
    block_sizes,
    rows,
    ancestors,
    computed,
    n_shares,
    WORD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy the parent's partial block over one dead lane's, in one share of the segments.

    Streamed: one run of bytes per segment. Saved: the same run of the lane's own block. Survivors,
    and lanes that end at a block boundary, leave at once.
    """
    lane = (tl.program_id(0) // n_shares).to(tl.int64)
    share = tl.program_id(0) % n_shares
    table = tl.program_id(1)
    parent = tl.load(ancestors + lane)
    if parent != lane:
        size = tl.load(block_sizes + table)
        length = tl.load(computed + lane)
        if length % size > 0:
            entries, stride = _table_at(pointers, table)
            column = length // size
            source_block = tl.load(entries + tl.load(rows + parent) * stride + column).to(tl.int64)
            target_block = tl.load(entries + tl.load(rows + lane) * stride + column).to(tl.int64)
            for segment in range(share, n_segments, n_shares):
                address = tl.load(segments + 3 * segment)
                block_bytes = tl.load(segments + 3 * segment + 1)
                run = tl.load(segments + 3 * segment + 2).to(tl.int32)
                if WORD == 4:
                    # Only where all three are multiples of 16 bytes.
                    base = address.to(tl.pointer_type(tl.int32))
                    words = tl.multiple_of(run // 4, 4)
                    source = tl.multiple_of(base + source_block * (block_bytes // 4), 16)
                    target = tl.multiple_of(base + target_block * (block_bytes // 4), 16)
                else:
                    base = address.to(tl.pointer_type(tl.uint8))
                    words = run
                    source = base + source_block * block_bytes
                    target = base + target_block * block_bytes
                for low in range(0, words, TILE):
                    at = low + tl.arange(0, TILE)
                    tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)


def fork_rows(
    block_sizes: Tensor, rows: Tensor, ancestors: Tensor, first: Tensor, computed: Tensor, pointers: Tensor
) -> None:
    """Fork as ``reference.fork_rows`` does, all tables in one launch; ``pointers`` is ``ops.row_pointers(tables)``."""
    if len(ancestors) and len(pointers):
        fork_rows_kernel[(len(ancestors), len(pointers))](
            pointers, block_sizes, rows, ancestors, first, computed, TILE=ROWS_TILE, num_warps=4, **OPTIONS
        )


def copy_partial_blocks(
    block_sizes: Tensor,
    rows: Tensor,
    ancestors: Tensor,
    computed: Tensor,
    pointers: Tensor,
    segments: Tensor,
    aligned: bool,
) -> None:
    """Copy as ``reference.copy_partial_blocks`` does, all layers in one launch.

    ``segments`` and ``aligned`` are what ``ops.block_segments`` has made of the caches.
    """
    lanes, n_tables, n_segments = len(ancestors), len(pointers), len(segments)
    if not lanes * n_tables * n_segments:
        return
    # Enough programs to fill the device, and no more: most lanes survive and have nothing to do.
    shares = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(ancestors.device), lanes * n_tables)
    shares = min(shares, n_segments)
    copy_partial_blocks_kernel[(lanes * shares, n_tables)](
        segments,
        n_segments,
        pointers,
        block_sizes,
        rows,
        ancestors,
        computed,
        shares,
        WORD=4 if aligned else 1,
        TILE=COPY_TILE if aligned else COPY_TILE // 4,
        num_warps=8,
        **OPTIONS,
    )
