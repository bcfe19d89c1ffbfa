"""Tokens per second of twisted decoding against plain parallel sampling, in one engine and one run.

    python -m benchmarks.bench_generate [--particles 16] [--max-tokens 128] [--csv benchmarks/results/generate.csv]

Both sides keep the same number of sequences in the batch: K particles of one twisted request,
and one plain request with n = K. Repeats alternate between the two. ``--shape llama-3.2-1b --heads low_rank tied``
takes a model of that shape with random weights, and random heads, one after the other in the same engine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import HEAD, MODEL, append_row, hardware, quartiles, spread, versions
from benchmarks.shapes import PROMPT, SHAPES, engine_options, make_head, make_model


def both_sides(particles: int, max_tokens: int, **extra: Any) -> dict[str, Any]:
    """Return the sampling parameters of either side; they keep the same number of sequences in the batch.

    ``extra`` are further request keys of the twisted side.
    """
    from vllm import SamplingParams

    common = {"max_tokens": max_tokens, "ignore_eos": True}
    return {
        "plain": SamplingParams(n=particles, extra_args={"twist": 0}, **common),
        "twisted": SamplingParams(extra_args={"twist_particles": particles, **extra}, **common),
    }


def measure(
    llm: Any,
    prompt: Any,
    *,
    particles: int,
    max_tokens: int,
    repeats: int,
    progress: Callable[[], Any] = lambda: None,
    **extra: Any,
) -> dict[str, list[float]]:
    """Return tokens per second of each repeat, for "plain" and "twisted" (one warm-up each)."""
    sides = both_sides(particles, max_tokens, **extra)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, params in sides.items():
            start = time.perf_counter()
            llm.generate(prompt, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            if repeat:
                rates[name].append(particles * max_tokens / seconds)
            progress()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--twist-head", default=HEAD)
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--shape", choices=list(SHAPES), help="a model of random weights in place of --model")
    parser.add_argument("--heads", nargs="+", default=["low_rank"], help="kinds of random heads, with --shape")
    parser.add_argument("--ess-threshold", type=float, default=0.5, help="1: resample at every token")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further engine arguments, as JSON")
    parser.add_argument("--csv", type=Path, help="append one row per head and number of particles")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if args.shape:
        # In this process: heads are replaced in the running engine.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure every head and number of particles in one engine."""
    from vllm import LLM

    options: dict[str, Any] = {"model": args.model}
    heads, prompt = {"": args.twist_head}, "I bought this"
    if args.shape:
        options = engine_options(make_model(args.shape, folder))
        heads, prompt = {kind: str(make_head(kind, args.shape, folder)) for kind in args.heads}, PROMPT
    options |= {"max_num_seqs": max(args.particles), "enforce_eager": args.eager}
    options |= {"max_model_len": 512, "kv_cache_memory_bytes": 2**30}
    options |= {"twist_head": next(iter(heads.values())), "twist_particles": max(args.particles)}
    llm = LLM(**{**options, **args.engine_args})
    print(f"{hardware()} · {versions()} · {args.shape or args.model} · T={args.max_tokens} · {args.repeats} repeats")
    print(f"{'K':>4}  {'plain n=K tok/s':>24}  {'twisted tok/s':>24}  {'ratio':>6}   (median, quartiles)")
    for kind, head in heads.items():
        if len(heads) > 1:
            llm.collective_rpc("load_twist_head", args=(head,))
        name = f"{args.shape}, random weights, {kind} head" if kind else args.model
        print(name, flush=True)
        measure_all(llm, args, name, prompt)


def measure_all(llm: Any, args: argparse.Namespace, name: str, prompt: Any) -> None:
    for particles in args.particles:
        sizes = {"particles": particles, "max_tokens": args.max_tokens, "repeats": args.repeats}
        rates = measure(llm, prompt, **sizes, twist_ess_threshold=args.ess_threshold)
        parts = {name: quartiles(values) for name, values in rates.items()}
        ratio = parts["twisted"][1] / parts["plain"][1]
        print(f"{particles:>4}  {spread(rates['plain']):>24}  {spread(rates['twisted']):>24}  {ratio:>6.2f}")
        if args.csv:
            append_row(
                args.csv,
                {
                    "date": datetime.date.today().isoformat(),
                    "hardware": hardware(),
                    "versions": versions(),
                    "command": " ".join(["python -m benchmarks.bench_generate", *sys.argv[1:]]),
                    "model": name,
                    "particles": particles,
                    "max_tokens": args.max_tokens,
                    **{
                        f"{name}_tokens_per_s_{part}": round(value)
                        for name, q in parts.items()
                        for part, value in zip(("q25", "median", "q75"), q, strict=True)
                    },
                    "ratio": round(ratio, 3),
                },
            )


if __name__ == "__main__":
    main()
