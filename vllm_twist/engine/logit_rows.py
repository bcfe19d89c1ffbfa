"""Rows of logits: what both model runners do to them beside the step's own arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

#: Temperatures below which logits lose their row's maximum before they are divided: of logits of thousands float32
#: has three decimals.
COLD = 0.2


def centre(logits: Tensor, rows: Tensor) -> Tensor:
    """Take its maximum off each of the rows [R] of ``logits`` [N, V], in place, and return them, [R, 1].

    That changes no law, but keeps the log-sums of small temperatures small, and so exact. Maxima that are not finite
    are left, and 0 is returned for them.
    """
    peak = logits[rows].amax(-1, keepdim=True)
    peak = torch.where(torch.isfinite(peak), peak, 0.0)
    logits[rows] -= peak
    return peak


def lineage_logprobs(scores: Tensor, token: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token ids, scores, rank) of the drawn token and the ``most`` likely ones, drawn first.

    Args:
        scores: logits or log-probabilities of the ancestors' rows [N, V].
        token: drawn from them, [N].
    """
    drawn = token[:, None]
    drawn_score = scores.gather(1, drawn)
    top = scores.topk(min(most, scores.shape[-1]), dim=-1)
    ids, values = torch.cat([drawn, top.indices], dim=1), torch.cat([drawn_score, top.values], dim=1)
    return ids, values, (scores >= drawn_score).sum(-1)
