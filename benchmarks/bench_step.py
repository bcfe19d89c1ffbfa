"""Host time of one engine step, twisted against plain, by phase, particles and groups, in one engine and one run.

    python -m benchmarks.bench_step [--csv benchmarks/results/step.csv]

Both sides keep the same number of sequences in the batch: G twisted requests of K particles, and G plain ones
with n = K; repeats alternate between the two. Counted are the steps in which every sequence draws a token. The
phases are the four calls of vLLM's engine loop: schedule, execute (the model), sample, and update
(bookkeeping of the results). On a GPU with asynchronous scheduling none of them waits for the device, so that
the times are the host's own. On a CPU execute and sample contain the computation.

``--profile FILE`` writes what torch's profiler saw of 20 steps of the largest case: launches, copies, and whatever
makes the host wait for the device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_generate import both_sides
from benchmarks.report import HEAD, MODEL, append_row, hardware, quartiles, versions
from benchmarks.shapes import PROMPT, SHAPES, engine_options, make_head, make_model

PHASES = ("schedule", "execute", "sample", "update")


class Stopwatch:
    """Time the four phases of every step of an in-process engine.

    Attributes:
        steps: one dict of seconds by phase for each step that was counted.
    """

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        self.steps: list[dict[str, float]] = []
        self._sequences = 0
        # Phases by the step's scheduler output: under asynchronous scheduling two steps are under way at once.
        self._open: dict[int, dict[str, float]] = {}
        self._current: dict[str, float] = {}
        for owner, name, phase in (
            (core.scheduler, "schedule", "schedule"),
            (worker, "execute_model", "execute"),
            (worker, "sample_tokens", "sample"),
            (core.scheduler, "update_from_output", "update"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - start
            if phase == "schedule":
                self._current = self._open[id(result)] = {}
            step = self._open.pop(id(args[0]), None) if phase == "update" else self._current
            if step is not None:
                step[phase] = seconds
                if phase == "update" and len(args[0].num_scheduled_tokens) == self._sequences:
                    self.steps.append(step)
            return result

        return timed

    def time(self, llm: Any, sequences: int, run: Callable[[], Any]) -> list[dict[str, float]]:
        """Return the steps of ``run`` in which that many sequences took part."""
        self.steps, self._sequences = [], sequences
        run()
        return self.steps


def measure(
    llm: Any, watch: Stopwatch, prompt: Any, groups: int, particles: int, max_tokens: int, repeats: int
) -> dict[str, Any]:
    """Return the steps of each side, "plain" and "twisted", over all repeats but one to warm up."""
    sides = both_sides(particles, max_tokens)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, params in sides.items():
            prompts = [prompt] * groups
            run = lambda p=params, q=prompts: llm.generate(q, p, use_tqdm=False)  # noqa: E731
            steps = watch.time(llm, groups * particles, run)
            if repeat:
                found[side] += steps
    return found


#: Calls of CUDA's runtime that make the host wait, and those of PyTorch that read a value.
WAITS = ("Synchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")


def profile(llm: Any, prompt: Any, particles: int, groups: int, steps: int = 20) -> str:
    """Return what torch's profiler saw of that many decoding steps of either side: calls and microseconds a step."""
    from torch.profiler import profile as record

    core, lines = llm.llm_engine, [f"{hardware()} · {versions()} · {groups} x K={particles} · {steps} steps"]
    for side, params in both_sides(particles, steps + 12, twist_ess_threshold=1.0).items():
        for i in range(groups):
            core.add_request(f"{side}{i}", prompt, params)
        for _ in range(6):  # prompts, lanes, and what is compiled at its first use
            core.step()
        with record() as seen:
            for _ in range(steps):
                core.step()
        while core.has_unfinished_requests():
            core.step()
        events = sorted(seen.key_averages(), key=lambda event: -event.count)
        launches = sum(event.count for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key)
        copies = sum(event.count for event in events if "cudaMemcpy" in event.key)
        waits = {event.key: event.count / steps for event in events if any(wait in event.key for wait in WAITS)}
        lines.append(f"\n{side}: {launches / steps:.1f} launches, {copies / steps:.1f} copies a step; waits: {waits}")
        lines.append("calls, host us, device us, all a step; name")
        for event in events[:60]:
            device = getattr(event, "self_device_time_total", 0.0)
            times = f"{event.self_cpu_time_total / steps:10.1f} {device / steps:10.1f}"
            lines.append(f"{event.count / steps:8.2f} {times}  {event.key[:100]}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--twist-head", default=HEAD)
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=256, help="leave out what has more sequences than this")
    parser.add_argument("--shape", choices=list(SHAPES), help="a model and a low-rank head of random weights")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further engine arguments, as JSON")
    parser.add_argument("--profile", type=Path, help="write a profile of 20 steps, twisted and plain")
    parser.add_argument("--csv", type=Path, help="append one row per side, groups and particles")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # In this process, so that its parts can be timed.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure every case in one engine."""
    import torch
    from vllm import LLM

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"model": args.model, "twist_head": args.twist_head, "twist_particles": 1}
    prompt: Any = "I bought this"
    if args.shape:
        options |= engine_options(make_model(args.shape, folder))
        options["twist_head"], prompt = str(make_head("low_rank", args.shape, folder)), PROMPT
    options |= {"max_num_seqs": args.most, "enforce_eager": not gpu}
    llm = LLM(**{**options, "max_model_len": 512, "kv_cache_memory_bytes": 2**30, **args.engine_args})
    config = llm.llm_engine.vllm_config
    runner = "V2" if config.use_v2_model_runner else "V1"
    scheduling = "asynchronous" if config.scheduler_config.async_scheduling else "synchronous"
    print(f"{hardware()} · {versions()} · Model Runner {runner}, {scheduling} · T={args.max_tokens}")
    print("median milliseconds a step" + ("" if gpu else "; on this CPU execute and sample contain the computation"))
    print(
        f"{'groups':>6} {'K':>4} {'side':>8} "
        + " ".join(f"{phase:>9}" for phase in PHASES)
        + f" {'all':>9} {'ratio':>6}"
    )
    watch = Stopwatch(llm)
    for groups in args.groups:
        for particles in args.particles:
            if groups * particles > args.most:
                continue
            sides = measure(llm, watch, prompt, groups, particles, args.max_tokens, args.repeats)
            plain = None
            for side, steps in sides.items():
                if not steps:
                    raise RuntimeError(f"no step had all {groups * particles} sequences: raise `--max-tokens`.")
                times = {phase: quartiles([1e3 * step[phase] for step in steps]) for phase in PHASES}
                low, median, high = quartiles([1e3 * sum(step.values()) for step in steps])
                plain = plain or median
                cells = " ".join(f"{times[phase][1]:9.3f}" for phase in PHASES)
                print(f"{groups:>6} {particles:>4} {side:>8} {cells} {median:9.3f} {median / plain:6.2f}", flush=True)
                if args.csv:
                    append_row(
                        args.csv,
                        {
                            "date": datetime.date.today().isoformat(),
                            "hardware": hardware(),
                            "versions": versions(),
                            "command": " ".join(["python -m benchmarks.bench_step", *sys.argv[1:]]),
                            "runner": runner,
                            "scheduling": scheduling,
                            "groups": groups,
                            "particles": particles,
                            "side": side,
                            "steps": len(steps),
                            **{f"{phase}_ms": round(times[phase][1], 4) for phase in PHASES},
                            "all_ms_q25": round(low, 4),
                            "all_ms_median": round(median, 4),
                            "all_ms_q75": round(high, 4),
                            "ratio": round(median / plain, 3),
                        },
                    )
    if args.profile:
        largest = max((k, g) for k in args.particles for g in args.groups if g * k <= args.most)
        args.profile.write_text(profile(llm, prompt, *largest))
    if not gpu:
        print("No GPU here. The GPU rows are not yet measured.")


if __name__ == "__main__":
    main()
