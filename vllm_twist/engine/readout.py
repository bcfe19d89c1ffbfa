"""The twist head beside the model's LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vllm_twist.kernels import ops
from vllm_twist.kernels.reference import LowRank
from vllm_twist.twist import LowRankHead, TiedHead, TwistHead

#: Which rows of a batch are lanes: an index [L], ``slice(None)`` for all of them, None for none.
Rows = Tensor | slice | None


class Readout:
    """Read log psi off the hidden states that the model's LM head sees.

    Replaces ``model.compute_logits`` by one that keeps the hidden states of the lanes' rows, and of
    those that are conditions. A tied head's rows go through the LM head together with the model's own, in
    one product.

    ``find`` gives the rows of both kinds in the batch that has been run: once a step, then None, for vLLM also reads
    other hidden states out (of prompts whose logprobs are wanted), after the step's own.
    """

    def __init__(self, model: nn.Module, head: TwistHead, find: Callable[[], tuple[Rows, Rows] | None]) -> None:
        self.head = head
        self.find = find
        self.compute_logits: Callable[..., Tensor | None] = model.compute_logits  # type: ignore[assignment]
        self.hidden: Tensor | None = None
        #: Hidden states that are conditions [C, H].
        self.conditions: Tensor | None = None
        self.tied: Tensor | None = None
        model.compute_logits = self  # type: ignore[assignment]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        found = self.find()
        if found is None:
            # Not the step's own logits: what was kept of those is still to be read.
            return self.compute_logits(hidden, *args, **kwargs)
        rows, conditions = found
        self.hidden = self.tied = None
        self.conditions = None if conditions is None else hidden[conditions].float()
        if rows is None:
            return self.compute_logits(hidden, *args, **kwargs)
        self.hidden = hidden[rows]
        if not isinstance(self.head, TiedHead):
            return self.compute_logits(hidden, *args, **kwargs)
        both = self.compute_logits(torch.cat([hidden, self.head.update(self.hidden)]), *args, **kwargs)
        if both is None:
            return None
        self.tied = both[len(hidden) :]
        return both[: len(hidden)]

    def log_psi(self, condition: Tensor | None = None) -> Tensor:
        """Return log psi of every next token for the lanes of the last forward pass, [L, V].

        ``condition`` [L, H] is what a conditional head reads beside their hidden states.
        """
        if self.tied is not None:
            return self.head.activate(self.tied)
        assert self.hidden is not None, "log_psi before a forward pass"
        return self.head(self.hidden, condition=condition)

    def factors(self, condition: Tensor | None = None, backend: str = "auto") -> LowRank | None:
        """Return log psi in factors where that moves fewer bytes (``ops.keeps_factors``), else None."""
        head, hidden = self.head, self.hidden
        if not isinstance(head, LowRankHead) or head.config.activation != "identity" or hidden is None:
            return None
        kept = ops.keeps_factors(len(hidden), head.up.shape[1], hidden.device, backend)
        return head.factors(hidden, condition) if kept else None

    def twist(self, condition: Tensor | None = None, backend: str = "auto") -> Tensor | LowRank:
        """Return log psi as the step takes it: in factors, or whole."""
        factors = self.factors(condition, backend)
        return self.log_psi(condition) if factors is None else factors
