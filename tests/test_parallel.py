"""The engine on two workers, each a process of its own, against one in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import runners
from support.engines import assert_rescored, generate, params, prompt_of
from support.models import Tiny

from vllm_twist import results

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[5])
from support import runners
RUNNER = runners.options()  # in every process: this file is each one's main module

def main():
    from vllm import LLM, SamplingParams

    prompts, options = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    llm = LLM(sys.argv[1], twist_head=sys.argv[2], skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
              max_model_len=256, block_size=32, kv_cache_memory_bytes=2**26, max_num_seqs=32, **RUNNER, **options)
    params = SamplingParams(max_tokens=int(sys.argv[6]), seed=1, ignore_eos=True, detokenize=False, extra_args={
        "twist_particles": 8, "twist_ess_threshold": 1.0, "twist_return_particles": True})
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    print("RESULT", json.dumps([out.kv_transfer_params for out in outs]))

if __name__ == "__main__":
    main()
"""


class Output:
    """As much of a ``RequestOutput`` as the checks read."""

    def __init__(self, prompt_token_ids: list[int], kv_transfer_params: dict[str, Any]) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.kv_transfer_params = kv_transfer_params


@pytest.fixture(scope="module")
def parallel(wide: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    script = tmp_path_factory.mktemp("parallel") / "generate.py"
    script.write_text(SCRIPT)

    def run(prompts: list[list[int]], max_tokens: int, runner: str, **options: Any) -> list[Output]:
        env = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "TWIST_TEST_RUNNER": runner,
        }
        if runner != "v1":
            env |= runners.ENVIRONMENT
        done = subprocess.run(
            [
                sys.executable, script, wide.path, wide.head_path, json.dumps(prompts), json.dumps(options),
                Path(__file__).parent, str(max_tokens),
            ],
            capture_output=True, text=True, env=env, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
        found = json.loads(line[line.index("RESULT") + 7 :])
        return [Output(prompt, entry) for prompt, entry in zip(prompts, found, strict=True)]

    return run


@pytest.mark.parametrize("runner, lengths, max_tokens", [("v1", (40, 5), 70), ("v2-async", (30, 5), 7)])
def test_two_workers_decide_alike(parallel, engine, wide: Tiny, runner: str, lengths: tuple[int, int], max_tokens: int):
    """Tensor parallelism over two processes: each rank resamples and forks as the other, or rescoring fails."""
    prompts = [prompt_of(length) for length in lengths]
    settings = params(
        max_tokens=max_tokens, ignore_eos=True, seed=1, twist_particles=8, twist_ess_threshold=1.0,
        twist_return_particles=True,
    )  # fmt: skip
    alone = generate(engine(wide), prompts, settings)
    together = parallel(prompts, max_tokens, runner, tensor_parallel_size=2)
    for one, two in zip(alone, together, strict=True):
        assert_rescored(wide, one)
        assert_rescored(wide, two)
        # The ranks add up their halves in another order: log Z may differ by rounding, or by one
        # token that rounding turned over, after which the groups are two different draws.
        assert results(one)[0].num_resamplings == results(two)[0].num_resamplings == max_tokens - 2
