"""Final reweighting by an explicit phi, in a thread beside the engine's loop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_twist.engine.groups import Group
from vllm_twist.potentials import Potential, load_potential

#: log phi of every particle of a group, in the order of its lanes.
Evaluate = Callable[[Group], list[float]]


def evaluation(potential: Potential, tokenizer: Any) -> Evaluate:
    """Return what computes log phi of a group's particles; texts are empty in an engine without a tokenizer.

    Where the request has stop strings they are the texts that a client would get, cut at these.
    """

    def text(token_ids: list[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=True)

    def evaluate(group: Group) -> list[float]:
        lanes = list(group.lanes.values())
        outputs = [list(lane.request.output_token_ids) for lane in lanes]
        texts = [
            text(output) if getattr(lane, "detector", None) is None else lane.detector.output_text
            for lane, output in zip(lanes, outputs, strict=True)
        ]
        prompt = list(group.leader.prompt_token_ids)
        return potential.given(prompt, text(prompt))(outputs, texts)

    return evaluate


def read_potential(spec: str, tokenizer: Any) -> Evaluate:
    """Load the potential that ``twist_potential`` names.

    Raises:
        ValueError: as ``load_potential`` does.
    """
    return evaluation(load_potential(spec, tokenizer=tokenizer), tokenizer)


@dataclass(eq=False)
class _Job:
    group: Group
    started: float | None = None
    abandoned: bool = False


class Scorer:
    """Evaluate phi for finished groups, one at a time, without making the engine wait.

    One at a time because potentials need not be thread-safe. A call that exceeds its time cannot be
    stopped: its group gets a ``TimeoutError``, and a new thread takes over from the one it blocks.
    """

    def __init__(self, evaluate: Evaluate, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.evaluate = evaluate
        self.timeout = timeout
        self.clock = clock
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Job, list[float] | Exception]] = queue.SimpleQueue()
        self._pending: dict[str, _Job] = {}
        self._generation = 0
        self._start_thread()

    def _start_thread(self) -> None:
        self._generation += 1
        # A daemon: a call that hangs must not keep the process alive.
        threading.Thread(target=self._work, args=(self._generation,), name="twist-potential", daemon=True).start()

    def _work(self, generation: int) -> None:
        while True:
            job = self._jobs.get()
            if generation != self._generation:
                self._jobs.put(job)
                return  # another thread has taken over
            if job.abandoned:
                continue
            job.started = self.clock()
            outcome: list[float] | Exception
            try:
                outcome = self.evaluate(job.group)
            except Exception as error:
                outcome = error
            self._done.put((job, outcome))

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def pending(self) -> list[str]:
        """Ids of the groups that are not done."""
        return list(self._pending)

    def submit(self, group: Group) -> None:
        """Queue a group whose particles have all ended."""
        job = self._pending[group.id] = _Job(group)
        self._jobs.put(job)

    def cancel(self, group_id: str) -> Group | None:
        """Forget a group; return it, or None if it is not here."""
        job = self._pending.pop(group_id, None)
        if job is None:
            return None
        job.abandoned = True
        return job.group

    def collect(self, wait: float = 0.0) -> list[tuple[Group, list[float] | Exception]]:
        """Return the groups that are done, waiting up to ``wait`` seconds for the first one."""
        found: list[tuple[Group, list[float] | Exception]] = []
        while self._pending:
            try:
                job, outcome = self._done.get(timeout=0 if found else wait)
            except queue.Empty:
                break
            if self._pending.get(job.group.id) is job:
                del self._pending[job.group.id]
                found.append((job.group, outcome))
        now = self.clock()
        for job in list(self._pending.values()):
            if job.started is not None and now - job.started > self.timeout:
                self.cancel(job.group.id)
                self._start_thread()
                found.append((job.group, TimeoutError()))
        return found
