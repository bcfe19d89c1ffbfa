"""The compiled passes against the reference: alone, and in the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import ENGINE, worker_of
from support.models import Tiny
from support.scenarios import SCENARIOS, outcome
from torch._dynamo.utils import counters

from vllm_twist.kernels import compiled, reference


@pytest.mark.parametrize("vocab", [40, 32_001])
@torch.inference_mode()
def test_same_as_the_reference(vocab: int):
    """Tokens are equal, log-sums too but for rounding, and the size of a batch compiles nothing anew."""
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    compiled.warm_up(vocab, torch.device("cpu"))
    assert counters["stats"]["unique_graphs"] - before == 3
    for n in (2, 1, 3, 150):
        # As vLLM cuts the logits of a vocabulary that it has padded.
        logits, log_psi = torch.randn(2, n, vocab + 24, generator=generator)[..., :vocab]
        logits[:, 1::3] = -torch.inf
        keys = torch.randint(2**62, (n,), generator=generator)
        sums = compiled.twist_softmax(logits, log_psi)
        for got, expected in zip(sums, reference.twist_softmax(logits, log_psi), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        for ancestors in (None, torch.randint(n, (n,), generator=generator)):
            got = compiled.twist_sample(logits, log_psi, sums[0], ancestors, keys)
            expected = reference.twist_sample(logits, log_psi, sums[0], ancestors, keys)
            assert all(map(torch.equal, got, expected))
        log_w, before_log_psi = torch.randn(2, n, generator=generator)
        state = keys, log_w.double(), before_log_psi
        got = compiled.weigh_and_sample(logits, log_psi, *state)
        expected = reference.weigh_and_sample(logits, log_psi, *state)
        assert torch.equal(got[2], expected[2])
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] - before == 3


def test_same_in_the_engine(engine: Any, small: Tiny, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The same seeds give the same particles and numbers, whatever a request asks for."""
    expected = {scenario.name: outcome(engine, request, scenario) for scenario in SCENARIOS}
    calls: dict[str, list[int]] = {"twist_sample": [], "weigh_and_sample": []}
    for name in ("conditional", "wide", "bigram", "small"):
        table = worker_of(engine(request.getfixturevalue(name))).twist.table
        monkeypatch.setattr(table, "passes", compiled)
    for name, sizes in calls.items():
        real = getattr(compiled, name)
        monkeypatch.setattr(
            compiled, name, lambda *args, real=real, sizes=sizes: sizes.append(len(args[0])) or real(*args)
        )
    for scenario in SCENARIOS:
        for mine, theirs in zip(outcome(engine, request, scenario), expected[scenario.name], strict=True):
            assert mine["tokens"] == theirs["tokens"], scenario.name
            assert mine["counts"] == theirs["counts"], scenario.name
            assert mine["numbers"] == pytest.approx(theirs["numbers"], abs=2e-4), scenario.name
    assert all(max(sizes) > 1 for sizes in calls.values())


@pytest.mark.parametrize("eager", [True, False])
def test_compiled_where_the_model_is(small: Tiny, eager: bool):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_twist.engine.v1.logits_processor import TwistLogitsProcessor

    options = {**ENGINE, "enforce_eager": eager}
    config = EngineArgs(model=str(small.path), twist_head=str(small.head_path), **options).create_engine_config()
    table = TwistLogitsProcessor(config, torch.device("cpu"), is_pin_memory=False).table
    assert table.passes is (reference if eager else compiled)
