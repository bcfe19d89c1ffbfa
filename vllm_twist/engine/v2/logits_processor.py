"""Who is a lane, and of what kind: the registry of twisted requests under Model Runner V2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from vllm_twist.engine.logit_rows import COLD
from vllm_twist.engine.wire import CONDITION_KEY, LANE_KEY

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class TwistLogitsProcessorV2(LogitsProcessor):
    """Seat the lanes in their request slots as requests enter the batch.

    The logits pass through, but for a constant per row where the temperature is low: temperature, min-p, top-k and
    top-p come after the processors and belong to p0, so the twist meets the logits where the token is drawn
    (``v2.sampler``), which also saves two passes over the vocabulary: one to write the choice into the logits, one to
    find it there.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        # Here, not above: the frontend imports this module as well.
        from vllm_twist.engine.v2.state import SlotTable

        mode = vllm_config.model_config.logprobs_mode
        self.table = SlotTable(req_states.max_num_reqs, req_states.device, logprobs_mode=mode)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        extra = sampling_params.extra_args or {}
        self.table.is_condition[req_idx] = CONDITION_KEY in extra
        spec = extra.get(LANE_KEY)
        if spec is not None:
            eos = sampling_params.eos_token_id
            self.table.add(req_idx, spec, [*(sampling_params.stop_token_ids or ()), *(() if eos is None else (eos,))])
        return spec is not None and spec.temperature < COLD

    def apply_staged_writes(self) -> None:
        self.table.flush()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        # The last processor: what follows, from the temperature on, does not see a constant.
        self.table.centre_cold(logits, ctx.idx_mapping_np)
        return logits
