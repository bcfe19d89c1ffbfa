"""Score given outputs by one teacher-forced pass of the base model and its twist head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_twist.objectives import log_normaliser
from vllm_twist.training import attention
from vllm_twist.training.samplers.base import condition_state, head_output, logits_of, prefill
from vllm_twist.twist import TwistHead

#: Values over the vocabulary that are held at a time; what lies beyond is computed anew for the gradient.
MAX_VALUES = 2**26
#: Tokens in one forward pass of the model.
MAX_TOKENS = 2**16
#: Padding that is not worth a pass of its own, in tokens.
MIN_PADDING = 256


@dataclass(frozen=True)
class Scores:
    """Values of B given outputs of one prompt, padded on the right to the longest length T; all [B, T].

    Attributes:
        mask: True up to and with the final token.
        log_p: log p0 of each token (nats).
        logit: the head's output at each token, before its activation; carries the gradient.
        log_psi: log twist at each token; carries the gradient.
        log_norm: log Z^pi_t, the normaliser of q at each step; carries the gradient.
    """

    mask: Tensor
    log_p: Tensor
    logit: Tensor
    log_psi: Tensor
    log_norm: Tensor

    @property
    def log_q(self) -> Tensor:
        """log probability of each token under the twist-induced proposal (Zhao et al. 2024, Prop. 3.3)."""
        return self.log_p + self.log_psi - self.log_norm

    def final(self, values: Tensor) -> Tensor:
        """Return values [B] at the final tokens."""
        return values.gather(1, self.mask.sum(1, keepdim=True) - 1)[:, 0]


def score(
    model: Any,
    head: TwistHead,
    prompt_ids: Sequence[int],
    token_ids: Sequence[Sequence[int]],
    condition: Sequence[int] | None = None,
    *,
    packed: bool = False,
) -> Scores:
    """Return log p0, log psi and the proposal's normaliser of outputs of one prompt, with gradient to the head.

    Args:
        model: in transformers.
        head: of this model.
        prompt_ids: s_0.
        token_ids: outputs, each with its terminating token.
        condition: token ids of o_T, for a conditional head.
        packed: whether to pack all outputs into one row, which the model's attention has to take.
    """
    with torch.no_grad():
        hidden = (attention.packed_states if packed else _shared_states)(model, prompt_ids, token_ids, MAX_TOKENS)
        state = condition_state(model, condition)
    device = hidden.device
    tokens = torch.tensor([token for row in token_ids for token in row], device=device)
    lengths = torch.tensor([len(row) for row in token_ids], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    chunk = max(1, MAX_VALUES // head.config.vocab_size)
    flat: tuple[Tensor, ...]
    if len(tokens) <= chunk:
        flat = _read(model, head, hidden, tokens, state)
    else:
        parts = [
            checkpoint(_read, model, head, h, t, state, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), tokens.split(chunk), strict=True)
        ]
        flat = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(mask, *(column.new_zeros(mask.shape).masked_scatter(mask, column) for column in flat))


def _read(model: Any, head: TwistHead, hidden: Tensor, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, ...]:
    """Return log p0, logit, log psi and log Z^pi [N] of tokens [N] after prefixes [N, H]."""
    with torch.no_grad():
        log_p = logits_of(model, hidden).log_softmax(-1)
    logit = head_output(model, head, hidden, state, logit=True)
    log_psi = head.activate(logit)
    index = tokens[:, None]
    picked = (values.gather(1, index)[:, 0] for values in (log_p, logit, log_psi))
    return (*picked, log_normaliser(log_p, log_psi))


def _shared_states(
    model: Any, prompt_ids: Sequence[int], token_ids: Sequence[Sequence[int]], max_tokens: int
) -> Tensor:
    """Return the hidden state before each output token [N, H], row after row.

    The prompt is computed once and shared through its KV cache, and rows of like length go together;
    padding stands on the right, where causal attention never sees it.
    """
    states: dict[int, Tensor] = {}
    for chosen in _passes([len(row) for row in token_ids], len(prompt_ids), max_tokens):
        cache, first = prefill(model, prompt_ids, len(chosen))
        columns = [first[:, None]]
        width = len(token_ids[chosen[-1]])
        if width > 1:
            inputs = [[*token_ids[k][:-1], *[0] * (width - len(token_ids[k]))] for k in chosen]
            output = model.base_model(
                input_ids=torch.tensor(inputs, device=model.device), past_key_values=cache, use_cache=True
            )
            columns.append(output.last_hidden_state)
        block = torch.cat(columns, 1)
        states.update((k, block[i, : len(token_ids[k])]) for i, k in enumerate(chosen))
    return torch.cat([states[k] for k in range(len(token_ids))])


def _passes(lengths: Sequence[int], prompt_length: int, max_tokens: int) -> list[list[int]]:
    """Return the rows of each forward pass, shortest first: rows of like length, so that little is padding."""
    passes: list[list[int]] = [[]]
    total = 0
    for k in sorted(range(len(lengths)), key=lambda k: lengths[k]):
        padded = (len(passes[-1]) + 1) * lengths[k]
        total += lengths[k]
        full = padded + (len(passes[-1]) + 1) * prompt_length > max_tokens
        if passes[-1] and (full or padded - total > max(MIN_PADDING, total / 4)):
            passes.append([])
            total = lengths[k]
        passes[-1].append(k)
    return passes
