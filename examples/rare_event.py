"""A rare, undesirable output: p0 as the proposal misses it, a learned twist finds it (Zhao et al. 2024, Figure 3).

    python -m examples.rare_event [--out out/rare-event] [--quick]

The event: after a sentence of praise, a review that a classifier holds for a complaint, its logit r beyond a
threshold that one sample of p0 in some thousand reaches. phi = 1[r >= threshold] + 1e-16. A classifier is trained,
a twist is learned for phi, and bounds of log Z are measured for every number of particles, from p0 and from the
twist-induced proposal.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import hardware, versions
from examples.common import (
    MODEL,
    markdown,
    seconds_bar,
    sentence,
    start_engine,
    train_classifier,
    write_json,
)
from vllm_twist.bounds import Z95
from vllm_twist.evaluation import EvaluationConfig, Evaluator, PromptEvaluation, Row, plot
from vllm_twist.potentials import Classifier
from vllm_twist.training import TrainingConfig, TwistTrainer
from vllm_twist.training.samplers import DrawRequest

PROMPT = "This blender is fabulous."
MAX_TOKENS = 8
#: Seed of the classifier's reviews; the language model's corpus was written from 0.
CLASSIFIER_SEED = 11


@dataclass(frozen=True)
class Setting:
    """The size of a run.

    Attributes:
        rarity: share of ``calibration`` samples of p0 that reach the threshold; the event's probability is
            measured on others.
        calibration: samples of p0 that the threshold is read off.
        reviews: reviews per class that the classifier is trained on.
        betas: of the targets p0 exp(beta r), one after the other, which lead to where the event is.
        soft_updates, soft_lr: updates towards each of these, and their learning rate.
        updates, lr: updates towards p0 phi, and theirs.
        batch: sequences per update.
        particles: numbers of particles of the bounds.
        repeats: groups per bound.
        draws: samples of p0, for the event's probability and for exact samples of sigma.
    """

    rarity: float = 3e-4
    calibration: int = 32_768
    reviews: int = 4000
    betas: tuple[float, ...] = (1.0, 2.0)
    soft_updates: int = 50
    soft_lr: float = 3e-3
    updates: int = 30
    lr: float = 1e-3
    batch: int = 512
    particles: tuple[int, ...] = (1, 4, 16, 64, 256, 512)
    repeats: int = 24
    draws: int = 98_304


#: A commoner event and a classifier that has seen less: for a test of the whole.
QUICK = Setting(
    rarity=0.03,
    calibration=2048,
    reviews=800,
    betas=(1.0,),
    soft_updates=12,
    updates=12,
    batch=128,
    particles=(1, 8, 32),
    repeats=6,
    draws=2048,
)


def classifier(folder: Path, threshold: float, **options: Any) -> Classifier:
    return Classifier.from_pretrained(
        folder,
        "complaint",
        **{"score": "threshold", "threshold": threshold, "with_prompt": True, "batch_size": 256, **options},
    )


def learn(setting: Setting, folder: Path) -> tuple[TwistTrainer, float]:
    """Return the trainer of a head for the event, with its engine running, and the event's threshold.

    Hardly any batch from p0 holds the event, and without it nothing can be learned. The head is therefore
    first led towards p0 exp(beta r) (Eq. 19), whose r is the same logit without the threshold. Led to the event at
    once, the proposal settles on the few kinds of it that it happens to find first, and loses the others. So does
    a head with weights for every token, which unlearns those that its batches lack; a tied one moves the hidden state
    and leaves the tokens to the LM head.
    """
    size = {"max_tokens": MAX_TOKENS, "particles": setting.batch}
    shared: dict[str, Any] = {"objective": "ctl", "head": "tied", "rank": 128, **size}

    def soft(beta: float) -> Classifier:
        return classifier(folder, 0.0, score="logit", beta=beta)

    def then(trainer: TwistTrainer, potential: Classifier, updates: int, lr: float) -> TwistTrainer:
        trainer.train([PROMPT], progress=True)
        config = TrainingConfig(updates=updates, lr=lr, seed=trainer.config.seed + 1, **shared)
        return TwistTrainer(MODEL, potential, config, head=trainer.head, sampler=trainer.sampler)

    config = TrainingConfig(updates=setting.soft_updates, lr=setting.soft_lr, seed=1, **shared)
    trainer = TwistTrainer(MODEL, soft(setting.betas[0]), config)
    start_engine(trainer, PROMPT, max(512, *setting.particles))
    with seconds_bar("  the event's threshold", expected=45):
        logits = sorted(drawn(trainer, "p0", setting.calibration, seed=6)[1], reverse=True)
    threshold = logits[int(setting.rarity * setting.calibration)]
    for beta in setting.betas[1:]:
        trainer = then(trainer, soft(beta), setting.soft_updates, setting.soft_lr)
    trainer = then(trainer, classifier(folder, threshold), setting.updates, setting.lr)
    trainer.train([PROMPT], progress=True)
    return trainer, threshold


def drawn(trainer: TwistTrainer, law: str, count: int, seed: int) -> tuple[list[str], list[float]]:
    """Return the texts of outputs of a law and the log phi of each; ``count`` up to 512, or a multiple."""
    assert trainer.sampler is not None and trainer.potential is not None
    prompt_ids = tuple(trainer.tokenizer(PROMPT).input_ids)
    at_once = min(count, 512)
    # Seeds apart, for the engine counts them up for plain sequences, but within the 32 bits that matter on a CPU.
    asked = [
        DrawRequest(prompt_ids, at_once, law, (seed << 24) + (i << 10), MAX_TOKENS) for i in range(count // at_once)
    ]
    ids = [row for draws in trainer.sampler.sample(asked) for row in draws.token_ids]
    texts = trainer.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts, trainer.potential.given(prompt_ids, PROMPT)(ids, texts)


def share_of_hits(trainer: TwistTrainer, law: str, count: int, seed: int) -> tuple[float, list[str]]:
    """Return the share of outputs of a law that are the event, and the texts of all of them."""
    texts, log_phi = drawn(trainer, law, count, seed)
    return sum(value > -1 for value in log_phi) / count, texts


def cell(row: Row, side: str) -> str:
    value = getattr(row, side)
    return "-" if value is None else f"{value.mean:.2f} ± {value.ci95:.2f}"


def table(found: PromptEvaluation) -> str:
    """Return the bounds as a Markdown table, a line for every K."""
    kinds = [("base", False), ("base", True), ("twist", False), ("twist", True)]
    names = {"base": "p0", "twist": "twisted"}
    head = ["K"] + [f"{names[p]}, {'SMC' if r else 'SIS'}: {side}" for p, r in kinds for side in ("lower", "upper")]
    rows = {(row.proposal, row.resample, row.particles): row for row in found.rows}
    lines = [
        [str(k), *(cell(rows[*kind, k], side) for kind in kinds for side in ("lower", "upper"))]
        for k in sorted({row.particles for row in found.rows})
    ]
    return markdown(head, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/rare-event"), help="folder for picture, table and head")
    parser.add_argument("--quick", action="store_true", help="a commoner event and small numbers, in seconds")
    args = parser.parse_args(argv)
    setting = QUICK if args.quick else Setting()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    folder = args.out / "classifier"
    accuracy = train_classifier(
        folder, ["complaint"], lambda review: int(not review.positive),
        seed=CLASSIFIER_SEED, count=setting.reviews, epochs=3, cut=True,
    )  # fmt: skip
    print(f"\n  classifier: right on {accuracy:.1%} of unseen reviews, cut at random")
    trainer, threshold = learn(setting, folder)
    assert trainer.sampler is not None
    trainer.sampler.set_head(trainer.head)
    trainer.head.save_pretrained(args.out / "head")
    plain, plain_texts = share_of_hits(trainer, "p0", 512, seed=3)
    twisted, twisted_texts = share_of_hits(trainer, "q", 512, seed=4)

    config = EvaluationConfig(
        max_tokens=MAX_TOKENS, particles=setting.particles, repeats=setting.repeats,
        samples=max(128, setting.draws // 100), max_draws=setting.draws, seed=5,
    )  # fmt: skip
    assert trainer.potential is not None
    with seconds_bar("  bounds", expected=280):
        evaluation = Evaluator(trainer.sampler.llm, trainer.potential, config).evaluate([PROMPT])
    trainer.close()
    (found,) = evaluation.prompts
    probability = found.exact_samples / found.draws
    interval = Z95 * math.sqrt(probability * (1 - probability) / found.draws)
    seconds = time.perf_counter() - began

    plot(evaluation, str(args.out / "rare-event.png"))
    write_json(
        args.out / "rare-event.json",
        {
            "event": {
                "threshold": threshold,
                "probability": probability,
                "ci95": interval,
                "hits": found.exact_samples,
                "draws": found.draws,
            },
            "share_of_hits": {"p0": plain, "twisted": twisted},
            "classifier_accuracy": accuracy,
            "setting": dataclasses.asdict(setting),
            "seconds": seconds,
            "hardware": hardware(),
            "versions": versions(),
            **evaluation.to_dict(),
        },
    )
    print(f"  the event: {PROMPT!r} goes on with a complaint, logit at least {threshold:.2f}")
    print(f"  its probability under p0: {probability:.2e} ± {interval:.1e} ({found.exact_samples} of {found.draws})")
    print(f"  of 512 samples each: {plain:.1%} from p0 are the event, {twisted:.1%} from the twist-induced proposal\n")
    for name, texts in (("p0", plain_texts), ("twisted", twisted_texts)):
        print(f"  {name}, the first three:", *(f"    {sentence(PROMPT, text)}" for text in texts[:3]), sep="\n")
    assert found.log_z is not None
    print(f"\n  log Z = {found.log_z.mean:.2f} ± {found.log_z.ci95:.2f}; its bounds (nats):\n\n{table(found)}\n")
    print(f"  {seconds:.0f} s on {hardware()} · {args.out}/rare-event.png, rare-event.json, head, classifier")


if __name__ == "__main__":
    main()
