"""How far each objective gets: KL(q || sigma) and KL(sigma || q) after as many updates, and after as much time.

    python -m benchmarks.bench_objectives [--updates 100] [--seeds 5]

trains a head on the shipped model and its positive-sentiment potential by every objective: first one seed at each
learning rate, then all seeds at the best one. Rows go to benchmarks/results/objectives.csv run by run; a second call
goes on where the first one stopped. The table and the figure, docs/objectives.md and docs/objectives.png, are made
from that file.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import HEAD, MODEL, append_row, hardware, versions
from vllm_twist.objectives import OBJECTIVES, log_weights
from vllm_twist.potentials import Potential, load_potential
from vllm_twist.training import TwistTrainer
from vllm_twist.training.config import TrainingConfig
from vllm_twist.training.samplers import DrawRequest, TransformersSampler, end_token_ids

CSV = Path("benchmarks/results/objectives.csv")
DOCS = Path("docs")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: The seed of the runs that choose the learning rate, none of those that count.
GRID_SEED = 1000
#: Fractions of the updates after which the head is evaluated.
CHECKPOINTS = (0, 0.1, 0.25, 0.5, 1)
#: What stands in place of an objective in the rows of the untwisted model.
BASE = "p0"

#: The two figures of a row, KL(q || sigma) and KL(sigma || q).
FIGURES = ("kl_q_sigma", "kl_sigma_q")
#: 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

#: KL(q || sigma) and KL(sigma || q) in Tables 2, 3 and 4 of Zhao et al. 2024, by our names of the objectives.
PAPER = {
    "ctl": ("1.11 ± 0.05, 1.07 ± 0.02", "0.55 ± 0.03, 0.47 ± 0.01", "23.93 ± 0.34, 8.87 ± 0.05"),
    "rl": ("1.52 ± 0.09, 1.42 ± 0.03", "0.94 ± 0.04, 0.81 ± 0.02", "31.35 ± 2.33, 14.96 ± 1.69"),
    "sixo": ("1.71 ± 0.06, 1.98 ± 0.04", "0.73 ± 0.03, 0.59 ± 0.02", "20.34 ± 0.36, 7.43 ± 0.04"),
    "fudge": ("3.24 ± 0.26, 2.00 ± 0.13", "1.01 ± 0.07, 0.77 ± 0.07", "60.93 ± 2.82, 19.85 ± 0.51"),
    "dpg": ("1.09 ± 0.05, 1.12 ± 0.03", "0.72 ± 0.04, 0.57 ± 0.01", "13.27 ± 0.44, 4.90 ± 0.03"),
}


# -- One run -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share; part of every row, so that rows of others are never mixed in."""

    model: str = MODEL
    potential: str = f"{HEAD}/potential.json"
    prompt: str = "I bought this"
    head: str = "mlp"
    max_tokens: int = 16
    particles: int = 64
    updates: int = 100


class Task:
    """The base model and the target sigma ~ p0 phi of one prompt, phi in [0, 1].

    ``count`` samples of p0 give log Z, the log of their mean phi, and exact samples of sigma: each is
    accepted with probability phi. ``trials`` of the latter, and as many of q, make up an evaluation;
    other ones for every seed, so that what they add to the spread over seeds is seen there.
    """

    def __init__(
        self, model: Any, tokenizer: Any, potential: Potential, prompt: Sequence[int], setting: Setting, count: int,
        trials: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.potential, self.prompt = model, tokenizer, potential, tuple(prompt)
        self.setting, self.trials = setting, trials
        self.sampler = TransformersSampler(model, end_token_ids(model, tokenizer))
        outputs = self.draw("p0", count, seed=1)
        log_phi = self.log_phi(outputs)
        if (log_phi > 0).any():
            raise ValueError(f"`potential` must lie in [0, 1] for exact samples, got log phi {log_phi.max():g}.")
        self.log_z = (log_phi.logsumexp(0) - math.log(count)).item()
        phi = log_phi.exp()
        self.log_z_error = (phi.std() / phi.mean() / count**0.5).item()
        accepted = torch.rand(count, generator=torch.Generator().manual_seed(2)).to(phi.device) < phi
        self.exact = [outputs[k] for k in accepted.nonzero()[:, 0].tolist()]
        #: KL(p0 || sigma) and KL(sigma || p0).
        self.kl_of_base = (self.log_z - log_phi.mean().item(), log_phi[accepted].mean().item() - self.log_z)

    @classmethod
    def load(cls, setting: Setting, count: int, trials: int) -> Task:
        """Return the task that the setting names."""
        tokenizer = AutoTokenizer.from_pretrained(setting.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).to(device)
        potential, prompt = load_potential(setting.potential), tokenizer(setting.prompt).input_ids
        return cls(model, tokenizer, potential, prompt, setting, count, trials)

    def draw(self, law: str, count: int, seed: int) -> list[list[int]]:
        """Return ``count`` outputs; in portions, for the KV cache of all would be large."""
        sizes = [min(512, count - start) for start in range(0, count, 512)]
        requests = [
            DrawRequest(self.prompt, size, law, seed * 10_000 + i, self.setting.max_tokens)
            for i, size in enumerate(sizes)
        ]
        return [row for draws in self.sampler.sample(requests) for row in draws.token_ids]

    def log_phi(self, outputs: list[list[int]]) -> Tensor:
        texts = [""] * len(outputs)
        if self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return torch.tensor(self.potential(outputs, texts), device=self.model.device)

    def trainer(self, objective: str, lr: float, seed: int) -> TwistTrainer:
        config = TrainingConfig(
            objective=objective, proposal_only=True, head=self.setting.head, max_tokens=self.setting.max_tokens,
            particles=self.setting.particles, updates=self.setting.updates, lr=lr, seed=seed,
        )  # fmt: skip
        return TwistTrainer(self.model, self.potential, config, tokenizer=self.tokenizer, sampler=self.sampler)

    @torch.no_grad()
    def evaluate(self, trainer: TwistTrainer, seed: int = 0) -> tuple[float, float]:
        """Return KL(q || sigma) = log Z - E_q[log p0 phi / q] and KL(sigma || q) = E_sigma[log p0 phi / q] - log Z.

        Eq. 23 of Zhao et al. 2024, of the proposal q that the head induces.
        """
        self.sampler.set_head(trainer.head)
        drawn = self.draw("q", self.trials, seed=3 + seed)
        parts = max(1, len(self.exact) // self.trials)
        means = []
        for outputs in (drawn, self.exact[seed % parts :: parts][: self.trials]):
            scores = trainer.score(self.prompt, outputs)
            log_w = log_weights(scores.log_p, scores.log_q, self.log_phi(outputs), scores.mask)
            means.append(log_w.double().mean().item())
        return self.log_z - means[0], means[1] - self.log_z


def train(task: Task, objective: str, lr: float, seed: int, checkpoints: Iterable[int]) -> list[dict[str, Any]]:
    """Train one head and return what it was worth, and the seconds of training it took, at each checkpoint.

    Seconds are those of the updates alone. On a CPU they are the process's own, which on one thread
    are the wall time on a core that nothing else uses.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    trainer = task.trainer(objective, lr, seed)
    seconds, rows = 0.0, []
    for checkpoint in checkpoints:
        while trainer.update < checkpoint:
            start = clock()
            trainer.step([task.prompt])
            seconds += clock() - start
        divergences = task.evaluate(trainer, seed)
        rows.append({"update": trainer.update, "seconds": seconds, **dict(zip(FIGURES, divergences, strict=True))})
    return rows


# -- All runs ----------------------------------------------------------------------------------
def read(path: Path, setting: Setting) -> list[dict[str, Any]]:
    """Return the rows of a CSV file that are of this setting, numbers as numbers."""
    if not path.exists():
        return []
    shared = {name: str(value) for name, value in asdict(setting).items()}
    numbers = {"lr": float, "seed": int, "update": int, "seconds": float, **dict.fromkeys(FIGURES, float)}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if shared.items() <= row.items()]
    return [{**row, **{name: parse(row[name]) for name, parse in numbers.items()}} for row in rows]


def runs_of(rows: list[dict[str, Any]], objective: str) -> dict[tuple[float, int], list[dict[str, Any]]]:
    """Return an objective's runs, each the rows of its checkpoints in order, by learning rate and seed."""
    runs: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["objective"] == objective:
            runs.setdefault((row["lr"], row["seed"]), []).append(row)
    return {key: sorted(run, key=lambda row: row["update"]) for key, run in runs.items()}


def best_rate(runs: dict[tuple[float, int], list[dict[str, Any]]], rates: Sequence[float]) -> float:
    """Return the learning rate whose final head is the closest to sigma, both divergences added."""

    def total(lr: float) -> float:
        return sum(runs[lr, GRID_SEED][-1][name] for name in FIGURES)

    return min(rates, key=total)


def at(run: list[dict[str, Any]], axis: str, value: float, name: str) -> float:
    """Return a figure of a run at a number of updates or seconds, linear between checkpoints."""
    for before, after in zip(run, run[1:], strict=False):
        if before[axis] <= value <= after[axis]:
            share = (value - before[axis]) / (after[axis] - before[axis])
            return before[name] + share * (after[name] - before[name])
    raise ValueError(f"`value` must lie within the run, {run[0][axis]} to {run[-1][axis]} {axis}, got {value}.")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% interval, by Student's t."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), T_QUANTILES[len(values) - 2] * error


def run_all(args: argparse.Namespace, setting: Setting) -> None:
    """Make the runs that the CSV file lacks."""
    checkpoints = sorted({round(fraction * setting.updates) for fraction in CHECKPOINTS})
    task: Task | None = None
    machine, software = hardware(), versions("transformers")

    def make(objective: str, lr: float, seed: int, at_updates: list[int]) -> None:
        nonlocal task
        done = runs_of(read(args.csv, setting), objective).get((lr, seed), [])
        if len(done) >= len(at_updates):
            return
        if task is None:
            task = Task.load(setting, args.base_samples, args.trials)
            print(f"log Z = {task.log_z:.4f} ± {task.log_z_error:.4f} from {args.base_samples} samples of p0")
        if objective == BASE:
            found = [{"update": 0, "seconds": 0.0, **dict(zip(FIGURES, task.kl_of_base, strict=True))}]
        else:
            try:
                found = train(task, objective, lr, seed, at_updates)
            except ValueError as error:  # log psi has overflown: a rate that is out of the question
                if seed != GRID_SEED:
                    raise
                print(f"{objective} at {lr:g}: {error}")
                found = [{"update": at_updates[-1], "seconds": 0.0, **dict.fromkeys(FIGURES, math.inf)}]
        stamp = {"date": datetime.date.today().isoformat(), "hardware": machine, "versions": software}
        for row in found:
            row = {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
            append_row(args.csv, {**stamp, **asdict(setting), "objective": objective, "lr": lr, "seed": seed, **row})

    make(BASE, 0, 0, [0])
    for objective, lr in tqdm([(o, lr) for o in args.objectives for lr in args.rates], "learning rates"):
        make(objective, lr, GRID_SEED, checkpoints[-1:])
    # Seeds outermost: what else the machine does meanwhile falls on every objective.
    for seed, objective in tqdm([(s, o) for s in range(args.seeds) for o in args.objectives], "seeds"):
        make(objective, best_rate(runs_of(read(args.csv, setting), objective), args.rates), seed, checkpoints)


# -- Table and figure --------------------------------------------------------------------------
def summarise(
    rows: list[dict[str, Any]], objectives: Sequence[str], rates: Sequence[float], seeds: int
) -> tuple[dict[str, list[list[dict[str, Any]]]], dict[str, float], float]:
    """Return each objective's runs and learning rate, and the training time that every run reached."""
    chosen, lr_of = {}, {}
    for objective in objectives:
        runs = runs_of(rows, objective)
        lr_of[objective] = best_rate(runs, rates)
        chosen[objective] = [runs[lr_of[objective], seed] for seed in range(seeds)]
    budget = min(run[-1]["seconds"] for runs in chosen.values() for run in runs)
    return chosen, lr_of, budget


def table(setting: Setting, rows: list[dict[str, Any]], objectives: Sequence[str], rates: Any, seeds: int) -> str:
    """Return docs/objectives.md."""
    chosen, lr_of, budget = summarise(rows, objectives, rates, seeds)

    def cell(runs: list[list[dict[str, Any]]], axis: str, value: float) -> str:
        figures = [interval([at(run, axis, value, name) for run in runs]) for name in FIGURES]
        return ", ".join(f"{mean:.3f} ± {half:.3f}" for mean, half in figures)

    lines = []
    for objective, runs in chosen.items():
        updates = statistics.mean(at(run, "seconds", budget, "update") for run in runs)
        cells = [
            f"{OBJECTIVES[objective].title}{'' if OBJECTIVES[objective].smc_twist else ' *'}",
            f"{lr_of[objective]:g}{' †' if lr_of[objective] in (min(rates), max(rates)) else ''}",
            cell(runs, "update", setting.updates),
            f"{cell(runs, 'seconds', budget)} ({updates:.0f})",
            *PAPER.get(objective, ("", "", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(chosen.values()))
    untrained = ", ".join(f"{statistics.mean(run[0][name] for run in first):.3f}" for name in FIGURES)
    ((base,),) = runs_of(rows, BASE).values()
    ctl = ""
    if "ctl" in chosen:
        start, end = (
            statistics.mean(at(run, "update", update, "kl_sigma_q") for run in chosen["ctl"])
            for update in (0, setting.updates)
        )
        ctl = f"CTL's KL(sigma || q) is {end / start:.2f} of the untrained head's. "
    return PAGE.format(
        rows="\n".join(lines),
        untrained=untrained,
        base=", ".join(f"{base[name]:.3f}" for name in FIGURES),
        ctl=ctl,
        budget=budget,
        seeds=seeds,
        rates=", ".join(f"{lr:g}" for lr in rates),
        machine=rows[-1]["hardware"],
        software=rows[-1]["versions"],
        **asdict(setting),
    )


PAGE = """# Objectives compared

Every way of learning a twist that `vllm-twist train` offers, on one task: the shipped `{model}`, the prompt
"{prompt}", outputs of at most {max_tokens} tokens, and phi = p(positive) from `{potential}`.
A cell holds KL(q ‖ sigma), KL(sigma ‖ q) in nats, q being the twist-induced proposal, each with its 95% interval over
{seeds} seeds (Student's t). The model itself (psi = 1) has {base}, a fresh head (psi not quite 1)
{untrained}. {ctl}

| objective | learning rate | after {updates} updates | after {budget:.0f} s of training (updates) | paper: toxicity | \
paper: sentiment | paper: infilling |
|---|---|---|---|---|---|---|
{rows}

\\* as a proposal only: its psi is no twist that may weigh particles. † an end of the rates tried.

![Divergence from the target against updates and against time](objectives.png)

- The paper's figures (Zhao et al. 2024, Tables 2, 3 and 4) are of other models, other targets and thousands of updates:
  TinyStories-33M for toxicity and infilling, GPT-2 medium for sentiment. They are here for the order of the objectives,
  not to be compared in size.
- All train a fresh `{head}` head with Adam on {particles} sequences per set and update, drawn by the transformers
  sampler; CTL, SIXO and DPG take approximate positives, weighted draws from the twisted proposal. The learning rate is
  the best of {rates} by the sum of both divergences at the end of one run with a seed of its own.
- KL(q ‖ sigma) = log Z − E_q[log p0 phi / q] over samples of q, KL(sigma ‖ q) = E_sigma[log p0 phi / q] − log Z over
  exact samples of sigma (p0, accepted with probability phi); log Z is the log of the mean of phi over samples of p0,
  one for all.
- Seconds are those of the updates alone, evaluation excluded, on one thread. The time compared is what the fastest run
  needs for its {updates} updates; between checkpoints, values are interpolated.

{machine} · {software}

Made by `python -m benchmarks.bench_objectives` from the rows in `benchmarks/results/objectives.csv`.
"""


def draw_figure(rows: list[dict[str, Any]], objectives: Sequence[str], rates: Any, seeds: int, path: Path) -> None:
    """Plot both divergences against updates and against seconds, means with 95% intervals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    chosen, _, budget = summarise(rows, objectives, rates, seeds)
    ((base,),) = runs_of(rows, BASE).values()
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    for name, label, row in zip(FIGURES, ("KL(q ‖ σ), nats", "KL(σ ‖ q), nats"), axes, strict=True):
        for axis, panel in zip(("update", "seconds"), row, strict=True):
            for objective, runs in chosen.items():
                last = min(run[-1][axis] for run in runs)
                grid = [point[axis] for point in runs[0] if point[axis] < last] + [last]
                means, halves = zip(*(interval([at(run, axis, x, name) for run in runs]) for x in grid), strict=True)
                (line,) = panel.plot(grid, means, marker=".", label=OBJECTIVES[objective].title.split(",")[0])
                low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
                panel.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            panel.axhline(base[name], color="grey", linestyle="--", linewidth=1, label="psi = 1")
            panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(label)
        row[1].axvline(budget, color="grey", linestyle=":", linewidth=1)
    axes[1, 0].set_xlabel("updates")
    axes[1, 1].set_xlabel("seconds of training (dotted: the time compared in the table)")
    axes[0, 0].legend(ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Setting()
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--rates", type=float, nargs="+", default=list(LEARNING_RATES), help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base-samples", type=int, default=16384, help="samples of p0 for log Z and exact samples")
    parser.add_argument("--trials", type=int, default=512, help="samples of q and of sigma in an evaluation")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the table and the figure")
    args = parser.parse_args()
    if not 2 <= args.seeds <= len(T_QUANTILES) + 1:
        parser.error(f"--seeds must be from 2 to {len(T_QUANTILES) + 1}")

    torch.set_num_threads(1)
    setting = Setting(**{name: getattr(args, name) for name in asdict(default)})
    run_all(args, setting)
    rows = read(args.csv, setting)
    page = table(setting, rows, args.objectives, args.rates, args.seeds)
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "objectives.md").write_text(page)
    draw_figure(rows, args.objectives, args.rates, args.seeds, args.docs / "objectives.png")
    print(page)


if __name__ == "__main__":
    main()
