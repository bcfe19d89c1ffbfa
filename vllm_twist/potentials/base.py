"""Potentials: log phi of finished outputs, what makes a target of a language model.

    sigma(s_1:T) = p0(s_1:T) phi(s_1:T) / Z        (Zhao et al. 2024, arXiv 2404.17546, Eq. 1)

A ``Potential`` is called with the token ids of outputs (the terminating token included, the prompt
not) and their texts, and returns log phi (nats) of each: finite, or -inf where the target forbids
one. ``load_potential`` makes one from what a user can name on a command line.

    potential = load_potential("my_rewards.py:log_phi")
    target = 10 * potential + Classifier.from_pretrained("my/classifier", "POSITIVE") - 2.0

Sums multiply the phi, and scaling raises phi to a power: exp(beta r) is ``beta * r`` (Eq. 19).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

#: Maps output tokens (the terminating one included, the prompt not) and their texts to log phi (nats).
LogPhi = Callable[[list[list[int]], list[str]], list[float]]


class Potential(ABC):
    """log phi of finished outputs. Subclasses give ``log_phi``; a call checks what goes in and comes out."""

    @abstractmethod
    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> Sequence[float]:
        """Return log phi (nats) of each of N outputs; -inf where phi = 0."""

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        """Return the potential of outputs that follow this prompt: itself, unless it reads prompts."""
        return self

    @property
    def log_bound(self) -> float:
        """An upper bound of log phi over all outputs, +inf where none is known; rejection sampling needs one."""
        return math.inf

    def __call__(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        """Return log phi (nats) of each of N outputs, finite or -inf.

        Raises:
            ValueError: as many texts as outputs are not given, or the potential fails or does not
                return N numbers below +inf.
        """
        if len(token_ids) != len(texts):
            raise ValueError(
                f"`texts` must hold one text per output, {len(token_ids)}, got {len(texts)}: decode every output."
            )
        if not token_ids:
            return []
        return _log_values(self, self.log_phi(token_ids, texts), len(token_ids))

    def __add__(self, other: Potential | float) -> Potential:
        return Sum((self, _as_potential(other)))

    def __radd__(self, other: float) -> Potential:
        return _as_potential(other) + self

    def __sub__(self, other: Potential | float) -> Potential:
        return self + -1 * _as_potential(other)

    def __mul__(self, scale: float) -> Potential:
        return Scaled(self, scale)

    __rmul__ = __mul__

    def __neg__(self) -> Potential:
        return Scaled(self, -1)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}: pass a plain number.")
    return float(value)


def _as_potential(value: Potential | float) -> Potential:
    return value if isinstance(value, Potential) else Constant(value)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _log_values(potential: Potential, values: Any, count: int, per: str = "output") -> list[float]:
    """Return the values as floats if there are ``count`` of them, none of them NaN or +inf."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`potential` {potential} must return a list of numbers, got {type(values).__name__} ({error}): "
            f"return log phi of every {per}."
        ) from error
    if len(numbers) != count:
        raise ValueError(
            f"`potential` {potential} must return {count} values, one per {per}, got {len(numbers)}: "
            f"return log phi of every {per}, in order."
        )
    for row, number in enumerate(numbers):
        if math.isnan(number) or number == math.inf:
            raise ValueError(
                f"`potential` {potential} must return numbers below +inf, got {number} for {per} {row}: "
                "return log phi, -inf where phi is 0; a negative multiple of -inf is +inf."
            )
    return numbers


# -- Sums and scalings -------------------------------------------------------------------------
class Constant(Potential):
    """The same log phi for every output: a factor of Z, and nothing else."""

    def __init__(self, value: float) -> None:
        self.value = _number("potential", value)

    @property
    def log_bound(self) -> float:
        return self.value

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        return [self.value] * len(token_ids)

    def __repr__(self) -> str:
        return f"{self.value:g}"


class Sum(Potential):
    """log phi = log phi_1 + log phi_2 + ..."""

    def __init__(self, parts: Sequence[Potential]) -> None:
        self.parts = tuple(parts)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        values = [part(token_ids, texts) for part in self.parts]
        return [math.fsum(row) for row in zip(*values, strict=True)]

    @property
    def log_bound(self) -> float:
        return sum(part.log_bound for part in self.parts)

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        return Sum([part.given(prompt_ids, prompt) for part in self.parts])

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self.parts))})"


class Scaled(Potential):
    """log phi = scale * log phi_1; a scale of 0 is log phi = 0, also where phi_1 = 0."""

    def __init__(self, part: Potential, scale: float) -> None:
        self.part = part
        self.scale = _number("scale", scale)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        return [self.scale * value if self.scale else 0.0 for value in self.part(token_ids, texts)]

    @property
    def log_bound(self) -> float:
        return self.scale * self.part.log_bound if self.scale > 0 else 0.0 if self.scale == 0 else math.inf

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        return Scaled(self.part.given(prompt_ids, prompt), self.scale)

    def __repr__(self) -> str:
        return f"{self.scale:g} * {self.part}"


# -- Functions ---------------------------------------------------------------------------------
class Function(Potential):
    """A Python callable ``log_phi(token_ids: list[list[int]], texts: list[str]) -> list[float]``."""

    def __init__(self, function: LogPhi, name: str | None = None) -> None:
        self.function = function
        self.name = name or _name_of(function)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> Sequence[float]:
        try:
            return self.function(token_ids, texts)
        except Exception as error:
            raise ValueError(
                f"`potential` {self.name} must return log phi of {len(token_ids)} outputs, but raised "
                f"{type(error).__name__}: {error}: it is called as log_phi(token_ids, texts)."
            ) from error

    def __repr__(self) -> str:
        return self.name


class Intermediate(Potential):
    """Potentials of every prefix: phi = prod_t phi_t(s_1:t) (Zhao et al. 2024, App. B.1).

    As a ``Potential`` it is the product, so that every objective applies as it is. What they learn is
    then the twist of the whole, whose optimum is the product of what is past and what is to come,

        log psi'_t = sum_{tau < t} log phi_tau + log psi_t        log psi*_t = log phi_t + log Phi*_t

    and a head that need not learn the past has ``past`` added to its log psi in the loss. The weights
    of SMC with such a head are those of Eq. 47: w_t = phi_{t-1} psi_t / psi_{t-1} * p0 / q.
    """

    def __init__(self, log_phi_t: Callable[[list[list[int]]], Sequence[Sequence[float]]]) -> None:
        """``log_phi_t`` maps N outputs to a row each: log phi_t of the prefixes of 1, 2, ... tokens."""
        self.log_phi_t = log_phi_t

    def steps(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Return log phi_t of every prefix of each output.

        Raises:
            ValueError: a row that does not hold one number below +inf for every token.
        """
        rows = self.log_phi_t(token_ids)
        if not isinstance(rows, Sequence) or len(rows) != len(token_ids):
            got = len(rows) if isinstance(rows, Sequence) else type(rows).__name__
            raise ValueError(
                f"`potential` {self} must return {len(token_ids)} rows, one per output, got {got}: "
                "return log phi_t of every prefix."
            )
        return [_log_values(self, row, len(output), "token") for row, output in zip(rows, token_ids, strict=True)]

    def past(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Return, for every prefix of each output, the sum of log phi_tau over tau < t."""
        return [[math.fsum(row[:t]) for t in range(len(row))] for row in self.steps(token_ids)]

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        return [math.fsum(row) for row in self.steps(token_ids)]

    def __repr__(self) -> str:
        return _name_of(self.log_phi_t)


class TokenLogistic(Potential):
    """phi = sigmoid(bias + sum of the weights of the output's tokens): a label's probability.

    Saved as JSON: ``bias``, a number, and ``weights``, one number per token of the vocabulary.
    """

    def __init__(self, bias: float, weights: Sequence[float]) -> None:
        self.bias = _number("bias", bias)
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(
                f"`weights` must be a list of numbers, got {type(weights).__name__}: pass one per token of the "
                "vocabulary."
            )
        self.weights = [_number("weights", weight) for weight in weights]

    @property
    def log_bound(self) -> float:
        return 0.0

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        highest = max(max(row, default=0) for row in token_ids)
        if highest >= len(self.weights):
            raise ValueError(
                f"`token_ids` must lie below {len(self.weights)}, the number of weights, got {highest}: use the "
                "potential with the model whose tokenizer it was made for."
            )
        logits = torch.tensor([self.bias + sum(self.weights[i] for i in row) for row in token_ids])
        return torch.nn.functional.logsigmoid(logits).tolist()

    def save(self, path: str | Path) -> None:
        """Write the file that ``load_potential`` reads."""
        Path(path).write_text(json.dumps({"bias": self.bias, "weights": self.weights}) + "\n")

    def __repr__(self) -> str:
        return f"TokenLogistic({len(self.weights)} weights)"
