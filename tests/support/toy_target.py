"""The toy target of the golden figures, and every branch of SMC on it.

The figures were computed by an independent program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.branches import Outcomes, Tabular, branches, independent
from vllm_twist.smc import Population, Target, smc

PRINTED = 6e-11  # half a unit in the tenth digit, and round-off
EXACT = 1e-12


def toy_log_p(prefixes: Tensor) -> Tensor:
    """Logits 1.5 sin(1 + t + 2a + 0.7b + 3x): a the last token, b the one before, 0 where there is none."""
    t = prefixes.shape[1] + 1
    padded = torch.nn.functional.pad(prefixes, (2, 0)).double()
    tokens = torch.arange(2, dtype=torch.float64)
    return torch.log_softmax(1.5 * torch.sin(1 + t + 2 * padded[:, -1:] + 0.7 * padded[:, -2:-1] + 3 * tokens), -1)


def toy_log_psi(prefixes: Tensor) -> Tensor:
    """0.4 cos(1.3 sum_i i s_i + t): a suboptimal twist."""
    t = prefixes.shape[1] + 1
    total = (prefixes * torch.arange(1, t)).sum(-1, keepdim=True) + t * torch.arange(2)
    return 0.4 * torch.cos(1.3 * total.double() + t)


def toy_log_phi(sequences: Tensor) -> Tensor:
    """-1.2 |(s1 + 2 s2 + 3 s3) mod 5 - 2|."""
    return -1.2 * ((sequences * torch.arange(1, 4)).sum(-1) % 5 - 2).abs().double()


SUB = Target(toy_log_p, toy_log_psi, toy_log_phi, horizon=3)
TOY = Tabular(SUB, vocab_size=2)
OPT = dataclasses.replace(SUB, log_psi=TOY.optimal_log_psi)
#: Twists that are wrong in the worst way: they prefer what sigma avoids.
BAD = dataclasses.replace(SUB, log_psi=lambda prefixes: -1.5 * TOY.optimal_log_psi(prefixes))
TARGETS = {"sub": SUB, "opt": OPT, "bad": BAD}
LOG_Z = float(TOY.log_z)


def free(target: Target, particles: int, **options: Any) -> list[tuple[float, Population]]:
    """Return every branch of SMC with its probability."""
    return list(branches(lambda draw: smc(target, particles, draw, **options)))


def held(
    target: Target,
    particles: int,
    outcomes: Callable[[Tensor], Outcomes] = independent,
    exact: Tabular | None = None,
    **options: Any,
) -> list[tuple[float, Population]]:
    """Return every branch of conditional SMC around an exact sample of sigma."""
    exact = exact or TOY
    return [
        (sigma * p, population)
        for sigma, sequence in zip(exact.sigma.tolist(), exact.sequences, strict=True)
        if sigma
        for p, population in branches(
            lambda draw, pinned=sequence: smc(target, particles, draw, pinned=pinned, **options), outcomes
        )
    ]


def mean(runs: list[tuple[float, Population]], value: Callable[[Population], Any]) -> float:
    return math.fsum(p * float(value(population)) for p, population in runs)
