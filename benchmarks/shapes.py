"""Models with the shape of known ones and random weights: their speed is the same, and nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Llama's configurations, and one to rehearse with.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
    },
    "rehearsal": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
    },
}  # fmt: skip
RANK = 64
PROMPT = {"prompt_token_ids": list(range(2, 34))}


def make_model(shape: str, folder: Path) -> Path:
    """Write a model's configuration; vLLM makes its weights up (``load_format="dummy"``)."""
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, bos_token_id=0, eos_token_id=1,
        architectures=["LlamaForCausalLM"], dtype=torch.bfloat16,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    config.save_pretrained(folder / shape)
    return folder / shape


def make_head(kind: str, shape: str, folder: Path) -> Path:
    """Write a random head that fits the shape."""
    import torch

    from vllm_twist import TwistHead, TwistHeadConfig

    sizes = SHAPES[shape]
    rank = min(RANK, sizes["hidden_size"] // 4) if kind in ("low_rank", "tied") else None
    head = TwistHead.create(TwistHeadConfig(kind, sizes["hidden_size"], sizes["vocab_size"], rank), seed=0)
    head.to(torch.bfloat16).save_pretrained(folder / kind)
    return folder / kind


def engine_options(model: Path) -> dict[str, Any]:
    """Return what an engine of random weights is started with; prompts are token ids."""
    return {"model": str(model), "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
