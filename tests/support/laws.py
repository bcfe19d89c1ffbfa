"""Targets by enumeration, and whether what an engine gave samples them.

Statistical checks take 4 standard errors: a false-alarm probability of 6e-5 each, of fixed seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.stats import t
from torch import Tensor

from support.models import Tiny
from vllm_twist import results


@dataclass(frozen=True)
class Law:
    """A target over finished sequences: log p0 and log (p0 psi_T) of each, and their log-sum."""

    log_p: dict[tuple[int, ...], float]
    log_target: dict[tuple[int, ...], float]

    @property
    def log_z(self) -> float:
        return torch.tensor(list(self.log_target.values()), dtype=torch.float64).logsumexp(0).item()

    def expectation(self, f: Any) -> float:
        """Return E_sigma[f(sequence)]."""
        log_z = self.log_z
        return sum(f(s) * torch.tensor(v - log_z).exp().item() for s, v in self.log_target.items())


def penalised(
    logits: Tensor, prompt: list[int], output: tuple[int, ...], repetition: float, presence: float, frequency: float
) -> Tensor:
    """Return logits [V] with the penalties for tokens seen before."""
    seen = torch.tensor([token in prompt or token in output for token in range(len(logits))])
    counts = torch.tensor([float(output.count(token)) for token in range(len(logits))])
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, scaled, logits) - presence * (counts > 0) - frequency * counts


def truncated(
    logits: Tensor, *, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Return log p0 [N, V] after temperature, min-p, top-k and top-p (smallest set that reaches top_p)."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    probabilities = log_p.exp()
    weak = probabilities < min_p * probabilities.amax(-1, keepdim=True)
    log_p = log_p.masked_fill(weak, -torch.inf).log_softmax(-1)
    ordered, index = log_p.sort(dim=-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
    kept = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= kept.cumsum(-1) - kept < top_p
    mask = torch.zeros_like(keep).scatter(1, index, keep)
    return log_p.masked_fill(~mask, -torch.inf).log_softmax(-1)


def enumerate_law(
    tiny: Tiny,
    prompt: list[int],
    horizon: int,
    *,
    scale: float = 1.0,
    condition: list[int] | None = None,
    ends: tuple[int, ...] | None = None,
    bias: dict[int, float] | None = None,
    allowed: list[int] | None = None,
    min_tokens: int = 0,
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
    ended: Callable[[tuple[int, ...]], bool] = lambda sequence: False,
    **truncation: Any,
) -> Law:
    """Enumerate every sequence that ends with a token of ``ends`` (EOS), as ``ended`` says, or has ``horizon`` tokens.

    ``penalties`` are repetition, presence and frequency.
    """
    ends = (tiny.eos,) if ends is None else ends
    offsets = torch.zeros(tiny.vocab)
    for token, value in (bias or {}).items():
        offsets[token] = value
    if allowed is not None:
        offsets[[token for token in range(tiny.vocab) if token not in allowed]] = -torch.inf
    log_p: dict[tuple[int, ...], float] = {}
    log_target: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 0.0}
    for step in itertools.count(1):
        prefixes = list(open_)
        logits, log_psi = tiny.logits_and_log_psi([prompt + list(prefix) for prefix in prefixes], condition)
        logits = logits + offsets
        if step <= min_tokens:
            logits[:, list(ends)] = -torch.inf
        logits = torch.stack(
            [penalised(row, prompt, prefix, *penalties) for row, prefix in zip(logits, prefixes, strict=True)]
        )
        log_p0 = truncated(logits, **truncation)
        following: dict[tuple[int, ...], float] = {}
        for row, prefix in enumerate(prefixes):
            for token in range(tiny.vocab):
                value = open_[prefix] + log_p0[row, token].item()
                if value == -torch.inf:
                    continue
                sequence = (*prefix, token)
                if token in ends or step == horizon or ended(sequence):
                    log_p[sequence] = value
                    log_target[sequence] = value + scale * log_psi[row, token].item()
                else:
                    following[sequence] = value
        open_ = following
        if not open_:
            return Law(log_p, log_target)
    raise AssertionError("unreachable")


def exact_samples(law: Law, count: int, seed: int = 0) -> list[list[int]]:
    """Draw sequences from sigma."""
    weights = torch.tensor(list(law.log_target.values()), dtype=torch.float64).softmax(0)
    drawn = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    sequences = list(law.log_target)
    return [list(sequences[i]) for i in drawn.tolist()]


def weight(particle: Any) -> float:
    return math.exp(particle.log_weight)


def within(values: list[float], expected: float, at_least: float = 0.0) -> bool:
    """Return whether the mean is within 4 standard errors, none of them smaller than ``at_least``.

    Of many values; of few as many more as Student's t has at the same odds.
    """
    sample = torch.tensor(values, dtype=torch.float64)
    error = max((sample.std() / len(values) ** 0.5).item(), at_least)
    return abs(sample.mean().item() - expected) <= t.isf(3.17e-5, len(values) - 1) * error + 1e-6 * abs(expected)


def assert_samples_the_law(outputs: list[Any], law: Law, first: int) -> None:
    """Check E[Z-hat] = Z, E[Z-hat sum W f] = Z E_sigma[f] for two f, log_prob, and the draw."""
    z = math.exp(law.log_z)
    groups = [results(output)[0] for output in outputs]
    z_hat = [math.exp(group.log_z) for group in groups]
    assert within(z_hat, z), (sum(z_hat) / len(z_hat), z)

    def starts(s: tuple[int, ...]) -> bool:
        return s[0] == first

    def repeats(s: tuple[int, ...]) -> bool:
        return len(s) > 1 and s[-1] == s[-2]

    for f in (starts, repeats):
        estimates = [
            value * sum(weight(p) * f(tuple(p.token_ids)) for p in group.particles)
            for value, group in zip(z_hat, groups, strict=True)
        ]
        # Of a rare f a few groups may see nothing, and then no error either. The draw's is that of n coins
        # with E_sigma[f] and worth Z, or larger; an average over K particles has at least 1 / sqrt(K) of it.
        p = law.expectation(f)
        coins = z * (p * (1 - p) / len(groups)) ** 0.5
        particles = len(groups[0].particles)
        assert within(estimates, z * p, at_least=coins / particles**0.5), f.__name__
        # The completion is drawn by weight: reweighted by Z-hat it follows sigma.
        drawn = [value * f(tuple(output.outputs[0].token_ids)) for value, output in zip(z_hat, outputs, strict=True)]
        assert within(drawn, z * p, at_least=coins), f"drawn {f.__name__}"
    for group in groups:
        for particle in group.particles:
            assert particle.log_prob == pytest.approx(law.log_p[tuple(particle.token_ids)], abs=2e-4)
