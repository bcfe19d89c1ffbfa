"""Tests that run in a pytest process of their own, because what they need is settled when modules are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree


class Elsewhere:
    """A pytest process with an environment of its own, started at once."""

    def __init__(self, tests: list[str], environment: dict[str, str], root: Path, folder: Path) -> None:
        self.report, self.log = folder / "report.xml", folder / "log.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={self.report}", *tests]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def outcomes(self, timeout: float) -> dict[str, str]:
        """Wait; return what each test failed with, "" if it passed, by "module.test[case]".

        Raises:
            RuntimeError: the process wrote no report.
        """
        try:
            self.process.wait(timeout)
        finally:
            self.process.kill()
        if not self.report.exists():
            raise RuntimeError(f"the tests did not run:\n{self.log.read_text()[-5000:]}")
        found = {}
        for case in ElementTree.parse(self.report).iter("testcase"):
            module = case.get("classname", "").split(".")[-1]
            found[f"{module}.{case.get('name')}"] = "\n".join(x.text or x.get("message") or x.tag for x in case)
        return found
