"""What travels between the scheduler and the worker: the lanes' settings there, each step's report back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

#: Key under which an admitted request's settings travel in ``SamplingParams.extra_args``.
GROUP_KEY = "twist_group"
#: Key of a lane's ``LaneSpec`` in its ``SamplingParams.extra_args``.
LANE_KEY = "twist_lane"
#: Key of a request's own id in the same place, where its last hidden state is wanted: it computes a condition.
CONDITION_KEY = "twist_condition_of"


@dataclass(frozen=True)
class LaneSpec:
    """What the worker needs to know of a lane; travels in its sampling parameters.

    Under Model Runner V1 ``top_k`` and ``top_p``, which belong to p0, are applied here, before the
    twist, instead of by vLLM's sampler, which would apply them after it. Under V2 that sampler
    applies them first, and the temperature is divided out here where it can be (``inverse_temperature``).
    ``temperature`` is the request's, whoever divides by it.

    ``group_size`` counts the live lanes of the group when the lane was last sent to the worker;
    ``log_w`` to ``position`` are its state then, which V2, unlike V1, does not keep over a preemption.

    ``particles`` is K; ``log_w_ended``, the log of the summed weights of the particles that have ended, and
    ``num_resamplings`` are the group's state when it was last sent.

    ``base_proposal`` draws from p0 instead of the twist-induced proposal; ``pinned`` is the continuation
    that lane 0 is pinned to. ``condition`` is what a conditional head reads of o_T, float32 [H] as bytes.
    """

    lane_id: str
    group_id: str
    index: int
    seed: int
    last_position: int
    ess_threshold: float
    scheme: int
    scale: float
    top_k: int = 0
    top_p: float = 1.0
    num_logprobs: int | None = None
    base_proposal: bool = False
    pinned: tuple[int, ...] | None = None
    condition: bytes | None = None
    inverse_temperature: float = 1.0
    temperature: float = 1.0
    particles: int = 1
    log_w_ended: float = -math.inf
    num_resamplings: int = 0
    group_size: int = 0
    log_w: float = 0.0
    log_p: float = 0.0
    log_psi: float = 0.0
    position: int = 0


def conditions_of(specs: Iterable[LaneSpec]) -> np.ndarray | None:
    """Return the lanes' conditions, float32 [L, H]; None where the head reads none."""
    given = [np.frombuffer(spec.condition, np.float32) for spec in specs if spec.condition is not None]
    return np.stack(given) if given else None


@dataclass
class TwistStep:
    """What one step did to the lanes in the batch; the scheduler mirrors it.

    Lists are aligned with ``lane_ids``; ``ancestors`` are indices into it. ``log_w``, ``log_p`` and
    ``log_psi`` hold for the particle each lane carries after the step; ``resampled`` says of each
    lane whether its group did. ``log_z`` and ``num_resamplings`` are those of each lane's group, from V2, which
    keeps them on the device; V1 leaves them to the scheduler. ``conditions`` holds the last hidden states,
    float32 [H] as bytes, of the requests that ask for theirs, by request id.
    """

    lane_ids: list[str] = field(default_factory=list)
    ancestors: list[int] = field(default_factory=list)
    log_w: list[float] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    log_psi: list[float] = field(default_factory=list)
    resampled: list[bool] = field(default_factory=list)
    log_z: list[float] | None = None
    num_resamplings: list[int] | None = None
    conditions: dict[str, bytes] = field(default_factory=dict)
    logprobs: dict[str, tuple[list[int], list[float], int]] = field(default_factory=dict)
    #: Why lanes cannot go on, by lane.
    failures: dict[str, str] = field(default_factory=dict)

    def forks(self) -> list[tuple[str, str]]:
        """Return (child, parent) for every lane that was replaced."""
        return [
            (self.lane_ids[child], self.lane_ids[parent])
            for child, parent in enumerate(self.ancestors)
            if child != parent
        ]
