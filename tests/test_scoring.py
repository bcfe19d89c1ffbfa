"""Final reweighting by an explicit phi: the right target, and an engine that neither waits nor spins."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import PROMPTS, run, run_pinned
from support.laws import Law, assert_samples_the_law, enumerate_law, exact_samples, within
from support.models import Tiny

from vllm_twist import TwistConfig, results
from vllm_twist.engine.groups import Group
from vllm_twist.engine.scheduler import IDLE_WAIT
from vllm_twist.engine.scoring import Scorer

#: Seconds after which a wait is a hang.
HANG = 600.0

SOURCE = """
import threading

gate, entered, given_up = threading.Event(), threading.Event(), threading.Event()
gate.set()
mode = "phi"

def log_phi(token_ids, texts):
    gate.wait()
    if mode == "raise":
        raise RuntimeError("no such luck")
    if mode == "nan":
        return [float("nan")] * len(token_ids)
    if mode == "short":
        return [0.0]
    if mode == "zero":
        return [float("-inf")] * len(token_ids)
    if mode == "hang":
        entered.set()
        given_up.wait()
    return [0.9 * row.count(2) - 0.4 * len(row) for row in token_ids]
"""


@pytest.fixture(scope="module")
def scored(engine: Any, small: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an engine with a potential, and the module that the potential is in."""
    import sys

    path = tmp_path_factory.mktemp("phi") / "gated.py"
    path.write_text(SOURCE)
    llm = engine(small, twist_potential=f"{path}:log_phi", twist_potential_timeout=HANG)
    return llm, sys.modules["_vllm_twist_potential_gated"]


@pytest.fixture
def phi(scored: Any) -> Any:
    """Return the potential's module, as it was afterwards."""
    scored[1].entered.clear()
    scored[1].given_up.clear()
    yield scored[1]
    scored[1].mode = "phi"
    scored[1].gate.set()
    scored[1].given_up.set()


def target(small: Tiny, horizon: int) -> Law:
    """Return p0 phi by enumeration."""
    law = enumerate_law(small, PROMPTS["below"], horizon)
    return Law(law.log_p, {s: value + 0.9 * s.count(2) - 0.4 * len(s) for s, value in law.log_p.items()})


@pytest.mark.parametrize("proposal", ["twist", "base"])
@pytest.mark.parametrize("particles, groups, threshold", [(1, 1500, 0.5), (2, 1500, 1.0), (8, 500, 1.0)])
def test_target_is_p0_phi(scored, small: Tiny, particles: int, groups: int, threshold: float, proposal: str):
    """Whatever the twist: E[Z-hat] = Z of p0 phi, and the draw follows it. False alarms: 6e-5 a check."""
    options = {"particles": particles, "twist_ess_threshold": threshold, "twist_proposal": proposal}
    outputs = run(scored[0], PROMPTS["below"], groups, horizon=4, **options)
    assert_samples_the_law(outputs, target(small, 4), first=2)


def test_upper_bound_with_phi(scored, small: Tiny):
    """Z E[1 / Z-hat] = 1 around exact samples of p0 phi."""
    law = target(small, 4)
    outputs = run_pinned(
        scored[0], PROMPTS["below"], exact_samples(law, 800), horizon=4, twist_particles=4, twist_ess_threshold=1.0
    )
    assert within([math.exp(law.log_z - results(output)[0].log_z) for output in outputs], 1.0)


def test_log_psi_is_what_phi_replaces(scored, engine, small: Tiny):
    """The same seeds without a potential differ in the weights by phi / psi_T, particle by particle."""
    options = {"particles": 8, "horizon": 4, "twist_ess_threshold": 1.0}
    with_phi = run(scored[0], PROMPTS["below"], 20, **options)
    without = run(engine(small), PROMPTS["below"], 20, **options)
    for scored_output, plain_output in zip(with_phi, without, strict=True):
        (new,), (old,) = results(scored_output), results(plain_output)
        for p, q in zip(new.particles, old.particles, strict=True):
            assert p.token_ids == q.token_ids and p.log_psi == q.log_psi
            log_phi = 0.9 * p.token_ids.count(2) - 0.4 * len(p.token_ids)
            assert p.log_weight + new.log_z == pytest.approx(q.log_weight + old.log_z + log_phi - q.log_psi, abs=1e-5)


def params(seed: int = 0, **extra: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=4, seed=seed, detokenize=False, extra_args={"twist_particles": 4, **extra})


def step(engine: Any) -> list[Any]:
    """Step the engine; return what finished."""
    return [output for output in engine.step() if output.finished]


@pytest.mark.v2
def test_other_requests_go_on(scored, phi, monkeypatch: pytest.MonkeyPatch):
    """While phi is computed plain and twisted requests are served, and the engine only waits when there are none."""
    engine = scored[0].llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    waits, collect = [], scheduler.scorer.collect
    monkeypatch.setattr(scheduler.scorer, "collect", lambda wait=0.0: waits.append(wait) or collect(wait))
    phi.gate.clear()
    engine.add_request("slow", {"prompt_token_ids": [0, 2]}, params())
    while not scheduler.scorer:
        assert not step(engine)
    assert scheduler.get_request_counts() == (0, 1) and scheduler.has_requests() and not scheduler.groups
    engine.add_request("plain", {"prompt_token_ids": [0, 2]}, params(twist=0))
    while not (finished := step(engine)):
        assert not any(waits), "phi holds another request up"
    assert [output.request_id for output in finished] == ["plain"] and len(scheduler.scorer) == 1
    engine.add_request("twisted", {"prompt_token_ids": [0, 2]}, params())
    waits.clear()
    while len(scheduler.scorer) == 1:
        assert not step(engine) and not any(waits), "phi holds another group up"
    for _ in range(5):
        waits.clear()
        assert not step(engine)
        assert max(waits) == IDLE_WAIT, "the engine should sleep while there is nothing but phi to wait for"
    phi.gate.set()
    finished = []
    while engine.has_unfinished_requests():
        finished += step(engine)
    assert [output.request_id for output in finished] == ["slow", "twisted"]
    assert not scheduler.has_requests()


def test_collect_waits_for_the_first():
    """Up to the time given, and not for the others; it comes back with what there is."""
    gate, waits = threading.Event(), []
    scorer = Scorer(lambda group: [1.0] if gate.wait() else [], HANG)
    get = scorer._done.get

    def waiting(timeout: float) -> Any:
        waits.append(timeout)
        gate.set()
        return get(timeout=timeout)

    scorer._done = type("Queue", (), {"get": staticmethod(waiting), "put": scorer._done.put})  # type: ignore[assignment]
    scorer.submit(Named("a"))  # type: ignore[arg-type]
    ((group, outcome),) = scorer.collect(HANG)
    assert group.id == "a" and outcome == [1.0] and waits == [HANG]


@pytest.mark.parametrize("state", ["PAUSED_NEW", "PAUSED_ALL"])
def test_pause_while_phi_is_computed(scored, phi, state: str):
    """An engine that pauses has work until phi is known, and answers the group without being resumed."""
    from vllm.v1.core.sched.interface import PauseState

    engine = scored[0].llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    phi.gate.clear()
    engine.add_request("paused", {"prompt_token_ids": [0, 2]}, params())
    while not scheduler.scorer:
        engine.step()
    scheduler.set_pause_state(PauseState[state])
    assert not step(engine) and scheduler.has_requests()
    phi.gate.set()
    finished = []
    while scheduler.has_requests():
        finished += step(engine)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert [output.request_id for output in finished] == ["paused"] and results(finished[0])


def test_no_request_is_forgotten(scored, phi):
    """The scheduler knows of a request wherever it is: in a group, staged behind one, or while phi is computed."""
    engine = scored[0].llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    phi.gate.clear()
    slow = engine.add_request("slow", {"prompt_token_ids": [0, 2]}, params())
    plain = engine.add_request("plain", {"prompt_token_ids": [0, 2]}, params(twist=0))
    assert scheduler.groups and plain not in scheduler.requests
    assert scheduler.has_request(slow) and scheduler.has_request(plain) and not scheduler.has_request("other")
    finished = []
    while not (finished and scheduler.scorer):
        finished += step(engine)
    assert not scheduler.has_request(plain) and scheduler.has_request(slow) and slow not in scheduler.requests
    phi.gate.set()
    while engine.has_unfinished_requests():
        step(engine)
    assert not scheduler.has_request(slow)


def test_abort_while_phi_is_computed(scored, phi):
    engine = scored[0].llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    phi.gate.clear()
    engine.add_request("gone", {"prompt_token_ids": [0, 2]}, params())
    while not scheduler.scorer:
        engine.step()
    engine.abort_request(["gone"])
    assert not scheduler.scorer and not engine.has_unfinished_requests()
    phi.gate.set()
    assert len(run(scored[0], PROMPTS["below"], 3, particles=2, horizon=3)) == 3


@pytest.mark.parametrize(
    "mode, message",
    [
        ("raise", "but raised RuntimeError: no such luck"),
        ("nan", "must return numbers below .inf, got nan for output 0"),
        ("short", "must return 4 values, one per output, got 1"),
        ("zero", r"`twist_potential` gave all of its particles phi = 0, so that none can be drawn \(Z-hat is 0\)"),
        ("hang", "`twist_potential` took more than `twist_potential_timeout`=600 seconds for one group: make it"),
    ],
)
def test_failures_end_their_request_alone(scored, phi, monkeypatch: pytest.MonkeyPatch, mode: str, message: str):
    """The clock of the one that hangs stands still until it is being computed."""
    scorer = scored[0].llm_engine.engine_core.engine_core.scheduler.scorer
    monkeypatch.setattr(scorer, "clock", lambda: 2 * HANG * phi.entered.is_set())
    phi.mode = mode
    (output,) = run(scored[0], PROMPTS["below"], 1, particles=4, horizon=3)
    assert output.outputs[0].finish_reason == "error"
    with pytest.raises(RuntimeError, match=message):
        results(output)
    phi.mode = "phi"
    (output,) = run(scored[0], PROMPTS["below"], 1, particles=4, horizon=3)
    assert math.isfinite(results(output)[0].log_z)


class Named:
    """What a scorer needs of a group."""

    def __init__(self, name: str) -> None:
        self.id = name


def test_potentials_are_called_one_at_a_time():
    """Also after a call was given up: then by another thread, and only the call given up may overlap with others."""
    entered, release, now, inside, seen = threading.Event(), threading.Event(), [0.0], [], []

    def evaluate(group: Any) -> list[float]:
        inside.append(group.id)
        seen.append(tuple(inside))
        if group.id == "0":
            entered.set()
            release.wait()
        time.sleep(0.01)  # another thread's chance to come in
        inside.remove(group.id)
        return [float(group.id)]

    scorer = Scorer(evaluate, timeout=60.0, clock=lambda: now[0])
    for i in range(5):
        scorer.submit(Named(str(i)))  # type: ignore[arg-type]
    assert entered.wait(HANG)
    now[0] = 60.0
    assert scorer.collect() == []
    now[0] = 60.1
    ((group, outcome),) = scorer.collect()
    assert group.id == "0" and isinstance(outcome, TimeoutError)
    found: dict[str, Any] = {}
    while len(scorer):
        found.update({group.id: outcome for group, outcome in scorer.collect(HANG)})
    assert found == {str(i): [float(i)] for i in range(1, 5)}
    assert seen == [("0",), *(("0", str(i)) for i in range(1, 5))]
    release.set()
    scorer.submit(Named("5"))  # type: ignore[arg-type]
    ((group, outcome),) = scorer.collect(HANG)
    assert group.id == "5" and outcome == [5.0]
    assert scorer.collect() == [] and scorer.cancel("0") is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"twist_potential": len}, "`twist_potential` must be a string, got builtin_function_or_method: name the call"),
        ({"twist_potential_timeout": 0}, "`twist_potential_timeout` must be a positive number of seconds, got 0"),
        ({"twist_potential_timeout": "1"}, "`twist_potential_timeout` must be a number, got '1'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TwistConfig.from_options({"twist_head": "head", **options})


def test_a_potential_that_cannot_be_loaded_stops_the_start(engine, small: Tiny, tmp_path: Path):
    with pytest.raises(ValueError, match="`potential` .*nothing.py:log_phi must name a Python file, got none"):
        engine(small, twist_potential=f"{tmp_path}/nothing.py:log_phi")


def test_reweighing_moves_weights_by_lane():
    from types import SimpleNamespace

    from vllm_twist import RequestConfig
    from vllm_twist.engine.groups import Lane

    group = Group(SimpleNamespace(request_id="a"), RequestConfig(particles=2), 0)
    group.lanes = {"a": Lane(None, log_w=1.0, log_psi=0.5), "b": Lane(None, log_w=-1.0, log_psi=-2.0)}
    group.reweigh([0.25, -math.inf])
    assert [lane.log_w for lane in group.lanes.values()] == [0.75, -math.inf]
    assert torch.isfinite(torch.tensor(group.result(0)["log_z"]))


def test_texts_and_prompt_reach_the_potential(repo_root: Path):
    """Outputs are decoded with the model's own tokenizer, and a potential that reads prompts gets the prompt."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from vllm_twist.engine.scoring import evaluation
    from vllm_twist.potentials import Potential

    seen: list[Any] = []

    class Spy(Potential):
        def given(self, prompt_ids: Any, prompt: str) -> Potential:
            seen.append(prompt)
            return self

        def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
            seen.append(texts)
            return [0.0] * len(texts)

    tokenizer = AutoTokenizer.from_pretrained(repo_root / "models/tiny-reviews")
    prompt, outputs = (
        tokenizer("I bought this").input_ids,
        [tokenizer(" red lamp.").input_ids + [tokenizer.eos_token_id]],
    )
    lanes = {str(i): SimpleNamespace(request=SimpleNamespace(output_token_ids=ids)) for i, ids in enumerate(outputs)}
    group: Any = SimpleNamespace(leader=SimpleNamespace(prompt_token_ids=prompt), lanes=lanes)
    assert evaluation(Spy(), tokenizer)(group) == [0.0]
    assert seen[0].strip() == "I bought this" and [text.strip() for text in seen[1]] == ["red lamp."]
    assert evaluation(Spy(), None)(group) == [0.0] and seen[2:] == ["", [""]]
