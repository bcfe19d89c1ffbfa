"""vLLM's draw, left out where the step has drawn every token (Model Runner V1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from vllm_twist.engine.v1.state import LaneTable


class LaneSampler(nn.Module):
    """Stands where vLLM truncates and draws; hands on what the step has drawn if the batch held lanes alone."""

    def __init__(self, table: LaneTable, sampler: TopKTopPSampler) -> None:
        super().__init__()
        self.table = table
        self.sampler = sampler

    def forward(
        self, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # Such a batch has no request whose processed logprobs vLLM would want: those of lanes come with the step.
        drawn = self.table.take_drawn()
        return self.sampler(logits, generators, k, p) if drawn is None else (drawn, None)
