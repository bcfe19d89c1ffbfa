"""Evaluate a twist head through the engine: bounds of log Z, and how far its proposal is from the target.

For every prompt, proposal (twist-induced or base), number of particles and with or without resampling,
the lower bound is the mean of log Z-hat over independent groups, and the upper one the same over groups
with one particle pinned to an exact sample of sigma (Zhao et al. 2024, Prop. 5.1 and Figure 3).
Without resampling these are the IWAE bounds.
"""

from __future__ import annotations

import argparse
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
    ancestral,
    estimate,
    kl_q_sigma,
    kl_sigma_q,
    paired_midpoint,
    rejection,
    tightest,
    unbiased_log_z,
)
from vllm_twist.config import PROPOSALS
from vllm_twist.model_options import ModelOptions
from vllm_twist.options import at_least, check_fields, number, option
from vllm_twist.potentials import Continuation, Potential
from vllm_twist.prompts import Prompt, encode_prompt
from vllm_twist.results import results, reweigh


def _parse_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers like 1,4,16, got {text!r}") from None


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    if not value or min(value) < 1:
        raise ValueError(f"`{name}` must hold numbers of at least 1, got {list(value)}: pass 1,4,16.")
    return tuple(value)


def _bound(name: str, value: Any) -> float | None:
    return None if value is None else number(name, value)


def _threshold(name: str, value: Any) -> float:
    if not number(name, value) > 0:
        raise ValueError(
            f"`{name}` must be above 0, got {value}: half of the rows do without resampling anyway."
        )
    return float(value)


@dataclass(frozen=True)
class EvaluationConfig(ModelOptions):
    """What to run for each prompt, and with which base model.

    Attributes:
        max_tokens: length at which outputs are cut.
        particles: numbers of particles K.
        repeats: independent groups per bound.
        samples: samples of q and of sigma for the divergences.
        max_draws: samples of p0 that may be spent on finding exact samples of sigma by rejection.
        log_phi_max: an upper bound of log phi, for potentials that do not know their own.
        ess_threshold: rule of the rows that resample.
        seed: of everything random.
        condition_tokens: measure infilling instead of a potential: outputs of ``max_tokens`` tokens that so many
            given ones follow. Every repeat has a condition o_T of its own, drawn from p0 with an exact sample of what
            comes before it; all results are means over o_T, and ``samples`` is not read.
    """

    max_tokens: int = option(at_least(1), "length at which outputs are cut", default=16)
    particles: tuple[int, ...] = option(
        _numbers, "numbers of particles K, separated by commas", parse=_parse_numbers, default=(1, 4, 16, 64)
    )
    repeats: int = option(at_least(2), "independent groups per bound", default=20)
    samples: int = option(at_least(2), "samples of q and of sigma for the divergences", default=200)
    max_draws: int = option(
        at_least(0), "samples of p0 to spend per prompt on exact samples of sigma, by rejection", default=20_000
    )
    log_phi_max: float | None = option(
        _bound, "an upper bound of log phi, for potentials that do not know their own", parse=float, default=None
    )
    ess_threshold: float = option(
        _threshold, "resample when ESS falls below this times K, in the rows that do", default=0.5
    )
    seed: int = option(at_least(0), "seed of everything random", default=0)
    condition_tokens: int = option(
        at_least(0),
        "in place of a potential: measure infilling, outputs that so many given tokens follow; every repeat has "
        "tokens of its own",
        default=0,
    )

    def __post_init__(self) -> None:
        check_fields(self)


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
        prompt: its text; that of chat messages after the model's template.
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

    A conditional head is given the tokens of the potential's continuation, or with ``condition_tokens``
    those of each repeat.
    """

    def __init__(self, llm: Any, potential: Potential | None, config: EvaluationConfig, model: Any = None) -> None:
        """Prepare to evaluate.

        Args:
            llm: a ``vllm.LLM`` with a twist head.
            potential: log phi; None with ``condition_tokens``.
            config: what to run.
            model: with ``condition_tokens`` the same language model in transformers, for phi = p0(o_T | s).

        Raises:
            ValueError: parts that do not fit together.
        """
        self.llm = llm
        self.config = config
        self.potential = potential
        self.model = model
        self.tokenizer = llm.get_tokenizer()
        if (potential is None) != bool(config.condition_tokens):
            raise ValueError(
                f"`potential` must be given, or `condition_tokens` in its place, got {potential!r} and "
                f"{config.condition_tokens}: pass one of the two."
            )
        if config.condition_tokens and model is None:
            raise ValueError("`model` must be given with `condition_tokens`, got None: pass the LM in transformers.")

    def evaluate(
        self, prompts: Iterable[Prompt], report: Callable[[PromptEvaluation], None] | None = None
    ) -> Evaluation:
        """Evaluate prompts, as ``TwistTrainer.train`` takes them, one by one; ``report`` is called with each."""
        found = []
        for index, prompt in enumerate(prompts):
            kind = _Infilling if self.config.condition_tokens else _Prompt
            found.append(kind(self, index, prompt).evaluate())
            if report is not None:
                report(found[-1])
        return Evaluation(found, self.config)

    @property
    def conditional(self) -> bool:
        """Whether the engine's head reads a condition."""
        from vllm_twist.engine.admission import read_config

        return read_config(self.llm.llm_engine.vllm_config).conditional

    def texts(self, outputs: Sequences) -> list[str]:
        return self.tokenizer.batch_decode(outputs, skip_special_tokens=True)


class _Prompt:
    """One prompt and one target."""

    #: The twist-induced proposal itself: one particle.
    Q = ("twist", 1, False)

    def __init__(self, evaluator: Evaluator, index: int, prompt: Prompt) -> None:
        self.evaluator, self.index = evaluator, index
        self.config = evaluator.config
        self.prompt_ids = encode_prompt(prompt, evaluator.tokenizer)
        if not self.prompt_ids:
            raise ValueError(f"`prompts` must give at least one token each, got none for {prompt!r}: add text.")
        # As training gives it to a potential; of chat messages, what the model reads.
        self.prompt = prompt if isinstance(prompt, str) else evaluator.texts([self.prompt_ids])[0]

    @property
    def kinds(self) -> list[tuple[str, int, bool]]:
        return [
            (proposal, particles, resample)
            for proposal in PROPOSALS
            for particles in self.config.particles
            for resample in (True, False)
        ]

    def evaluate(self) -> PromptEvaluation:
        config, kinds = self.config, self.kinds
        assert self.evaluator.potential is not None
        potential = self.evaluator.potential.given(self.prompt_ids, self.prompt)
        exact, draws, reason = self._exact_samples(potential, max(config.repeats, config.samples))
        condition = potential.continuation_ids if isinstance(potential, Continuation) else None
        # All groups at once: the engine packs them.
        asked: list[Any] = []
        for kind in kinds:
            asked += [self._params(*kind, f"lower {i}", None, condition) for i in range(config.repeats)]
            asked += [
                self._params(*kind, f"upper {i}", pinned, condition) for i, pinned in enumerate(exact[: config.repeats])
            ]
        asked += [self._params(*self.Q, f"q {i}", None, condition) for i in range(config.samples)]
        asked += [
            self._params(*self.Q, f"sigma {i}", pinned, condition) for i, pinned in enumerate(exact[: config.samples])
        ]
        values = iter(self._log_z(asked, [potential] * len(asked)))

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
        self,
        proposal: str,
        particles: int,
        resample: bool,
        label: str,
        pinned: list[int] | None,
        condition: list[int] | None,
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
        if condition is not None and self.evaluator.conditional:
            extra["twist_condition"] = condition
        return SamplingParams(max_tokens=self.config.max_tokens, seed=seed, detokenize=False, extra_args=extra)

    def _log_z(self, params: Sequence[Any], potentials: Sequence[Potential]) -> list[float]:
        """Return log Z-hat towards p0 phi of one group per entry of ``params``, each with its phi."""
        prompts = [{"prompt_token_ids": self.prompt_ids}] * len(params)
        outputs = self.evaluator.llm.generate(prompts, list(params), use_tqdm=False)
        groups = [results(output)[0] for output in outputs]
        of_potential: dict[int, list[Any]] = {}
        for group, potential in zip(groups, potentials, strict=True):
            of_potential.setdefault(id(potential), []).extend(p.token_ids for p in group.particles or ())
        by_id = {id(potential): potential for potential in potentials}
        log_phi = {key: iter(self._log_phi(by_id[key], outputs)) for key, outputs in of_potential.items()}
        values = []
        for group, potential in zip(groups, potentials, strict=True):
            # Back from normalised weights; phi in the place of psi.
            members = group.particles or []
            phi = log_phi[id(potential)]
            log_w = [reweigh(p.log_weight + group.log_z, p.log_psi, next(phi)) for p in members]
            values.append(float(torch.tensor(log_w, dtype=torch.float64).logsumexp(0)))
        return values

    def _log_phi(self, potential: Potential, outputs: Sequences) -> list[float]:
        """Return log phi of outputs, each of them evaluated once."""
        distinct = {tuple(output): 0.0 for output in outputs}
        token_ids = [list(output) for output in distinct]
        found = potential(token_ids, self.evaluator.texts(token_ids))
        distinct.update(zip(distinct, found, strict=True))
        return [distinct[tuple(output)] for output in outputs]

    def _exact_samples(self, potential: Potential, count: int) -> tuple[Sequences, int, str | None]:
        """Return exact samples of sigma by rejection, the draws that they took, and why there are fewer than two."""
        config = self.config
        bound = potential.log_bound if config.log_phi_max is None else config.log_phi_max
        if not math.isfinite(bound):
            return [], 0, "No exact samples, so no upper bounds: phi has no known bound; pass `--log-phi-max`."
        if config.max_draws == 0:
            return [], 0, "No exact samples, so no upper bounds: `--max-draws` is 0."
        generator = self._generator()
        exact, draws = rejection(
            lambda n: self._draw(n, config.max_tokens, generator),
            lambda outputs: self._log_phi(potential, outputs),
            bound,
            count=count,
            max_draws=config.max_draws,
            generator=generator,
        )
        if len(exact) < 2:
            rate = f"{len(exact)} of {draws} samples of p0 were accepted"
            return [], draws, f"No exact samples, so no upper bounds: {rate}; raise `--max-draws`."
        return exact, draws, None

    def _generator(self) -> torch.Generator:
        seed = random.Random(f"{self.config.seed} {self.index} exact").getrandbits(62)
        return torch.Generator().manual_seed(seed)

    def _draw(self, count: int, max_tokens: int, generator: torch.Generator) -> Sequences:
        """Return samples of p0."""
        from vllm import SamplingParams
        from vllm.platforms import current_platform

        llm, most = self.evaluator.llm, count
        if current_platform.is_cpu():
            # A seeded prompt that is computed in two steps fails in vLLM on a CPU: let them all fit into one.
            step = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
            if len(self.prompt_ids) > step:
                raise ValueError(
                    f"`prompts` must have at most `max_num_batched_tokens`={step} tokens each on a CPU, got "
                    f"{len(self.prompt_ids)}: raise `max_num_batched_tokens`, or shorten the prompt."
                )
            most = min(count, step // len(self.prompt_ids))
        outputs: Sequences = []
        for start in range(0, count, most):
            params = SamplingParams(
                n=min(most, count - start),
                max_tokens=max_tokens,
                seed=int(torch.randint(2**62, (1,), generator=generator)),
                detokenize=False,
                extra_args={"twist": 0},
            )
            (output,) = llm.generate([{"prompt_token_ids": self.prompt_ids}], params, use_tqdm=False)
            outputs += [list(choice.token_ids) for choice in output.outputs]
        return outputs


class _Infilling(_Prompt):
    """One prompt and a target per repeat: what comes before o_T, for an o_T of its own."""

    def evaluate(self) -> PromptEvaluation:
        """Compare bounds of the same o_T with each other, for log Z(o_T) varies far more than they do."""
        config, kinds = self.config, self.kinds
        pairs, draws = self._pairs(config.repeats)
        if len(pairs) < 2:
            reason = (
                f"{len(pairs)} of {draws} samples of p0 went on for {config.max_tokens + config.condition_tokens} "
                "tokens; raise `--max-draws`, or lower `--max-tokens` or `--condition-tokens`."
            )
            rows = [Row(*kind, None, None, reason) for kind in kinds]
            return PromptEvaluation(self.prompt, None, None, None, None, rows, len(pairs), draws, reason)
        targets = [
            Continuation(
                self.evaluator.model,
                condition,
                prompt_ids=self.prompt_ids,
                eos_token_id=self.evaluator.tokenizer.eos_token_id,
            )
            for _, condition in pairs
        ]
        asked, potentials = [], []
        for kind in (*kinds, self.Q):
            for i, ((pinned, condition), phi) in enumerate(zip(pairs, targets, strict=True)):
                asked += [
                    self._params(*kind, f"lower {i}", None, condition),
                    self._params(*kind, f"upper {i}", pinned, condition),
                ]
                potentials += [phi, phi]
        values = self._log_z(asked, potentials)
        each = 2 * len(pairs)
        found = {
            kind: (values[k * each : (k + 1) * each : 2], values[k * each + 1 : (k + 1) * each : 2])
            for k, kind in enumerate((*kinds, self.Q))
        }
        rows = [_row(*kind, *found[kind], None) for kind in kinds]
        f_q, g_q = found[self.Q]
        both = {kind: pair for kind, pair in found.items() if kind in kinds and -math.inf not in pair[0]}
        if not both:
            reason = "Z-hat was 0 for some o_T with every number of particles."
            return PromptEvaluation(self.prompt, None, None, None, None, rows, len(pairs), draws, reason)
        # The pair of bounds that are closest, o_T by o_T.
        lower, upper = min(both.values(), key=lambda pair: estimate(_minus(pair[1], pair[0])).mean)
        missed = sum(value == -math.inf for value in f_q)
        return PromptEvaluation(
            prompt=self.prompt,
            log_z=paired_midpoint(lower, upper),
            log_z_from="mid-point of the tightest bounds, mean over o_T",
            kl_q_sigma=None if missed else paired_midpoint(_minus(lower, f_q), _minus(upper, f_q)),
            kl_sigma_q=paired_midpoint(_minus(g_q, upper), _minus(g_q, lower)),
            rows=rows,
            exact_samples=len(pairs),
            draws=draws,
            reason=f"KL(q||sigma): the proposal's sample had phi = 0 for {missed} o_T." if missed else None,
        )

    def _pairs(self, count: int) -> tuple[list[tuple[list[int], list[int]]], int]:
        """Return up to ``count`` pairs (s, o_T) of p0, s an exact sample given o_T, and the draws that they took."""
        config, generator = self.config, self._generator()
        pairs: list[tuple[list[int], list[int]]] = []
        draws = 0
        while len(pairs) < count and draws < config.max_draws:
            wanted = min(count, config.max_draws - draws)
            outputs = self._draw(wanted, config.max_tokens + config.condition_tokens, generator)
            draws += wanted
            pairs += ancestral(outputs, config.max_tokens, config.condition_tokens)
        return pairs[:count], draws


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


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
