"""Particle groups in vLLM's scheduler: gang admission, lockstep, forks, withheld outputs."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_twist.config import RequestConfig
from vllm_twist.engine import stop_strings
from vllm_twist.engine.admission import (
    check_pinned,
    fit_length,
    neutral_params,
    read_config,
    shared_again,
)
from vllm_twist.engine.groups import Group, Lane, log_sum_exp
from vllm_twist.engine.kv_blocks import GroupBlocks, check_kv_cache
from vllm_twist.engine.scoring import Scorer, read_potential
from vllm_twist.engine.versions import error_fields
from vllm_twist.engine.wire import CONDITION_KEY, GROUP_KEY, LANE_KEY, LaneSpec, TwistStep
from vllm_twist.kernels.schemes import SCHEMES
from vllm_twist.results import RESULT_KEY

logger = init_logger(__name__)

GONE_WRONG = (
    "the twist gave weights that are NaN, infinite or all zero: check the head (`twist_head`) and "
    "`twist_scale`, and that the request's own restrictions leave some token possible."
)
IMPOSSIBLE = (
    "`twist_pinned` holds a continuation that the model and the request's own sampling parameters give "
    "probability zero, or the twist or the potential weight zero: pass one that was drawn with the same parameters."
)
NOTHING_LEFT = (
    "`twist_potential` gave all of its particles phi = 0, so that none can be drawn (Z-hat is 0): raise "
    "`twist_particles`, train the twist, or let phi be small instead of 0."
)
#: Seconds for which the engine sleeps at a time while nothing but the potential is at work.
IDLE_WAIT = 0.01


if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class TwistSchedulerMixin(_Base):
    """Runs particle groups on top of a vLLM scheduler, through its own queues and KV manager.

    A twisted request enters as one lane, the leader. When its prompt has been computed the other
    lanes are created from the leader's KV blocks and join through the path for waiting requests
    that already hold KV. From then on every lane is an ordinary request to the base scheduler;
    this class decides when a group may enter, keeps its lanes in step, applies the worker's forks
    to tokens and block tables, and turns the lanes' outputs into one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_kv_cache(self.kv_cache_config)
        self.blocks = GroupBlocks(self.kv_cache_manager, self.vllm_config)
        #: Twisted requests by the client's request id, from arrival to their one output.
        self.groups: dict[str, Group] = {}
        #: The group of every lane that the base scheduler knows.
        self.group_of: dict[str, Group] = {}
        #: Requests not yet handed to the base scheduler; a group is represented by its leader.
        self.staged = create_request_queue(self.policy)
        #: Requests that compute a condition, by id, with the group that waits for it; None once it has it.
        self.reading: dict[str, Group | None] = {}
        #: Final outputs made between steps.
        self.ready: list[tuple[int, EngineCoreOutput]] = []
        #: Evaluates phi for groups whose particles have all ended; they are no longer in ``groups``.
        self.scorer: Scorer | None = None
        #: Seeds of groups that come with none.
        rank = self.vllm_config.parallel_config.data_parallel_index
        self.seeds = random.Random(f"groups {self.vllm_config.model_config.seed} {rank}")
        config = read_config(self.vllm_config)
        if config.potential is not None:
            self.scorer = Scorer(read_potential(config.potential, self._tokenizer()), config.potential_timeout)

    def _tokenizer(self) -> Any:
        return cached_tokenizer_from_config(self.vllm_config.model_config)

    # ---- entering -------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        fields = (params.extra_args or {}).get(GROUP_KEY) if params is not None else None
        if fields is not None:
            self._add_group(request, fields)
        elif self.groups and not request.resumable and request.request_id not in self.requests:
            self._record_queued(request)
            self.staged.add_request(request)
        else:
            super().add_request(request)

    def _record_queued(self, request: Request) -> None:
        if self.log_stats:
            request.record_event(EngineCoreEventType.QUEUED)

    def _add_group(self, request: Request, fields: dict[str, Any]) -> None:
        self._record_queued(request)
        assert request.sampling_params is not None
        first, own = fields["seed"], request.sampling_params.seed
        settings = RequestConfig(**{name: value for name, value in fields.items() if name != "seed"})
        if own is None:
            seed = self.seeds.getrandbits(62)
        elif own == first:
            seed = own % 2**62
        else:  # another of a request's n groups; it must not be that of a request with the next seed
            seed = random.Random(f"group {own - first} of {first}").getrandbits(62)
        group = Group(leader=request, settings=settings, seed=seed)
        try:
            length = fit_length(
                request.num_prompt_tokens,
                request.max_tokens,
                settings.particles,
                max_model_len=self.max_model_len,
                block_size=self.blocks.block_size,
                num_blocks=self.blocks.num_usable,
                share_prompt=request.num_prompt_tokens <= shared_again(self.vllm_config, request.sampling_params),
            )
            request.max_tokens = group.last_position = length - request.num_prompt_tokens
            detector = stop_strings.detector_for(self._tokenizer(), request) if request.sampling_params.stop else None
            if settings.pinned is not None:
                vocab_size = self.vllm_config.model_config.get_vocab_size()
                text = stop_strings.fork(detector)
                check_pinned(settings.pinned, request.sampling_params, group.last_position, vocab_size, text)
        except ValueError as error:
            # Refused at the frontend already, unless its view of the cache was too rosy.
            self.ready.append(self._failure(group, str(error)))
            return
        request.sampling_params = self._leader_params(group, request.sampling_params)
        group.lanes[group.id] = Lane(request, detector=detector)
        self.groups[group.id] = group
        self.requests[group.id] = request
        if settings.condition is None:
            self.staged.add_request(request)
        else:
            self._read_condition(group, settings.condition)

    def _read_condition(self, group: Group, condition: tuple[int, ...]) -> None:
        """Let a plain request compute o_T; the group is staged when the worker sends back its last hidden state."""
        request_id = _condition_id(group)
        # Greedy: it must take nothing from the generator that unseeded requests share.
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=group.leader.skip_reading_prefix_cache,
            extra_args={CONDITION_KEY: request_id},
        )
        self.reading[request_id] = group
        self.staged.add_request(
            _request_of(group, request_id, list(condition), params, block_hasher=group.leader._block_hasher)
        )

    def _take_conditions(self, step: TwistStep) -> None:
        for request_id, state in step.conditions.items():
            group = self.reading.get(request_id)
            if group is not None:
                self.reading[request_id] = None
                extra = group.leader.sampling_params.extra_args
                extra[LANE_KEY] = dataclasses.replace(extra[LANE_KEY], condition=state)
                self.staged.add_request(group.leader)

    def _leader_params(self, group: Group, params: Any) -> Any:
        """Return the leader's sampling parameters: what draws its tokens moves into its spec.

        Under Model Runner V2 vLLM's sampler truncates p0, and divides by the temperature only where
        something after it needs that; where nothing does, the step does it in passing.
        """
        v2 = self.use_v2_model_runner
        # A k beyond the vocabulary takes nothing away; the function that truncates would fail.
        top_k = params.top_k if params.top_k < self.vllm_config.model_config.get_vocab_size() else 0
        whole = params.min_p == 0 and top_k <= 0 and params.top_p >= 1
        spec = LaneSpec(
            lane_id=group.id,
            group_id=group.id,
            index=0,
            seed=group.seed,
            particles=group.settings.particles,
            last_position=group.last_position,
            ess_threshold=group.settings.ess_threshold,
            scheme=SCHEMES.index(group.settings.resampling),
            scale=group.settings.scale,
            base_proposal=group.settings.proposal == "base",
            pinned=group.settings.pinned,
            top_k=0 if v2 else top_k,
            top_p=1.0 if v2 else params.top_p,
            num_logprobs=self._num_logprobs(params),
            inverse_temperature=1 / params.temperature if v2 and whole else 1.0,
            temperature=params.temperature,
        )
        neutral = neutral_params(params, {LANE_KEY: spec}, truncated=v2)
        if v2 and whole:
            neutral.temperature = 1.0
        return neutral

    def _lane_params(self, group: Group, index: int) -> Any:
        """Return the leader's sampling parameters for another of its lanes."""
        leader = group.leader.sampling_params
        spec = dataclasses.replace(leader.extra_args[LANE_KEY], lane_id=group.lane_id(index), index=index, pinned=None)
        return neutral_params(leader, {LANE_KEY: spec}, truncated=self.use_v2_model_runner)

    def _num_logprobs(self, params: Any) -> int | None:
        if params.logprobs == -1:
            return self.vllm_config.model_config.get_vocab_size()
        return params.logprobs

    # ---- one step -------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.staged and self._pause_state == PauseState.UNPAUSED:
            self._admit()
        if self.groups:
            if self._pause_state == PauseState.PAUSED_NEW:
                self._let_lanes_drain()
            self._make_room()
            self._keep_lanes_back()
            self._brief_lanes()
        if self.scorer and not (self.staged or any(super().get_request_counts())):
            # Nothing to run until phi is known. New requests wait that long at most.
            self._take_scores(wait=IDLE_WAIT)
        return super().schedule(throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step = model_runner_output.aux_output_connector_output
        if isinstance(step, TwistStep):
            self._take_conditions(step)
            self._mirror(step)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.scorer:
            self._take_scores()
        if self.groups or self.ready or self.reading:
            self._collect(outputs)
        return outputs

    # ---- gang admission -------------------------------------------------------------------

    def _active_groups(self) -> list[Group]:
        return [group for group in self.groups.values() if not group.parked]

    def _slots_in_use(self) -> int:
        """Return the batch slots taken or promised: requests inside, and lanes still to come."""
        inside = len(self.running) + len(self.waiting) + len(self.kv_holding_waiting)
        return inside + sum(group.settings.particles - len(group.lanes) for group in self._active_groups())

    def _admit(self) -> None:
        """Hand staged requests to the base scheduler, first come first served.

        A group enters only when all its lanes fit, in slots and in blocks, and nobody overtakes
        it meanwhile: leaders filling every slot would block each other for ever.
        """
        capacity = min(self.max_num_running_reqs, self.max_num_active_reqs)
        while self.staged:
            request = self.staged.peek_request()
            group = self.groups.get(request.request_id)
            gang = bool(self._active_groups()) or group is not None
            slots = group.num_live if group is not None else 1
            if gang and self._slots_in_use() + slots > capacity:
                return
            if group is not None:
                free = self.blocks.num_free - sum(max(0, self.blocks.wanted(other)) for other in self._active_groups())
                if self.blocks.wanted(group) + self.blocks.watermark > free:
                    return
            self.staged.pop_request()
            if group is None:
                super().add_request(request)
                if self.log_stats:
                    request.events.pop()  # its second QUEUED: it has waited since it was staged
            else:
                self._enter(group)

    def _enter(self, group: Group) -> None:
        group.parked = False
        group.entering = True
        if not group.forked:
            self.blocks.reserve(group)
        for lane in group.live_lanes():
            self.group_of[lane.request.request_id] = group
            self.requests[lane.request.request_id] = lane.request
            self._enqueue_waiting_request(lane.request)

    # ---- whole-group preemption -----------------------------------------------------------

    def _make_room(self) -> None:
        """Preempt whole groups (or plain requests) until this step's blocks are there.

        Done before the base scheduler finds itself short, which would pick single lanes. The
        oldest one is never preempted: alone it fits, as was checked when it came.
        """
        inside = len(self.running) + len(self.waiting) + len(self.kv_holding_waiting)
        # However the step's tokens are shared out, a request needs a block per block_size of them, and one begun.
        most = self.max_num_scheduled_tokens // self.blocks.block_size + inside
        if most <= self.blocks.num_free:
            return  # plenty; spares the count on most steps
        while self._blocks_short() > 0:
            units: list[Group | Request] = [group for group in self._active_groups() if self._is_running(group)]
            units += [request for request in self.running if request.request_id not in self.group_of]
            if len(units) < 2:
                return
            victim = max(units, key=self._rank)
            if isinstance(victim, Group):
                self._park(victim)
            else:
                self.running.remove(victim)
                self._preempt_request(victim, time.monotonic())

    def _rank(self, unit: Group | Request) -> tuple[Any, ...]:
        request = unit.leader if isinstance(unit, Group) else unit
        urgency = request.priority if self.policy == SchedulingPolicy.PRIORITY else 0
        return urgency, request.arrival_time, request.request_id

    def _is_running(self, group: Group) -> bool:
        return any(self.blocks.held(lane.request.request_id) for lane in group.live_lanes())

    def _blocks_short(self) -> int:
        wanted = sum(max(0, self.blocks.wanted(group)) for group in self._active_groups())
        for request in self.running:
            if request.request_id not in self.group_of:
                ahead = request.num_computed_tokens + self.max_num_scheduled_tokens
                tokens = min(request.num_tokens_with_spec + request.num_output_placeholders, ahead)
                wanted += max(0, self.blocks.wanted_by(request.request_id, tokens))
        return wanted - self.blocks.num_free

    def _park(self, group: Group) -> None:
        """Take a group out of the engine, KV and all; its tokens and weights stay."""
        now = time.monotonic()
        requests = [lane.request for lane in group.live_lanes()]
        self.blocks.cancel_copies(requests)
        for request in requests:
            if request.status == RequestStatus.RUNNING:
                self.running.remove(request)
                self._preempt_request(request, now, drop_stale_output=True)
            elif request.num_computed_tokens:
                self.kv_cache_manager.free(request)
                request.num_computed_tokens = 0
            self.group_of.pop(request.request_id, None)
        self.waiting.remove_requests(requests)
        self.kv_holding_waiting.remove_requests(requests)
        self.deferred_waiting.difference_update(requests)
        self.blocks.drop_reserve(group)
        group.parked = True
        self.staged.prepend_request(group.leader)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            for group in sorted(self._active_groups(), key=self._rank, reverse=True):
                self._park(group)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _let_lanes_drain(self) -> None:
        """Let lanes without KV in, while the engine waits for what is under way, if others of their group go on.

        They are those of a prompt of one token, and those that were preempted alone; of the requests that wait the
        base scheduler then takes only such as hold KV, and their group would wait for them for ever.
        """
        going = {request.request_id for request in self.running}
        for group in self._active_groups():
            lanes = [lane.request for lane in group.live_lanes() if lane.request.request_id not in going]
            if lanes and len(lanes) < sum(lane.live for lane in group.lanes.values()):
                self.waiting.remove_requests(lanes)
                self.kv_holding_waiting.remove_requests(lanes)
                for request in lanes:
                    self.kv_holding_waiting.add_request(request)

    # ---- lockstep -------------------------------------------------------------------------

    def _keep_lanes_back(self) -> None:
        """Keep lanes that are a token ahead of their group out of the next batch; so is a leader before its fork."""
        for group in self._active_groups():
            if any(lane.detector and lane.request.num_output_placeholders for lane in group.live_lanes()):
                # Whether its text ends is known when the token is: until then nobody goes on.
                for lane in group.live_lanes():
                    lane.request.next_decode_eligible_step = self.current_step + 2
                continue
            lengths = [lane.length for lane in group.live_lanes()]
            slowest = min(lengths) if group.forked else group.leader.num_prompt_tokens
            if max(lengths) == slowest:
                continue
            for lane in group.live_lanes():
                if lane.length > slowest:
                    lane.request.next_decode_eligible_step = self.current_step + 2

    def _brief_lanes(self) -> None:
        """Tell lanes that are about to be sent to the worker how many they are, and their state."""
        for group in self._active_groups():
            if not group.entering:
                continue
            waiting = [lane for lane in group.live_lanes() if lane.request.status != RequestStatus.RUNNING]
            group.entering = bool(waiting) or not group.forked
            log_w_ended = log_sum_exp([lane.log_w for lane in group.lanes.values() if not lane.live])
            for lane in waiting:
                extra = lane.request.sampling_params.extra_args
                extra[LANE_KEY] = dataclasses.replace(
                    extra[LANE_KEY],
                    group_size=group.num_live,
                    log_w_ended=log_w_ended,
                    num_resamplings=group.num_resamplings,
                    log_w=lane.log_w,
                    log_p=lane.log_p,
                    log_psi=lane.log_psi,
                    position=lane.request.num_output_tokens,
                )

    # ---- mirroring the worker -------------------------------------------------------------

    def _mirror(self, step: TwistStep) -> None:
        """Apply what the worker did to the lanes before the base scheduler appends the tokens.

        Under asynchronous scheduling that was one step ago. Lanes that have gone since are skipped, and
        so are those that were preempted, even if they are back: they do that step again.
        """
        touched = {
            lane_id: group
            for lane_id in step.lane_ids
            if (group := self.group_of.get(lane_id)) is not None
            and not group.lanes[lane_id].request.num_stale_output_tokens
        }
        self._mirror_forks(step, touched)
        self._mirror_weights(step, touched)
        failed = self._why_failed(step, touched)
        for group in {group.id: group for group in touched.values()}.values():
            if not group.forked:
                self._create_lanes(group)
        for group_id, reason in failed.items():
            self._fail(self.groups[group_id], reason)

    def _mirror_forks(self, step: TwistStep, touched: dict[str, Group]) -> None:
        """Give every replaced lane its parent's tokens, blocks, logprobs and text."""
        forks = [(child, parent) for child, parent in step.forks() if child in touched]
        # Read before the forks: a parent's history may be copied more than once.
        history = {parent: list(touched[parent].lanes[parent].logprobs) for _, parent in forks}
        for child, parent in forks:
            lanes = touched[child].lanes
            self._fork(lanes[child].request, lanes[parent].request)
            lanes[child].logprobs = list(history[parent])
            lanes[child].detector = stop_strings.fork(lanes[parent].detector)

    def _mirror_weights(self, step: TwistStep, touched: dict[str, Group]) -> None:
        """Take over the lanes' state and that of their groups."""
        resampled: dict[str, Group] = {}
        for i, lane_id in enumerate(step.lane_ids):
            group = touched.get(lane_id)
            if group is None:
                continue
            lane = group.lanes[lane_id]
            lane.log_w, lane.log_p, lane.log_psi = step.log_w[i], step.log_p[i], step.log_psi[i]
            if lane_id in step.logprobs:
                lane.logprobs.append(step.logprobs[lane_id])
            if step.log_z is not None and step.num_resamplings is not None:
                group.log_z, group.num_resamplings = step.log_z[i], step.num_resamplings[i]
            elif step.resampled[i]:
                resampled[group.id] = group
            if group.settings.trace:
                index = {lane: k for k, lane in enumerate(group.lanes)}
                ancestor = index[step.lane_ids[step.ancestors[i]]]
                position = lane.request.num_output_tokens + 1
                group.record(index[lane_id], position, ancestor, lane.log_w, step.resampled[i])
        for group in resampled.values():
            group.num_resamplings += 1

    def _why_failed(self, step: TwistStep, touched: dict[str, Group]) -> dict[str, str]:
        """Return why groups cannot go on, by id: the first reason found, for a group can have several."""
        failed = {group.id: why for lane_id, why in step.failures.items() if (group := touched.get(lane_id))}
        for lane_id, group in touched.items():
            log_w = group.lanes[lane_id].log_w
            if math.isnan(log_w) or log_w == math.inf:
                failed.setdefault(group.id, GONE_WRONG)
        for group in touched.values():
            if not group.forked:
                continue
            # All of them: lanes of weight zero are no failure while others, ended ones too, have some.
            if group.is_weightless:
                failed.setdefault(group.id, GONE_WRONG)
            elif group.pinned_is_impossible:
                failed.setdefault(group.id, IMPOSSIBLE)
        return failed

    def _fork(self, child: Request, parent: Request) -> None:
        """Give the child the parent's tokens and blocks."""
        child._output_token_ids[:] = parent._output_token_ids
        child._all_token_ids[:] = parent._all_token_ids
        child.block_hashes[:] = parent.block_hashes
        self.blocks.fork(child, parent)

    def _create_lanes(self, group: Group) -> None:
        """Create the other lanes from the leader, whose prompt has just been computed.

        They start from its KV blocks of the first P-1 tokens, and recompute the prompt's last one for its logits.
        """
        leader = group.leader
        for index in range(1, group.settings.particles):
            lane_id = group.lane_id(index)
            # Its hashes are the leader's: no hasher yet, which would find them anew.
            request = _request_of(group, lane_id, leader.prompt_token_ids, self._lane_params(group, index))
            request.max_tokens = leader.max_tokens
            request._block_hasher = leader._block_hasher
            request.block_hashes = list(leader.block_hashes)
            request.prefill_stats = None
            request.num_computed_tokens = leader.num_prompt_tokens - 1
            self.blocks.seat(group, request)
            group.lanes[lane_id] = Lane(request, detector=stop_strings.fork(group.lanes[group.id].detector))
            group.entering = True
            self.group_of[lane_id] = group
            self.requests[lane_id] = request
            self._enqueue_waiting_request(request)

    # ---- leaving --------------------------------------------------------------------------

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """End a particle also where its text first contains a stop string."""
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        group = self.group_of.get(request.request_id)
        detector = None if group is None else group.lanes[request.request_id].detector
        if detector is not None:
            found = detector.update(new_token_ids, request.status == RequestStatus.FINISHED_STOPPED)
            if found is not None:
                request.status, request.stop_reason, stopped = RequestStatus.FINISHED_STOPPED, found, True
        return new_token_ids, stopped

    def _collect(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Withhold the lanes' outputs; emit a group's one output when its last particle ends."""
        touched: dict[str, Group] = {}
        #: The lane of each that has its group's events: the first that is left.
        reporter: dict[str, str] = {}
        for batch in outputs.values():
            kept = []
            for output in batch.outputs:
                if output.request_id in self.reading:
                    if output.finish_reason is not None:
                        del self.reading[output.request_id]
                        (batch.finished_requests or set()).discard(output.request_id)
                    continue
                group = self.group_of.get(output.request_id)
                if group is None:
                    kept.append(output)
                    continue
                if group.id not in touched:
                    touched[group.id] = group
                    reporter[group.id] = next(group.live_lanes()).request.request_id
                group.prefill_stats = output.prefill_stats or group.prefill_stats
                if output.request_id == reporter[group.id]:
                    group.events.extend(output.events or ())
                if output.finish_reason is not None:
                    self._end_lane(group, output)
                    # To the client only the group finishes, when its output goes out.
                    (batch.finished_requests or set()).discard(output.request_id)
            batch.outputs = kept
        for group in touched.values():
            if group.done:
                del self.groups[group.id]
                if self.scorer is None:
                    self._finish_group(group)
                else:
                    self.scorer.submit(group)
        for client_index, output in self.ready:
            batch = outputs.setdefault(client_index, EngineCoreOutputs())
            batch.outputs.append(output)
            if self.finished_req_ids_dict is not None:
                batch.finished_requests = {*(batch.finished_requests or ()), output.request_id}
        self.ready.clear()

    def _end_lane(self, group: Group, output: EngineCoreOutput) -> None:
        lane = group.lanes[output.request_id]
        lane.finish_reason = output.finish_reason
        lane.stop_reason = output.stop_reason
        lane.stopped = output.finish_reason != FinishReason.LENGTH
        del self.group_of[output.request_id]

    def _finish_group(self, group: Group) -> None:
        index = group.draw()
        lane = list(group.lanes.values())[index]
        # vLLM looks for stop strings in the frontend, but not in the last token of an output that "stop" ends.
        by_string = lane.detector is not None and isinstance(lane.stop_reason, str)
        self.ready.append(
            (
                group.leader.client_index,
                EngineCoreOutput(
                    request_id=group.id,
                    new_token_ids=list(lane.request.output_token_ids),
                    new_logprobs=_stack_logprobs(lane.logprobs),
                    finish_reason=FinishReason.LENGTH if by_string else lane.finish_reason,
                    stop_reason=lane.stop_reason,
                    kv_transfer_params={RESULT_KEY: [group.result(index)]},
                    prefill_stats=group.prefill_stats,
                    events=group.events or None,
                    trace_headers=group.leader.trace_headers,
                ),
            )
        )

    def _take_scores(self, wait: float = 0.0) -> None:
        """Finish the groups whose phi has come, or failed to come."""
        assert self.scorer is not None
        for group, outcome in self.scorer.collect(wait):
            if isinstance(outcome, TimeoutError):
                outcome = ValueError(
                    f"`twist_potential` took more than `twist_potential_timeout`={self.scorer.timeout:g} seconds for "
                    "one group: make it faster, or raise the timeout."
                )
            if isinstance(outcome, Exception):
                self.ready.append(self._failure(group, f"Request {group.id} was ended: {outcome}"))
                continue
            group.reweigh(outcome)
            if group.is_weightless:
                self.ready.append(self._failure(group, f"Request {group.id} was ended: {NOTHING_LEFT}"))
            elif group.pinned_is_impossible:
                self.ready.append(self._failure(group, f"Request {group.id} was ended: {IMPOSSIBLE}"))
            else:
                self._finish_group(group)

    def _fail(self, group: Group, reason: str) -> None:
        """End a group with an error that its client will read; the others go on."""
        message = f"Request {group.id} was ended: {reason}"
        logger.error(message)
        self._drop(group, RequestStatus.FINISHED_ERROR)
        self.ready.append(self._failure(group, message))

    def _failure(self, group: Group, message: str) -> tuple[int, EngineCoreOutput]:
        """Return the output that ends a group with an error, and the client it goes to."""
        leader = group.leader
        group.events.extend(leader.take_events() or ())
        if self.log_stats and not any(event.type == EngineCoreEventType.SCHEDULED for event in group.events):
            # It has waited until now; the time it was served would count from the epoch of the clock.
            leader.record_event(EngineCoreEventType.SCHEDULED)
            group.events.extend(leader.take_events() or ())
        return leader.client_index, EngineCoreOutput(
            request_id=group.id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            kv_transfer_params={RESULT_KEY: [{"error": message}]},
            **error_fields(message),
            events=group.events or None,
            trace_headers=leader.trace_headers,
        )

    def _drop(self, group: Group, status: RequestStatus) -> None:
        """Remove a group with all its lanes and blocks."""
        self.blocks.drop_reserve(group)
        if group.parked:
            self.staged.remove_requests([group.leader])
        self.blocks.cancel_copies([lane.request for lane in group.live_lanes()])
        live = [lane.request.request_id for lane in group.live_lanes()]
        condition_id = _condition_id(group)
        if condition_id in self.reading:
            del self.reading[condition_id]
            self.staged.remove_requests([request for request in self.staged if request.request_id == condition_id])
            live.append(condition_id)
        super().finish_requests(live, status)
        if self.finished_req_ids_dict is not None:
            finished = self.finished_req_ids_dict[group.leader.client_index]
            finished.difference_update(live)
            finished.add(group.id)
        for lane_id in live:
            self.group_of.pop(lane_id, None)
        group.leader.status = status
        del self.groups[group.id]

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        if request_ids is None:
            wanted = {*self.requests, *self.groups, *(request.request_id for request in self.staged)}
            wanted.update(self.scorer.pending if self.scorer else ())
        else:
            wanted = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        finished = []
        for request_id in list(wanted):
            group = self.groups.get(request_id)
            if group is not None:
                self._drop(group, finished_status)
                finished.append(group.leader)
                # Its other lanes went with it.
                wanted.difference_update((*group.lanes, _condition_id(group)))
            elif self.scorer is not None and (group := self.scorer.cancel(request_id)) is not None:
                group.leader.status = finished_status
                finished.append(group.leader)
                wanted.discard(request_id)
        staged = [request for request in self.staged if request.request_id in wanted]
        self.staged.remove_requests(staged)
        for request in staged:
            request.status = finished_status
            wanted.discard(request.request_id)
        return finished + staged + super().finish_requests(wanted, finished_status)

    # ---- counts ---------------------------------------------------------------------------

    def has_request(self, request_id: str) -> bool:
        """Whether a request is here, be it staged, in a group whose phi is being evaluated, or inside (vLLM 0.33)."""
        return (
            request_id in self.requests
            or request_id in self.groups
            or any(request.request_id == request_id for request in self.staged)
            or (self.scorer is not None and request_id in self.scorer.pending)
        )

    def get_request_counts(self) -> tuple[int, int]:
        """Count staged and scored requests as waiting, or the engine would go idle over them."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self.staged) + len(self.scorer or ())

    def has_finished_requests(self) -> bool:
        return bool(self.ready) or bool(self.scorer) or super().has_finished_requests()


def _condition_id(group: Group) -> str:
    """Return the id of the request that computes the group's condition."""
    return f"{group.id}/condition"


def _request_of(
    group: Group, request_id: str, prompt_token_ids: Any, params: SamplingParams, block_hasher: Any = None
) -> Request:
    """Return a request that the engine makes for a group, and treats as its client's."""
    leader = group.leader
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling_params=params,
        pooling_params=None,
        client_index=leader.client_index,
        arrival_time=leader.arrival_time,
        cache_salt=leader.cache_salt,
        priority=leader.priority,
        trace_headers=leader.trace_headers,
        block_hasher=block_hasher,
    )


def _stack_logprobs(rows: list[tuple[list[int], list[float], int]]) -> LogprobsLists | None:
    """Return the rows of one particle, token by token, in vLLM's format."""
    if not rows:
        return None
    import numpy as np

    ids, values, ranks = zip(*rows, strict=True)
    return LogprobsLists(np.array(ids, np.int32), np.array(values, np.float32), np.array(ranks, np.int32))


class TwistScheduler(TwistSchedulerMixin, Scheduler):
    """Particle groups over the synchronous scheduler."""


class TwistAsyncScheduler(TwistSchedulerMixin, AsyncScheduler):
    """Particle groups over the asynchronous scheduler, which schedules a step before it knows the last one's tokens."""
