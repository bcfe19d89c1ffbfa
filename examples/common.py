"""What the examples share: graded reviews, small classifiers trained on them, a quiet start of the engine, pictures.

The reviews come from the grammar that the shipped language model's corpus was written by, but are drawn anew
from seeds of their own. The language model has seen none of their labels, and no two classifiers share a review.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from scripts.make_tiny import SENTIMENT_RULES, Review
from vllm_twist.training import TwistTrainer

logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "models" / "tiny-reviews")

#: Rules of the grammar that say something good or bad; the others with two versions are parts of these.
STATEMENTS = frozenset(SENTIMENT_RULES) - {"opinion", "after", "problem"} | {"clause"}


# -- Labelled reviews --------------------------------------------------------------------------
class GradedReview(Review):
    """A review that counts what it says: bad statements and good ones."""

    def __init__(self, rng: random.Random) -> None:
        self.said = [0, 0]
        super().__init__(rng)

    def _fill(self, hole: str, positive: bool) -> str:
        if hole in STATEMENTS:
            self.said[positive] += 1
        return super()._fill(hole, positive)

    @property
    def stars(self) -> int:
        """1 to 5 for the share of good statements, rounded to quarters: 0, 1/4, 1/2, 3/4, 1; after ``write``."""
        bad, good = self.said
        return 1 + round(4 * good / (bad + good))


def labelled(count: int, classes: int, label: Callable[[GradedReview], int], seed: int) -> list[tuple[str, int]]:
    """Return ``count`` reviews of each class with their class, from 0, in random order.

    Args:
        count: reviews per class.
        classes: number of classes.
        label: of a written review.
        seed: of the reviews.
    """
    rng = random.Random(f"labelled reviews {seed}")
    found: list[list[str]] = [[] for _ in range(classes)]
    while min(map(len, found)) < count:
        review = GradedReview(rng)
        text = review.write()
        if len(of_class := found[label(review)]) < count:
            of_class.append(text)
    rows = [(text, index) for index, texts in enumerate(found) for text in texts]
    rng.shuffle(rows)
    return rows


# -- Classifiers -------------------------------------------------------------------------------
def train_classifier(
    folder: Path,
    names: Sequence[str],
    label: Callable[[GradedReview], int],
    *,
    seed: int,
    count: int,
    epochs: int = 4,
    cut: bool = False,
    width: int = 64,
) -> float:
    """Train a small BERT on reviews of its own, save it, and return its accuracy on unseen ones.

    A single name makes a classifier with a single logit, whose sigmoid is the probability of class 1. Every class has
    the same number of reviews, so that p(class | text) is that of balanced classes.

    Args:
        folder: where the classifier and its tokenizer go.
        names: of the classes.
        label: class of a written review, from 0.
        seed: of the reviews and of the training.
        count: reviews per class to train on; a quarter as many are held out.
        epochs: passes over them.
        cut: whether to cut reviews at random, for texts that are.
        width: of the hidden states.
    """
    rows = labelled(count + count // 4, max(len(names), 2), label, seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer([text for text, _ in rows]).input_ids
    if cut:
        rng = random.Random(seed)
        ids = [row[: rng.randint(min(6, len(row)), len(row))] for row in ids]
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )  # fmt: skip
    )
    tokenizer.model_max_length = 128

    def logits(batch: Sequence[int]) -> torch.Tensor:
        inputs = tokenizer.pad({"input_ids": [ids[i][:128] for i in batch]}, return_tensors="pt")
        return model(inputs.input_ids, attention_mask=inputs.attention_mask).logits

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(names) == 1:
            return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
        return torch.nn.functional.cross_entropy(logits, labels)

    def classes(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 0] > 0).long() if len(names) == 1 else logits.argmax(1)

    labels = torch.tensor([index for _, index in rows])
    held_out, training = range(len(rows) // 5), range(len(rows) // 5, len(rows))
    size = 64
    steps = epochs * (len(training) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = tqdm(total=steps, desc=f"  training {folder.name}", leave=False, file=sys.stdout, ncols=72)
    for _ in range(epochs):
        # Reviews of like length go together.
        order = (torch.randperm(len(training)) + training.start).tolist()
        pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        batches = [b for pool in pools for b in _batches(sorted(pool, key=lambda i: len(ids[i])), size)]
        random.Random(len(batches)).shuffle(batches)
        for batch in batches[: steps // epochs]:
            loss = loss_of(logits(batch), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    model.eval()
    with torch.no_grad():
        right = sum((classes(logits(batch)) == labels[batch]).sum().item() for batch in _batches(list(held_out), 256))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return right / len(held_out)


def _batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# -- The engine --------------------------------------------------------------------------------
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the engine's start-up messages, its processes' too, for the case that it fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+") as messages:
        os.dup2(messages.fileno(), 2)
        try:
            yield
        except BaseException:
            messages.seek(0)
            os.write(kept, messages.read().encode())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def seconds_bar(what: str, expected: int) -> Iterator[None]:
    """Show a bar that moves by the second while something runs that reports no progress of its own.

    Not in a file or a pipe, where its control characters would stay.
    """
    if not sys.stdout.isatty():
        yield
        return
    done = threading.Event()

    def move() -> None:
        form = "{desc} {bar} {elapsed}"
        with tqdm(total=expected, desc=what, bar_format=form, ncols=72, leave=False, file=sys.stdout) as bar:
            while not done.wait(1):
                bar.update(bar.n < expected - 1)
                bar.refresh()

    mover = threading.Thread(target=move)
    mover.start()
    try:
        yield
    finally:
        done.set()
        mover.join()


def start_engine(trainer: TwistTrainer, prompt: str, sequences: int) -> None:
    """Give a trainer an engine with a tokenizer that runs up to ``sequences`` continuations of the prompt at once."""
    from vllm_twist.training.samplers.vllm import EngineSampler

    length = len(trainer.tokenizer(prompt).input_ids)
    with seconds_bar("  starting the engine", expected=25), quiet():
        trainer.sampler = EngineSampler(
            MODEL,
            trainer.head,
            end_ids=trainer.end_ids,
            max_model_len=length + trainer.config.max_tokens + trainer.config.condition_tokens,
            max_num_seqs=sequences,
            dtype="float32",
            skip_tokenizer_init=False,
        )


# -- What comes out ----------------------------------------------------------------------------
def sentence(prompt: str, text: str) -> str:
    """Return prompt and output on one line."""
    return " ".join((prompt + text).split())


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
