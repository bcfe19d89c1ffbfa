"""Twists under Model Runner V2: where its steps begin and end."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_tp_group

from vllm_twist.engine.processors import ForksV2
from vllm_twist.engine.readout import Readout, Rows
from vllm_twist.engine.v2.fork import Fork
from vllm_twist.engine.v2.logits_processor import TwistLogitsProcessorV2
from vllm_twist.engine.v2.sampler import StepOutputs, TwistSampler
from vllm_twist.twist import TwistHead


class RunnerV2:
    """Connects the head, the registry of lanes, the sampler and the runner of one worker."""

    def __init__(self, runner: Any, head: TwistHead) -> None:
        self.runner = runner
        processor = next(p for p in runner.sampler.logits_processors if isinstance(p, TwistLogitsProcessorV2))
        self.table = processor.table
        self.readout = Readout(runner.get_model(), head, self._find)
        #: Whether the logits of the step under way are yet to be made.
        self.due = False
        forks = ForksV2(
            runner.sampler.logits_processors, runner.req_states, self.table.num_slots, head.config.vocab_size
        )
        self.sampler = runner.sampler = TwistSampler(runner.sampler, self.table, self.readout, forks)
        runner.aux_output_connector = StepOutputs(self.sampler, reports=get_tp_group().is_first_rank)

    def _find(self) -> tuple[Rows, Rows] | None:
        if self.sampler.fork is None:
            return slice(None), None  # no request yet: the runner measures itself
        if not self.due:
            return None
        self.due = False
        found = self.sampler.found
        return None if found is None else slice(None) if found.rows is None else found.rows, self.sampler.conditions

    def begin(self, scheduler_output: Any) -> None:
        """Forget lanes that are no more, before the runner gives their slots away."""
        if self.sampler.fork is None and hasattr(self.runner, "kv_caches"):
            self.sampler.fork = Fork(self.runner, self.table.backend)
        self.table.remove(sorted(scheduler_output.finished_req_ids), ended=True)
        self.table.remove(sorted(scheduler_output.preempted_req_ids or ()))

    def before_sampling(self) -> None:
        """Find the lanes of the batch that has just been run, before its logits are made."""
        state = self.runner.execute_model_state
        if state is not None:
            self.sampler.find_lanes(state.input_batch)
            self.due = True

    def after_sampling(self, output: Any) -> Any:
        """Return the output as it is: the step travels in it."""
        return output
