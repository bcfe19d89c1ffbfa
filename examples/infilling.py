"""Fill the middle between a given beginning and a given ending (Zhao et al. 2024, Sec. 7.2.3 and Tables 4 and 8).

    python -m examples.infilling [--out out/infilling] [--quick]

phi(s) = p0(o_T | s): outputs of T tokens, weighted by how likely the ending o_T is after them. One conditional head
learns this for every ending of c tokens, by CTL with the exact samples that come with each o_T drawn from p0. For
T = 2, c = 1 the mean of log Z(o_T) is known: it is minus the entropy of o_T, which can be enumerated. For
T = 6, c = 2 the middles of unseen reviews are filled in.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import hardware, versions
from examples.common import MODEL, GradedReview, markdown, seconds_bar, start_engine, write_json
from scripts.make_tiny import PROMPTS
from vllm_twist import results
from vllm_twist.evaluation import Evaluation, EvaluationConfig, Evaluator, PromptEvaluation, plot
from vllm_twist.potentials import Continuation
from vllm_twist.training import TrainingConfig, TwistTrainer

#: Prompt of the entropy that is enumerated.
PROMPT = "The battery"
#: Seed of the reviews whose middles are filled in; the language model's corpus was written from 0.
REVIEW_SEED = 31
#: Prefixes rarer than this are left out of the enumeration.
RARE = 1e-8


@dataclass(frozen=True)
class Setting:
    """The size of a run.

    Attributes:
        short, long: (T, c) of the two tasks.
        updates: updates of each head.
        conditions: endings per update, each with ``batch`` sequences.
        batch: sequences per ending.
        particles: numbers of particles of the bounds.
        repeats: endings that each bound is averaged over.
        fill: particles of the groups that fill in.
        examples: reviews to fill in.
    """

    short: tuple[int, int] = (2, 1)
    long: tuple[int, int] = (6, 2)
    updates: tuple[int, int] = (80, 100)
    conditions: int = 32
    batch: int = 8
    particles: tuple[int, ...] = (1, 4, 16, 64)
    repeats: tuple[int, int] = (250, 50)
    fill: int = 64
    examples: int = 5


QUICK = Setting(updates=(12, 4), conditions=16, particles=(1, 16), repeats=(40, 6), fill=16, examples=1)


def learn(setting: Setting, which: int, sampler: Any = None) -> TwistTrainer:
    """Return the trainer of a conditional head for the short (0) or the long (1) task, trained."""
    max_tokens, condition_tokens = (setting.short, setting.long)[which]
    config = TrainingConfig(
        objective="ctl", positives="exact", head="mlp", max_tokens=max_tokens, condition_tokens=condition_tokens,
        particles=setting.batch, prompts_per_update=setting.conditions, updates=setting.updates[which], lr=3e-3,
        seed=which,
    )  # fmt: skip
    trainer = TwistTrainer(MODEL, None, config, sampler=sampler)
    if sampler is None:
        sequences = max(setting.conditions * setting.batch, *setting.particles)
        start_engine(trainer, max(PROMPTS, key=lambda prompt: len(trainer.tokenizer(prompt).input_ids)), sequences)
    trainer.train([PROMPT] if which == 0 else list(PROMPTS), progress=True)
    assert trainer.sampler is not None
    trainer.sampler.set_head(trainer.head)
    return trainer


@torch.no_grad()
def entropy(trainer: TwistTrainer) -> tuple[float, float]:
    """Return H(o_T) in nats for T = 2, c = 1 by enumeration, and the probability of the prefixes left out."""
    model, prompt = trainer.model, torch.tensor(trainer.tokenizer(PROMPT).input_ids)

    def following(prefixes: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)
        logits = [model(part, logits_to_keep=1).logits[:, -1] for part in rows.split(512)]
        return torch.cat(logits).double().softmax(-1)

    first = following(torch.empty(1, 0, dtype=torch.int64))[0]
    starts = (first > RARE).nonzero()
    pairs = first[starts] * following(starts)
    rows, second = (pairs > RARE).nonzero(as_tuple=True)
    likely = pairs[rows, second]
    ending = likely @ following(torch.stack([starts[rows, 0], second], 1))
    covered = float(likely.sum())
    ending = ending / covered
    return float(-(ending * ending.clamp_min(1e-300).log()).sum()), 1 - covered


def measure(trainer: TwistTrainer, setting: Setting, which: int, prompt: str) -> PromptEvaluation:
    max_tokens, condition_tokens = (setting.short, setting.long)[which]
    config = EvaluationConfig(
        max_tokens=max_tokens, particles=setting.particles, repeats=setting.repeats[which],
        condition_tokens=condition_tokens, seed=which,
    )  # fmt: skip
    assert trainer.sampler is not None
    (found,) = Evaluator(trainer.sampler.llm, None, config, trainer.model).evaluate([prompt]).prompts
    return dataclasses.replace(found, prompt=f"{prompt}, T = {max_tokens}, c = {condition_tokens}")


def unseen(trainer: TwistTrainer, setting: Setting) -> list[tuple[str, list[int], list[int]]]:
    """Return (beginning, middle, ending) of reviews that the model has not seen, each with another beginning."""
    rng = random.Random(f"infilling {REVIEW_SEED}")
    length, after = setting.long
    found: dict[str, tuple[str, list[int], list[int]]] = {}
    while len(found) < setting.examples:
        text = GradedReview(rng).write()
        prompt = next((prompt for prompt in PROMPTS if text.startswith(f"{prompt} ")), None)
        if prompt is None or prompt in found:
            continue
        start = len(trainer.tokenizer(prompt).input_ids)
        ids = trainer.tokenizer(text).input_ids
        if len(ids) > start + length + after:
            found[prompt] = prompt, ids[start : start + length], ids[start + length : start + length + after]
    return list(found.values())


def fill(trainer: TwistTrainer, setting: Setting, prompt: str, middle: list[int], ending: list[int]) -> dict[str, Any]:
    """Return what plain sampling and twisted SMC put between the beginning and the ending of a review."""
    from vllm import SamplingParams

    assert trainer.sampler is not None
    tokenizer, llm = trainer.tokenizer, trainer.sampler.llm
    prompt_ids = tokenizer(prompt).input_ids
    phi = Continuation(trainer.model, ending, prompt_ids=prompt_ids, eos_token_id=tokenizer.eos_token_id)
    common: dict[str, Any] = {"max_tokens": len(middle), "seed": 7, "detokenize": False}
    asked = [
        SamplingParams(n=setting.fill, extra_args={"twist": 0}, **common),
        SamplingParams(
            extra_args={"twist_particles": setting.fill, "twist_condition": ending, "twist_return_particles": True},
            **common,
        ),
    ]
    plain, twisted = llm.generate([{"prompt_token_ids": prompt_ids}] * 2, asked, use_tqdm=False)

    def log_phi(outputs: list[list[int]]) -> torch.Tensor:
        return torch.tensor(phi(outputs, [""] * len(outputs)), dtype=torch.float64)

    def mean(log_w: torch.Tensor, values: torch.Tensor) -> float:
        return float((log_w.softmax(0) * values.clamp_min(-50)).sum())

    plain_ids = [list(output.token_ids) for output in plain.outputs]
    (group,) = results(twisted)
    particles = group.particles or []
    twisted_ids = [particle.token_ids for particle in particles]
    plain_phi, twisted_phi = log_phi(plain_ids), log_phi(twisted_ids)
    # phi in the place of psi, and then one particle by its weight.
    log_w = torch.tensor([p.log_weight - p.log_psi for p in particles], dtype=torch.float64) + twisted_phi
    drawn = int(torch.multinomial(log_w.softmax(0), 1, generator=torch.Generator().manual_seed(7)))
    nothing = torch.zeros(len(plain_ids), dtype=torch.float64)
    return {
        "beginning": prompt,
        "ending": tokenizer.decode(ending),
        "review": tokenizer.decode(middle),
        "plain": tokenizer.decode(plain_ids[0], skip_special_tokens=True),
        "infilled": tokenizer.decode(twisted_ids[drawn]),
        "plain_log_phi": mean(nothing, plain_phi),
        "infilled_log_phi": mean(log_w, twisted_phi),
        "review_log_phi": float(log_phi([middle])[0]),
        "log_z": group.log_z + float(
            torch.logsumexp(torch.tensor([p.log_weight - p.log_psi for p in particles]) + twisted_phi, 0)
        ),
    }  # fmt: skip


def divergences(found: PromptEvaluation) -> list[list[str]]:
    """Return the rows of the table: both divergences of p0 and of the twist-induced proposal from sigma."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value.mean:.2f} ± {value.ci95:.2f}"

    base = next(row for row in found.rows if row.proposal == "base" and row.particles == 1)
    assert found.log_z is not None

    def gap(low: Any, high: Any) -> str:
        return "-" if low is None or high is None else f"{high.mean - low.mean:.2f}"

    return [
        [found.prompt, "p0", gap(base.lower, found.log_z), gap(found.log_z, base.upper)],
        ["", "twist-induced", cell(found.kl_q_sigma), cell(found.kl_sigma_q)],
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/infilling"), help="folder for picture, table and head")
    parser.add_argument("--quick", action="store_true", help="small numbers, in seconds")
    args = parser.parse_args(argv)
    setting = QUICK if args.quick else Setting()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    long = learn(setting, 1)
    long.head.save_pretrained(args.out / "head")
    assert long.sampler is not None
    filled = [fill(long, setting, *review) for review in unseen(long, setting)]
    with seconds_bar("  bounds", expected=60):
        of_long = measure(long, setting, 1, PROMPT)
    short = learn(setting, 0, long.sampler)
    with seconds_bar("  bounds", expected=60):
        of_short = measure(short, setting, 0, PROMPT)
    exact, left_out = entropy(short)
    long.close()
    seconds = time.perf_counter() - began

    config = EvaluationConfig(particles=setting.particles)
    evaluation = Evaluation([of_short, of_long], config)
    plot(evaluation, str(args.out / "infilling.png"), known=[-exact, None])
    write_json(
        args.out / "infilling.json",
        {
            "exact_mean_log_z": -exact,
            "left_out": left_out,
            "filled": filled,
            "setting": dataclasses.asdict(setting),
            "seconds": seconds,
            "hardware": hardware(),
            "versions": versions(),
            "prompts": evaluation.to_dict()["prompts"],
        },
    )
    assert of_short.log_z is not None and math.isfinite(exact)
    print("\n  Between a beginning and an ending (64 particles), beside plain sampling and what the review said:\n")
    for entry in filled:
        print(f"  {entry['beginning']} ... {entry['ending'].strip()}")
        print(f"    plain     {entry['plain'].strip()}   (mean log p0(ending) {entry['plain_log_phi']:.1f})")
        print(f"    infilled  {entry['infilled'].strip()}   (mean {entry['infilled_log_phi']:.1f})")
        print(f"    review    {entry['review'].strip()}   ({entry['review_log_phi']:.1f})")
    print(f"\n  E[log Z(o_T)] for T = 2, c = 1: {of_short.log_z.mean:.3f} ± {of_short.log_z.ci95:.3f} by the bounds,")
    print(f"  {-exact:.3f} exactly (minus the entropy of o_T; prefixes left out: {left_out:.1e})\n")
    print(markdown(["task", "proposal", "KL(q‖sigma)", "KL(sigma‖q)"], divergences(of_short) + divergences(of_long)))
    print(f"\n  {seconds:.0f} s on {hardware()} · {args.out}/infilling.png, infilling.json, head")


if __name__ == "__main__":
    main()
