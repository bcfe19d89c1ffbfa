"""The examples run from end to end, small, and show what they are there for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path


def test_rare_event(repo_root: Path, tmp_path: Path):
    """The learned proposal finds an event that p0 mostly misses; fixed seeds.

    A head that learned nothing would have the hits and the bounds of p0.
    """
    command = [sys.executable, "-m", "examples.rare_event", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=repo_root, check=True, timeout=600)
    found = json.loads((tmp_path / "rare-event.json").read_text())
    assert (tmp_path / "rare-event.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "head" / "model.safetensors").exists()
    shares = found["share_of_hits"]
    assert shares["twisted"] > 3 * max(shares["p0"], 0.01), shares

    (prompt,) = found["prompts"]
    rows = {(row["proposal"], row["particles"], row["resample"]): row for row in prompt["rows"]}
    largest = max(found["particles"])
    lower = {proposal: rows[proposal, largest, False]["lower"]["mean"] for proposal in ("base", "twist")}
    assert lower["twist"] > lower["base"] + 1, lower
    # Twice the error of either: the sample and the sandwich speak of one Z.
    event = found["event"]
    error = 2 * (prompt["log_z"]["ci95"] + event["ci95"] / event["probability"])
    assert abs(prompt["log_z"]["mean"] - math.log(event["probability"])) < error


def test_star_reviews(repo_root: Path, tmp_path: Path):
    """A head for one class moves the proposal into it, and SMC moves it further, as a second classifier sees it.

    Fixed seeds; with a head that learned nothing the proposal would have the share of p0. The divergences are not
    judged: their intervals are as wide as what they differ by at this size.
    """
    command = [sys.executable, "-m", "examples.star_reviews", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=repo_root, check=True, timeout=600)
    found = json.loads((tmp_path / "star-reviews.json").read_text())
    assert (tmp_path / "star-reviews.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "head-5" / "model.safetensors").exists()
    assert found["accuracy"]["judge"] > 0.8, found["accuracy"]
    (five,) = found["classes"].values()
    share = {method: five[method]["in_class"] for method in ("p0", "q", "smc")}
    assert share["q"] > share["p0"] + 0.2 and share["smc"] > share["p0"] + 0.3, share


def test_infilling(repo_root: Path, tmp_path: Path):
    """The mean of log Z(o_T) is minus the entropy of o_T; a little learning brings the proposal nearer; fixed seeds."""
    command = [sys.executable, "-m", "examples.infilling", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=repo_root, check=True, timeout=600)
    found = json.loads((tmp_path / "infilling.json").read_text())
    assert (tmp_path / "infilling.png").read_bytes().startswith(b"\x89PNG")
    short = found["prompts"][0]
    assert found["left_out"] < 1e-3
    assert abs(short["log_z"]["mean"] - found["exact_mean_log_z"]) < 2 * short["log_z"]["ci95"]
    upper = {row["proposal"]: row["upper"]["mean"] for row in short["rows"] if row["particles"] == 1}
    assert upper["twist"] < upper["base"] - 0.2, upper
    assert len(found["filled"]) == 1 and found["filled"][0]["infilled"]
