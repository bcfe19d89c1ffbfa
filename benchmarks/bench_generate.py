"""Tokens per second of twisted decoding against plain parallel sampling, in one engine and one run.

    python -m benchmarks.bench_generate [--particles 16] [--max-tokens 128] [--csv benchmarks/results/generate.csv]

Both sides keep the same number of sequences in the batch: K particles of one twisted request,
and one plain request with n = K. Repeats alternate between the two.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

MODEL = "models/tiny-reviews"
HEAD = "models/tiny-reviews-positive"


def hardware() -> str:
    """Return the GPU's name, or the CPU's with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def versions() -> str:
    return " ".join(f"{name} {metadata.version(name)}" for name in ("vllm", "torch", "vllm-twist"))


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
    from vllm import SamplingParams

    common = {"max_tokens": max_tokens, "ignore_eos": True}
    sides = {
        "plain": SamplingParams(n=particles, extra_args={"twist": 0}, **common),
        "twisted": SamplingParams(extra_args={"twist_particles": particles}, **common),
    }
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
        quartiles = {name: statistics.quantiles(values, n=4) for name, values in rates.items()}
        ratio = quartiles["twisted"][1] / quartiles["plain"][1]
        cells = [f"{q[1]:9.0f} ({q[0]:.0f}-{q[2]:.0f})" for q in (quartiles["plain"], quartiles["twisted"])]
        print(f"{particles:>4}  {cells[0]:>24}  {cells[1]:>24}  {ratio:>6.2f}")
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
                        for name, q in quartiles.items()
                        for part, value in zip(("q25", "median", "q75"), q, strict=True)
                    },
                    "ratio": round(ratio, 3),
                },
            )


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, with a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
