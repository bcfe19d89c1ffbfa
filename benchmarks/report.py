"""What every benchmark reports: the machine, the versions, quartiles, and rows of a CSV file."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from collections.abc import Sequence
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


def versions(*others: str) -> str:
    """Return the versions of vLLM, PyTorch, this package and the others named."""
    return " ".join(f"{name} {metadata.version(name)}" for name in ("vllm", "torch", "vllm-twist", *others))


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4)


def spread(values: Sequence[float]) -> str:
    """Return "median (lower quartile-upper quartile)"."""
    low, median, high = quartiles(values)
    return f"{median:9.0f} ({low:.0f}-{high:.0f})"


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, with a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
