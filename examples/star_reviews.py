"""Reviews of one to five stars: one twist head per star class (Zhao et al. 2024, Sec. 7.2.2, with every class).

    python -m examples.star_reviews [--out out/star-reviews] [--quick]

phi = p(class | text) of a classifier. For every class a head is learned and reviews are drawn: from p0, as the best
of 16 from p0, from the twist-induced proposal, and by SMC with 16 particles. A second classifier, trained on other
reviews from another seed, judges them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import hardware, versions
from examples.common import (
    MODEL,
    markdown,
    sentence,
    start_engine,
    train_classifier,
    write_json,
)
from vllm_twist import results
from vllm_twist.bounds import Estimate
from vllm_twist.evaluation import EvaluationConfig, Evaluator, PromptEvaluation
from vllm_twist.potentials import Classifier
from vllm_twist.training import TrainingConfig, TwistTrainer

PROMPT = "I bought this"
MAX_TOKENS = 48
CLASSES = [f"{stars} star{'s' * (stars > 1)}" for stars in range(1, 6)]
#: K, and n of best-of-n: as many tokens are drawn for one review.
PARTICLES = 16
#: Seeds of the classifiers' reviews; the language model's corpus was written from 0.
CLASSIFIER_SEED, JUDGE_SEED = 21, 22
#: How reviews are drawn.
METHODS = {
    "p0": "p0",
    "best": f"best of {PARTICLES} from p0",
    "q": "twist-induced proposal",
    "smc": f"SMC, K = {PARTICLES}",
}


@dataclass(frozen=True)
class Setting:
    """The size of a run.

    Attributes:
        classes: indices of the star classes.
        reviews: reviews per class that each classifier is trained on.
        epochs: passes over them.
        updates: updates per head.
        batch: sequences per update.
        count: reviews drawn by each method.
        samples: samples of q and of sigma for the divergences.
        draws: samples of p0 that may be spent on the exact ones of one class.
    """

    classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    reviews: int = 1500
    epochs: int = 4
    updates: int = 50
    batch: int = 64
    count: int = 64
    samples: int = 100
    draws: int = 6000


QUICK = Setting(classes=(4,), reviews=1200, updates=25, batch=32, count=32, samples=24, draws=300)


# -- Drawing -----------------------------------------------------------------------------------
class Writer:
    """Draws reviews from an engine; its twist head is whichever was set last."""

    def __init__(self, llm: Any, count: int) -> None:
        self.llm, self.count = llm, count
        self.tokenizer = llm.get_tokenizer()
        self.prompt_ids = self.tokenizer(PROMPT).input_ids

    def _groups(self, seed: int, **extra: Any) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=PARTICLES if "twist" in extra else 1, max_tokens=MAX_TOKENS, seed=seed * 10**6 + i * 10**3,
                detokenize=False, extra_args=extra,
            )
            for i in range(self.count)
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": self.prompt_ids}] * self.count
        return self.llm.generate(prompts, params, use_tqdm=False)

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def plain(self, seed: int) -> list[list[list[int]]]:
        """Return groups of samples of p0."""
        return [[list(choice.token_ids) for choice in output.outputs] for output in self._groups(seed, twist=0)]

    def proposed(self, seed: int) -> list[list[int]]:
        """Return samples of the twist-induced proposal."""
        outputs = self._groups(seed, twist_particles=1)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def particles(self, potential: Classifier, seed: int) -> list[list[int]]:
        """Return one particle of every group of SMC for p0 phi, phi in the place of the head's last psi."""
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for output in self._groups(seed, twist_particles=PARTICLES, twist_return_particles=True):
            members = results(output)[0].particles or []
            rows = [member.token_ids for member in members]
            log_phi = potential(rows, self.texts(rows))
            log_w = [m.log_weight + value - m.log_psi for m, value in zip(members, log_phi, strict=True)]
            weights = torch.tensor(log_w, dtype=torch.float64).softmax(0)
            chosen.append(rows[int(torch.multinomial(weights, 1, generator=generator))])
        return chosen

    def best(self, groups: Sequence[list[list[int]]], potential: Classifier) -> list[list[int]]:
        """Return the sample with the highest phi of every group."""
        best = []
        for rows in groups:
            log_phi = potential(rows, self.texts(rows))
            best.append(rows[max(range(len(rows)), key=log_phi.__getitem__)])
        return best


# -- Figures -----------------------------------------------------------------------------------
def distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of distinct n-grams of words divided by the number of all."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def describe(rows: Sequence[Sequence[int]], writer: Writer, judge: Classifier) -> dict[str, Any]:
    """Return what the judge finds of reviews of one class, how varied they are, and the first three."""
    texts = writer.texts(rows)
    log_p = judge(list(map(list, rows)), texts)
    with torch.no_grad():
        inputs = judge.tokenizer([PROMPT + text for text in texts], padding=True, return_tensors="pt")
        found = judge.model(**inputs).logits.argmax(1)
    return {
        "in_class": (found == judge.label).double().mean().item(),
        "mean_p": torch.tensor(log_p).exp().mean().item(),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "distinct_texts": len(set(texts)) / len(texts),
        "texts": [sentence(PROMPT, text) for text in texts[:3]],
    }


def divergences(found: PromptEvaluation) -> dict[str, dict[str, float] | None]:
    """Return KL(q || sigma) and KL(sigma || q) of p0, of the twist-induced proposal, and what bounds those of SMC."""
    rows = {(row.proposal, row.particles): row for row in found.rows if row.resample}
    base, smc = rows["base", 1], rows["twist", PARTICLES]

    def minus(a: Estimate | None, b: Estimate | None) -> dict[str, float] | None:
        if a is None or b is None:
            return None
        return {"mean": a.mean - b.mean, "ci95": math.hypot(a.ci95, b.ci95)}

    return {
        "log_z": None if found.log_z is None else dataclasses.asdict(found.log_z),
        "p0_sigma": minus(found.log_z, base.lower),
        "sigma_p0": minus(base.upper, found.log_z),
        "q_sigma": None if found.kl_q_sigma is None else dataclasses.asdict(found.kl_q_sigma),
        "sigma_q": None if found.kl_sigma_q is None else dataclasses.asdict(found.kl_sigma_q),
        "smc_gap": minus(smc.upper, smc.lower),
    }


def draw_picture(classes: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw share in the class, distinct 3-grams and divergences, a group of bars per class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained", dpi=150)
    shares, grams, kls = figure.subplots(1, 3)
    colours = {"p0": "0.72", "best": "#c4562e", "q": "#7fb6cc", "smc": "#0b6e99"}
    for index, (key, name) in enumerate(METHODS.items()):
        at = [i + 0.2 * (index - 1.5) for i in range(len(classes))]
        for axis, figure_name in ((shares, "in_class"), (grams, "distinct_3")):
            values = [entry[key][figure_name] for entry in classes.values()]
            axis.bar(at, values, 0.18, color=colours[key], label=name)
    bars = (
        ("p0_sigma", "KL(p0 ‖ σ)", "0.72"), ("sigma_p0", "KL(σ ‖ p0)", "0.5"),
        ("q_sigma", "KL(q ‖ σ)", "#7fb6cc"), ("sigma_q", "KL(σ ‖ q)", "#0b6e99"),
    )  # fmt: skip
    for index, (key, name, colour) in enumerate(bars):
        found = [(i, entry["kl"][key]) for i, entry in enumerate(classes.values()) if entry["kl"][key] is not None]
        kls.bar(
            [i + 0.2 * (index - 1.5) for i, _ in found], [value["mean"] for _, value in found], 0.18, color=colour,
            yerr=[value["ci95"] for _, value in found], error_kw={"linewidth": 0.8, "capsize": 1.5}, label=name,
        )  # fmt: skip
    titles = ("share in the class, by the judge", "distinct 3-grams / all", "divergence from the target (nats)")
    for axis, title in zip((shares, grams, kls), titles, strict=True):
        axis.set_xticks(range(len(classes)), list(classes), fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.set_ylim(bottom=0)
    shares.set_ylim(0, 1)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    kls.legend(fontsize=8.5, frameon=False)
    figure.savefig(path)


def table(classes: dict[str, dict[str, Any]]) -> str:
    """Return two Markdown tables: shares and diversity, and divergences."""

    def estimate(value: dict[str, float] | None) -> str:
        return "-" if value is None else f"{value['mean']:.2f} ± {value['ci95']:.2f}"

    first = [
        [name, *(f"{entry[key]['in_class']:.0%}, {entry[key]['distinct_3']:.2f}" for key in METHODS)]
        for name, entry in classes.items()
    ]
    keys = ("log_z", "p0_sigma", "sigma_p0", "q_sigma", "sigma_q", "smc_gap")
    second = [[name, *(estimate(entry["kl"][key]) for key in keys)] for name, entry in classes.items()]
    names = ["log Z", "KL(p0 ‖ σ)", "KL(σ ‖ p0)", "KL(q ‖ σ)", "KL(σ ‖ q)", f"gap of SMC, K = {PARTICLES}"]
    return markdown(["class", *METHODS.values()], first) + "\n\n" + markdown(["class", *names], second)


# -- All of it ---------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/star-reviews"), help="folder of what comes out")
    parser.add_argument("--quick", action="store_true", help="two classes and small numbers, in seconds")
    args = parser.parse_args(argv)
    setting = QUICK if args.quick else Setting()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    accuracy = {}
    for name, seed in (("classifier", CLASSIFIER_SEED), ("judge", JUDGE_SEED)):
        accuracy[name] = train_classifier(
            args.out / name, CLASSES, lambda review: review.stars - 1,
            seed=seed, count=setting.reviews, epochs=setting.epochs,
        )  # fmt: skip
        print(f"  {name}: right on {accuracy[name]:.1%} of unseen reviews")

    classes: dict[str, dict[str, Any]] = {}
    sampler: Any = None
    writer: Writer | None = None
    plain: list[list[list[int]]] = []
    for index in tqdm(setting.classes, "classes", disable=None):
        name = CLASSES[index]
        potential, judge = (
            Classifier.from_pretrained(args.out / which, name, with_prompt=True) for which in ("classifier", "judge")
        )
        config = TrainingConfig(
            objective="ctl", head="mlp", max_tokens=MAX_TOKENS, particles=setting.batch, updates=setting.updates,
            lr=2e-3, seed=index,
        )  # fmt: skip
        trainer = TwistTrainer(MODEL, potential, config, sampler=sampler)
        if sampler is None:
            start_engine(trainer, PROMPT, 512)
            sampler = trainer.sampler
            writer = Writer(sampler.llm, setting.count)
            plain = writer.plain(seed=1)
        assert writer is not None
        trainer.train([PROMPT], progress=True)
        trainer.head.save_pretrained(args.out / f"head-{index + 1}")
        sampler.set_head(trainer.head)

        given = potential.given((), PROMPT)
        drawn = {
            "p0": [group[0] for group in plain],
            "best": writer.best(plain, given),
            "q": writer.proposed(seed=2),
            "smc": writer.particles(given, seed=3),
        }
        evaluation = EvaluationConfig(
            max_tokens=MAX_TOKENS, particles=(1, PARTICLES), repeats=setting.samples // 4, samples=setting.samples,
            max_draws=setting.draws, seed=4,
        )  # fmt: skip
        (found,) = Evaluator(sampler.llm, potential, evaluation).evaluate([PROMPT]).prompts
        classes[name] = {
            **{key: describe(rows, writer, judge.given((), PROMPT)) for key, rows in drawn.items()},
            "kl": divergences(found),
        }
    sampler.close()
    seconds = time.perf_counter() - began

    draw_picture(classes, args.out / "star-reviews.png")
    write_json(
        args.out / "star-reviews.json",
        {
            "prompt": PROMPT,
            "classes": classes,
            "accuracy": accuracy,
            "setting": dataclasses.asdict(setting),
            "seconds": seconds,
            "hardware": hardware(),
            "versions": versions(),
        },
    )
    for name, entry in classes.items():
        print(f"\n  {name}", *(f"    {METHODS[key]}: {entry[key]['texts'][0]}" for key in METHODS), sep="\n")
    print(f"\n  Share of {setting.count} reviews that the judge puts into the class, and their distinct 3-grams;")
    print(f"  divergences in nats:\n\n{table(classes)}\n")
    print(f"  {seconds:.0f} s on {hardware()} · {args.out}/star-reviews.png, star-reviews.json, heads, classifiers")


if __name__ == "__main__":
    main()
