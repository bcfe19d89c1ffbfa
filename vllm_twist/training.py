"""Train a twist head with a frozen Hugging Face model as base and as sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_twist.objectives import ctl_loss
from vllm_twist.potentials import LogPhi, load_potential
from vllm_twist.twist import TwistHead


@dataclass(frozen=True)
class Samples:
    """B outputs drawn for one prompt, padded on the right to the longest length T.

    Attributes:
        tokens: token ids [B, T].
        mask: True up to and with the final token of each row [B, T].
        log_p: log p0 of each token (nats) [B, T].
        log_q: log probability of each token under the proposal (nats) [B, T].
        hidden: final hidden state of the prefix before each token, which the twist head reads [B, T, H].
    """

    tokens: Tensor
    mask: Tensor
    log_p: Tensor
    log_q: Tensor
    hidden: Tensor

    def token_ids(self) -> list[list[int]]:
        """Return the outputs without padding."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.mask, strict=True)]


@torch.no_grad()
def sample(
    model: Any,
    prompt_ids: Sequence[int],
    count: int,
    max_tokens: int,
    eos_token_id: int,
    *,
    head: TwistHead | None = None,
    generator: torch.Generator | None = None,
) -> Samples:
    """Draw ``count`` outputs of at most ``max_tokens`` tokens from q ~ p0 psi (Prop. 3.3), or from p0 without a head.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if not 0 < len(prompt_ids) <= context - max_tokens:
        raise ValueError(
            f"`prompt_ids` must hold 1 to {context - max_tokens} tokens, got {len(prompt_ids)}: with `max_tokens` "
            f"{max_tokens} it has to fit a context of {context}; shorten either."
        )
    inputs = torch.tensor(prompt_ids, device=model.device).expand(count, -1)
    alive = torch.ones(count, dtype=torch.bool, device=model.device)
    cache, columns = None, []
    for _ in range(max_tokens):
        output = model.base_model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache, hidden = output.past_key_values, output.last_hidden_state[:, -1]
        logits = model.get_output_embeddings()(hidden).float()
        log_p = logits.log_softmax(-1)
        log_q = log_p if head is None else (log_p + log_psi(model, head, hidden)).log_softmax(-1)
        inputs = torch.multinomial(log_q.exp(), 1, generator=generator)
        columns.append((inputs[:, 0], alive, log_p.gather(1, inputs)[:, 0], log_q.gather(1, inputs)[:, 0], hidden))
        alive = alive & (inputs[:, 0] != eos_token_id)
        if not alive.any():
            break
    return Samples(*(torch.stack(column, 1) for column in zip(*columns, strict=True)))


def log_psi(model: Any, head: TwistHead, hidden: Tensor) -> Tensor:
    """Return log psi [N, V] of every next token for hidden states [N, H], in float32."""
    return head(hidden.to(next(head.parameters()).dtype), model.get_output_embeddings()).float()


def evaluate_log_phi(log_phi: LogPhi, tokenizer: Any, samples: Samples) -> Tensor:
    """Return log phi [B] of the samples.

    Raises:
        ValueError: ``log_phi`` does not give one number per sequence.
    """
    token_ids = samples.token_ids()
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    return torch.tensor(load_potential(log_phi)(token_ids, texts), device=samples.tokens.device)


def ctl_loss_of(model: Any, tokenizer: Any, log_phi: LogPhi, head: TwistHead, samples: Samples) -> Tensor:
    """Return the CTL loss of the head on samples of one prompt."""
    mask = samples.mask
    values = log_psi(model, head, samples.hidden[mask]).gather(1, samples.tokens[mask][:, None])
    values = torch.zeros_like(samples.log_p).masked_scatter(mask, values)
    return ctl_loss(values, samples.log_p, samples.log_q, evaluate_log_phi(log_phi, tokenizer, samples), mask)


def train_ctl(
    model: Any,
    tokenizer: Any,
    log_phi: LogPhi,
    prompts: Sequence[str],
    head: TwistHead,
    *,
    steps: int = 200,
    batch_size: int = 64,
    max_tokens: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[float]:
    """Train ``head`` in place by CTL on its own proposal and return the loss of every step.

    Each step takes the next prompt in turn, draws ``batch_size`` outputs from q ~ p0 psi with the
    present head, and moves the head by Adam. The model stays as it is; a head of another device or
    dtype than the model's is the caller's to convert.

    Args:
        log_phi: the target's potential, see ``LogPhi``.
        prompts: texts to continue; each is a target of its own with its own normaliser.
        progress: wraps the range of steps, ``tqdm`` for one.

    Raises:
        ValueError: a head that does not fit the model, no prompts, a tokenizer without an end token,
            or a batch from which nothing can be learned.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one text, got none: pass what the model should continue.")
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` must have an `eos_token_id`, got None: set the token that ends an output.")
    head.check_fits(model.config.hidden_size, model.get_output_embeddings().weight.shape[0])
    model.eval().requires_grad_(False)
    prompt_ids = [tokenizer(prompt).input_ids for prompt in prompts]
    generator = torch.Generator(model.device).manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    losses = []
    for step in progress(range(steps)):
        samples = sample(
            model,
            prompt_ids[step % len(prompts)],
            batch_size,
            max_tokens,
            tokenizer.eos_token_id,
            head=head,
            generator=generator,
        )
        loss = ctl_loss_of(model, tokenizer, log_phi, head, samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
