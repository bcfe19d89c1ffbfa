"""How good samples are: bounds of log Z and divergences, from log weights alone.

    E[log Z-hat] <= log Z <= E_sigma[log Z-hat]     the second around an exact sample of sigma     (Prop. 5.1)
    KL(q || sigma) = log Z - F_q      F_q = E_q[log p0 phi / q]                                    (Eq. 23)
    KL(sigma || q) = G_q - log Z      G_q = E_sigma[log p0 phi / q]

(Zhao et al. 2024, arXiv 2404.17546.) The difference of the bounds is the symmetrised divergence of the
sampler from its target, so that it bounds KL(q_SMC || sigma) and KL(sigma || q_SMC) of the one sample that SMC returns.

Everything is in nats, takes its randomness as an argument and knows neither models nor engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_twist.resampling import log_mean_exp

#: Half-width of a 95% interval in standard errors.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95% confidence interval (nats)."""

    mean: float
    ci95: float


def estimate(values: Sequence[float] | Tensor) -> Estimate:
    """Return mean and 95% interval (1.96 standard errors) of independent values.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    sample = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(sample) < 2:
        raise ValueError(f"`values` must hold at least 2 values for an interval, got {len(sample)}: run more repeats.")
    if not torch.isfinite(sample).all():
        bad = sample[~torch.isfinite(sample)]
        raise ValueError(
            f"`values` must be finite, got {float(bad[0])} in {len(bad)} of {len(sample)}: a log Z-hat of -inf means "
            "that no particle hit the target; use more particles or a better twist."
        )
    return Estimate(float(sample.mean()), Z95 * float(sample.std()) / math.sqrt(len(sample)))


@dataclass(frozen=True)
class Sandwich:
    """A lower and an upper bound of log Z, each estimated from independent runs."""

    lower: Estimate
    upper: Estimate

    @property
    def gap(self) -> Estimate:
        """Upper minus lower bound: the symmetrised KL between the sampler and its target, in expectation."""
        return Estimate(self.upper.mean - self.lower.mean, math.hypot(self.lower.ci95, self.upper.ci95))

    @property
    def log_z(self) -> Estimate:
        """The mid-point; its interval reaches to both bounds and their intervals."""
        half = max(self.gap.mean, 0.0) / 2
        return Estimate(
            (self.lower.mean + self.upper.mean) / 2, half + math.hypot(self.lower.ci95, self.upper.ci95) / 2
        )


def paired_midpoint(lower: Sequence[float], upper: Sequence[float]) -> Estimate:
    """Return the mid-point of bounds that were measured in pairs, on the same targets; as ``Sandwich.log_z``.

    What the targets differ in moves both bounds alike, so that the interval is that of the pairs' own mid-points.

    Raises:
        ValueError: as ``estimate``, or lengths that differ.
    """
    middle = estimate([(low + high) / 2 for low, high in zip(lower, upper, strict=True)])
    gap = sum(high - low for low, high in zip(lower, upper, strict=True)) / len(lower)
    return Estimate(middle.mean, max(gap, 0.0) / 2 + middle.ci95)


def tightest(sandwiches: Sequence[Sandwich]) -> Sandwich:
    """Return the sandwich whose mid-point has the narrowest interval."""
    return min(sandwiches, key=lambda sandwich: sandwich.log_z.ci95)


def unbiased_log_z(log_z: Sequence[float] | Tensor) -> Estimate:
    """Return the log of the mean of Z-hat, for where no upper bound can be had.

    The mean is unbiased, its logarithm is not; the interval is that of the mean, by the delta method.

    Raises:
        ValueError: as ``estimate``, or every Z-hat is 0.
    """
    values = torch.as_tensor(log_z, dtype=torch.float64)
    top = float(values.max())
    if not math.isfinite(top):
        raise ValueError(f"`log_z` must hold a finite value, got {top} at most: no particle hit the target.")
    scaled = estimate(torch.exp(values - top))
    return Estimate(top + math.log(scaled.mean), scaled.ci95 / scaled.mean)


def iwae(log_w: Tensor, exact: Tensor | None = None) -> Tensor:
    """Return log Z-hat of K independent samples, [R]: lower bounds, or upper ones around exact samples.

    Args:
        log_w: log p0 phi / q of samples of q, [R, K].
        exact: log p0 phi / q of one exact sample of sigma per run, [R]; it takes the place of the
            first of the K, the others may be those of the lower bound.

    Raises:
        ValueError: shapes that do not fit.
    """
    if log_w.ndim != 2 or log_w.shape[1] == 0:
        raise ValueError(
            f"`log_w` must have the shape [R, K] with K >= 1, got {list(log_w.shape)}: pass one row a run."
        )
    if exact is None:
        return log_mean_exp(log_w)
    if exact.shape != log_w.shape[:1]:
        raise ValueError(
            f"`exact` must hold one log weight per run, [{len(log_w)}], got {list(exact.shape)}: pass as many exact "
            "samples as runs."
        )
    return log_mean_exp(torch.cat([exact[:, None], log_w[:, 1:]], -1))


def kl_q_sigma(f_q: Estimate, log_z: Estimate) -> Estimate:
    """Return KL(q || sigma) = log Z - F_q, F_q the mean of log p0 phi / q over samples of q."""
    return Estimate(log_z.mean - f_q.mean, math.hypot(f_q.ci95, log_z.ci95))


def kl_sigma_q(g_q: Estimate, log_z: Estimate) -> Estimate:
    """Return KL(sigma || q) = G_q - log Z, G_q the mean of log p0 phi / q over exact samples of sigma."""
    return Estimate(g_q.mean - log_z.mean, math.hypot(g_q.ci95, log_z.ci95))


# -- Exact samples -------------------------------------------------------------------------------
Sequences = list[list[int]]


def accepted(log_phi: Tensor, log_bound: float, generator: torch.Generator) -> Tensor:
    """Return which of N samples of p0 rejection sampling keeps: bool [N], each with probability phi / bound.

    Those are exact samples of sigma, independent of each other. ``log_phi`` [N] must not exceed ``log_bound``.
    """
    uniforms = torch.rand(len(log_phi), dtype=log_phi.dtype, generator=generator)
    return uniforms.log() < log_phi - log_bound


def rejection(
    draw: Callable[[int], Sequences],
    log_phi: Callable[[Sequences], Sequence[float]],
    log_bound: float,
    *,
    count: int,
    max_draws: int,
    generator: torch.Generator,
    batch: int = 256,
) -> tuple[Sequences, int]:
    """Draw exact samples of sigma from p0, by accepting each sample with probability phi / bound.

    Args:
        draw: n to n independent samples of p0.
        log_phi: their log potentials.
        log_bound: upper bound of log phi.
        count: how many exact samples to collect.
        max_draws: samples of p0 after which to give up.
        generator: source of the accepting uniforms.
        batch: samples of p0 per call of ``draw``.

    Returns:
        up to ``count`` exact samples, independent of each other, and the number of draws made.

    Raises:
        ValueError: a log phi above the bound.
    """
    exact: Sequences = []
    drawn = 0
    while len(exact) < count and drawn < max_draws:
        samples = draw(min(batch, max_draws - drawn))
        drawn += len(samples)
        values = torch.tensor(log_phi(samples), dtype=torch.float64)
        if values.max() > log_bound + 1e-6:
            raise ValueError(
                f"`log_bound` must be an upper bound of log phi, got {log_bound:g}, but a sample has "
                f"{float(values.max()):g}: raise it."
            )
        keep = accepted(values, log_bound, generator).tolist()
        exact += [sample for sample, kept in zip(samples, keep, strict=True) if kept]
    return exact[:count], drawn


def ancestral(outputs: Sequences, horizon: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (s_1:T, o_T) of samples of p0 with T + c tokens: s is an exact sample of sigma given o (App. B.2).

    With phi = p0(o_T | s_1:T) the pair is a draw from p0(s) p0(o | s) = p0(o) sigma(s | o). Outputs
    that ended before T + c tokens are left out: none of them can be continued by any o.

    Args:
        outputs: samples of p0 with up to ``horizon + length`` tokens.
        horizon: T.
        length: c.
    """
    for output in outputs:
        if len(output) == horizon + length:
            yield output[:horizon], output[horizon:]
