"""Processes beside the session: what their tests came to is known, also of those that die."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import processes
from support.processes import Line

SOURCE = """
import os, pytest, time

def test_good(): pass

@pytest.mark.parametrize("x", ["a::b c", "d"])
def test_case(x): assert x == "d", "not this one"

@pytest.fixture
def broken(): raise ValueError("the fixture")

def test_broken(broken): pass

def test_skipped(): pytest.skip("not here")

def test_dies():
    print("last words", file=open(os.environ["SAID"], "w"))
    {death}

def test_never(): pass
"""


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """Return a line of its own, not started."""
    return Line(tmp_path)


def add(line: Line, tmp_path: Path, death: str, *options: str, after: str | None = None) -> None:
    folder = tmp_path / f"{len(line.jobs)}"
    folder.mkdir()
    (folder / "test_these.py").write_text(SOURCE.replace("{death}", death))
    environment = {"PYTHONPATH": str(Path(__file__).parent), "SAID": str(folder / "said")}
    exits = ["-o", "faulthandler_exit_on_timeout=true"]
    tests = ["-p", "support.processes", *exits, *options, str(folder / "test_these.py")]
    line.add_tests(folder.name, tests, environment, folder, after)


def test_outcomes(line: Line, tmp_path: Path):
    """Of a process that dies those of the tests until then are known, and at which it died, of what."""
    add(line, tmp_path, "os._exit(7)")
    add(line, tmp_path, "pass", after="0")
    add(line, tmp_path, "time.sleep(900)", "-o", "faulthandler_timeout=2", "-k", "dies")
    line.start()
    found = line.outcomes("0")
    assert found.pop("test_these.test_good") == found.pop("test_these.test_case[d]") == ""
    assert "not this one" in found.pop("test_these.test_case[a::b c]")
    assert "the fixture" in found.pop("test_these.test_broken")
    assert found.pop("test_these.test_skipped").startswith("skipped: ")
    assert "It did not end. 0 ended with exit code 7; it said:\n" in found.pop("test_these.test_dies")
    assert not found
    other = line.outcomes("1")
    assert other["test_these.test_dies"] == other["test_these.test_never"] == "" and line.exit_code("1") == 1
    hung = line.outcomes("2")["test_these.test_dies"]
    assert "ended with exit code 1" in hung and "Timeout (0:00:02)!" in hung


def test_process_that_hangs_is_killed(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "HANG", 0.5)
    line.add("a", ["-c", "print('up', flush=True); input()"], {}, tmp_path)
    line.add("b", ["-c", "import time; time.sleep(900)"], {}, tmp_path)
    line.start()
    assert line.exit_code("b") == -9 and "b ended with exit code -9" in line.said("b")


def test_two_at_a_time_when_the_session_waits(line: Line, tmp_path: Path):
    """Each of two processes ends when it has seen the other begin."""
    for mine, other in ("ab", "ba"):
        code = f"open('{mine}', 'w')\nwhile not __import__('os').path.exists('{other}'): pass"
        (tmp_path / f"log-{mine}").mkdir()
        line.add(mine, ["-c", code], {}, tmp_path / f"log-{mine}")
    line.start()
    assert line.exit_code("a") == line.exit_code("b") == 0
