"""What runs in processes of its own, beside the session: tests whose needs are settled when modules are imported,
commands that take long, and, when everything runs, some of the files (``conftest.BESIDE``).

A test file that has such processes defines ``start_elsewhere(line, request)``, which puts them into the session's line
before the first test runs, and asks for what became of them when its own turn comes, after all other files.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds after which a process hangs.
HANG = 1800
#: Names the file in which a pytest process of a line reports.
REPORT = "TWIST_TEST_REPORT"


@dataclass
class Job:
    command: list[str]
    environment: dict[str, str]
    folder: Path
    after: str | None
    done: threading.Event = field(default_factory=threading.Event)
    code: int | None = None
    process: subprocess.Popen | None = None

    @property
    def said(self) -> str:
        """The end of what it put out."""
        log = self.folder / "log.txt"
        return log.read_text()[-5000:] if log.exists() else "nothing: it was not started"


class Line:
    """Processes that run one after another, beside the session: more at a time would crowd a small machine.

    When the session has nothing left to do but to wait for them, they run two at a time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._lock = threading.Lock()
        self._workers = 0
        self._stopped = False

    def add(
        self, name: str, command: list[str], environment: dict[str, str], folder: Path, after: str | None = None
    ) -> None:
        """Queue a command, arguments of this Python, to be run after another; its output goes to ``folder``."""
        self.jobs[name] = job = Job([sys.executable, *command], environment, folder, after)
        self._waiting.append(job)

    def add_tests(
        self, name: str, tests: list[str], environment: dict[str, str], folder: Path, after: str | None = None
    ) -> None:
        """Queue pytest for these tests; it reports in ``folder``."""
        environment = {**environment, REPORT: str(folder / "report.jsonl")}
        self.add(name, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], environment, folder, after)

    def start(self) -> None:
        self._workers += 1
        threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for job in self.jobs.values():
                if job.process is not None:
                    job.process.kill()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                job = self._waiting.pop(0)
            try:
                self._run(job)
            finally:
                job.done.set()

    def _run(self, job: Job) -> None:
        if job.after is not None:
            self.jobs[job.after].done.wait()
        with (job.folder / "log.txt").open("w") as log:
            with self._lock:
                if self._stopped:
                    return
                job.process = subprocess.Popen(
                    job.command,
                    cwd=self.root,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **job.environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            try:
                job.code = job.process.wait(HANG)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.code = job.process.wait()

    def exit_code(self, name: str) -> int:
        """Wait for a process; return its exit code, that of a kill if it hung.

        Raises:
            RuntimeError: it could not be started.
        """
        job = self.jobs[name]
        if not job.done.is_set():
            # Each process has its own guard; this wait is none of the session's hangs.
            faulthandler.cancel_dump_traceback_later()
            if self._workers < 2:
                self.start()
            job.done.wait()
        if job.code is None:
            raise RuntimeError(f"{name} was not run")
        return job.code

    def folder(self, name: str) -> Path:
        return self.jobs[name].folder

    def said(self, name: str) -> str:
        """Return the end of what a process put out, and with which code it ended."""
        return f"{name} ended with exit code {self.jobs[name].code}; it said:\n{self.jobs[name].said}"

    def outcomes(self, name: str) -> dict[str, str]:
        """Wait; return what each test of a process failed with, "" if it passed, by "module.test[case]".

        A test at which the process died failed with what the process said last; later ones are not there.
        """
        self.exit_code(name)
        report, found, begun = self.folder(name) / "report.jsonl", {}, None
        for line in report.read_text().splitlines() if report.exists() else ():
            test, failure = json.loads(line)
            if failure is None:
                begun, found[test] = test, ""
            elif failure:
                found[test] += f"{failure}\n"
            else:
                begun = None
        if begun is not None:
            found[begun] += f"It did not end. {self.said(name)}"
        return found


def test_name(nodeid: str) -> str:
    """Return "module.test[case]"."""
    path, _, test = nodeid.partition("::")
    return f"{Path(path).stem}.{test}"


def _report(nodeid: str, failure: str | None) -> None:
    if REPORT in os.environ:
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps([test_name(nodeid), failure]) + "\n")


# Hooks of a pytest process, by which the line of another one learns that a test began (None), failed, or ended ("").


def pytest_runtest_logstart(nodeid: str) -> None:
    _report(nodeid, None)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _report(report.nodeid, report.longreprtext)
    elif report.skipped:
        _report(report.nodeid, f"skipped: {report.longreprtext}")


def pytest_runtest_logfinish(nodeid: str) -> None:
    _report(nodeid, "")
