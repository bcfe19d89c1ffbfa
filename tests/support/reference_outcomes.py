"""What Model Runner V1 makes of every path: V2's processes compare theirs with it. Run by ``test_runner_v2``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.scenarios import PATHS, outcome


def test_write_the_outcomes(engine, request: pytest.FixtureRequest) -> None:
    found = {path.name: outcome(engine, request, path) for path in PATHS}
    Path(os.environ["TWIST_TEST_REFERENCE"]).write_text(json.dumps(found))
