"""The passes over the vocabulary, compiled by Inductor: on a CPU one loop each, where PyTorch makes forty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference


def _whole(x: Tensor) -> Tensor:
    """Return a tensor that is no part of another, for which PyTorch would compile anew."""
    return x if x.is_contiguous() and not x.storage_offset() else x.clone(memory_format=torch.contiguous_format)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, for any number of rows from two on; a single one is left as it is."""
    compiled = torch.compile(function, dynamic=True)

    def call(*args: Tensor) -> Any:
        return function(*args) if len(args[0]) == 1 else compiled(*map(_whole, args))

    return call


# As in ``reference``, logits and log psi float32 [N, V]; the tokens are the same unless two scores are within
# float32 rounding.
twist_softmax = _compile(reference.twist_softmax)
weigh_and_sample = _compile(reference.weigh_and_sample)
_sample = _compile(reference.twist_sample)


def twist_sample(
    logits: Tensor, log_psi: Tensor, lse0: Tensor, ancestors: Tensor | None, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.twist_sample``."""
    parents = torch.arange(len(keys), device=keys.device) if ancestors is None else ancestors
    return _sample(logits, log_psi, lse0, parents, keys)


@torch.inference_mode()
def warm_up(vocab_size: int, device: torch.device) -> None:
    """Compile for a vocabulary, so that no request has to wait for it."""
    logits, log_psi = (torch.zeros(2, vocab_size, device=device) for _ in range(2))
    keys = torch.arange(2, device=device)
    lse0, _ = twist_softmax(logits, log_psi)
    twist_sample(logits, log_psi, lse0, None, keys)
    weigh_and_sample(logits, log_psi, keys, torch.zeros(2, device=device, dtype=torch.float64), lse0)
