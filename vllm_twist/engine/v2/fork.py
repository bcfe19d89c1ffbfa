"""Forking on the worker under Model Runner V2: block tables, token rows, partial blocks, penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_twist.engine.v2.state import LaneRows
from vllm_twist.kernels import ops


class Fork:
    """Make dead lanes copies of their parents, on the device, in the stream of the sampler.

    Called between the draw and the runner's own update, when every lane has its n tokens in the KV cache and the
    new one is not yet in its history. The n // block_size full blocks are shared, as the scheduler's mirror will
    record; the partial block, always the child's own, is overwritten with the parent's. Survivors leave
    the kernels at once, and nothing here depends on how many there are.

    Addresses are taken once: the runner allocates block tables, histories and caches for good.
    """

    def __init__(self, runner: Any, backend: str = "auto") -> None:
        states, tables = runner.req_states, runner.block_tables
        self.states, self.backend = states, backend
        self.penalties = runner.sampler.penalties_state
        device = runner.device

        def sizes(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.block_tables = [table.gpu for table in tables.block_tables]
        self.block_sizes = sizes(tables.block_sizes)
        self.block_pointers = ops.row_pointers(self.block_tables)
        # A token history is a table with one token per entry, and so are counts with one per token of the vocabulary.
        self.histories, self.counts = [states.all_token_ids.gpu], [self.penalties.output_bin_counts]
        self.history_pointers, self.count_pointers = ops.row_pointers(self.histories), ops.row_pointers(self.counts)
        self.one, self.zeros = sizes([1]), sizes([0] * len(self.histories[0]))
        self.caches, self.num_blocks = list(runner.kv_caches), runner.kv_cache_config.num_blocks
        self.segments = ops.block_segments(self.caches, self.num_blocks)

    def __call__(self, found: LaneRows, ancestors: Tensor, seq_lens: Tensor) -> None:
        """Fork the lanes ``found`` in the batch, of which lane i becomes a child of ``ancestors[i]``.

        Args:
            found: the L lanes.
            ancestors: int64 [L].
            seq_lens: tokens in the KV cache by row of the batch, int32 [N].
        """
        slots, on = found.slots, {"backend": self.backend}
        computed = seq_lens[: len(slots)] if found.rows is None else seq_lens[found.rows]
        # Blocks from the first one on: lanes back from a preemption may each hold the prompt in blocks of their own.
        # Histories from the prompt's end: it is the same.
        start, first = self.zeros[: len(slots)], self.states.prompt_len.gpu[slots]
        for tables, block_sizes, since, pointers in (
            (self.block_tables, self.block_sizes, start, self.block_pointers),
            (self.histories, self.one, first, self.history_pointers),
        ):
            ops.fork_rows(tables, block_sizes, slots, ancestors, since, computed, pointers=pointers, **on)
        ops.copy_partial_blocks(
            self.caches,
            self.num_blocks,
            self.block_tables,
            self.block_sizes,
            slots,
            ancestors,
            computed,
            pointers=self.block_pointers,
            segments=self.segments,
            **on,
        )
        if self.penalties.use_penalty[found.slots_np].any():
            stop = torch.full_like(computed, self.counts[0].shape[1])
            ops.fork_rows(self.counts, self.one, slots, ancestors, start, stop, pointers=self.count_pointers, **on)
