"""A Hugging Face model as the sampler of training, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_twist.kernels.schemes import may_resample
from vllm_twist.resampling import resample
from vllm_twist.training.samplers.base import (
    ESS_THRESHOLD,
    DrawRequest,
    Draws,
    check_length,
    condition_state,
    head_output,
    logits_of,
    prefill,
)
from vllm_twist.twist import TwistHead


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
