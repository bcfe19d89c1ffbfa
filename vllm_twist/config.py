"""What a user may ask for: engine settings, request settings, and the checks on both.

The names are the same everywhere: ``--twist-particles``, ``LLM(twist_particles=...)`` and the
request key ``twist_particles``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_twist.kernels.schemes import SCHEMES
from vllm_twist.options import at_least, check_fields, did_you_mean, flag, integer, number, one_of, option

PREFIX = "twist"
PROPOSALS = ("twist", "base")
#: Resampling schemes whose conditional form the engine has (``kernels.reference.resample``).
PINNED_SCHEMES = ("multinomial", "residual")


def _threshold(name: str, value: Any) -> float:
    parsed = number(name, value)
    if not (math.isfinite(parsed) and parsed >= 0):
        raise ValueError(
            f"`{name}` must lie in [0, inf), got {value!r}: 0 never resamples, 0.5 is the default, "
            "1 resamples at every step."
        )
    return parsed


def _token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"`{name}` must be a list of at least one token id, got {value!r}: pass token ids.")
    return tuple(integer(name, token, 0) for token in value)


def _scale(name: str, value: Any) -> float:
    parsed = number(name, value)
    if not math.isfinite(parsed):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}: 1 is the twist as learned, 0 turns it off.")
    return parsed


@dataclass(frozen=True)
class RequestConfig:
    """How one request is sampled; every value is checked on construction.

    Attributes:
        particles: K, the number of particles (lanes of the engine) that the request gets.
        ess_threshold: resample when the effective sample size of the live particles falls below
            this fraction of their number; 1 or more means at every step, 0 never.
        resampling: one of ``SCHEMES``.
        scale: factor on log psi; 0 samples from the base model.
        return_particles: whether the result lists every particle.
        proposal: what tokens are drawn from, "twist" for p0 psi_t / Z^pi_t, "base" for p0; weighted
            accordingly.
        pinned: token ids of a continuation that particle 0 is held to, the others being resampled
            conditionally on it; its last token ends it. Around an exact sample of sigma, log_z is on
            average an upper bound of log Z (Zhao et al. 2024, Prop. 5.1).
        condition: token ids of o_T, what a conditional head's twist and target depend on beside the prefix.
        trace: whether the result tells the group's life step by step.
    """

    particles: int = option(at_least(1), "number of particles per completion", default=16)
    ess_threshold: float = option(
        _threshold,
        "resample when the effective sample size falls below this fraction of the live "
        "particles; 1 or more: at every step, 0: never",
        default=0.5,
    )
    resampling: str = option(one_of(SCHEMES), f"resampling scheme: {', '.join(SCHEMES)}", default="systematic")
    scale: float = option(_scale, "factor on the log twist values", default=1.0)
    return_particles: bool = option(
        flag, "return every particle with its weight, not only the drawn one", default=False
    )
    proposal: str = option(
        one_of(PROPOSALS),
        "draw tokens from the twisted model or from the base model",
        request_only=True,
        default="twist",
    )
    pinned: tuple[int, ...] | None = option(
        _token_ids, "continuation that one particle is held to", request_only=True, default=None
    )
    condition: tuple[int, ...] | None = option(
        _token_ids, "what a conditional twist head is given", request_only=True, default=None
    )
    trace: bool = option(flag, "return every step's ancestors and weights", request_only=True, default=False)

    def __post_init__(self) -> None:
        check_fields(self, prefix=f"{PREFIX}_")
        if self.pinned is not None and self.resampling not in PINNED_SCHEMES:
            raise ValueError(
                f"`{PREFIX}_resampling` must be one of {', '.join(PINNED_SCHEMES)} with `{PREFIX}_pinned`, got "
                f"{self.resampling!r}, which would bias the bound: drop it (multinomial is the default then)."
            )

    def override(self, extra_args: Mapping[str, Any] | None) -> RequestConfig | None:
        """Return the settings of a request with these ``extra_args``; None if it turns twists off.

        Raises:
            ValueError: an unknown ``twist*`` key, a likely misspelling of a known one, or a value
                out of range.
        """
        known = tuple(f"{PREFIX}_{option.name}" for option in dataclasses.fields(self))
        changes: dict[str, Any] = {}
        enabled = True
        for key, value in (extra_args or {}).items():
            if key == PREFIX:
                enabled = flag(key, value)
            elif key in known:
                changes[key.removeprefix(f"{PREFIX}_")] = value
            elif key in option_names():
                raise ValueError(
                    f"`{key}` is an option of the engine, not of a request, got {value!r}: start an engine with "
                    f"`--{key.replace('_', '-')}`; a request may set {PREFIX}, {', '.join(known)}."
                )
            elif key.startswith(PREFIX) or difflib.get_close_matches(key, known, n=1, cutoff=0.85):
                raise ValueError(
                    f"unknown request key `{key}`{did_you_mean(key, known)}: "
                    f"the known ones are {PREFIX}, {', '.join(known)}."
                )
        if changes.get("pinned") is not None:
            changes.setdefault("resampling", "multinomial")
        settings = dataclasses.replace(self, **changes)
        return settings if enabled else None


@dataclass(frozen=True)
class TwistConfig:
    """Engine settings: the head that gives the twist values, and the defaults for requests.

    Attributes:
        head: folder or hub id of a saved ``TwistHead``.
        defaults: what a request gets where it does not say otherwise.
        potential: where log phi of finished outputs is found (``load_potential``); without one
            phi is psi of the last token.
        potential_timeout: seconds that it may take for one group.
        conditional: whether the head reads a condition; found out when the engine is configured.
    """

    head: str
    defaults: RequestConfig = field(default_factory=RequestConfig)
    potential: str | None = None
    potential_timeout: float = 60.0
    conditional: bool = False

    def __post_init__(self) -> None:
        if self.potential is not None and (not isinstance(self.potential, str) or not self.potential):
            raise ValueError(
                f"`{PREFIX}_potential` must be a string, got {type(self.potential).__name__}: name the callable as "
                "module:attribute or path.py:attribute; the engine imports it in a process of its own."
            )
        timeout = number(f"{PREFIX}_potential_timeout", self.potential_timeout)
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(
                f"`{PREFIX}_potential_timeout` must be a positive number of seconds, got {self.potential_timeout!r}: "
                "raise it."
            )
        object.__setattr__(self, "potential_timeout", timeout)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], base: TwistConfig | None = None) -> TwistConfig:
        """Build from ``twist_*`` keywords, those left at None meaning "as by default", or as in ``base``.

        Raises:
            ValueError: an unknown keyword, a value out of range, or settings without a head.
        """
        known = option_names()
        for key in options:
            if key not in known:
                raise ValueError(
                    f"unknown option `{key}`{did_you_mean(key, known)}: the known ones are {', '.join(known)}."
                )
        given = {key.removeprefix(f"{PREFIX}_"): v for key, v in options.items() if v is not None}
        head = given.pop("head", base.head if base else None)
        if not head:
            raise ValueError(
                f"`{PREFIX}_head` is missing, got {', '.join(f'{PREFIX}_{k}' for k in given) or 'no option'}: "
                "pass the folder or hub id of a twist head, or drop the other options."
            )
        own = {name: given.pop(name) for name in ("potential", "potential_timeout") if name in given}
        start = base or cls(str(head))
        defaults = dataclasses.replace(start.defaults, **given)
        return dataclasses.replace(start, head=str(head), defaults=defaults, **own)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the inverse of ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TwistConfig:
        """Rebuild from ``to_dict``.

        Raises:
            ValueError: the values are no settings.
        """
        try:
            return cls(**{**values, "defaults": RequestConfig(**values.get("defaults", {}))})
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"`additional_config` must hold what `TwistConfig.to_dict` returns under {PREFIX!r}, got {values!r} "
                f"({error}): pass `{PREFIX}_head` and the other options by their own names."
            ) from error


def option_names() -> tuple[str, ...]:
    """Return every ``twist_*`` keyword that an engine takes."""
    requests = (f"{PREFIX}_{option.name}" for option in engine_options())
    return (f"{PREFIX}_head", *requests, f"{PREFIX}_potential", f"{PREFIX}_potential_timeout")


def engine_options() -> list[dataclasses.Field]:
    """Return the fields of ``RequestConfig`` that an engine may set a default for."""
    return [option for option in dataclasses.fields(RequestConfig) if not option.metadata["request_only"]]
