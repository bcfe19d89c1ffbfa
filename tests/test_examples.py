"""The examples run from end to end, small, and show what they are there for.

They run beside the session, from its start on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.processes import Line


def start_elsewhere(line: Line, request: pytest.FixtureRequest) -> None:
    """Run the examples whose tests were selected."""
    make_folder = request.getfixturevalue("tmp_path_factory").mktemp
    for item in request.session.items:
        if item.path == Path(__file__):
            example = item.name.removeprefix("test_")
            folder = make_folder(example)
            line.add(example, ["-m", f"examples.{example}", "--quick", "--out", str(folder)], {}, folder)


@pytest.fixture
def made(line: Line, request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the example that the test is named after, and its figures."""
    example = request.node.name.removeprefix("test_")
    assert line.exit_code(example) == 0, line.said(example)
    folder = line.folder(example)
    return folder, json.loads((folder / f"{example.replace('_', '-')}.json").read_text())


def test_rare_event(made: tuple[Path, dict[str, Any]]):
    """The learned proposal finds an event that p0 mostly misses; fixed seeds.

    A head that learned nothing would have the hits and the bounds of p0.
    """
    folder, found = made
    assert (folder / "rare-event.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "head" / "model.safetensors").exists()
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


def test_star_reviews(made: tuple[Path, dict[str, Any]]):
    """A head for one class moves the proposal into it, and SMC moves it further, as a second classifier sees it.

    Fixed seeds; with a head that learned nothing the proposal would have the share of p0. The divergences are not
    judged: their intervals are as wide as what they differ by at this size.
    """
    folder, found = made
    assert (folder / "star-reviews.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "head-5" / "model.safetensors").exists()
    assert found["accuracy"]["judge"] > 0.8, found["accuracy"]
    (five,) = found["classes"].values()
    share = {method: five[method]["in_class"] for method in ("p0", "q", "smc")}
    assert share["q"] > share["p0"] + 0.2 and share["smc"] > share["p0"] + 0.3, share


def test_infilling(made: tuple[Path, dict[str, Any]]):
    """The mean of log Z(o_T) is minus the entropy of o_T; a little learning brings the proposal nearer; fixed seeds."""
    folder, found = made
    assert (folder / "infilling.png").read_bytes().startswith(b"\x89PNG")
    short = found["prompts"][0]
    assert found["left_out"] < 1e-3
    assert abs(short["log_z"]["mean"] - found["exact_mean_log_z"]) < 2 * short["log_z"]["ci95"]
    upper = {row["proposal"]: row["upper"]["mean"] for row in short["rows"] if row["particles"] == 1}
    assert upper["twist"] < upper["base"] - 0.2, upper
    assert len(found["filled"]) == 1 and found["filled"][0]["infilled"]
