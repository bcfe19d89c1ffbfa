"""What a request gives back beside its text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

#: Key of the results in ``RequestOutput.kv_transfer_params``, the engine's one dict channel.
RESULT_KEY = "twist"

Value = TypeVar("Value", bound=Any)


def reweigh(log_w: Value, log_psi: Value, log_phi: Value) -> Value:
    """Return log weights towards p0 phi of particles weighed towards p0 psi: phi in the place of the last psi.

    All in nats, numbers or tensors of one shape; ``log_psi`` is that of the last token.
    """
    return log_w + log_phi - log_psi


@dataclass(frozen=True)
class Particle:
    """One particle of a group.

    Attributes:
        token_ids: its own tokens, the terminating one included.
        log_weight: final log weight, normalised: the weights of a group sum to one.
        log_prob: sum of log p0 over its tokens (nats).
        finished: True if it ended with EOS or a stop token, False if it was cut at its length.
        log_psi: log psi of its last token, in whose place phi stands where the engine has a potential.
        text: its tokens as text, where ``results_of`` was given a tokenizer.
        finish_reason: "stop" or "length", as vLLM and OpenAI's API have it.
        stop_reason: the stop token or stop string that ended it, None for EOS; as in vLLM.
    """

    token_ids: list[int]
    log_weight: float
    log_prob: float
    finished: bool
    log_psi: float = 0.0
    text: str | None = None
    finish_reason: str = ""
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        if not self.finish_reason:
            object.__setattr__(self, "finish_reason", "stop" if self.finished else "length")

    @property
    def cumulative_logprob(self) -> float:
        """``log_prob`` by the name that it has in vLLM's outputs."""
        return self.log_prob


@dataclass(frozen=True)
class TraceStep:
    """One token of a group's life, by particle (its place in the group, 0 to K-1).

    Attributes:
        ancestors: whose child each particle became before it drew the token, its own index where it
            went on; None for particles that had ended.
        log_w: log weights after the step (nats); None for particles that had ended.
        resampled: whether the group was resampled.
    """

    ancestors: list[int | None]
    log_w: list[float | None]
    resampled: bool


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
        trace: every step where ``twist_trace`` asked for them, else None.
    """

    log_z: float
    ess: float
    num_resamplings: int
    chosen: int
    particles: list[Particle] | None = None
    trace: list[TraceStep] | None = None


def results_of(output: Any, tokenizer: Any = None) -> list[TwistResult]:
    """Return one ``TwistResult`` per completion, in order; also called ``results``.

    Args:
        output: a vLLM ``RequestOutput``, of ``LLM.generate`` or ``LLM.chat``; what the client of ``openai``
            returns for completions and chats; or a server's JSON response, whole or its
            ``kv_transfer_params`` alone.
        tokenizer: the model's, such as ``llm.get_tokenizer()``, for the particles' ``text``.

    Raises:
        ValueError: the request was not twisted.
        RuntimeError: the request ended in an error; the message says which.
    """
    params: Any = output if isinstance(output, dict) else getattr(output, "kv_transfer_params", None)
    if isinstance(output, dict) and RESULT_KEY not in output:
        params = output.get("kv_transfer_params")
    entries = params.get(RESULT_KEY) if isinstance(params, dict) else None
    if entries is None:
        raise ValueError(
            "`output` carries no twist result: the engine has no twist head, the request turned twists "
            "off (`twist=0`), or it has not finished."
        )
    parsed = []
    for entry in entries:
        if "error" in entry:
            raise RuntimeError(entry["error"])
        particles, trace = entry.get("particles"), entry.get("trace")
        parsed.append(
            TwistResult(
                **{
                    **entry,
                    "particles": None if particles is None else [_particle(p, tokenizer) for p in particles],
                    "trace": None if trace is None else [_trace_step(step) for step in trace],
                }
            )
        )
    return parsed


def _particle(values: dict[str, Any], tokenizer: Any) -> Particle:
    log_weight = values["log_weight"]
    # JSON has no -inf.
    found = {**values, "log_weight": float("-inf") if log_weight is None else log_weight}
    if tokenizer is not None:
        found["text"] = tokenizer.decode(values["token_ids"], skip_special_tokens=True)
    return Particle(**found)


def _trace_step(values: dict[str, Any]) -> TraceStep:
    ancestors, log_w = values["ancestors"], values["log_w"]
    return TraceStep(
        ancestors,
        [float("-inf") if w is None and a is not None else w for a, w in zip(ancestors, log_w, strict=True)],
        values["resampled"],
    )


results = results_of


class _Callable(ModuleType):
    """This module, which can be called: ``vllm_twist.results`` is the function's name as well as the module's.

    Without this one of the two had to hide the other, and which one depended on who imported what first.
    """

    def __call__(self, output: Any, tokenizer: Any = None) -> list[TwistResult]:
        return results_of(output, tokenizer)


sys.modules[__name__].__class__ = _Callable
