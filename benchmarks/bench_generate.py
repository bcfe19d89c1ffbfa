"""Tokens per second of twisted decoding against plain parallel sampling, in one engine and one run.

    python -m benchmarks.bench_generate [--particles 16] [--max-tokens 128] [--csv benchmarks/results/generate.csv]

Both sides keep the same number of sequences in the batch: K particles of one twisted request,
and one plain request with n = K. Repeats alternate between the two.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import HEAD, MODEL, append_row, hardware, quartiles, spread, versions


def both_sides(particles: int, max_tokens: int) -> dict[str, Any]:
    """Return the sampling parameters of either side; they keep the same number of sequences in the batch."""
    from vllm import SamplingParams

    common = {"max_tokens": max_tokens, "ignore_eos": True}
    return {
        "plain": SamplingParams(n=particles, extra_args={"twist": 0}, **common),
        "twisted": SamplingParams(extra_args={"twist_particles": particles}, **common),
    }


def measure(
    llm: Any,
    prompt: str,
    *,
    particles: int,
    max_tokens: int,
    repeats: int,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Return tokens per second of each repeat, for "plain" and "twisted" (one warm-up each)."""
    sides = both_sides(particles, max_tokens)
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
    parser.add_argument("--csv", type=Path, help="append one row per number of particles")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(
        args.model,
        twist_head=args.twist_head,
        max_num_seqs=max(args.particles),
        enforce_eager=args.eager,
        max_model_len=512,
        kv_cache_memory_bytes=2**30,
    )
    print(f"{hardware()} · {versions()} · {args.model} · T={args.max_tokens} · {args.repeats} repeats")
    print(f"{'K':>4}  {'plain n=K tok/s':>24}  {'twisted tok/s':>24}  {'ratio':>6}   (median, quartiles)")
    for particles in args.particles:
        rates = measure(llm, "I bought this", particles=particles, max_tokens=args.max_tokens, repeats=args.repeats)
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
                    "command": "python -m benchmarks.bench_generate" + (" --eager" if args.eager else ""),
                    "model": args.model,
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
