"""Twisted sequential Monte Carlo over token sequences (Zhao et al. 2024, arXiv 2404.17546).

    target    sigma(s_1:T) = p0(s_1:T) phi(s_1:T) / Z                            (Eq. 1)
    weights   w_t = p0(s_t|s_1:t-1) / q(s_t|s_1:t-1) * psi_t / psi_{t-1}         (Eq. 10)
              with psi_0 = 1 and phi in place of psi_T
    estimate  Z-hat, the mean of the final weights: E[Z-hat] = Z                 (Eq. 8)

This is the algorithm of the engine for any sequence model that fits in a function, and the place
where its claims can be checked exactly: all randomness comes through one callable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_twist.config import did_you_mean
from vllm_twist.kernels.schemes import is_uneven, may_resample
from vllm_twist.resampling import ess, log_mean_exp

#: Draw one index per row: log-probabilities [N, n], normalised or not, to int64 [N]. N may be 0.
Draw = Callable[[Tensor], Tensor]

PROPOSALS = ("twist", "base")
ORDERS = ("weigh_first", "sample_first")


@dataclass(frozen=True)
class Target:
    """A base model p0, its twists psi and a potential phi, over sequences of ``horizon`` tokens.

    Attributes:
        log_p: prefixes int64 [K, t-1] to log p0 of every next token [K, V], normalised.
        log_psi: prefixes [K, t-1] to log psi_t of the prefix with every next token [K, V], -inf
            only where phi vanishes on every continuation. At t = T only the proposal reads it; a
            good one is close to log phi there.
        log_phi: sequences [K, T] to the log potential [K]; -inf where the target forbids them.
        horizon: T, the number of tokens; the largest one with ``eos``.
        eos: a token that ends a sequence before T. Such a sequence is filled up with it, in prefixes
            and sequences alike; what ``log_p`` and ``log_psi`` say of its continuations is not read.
    """

    log_p: Callable[[Tensor], Tensor]
    log_psi: Callable[[Tensor], Tensor]
    log_phi: Callable[[Tensor], Tensor]
    horizon: int
    eos: int | None = None


@dataclass(frozen=True)
class Population:
    """K weighted sequences.

    Attributes:
        sequences: int64 [K, T], filled up with EOS.
        log_w: log weights [K] (nats); normalised, they make the sequences a sample of sigma.
        log_z: log Z-hat, the log-mean of the weights. From ``smc`` its mean is a lower bound of
            log Z; with ``pinned`` an exact sample of sigma, an upper bound (Prop. 5.1).
        ess: effective sample size of the final weights.
        num_resamplings: how often the population was resampled.
    """

    sequences: Tensor
    log_w: Tensor
    log_z: Tensor
    ess: Tensor
    num_resamplings: int


def categorical(generator: torch.Generator) -> Draw:
    """Return a ``Draw`` that reads its randomness from ``generator``."""

    def draw(log_probs: Tensor) -> Tensor:
        return torch.multinomial(log_probs.softmax(-1), 1, generator=generator)[:, 0]

    return draw


def _or_one(log_value: Tensor) -> Tensor:
    """Return the log values with those of zero set to one: a particle of weight zero keeps that weight."""
    return log_value.masked_fill(log_value == float("-inf"), 0.0)


def smc(
    target: Target,
    particles: int,
    draw: Draw,
    *,
    proposal: str = "twist",
    order: str = "weigh_first",
    threshold: float = 1.0,
    resample_at: Collection[int] | None = None,
    pinned: Tensor | None = None,
) -> Population:
    """Run twisted SMC with K particles (Alg. 1), or conditional SMC around a given sequence (Alg. 2).

    For t = 1..T the two orders do

        sample_first (the paper):  s_t ~ q;  w *= w_t;  resample        at 1 <= t < T
        weigh_first (the engine):  w *= what is known of w_t before s_t is;  resample  at 1 < t < T;
                                   s_t ~ q;  w *= the rest of w_t

    With q the twist-induced proposal all of w_t but phi is known before s_t (Eq. 16), and children
    of one parent draw different tokens. Resampling is multinomial and leaves every weight at the
    mean, so that Z-hat is the mean of the final weights. Weights that are all zero or not finite
    are left alone. Tensors are made on torch's default device.

    A particle that ends with EOS has its final weight, phi in place of psi_t; the others go on
    resampling among themselves, and their mean weight and ESS are those of the live. Z-hat stays
    unbiased, and so does 1 / Z-hat when particle 0 is pinned: once it has ended, the others resample as if there
    were none.

    Args:
        target: what to sample from.
        particles: K.
        draw: the source of all randomness: of tokens, and of ancestors.
        proposal: "twist" for q = p0 psi_t / Z^pi_t (Eq. 14), "base" for q = p0.
        order: "weigh_first" or "sample_first".
        threshold: resample when ESS < threshold * K; 1 or more at every step, 0 never.
        resample_at: the steps t that may resample, where those above do not suit.
        pinned: int64 [T]. Particle 0 is held to this sequence; the others choose ancestors among
            all. If it is an exact sample of sigma, E[1 / Z-hat] = 1 / Z.

    Raises:
        ValueError: an argument out of range.
    """
    for name, value, known in (("proposal", proposal, PROPOSALS), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(
                f"`{name}` must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}: "
                "pass one of these."
            )
    if particles < 1:
        raise ValueError(f"`particles` must be at least 1, got {particles}: raise it.")
    if not threshold >= 0:
        raise ValueError(f"`threshold` must lie in [0, inf), got {threshold!r}: 0 never resamples, 1 always does.")
    if pinned is not None and pinned.shape != (target.horizon,):
        raise ValueError(
            f"`pinned` must hold one token per step, [{target.horizon}], got {list(pinned.shape)}: "
            "pass one sequence of the target."
        )
    weigh_first = order == "weigh_first"
    if resample_at is None:
        horizon = target.horizon
        resample_at = [t for t in range(1, horizon) if not weigh_first or may_resample(t, horizon)]
    is_pinned = torch.arange(particles) < (0 if pinned is None else 1)
    ended = torch.zeros(particles, dtype=torch.bool)
    num_resamplings = 0

    def resample(log_w: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the new weights, and each tensor of the state with its rows chosen anew."""
        nonlocal num_resamplings
        live, free = torch.nonzero(~ended)[:, 0], torch.nonzero(~ended & ~is_pinned)[:, 0]
        if len(live) < 2:
            return log_w, *state
        if not is_uneven(ess(log_w[live]), threshold, len(live)):
            return log_w, *state
        log_mean = log_mean_exp(log_w[live])
        num_resamplings += 1
        ancestors = torch.arange(particles)
        ancestors[free] = live[draw(log_w[live].expand(len(free), len(live)))]
        return torch.where(ended, log_w, log_mean), *(x[ancestors] for x in state)

    prefixes = torch.empty(particles, 0, dtype=torch.int64)
    log_w = previous = torch.zeros(particles)
    for t in range(1, target.horizon + 1):
        log_p, log_psi = target.log_p(prefixes), target.log_psi(prefixes)
        log_q = log_p + log_psi if proposal == "twist" else log_p
        if proposal == "twist":
            # log Z^pi_t - log psi_{t-1}: w_t but for psi_t (or phi) over the psi_t of the proposal.
            log_norm = torch.logsumexp(log_q, -1)
            log_w = torch.where(ended, log_w, log_w + log_norm - previous)
            # Where no continuation is left any will do: the weight is zero.
            log_q = torch.where((log_norm > float("-inf"))[:, None], log_q, log_p)
        if weigh_first and t in resample_at:
            log_w, prefixes, log_q, log_psi, previous = resample(log_w, prefixes, log_q, log_psi, previous)
        token = torch.full((particles,), 0 if target.eos is None else target.eos)
        free = ~ended & ~is_pinned
        token[free] = draw(log_q[free])
        if pinned is not None:
            token[0] = pinned[t - 1]
        prefixes = torch.cat([prefixes, token[:, None]], -1)
        current = drawn = log_psi.gather(-1, token[:, None])[:, 0]
        ends = torch.zeros_like(ended) if target.eos is None else token == target.eos
        last = ends | (t == target.horizon)
        if last.any():
            filled = torch.nn.functional.pad(prefixes, (0, target.horizon - t), value=target.eos or 0)
            current = torch.where(last, target.log_phi(filled), drawn)
        final = log_w + current - (_or_one(drawn) if proposal == "twist" else previous)
        log_w = torch.where(ended, log_w, final)
        previous = _or_one(current)
        ended = ended | ends
        if not weigh_first and t in resample_at:
            log_w, prefixes, previous = resample(log_w, prefixes, previous)
    return Population(prefixes, log_w, log_mean_exp(log_w), ess(log_w), num_resamplings)
