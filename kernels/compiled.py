"""The passes over the vocabulary, compiled by Inductor: on a CPU one loop each, where PyTorch makes forty."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

# Compiled at the first call, for any number of rows from two on.
_softmax = torch.compile(reference.twist_softmax, dynamic=True)
_perturb = torch.compile(reference.perturb, dynamic=True)


def _whole(x: Tensor) -> Tensor:
    """Return a tensor that is no part of another, for which PyTorch would compile anew."""
    return x if x.is_contiguous() and not x.storage_offset() else x.clone(memory_format=torch.contiguous_format)


def twist_softmax(logits: Tensor, log_psi: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.twist_softmax``, both float32 [N, V]."""
    if len(logits) == 1:
        return reference.twist_softmax(logits, log_psi)
    return _softmax(_whole(logits), _whole(log_psi))


def twist_sample(
    logits: Tensor, log_psi: Tensor, lse0: Tensor, ancestors: Tensor | None, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.twist_sample``, whose tokens it draws unless two scores are within float32 rounding."""
    if len(logits) == 1:
        return reference.twist_sample(logits, log_psi, lse0, ancestors, keys)
    parents = torch.arange(len(keys), device=keys.device) if ancestors is None else ancestors
    # Inductor's own argmax would be slower than the pass.
    token = _perturb(_whole(logits), _whole(log_psi), parents, _whole(keys)).argmax(dim=-1)
    return reference.look_up(token, logits, log_psi, lse0, ancestors)


@torch.inference_mode()
def warm_up(vocab_size: int, device: torch.device) -> None:
    """Compile for a vocabulary, so that no request has to wait for it."""
    zeros = torch.zeros(2, vocab_size, device=device)
    lse0, _ = twist_softmax(zeros, zeros.clone())
    twist_sample(zeros, zeros.clone(), lse0, None, torch.arange(2, device=device))
