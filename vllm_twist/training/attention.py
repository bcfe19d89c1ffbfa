"""Attention of the teacher-forced pass, through transformers' own registry.

``sdpa`` and ``eager`` come with transformers, ``flash_attention_2`` with the package flash-attn.
``xformers`` is registered here: memory-efficient attention of the package of that name. The last two
take packed sequences: many of different lengths in one row, without padding, none seeing another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "xformers")
PACKED = ("flash_attention_2", "xformers")


def prepare(name: str) -> None:
    """Make an implementation known to transformers.

    Raises:
        ValueError: its package is not installed; the message says which.
    """
    remedies = {"flash_attention_2": ("flash_attn", "flash-attn"), "xformers": ("xformers", "'vllm-twist[xformers]'")}
    if name in remedies:
        package, install = remedies[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"`attention` {name} needs the package {package}, which is not installed: pip install {install}, or "
                "use sdpa."
            )
    if name == "xformers":
        register_xformers()


def check(name: str, model: Any) -> None:
    """Run an implementation that takes packed sequences once on the model's device, in its dtype.

    Raises:
        ValueError: it cannot run there.
    """
    if name not in PACKED:
        return
    try:
        with torch.no_grad():
            packed_states(model, [0], [[0, 0], [0]], 8)
    except (NotImplementedError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`attention` {name} cannot run on {model.device.type} in {model.dtype} ({reason}): use sdpa, or a GPU and "
            "dtype that it supports."
        ) from error


def register_xformers() -> None:
    """Register xformers' memory-efficient attention with transformers under the name ``xformers``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("xformers", xformers_attention)
    # As for flash attention: no mask where there is no padding, for causality is the kernel's own.
    AttentionMaskInterface.register("xformers", flash_attention_mask)


def xformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally: transformers' attention interface over ``xformers.ops``.

    Args:
        query: [B, heads, Q, D]; the last of the key's positions.
        key, value: [B, key heads, K, D]; fewer heads than the query's are shared by groups of these.
        attention_mask: must be None, as padding is not supported.
        cu_seq_lens_q: int32 [sequences + 1], where each of the packed sequences begins and ends.

    Returns:
        the outputs [B, Q, heads, D], and no weights.

    Raises:
        ValueError: padding, a sliding window or a soft cap.
    """
    import xformers.ops as ops
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, LowerTriangularFromBottomRightMask

    if attention_mask is not None:
        raise ValueError("`attention` xformers takes no padded batches, got a mask: use sdpa for these.")
    if softcap is not None or (sliding_window is not None and key.shape[2] > sliding_window):
        raise ValueError("`attention` xformers has neither sliding windows nor soft caps, as this model: use sdpa.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias: Any
    if cu_seq_lens_q is not None:
        bias = BlockDiagonalCausalMask.from_seqlens(cu_seq_lens_q.diff().tolist())
    elif query.shape[2] == 1:
        bias = None
    else:
        bias = LowerTriangularFromBottomRightMask()
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return ops.memory_efficient_attention(query, key, value, attn_bias=bias, p=dropout, scale=scaling), None


def packed_states(model: Any, prompt_ids: Sequence[int], token_ids: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
    """Return the hidden state before each output token [N, H], row after row, from rows packed into one.

    Args:
        max_tokens: of a forward pass; more rows take more passes.
    """
    parts: list[Tensor] = []
    rows = [[*prompt_ids, *output[:-1]] for output in token_ids]
    while rows:
        total = 0
        chosen: list[list[int]] = []
        while rows and (not chosen or total + len(rows[0]) <= max_tokens):
            chosen.append(rows.pop(0))
            total += len(chosen[-1])
        lengths = torch.tensor([len(row) for row in chosen])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(model.device, torch.int32)
        longest = int(lengths.max())
        states = model.base_model(
            input_ids=torch.tensor([[token for row in chosen for token in row]], device=model.device),
            position_ids=torch.cat([torch.arange(len(row)) for row in chosen])[None].to(model.device),
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]
        parts.extend(row[len(prompt_ids) - 1 :] for row in states.split(lengths.tolist()))
    return torch.cat(parts)
