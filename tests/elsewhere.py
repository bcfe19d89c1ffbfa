"""What runs in processes of its own, beside the session: tests whose needs are settled when modules are imported, and
commands that take long.

A test file that has such processes defines ``start_elsewhere(line, request)``, which puts them into the session's line
before the first test runs, and asks for what became of them when its own turn comes, after all other files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree


class Line:
    """Processes that run one after another, beside the session: two at a time would crowd a small machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._jobs: dict[str, tuple[list[str], dict[str, str], Path]] = {}
        self._done: dict[str, threading.Event] = {}
        self._codes: dict[str, int] = {}
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def add(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Queue a command, arguments of this Python; its output goes to ``folder``."""
        self._jobs[name] = [sys.executable, *command], environment, folder
        self._done[name] = threading.Event()

    def add_tests(self, name: str, tests: list[str], environment: dict[str, str], folder: Path) -> None:
        """Queue pytest for these tests; it leaves its report in ``folder``."""
        report = f"--junitxml={folder / 'report.xml'}"
        self.add(name, ["-m", "pytest", "-q", "-p", "no:cacheprovider", report, *tests], environment, folder)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        for name, (command, environment, folder) in self._jobs.items():
            if self._stopped:
                return
            with (folder / "log.txt").open("w") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=self.root,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                self._codes[name] = self._process.wait()
            self._done[name].set()

    def exit_code(self, name: str, timeout: float = 1500) -> int:
        """Wait for a process; return its exit code.

        Raises:
            RuntimeError: it is not done in ``timeout`` seconds.
        """
        if not self._done[name].wait(timeout):
            raise RuntimeError(f"{name} did not finish; it said:\n{self.said(name)}")
        return self._codes[name]

    def folder(self, name: str) -> Path:
        return self._jobs[name][2]

    def said(self, name: str) -> str:
        """Return the end of what a process put out."""
        log = self.folder(name) / "log.txt"
        return log.read_text()[-5000:] if log.exists() else "nothing: it was not started"

    def outcomes(self, name: str) -> dict[str, str]:
        """Wait; return what each test of a process failed with, "" if it passed, by "module.test[case]".

        Raises:
            RuntimeError: it was not done in time, or wrote no report.
        """
        self.exit_code(name)
        report = self.folder(name) / "report.xml"
        if not report.exists():
            raise RuntimeError(f"the tests of {name} wrote no report; they said:\n{self.said(name)}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            module = case.get("classname", "").split(".")[-1]
            found[f"{module}.{case.get('name')}"] = "\n".join(x.text or x.get("message") or x.tag for x in case)
        return found
