"""A group's life, step by step, and its picture."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from support.engines import generate, params, prompt_of
from support.models import Tiny

from vllm_twist import results
from vllm_twist.cli import main
from vllm_twist.cli.trace import lineage, plot
from vllm_twist.results import Particle, TraceStep, TwistResult


@pytest.mark.v2("1.0")
@pytest.mark.parametrize("threshold", [0.7, 1.0])
def test_trace_agrees_with_the_particles(engine: Any, wide: Tiny, threshold: float):
    """Particles whose lineages meet at a token share all tokens up to it; weights and counts are the result's own."""
    requests = [
        params(
            max_tokens=14,
            seed=seed,
            stop_token_ids=[7, 9],
            twist_particles=8,
            twist_ess_threshold=threshold,
            twist_trace=1,
            twist_return_particles=1,
        )
        for seed in range(4)
    ]
    met = parted = 0
    for output in generate(engine(wide), [prompt_of(29)] * 4, requests):
        (group,) = results(output)
        lengths = [len(p.token_ids) for p in group.particles]
        assert len(group.trace) == max(lengths)
        assert sum(step.resampled for step in group.trace) == group.num_resamplings
        for step in group.trace:
            alive = [k for k, ancestor in enumerate(step.ancestors) if ancestor is not None]
            assert alive == [k for k, w in enumerate(step.log_w) if w is not None]
            if not step.resampled:
                assert all(step.ancestors[k] == k for k in alive)
            for k in alive:
                assert step.ancestors[step.ancestors[k]] == step.ancestors[k], "a parent keeps its place"
        for k, particle in enumerate(group.particles):
            own = [step.log_w[k] for step in group.trace if step.log_w[k] is not None]
            assert own[-1] == pytest.approx(particle.log_weight + group.log_z + math.log(8), abs=1e-4)
            assert len(lineage(group, k)) == lengths[k]
        for a, b in itertools.combinations(range(8), 2):
            for t, (here, there) in enumerate(zip(lineage(group, a), lineage(group, b), strict=False), 1):
                same = group.particles[a].token_ids[:t] == group.particles[b].token_ids[:t]
                if here == there:
                    assert same
                    met += 1
                parted += not same
    assert met and parted


def test_no_trace_unless_asked(engine: Any, wide: Tiny):
    (output,) = generate(engine(wide), [prompt_of(5)], params(max_tokens=3, seed=1, twist_particles=2))
    assert results(output)[0].trace is None


def life() -> TwistResult:
    """Two particles: 1 becomes a child of 0 at the second token; 0 ends there, 1 one token later at weight zero."""
    steps = [
        TraceStep([0, 1], [0.0, -1.0], False),
        TraceStep([0, 0], [-0.4, -0.4], True),
        TraceStep([None, 1], [None, -math.inf], False),
    ]
    particles = [Particle([2, 1], 0.0, -1.0, True), Particle([2, 3, 4], -math.inf, -2.0, False)]
    return TwistResult(-0.4, 1.0, 1, 0, particles, steps)


def test_lineage():
    assert lineage(life(), 0) == [0, 0] and lineage(life(), 1) == [0, 1, 1]


def test_trace_survives_json():
    """A weight of zero travels as null, as do particles that have ended."""
    entry = dataclasses.asdict(life())
    entry["trace"][2]["log_w"] = [None, None]
    entry["particles"][1]["log_weight"] = None
    assert results({"twist": [entry]}) == [life()]


def test_plot(tmp_path: Path):
    plot(life(), "'x'", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="`group` must have a trace, got none: send the request with `twist_trace`=1"):
        plot(dataclasses.replace(life(), trace=None), "x", str(tmp_path / "y.png"))


def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Refused before an engine is started."""
    args = ["trace", "--model", "m", "--twist-head", "h", "--prompt", "x", "--plot", str(tmp_path / "x.png")]
    assert main([*args, "--particles", "0"]) == 2
    assert "`twist_particles` must be at least 1, got 0" in capsys.readouterr().err
