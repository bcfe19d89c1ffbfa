"""Forking on the worker under Model Runner V1: block tables, token rows, partial blocks."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace


def fork(runner: Any, pairs: list[tuple[str, str]]) -> None:
    """Make each child lane a copy of its parent, but for the token it has just drawn.

    Runs after the step's bookkeeping, when every lane holds n computed tokens and one new one.
    The n // block_size full blocks are shared, as the scheduler's mirror will record; the partial
    block, always the child's own, is overwritten with the parent's. Parents are survivors, so
    no parent is a child in the same call.

    Args:
        runner: the ``GPUModelRunner``.
        pairs: (child, parent) request ids, all in the batch and of equal length.
    """
    batch = runner.input_batch
    copies: list[KVCacheBlockCopy] = []
    for child_id, parent_id in pairs:
        child, parent = runner.requests[child_id], runner.requests[parent_id]
        row, parent_row = batch.req_id_to_index[child_id], batch.req_id_to_index[parent_id]
        computed = child.num_tokens - 1
        start = child.num_prompt_tokens
        batch.token_ids_cpu[row, start:computed] = batch.token_ids_cpu[parent_row, start:computed]
        # In place: the sampler's penalties and the logits processors hold references to the list.
        child.output_token_ids[:-1] = parent.output_token_ids[:-1]
        for kv_group, table in enumerate(batch.block_table.block_tables):
            full, rest = divmod(computed, table.block_size)
            child.block_ids[kv_group][:full] = parent.block_ids[kv_group][:full]
            block_table = table.get_numpy_array()
            block_table[row, :full] = block_table[parent_row, :full]
            if rest:
                copies.append(
                    KVCacheBlockCopy(
                        src_block_id=parent.block_ids[kv_group][full],
                        dst_block_id=child.block_ids[kv_group][full],
                    )
                )
    copy_kv_cache_blocks_inplace(runner.kv_caches, runner.kv_cache_config.num_blocks, copies)
