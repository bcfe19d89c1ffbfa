"""What reaches the engine as a group, with which seed and limits, and on which models."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engines import ENGINE, EVERY_STEP, assert_rescored, generate, params, prompt_of
from support.models import HIDDEN, Tiny, save

from vllm_twist import TwistHead, TwistHeadConfig, results
from vllm_twist.engine.admission import admit, num_engines
from vllm_twist.engine.wire import GROUP_KEY
from vllm_twist.kernels.ops import MAX_LANES


@pytest.fixture(scope="module")
def config(small: Tiny) -> Any:
    """The config of an engine with a twist head and 100 KV blocks, as its frontend knows it."""
    from vllm.engine.arg_utils import EngineArgs

    options = {**ENGINE, "max_num_seqs": 2 * MAX_LANES, "max_num_batched_tokens": 4 * MAX_LANES}
    config = EngineArgs(str(small.path), twist_head=str(small.head_path), **options).create_engine_config()
    config.cache_config.num_gpu_blocks = 101
    return config


def admitted(config: Any, **options: Any) -> dict[str, Any] | None:
    """Return the group settings that a request of ten tokens is given."""
    request = SimpleNamespace(
        sampling_params=params(**options), resumable=False, prompt_embeds=None, mm_features=None,
        prompt_token_ids=prompt_of(10),
    )  # fmt: skip
    admit(config, request)
    return (request.sampling_params.extra_args or {}).get(GROUP_KEY)


@pytest.mark.parametrize(
    "name, value",
    [
        ("prompt_logprobs", 0), ("prompt_logprobs", 1), ("prompt_logprobs", -1),
        ("logprob_token_ids", [1]), ("thinking_token_budget", 0),
    ],
)  # fmt: skip
def test_unsupported_parameters(config, name: str, value: Any):
    """Whatever is set is refused, 0 included, which asks for something."""
    message = rf"`{name}` is not supported together with a twist, got {re.escape(str(value))}: drop it"
    with pytest.raises(ValueError, match=message):
        admitted(config, **{name: value})
    assert admitted(config, twist=0, **{name: value}) is None


def test_more_particles_than_the_kernels_take(config, monkeypatch: pytest.MonkeyPatch):
    from vllm import envs

    config.cache_config.num_gpu_blocks, blocks = 10 * MAX_LANES, config.cache_config.num_gpu_blocks
    try:
        for v2, particles in ((True, MAX_LANES), (False, MAX_LANES + 1)):
            monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", v2, raising=False)
            assert admitted(config, twist_particles=particles)["particles"] == particles
        monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", True, raising=False)
        message = rf"`twist_particles` must be at most {MAX_LANES} under Model Runner V2, got {MAX_LANES + 1}: lower it"
        with pytest.raises(ValueError, match=message):
            admitted(config, twist_particles=MAX_LANES + 1)
    finally:
        config.cache_config.num_gpu_blocks = blocks


def test_fewer_active_sequences_than_slots(config, monkeypatch: pytest.MonkeyPatch):
    """A group that could never run beside itself would hold up everyone."""
    monkeypatch.setattr(config.scheduler_config, "max_num_active_seqs", 4)
    assert admitted(config, twist_particles=4)["particles"] == 4
    with pytest.raises(ValueError, match=r"`twist_particles` must be at most `max_num_active_seqs`=4, got 5: lower it"):
        admitted(config, twist_particles=5)


MODES = [
    ({"data_parallel_size": 4}, 4),
    ({"data_parallel_size": 4, "data_parallel_size_local": 2}, 4),
    ({"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}, 2),
    ({"data_parallel_size": 4, "data_parallel_external_lb": True}, 1),
    ({"data_parallel_size": 4, "data_parallel_rank_local": 0}, 1),
    ({"data_parallel_size": 4, "distributed_executor_backend": "external_launcher"}, 1),
]


@pytest.mark.parametrize("fields, engines", MODES, ids=str)
def test_blocks_are_those_of_one_engine(config, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], engines: int):
    """A frontend knows the sum over the engines that it sees, which depends on how data parallelism is set up."""
    parallel = config.parallel_config
    assert num_engines(parallel) == 1
    monkeypatch.setattr(parallel, "data_parallel_rank_local", None)
    monkeypatch.setattr(parallel, "data_parallel_size_local", 1)
    for name, value in fields.items():
        monkeypatch.setattr(parallel, name, value)
    assert num_engines(parallel) == engines
    monkeypatch.setattr(config.cache_config, "num_gpu_blocks", 101 * engines)
    # Two blocks each, of the 100 that are not vLLM's null block.
    assert admitted(config, twist_particles=50, max_tokens=54)
    with pytest.raises(ValueError, match=r"need up to 102 blocks of 32 tokens, the cache has 1\d\d: lower"):
        admitted(config, twist_particles=51, max_tokens=54)


def test_groups_of_one_request_are_independent(engine, wide: Tiny):
    """vLLM counts the seed up for each of n; the groups must not be those of the next seeds."""
    prompt, options = [prompt_of(9)], {"max_tokens": 12, "ignore_eos": True, "twist_particles": 4}
    (first,), (second,), (alone,) = (
        generate(engine(wide), prompt, params(**options, **more))
        for more in ({"n": 3, "seed": 1}, {"n": 3, "seed": 2}, {"seed": 1})
    )
    log_z = [group.log_z for output in (first, second) for group in results(output)]
    assert min(abs(a - b) for a, b in itertools.combinations(log_z, 2)) > 1e-3
    # Rounding depends on what else is in the batch.
    assert results(alone)[0].log_z == pytest.approx(log_z[0], abs=1e-4)
    assert alone.outputs[0].token_ids == first.outputs[0].token_ids
    (again,) = generate(engine(wide), prompt, params(**options, n=3, seed=1))
    assert [group.log_z for group in results(again)] == pytest.approx(log_z[:3], abs=1e-4)


def test_seed_of_the_engine_fixes_unseeded_groups(wide: Tiny):
    """As it does plain requests: two engines of one seed draw alike, whatever else has drawn meanwhile."""
    import random

    from vllm import LLM

    drawn = []
    for seed in (7, 7, 8):
        llm = LLM(str(wide.path), twist_head=str(wide.head_path), twist_particles=4, **{**ENGINE, "seed": seed})
        random.seed()
        outputs = generate(llm, [prompt_of(9)] * 2, params(max_tokens=12, ignore_eos=True))
        drawn.append([output.outputs[0].token_ids for output in outputs])
        del llm
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


class Tokenizer:
    eos_token_id = 1

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return " ".join(map(str, token_ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_beam_search_is_plain(engine, wide: Tiny, monkeypatch: pytest.MonkeyPatch, temperature: float):
    """Its inner requests drop what the client sent: they are plain, and its beams those of an engine without a head."""
    from vllm.sampling_params import BeamSearchParams

    found = []
    for llm in (engine(wide), engine(wide, twist=False)):
        monkeypatch.setattr(llm.renderer, "get_tokenizer", Tokenizer)
        settings = BeamSearchParams(beam_width=3, max_tokens=5, temperature=temperature)
        (output,) = llm.beam_search([{"prompt_token_ids": prompt_of(9)}], settings)
        found.append([(beam.tokens, round(beam.cum_logprob, 3)) for beam in output.sequences])
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model of Gemma 3's kind: a layer with a window of 32 tokens, and one without."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 0.2
    head = TwistHead.create(TwistHeadConfig("linear", HIDDEN, 40), seed=3)
    return save(tmp_path_factory.mktemp("hybrid"), model, head, vocab=40, eos=1)  # type: ignore[arg-type]


def test_full_and_sliding_window_attention(engine, hybrid: Tiny):
    """The cache of both kinds is kept alike, so that forks at every step beyond the window are right in both."""
    llm = engine(hybrid)
    options = {"max_tokens": 70, "ignore_eos": True, "seed": 5, "twist_particles": 6, **EVERY_STEP}
    (output,) = generate(llm, [prompt_of(40)], params(**options))
    assert results(output)[0].num_resamplings == 68
    assert len({tuple(p.token_ids) for p in results(output)[0].particles}) > 1
    assert_rescored(hybrid, output)
    # The window is no ornament: without it the model says something else.
    tokens = torch.tensor([prompt_of(40) + list(output.outputs[0].token_ids)])
    with torch.no_grad():
        windowed = hybrid.model(tokens).logits
        windows = [layer.self_attn for layer in hybrid.model.model.layers]
        hybrid.model.config.sliding_window = 256
        for layer in windows:
            layer.sliding_window = 256 if layer.sliding_window else None
        assert not torch.allclose(hybrid.model(tokens).logits[0, -1], windowed[0, -1], atol=1e-3)


def test_hybrid_cache_that_is_asked_for_is_refused(hybrid: Tiny):
    from vllm import LLM

    message = r"`twist_head` needs .*, this one has 2 .*: .*leave `disable_hybrid_kv_cache_manager` out"
    with pytest.raises(ValueError, match=message):
        LLM(str(hybrid.path), twist_head=str(hybrid.head_path), disable_hybrid_kv_cache_manager=False, **ENGINE)
