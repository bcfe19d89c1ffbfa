"""Resampling of weighted particles, for use outside the engine.

Everything works on log weights and takes its randomness as uniforms, so that the same uniforms
give the same ancestors anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_twist.config import did_you_mean
from vllm_twist.kernels import reference
from vllm_twist.kernels.schemes import SCHEMES as SCHEMES


class Resampled(NamedTuple):
    """What became of K particles: all [..., K] or [...].

    Attributes:
        ancestors: whose copy each particle now is, int64; its own index where it survives.
        log_w: the new log weights; their log-mean is that of the old ones.
        ess: effective sample size before resampling.
        resampled: whether it took place.
    """

    ancestors: Tensor
    log_w: Tensor
    ess: Tensor
    resampled: Tensor


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Return log((1/K) sum_k w_k), [...], for log weights [..., K]: log Z of a weighted population."""
    return torch.logsumexp(log_w, -1) - math.log(log_w.shape[-1])


def ess(log_w: Tensor) -> Tensor:
    """Return the effective sample size 1 / sum_k Wbar_k^2, [...], of log weights [..., K].

    NaN where the weights cannot be normalised: all of them zero, or one infinite or NaN.
    """
    return reference.effective_sample_size(log_w, torch.ones_like(log_w, dtype=torch.bool))


def resample(
    log_w: Tensor,
    scheme: str = "systematic",
    *,
    uniforms: Tensor,
    live: Tensor | None = None,
    threshold: float = 1.0,
) -> Resampled:
    """Resample particles whose weights have become too uneven (Zhao et al. 2024, Alg. 1).

        resampled = ESS < threshold * n  or  threshold >= 1        n = live particles >= 2
        ancestors ~ scheme(softmax(log_w over live))               a survivor keeps its place
        log_w     = log mean exp(log_w over live)

    Every scheme gives particle k on average ``n * softmax(log_w)[k]`` copies.

    Args:
        log_w: log weights [..., K] in nats.
        scheme: one of ``SCHEMES``.
        uniforms: [..., K] on [0, 1]; "systematic" reads the first of each row only.
        live: bool [..., K], the particles that take part; all by default.
        threshold: as a fraction of the live particles; 1 or more resamples always, 0 never.

    Raises:
        ValueError: a scheme that does not exist, or shapes, types or a threshold that do not fit.
    """
    if not log_w.is_floating_point() or log_w.ndim == 0 or log_w.numel() == 0:
        raise ValueError(
            f"`log_w` must hold floating-point log weights [..., K], got {log_w.dtype} {list(log_w.shape)}: "
            "pass at least one particle."
        )
    if scheme not in SCHEMES:
        raise ValueError(
            f"`scheme` must be one of {', '.join(SCHEMES)}, got {scheme!r}{did_you_mean(scheme, SCHEMES)}: "
            "pass one of these."
        )
    if not threshold >= 0:
        raise ValueError(f"`threshold` must lie in [0, inf), got {threshold!r}: 0 never resamples, 1 always does.")
    if uniforms.shape != log_w.shape:
        raise ValueError(
            f"`uniforms` must have the shape of `log_w`, {list(log_w.shape)}, got {list(uniforms.shape)}: "
            "pass torch.rand_like(log_w)."
        )
    if not ((uniforms >= 0) & (uniforms <= 1)).all():
        raise ValueError("`uniforms` must lie in [0, 1], got values outside: pass torch.rand_like(log_w).")
    if live is None:
        live = torch.ones_like(log_w, dtype=torch.bool)
    elif live.dtype != torch.bool or live.shape != log_w.shape:
        raise ValueError(
            f"`live` must be bool and have the shape of `log_w`, {list(log_w.shape)}, got {live.dtype} "
            f"{list(live.shape)}: pass a mask of the particles that take part."
        )
    groups, k = log_w.shape[:-1], log_w.shape[-1]
    rows = log_w.reshape(-1, k)
    ancestors, new_log_w, sizes, resampled = reference.resample(
        rows,
        live.reshape(-1, k),
        rows.new_ones(len(rows), dtype=torch.bool),
        rows.new_full((len(rows),), threshold, dtype=torch.float64),
        rows.new_full((len(rows),), SCHEMES.index(scheme), dtype=torch.int64),
        uniforms.reshape(-1, k),
    )
    return Resampled(
        ancestors.reshape(log_w.shape),
        new_log_w.reshape(log_w.shape),
        sizes.reshape(groups),
        resampled.reshape(groups),
    )
