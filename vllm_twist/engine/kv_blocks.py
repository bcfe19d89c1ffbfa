"""The KV blocks of particle groups: how many they want and hold, whose they are, forks of block tables."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from vllm_twist.engine.admission import shared_again
from vllm_twist.engine.groups import Group


def check_kv_cache(kv_cache_config: Any) -> None:
    """Refuse a model whose particles could not be forked block by block.

    Raises:
        ValueError: it has several KV cache groups, or none of full attention.
    """
    kv_groups = kv_cache_config.kv_cache_groups
    if len(kv_groups) != 1 or type(kv_groups[0].kv_cache_spec) is not FullAttentionSpec:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in kv_groups)
        raise ValueError(
            f"`twist_head` needs a model with one KV cache group of full attention, this one has "
            f"{len(kv_groups)} ({kinds}): where all layers have a sliding window pass `disable_sliding_window`, "
            "which ends the context with the window; where some have leave `disable_hybrid_kv_cache_manager` out; "
            "else use another model."
        )


class GroupBlocks:
    """The lanes' part of vLLM's KV cache manager, whose block tables and pool it works on directly.

    Attributes:
        manager: vLLM's ``KVCacheManager``.
        tables: its block tables by request, of the one KV cache group that there is.
        pool: its blocks.
    """

    def __init__(self, manager: Any, vllm_config: Any) -> None:
        self.manager, self.vllm_config = manager, vllm_config
        self.tables = manager.coordinator.single_type_managers[0]
        self.pool = manager.block_pool
        self.block_size: int = self.tables.block_size

    # ---- counts ---------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def watermark(self) -> int:
        """How many blocks admission leaves free, as vLLM's does."""
        return self.manager.watermark_blocks

    @property
    def num_usable(self) -> int:
        """How many blocks one group can ever get: all but vLLM's null block and the watermark."""
        return self.manager.kv_cache_config.num_blocks - 1 - self.watermark

    def held(self, request_id: str) -> int:
        """Return how many blocks a request holds."""
        return len(self.tables.req_to_blocks.get(request_id, ()))

    def wanted_by(self, request_id: str, num_tokens: int) -> int:
        """Return how many more blocks a request needs for this many tokens."""
        return -(-num_tokens // self.block_size) - self.held(request_id)

    def wanted(self, group: Group) -> int:
        """Return how many more blocks the group needs until each live lane has its next token."""
        block_size = self.block_size
        if not group.forked:
            prompt = group.leader.num_prompt_tokens
            shared = (prompt - 1) // block_size
            total = shared + group.settings.particles * (-(-(prompt + 1) // block_size) - shared)
            return total - len(group.reserve) - self.held(group.id)
        wanted = 0
        again = shared_again(self.vllm_config, group.leader.sampling_params)
        to_compute: set[Any] = set()
        for lane in group.live_lanes():
            request = lane.request
            missing = self.wanted_by(request.request_id, lane.length + 1)
            if again and not self.held(request.request_id):
                # A preempted lane: prefixes that it shares with others will be shared again, but for the last token.
                full = min(len(request.block_hashes), min(again, request.num_tokens - 1) // block_size)
                to_compute.update(request.block_hashes[:full])
                missing -= full
            wanted += missing
        return wanted + len(to_compute)

    # ---- blocks of lanes to come ------------------------------------------------------------

    def reserve(self, group: Group) -> None:
        """Set aside the blocks for the other lanes' copies of the partial prompt block, so that no copy can fail."""
        if (group.leader.num_prompt_tokens - 1) % self.block_size:
            group.reserve = self.pool.get_new_blocks(group.settings.particles - 1)

    def drop_reserve(self, group: Group) -> None:
        """Give back what is still set aside."""
        if group.reserve:
            self.pool.free_blocks(group.reserve)
            group.reserve = []

    def seat(self, group: Group, request: Request) -> None:
        """Give a new lane the leader's full blocks, and a reserved block that will be a copy of its partial one.

        The copy goes through the manager's own copy-on-write list, which the next step runs.
        """
        leader, computed, tables = group.leader, request.num_computed_tokens, self.tables
        if not computed:
            return
        full, partial = divmod(computed, self.block_size)
        leader_blocks = tables.req_to_blocks[leader.request_id]
        blocks = leader_blocks[:full]
        self.pool.touch(blocks)
        if partial:
            source, copy = leader_blocks[full], group.reserve.pop()
            # The manager keeps both ends until the copy has run, then frees each once.
            self.pool.touch([source, copy])
            tables._pending_cow_copies.append((source, copy))
            blocks = [*blocks, copy]
        tables.req_to_blocks[request.request_id] = blocks
        if leader.request_id in tables.num_cached_block:
            tables.num_cached_block[request.request_id] = min(full, tables.num_cached_block[leader.request_id])

    def cancel_copies(self, requests: list[Request]) -> None:
        """Forget copies into these lanes that no step has run yet; they would hold on to their blocks."""
        tables = self.tables
        if not tables._pending_cow_copies:
            return
        own = {id(block) for request in requests for block in tables.req_to_blocks.get(request.request_id, ())}
        pending = tables.take_pending_cow_copies()
        for source, copy in pending:
            if id(copy) in own:
                self.pool.free_blocks([source, copy])
            else:
                tables._pending_cow_copies.append((source, copy))

    # ---- forks ----------------------------------------------------------------------------

    def fork(self, child: Request, parent: Request) -> None:
        """Let the child share the parent's full blocks; its partial block stays its own."""
        tables = self.tables
        # All of its known tokens are in the KV cache now, whatever has been scheduled since. The parent enters
        # the blocks that they fill into the prefix cache, if it has not yet: a block can only be entered once.
        computed = parent.num_tokens
        self.manager.cache_blocks(parent, computed)
        full = computed // self.block_size
        parent_blocks = tables.req_to_blocks[parent.request_id]
        child_blocks = tables.req_to_blocks[child.request_id]
        first = 0
        while first < full and child_blocks[first] is parent_blocks[first]:
            first += 1
        adopted, dropped = parent_blocks[first:full], child_blocks[first:full]
        self.pool.touch(adopted)
        child_blocks[first:full] = adopted
        self.pool.free_blocks(reversed(dropped))
        if parent.request_id in tables.num_cached_block:
            tables.num_cached_block[child.request_id] = tables.num_cached_block[parent.request_id]
