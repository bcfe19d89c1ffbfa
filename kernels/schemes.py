"""Resampling: the schemes' names, and when a population resamples. No torch: numbers do as well as tensors."""

from __future__ import annotations

from typing import Any

SYSTEMATIC, STRATIFIED, MULTINOMIAL, RESIDUAL = range(4)
#: Scheme names in the order of their codes.
SCHEMES = ("systematic", "stratified", "multinomial", "residual")


def may_resample(position: Any, last: Any) -> Any:
    """Return whether particles that are weighed first may resample before they draw token ``position`` of ``last``.

    Both count from 1. Before the first token the weights are equal, before the last it would only add noise.
    """
    return (position > 1) & (position < last)


def is_uneven(ess: Any, threshold: Any, live: Any) -> Any:
    """Return whether ``live`` particles of this effective sample size resample.

    A threshold of 1 or more means at every step; an ESS of NaN, of weights that cannot be normalised, never does.
    """
    return (ess == ess) & ((ess < threshold * live) | (threshold >= 1))
