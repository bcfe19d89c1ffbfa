"""Draw the sequences that a training step learns from.

A ``Sampler`` takes ``DrawRequest``s, each for one prompt, and answers with token ids. What the
gradient needs beside them, log p0, log psi and log q of every token, comes from one teacher-forced
pass over what was drawn, so that a sampler may be any program: the engine
(``vllm_twist.training.samplers.vllm``), or transformers on machines without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_twist.kernels.schemes import may_resample
from vllm_twist.resampling import resample
from vllm_twist.twist import TwistHead

#: Resample a population of particles when its ESS falls below this fraction of the live ones.
ESS_THRESHOLD = 0.5

#: p0: the model. q: the twist-induced proposal p0 psi, token by token, without resampling. smc: the
#: particles of twisted SMC for the target p0 psi, resampled by ESS, with their final weights.
LAWS = ("p0", "q", "smc")


@dataclass(frozen=True)
class DrawRequest:
    """Ask for ``count`` outputs that follow one prompt.

    Attributes:
        prompt_ids: s_0, at least one token.
        count: number of outputs, at least one.
        law: one of ``LAWS``.
        seed: the same request to the same sampler with the same head gives the same outputs.
        max_tokens: length at which outputs are cut.
        condition: token ids of o_T, for a conditional head.
    """

    prompt_ids: tuple[int, ...]
    count: int
    law: str
    seed: int
    max_tokens: int
    condition: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Draws:
    """Outputs for one request.

    Attributes:
        token_ids: the outputs, each with its terminating token.
        log_w: their log weights towards p0 psi (nats), psi at the last token in place of phi, up to a
            constant: what remains to be done for sigma is log phi - log psi there. None for p0.
    """

    token_ids: list[list[int]]
    log_w: list[float] | None = None


class Sampler(Protocol):
    """Draws from p0 and from a twist head's proposal, at temperature 1: p0 is the model's own softmax."""

    def set_head(self, head: TwistHead) -> None:
        """Use the head, as it is now, for all later requests."""

    def sample(self, requests: Sequence[DrawRequest]) -> list[Draws]:
        """Answer every request, in order."""

    def close(self) -> None:
        """Give back what the sampler holds; it draws nothing any more."""


def end_token_ids(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """Return the tokens that end an output: the generation config's, or the tokenizer's.

    Raises:
        ValueError: neither names one.
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    if ids is None:
        raise ValueError(
            "`eos_token_id` must be set in the model's generation config or the tokenizer, got None in both: set the "
            "token that ends an output."
        )
    return frozenset([ids] if isinstance(ids, int) else ids)


def check_length(model: Any, prompt_ids: Sequence[int], max_tokens: int) -> None:
    """Raise ValueError for an empty prompt, or one that leaves no room in the model's context."""
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if not 0 < len(prompt_ids) <= context - max_tokens:
        raise ValueError(
            f"`prompt_ids` must hold 1 to {context - max_tokens} tokens, got {len(prompt_ids)}: with `max_tokens` "
            f"{max_tokens} it has to fit a context of {context}; shorten either."
        )


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Return the model's logits [N, V] for final hidden states [N, H], in float32."""
    return model.get_output_embeddings()(hidden).float()


def head_output(
    model: Any, head: TwistHead, hidden: Tensor, condition: Tensor | None = None, *, logit: bool = False
) -> Tensor:
    """Return log psi [N, V] for final hidden states [N, H], or the head's ``logit``, in float32."""
    lm_head = model.get_output_embeddings()
    dtype = next(head.parameters()).dtype
    function = head.logit if logit else head
    output = function(hidden.to(dtype), lambda update: lm_head(update.to(lm_head.weight.dtype)), condition)
    return output.float()


def prefill(model: Any, prompt_ids: Sequence[int], count: int) -> tuple[Any, Tensor]:
    """Compute a prompt once; return its KV cache for ``count`` rows and its last hidden state [count, H]."""
    inputs = torch.tensor([list(prompt_ids)], device=model.device)
    output = model.base_model(input_ids=inputs, use_cache=True)
    output.past_key_values.batch_repeat_interleave(count)
    return output.past_key_values, output.last_hidden_state[:, -1].expand(count, -1)


def condition_state(model: Any, condition: Sequence[int] | None) -> Tensor | None:
    """Return what a conditional head reads of o_T [H]: the last hidden state of a pass over o_T alone."""
    if condition is None:
        return None
    inputs = torch.tensor([list(condition)], device=model.device)
    return model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0, -1]


class TransformersSampler:
    """Draw with a Hugging Face model, its KV cache and one step per token.

    Rows that have ended leave the batch. Everything random comes from the request's seed.
    """

    def __init__(self, model: Any, end_ids: frozenset[int]) -> None:
        self.model = model
        self.end_ids = end_ids
        self.head: TwistHead | None = None

    def set_head(self, head: TwistHead) -> None:
        self.head = head

    def close(self) -> None:
        self.head = None

    def sample(self, requests: Sequence[DrawRequest]) -> list[Draws]:
        return [self._draw(request) for request in requests]

    @torch.no_grad()
    def _draw(self, request: DrawRequest) -> Draws:
        """Weigh, resample, then sample token by token, as the engine does (Zhao et al. 2024, Prop. 3.3)."""
        check_length(self.model, request.prompt_ids, request.max_tokens)
        if request.law != "p0" and self.head is None:
            raise ValueError(f"`law` must be p0 before a head is set, got {request.law!r}: call set_head first.")
        head = None if request.law == "p0" else self.head
        device = self.model.device
        generator = torch.Generator(device).manual_seed(request.seed)
        condition = condition_state(self.model, request.condition)
        cache, hidden = prefill(self.model, request.prompt_ids, request.count)
        outputs: list[list[int]] = [[] for _ in range(request.count)]
        live = list(range(request.count))
        log_w = torch.zeros(request.count, device=device)
        before = torch.zeros(request.count, device=device)  # log psi of the live rows' last tokens
        for position in range(1, request.max_tokens + 1):
            logits = log_p = logits_of(self.model, hidden).log_softmax(-1)
            if head is not None:
                log_psi = head_output(self.model, head, hidden, condition)
                logits = log_p + log_psi
                log_w[live] += torch.logsumexp(logits, -1) - before
                if request.law == "smc" and may_resample(position, request.max_tokens):
                    uniforms = torch.rand(len(live), generator=generator, device=device)
                    ancestors, log_w[live], _, resampled = resample(
                        log_w[live], uniforms=uniforms, threshold=ESS_THRESHOLD
                    )
                    if resampled:
                        cache.reorder_cache(ancestors)
                        logits, log_psi = logits[ancestors], log_psi[ancestors]
                        histories = [list(outputs[live[a]]) for a in ancestors.tolist()]
                        for row, history in zip(live, histories, strict=True):
                            outputs[row] = history
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            if head is not None:
                before = log_psi.gather(1, drawn)[:, 0]
            tokens = drawn[:, 0].tolist()
            for row, token in zip(live, tokens, strict=True):
                outputs[row].append(token)
            staying = [i for i, token in enumerate(tokens) if token not in self.end_ids]
            if not staying or position == request.max_tokens:
                break
            if len(staying) < len(live):
                index = torch.tensor(staying, device=device)
                cache.batch_select_indices(index)
                drawn, before = drawn[index], before[index] if head is not None else before
                live = [live[i] for i in staying]
            output = self.model.base_model(input_ids=drawn, past_key_values=cache, use_cache=True)
            cache, hidden = output.past_key_values, output.last_hidden_state[:, -1]
        return Draws(outputs, None if head is None else log_w.tolist())
