"""Exact expectations of a random program, by running it once per branch.

A program that draws only through ``draw(log_probs [N, n]) -> int64 [N]`` is deterministic given
what its draws return. ``branches`` replays it with every combination of returns that has positive
probability, so that a sum over branches is an expectation to machine precision: no Monte-Carlo
error, no tolerance to choose, and the code under test is the code that users run.

    sum(p * f(result) for p, result in branches(program))  ==  E[f(program(random draw))]
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from vllm_twist.smc import Draw, Target

Result = TypeVar("Result")
Outcomes = list[tuple[float, Tensor]]  # (probability, what the draw returns)


def independent(log_probs: Tensor) -> Outcomes:
    """Return every joint outcome of independent rows [N, n], each int64 [N]."""
    rows = [[(p, i) for i, p in enumerate(row) if p > 0] for row in log_probs.softmax(-1).tolist()]
    return [
        (math.prod(p for p, _ in joint), torch.tensor([i for _, i in joint], dtype=torch.int64))
        for joint in itertools.product(*rows)
    ]


def branches(
    program: Callable[[Draw], Result], outcomes: Callable[[Tensor], Outcomes] = independent
) -> Iterator[tuple[float, Result]]:
    """Yield (probability, result) of every branch of ``program``, depth first.

    ``outcomes`` lists what a draw may return; another law than independent rows breaks the contract
    of ``Draw``, on purpose.
    """
    trail: list[Outcomes] = []  # per draw of the current branch: what is left to visit, the current outcome last
    while True:
        depth, probability = 0, 1.0

        def draw(log_probs: Tensor) -> Tensor:
            nonlocal depth, probability
            if depth == len(trail):
                trail.append(outcomes(log_probs))
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
        self.vocab_size = vocab_size
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
        return torch.stack([self._optimal_row(tuple(prefix)) for prefix in prefixes.tolist()])

    @functools.cache  # noqa: B019 - a handful of prefixes, asked for by every branch
    def _optimal_row(self, prefix: tuple[int, ...]) -> Tensor:
        row = []
        for token in range(self.vocab_size):
            start = torch.tensor([*prefix, token])
            within = (self.sequences[:, : len(start)] == start).all(-1)
            row.append(torch.logsumexp(self.log_joint[within], 0) - torch.logsumexp(self.log_p[within], 0))
        return torch.stack(row)
