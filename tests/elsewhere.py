"""Tests that run in pytest processes of their own, because what they need is settled when modules are imported.

A test file that has such tests defines ``start_elsewhere(line, request)``, which puts them into the session's line
before the first test runs, and asks for their outcomes when its own turn comes, after all other files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree


class Line:
    """Pytest processes that run one after another, beside the session: two at a time would crowd a small machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._jobs: dict[str, tuple[list[str], dict[str, str], Path]] = {}
        self._done: dict[str, threading.Event] = {}
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def add(self, name: str, tests: list[str], environment: dict[str, str], folder: Path) -> None:
        """Queue a process for these tests; it leaves its report in ``folder``."""
        self._jobs[name] = tests, environment, folder
        self._done[name] = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        for name, (tests, environment, folder) in self._jobs.items():
            if self._stopped:
                return
            report = f"--junitxml={folder / 'report.xml'}"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", report, *tests]
            with (folder / "log.txt").open("w") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=self.root,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                self._process.wait()
            self._done[name].set()

    def outcomes(self, name: str, timeout: float = 1500) -> dict[str, str]:
        """Wait; return what each test of a process failed with, "" if it passed, by "module.test[case]".

        Raises:
            RuntimeError: the process is not done in ``timeout`` seconds, or wrote no report.
        """
        folder = self._jobs[name][2]
        in_time = self._done[name].wait(timeout)
        if not in_time or not (folder / "report.xml").exists():
            log = folder / "log.txt"
            said = log.read_text()[-5000:] if log.exists() else "nothing: it was not started"
            raise RuntimeError(f"the tests of {name} did not finish; they said:\n{said}")
        found = {}
        for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
            module = case.get("classname", "").split(".")[-1]
            found[f"{module}.{case.get('name')}"] = "\n".join(x.text or x.get("message") or x.tag for x in case)
        return found
