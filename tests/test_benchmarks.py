"""Benchmarks measure what they say: estimates against enumeration, sides that do the same work, runs that resume."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.laws import enumerate_law
from support.models import Tiny

from benchmarks import bench_kernels, bench_objectives, bench_sampling
from benchmarks.bench_objectives import Setting, Task, train
from vllm_twist import TwistHead
from vllm_twist.potentials import TokenLogistic

PROMPT = [0, 2, 3]


def test_divergences_against_enumeration(small: Tiny):
    """KL(q || sigma), KL(sigma || q) and log Z, of a head and of the model itself, within 4 standard errors.

    The odds of a false alarm are 6e-5 for each of five figures; the seeds are fixed.
    """
    horizon, count, trials = 3, 40_000, 8_000
    potential = TokenLogistic(-1.0, [2.5, -0.8, 1.5, -2.0])
    setting = Setting(head="linear", max_tokens=horizon)
    task = Task(small.model, None, potential, PROMPT, setting, count, trials)
    trainer = task.trainer("ctl", 1e-3, 0)
    trainer.head.load_state_dict(small.head.state_dict())

    law = enumerate_law(small, PROMPT, horizon)
    sequences = list(law.log_p)
    log_p = torch.tensor(list(law.log_p.values()), dtype=torch.float64)
    log_phi = torch.tensor(potential([list(s) for s in sequences], [""] * len(sequences)), dtype=torch.float64)
    log_q = torch.tensor([proposal(small, s) for s in sequences], dtype=torch.float64)
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
    log_z = (log_p + log_phi).logsumexp(0)
    sigma = (log_p + log_phi - log_z).exp()

    def moments(weights: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
        mean = (weights * values).sum()
        return mean.item(), (weights * (values - mean).square()).sum().sqrt().item()

    error = 4 * task.log_z_error
    assert abs(task.log_z - log_z.item()) < error
    log_w = log_p + log_phi - log_q
    for found, weights in zip(task.evaluate(trainer), (log_q.exp(), sigma), strict=True):
        mean, deviation = moments(weights, log_w)
        assert abs(found - abs(mean - log_z.item())) < error + 4 * deviation / trials**0.5
    for found, weights in zip(task.kl_of_base, (log_p.exp(), sigma), strict=True):
        mean, deviation = moments(weights, log_phi)
        assert abs(found - abs(mean - log_z.item())) < error + 4 * deviation / (0.3 * count) ** 0.5
    # The figures differ by more than the tolerances: no two could be mistaken for each other.
    figures = [*task.evaluate(trainer), *task.kl_of_base]
    assert min(abs(a - b) for i, a in enumerate(figures) for b in figures[:i]) > error


def proposal(tiny: Tiny, sequence: tuple[int, ...]) -> float:
    """Return log q of a sequence under the twist-induced proposal, by its definition."""
    total = 0.0
    for t, token in enumerate(sequence):
        logits, log_psi = tiny.logits_and_log_psi([PROMPT + list(sequence[:t])])
        total += (logits + log_psi).double().log_softmax(-1)[0, token].item()
    return total


def test_ctl_learns_the_sentiment_task(repo_root: Path):
    """KL(sigma || q) falls to half of the untrained head's and below the model's own, in 40 small updates."""
    setting = Setting(str(repo_root / bench_objectives.MODEL), f"{repo_root / bench_objectives.HEAD}/potential.json")
    setting = replace(setting, max_tokens=12, particles=32)
    task = Task.load(setting, 2048, 512)
    untrained, trained = train(task, "ctl", 3e-3, 0, [0, 40])
    assert trained["kl_sigma_q"] < min(0.5 * untrained["kl_sigma_q"], task.kl_of_base[1])
    assert trained["seconds"] > untrained["seconds"] == 0


def test_runs_resume_and_make_the_page(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A second call draws nothing, and rows of another setting are left alone."""
    monkeypatch.chdir(repo_root)
    args = Namespace(csv=tmp_path / "rows.csv", objectives=["ctl", "fudge"], rates=[1e-3, 3e-3], seeds=2,
                     base_samples=256, trials=32)  # fmt: skip
    setting = Setting(max_tokens=4, particles=8, updates=4)
    bench_objectives.run_all(args, setting)
    text = args.csv.read_text()
    # The model, two rates each, two seeds each at the checkpoints 0, 1, 2 and 4.
    assert len(text.splitlines()) == 1 + 1 + 4 + 2 * 2 * 4
    rows = bench_objectives.read(args.csv, setting)
    assert not bench_objectives.read(args.csv, replace(setting, updates=5))

    monkeypatch.setattr(bench_objectives.Task, "load", lambda *_: pytest.fail("nothing is left to run"))
    bench_objectives.run_all(args, setting)
    assert args.csv.read_text() == text
    page = bench_objectives.table(setting, rows, args.objectives, args.rates, args.seeds)
    assert "| CTL, contrastive twist learning | 0.00" in page and "| FUDGE, future discriminators | 0.00" in page
    bench_objectives.draw_figure(rows, args.objectives, args.rates, args.seeds, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_interpolation_and_interval():
    run = [{"update": u, "seconds": s, "kl": k} for u, s, k in ((0, 0.0, 1.0), (10, 2.0, 0.6), (20, 6.0, 0.4))]
    assert bench_objectives.at(run, "update", 5, "kl") == pytest.approx(0.8)
    assert bench_objectives.at(run, "seconds", 3.0, "update") == pytest.approx(12.5)
    assert bench_objectives.at(run, "seconds", 6.0, "kl") == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"`value` must lie within the run, 0 to 20 update, got 21"):
        bench_objectives.at(run, "update", 21, "kl")
    # Five values: 2.776 standard errors, sqrt(2.5 / 5) each.
    assert bench_objectives.interval([1, 2, 3, 4, 5]) == (3, pytest.approx(2.776 * math.sqrt(0.5)))


@pytest.fixture(scope="module")
def sides(repo_root: Path) -> tuple[Any, list[Any]]:
    from transformers import AutoModelForCausalLM

    folder, head_folder = repo_root / bench_sampling.MODEL, repo_root / bench_sampling.HEAD
    prompt = [1, 500, 501]
    args = Namespace(model=str(folder), twist_head=str(head_folder), dtype="float32", compile=False, counts=[4],
                     max_tokens=12, kv_cache_memory_bytes=2**26)  # fmt: skip
    engine = bench_sampling.Engine(args, prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    head = TwistHead.from_pretrained(head_folder)
    reforward = [bench_sampling.Reforward(model, head, prompt, whole) for whole in (False, True)]
    return engine, [bench_sampling.Generate(model, head, prompt), *reforward]


def test_all_sides_sample_from_the_same(sides):
    """Sequence log-probabilities of 12 tokens agree to rounding, and every side draws what is asked for."""
    engine, others = sides
    differences = bench_sampling.check(engine, others, 4, 12)
    assert set(differences) == {"generate", "re-forward", "full length"} and max(differences.values()) < 1e-3
    rates = bench_sampling.measure([engine, *others], 2, 3, repeats=2)
    assert len(rates) == 8 and all(len(values) == 2 and min(values) > 0 for values in rates.values())


def test_another_distribution_is_noticed(sides):
    """A side with a slightly different twist, or without any, is refused."""
    engine, others = sides
    for side in others:
        head = side.head
        for scale in (1.05, 0.0):
            try:
                side.head = lambda *inputs, scale=scale, head=head: scale * head(*inputs)
                with pytest.raises(RuntimeError, match=f"{side.name} and the engine differ by .* nats on 4 sequences"):
                    bench_sampling.check(engine, [side], 4, 12)
            finally:
                side.head = head


def gpu_run(repo_root: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "DRY": "1", "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu/run.sh", *arguments]
    return subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)


class Parsed(Exception):
    """The arguments are fine."""


@pytest.mark.parametrize("arguments", [(), ("--rehearse",)], ids=["run", "rehearsal"])
def test_every_command_of_the_gpu_run_parses(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
):
    """A typing error must not waste a run on a GPU: benchmarks take their arguments, tests that are named exist."""
    done = gpu_run(repo_root, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    stages = list(csv.DictReader((tmp_path / "stages.csv").open()))
    assert len(stages) == 5 and {row["exit_code"] for row in stages} == {"0"}
    assert sum(int(row["limit_s"]) for row in stages) <= 9 * 60 * (20 if arguments else 1)

    def parse(parser: argparse.ArgumentParser, *_: object) -> None:
        real(parser)
        raise Parsed

    real = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    seen = set()
    for line in done.stdout.splitlines():
        if not line.startswith("$ "):
            continue
        words = shlex.split(line[2:])
        after = words[words.index(sys.executable) + 1 :]
        if after[0] == "-m":
            monkeypatch.setattr(sys, "argv", after[1:])
            with pytest.raises(Parsed):
                importlib.import_module(after[1]).main()
            seen.add(after[1])
            if "--engine-args" in after:
                assert json.loads(after[after.index("--engine-args") + 1])
            continue
        compile(after[1], "pytest", "exec")
        for word in after:
            if word.startswith("tests/"):
                file, *name = re.split(r"::|\[", word)
                assert not name or f"def {name[0]}(" in (repo_root / file).read_text(), word
                seen.add(file)
        if "-k" in after:
            tests = re.findall(r"def (test_\w+)", (repo_root / "tests/test_kernels.py").read_text())
            for part in set(re.findall(r"\w+", after[after.index("-k") + 1])) - {"not", "or", "and"}:
                assert any(part in test for test in tests), part
    assert {f"benchmarks.bench_{name}" for name in ("kernels", "generate", "step", "memory")} < seen
    assert {"benchmarks.gpu.smoke", *(f"tests/test_{name}.py" for name in ("kernels", "engine", "engine_exact"))} < seen


def test_gpu_run_knows_its_stages(repo_root: Path, tmp_path: Path):
    done = gpu_run(repo_root, tmp_path, "kernel")
    assert done.returncode == 2 and "unknown stage kernel: one of" in done.stdout


def test_sweep_times_each_setting_and_puts_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vllm_twist.kernels import low_rank, twist_softmax

    settings = [(twist_softmax, ("SOFTMAX_TILE", "RACE_TILE", "PROGRAMS_PER_PROCESSOR")), (low_rank, ("ROW_BLOCK",))]
    before = [[getattr(module, name) for name in names] for module, names in settings]
    found: list[tuple[int, int]] = []
    real = bench_kernels.ops.twist_softmax
    spy = lambda *a: (found.append((twist_softmax.SOFTMAX_TILE, low_rank.ROW_BLOCK)), real(*a))[1]  # noqa: E731
    monkeypatch.setattr(bench_kernels.ops, "twist_softmax", spy)
    arguments = ["--parts", "sweep", "--rows", "2", "--vocabularies", "9", "--repeats", "2", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["bench_kernels", *arguments, "--csv", str(tmp_path / "rows.csv")])
    bench_kernels.main()
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == len({row["op"] for row in rows}) == 4 * 4 + 2 * 3
    assert {tile for tile, _ in found} >= {1024, 2048, 4096, 8192} and {block for _, block in found} >= {32, 64, 128}
    assert before == [[getattr(module, name) for name in names] for module, names in settings]
