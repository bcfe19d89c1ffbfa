"""Scenarios: seeded requests whose whole outcome is compared between model runners."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from support.engines import generate, params, prompt_of
from vllm_twist import results


@dataclass(frozen=True)
class Scenario:
    """One request, repeated with seeds of its own.

    Attributes:
        model: the fixture that makes it.
        prompt: its length.
        repeats: how many seeds.
        options: sampling parameters and twist keys.
    """

    name: str
    model: str = "small"
    prompt: int = 3
    repeats: int = 2
    options: dict[str, Any] = field(default_factory=dict)


#: Sampling parameters that make p0, and what a request may ask of its twist.
PARAMETERS = [
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 2},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 3},
    {"min_p": 0.4},
    {"min_p": 0.3, "temperature": 1.3},
    {"logit_bias": {2: 1.5, 3: -2.0}},
    {"allowed_token_ids": [1, 2]},
    {"min_tokens": 2},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 0.9, "frequency_penalty": 0.6},
    {"ignore_eos": True},
    {"stop_token_ids": [3]},
    {"twist_scale": 2.5},
    {"twist_scale": 0.0},
]


def named(options: dict[str, Any]) -> str:
    """Return a name for a case."""
    return ",".join(f"{key}={value}" for key, value in options.items())


def _scenarios() -> list[Scenario]:
    every = {"twist_ess_threshold": 1.0}
    found = [
        Scenario("forks at every step over a block", "wide", 30, 1, {"max_tokens": 8, "ignore_eos": True, **every}),
        Scenario("prompt of one block", "wide", 32, 1, {"max_tokens": 4, **every}),
        Scenario("prompt of one token", "wide", 1, 1, {"max_tokens": 4, **every}),
        Scenario(
            "particles that end", "wide", 20, 1, {"max_tokens": 12, "stop_token_ids": [7, 9], "twist_particles": 16}
        ),
        Scenario("logprobs", "wide", 9, 1, {"max_tokens": 5, "logprobs": 3, "temperature": 0.8, **every}),
        Scenario("two groups", "wide", 9, 1, {"max_tokens": 3, "n": 2}),
        Scenario("penalties of forked histories", "wide", 5, 1, {"max_tokens": 8, "frequency_penalty": 0.9, **every}),
        Scenario("condition", "conditional", options={"max_tokens": 5, "twist_condition": [2, 3, 3], **every}),
        Scenario("condition of many blocks", "conditional", options={"max_tokens": 3, "twist_condition": [3, 2] * 40}),
        Scenario("optimal twist", "bigram", 2, 1, {"max_tokens": 8}),
        Scenario("one particle", options={"max_tokens": 5, "twist_particles": 1}),
    ]
    for scheme in ("systematic", "stratified", "multinomial", "residual"):
        for threshold in (0.7, 1.0):
            options = {"max_tokens": 5, "twist_resampling": scheme, "twist_ess_threshold": threshold}
            found.append(Scenario(f"{scheme} at {threshold}", options={**options, "twist_particles": 6}))
    for name, options in {
        "base proposal": {"twist_proposal": "base"},
        "base proposal, scaled": {"twist_proposal": "base", "twist_scale": 0.6, "temperature": 0.8},
        "pinned to the end": {"twist_pinned": [2, 3, 0, 2, 3]},
        "pinned until it ends": {"twist_pinned": [3, 2, 1], "twist_resampling": "residual", "twist_particles": 7},
        "pinned, base proposal": {"twist_pinned": [3, 2, 1], "twist_proposal": "base", "top_k": 3},
        "pinned, one particle": {"twist_pinned": [2, 2, 1], "twist_particles": 1, "temperature": 0.8},
    }.items():
        found.append(Scenario(name, repeats=3, options={"max_tokens": 5, **every, **options}))
    for options in PARAMETERS:
        found.append(Scenario(named(options), options={"max_tokens": 4, **every, **options}))
    return found


SCENARIOS = _scenarios()


def outcome(engine: Any, request: pytest.FixtureRequest, scenario: Scenario) -> list[dict[str, Any]]:
    """Run a scenario; return tokens, counts and numbers of each of its groups, fit for JSON."""
    tiny = request.getfixturevalue(scenario.model)
    prompt = [2 + (token - 2) % (tiny.vocab - 2) for token in prompt_of(scenario.prompt)]
    requests = [
        params(**{"seed": seed, "twist_particles": 4, "twist_return_particles": 1, **scenario.options})
        for seed in range(scenario.repeats)
    ]
    found = []
    for output in generate(engine(tiny), [prompt] * scenario.repeats, requests):
        for completion, group in zip(output.outputs, results(output), strict=True):
            logprobs = [x.logprob for entry in completion.logprobs or () for x in entry.values()]
            found.append(
                {
                    "tokens": [list(completion.token_ids), *(list(p.token_ids) for p in group.particles)],
                    "counts": [group.chosen, group.num_resamplings, *(int(p.finished) for p in group.particles)],
                    "numbers": [
                        group.log_z,
                        group.ess,
                        *(x for p in group.particles for x in (p.log_weight, p.log_prob)),
                        *logprobs,
                    ],
                }
            )
    return found
