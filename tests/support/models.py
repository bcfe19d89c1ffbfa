"""Models small enough for exact answers, saved with their heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_twist import TwistHead, TwistHeadConfig

HIDDEN = 64


@dataclass(frozen=True)
class Tiny:
    """A saved model, its head, and both in memory."""

    path: Path
    head_path: Path
    model: LlamaForCausalLM
    head: TwistHead
    vocab: int
    eos: int
    transition: Tensor | None = None

    def log_p(self, token_ids: list[list[int]]) -> Tensor:
        """Return next-token log-probabilities [N, T, V] of equally long sequences [N, T]."""
        with torch.no_grad():
            return self.model(torch.tensor(token_ids)).logits.log_softmax(-1)

    def logits_and_log_psi(
        self, token_ids: list[list[int]], condition: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits and log psi over the token that follows each sequence, both [N, V]."""
        with torch.no_grad():
            hidden = self.model.model(torch.tensor(token_ids)).last_hidden_state[:, -1]
            given = None if condition is None else self.model.model(torch.tensor([condition])).last_hidden_state[0, -1]
            return self.model.lm_head(hidden), self.head(hidden, self.model.lm_head, given)


def llama_config(vocab: int, eos: int, **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": eos,
            "tie_word_embeddings": False,
            "initializer_range": 0.3,
            **changes,
        }
    )


def save(folder: Path, model: LlamaForCausalLM, head: TwistHead, **fields: Any) -> Tiny:
    model.eval()
    model.save_pretrained(folder / "model")
    head.save_pretrained(folder / "head")
    return Tiny(folder / "model", folder / "head", model, head, **fields)


def random_model(
    folder: Path,
    vocab: int,
    eos: int,
    head_type: str = "linear",
    spread: float = 1.0,
    activation: str = "identity",
    conditional: bool = False,
) -> Tiny:
    """Return a random model, its logits tempered so that no token is nearly certain, and a random head.

    ``spread`` is the standard deviation of log psi: with wide ones the weights get tails that no
    affordable number of groups averages out.
    """
    torch.manual_seed(vocab)
    model = LlamaForCausalLM(llama_config(vocab, eos))
    with torch.no_grad():
        model.lm_head.weight *= 0.35
    rank = 8 if head_type in ("low_rank", "tied") else None
    head = TwistHead.create(TwistHeadConfig(head_type, HIDDEN, vocab, rank, activation, conditional), seed=3)
    tiny = Tiny(folder / "model", folder / "head", model, head, vocab, eos)
    prefixes = [[token, other] for token in range(vocab) for other in range(vocab)]
    _, log_psi = tiny.logits_and_log_psi(prefixes, [eos, 0] if conditional else None)
    last = {"linear": "weight", "mlp": "layers.2.weight", "low_rank": "up", "tied": "up"}[head_type]
    with torch.no_grad():
        head.get_parameter(last).mul_(spread / log_psi.std())
    return save(folder, model, head, vocab=vocab, eos=eos)


def bigram_model(folder: Path, vocab: int, eos: int) -> Tiny:
    """Return a model with p(v | s) = P[last token, v], and the head that makes its own target exact.

    Attention and MLP are zeroed, so that the final hidden state is the normalised embedding of the
    last token; with one-hot embeddings the LM head spells out log P.

    With values phi(a) for ending after a and u = P' u + P[:, eos] phi (P' without the EOS column),
    psi(a, v) = u(v), psi(a, eos) = phi(a) is harmonic: its expectation under P is u(a), the twist
    of the prefix. So it is the optimal twist of its own target for every horizon, Z = u(s_0), and
    no weight ever varies.
    """
    generator = torch.Generator().manual_seed(7)
    transition = torch.rand(vocab, vocab, generator=generator, dtype=torch.float64) + 0.2
    transition /= transition.sum(-1, keepdim=True)
    model = LlamaForCausalLM(llama_config(vocab, eos))
    scale = HIDDEN**0.5  # what RMS normalisation makes of a one-hot vector
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :vocab] = torch.eye(vocab)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :vocab] = (transition.log() / scale).T.float()
    phi = torch.rand(vocab, generator=generator, dtype=torch.float64) * 4 + 0.05
    stay = transition.clone()
    stay[:, eos] = 0
    u = torch.linalg.solve(torch.eye(vocab, dtype=torch.float64) - stay, transition[:, eos] * phi)
    psi = u[None, :].repeat(vocab, 1)
    psi[:, eos] = phi
    head = TwistHead.create(TwistHeadConfig("linear", HIDDEN, vocab))
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, :vocab] = (psi.log() / scale).T.float()
    return save(folder, model, head, vocab=vocab, eos=eos, transition=transition)
