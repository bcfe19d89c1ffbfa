"""The step inside vLLM's sampler (Model Runner V1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.config import CompilationMode, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from vllm_twist.engine.logit_rows import COLD, centre
from vllm_twist.engine.v1.state import LaneTable
from vllm_twist.engine.wire import CONDITION_KEY, LANE_KEY, LaneSpec, TwistStep


def _lane_spec(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> LaneSpec | None:
    return (params.extra_args or {}).get(LANE_KEY)


def _condition_id(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> str | None:
    return (params.extra_args or {}).get(CONDITION_KEY)


class TwistLogitsProcessor(LogitsProcessor):
    """Draw the tokens of all lanes in the batch and leave every other row alone.

    The worker attaches ``log_psi_of`` (log twist values of the lanes found last, given their conditions) and
    ``is_partial`` (whether a row belongs to an unfinished prefill, whose logits mean nothing), and takes
    ``last_step``. ``conditions`` are requests that compute a condition: their ids by row.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        compilation = vllm_config.compilation_config
        # As vLLM compiles the model on a CPU; a GPU has kernels.
        compiles = compilation.mode != CompilationMode.NONE and compilation.backend == "inductor"
        mode = vllm_config.model_config.logprobs_mode
        self.table = LaneTable(device, apply_top_k_top_p, compiles and device.type == "cpu", mode)
        self.specs: dict[int, LaneSpec] = {}
        self.rows: list[int] = []
        self.found: list[int] = []
        self.conditions: dict[int, str] = {}
        self.log_psi_of: Callable[[Tensor | None], Tensor] | None = None
        self.is_partial: Callable[[int], bool] = lambda row: False
        self.last_step: TwistStep | None = None
        #: The model's logits of the lanes that ask for logprobs, where these are the raw ones.
        self.raw: Tensor | None = None
        self.cold: list[int] = []
        self.offsets: Tensor | None = None
        self.sampling = False

    def is_argmax_invariant(self) -> bool:
        """Ask to run after temperature, penalties and min-p, which all belong to p0.

        vLLM skips such processors only in all-greedy batches, in which no lane can be.
        """
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if process_dict_updates(self.specs, batch_update, _lane_spec):
            self.rows = sorted(self.specs)
            for spec in self.specs.values():
                self.table.add(spec)
            self.cold = [row for row in self.rows if self.specs[row].temperature < COLD]
        process_dict_updates(self.conditions, batch_update, _condition_id)

    def find_lanes(self) -> list[int]:
        """Return the rows of the lanes that draw in the batch whose logits are about to be made."""
        self.found = [row for row in self.rows if not self.is_partial(row)]
        return self.found

    def find_conditions(self) -> dict[int, str]:
        """Return the ids, by row, of the requests of that batch whose last hidden state is a condition."""
        return {row: name for row, name in self.conditions.items() if not self.is_partial(row)}

    def begin(self, logits: Tensor | None) -> None:
        """Keep what is needed of a batch's logits before anything is done to them; None is a trial run."""
        self.raw = self.offsets = None
        self.sampling = logits is not None
        if logits is not None and self.table.logprobs_mode.startswith("raw"):
            rows = [row for row in self.found if self.specs[row].num_logprobs is not None]
            self.raw = logits[rows].to(torch.float32) if rows else None

    def temper(self, logits: Tensor, temp: Tensor, all_random: bool) -> Tensor:
        """Divide by the temperature, in place, as vLLM's sampler does, after the low ones' rows are centred."""
        if self.sampling and self.cold:
            rows = torch.tensor(self.cold, device=logits.device)
            peak = centre(logits, rows)[:, 0]
            self.offsets = logits.new_zeros(len(logits)).index_copy_(0, rows, peak / temp[rows])
        return Sampler.apply_temperature(logits, temp, all_random)

    def apply(self, logits: Tensor) -> Tensor:
        self.last_step = None
        if self.found and self.log_psi_of is not None:
            specs = [self.specs[row] for row in self.found]
            log_psi = self.log_psi_of(self.table.conditions(self.found, specs))
            self.last_step = self.table.step(logits, self.found, specs, log_psi, self.raw, self.offsets)
        return logits

    def take_step(self) -> TwistStep | None:
        """Return what the last step did, once."""
        step, self.last_step = self.last_step, None
        return step
