"""Twists under Model Runner V1: where its steps begin and end."""

from __future__ import annotations

from typing import Any

import torch

from vllm_twist.engine.processors import ForksV1, failure
from vllm_twist.engine.readout import Readout, Rows
from vllm_twist.engine.v1.fork import fork
from vllm_twist.engine.v1.logits_processor import TwistLogitsProcessor
from vllm_twist.engine.v1.sampler import LaneSampler
from vllm_twist.engine.wire import TwistStep
from vllm_twist.twist import TwistHead


class RunnerV1:
    """Connects the head, the logits processor and the runner of one worker."""

    def __init__(self, runner: Any, head: TwistHead) -> None:
        self.runner = runner
        self.processor = next(p for p in runner.input_batch.logitsprocs.all if isinstance(p, TwistLogitsProcessor))
        self.table = self.processor.table
        self.table.warm_up(head.config.vocab_size)
        self.readout = Readout(runner.get_model(), head, self._find)
        #: Whether the logits of the step under way are yet to be made.
        self.due = False
        self.condition_ids: list[str] = []
        rows = runner.input_batch.max_num_reqs
        self.forks = ForksV1(runner.input_batch.logitsprocs.all, rows, runner.input_batch.vocab_size)
        sampler = runner.sampler
        sampler.topk_topp_sampler = LaneSampler(self.table, sampler.topk_topp_sampler)
        sampler.register_forward_pre_hook(self._before_sampler, with_kwargs=True)
        sampler.apply_temperature = self.processor.temper
        self.processor.log_psi_of = self.readout.log_psi
        self.processor.is_partial = lambda row: bool(runner.discard_request_mask.np[row])

    def _before_sampler(self, sampler: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # Trial runs come with metadata of their own.
        here = kwargs["sampling_metadata"].logitsprocs is self.runner.input_batch.logitsprocs
        self.processor.begin(kwargs["logits"] if here else None)

    def _find(self) -> tuple[Rows, Rows] | None:
        if not self.due:
            return None
        self.due = False
        lanes, conditions = self.processor.find_lanes(), self.processor.find_conditions()
        self.condition_ids = list(conditions.values())
        return self._index(lanes), self._index(list(conditions))

    def _index(self, rows: list[int]) -> Rows:
        if len(rows) == self.runner.input_batch.num_reqs:
            return slice(None)
        return torch.tensor(rows, device=self.table.device) if rows else None

    def _fork_processors(self, pairs: list[tuple[str, str]]) -> dict[str, str]:
        """Let the state of custom processors follow; return why it could not, by child."""
        failures: dict[str, str] = {}
        if not self.forks.processors:
            return failures
        requests, row = self.runner.requests, self.runner.input_batch.req_id_to_index
        for child_id, parent_id in pairs:
            child, parent = requests[child_id], requests[parent_id]
            own: dict[int, Any] = {id(parent.output_token_ids): child.output_token_ids}
            if parent.prompt_token_ids is not None:
                own[id(parent.prompt_token_ids)] = child.prompt_token_ids
            try:
                self.forks(row[child_id], row[parent_id], own)
            except Exception as error:  # whatever a user's objects raise ends their request alone
                failures[child_id] = failure(error)
        return failures

    def begin(self, scheduler_output: Any) -> None:
        """Free the state of lanes that are no more."""
        self.due = True
        self.table.release(scheduler_output.finished_req_ids)

    def before_sampling(self) -> None:
        """Do nothing: the logits have been made."""

    def after_sampling(self, output: Any) -> Any:
        """Fork as the step has decided, and attach it to the output."""
        step = self.processor.take_step()
        if self.condition_ids:
            step = step or TwistStep()
            assert self.readout.conditions is not None
            states = self.readout.conditions.cpu().numpy()
            step.conditions = {name: state.tobytes() for name, state in zip(self.condition_ids, states, strict=True)}
            self.condition_ids = []
        if step is not None:
            forks = step.forks()
            if forks:
                fork(self.runner, forks)
                step.failures = self._fork_processors(forks)
            # The one field for a runner's own data; unused unless vLLM's auxiliary outputs are on.
            output.aux_output_connector_output = step
        return output
