"""A request's own logits processors work on lanes: their arguments arrive, and their state follows the particles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import logits_processors
from support.engines import EVERY_STEP, generate, params, prompt_of
from support.logits_processors import WATCHED
from support.models import Tiny
from support.runners import RUNNER

from vllm_twist import results
from vllm_twist.engine import processors

NAMES = ("Ban", "Counter", "Closure", "Told", "Stubborn") if RUNNER == "v1" else ("BanV2", "CounterV2")
MAX_TOKENS = 40 if RUNNER == "v1" else 12


@pytest.fixture
def llm(engine: Any, wide: Tiny) -> Any:
    logits_processors.seen.clear()
    return engine(wide, logits_processors=tuple(f"support.logits_processors:{name}" for name in NAMES))


def request(own: dict[str, Any], **options: Any) -> Any:
    """Return parameters with extra arguments of the user's own."""
    made = params(**{"max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": 5, "twist_particles": 8, **options})
    made.extra_args = {**made.extra_args, **own}
    return made


@pytest.mark.v2
def test_ban_per_request(llm):
    """It holds for every lane of the group that asks, and for no other."""
    bans, likely = [{"ban": 9}, {}, {"ban": 12}], {"logit_bias": {9: 3.0, 12: 3.0}}
    outputs = generate(llm, [prompt_of(9)] * 3, [request(own, **likely, **EVERY_STEP) for own in bans])
    drawn = [{token for p in results(output)[0].particles for token in p.token_ids} for output in outputs]
    assert 9 not in drawn[0] and 12 not in drawn[2]
    assert {9, 12} <= drawn[1] and 12 in drawn[0] and 9 in drawn[2]
    (plain,) = generate(llm, [prompt_of(9)], request({"ban": 9}, twist=0, **likely))
    assert 9 not in plain.outputs[0].token_ids


@pytest.mark.v2("count")
@pytest.mark.parametrize("kind", ["count", "closure", "told"] if RUNNER == "v1" else ["count"])
def test_state_follows_the_particles(llm, kind: str):
    """With a fork at every token what was counted is what is in the particle's own history, always."""
    (output,) = generate(llm, [prompt_of(9)], request({kind: 1}, logit_bias={WATCHED: 2.0}, **EVERY_STEP))
    particles = results(output)[0].particles
    assert results(output)[0].num_resamplings == MAX_TOKENS - 2
    seen = logits_processors.seen
    assert len(seen) >= 8 * (MAX_TOKENS - 1) and all(counted == there for counted, there in seen)
    assert all(particle.token_ids.count(WATCHED) <= 2 for particle in particles)
    assert {there for _, there in seen} == {0, 1, 2}, "the test must see it come"


@pytest.mark.v2
def test_without_copies_the_state_is_wrong(llm, monkeypatch):
    """The check above fails."""
    forks = processors.ForksV1 if RUNNER == "v1" else processors.ForksV2
    monkeypatch.setattr(forks, "__call__", lambda self, *args: None)
    generate(llm, [prompt_of(9)], request({"count": 1}, logit_bias={WATCHED: 2.0}, **EVERY_STEP))
    assert any(counted != there for counted, there in logits_processors.seen)


@pytest.mark.skipif(RUNNER != "v1", reason="Model Runner V2 copies tensors alone")
def test_state_that_cannot_be_copied_ends_its_request_alone(llm):
    good, bad = generate(
        llm, [prompt_of(9)] * 2, [request({"ban": 9}, **EVERY_STEP), request({"stubborn": 1}, **EVERY_STEP)]
    )
    assert len(results(good)[0].particles) == 8
    with pytest.raises(RuntimeError, match=r"logits processor could not be copied .* method fork\(child, parent\)"):
        results(bad)


class Rows:
    """Keeps one entry per row of the batch."""

    def __init__(self, count: int) -> None:
        self.array, self.listed = torch.arange(count), [[row] for row in range(count)]


def test_rows_of_arrays_are_copied():
    kept = Rows(6)
    processors.ForksV1([kept], 6, 40)(2, 5, {})
    assert kept.array.tolist() == [0, 1, 5, 3, 4, 5] and kept.listed[2] == [5]
    assert kept.listed[2] is not kept.listed[5]


def test_what_cannot_be_told_apart_is_refused():
    """As many rows as tokens: one entry per request or per token?"""
    message = r"`logits_processors` has 'Rows', whose 'array' has 6 entries.* give it a method fork\(child, parent\)"
    with pytest.raises(ValueError, match=message):
        processors.ForksV1([Rows(6)], 6, 6)
    with pytest.raises(ValueError, match=message):
        processors.ForksV2([Rows(6)], SimpleNamespace(), 6, 6)
    kept = Rows(6)
    told: list[tuple[int, int]] = []
    kept.fork = lambda child, parent: told.append((child, parent))  # type: ignore[attr-defined]
    processors.ForksV1([kept], 6, 6)(1, 0, {})
    assert told == [(1, 0)] and kept.array.tolist() == list(range(6))
