"""Particle groups: what the scheduler knows of one twisted request. No torch, no vllm."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_twist.config import RequestConfig


def log_sum_exp(values: list[float]) -> float:
    """Return log sum exp of floats, -inf for a sum of nothing, NaN if one of them is NaN."""
    if any(value != value for value in values):
        return math.nan
    top = max(values, default=-math.inf)
    if not math.isfinite(top):
        return top
    return top + math.log(sum(math.exp(value - top) for value in values))


def effective_sample_size(log_w: list[float]) -> float:
    """Return 1 / sum of squared normalised weights; NaN for weights that are NaN, +inf or all zero."""
    total = log_sum_exp(log_w)
    if not math.isfinite(total):
        return math.nan
    return math.exp(2 * total - log_sum_exp([2 * value for value in log_w]))


def blocks_at_length(prompt_len: int, length: int, particles: int, block_size: int, share_prompt: bool) -> int:
    """Return how many KV blocks a group may need when its particles have ``length`` tokens each.

    Full prompt blocks are held once if ``share_prompt``; everything after them is counted per
    particle, since nothing guarantees that resampling will share it.
    """
    shared = (prompt_len - 1) // block_size if share_prompt else 0
    return shared + particles * (-(-length // block_size) - shared)


def longest_that_fits(prompt_len: int, particles: int, block_size: int, num_blocks: int, share_prompt: bool) -> int:
    """Return the largest length (prompt included) at which the group surely fits ``num_blocks``."""
    shared = (prompt_len - 1) // block_size if share_prompt else 0
    per_lane = (num_blocks - shared) // particles
    return max(0, (shared + per_lane) * block_size) if per_lane > 0 else 0


@dataclass
class Lane:
    """One particle and the engine request that carries it.

    Attributes:
        request: the engine's ``Request``; its tokens are the particle's.
        log_w: log weight after the last token (nats).
        log_p: sum of log p0 over the particle's tokens.
        log_psi: log psi of its last token.
        logprobs: per token (token ids, logprobs, rank) where the request asked for logprobs.
        finish_reason, stop_reason: as vLLM reports them, once the particle has ended.
        detector: follows its text, where the request has stop strings (``stop_strings``).
    """

    request: Any
    log_w: float = 0.0
    log_p: float = 0.0
    log_psi: float = 0.0
    logprobs: list[tuple[list[int], list[float], int]] = field(default_factory=list)
    finish_reason: Any = None
    stop_reason: int | str | None = None
    stopped: bool = False
    detector: Any = None

    @property
    def live(self) -> bool:
        return self.finish_reason is None

    @property
    def length(self) -> int:
        """How many tokens its request has, those included that the worker is still drawing."""
        return self.request.num_tokens + self.request.num_output_placeholders


@dataclass
class Group:
    """The K lanes of one twisted request.

    Attributes:
        leader: the request as the client sent it; lane 0.
        settings: how it is sampled.
        seed: of everything random in the group.
        last_position: index of the last token that max_tokens and the context allow, from 1.
        lanes: lane id -> lane; the leader alone until the prompt is computed.
        reserve: KV blocks set aside for the other lanes' copies of the partial prompt block.
        parked: preempted or not yet admitted; none of its lanes is in the engine's queues.
        entering: some of its lanes are yet to be sent to the worker.
    """

    leader: Any
    settings: RequestConfig
    seed: int
    last_position: int = 0
    lanes: dict[str, Lane] = field(default_factory=dict)
    reserve: list[Any] = field(default_factory=list)
    parked: bool = True
    entering: bool = True
    num_resamplings: int = 0
    #: Log of the estimate of Z (nats) as the worker keeps it; None where the weights are all there is.
    log_z: float | None = None
    #: Per token of the output: what became of each lane, where the request asked for it.
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    #: Fields of the leader's own outputs that belong into the group's one output.
    prefill_stats: Any = None
    events: list[Any] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.leader.request_id

    @property
    def forked(self) -> bool:
        """Whether all K lanes exist."""
        return len(self.lanes) == self.settings.particles

    @property
    def done(self) -> bool:
        """Whether every particle has ended."""
        return self.forked and not any(lane.live for lane in self.lanes.values())

    def record(self, lane: int, position: int, ancestor: int, log_w: float, resampled: bool) -> None:
        """Note what a step did to a lane."""
        nobody: list[Any] = [None] * self.settings.particles
        entry = self.steps.setdefault(
            position, {"ancestors": list(nobody), "log_w": list(nobody), "resampled": resampled}
        )
        entry["ancestors"][lane] = ancestor
        entry["log_w"][lane] = log_w if math.isfinite(log_w) else None

    def reweigh(self, log_phi: list[float]) -> None:
        """Put phi in the place of psi at each particle's last token, in the order of the lanes."""
        for lane, value in zip(self.lanes.values(), log_phi, strict=True):
            lane.log_w += value - lane.log_psi
        self.log_z = None

    @property
    def is_weightless(self) -> bool:
        """Whether no particle has any weight."""
        return all(lane.log_w == -math.inf for lane in self.lanes.values())

    @property
    def pinned_is_impossible(self) -> bool:
        """Whether lane 0 is pinned to a continuation that has probability or weight zero."""
        lane = self.lanes[self.id]
        return self.settings.pinned is not None and -math.inf in (lane.log_p, lane.log_w)

    @property
    def num_live(self) -> int:
        """How many lanes the group still needs, those not created yet included."""
        ended = sum(not lane.live for lane in self.lanes.values())
        return self.settings.particles - ended

    def live_lanes(self) -> Iterator[Lane]:
        return (lane for lane in self.lanes.values() if lane.live)

    def lane_id(self, index: int) -> str:
        """Return the engine's request id of a lane; lane 0 is the request itself."""
        return self.id if index == 0 else f"{self.id}/lane{index}"

    def draw(self) -> int:
        """Draw the index of one particle by its final weight."""
        weights = [lane.log_w for lane in self.lanes.values()]
        total = log_sum_exp(weights)
        point = random.Random(f"draw {self.seed}").random()
        for index, log_w in enumerate(weights):
            weight = math.exp(log_w - total)
            if point < weight:
                return index
            point -= weight
        # Rounding left a sliver: the last particle that has any weight.
        return max(i for i, log_w in enumerate(weights) if log_w > -math.inf)

    def result(self, chosen: int) -> dict[str, Any]:
        """Return the ``TwistResult`` of a finished group as plain values."""
        weights = [lane.log_w for lane in self.lanes.values()]
        total = log_sum_exp(weights)
        normalised = [log_w - total for log_w in weights]
        particles = None
        if self.settings.return_particles:
            particles = [
                {
                    "token_ids": list(lane.request.output_token_ids),
                    # JSON has no -inf; None stands for it and is read back as such.
                    "log_weight": log_w if math.isfinite(log_w) else None,
                    "log_prob": lane.log_p,
                    "log_psi": lane.log_psi,
                    "finished": lane.stopped,
                    "finish_reason": "stop" if lane.stopped else "length",
                    "stop_reason": lane.stop_reason,
                }
                for lane, log_w in zip(self.lanes.values(), normalised, strict=True)
            ]
        return {
            "log_z": total - math.log(len(weights)) if self.log_z is None else self.log_z,
            "ess": effective_sample_size(weights),
            "num_resamplings": self.num_resamplings,
            "chosen": chosen,
            "particles": particles,
            **({"trace": [self.steps[position] for position in sorted(self.steps)]} if self.settings.trace else {}),
        }
