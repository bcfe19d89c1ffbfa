"""Exact expectations of a random program, by running it once per branch.

A program that draws only through ``draw(log_probs [N, n]) -> int64 [N]`` is deterministic given
what its draws return. ``branches`` replays it with every combination of returns that has positive
probability, so that a sum over branches is an expectation to machine precision: no Monte-Carlo
error, no tolerance to choose, and the code under test is the code that users run.

    sum(p * f(result) for p, result in branches(program))  ==  E[f(program(random draw))]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from vllm_twist.smc import Draw, Target

Result = TypeVar("Result")


def _outcomes(log_probs: Tensor) -> list[tuple[float, Tensor]]:
    """Return every joint outcome of independent rows [N, n], as (probability, int64 [N])."""
    rows = [[(p, i) for i, p in enumerate(row) if p > 0] for row in log_probs.softmax(-1).tolist()]
    return [
        (math.prod(p for p, _ in joint), torch.tensor([i for _, i in joint], dtype=torch.int64))
        for joint in itertools.product(*rows)
    ]


def branches(program: Callable[[Draw], Result]) -> Iterator[tuple[float, Result]]:
    """Yield (probability, result) of every branch of ``program``, depth first."""
    trail: list[list[tuple[float, Tensor]]] = []  # per draw of the current branch: outcomes left, current one last
    while True:
        depth, probability = 0, 1.0

        def draw(log_probs: Tensor) -> Tensor:
            nonlocal depth, probability
            if depth == len(trail):
                trail.append(_outcomes(log_probs))
            p, outcome = trail[depth][-1]
            depth, probability = depth + 1, probability * p
            return outcome.clone()

        result = program(draw)
        yield probability, result
        while trail and len(trail[-1]) == 1:
            trail.pop()
        if not trail:
            return
        trail[-1].pop()


class Tabular:
    """A target small enough to list: its sequences, sigma, Z and optimal twists, by definition.

    Attributes:
        sequences: int64 [V**T, T], in lexical order.
        log_joint: log p0 + log phi of each, [V**T].
        log_p: log p0 of each, [V**T].
        log_z: log of the sum of exp(log_joint).
        sigma: exp(log_joint - log_z), [V**T].
    """

    def __init__(self, target: Target, vocab_size: int) -> None:
        self.target = target
        self.sequences = torch.tensor(list(itertools.product(range(vocab_size), repeat=target.horizon)))
        self.log_p = torch.zeros(len(self.sequences), dtype=torch.float64)
        for t in range(target.horizon):
            step = target.log_p(self.sequences[:, :t])
            self.log_p += step.gather(-1, self.sequences[:, t : t + 1])[:, 0]
        self.log_joint = self.log_p + target.log_phi(self.sequences)
        self.log_z = torch.logsumexp(self.log_joint, 0)
        self.sigma = torch.exp(self.log_joint - self.log_z)

    def optimal_log_psi(self, prefixes: Tensor) -> Tensor:
        """Return log psi*_t [K, V], t = prefix length + 1: log E[phi | s_1:t] under p0 (Eq. 11)."""
        k, length = prefixes.shape
        vocab_size = int(self.sequences.max()) + 1
        rows = []
        for prefix in prefixes:
            for token in range(vocab_size):
                start = torch.cat([prefix, torch.tensor([token])])
                within = (self.sequences[:, : length + 1] == start).all(-1)
                joint, base = self.log_joint[within], self.log_p[within]
                rows.append(torch.logsumexp(joint, 0) - torch.logsumexp(base, 0))
        return torch.stack(rows).reshape(k, vocab_size)
