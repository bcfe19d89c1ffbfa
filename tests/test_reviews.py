"""The shipped model and head, through the engine, with their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_twist import results
from vllm_twist.potentials import load_potential

HEAD = "models/tiny-reviews-positive"


@pytest.fixture(scope="session")  # an engine that is let go takes the state that vLLM shares between them with it
def llm(repo_root: Path) -> Any:
    from vllm import LLM

    return LLM(
        str(repo_root / "models/tiny-reviews"),
        twist_head=str(repo_root / HEAD),
        twist_particles=16,
        enforce_eager=True,
        max_num_seqs=64,
        max_model_len=256,
        kv_cache_memory_bytes=2**27,
    )


def generate(llm: Any, prompts: list[str], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    extra = {key: options.pop(key) for key in list(options) if key.startswith("twist")}
    params = [
        SamplingParams(**{"max_tokens": 48, "seed": seed, **options}, extra_args=extra) for seed in range(len(prompts))
    ]
    return llm.generate(prompts, params, use_tqdm=False)


def test_twisted_reviews_are_more_positive(llm, repo_root: Path):
    """The head does what it was trained for: mean p(positive) of 200 draws against 200 plain samples.

    Fixed seeds; a difference of about 0.35 is expected, four standard errors (0.05) above the margin.
    """
    potential = load_potential(repo_root / HEAD)

    def positive(outputs: list[Any]) -> float:
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return torch.tensor(potential(token_ids, [output.outputs[0].text for output in outputs])).exp().mean().item()

    prompts = ["I bought this"] * 200
    plain, twisted = positive(generate(llm, prompts, twist=0)), positive(generate(llm, prompts, twist_particles=4))
    assert twisted > plain + 0.15, (plain, twisted)


def test_bad_words_and_no_logprobs_but_the_drawn(llm):
    """What vLLM bans for a word occurs in no particle; logprobs=0 gives the drawn token's alone."""
    from vllm import SamplingParams

    banned = SamplingParams(bad_words=[".", ","])
    banned.update_from_tokenizer(llm.get_tokenizer())
    sequences = [tuple(ids) for ids in banned.bad_words_token_ids]

    def occurs(output: Any) -> bool:
        rows = [particle.token_ids for particle in results(output)[0].particles]
        return any(tuple(row[i : i + len(ids)]) == ids for row in rows for ids in sequences for i in range(len(row)))

    options = {"logprobs": 0, "twist_particles": 32, "twist_return_particles": 1, "twist_ess_threshold": 1.0}
    (free,) = generate(llm, ["The battery"], **options)
    (output,) = generate(llm, ["The battery"], bad_words=[".", ","], **options)
    assert occurs(free) and not occurs(output)
    completion = output.outputs[0]
    assert [list(entry) for entry in completion.logprobs] == [[token] for token in completion.token_ids]


def test_chat(llm):
    from vllm import SamplingParams

    (output,) = llm.chat([{"role": "user", "content": "This blender"}], SamplingParams(max_tokens=32), use_tqdm=False)
    assert output.outputs[0].text and results(output)[0].ess > 1
