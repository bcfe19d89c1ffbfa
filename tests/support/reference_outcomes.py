"""What Model Runner V1 makes of every scenario: V2's processes compare theirs with it. Run by ``test_engine_v2``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.scenarios import SCENARIOS, outcome


def test_write_the_outcomes(engine, request: pytest.FixtureRequest) -> None:
    found = {scenario.name: outcome(engine, request, scenario) for scenario in SCENARIOS}
    Path(os.environ["TWIST_TEST_REFERENCE"]).write_text(json.dumps(found))
