"""Evaluate a twist head through the engine: bounds of log Z, and how far its proposal is from the target.

For every prompt, proposal (twist-induced or base), number of particles and with or without resampling,
the lower bound is the mean of log Z-hat over independent groups, and the upper one the same over groups
with one particle pinned to an exact sample of sigma (Zhao et al. 2024, Prop. 5.1 and Figure 3).
Without resampling these are the IWAE bounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vllm_twist.bounds import (
    Estimate,
    Sandwich,
    Sequences,
    estimate,
    kl_q_sigma,
    kl_sigma_q,
    rejection,
    tightest,
    unbiased_log_z,
)
from vllm_twist.config import PROPOSALS
from vllm_twist.potentials import Potential
from vllm_twist.results import results


@dataclass(frozen=True)
class EvaluationConfig:
    """What to run for each prompt.

    Attributes:
        max_tokens: length at which outputs are cut.
        particles: numbers of particles K.
        repeats: independent groups per bound.
        samples: samples of q and of sigma for the divergences.
        max_draws: samples of p0 that may be spent on finding exact samples of sigma by rejection.
        log_phi_max: an upper bound of log phi, for potentials that do not know their own.
        ess_threshold: rule of the rows that resample.
        seed: of everything random.
    """

    max_tokens: int = 16
    particles: tuple[int, ...] = (1, 4, 16, 64)
    repeats: int = 20
    samples: int = 200
    max_draws: int = 20_000
    log_phi_max: float | None = None
    ess_threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("repeats", 2), ("samples", 2), ("max_draws", 0)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}: raise it.")
        if not self.particles or min(self.particles) < 1:
            raise ValueError(f"`particles` must hold numbers of at least 1, got {list(self.particles)}: pass 1,4,16.")
        if not self.ess_threshold > 0:
            raise ValueError(
                f"`ess_threshold` must be above 0, got {self.ess_threshold}: half of the rows do without resampling "
                "anyway."
            )


@dataclass(frozen=True)
class Row:
    """Bounds of log Z from one kind of group; null with the ``reason`` where one cannot be had."""

    proposal: str
    particles: int
    resample: bool
    lower: Estimate | None
    upper: Estimate | None
    reason: str | None = None

    @property
    def sandwich(self) -> Sandwich | None:
        return None if self.lower is None or self.upper is None else Sandwich(self.lower, self.upper)


@dataclass(frozen=True)
class PromptEvaluation:
    """What was found for one prompt.

    Attributes:
        prompt: its text.
        log_z: log Z: the mid-point of the tightest pair of bounds, or from the mean of Z-hat.
        log_z_from: which of the two.
        kl_q_sigma, kl_sigma_q: divergences of the twist-induced proposal q (one particle) and sigma.
        rows: the bounds.
        exact_samples: exact samples of sigma that were found.
        draws: samples of p0 that this took.
        reason: why something is null.
    """

    prompt: str
    log_z: Estimate | None
    log_z_from: str | None
    kl_q_sigma: Estimate | None
    kl_sigma_q: Estimate | None
    rows: list[Row]
    exact_samples: int
    draws: int
    reason: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Results for all prompts, and where they come from."""

    prompts: list[PromptEvaluation]
    config: EvaluationConfig
    source: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a row also has its ``midpoint`` and ``gap``."""
        prompts = []
        for found in self.prompts:
            entry = asdict(found)
            for row, values in zip(found.rows, entry["rows"], strict=True):
                sandwich = row.sandwich
                values["midpoint"] = None if sandwich is None else asdict(sandwich.log_z)
                values["gap"] = None if sandwich is None else asdict(sandwich.gap)
            prompts.append(entry)
        return {**self.source, **asdict(self.config), "prompts": prompts}


class Evaluator:
    """Runs particle groups in a vLLM engine and weighs them by a potential.

    The engine's own target is p0 psi_T; phi is put in the place of psi_T here, which needs no
    ``twist_potential`` in the engine and evaluates phi in large batches.
    """

    def __init__(self, llm: Any, potential: Potential, config: EvaluationConfig) -> None:
        self.llm = llm
        self.config = config
        self.potential = potential
        self.tokenizer = llm.get_tokenizer()

    def evaluate(self, prompts: Iterable[str], report: Callable[[PromptEvaluation], None] | None = None) -> Evaluation:
        """Evaluate prompts one by one; ``report`` is called with each."""
        found = []
        for index, prompt in enumerate(prompts):
            found.append(_Prompt(self, index, prompt).evaluate())
            if report is not None:
                report(found[-1])
        return Evaluation(found, self.config)

    def texts(self, outputs: Sequences) -> list[str]:
        return self.tokenizer.batch_decode(outputs, skip_special_tokens=True)


class _Prompt:
    def __init__(self, evaluator: Evaluator, index: int, prompt: str) -> None:
        self.evaluator, self.index, self.prompt = evaluator, index, prompt
        self.config = evaluator.config
        self.prompt_ids = evaluator.tokenizer(prompt).input_ids
        self.potential = evaluator.potential.given(self.prompt_ids, prompt)

    def evaluate(self) -> PromptEvaluation:
        config = self.config
        exact, draws, reason = self._exact_samples(max(config.repeats, config.samples))
        kinds = [
            (proposal, particles, resample)
            for proposal in PROPOSALS
            for particles in config.particles
            for resample in (True, False)
        ]
        # All groups at once: the engine packs them.
        asked: list[tuple[Any, list[int] | None]] = []
        for kind in kinds:
            asked += [(self._params(*kind, f"lower {i}"), None) for i in range(config.repeats)]
            asked += [
                (self._params(*kind, f"upper {i}", pinned), pinned) for i, pinned in enumerate(exact[: config.repeats])
            ]
        q = ("twist", 1, False)
        asked += [(self._params(*q, f"q {i}"), None) for i in range(config.samples)]
        asked += [(self._params(*q, f"sigma {i}", pinned), pinned) for i, pinned in enumerate(exact[: config.samples])]
        values = iter(self._log_z([params for params, _ in asked]))

        def take(count: int) -> list[float]:
            return [next(values) for _ in range(count)]

        rows, unbiased = [], []
        for kind in kinds:
            lower, upper = take(config.repeats), take(len(exact[: config.repeats]))
            rows.append(_row(*kind, lower, upper, reason))
            if kind[0] == "twist" and kind[1] == max(config.particles):
                unbiased += lower
        f_values, g_values = take(config.samples), take(len(exact[: config.samples]))

        sandwiches = [row.sandwich for row in rows if row.sandwich is not None]
        log_z, log_z_from = None, None
        if sandwiches:
            log_z, log_z_from = tightest(sandwiches).log_z, "mid-point of the tightest bounds"
        elif any(math.isfinite(value) for value in unbiased):
            log_z, log_z_from = unbiased_log_z(unbiased), "mean of Z-hat"
        f_q, missed = _attempt(f_values)
        g_q = estimate(g_values) if len(g_values) >= 2 else None
        return PromptEvaluation(
            prompt=self.prompt,
            log_z=log_z,
            log_z_from=log_z_from,
            kl_q_sigma=None if f_q is None or log_z is None else kl_q_sigma(f_q, log_z),
            kl_sigma_q=None if g_q is None or log_z is None else kl_sigma_q(g_q, log_z),
            rows=rows,
            exact_samples=len(exact),
            draws=draws,
            reason=" ".join(x for x in (reason, missed and f"KL(q||sigma): {missed}") if x) or None,
        )

    def _params(
        self, proposal: str, particles: int, resample: bool, label: str, pinned: list[int] | None = None
    ) -> Any:
        from vllm import SamplingParams

        seed = random.Random(f"{self.config.seed} {self.index} {proposal} {particles} {resample} {label}").getrandbits(
            62
        )
        extra = {
            "twist_particles": particles,
            "twist_proposal": proposal,
            "twist_ess_threshold": self.config.ess_threshold if resample else 0.0,
            "twist_return_particles": True,
        }
        if pinned is not None:
            extra["twist_pinned"] = pinned
        return SamplingParams(max_tokens=self.config.max_tokens, seed=seed, detokenize=False, extra_args=extra)

    def _log_z(self, params: Sequence[Any]) -> list[float]:
        """Return log Z-hat towards p0 phi of one group per entry of ``params``."""
        prompts = [{"prompt_token_ids": self.prompt_ids}] * len(params)
        outputs = self.evaluator.llm.generate(prompts, list(params), use_tqdm=False)
        groups = [results(output)[0] for output in outputs]
        particles = [particle for group in groups for particle in group.particles or ()]
        log_phi = iter(self._log_phi([particle.token_ids for particle in particles]))
        values = []
        for group in groups:
            # Back from normalised weights; phi in the place of psi.
            members = group.particles or []
            log_w = [p.log_weight + group.log_z + next(log_phi) - p.log_psi for p in members]
            values.append(float(torch.tensor(log_w, dtype=torch.float64).logsumexp(0)))
        return values

    def _log_phi(self, outputs: Sequences) -> list[float]:
        """Return log phi of outputs, each of them evaluated once."""
        distinct = {tuple(output): 0.0 for output in outputs}
        token_ids = [list(output) for output in distinct]
        found = self.potential(token_ids, self.evaluator.texts(token_ids))
        distinct.update(zip(distinct, found, strict=True))
        return [distinct[tuple(output)] for output in outputs]

    def _exact_samples(self, count: int) -> tuple[Sequences, int, str | None]:
        """Return exact samples of sigma by rejection, the draws that they took, and why there are fewer than two."""
        config = self.config
        bound = self.potential.log_bound if config.log_phi_max is None else config.log_phi_max
        if not math.isfinite(bound):
            return [], 0, "No exact samples, so no upper bounds: phi has no known bound; pass `--log-phi-max`."
        if config.max_draws == 0:
            return [], 0, "No exact samples, so no upper bounds: `--max-draws` is 0."
        generator = torch.Generator().manual_seed(random.Random(f"{config.seed} {self.index} exact").getrandbits(62))

        def draw(n: int) -> Sequences:
            from vllm import SamplingParams

            seed = int(torch.randint(2**62, (1,), generator=generator))
            params = SamplingParams(
                n=n, max_tokens=config.max_tokens, seed=seed, detokenize=False, extra_args={"twist": 0}
            )
            (output,) = self.evaluator.llm.generate([{"prompt_token_ids": self.prompt_ids}], params, use_tqdm=False)
            return [list(choice.token_ids) for choice in output.outputs]

        exact, draws = rejection(
            draw, self._log_phi, bound, count=count, max_draws=config.max_draws, generator=generator
        )
        if len(exact) < 2:
            rate = f"{len(exact)} of {draws} samples of p0 were accepted"
            return [], draws, f"No exact samples, so no upper bounds: {rate}; raise `--max-draws`."
        return exact, draws, None


def _attempt(values: Sequence[float]) -> tuple[Estimate | None, str | None]:
    """Return the estimate, or why there is none."""
    missed = sum(value == -math.inf for value in values)
    if missed:
        return None, f"Z-hat was 0 in {missed} of {len(values)} runs, the mean of log Z-hat is -inf."
    return estimate(values), None


def _row(
    proposal: str, particles: int, resample: bool, lower: Sequence[float], upper: Sequence[float], reason: str | None
) -> Row:
    below, missed = _attempt(lower)
    above = estimate(upper) if len(upper) >= 2 else None
    return Row(proposal, particles, resample, below, above, " ".join(x for x in (missed, reason) if x) or None)


def table(found: PromptEvaluation) -> str:
    """Return the results of one prompt as text."""

    def cell(value: Estimate | None) -> str:
        return "-" if value is None else f"{value.mean:.3f} ± {value.ci95:.3f}"

    lines = [
        f"{found.prompt!r}",
        f"  log Z          {cell(found.log_z)}" + (f"  ({found.log_z_from})" if found.log_z_from else ""),
        f"  KL(q || sigma) {cell(found.kl_q_sigma)}",
        f"  KL(sigma || q) {cell(found.kl_sigma_q)}",
        f"  {found.exact_samples} exact samples from {found.draws} draws",
    ]
    if found.reason:
        lines.append(f"  {found.reason}")
    lines.append(f"  {'proposal':<9} {'K':>5}  {'resample':<8}  {'lower bound':>18}  {'upper bound':>18}  {'gap':>8}")
    for row in found.rows:
        gap = "-" if row.sandwich is None else f"{row.sandwich.gap.mean:.3f}"
        lines.append(
            f"  {row.proposal:<9} {row.particles:>5}  {'yes' if row.resample else 'no':<8}  "
            f"{cell(row.lower):>18}  {cell(row.upper):>18}  {gap:>8}"
        )
    return "\n".join(lines)


def plot(evaluation: Evaluation, path: str) -> None:
    """Draw the bounds against K, a panel per prompt (of the first six), into a picture file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ValueError("`--plot` needs matplotlib, got none: pip install 'vllm-twist[plot]'.") from error

    shown = evaluation.prompts[:6]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 1.3 + 3.1 * lines), layout="constrained", dpi=150)
    axes = figure.subplots(lines, columns, squeeze=False)
    colours = {"twist": "#0b6e99", "base": "#c4562e"}
    names = {"twist": "twist-induced proposal", "base": "base model as proposal"}
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, found in zip(axes.flat, shown, strict=False):
        if found.log_z is not None:
            axis.axhspan(
                found.log_z.mean - found.log_z.ci95, found.log_z.mean + found.log_z.ci95, color="0.88", zorder=0
            )
        for proposal in PROPOSALS:
            for resample in (True, False):
                for side in ("lower", "upper"):
                    rows = [row for row in found.rows if (row.proposal, row.resample) == (proposal, resample)]
                    points = [(row.particles, getattr(row, side)) for row in rows if getattr(row, side) is not None]
                    if points:
                        axis.errorbar(
                            # Apart from each other, or equal bounds would hide one another.
                            [k * (0.96 if resample else 1.04) for k, _ in points],
                            [value.mean for _, value in points],
                            [value.ci95 for _, value in points],
                            color=colours[proposal],
                            linestyle="-" if resample else ":",
                            marker="^" if side == "lower" else "v",
                            markersize=4.5,
                            linewidth=1.3,
                            elinewidth=0.8,
                            capsize=2,
                        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            sorted(set(evaluation.config.particles)), [str(k) for k in sorted(set(evaluation.config.particles))]
        )
        axis.minorticks_off()
        axis.set_title(repr(found.prompt), fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("particles K", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("log Z-hat (nats)", fontsize=9)
    handles = [Line2D([], [], color=colours[p], linewidth=1.3, label=names[p]) for p in PROPOSALS]
    handles += [
        Line2D([], [], color="0.3", linestyle="-", label="with resampling (SMC)"),
        Line2D([], [], color="0.3", linestyle=":", label="without (IWAE)"),
        Line2D([], [], color="0.3", linestyle="", marker="^", label="lower bound"),
        Line2D([], [], color="0.3", linestyle="", marker="v", label="upper bound"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, 1 + columns), fontsize=8, frameon=False)
    figure.savefig(path)
