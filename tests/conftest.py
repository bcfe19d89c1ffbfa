"""Engines for the tests: in process, so that a test can look at the scheduler, and kept for the session."""

from __future__ import annotations

import math
import os

# Before vLLM is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Threads that wait for each other on a shared machine cost far more than they give at this size.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# It would override what each engine here asks for: gigabytes, for there are many of them.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import processes
from support.engines import ENGINE, scheduler_of, worker_of
from support.models import Tiny, bigram_model, random_model
from support.processes import (  # noqa: F401
    Line,
    pytest_runtest_logfinish,
    pytest_runtest_logreport,
    pytest_runtest_logstart,
)
from support.runners import RUNNER, marks_v2

from vllm_twist.engine.groups import Group, log_sum_exp

#: Files that run in processes of their own when (nearly) everything runs, the longest first: they share no engines.
#: Those of the benchmarks also close an engine in their process, which those that were there before do not outlive.
BESIDE = (
    "test_training.py", "test_soak.py", "test_kernels.py", "test_server.py", "test_objectives.py", "test_benchmarks.py",
)  # fmt: skip
EVERYTHING = 20  # files


class Beside(pytest.Item):
    """A test that runs in its file's own process."""

    def runtest(self) -> None:
        outcomes = self.session.line.outcomes(self.path.name)  # type: ignore[attr-defined]
        name = processes.test_name(self.nodeid)
        failure = outcomes.get(name, f"It did not run. {self.session.line.said(self.path.name)}")  # type: ignore[attr-defined]
        if failure.startswith("skipped: "):
            pytest.skip(failure.removeprefix("skipped: "))
        if failure:
            pytest.fail(failure, pytrace=False)


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> list[Any] | None:
    """Take of ``test_engine_v2`` what is for this runner: on V2 the tests marked so, on V1 what stands for them."""
    if collector.path.name == "test_engine_v2.py" and name.startswith("test_"):
        if bool(marks_v2(obj)) == (RUNNER == "v1"):
            return []
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the files whose tests run elsewhere come last: until then their processes work beside the others."""
    if len({item.path for item in items}) >= EVERYTHING and not config.getoption("usepdb"):
        for i, item in enumerate(items):
            if item.path.name in BESIDE:
                items[i] = Beside.from_parent(item.parent, name=item.name)
    items.sort(key=lambda item: isinstance(item, Beside) or hasattr(item.module, "start_elsewhere"))  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def line(request: pytest.FixtureRequest, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """Start the processes of the tests that run elsewhere."""
    request.session.line = line = Line(repo_root)  # type: ignore[attr-defined]
    items = request.session.items
    for module in dict.fromkeys(item.module for item in items if isinstance(item, pytest.Function)):
        if hasattr(module, "start_elsewhere"):
            module.start_elsewhere(line, request)
    for name in BESIDE:
        if chosen := [item.nodeid for item in items if isinstance(item, Beside) and item.path.name == name]:
            line.add_tests(name, chosen, {}, tmp_path_factory.mktemp(name.removesuffix(".py")))
    line.start()
    yield line
    line.stop()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random attention model over four tokens, of which 1 is EOS: its targets can be enumerated."""
    return random_model(tmp_path_factory.mktemp("small"), vocab=4, eos=1)


@pytest.fixture(scope="session")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same with a conditional head."""
    return random_model(tmp_path_factory.mktemp("conditional"), vocab=4, eos=1, conditional=True)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random attention model over 40 tokens whose KV cache matters: for forks and long outputs."""
    return random_model(tmp_path_factory.mktemp("wide"), vocab=40, eos=1)


@pytest.fixture(scope="session")
def bigram(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model whose next token depends on the last one alone, with the transition matrix it was built from."""
    return bigram_model(tmp_path_factory.mktemp("bigram"), vocab=5, eos=1)


@pytest.fixture(scope="session")
def engine() -> Any:
    """Return ``make(tiny, **options)``: an in-process ``LLM`` with the model's twist head, cached."""
    made: dict[Any, Any] = {}

    def make(tiny: Tiny, *, twist: bool = True, **options: Any) -> Any:
        from vllm import LLM

        key = (tiny.path, twist, *sorted(options.items()))
        if key not in made:
            if twist:
                options = {"twist_head": str(tiny.head_path), **options}
            made[key] = LLM(str(tiny.path), **{**ENGINE, **options})
        return made[key]

    return make


@pytest.fixture
def clean(engine: Any) -> Iterator[Any]:
    """Return ``make`` as ``engine`` does; afterwards every block, lane and slot must be free again."""
    used: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        llm = engine(*args, **kwargs)
        used.append(llm)
        return llm

    yield make
    for llm in used:
        scheduler = scheduler_of(llm)
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.kv_cache_config.num_blocks - 1
        assert not scheduler.requests and not scheduler.running and scheduler.get_request_counts() == (0, 0)
        if hasattr(scheduler, "groups"):
            assert not scheduler.groups and not scheduler.group_of and not scheduler.staged
            # The worker hears of the last lanes' end with the next step.
            live = set(worker_of(llm).twist.table.slots) - scheduler.finished_req_ids
            assert not live


@pytest.fixture
def totals(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Compare what Model Runner V2 keeps of a group on the device with its particles, when it ends."""
    seen = []
    make = Group.result

    def result(group: Group, chosen: int) -> dict[str, Any]:
        assert (group.log_z is None) == (RUNNER == "v1")
        if group.log_z is not None:
            weights = [lane.log_w for lane in group.lanes.values()]
            assert group.log_z == pytest.approx(log_sum_exp(weights) - math.log(len(weights)), abs=1e-9)
        seen.append(group)
        return make(group, chosen)

    monkeypatch.setattr(Group, "result", result)
    return seen


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent
