"""Stop strings end particles: the target, its estimate, what the potential reads and what the client gets.

Statistical checks as in ``test_engine_exact``: fixed seeds, 4 standard errors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.engines import generate, params, prompt_of, run, run_pinned, scheduler_of, worker_of
from support.laws import Law, assert_samples_the_law, enumerate_law, exact_samples, within
from support.models import Tiny, random_model

from vllm_twist import results

#: "ab" comes of a and b, of a and ba, of ba and b.
PIECES = ["<s>", "</s>", "a", "b", "ba"]
STOP = "ab"
PROMPT = [0, 2, 3]
EVERY_STEP = {"twist_ess_threshold": 1.0, "twist_return_particles": 1}
SOURCE = """
def log_phi(token_ids, texts):
    assert not any("ab" in text for text in texts), texts
    return [0.9 * text.count("b") - 0.4 * len(text) for text in texts]
"""


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model over five tokens with a tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tiny = random_model(tmp_path_factory.mktemp("spelling"), vocab=len(PIECES), eos=1)
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tiny.path)
    return tiny


@pytest.fixture
def make(engine: Any, spelling: Tiny) -> Any:
    """Return ``make(**options)``: an engine with the tokenizer."""
    return lambda **options: engine(spelling, skip_tokenizer_init=False, **options)


def text_of(tokens: Any) -> str:
    return "".join(PIECES[token] for token in tokens if token > 1)


def stopped(tokens: tuple[int, ...], min_tokens: int = 0) -> bool:
    """Return whether a stop string ends after the first ``min_tokens`` tokens."""
    start = max(len(text_of(tokens[:min_tokens])) - len(STOP) + 1, 0)
    return STOP in text_of(tokens)[start:]


def law_of(tiny: Tiny, horizon: int, min_tokens: int = 0) -> Law:
    return enumerate_law(
        tiny, PROMPT, horizon, min_tokens=min_tokens, ended=lambda tokens: stopped(tokens, min_tokens)
    )


def assert_cut(output: Any, include: bool, min_tokens: int = 0) -> None:
    """Check what the client gets, and where particles end."""
    completion, group = output.outputs[0], results(output)[0]
    for particle in group.particles:
        tokens = tuple(particle.token_ids)
        assert not any(stopped(tokens[:i], min_tokens) for i in range(1, len(tokens)))
        assert particle.finished == (stopped(tokens, min_tokens) or tokens[-1] == 1)
    tokens = tuple(completion.token_ids)
    assert list(tokens) == group.particles[group.chosen].token_ids
    if stopped(tokens, min_tokens):
        assert (completion.finish_reason, completion.stop_reason) == ("stop", STOP)
        start = max(len(text_of(tokens[:min_tokens])) - len(STOP) + 1, 0)
        end = text_of(tokens).index(STOP, start) + (len(STOP) if include else 0)
        assert completion.text == text_of(tokens)[:end]
    else:
        assert completion.text == text_of(tokens) and completion.stop_reason is None
        assert completion.finish_reason == ("stop" if tokens[-1] == 1 else "length")


CASES = [
    # particles, groups, threshold, options
    (1, 1500, 0.5, {}),
    (4, 800, 1.0, {}),
    (4, 800, 0.7, {"include_stop_str_in_output": True}),
    (4, 800, 1.0, {"min_tokens": 2}),
    (3, 800, 1.0, {"twist_proposal": "base"}),
]


@pytest.mark.v2("4-800-1.0-options1")
@pytest.mark.parametrize("particles, groups, threshold, options", CASES)
def test_target_ends_at_the_stop_string(
    make, spelling: Tiny, totals: list[Any], particles: int, groups: int, threshold: float, options: dict[str, Any]
):
    """E[Z-hat] = Z and the weighted functionals, over sequences that end where their text first has the string."""
    options = {"particles": particles, "horizon": 4, "twist_ess_threshold": threshold, **options}
    outputs = run(make(), PROMPT, groups, stop=[STOP], detokenize=True, **options)
    for output in outputs:
        assert_cut(output, options.get("include_stop_str_in_output", False), options.get("min_tokens", 0))
    law = law_of(spelling, 4, options.get("min_tokens", 0))
    assert len({tokens for tokens in law.log_p if stopped(tokens, options.get("min_tokens", 0))}) > 6
    assert_samples_the_law(outputs, law, first=2)


def test_the_check_sees_particles_that_run_on(make, spelling: Tiny, monkeypatch):
    """Without the detector the target is another."""
    from vllm_twist.engine import stop_strings

    monkeypatch.setattr(stop_strings, "detector_for", lambda tokenizer, request: None)
    outputs = run(make(), PROMPT, 400, particles=4, horizon=4, stop=[STOP], detokenize=True)
    with pytest.raises((AssertionError, KeyError)):
        assert_samples_the_law(outputs, law_of(spelling, 4), first=2)


@pytest.mark.v2
def test_forks_and_preemption_keep_the_text(make, totals: list[Any]):
    """Long outputs with a fork at every token, in a cache of 12 blocks and in one with room.

    A stop string is seen after a fork whatever its parts came from.
    """
    options = {
        "max_tokens": 30, "stop": ["babab", "bbbbb"], "detokenize": True, "ignore_eos": True, "twist_particles": 5,
        "logit_bias": {0: -100, 1: -100}, **EVERY_STEP,
    }  # fmt: skip
    requests = [params(seed=seed, **options) for seed in range(4)]
    roomy, tight = make(), make(num_gpu_blocks_override=13)
    parked, park = [], type(scheduler_of(tight))._park
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(scheduler_of(tight)), "_park", lambda self, group: (parked.append(group.id), park(self, group))
        )
        squeezed = generate(tight, [PROMPT * 10] * 4, requests)
    assert parked
    lengths = set()
    for output in [*squeezed, *generate(roomy, [PROMPT * 10] * 4, requests)]:
        for particle in results(output)[0].particles:
            text = text_of(particle.token_ids)
            before = text_of(particle.token_ids[:-1])
            assert not any(stop in before for stop in options["stop"])
            assert particle.finished == any(stop in text for stop in options["stop"])
            assert particle.finished or len(particle.token_ids) == 30
            lengths.add(len(particle.token_ids))
    assert len(lengths) > 5
    assert not worker_of(tight).twist.table.slots.keys() - scheduler_of(tight).finished_req_ids


@pytest.mark.v2
def test_others_are_not_held_up(make):
    """A plain request beside a group with a stop string gets a token at every step."""
    llm = make()
    core, lengths = llm.llm_engine, []
    group = params(max_tokens=12, stop=["never"], detokenize=True, ignore_eos=True, twist_particles=4, seed=1)
    core.add_request("group", {"prompt_token_ids": PROMPT}, group)
    core.add_request("plain", {"prompt_token_ids": PROMPT}, params(max_tokens=12, ignore_eos=True, seed=1, twist=0))
    while not lengths or lengths[-1] < 12:
        for output in core.step():
            if output.request_id.startswith("plain"):
                lengths.append(len(output.outputs[0].token_ids))
    assert lengths == list(range(1, 13))
    while core.has_unfinished_requests():
        core.step()


def test_potential_reads_the_text_that_the_client_gets(make, spelling: Tiny, tmp_path: Path):
    """It is cut at the stop string, and so is the target."""
    path = tmp_path / "cut.py"
    path.write_text(SOURCE)
    llm = make(twist_potential=f"{path}:log_phi")
    outputs = run(llm, PROMPT, 600, particles=4, horizon=4, stop=[STOP], detokenize=True)
    law = law_of(spelling, 4)

    def log_phi(tokens: tuple[int, ...]) -> float:
        text = text_of(tokens).split(STOP)[0]
        return 0.9 * text.count("b") - 0.4 * len(text)

    assert_samples_the_law(outputs, Law(law.log_p, {s: v + log_phi(s) for s, v in law.log_p.items()}), first=2)


def test_pinned_to_a_stop_string(make, spelling: Tiny):
    """Z E[1 / Z-hat] = 1 around exact samples that a stop string ends, or something else."""
    law = law_of(spelling, 4)
    pinned = exact_samples(law, 500)
    assert any(stopped(tuple(tokens)) and len(tokens) < 4 for tokens in pinned)
    options = {"twist_particles": 3, "twist_ess_threshold": 1.0, "stop": [STOP], "detokenize": True}
    outputs = run_pinned(make(), PROMPT, pinned, horizon=4, twist_return_particles=1, **options)
    for output, tokens in zip(outputs, pinned, strict=True):
        assert results(output)[0].particles[0].token_ids == tokens
    assert within([math.exp(law.log_z - results(output)[0].log_z) for output in outputs], 1.0)


@pytest.mark.parametrize(
    "pinned, message",
    [
        ([2, 3, 2, 1], r"must end where its text first contains a stop string, got 'ab' at index 1 of 4: cut it after"),
        ([3, 2], r"must end with a token that ends an output \(1; or a stop string\) or have `max_tokens`=4 tokens"),
    ],
)
def test_pinned_past_a_stop_string_is_refused(make, pinned: list[int], message: str):
    with pytest.raises(ValueError, match=f"`twist_pinned` {message}"):
        run_pinned(make(), PROMPT, [pinned], horizon=4, stop=[STOP], detokenize=True)


def test_no_tokenizer_no_stop_string(engine, wide: Tiny):
    with pytest.raises(ValueError, match=r"`stop` needs the model's tokenizer, got \['ab'\] in an engine"):
        generate(engine(wide), [prompt_of(5)], params(stop=STOP, detokenize=True, twist_particles=2))
    (output,) = generate(engine(wide), [prompt_of(5)], params(stop=STOP, detokenize=True, twist=0))
    assert output.finished


def test_bad_words(make, spelling: Tiny):
    """They belong to p0: the last token of one is forbidden where the others precede it."""
    outputs = run(make(), PROMPT, 100, particles=4, horizon=4, bad_words=["b"], twist_ess_threshold=1.0)
    for output in outputs:
        assert not any(3 in particle.token_ids for particle in results(output)[0].particles)


