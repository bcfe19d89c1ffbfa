"""Reading a request's result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import vllm_twist
from vllm_twist.results import RESULT_KEY, Particle, TwistResult, results

ENTRY: dict[str, Any] = {"log_z": -3.5, "ess": 2.5, "num_resamplings": 4, "chosen": 1, "particles": None}
PARTICLES = [
    {"token_ids": [5, 1], "log_weight": -0.7, "log_prob": -2.0, "finished": True},
    {"token_ids": [5, 6, 7], "log_weight": -0.69, "log_prob": -4.0, "finished": False},
]


def output(params: Any) -> Any:
    return SimpleNamespace(kv_transfer_params=params)


def test_one_result_per_completion() -> None:
    """In order, from an output or from the dict that a server's JSON holds; other connectors' keys do no harm."""
    params = {RESULT_KEY: [ENTRY, {**ENTRY, "chosen": 0}], "remote_host": "x"}
    first, second = results(output(params))
    assert first == TwistResult(log_z=-3.5, ess=2.5, num_resamplings=4, chosen=1)
    assert second.chosen == 0
    assert results(params) == [first, second]


def test_particles() -> None:
    """Each becomes a ``Particle``, and the entry that was read is left as it was."""
    entry = {**ENTRY, "particles": PARTICLES}
    (got,) = results({RESULT_KEY: [entry]})
    assert got.particles == [
        Particle(token_ids=[5, 1], log_weight=-0.7, log_prob=-2.0, finished=True),
        Particle(token_ids=[5, 6, 7], log_weight=-0.69, log_prob=-4.0, finished=False),
    ]
    assert entry["particles"] is PARTICLES
    # Not asked for, and left out of the entry altogether.
    (got,) = results({RESULT_KEY: [{k: v for k, v in ENTRY.items() if k != "particles"}]})
    assert got.particles is None


def response(kind: str) -> dict[str, Any]:
    """Return what a server answers, beside the result of two choices."""
    text = {"message": {"role": "assistant", "content": "x"}} if kind == "chat.completion" else {"text": "x"}
    choices = [{"index": i, "finish_reason": "stop", "logprobs": None, **text} for i in range(2)]
    params = {RESULT_KEY: [ENTRY, {**ENTRY, "chosen": 0, "particles": PARTICLES}], "remote_host": "x"}
    return {
        "id": "1", "object": kind, "created": 1, "model": "m", "choices": choices, "kv_transfer_params": params
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["chat.completion", "text_completion"])
def test_responses_of_a_server(kind: str) -> None:
    """As JSON, or as the objects that OpenAI's client makes of it; without a result they are named."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    whole, parse = response(kind), (ChatCompletion if kind == "chat.completion" else Completion).model_validate
    expected = results(whole["kv_transfer_params"])
    assert [r.chosen for r in expected] == [1, 0] and expected[1].particles is not None
    assert results(whole) == results(parse(whole)) == results(parse(whole).model_dump()) == expected
    for params in (None, {}, {"remote_host": "x"}, "x"):
        for untwisted in ({**whole, "kv_transfer_params": params}, parse({**whole, "kv_transfer_params": params})):
            with pytest.raises(ValueError, match="`output` carries no twist result"):
                results(untwisted)


@pytest.mark.parametrize("untwisted", [output(None), output({}), output({"remote_host": "x"}), {}, SimpleNamespace()])
def test_untwisted(untwisted: Any) -> None:
    with pytest.raises(ValueError, match=r"`output` carries no twist result: the engine has no .*`twist=0`"):
        results(untwisted)


def test_error_is_raised_with_its_message() -> None:
    """An entry that says what went wrong must not be read as a result, whichever completion it is."""
    with pytest.raises(RuntimeError, match="every particle has weight zero"):
        results(output({RESULT_KEY: [ENTRY, {"error": "every particle has weight zero"}]}))


def test_public_names() -> None:
    """``vllm_twist.results`` is the module and can be called, in whatever order the two are imported."""
    import importlib

    assert importlib.import_module("vllm_twist.results") is vllm_twist.results
    assert vllm_twist.results.results is vllm_twist.results_of is results
    assert vllm_twist.results({RESULT_KEY: [ENTRY]}) == results({RESULT_KEY: [ENTRY]})
    assert vllm_twist.TwistResult is TwistResult and vllm_twist.Particle is Particle
    for name in vllm_twist.__all__:
        assert getattr(vllm_twist, name) is not None


def test_particles_have_vllms_names() -> None:
    """What the engine sends is kept, what an older one did not send follows from ``finished``."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    sent = {"finish_reason": "stop", "stop_reason": 7}
    params = {RESULT_KEY: [{**ENTRY, "particles": [*PARTICLES, {**PARTICLES[0], **sent}]}]}
    (got,) = results(params, tokenizer)
    assert got.particles is not None
    assert [p.finish_reason for p in got.particles] == ["stop", "length", "stop"]
    assert [p.stop_reason for p in got.particles] == [None, None, 7]
    assert [p.cumulative_logprob for p in got.particles] == [-2.0, -4.0, -2.0]
    assert [p.text for p in got.particles] == ["5 1", "5 6 7", "5 1"]
    (got,) = results(params)
    assert got.particles is not None and [p.text for p in got.particles] == [None] * 3


def test_weights_of_zero_survive_json() -> None:
    """JSON has no -inf; the server sends null."""
    particle = {"token_ids": [1], "log_weight": None, "log_prob": -1.0, "finished": True, "log_psi": 0.5}
    (got,) = results({"twist": [{**ENTRY, "particles": [particle]}]})
    assert got.particles is not None and got.particles[0].log_weight == float("-inf")
