"""Greedy decoding of vLLM against transformers, then groups of the shipped model, on whatever device is here.

    python -m benchmarks.gpu.smoke [--engine-args JSON]
"""

from __future__ import annotations

import argparse
import json
import math
import os

from benchmarks.report import HEAD, MODEL, hardware, versions

PROMPTS = ["The film was", "I loved"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further engine arguments, as JSON")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import transformers
    from vllm import LLM, SamplingParams

    from vllm_twist import results

    llm = LLM(
        MODEL,
        twist_head=HEAD,
        **{"enforce_eager": True, "max_model_len": 256, "dtype": "float32", "max_num_seqs": 64, "seed": 0,
           "kv_cache_memory_bytes": 2**27, **args.engine_args},
    )  # fmt: skip
    config = llm.llm_engine.vllm_config
    runner = "V2" if config.use_v2_model_runner else "V1"
    print(f"{hardware()} · {versions('transformers')} · Model Runner {runner}", end=" · ")
    print(f"asynchronous {config.scheduler_config.async_scheduling} · {config.compilation_config.cudagraph_mode}")
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, extra_args={"twist": 0})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, greedy, use_tqdm=False), strict=True):
        got, ids = list(output.outputs[0].token_ids), tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        for _ in got:
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        want = ids[0, -len(got) :].tolist()
        if got != want:
            raise RuntimeError(f"greedy decoding differs from transformers: got {got}, expected {want}.")
    print("greedy equals transformers")
    for particles in (1, 8, 32):
        params = SamplingParams(max_tokens=32, seed=7, extra_args={"twist_particles": particles})
        for output in llm.generate(PROMPTS, params, use_tqdm=False):
            (group,) = results(output)
            print(f"K={particles:>2}  log Z {group.log_z:+.3f}  ESS {group.ess:4.1f}  {output.outputs[0].text[:60]!r}")
            if not math.isfinite(group.log_z):
                raise RuntimeError(f"log Z is {group.log_z}.")
    print("groups came to their end")


if __name__ == "__main__":
    main()
