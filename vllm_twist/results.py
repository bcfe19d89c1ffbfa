"""What a request gives back beside its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Key of the results in ``RequestOutput.kv_transfer_params``, the engine's one dict channel.
RESULT_KEY = "twist"


@dataclass(frozen=True)
class Particle:
    """One particle of a group.

    Attributes:
        token_ids: its own tokens, the terminating one included.
        log_weight: final log weight, normalised: the weights of a group sum to one.
        log_prob: sum of log p0 over its tokens (nats).
        finished: True if it ended with EOS or a stop token, False if it was cut at its length.
        log_psi: log psi of its last token, in whose place phi stands where the engine has a potential.
    """

    token_ids: list[int]
    log_weight: float
    log_prob: float
    finished: bool
    log_psi: float = 0.0


@dataclass(frozen=True)
class TwistResult:
    """One completion's group of particles, as the engine left it.

    Attributes:
        log_z: log of the unbiased estimate of Z (nats), with p0 the model after the request's own
            sampling parameters and phi that of the engine's ``twist_potential``, else psi at each
            particle's last token.
        ess: effective sample size of the final weights, between 1 and K.
        num_resamplings: how often the group was resampled.
        chosen: index of the particle whose tokens are the completion, drawn by final weight.
        particles: every particle where ``twist_return_particles`` asked for them, else None.
    """

    log_z: float
    ess: float
    num_resamplings: int
    chosen: int
    particles: list[Particle] | None = None


def results(output: Any) -> list[TwistResult]:
    """Return one ``TwistResult`` per completion of a vLLM ``RequestOutput``.

    Also takes the ``kv_transfer_params`` dict of a server's JSON response.

    Raises:
        ValueError: the request was not twisted.
        RuntimeError: the request ended in an error; the message says which.
    """
    params = output if isinstance(output, dict) else getattr(output, "kv_transfer_params", None)
    entries = (params or {}).get(RESULT_KEY)
    if entries is None:
        raise ValueError(
            "`output` carries no twist result: the engine has no twist head, the request turned twists "
            "off (`twist=0`), or it has not finished."
        )
    parsed = []
    for entry in entries:
        if "error" in entry:
            raise RuntimeError(entry["error"])
        particles = entry.get("particles")
        parsed.append(
            TwistResult(
                **{
                    **entry,
                    "particles": None if particles is None else [_particle(p) for p in particles],
                }
            )
        )
    return parsed


def _particle(values: dict[str, Any]) -> Particle:
    log_weight = values["log_weight"]
    # JSON has no -inf.
    return Particle(**{**values, "log_weight": float("-inf") if log_weight is None else log_weight})
