"""Write the README's table of measurements from the rows that the benchmarks have left.

    python -m benchmarks.tables            # rewrite it
    python -m benchmarks.tables --check    # fail if it is not what the rows say

Of rows that measure the same thing, the last counts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: made by python -m benchmarks.tables -->", "<!-- measured: end -->"
HEADER = ["what is compared, in one run", "baseline", "with a twist", "ratio", "machine"]


def latest(name: str, *key: str) -> Iterator[dict[str, str]]:
    """Yield the rows of ``benchmarks/results/NAME.csv``, the last of each ``key``, in the order of the file."""
    with (ROOT / f"benchmarks/results/{name}.csv").open() as file:
        rows = {tuple(row[field] for field in key): row for row in csv.DictReader(file)}
    yield from rows.values()


def rate(row: dict[str, str], side: str) -> str:
    """Return "median (lower quartile–upper quartile)" of a side's tokens per second."""
    low, median, high = (row[f"{side}_tokens_per_s_{part}"] for part in ("q25", "median", "q75"))
    return f"{median} ({low}–{high}) tokens/s"


def machine(row: dict[str, str]) -> str:
    versions = dict(zip(*[iter(row["versions"].split())] * 2, strict=True))
    return f"{row['hardware'].removesuffix(' Processor')}, vLLM {versions['vllm']}"


def decoding() -> Iterator[list[str]]:
    """Twisted decoding with K particles against plain sampling with n = K."""
    for row in latest("generate", "model", "particles", "max_tokens", "hardware"):
        model = row["model"].removeprefix("models/")
        command, mode = row["command"], "compiled"
        mode = "CUDA graphs" if "cudagraph_mode" in command else "eager" if "--eager" in command else mode
        what = f"decoding against vLLM's n = K, {model}: K = {row['particles']}, T = {row['max_tokens']}, {mode}"
        yield [what, rate(row, "plain"), rate(row, "twisted"), f"{float(row['ratio']):.2f}", machine(row)]


def training_draws() -> Iterator[list[str]]:
    """Drawing for a training step with the engine against other ways."""
    names = {
        "generate": "`transformers.generate`",
        "re-forward": "computing every prefix anew",
        "full length": "the same in arrays of full length",
    }
    rows = list(latest("sampling", "sequences", "max_tokens", "side"))
    engine = {(row["sequences"], row["max_tokens"]): row for row in rows if row["side"] == "engine"}
    for row in rows:
        if row["side"] in names:
            own = engine[row["sequences"], row["max_tokens"]]
            assert own["hardware"] == row["hardware"] and own["date"] == row["date"], "sides of two runs"
            size = f"{row['sequences']} sequences, T = {row['max_tokens']}"
            what = f"draws for training against {names[row['side']]}: {size}"
            ratio = f"{float(row['engine_over_side_twisted']):.2f}"
            yield [what, rate(row, "twisted"), rate(own, "twisted"), ratio, machine(row)]


def kernels() -> Iterator[list[str]]:
    """The passes over the vocabulary on a GPU against a copy on the same device."""
    for row in latest("kernels", "op", "size", "dtype", "hardware", "backend"):
        if (row["backend"], row["dtype"]) != ("triton", "bfloat16") or "128256" not in row["size"]:
            continue
        if row["op"] in ("twist_softmax", "twist_sample"):
            what = f"`{row['op']}` against a device copy: {row['size']}, {row['dtype']}"
            copy, own = float(row["copy_gb_per_s"]), float(row["gb_per_s"])
            yield [what, f"{copy:.0f} GB/s", f"{own:.0f} GB/s", f"{own / copy:.2f}", machine(row)]


def table() -> str:
    """Return the table in Markdown."""
    rows = [*decoding(), *kernels(), *training_draws()]
    rows.append(["on a GPU: models of 8B, other thresholds, draws for training", "not yet measured", "", "", ""])
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is out of date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if args.check:
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
