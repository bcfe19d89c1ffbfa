"""What a user may ask of training; each field is a flag of ``vllm-twist train``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_twist.model_options import DTYPES, ModelOptions
from vllm_twist.objectives import OBJECTIVES, get_objective
from vllm_twist.options import at_least, check_fields, did_you_mean, flag, number, one_of, option, options_of
from vllm_twist.training import attention
from vllm_twist.twist import TwistHead

SAMPLERS = ("auto", "vllm", "transformers")
POSITIVES = ("approximate", "exact", "smc")


def _positive(name: str, value: Any) -> float:
    parsed = number(name, value)
    if not (math.isfinite(parsed) and parsed > 0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}: 1e-3 is the default.")
    return parsed


@dataclass(frozen=True)
class TrainingConfig(ModelOptions):
    """How a twist head is learned. Each field is a flag of ``vllm-twist train``; every value is checked.

    Raises:
        ValueError: a value out of range, or values that do not go together.
    """

    objective: str = option(one_of(tuple(OBJECTIVES)), f"loss: {', '.join(OBJECTIVES)}", default="ctl")
    positives: str = option(
        one_of(POSITIVES),
        "what stands for the target in ctl, sixo and dpg. approximate: draws from the twisted proposal, weighted (in "
        "ctl the negatives' own batch); exact: samples of p0 accepted with probability phi, which must not exceed 1; "
        "smc: the particles of twisted SMC",
        default="approximate",
    )
    proposal_only: bool = option(
        flag, "accept an objective whose result proposes tokens but cannot weigh particles (dpg)", default=False
    )
    head: str = option(one_of(tuple(TwistHead.kinds)), f"kind of head: {', '.join(TwistHead.kinds)}", default="mlp")
    rank: int = option(at_least(1), "rank of a low_rank or tied head", default=64)
    max_tokens: int = option(at_least(1), "length at which outputs are cut", default=16)
    particles: int = option(at_least(2), "sequences drawn per prompt and update", default=64)
    prompts_per_update: int = option(
        at_least(1), "prompts per update and process, each a target with a normaliser of its own", default=1
    )
    updates: int = option(at_least(1), "number of updates in all", default=500)
    lr: float = option(_positive, "learning rate of Adam", flags=("--learning-rate",), default=1e-3)
    seed: int = option(at_least(0), "of everything random", default=0)
    condition_tokens: int = option(
        at_least(0),
        "learn infilling instead of a potential: a conditional head for whatever so many tokens follow the output",
        default=0,
    )
    sampler: str = option(
        one_of(SAMPLERS),
        "what draws the sequences; auto: vllm where it is installed",
        default="auto",
    )
    attention: str = option(
        one_of(attention.IMPLEMENTATIONS),
        f"attention of the teacher-forced pass: {', '.join(attention.IMPLEMENTATIONS)}",
        default="sdpa",
    )
    dtype: str = option(
        one_of(DTYPES),
        "of the base model; auto: float32 on a CPU, the model's own on a GPU",
        default="auto",
        kw_only=True,
    )
    save_every: int = option(at_least(1), "updates between checkpoints", default=100)

    def __post_init__(self) -> None:
        check_fields(self)
        get_objective(self.objective, proposal_only=self.proposal_only)
        if self.positives != "approximate" and self.objective not in ("ctl", "sixo", "dpg"):
            raise ValueError(
                f"`positives` must be approximate for {self.objective}, which has none, got {self.positives!r}: drop "
                "it, or use ctl, sixo or dpg."
            )
        if self.condition_tokens and self.positives == "approximate" and self.objective in ("ctl", "sixo", "dpg"):
            # One exact sample comes with every condition.
            object.__setattr__(self, "positives", "exact")

    @property
    def positive_law(self) -> str:
        """The law whose draws stand for the target: q, smc or exact."""
        return "q" if self.positives == "approximate" else self.positives

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TrainingConfig:
        """Build from keywords.

        Raises:
            ValueError: an unknown keyword, or a value out of range.
        """
        known = tuple(option.name for option in options_of(cls))
        for key in options:
            if key not in known:
                raise ValueError(
                    f"unknown option `{key}`{did_you_mean(key, known)}: the known ones are {', '.join(known)}."
                )
        return cls(**options)
