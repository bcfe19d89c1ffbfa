"""Losses that teach a twist head from sampled sequences: pure maths on log probabilities (nats)."""

from __future__ import annotations

import torch
from torch import Tensor


def ctl_loss(log_psi: Tensor, log_p: Tensor, log_q: Tensor, log_phi: Tensor, mask: Tensor) -> Tensor:
    """Return the contrastive twist learning (CTL) loss with positives from the same batch.

    CTL matches every marginal of the target: mean over t of KL(sigma(s_1:t) || pi_t(s_1:t)), where
    sigma ~ p0 phi and pi_t ~ p0 psi_t. Up to a term free of psi that is

        mean_t [ -sum_k a_k log psi_t(s^k) + log 1/B sum_k exp(log p0(s^k_1:t) - log q(s^k_1:t) + log psi_t(s^k)) ]
        a = softmax_k(log p0(s^k) + log phi(s^k) - log q(s^k)),

    whose gradient is -mean_t sum_k (a_k - b_tk) d log psi_t(s^k), with b_tk the softmax over k of the
    exponents above: the positives' weights minus the negatives' (Zhao et al. 2024, arXiv 2404.17546,
    Sec. 4.1; approximate positives as in Sec. 4.1.2, from self-normalised importance sampling). The
    mean over t, not the paper's sum, keeps the scale of the gradient apart from the length. At psi = 1
    the value is near 0, and it falls to -mean_t KL(sigma(s_1:t) || p0(s_1:t)).

    Sequences of one batch share a prompt, for every prompt has its own normaliser, and may differ in
    length. A sequence that has ended stays as it is: later targets keep its whole probability, with
    psi_t = psi at its final token and p0 = q = 1 for the steps it no longer takes. So it counts, as
    positive and as negative, at every t up to the longest length in the batch, and the constant that
    psi_t is free up to has to agree between the steps at which sequences end and all later ones. To
    leave it out instead would compare only the survivors, and the twist of an early end against that
    of going on would never be learned. Padding beyond the longest sequence changes nothing.

    Args:
        log_psi: log twist values [B, T] of the sampled tokens, prefix by prefix; carries the gradient.
        log_p: log p0 of each token given its prefix [B, T].
        log_q: log proposal probability of each token given its prefix [B, T].
        log_phi: log potential [B] of the full sequences; -inf where phi = 0.
        mask: True [B, T] up to and with the final token of each sequence, False beyond. What the
            other arguments hold beyond is never read.

    Returns:
        The loss, a float32 (or wider) scalar. Only ``log_psi`` receives a gradient.

    Raises:
        ValueError: shapes that disagree, a mask with gaps or an empty row, phi zero for the whole
            batch, or values that are not finite.
    """
    if log_psi.ndim != 2 or 0 in log_psi.shape:
        raise ValueError(f"`log_psi` must have shape [B, T], got {list(log_psi.shape)}: pass one row per sequence.")
    for name, tensor in (("log_p", log_p), ("log_q", log_q), ("mask", mask)):
        if tensor.shape != log_psi.shape:
            raise ValueError(
                f"`{name}` must have the shape {list(log_psi.shape)} of `log_psi`, got {list(tensor.shape)}: "
                "pass one value per token."
            )
    if log_phi.shape != log_psi.shape[:1]:
        raise ValueError(
            f"`log_phi` must have shape [{log_psi.shape[0]}], got {list(log_phi.shape)}: pass one value per sequence."
        )
    mask = mask.bool()
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "`mask` must be True up to each sequence's final token and False beyond, got gaps: no padding "
            "on the left, and at least one token per row."
        )
    for name, tensor in (("log_psi", log_psi), ("log_p", log_p), ("log_q", log_q)):
        if not tensor[mask].isfinite().all():
            raise ValueError(
                f"`{name}` must be finite for every token, got inf or nan: lower the learning rate, or "
                "compute it in float32."
            )
    if log_phi.isnan().any() or (log_phi == torch.inf).any() or (log_phi == -torch.inf).all():
        raise ValueError(
            "`log_phi` must be below inf and above -inf for at least one sequence, got otherwise: no "
            "sequence of the batch has a weight to learn from, draw more."
        )

    dtype = torch.promote_types(log_psi.dtype, torch.float32)
    final = mask.sum(1, keepdim=True) - 1  # [B, 1] index of the final token
    steps = torch.arange(mask.shape[1], device=mask.device)
    log_psi = log_psi.to(dtype).gather(1, torch.minimum(steps, final))

    with torch.no_grad():
        # Ratio first, then the sum: the two log probabilities are long and nearly equal.
        log_w = torch.where(mask, log_p.to(dtype) - log_q.to(dtype), 0).cumsum(1)
        positive = torch.softmax(log_w[:, -1] + log_phi.to(dtype), 0)
        live = mask.any(0)

    log_z = torch.logsumexp(log_w + log_psi, 0) - torch.log(log_psi.new_tensor(float(len(mask))))
    return torch.where(live, log_z - positive @ log_psi, 0).sum() / live.sum()
