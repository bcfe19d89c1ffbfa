"""What the tests ask of their engines: options, requests, and a look inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import runners
from support.models import Tiny
from support.runners import fewer
from vllm_twist import results

ENGINE = dict(
    skip_tokenizer_init=True,
    enforce_eager=True,
    dtype="float32",
    max_model_len=256,
    block_size=32,
    max_num_seqs=64,
    seed=0,
    kv_cache_memory_bytes=2**26,
    **runners.options(),
)
PROMPTS = {"below": [0, 2, 3], "equal": [0, 2, 3, 2] * 8, "above": [0, 2, 3, 2] * 8 + [3, 2, 0]}
EVERY_STEP = {"twist_ess_threshold": 1.0, "twist_return_particles": True}


def params(**options: Any) -> Any:
    from vllm import SamplingParams

    extra = {key: options.pop(key) for key in list(options) if key.startswith("twist")}
    return SamplingParams(**{"max_tokens": 8, "detokenize": False, **options}, extra_args=extra or None)


def generate(llm: Any, prompts: list[list[int]], parameters: Any) -> list[Any]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)


def prompt_of(length: int) -> list[int]:
    return [2 + (7 * i + i * i) % 38 for i in range(length)]


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def assert_rescored(tiny: Tiny, output: Any, tolerance: float = 2e-4) -> None:
    """Check each particle's log_prob against one teacher-forced pass in transformers."""
    prompt = output.prompt_token_ids
    for particle in results(output)[0].particles:
        log_p = tiny.log_p([prompt + particle.token_ids])[0, len(prompt) - 1 : -1]
        expected = log_p.gather(1, torch.tensor(particle.token_ids)[:, None]).sum().item()
        assert particle.log_prob == pytest.approx(expected, abs=tolerance)


def run(llm: Any, prompt: list[int], groups: int, *, particles: int, horizon: int, **options: Any) -> list[Any]:
    from vllm import SamplingParams

    groups = fewer(groups, least=options.pop("least", 6))
    extra = {"twist_particles": particles, "twist_return_particles": True}
    extra.update({key: options.pop(key) for key in list(options) if key.startswith("twist")})
    params = [
        SamplingParams(**{"max_tokens": horizon, "seed": seed, "detokenize": False, "extra_args": extra, **options})
        for seed in range(groups)
    ]
    return llm.generate([{"prompt_token_ids": prompt}] * groups, params, use_tqdm=False)


def run_pinned(llm: Any, prompt: list[int], pinned: list[list[int]], *, horizon: int, **options: Any) -> list[Any]:
    from vllm import SamplingParams

    extra = {key: options.pop(key) for key in list(options) if key.startswith("twist")}
    params = [
        SamplingParams(
            **{"max_tokens": horizon, "seed": seed, "detokenize": False, **options},
            extra_args={**extra, "twist_pinned": tokens},
        )
        for seed, tokens in enumerate(pinned)
    ]
    return llm.generate([{"prompt_token_ids": prompt}] * len(pinned), params, use_tqdm=False)
