"""KV blocks that one group takes at most, against plain parallel sampling and against what admission reserves.

    python -m benchmarks.bench_memory [--particles 64] [--max-tokens 512] [--csv benchmarks/results/memory.csv]

Resampling at every token (``--ess-threshold 1``) makes the particles share the most, never the least. Then two groups
in a cache that holds little more than one: how often a group was preempted, and that both came to their end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench_generate import both_sides
from benchmarks.report import append_row, hardware, versions
from benchmarks.shapes import PROMPT, SHAPES, engine_options, make_head, make_model


def run_to_the_end(llm: Any, requests: list[Any]) -> tuple[int, int, list[Any]]:
    """Return the most KV blocks in use after any step, the number of steps, and the outputs."""
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    pool, most = scheduler.kv_cache_manager.block_pool, 0
    total = scheduler.kv_cache_config.num_blocks - 1
    for i, params in enumerate(requests):
        core.add_request(str(i), PROMPT, params)
    outputs, steps = [], 0
    while core.has_unfinished_requests():
        outputs += [output for output in core.step() if output.finished]
        most, steps = max(most, total - pool.get_num_free_blocks()), steps + 1
    return most, steps, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further engine arguments, as JSON")
    parser.add_argument("--csv", type=Path, help="append one row per side and threshold")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # In this process, so that its scheduler can be looked at.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure one group alone, then two in too small a cache."""
    import torch
    from vllm import LLM

    block = 32
    length = len(PROMPT["prompt_token_ids"]) + args.max_tokens
    shared = (len(PROMPT["prompt_token_ids"]) - 1) // block
    reserved = shared + args.particles * (-(-length // block) - shared)
    options = engine_options(make_model(args.shape, folder)) | {
        "twist_head": str(make_head("low_rank", args.shape, folder)),
        "twist_particles": args.particles,
        "max_num_seqs": 2 * args.particles,
        "max_model_len": length + block,
        "block_size": block,
        "num_gpu_blocks_override": reserved + reserved // 4 + 1,
    }
    llm = LLM(**{**options, **args.engine_args})
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    parked: list[str] = []
    park = scheduler._park
    scheduler._park = lambda group: (parked.append(group.id), park(group))
    print(f"{hardware()} · {versions()} · {args.shape} · K={args.particles}, T={args.max_tokens}, blocks of {block}")

    def report(side: str, threshold: float | str, found: tuple[int, int, list[Any]], expected: int) -> None:
        most, steps, outputs = found
        ended = sum(all(len(o.token_ids) == args.max_tokens for o in output.outputs) for output in outputs)
        row = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions(),
            "command": " ".join(["python -m benchmarks.bench_memory", *sys.argv[1:]]),
            "side": side,
            "ess_threshold": threshold,
            "peak_blocks": most,
            "reserved_blocks": reserved,
            "steps": steps,
            "preemptions": len(parked),
            "device_peak_mib": torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else "",
        }
        print({key: row[key] for key in list(row)[4:]}, flush=True)
        if args.csv:
            append_row(args.csv, row)
        if ended != expected:
            raise RuntimeError(f"{side}: {ended} of {expected} requests came to their end.")

    sides = both_sides(args.particles, args.max_tokens)
    report("plain", "", run_to_the_end(llm, [sides["plain"]]), 1)
    for threshold in args.thresholds:
        twisted = both_sides(args.particles, args.max_tokens, twist_ess_threshold=threshold)["twisted"]
        report("twisted", threshold, run_to_the_end(llm, [twisted]), 1)
    two = both_sides(args.particles, args.max_tokens, twist_ess_threshold=0.0)["twisted"]
    report("two groups, cache for one and a quarter", 0.0, run_to_the_end(llm, [two, two.clone()]), 2)


if __name__ == "__main__":
    main()
