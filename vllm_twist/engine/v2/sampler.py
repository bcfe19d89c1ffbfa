"""The step inside vLLM's sampler (Model Runner V2), and its way back to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twist.engine.processors import ForksV2
from vllm_twist.engine.readout import Readout
from vllm_twist.engine.v2.fork import Fork
from vllm_twist.engine.v2.state import Drawn, LaneRows, SlotTable
from vllm_twist.engine.wire import TwistStep
from vllm_twist.kernels import ops
from vllm_twist.kernels.reference import Report


class TwistSampler(Sampler):
    """vLLM's sampler, which draws the lanes' tokens from the twisted law and forks them.

    Everything up to the draw is vLLM's: bias, penalties, bad words, temperature, min-p, top-k and top-p make p0 of
    every row. Plain rows are then drawn by vLLM, from logits that nothing here has written to.
    """

    def __init__(self, sampler: Sampler, table: SlotTable, readout: Readout, fork_processors: ForksV2) -> None:
        # Takes over the sampler that the runner has built, with all its state.
        self.__dict__.update(vars(sampler))
        self.table, self.readout, self.fork_processors = table, readout, fork_processors
        self.fork: Fork | None = None
        self.found: LaneRows | None = None
        self.drawn: Drawn | None = None
        #: Rows whose hidden states are conditions [C], and the same on the host.
        self.conditions: Tensor | None = None
        self.conditions_np: np.ndarray = np.empty(0, dtype=np.int64)

    def find_lanes(self, input_batch: InputBatch) -> None:
        """Look up the lanes of a batch before its logits are made; unfinished prefills are none yet."""
        partial = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens < input_batch.prefill_len_np
        self.drawn = None
        self.found = self.table.find(input_batch.idx_mapping, input_batch.idx_mapping_np, partial)
        self.conditions_np = self.table.find_conditions(input_batch.idx_mapping_np, partial)
        self.conditions = None
        if len(self.conditions_np):
            self.conditions = async_tensor_h2d(self.conditions_np, self.table.device, torch.int64)

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        if self.fork is None:
            self.found = self.drawn = None
            self._rehearse(logits)
        self.table.raw = logits
        output = super().__call__(logits, input_batch)
        self.table.raw = None
        if self.drawn is not None and self.table.forks:
            assert self.found is not None and self.fork is not None, "lanes before the KV cache was set up"
            self.fork(self.found, self.drawn.ancestors, input_batch.seq_lens)
            self.fork_processors(self.found.slots, self.drawn.ancestors)
        return output

    def _rehearse(self, logits: Tensor) -> None:
        """Pass over the vocabulary as a step does, for nothing: vLLM is measuring memory, or warming kernels up.

        It sizes the KV cache by what such runs take, which must include the values of the head.
        """
        # Any condition will do: the hidden states themselves.
        condition = self.readout.hidden if self.readout.head.config.conditional else None
        keys = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        # A large batch may keep the head's values in factors; smaller ones write them out, and count too.
        for log_psi in (self.readout.log_psi(condition), self.readout.factors(condition, self.table.backend)):
            if log_psi is not None:
                lse0, _ = ops.twist_softmax(logits, log_psi, backend=self.table.backend)
                ops.twist_sample(logits, log_psi, lse0, None, keys, backend=self.table.backend)

    def _sample_random(
        self,
        processed_logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        pos: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        *flags: bool,
    ) -> tuple[Tensor, Tensor]:
        # 0.33 has a flag for the truncation; the last one asks for a sampler that truncates itself.
        found = self.found
        if found is None:
            return super()._sample_random(
                processed_logits, expanded_idx_mapping, idx_mapping_np, pos, top_k, top_p, *flags
            )
        processed_logits = apply_top_k_top_p(processed_logits, top_k, top_p, *flags[:-1])
        log_psi = self.readout.twist(self.table.conditions_of(found), self.table.backend)
        self.drawn = self.table.step(processed_logits, found, log_psi)
        if found.rows is None:
            return self.drawn.token, processed_logits
        sampled = torch.empty_like(expanded_idx_mapping, dtype=torch.int64)
        plain_np = np.delete(np.arange(len(idx_mapping_np)), found.rows_np)
        plain = async_tensor_h2d(plain_np, sampled.device)
        sampled[plain], _ = super()._sample_random(
            processed_logits[plain],
            expanded_idx_mapping[plain],
            idx_mapping_np[plain_np],
            pos[plain],
            None,
            None,
            *(False for _ in flags),
        )
        sampled[found.rows] = self.drawn.token
        return sampled, processed_logits


class StepOutputs:
    """Send each step's report along with the runner's asynchronous output.

    Stands where the runner keeps the connector of its auxiliary outputs, which rides that copy too.
    """

    def __init__(self, sampler: TwistSampler, reports: bool) -> None:
        self.sampler, self.reports = sampler, reports

    def begin_step(self, metadata: Any) -> None:
        """Do nothing: a step's lanes are known from its batch."""

    def prepare_output(self, input_batch: InputBatch) -> StepOutput | None:
        if not self.reports:
            return None
        drawn, found, rows = self.sampler.drawn, self.sampler.found, self.sampler.conditions_np
        conditions = [input_batch.req_ids[row] for row in rows], self.sampler.readout.conditions
        if drawn is None or found is None:
            return StepOutput(input_batch.req_ids, *conditions) if len(rows) else None
        wanted = self.sampler.table.num_logprobs(found)[drawn.wanted]
        return StepOutput(input_batch.req_ids, *conditions, found, drawn, wanted)

    def close(self) -> None:
        """Do nothing: no resource is held."""


@dataclass
class StepOutput:
    """One step on its way to the host."""

    req_ids: list[str]
    condition_ids: list[str]
    conditions: Tensor | None
    found: LaneRows | None = None
    drawn: Drawn | None = None
    num_logprobs: np.ndarray | None = None
    report: np.ndarray | None = None
    logprobs: tuple[np.ndarray, ...] = ()
    states: np.ndarray | None = None

    def enqueue_cpu_copy(self, num_sampled: np.ndarray, num_rejected: np.ndarray) -> None:
        """Enqueue the copies; called by the runner on its output stream."""
        if self.conditions is not None:
            self.states = async_copy_to_np(self.conditions)
        if self.drawn is None:
            return
        self.report = async_copy_to_np(self.drawn.report)
        if self.drawn.logprobs is not None:
            self.logprobs = tuple(async_copy_to_np(x) for x in self.drawn.logprobs)

    def process_output(self) -> TwistStep:
        """Return the step, once the copies are done."""
        conditions = {}
        if self.states is not None:
            conditions = {name: s.tobytes() for name, s in zip(self.condition_ids, self.states, strict=True)}
        if self.drawn is None:
            return TwistStep(conditions=conditions)
        assert self.report is not None and self.found is not None and self.num_logprobs is not None
        report = Report(*self.report)
        lane_ids = [self.req_ids[row] for row in self.found.rows_np]
        logprobs = {}
        if self.logprobs:
            ids, values, ranks = (x.tolist() for x in self.logprobs)
            for i, (lane, count) in enumerate(zip(self.drawn.wanted, self.num_logprobs, strict=True)):
                logprobs[lane_ids[lane]] = ids[i][: count + 1], values[i][: count + 1], ranks[i]
        return TwistStep(
            lane_ids=lane_ids,
            ancestors=report.ancestors.astype(np.int64).tolist(),
            log_w=report.log_w.tolist(),
            log_p=report.log_p.tolist(),
            log_psi=report.log_psi.tolist(),
            resampled=(report.resampled != 0).tolist(),
            log_z=report.log_z.tolist(),
            num_resamplings=report.num_resamplings.astype(np.int64).tolist(),
            conditions=conditions,
            logprobs=logprobs,
        )
