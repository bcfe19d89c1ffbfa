"""Potentials that are models: classifiers of the text, and the language model's own probability of what follows."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_twist.config import did_you_mean
from vllm_twist.model_options import ModelOptions
from vllm_twist.potentials.base import Potential, _number

SCORES = ("log_probability", "logit", "threshold")
#: Tokens in one forward pass of a classifier, padding included.
MAX_TOKENS = 2**14
#: Tables of learned positions, by the last part of their names.
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


class Classifier(Potential):
    """A transformers sequence classifier that reads the text of the output.

        log_probability    log phi = beta log p(label | text)
        logit              log phi = beta * logit of the label
        threshold          log phi = log(1[logit >= threshold] + epsilon)

    Classifiers of several classes have p = softmax of the logits, those of a single logit r (and
    multi-label ones) a sigmoid: label 1 has the logit r and label 0 has -r.

    What is longer than ``max_length`` is cut at its beginning, so that outputs always differ where they
    end: of a prompt and an output the prompt goes first, and the output stays whole as long as it fits.
    Warnings count what was cut.

    A text without a token is read as one special token, the beginning of a sequence where there is one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: int | str,
        *,
        score: str = "log_probability",
        beta: float = 1.0,
        threshold: float = 0.0,
        epsilon: float = 1e-16,
        with_prompt: bool = False,
        prompt: str = "",
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        """Wrap a loaded classifier.

        Args:
            model: with a sequence-classification head; put into evaluation mode.
            tokenizer: the classifier's, not the language model's.
            label: index of the class, or its name in ``model.config.id2label``.
            score: one of ``SCORES``.
            beta: factor on the score (not for "threshold").
            threshold: what the logit has to reach.
            epsilon: phi of what does not reach it; 0 forbids it.
            with_prompt: whether the text to classify is the prompt and the output, not the output alone.
            prompt: the prompt's text; ``given`` sets it.
            batch_size: texts per forward pass, at most; those of very long texts are fewer.
            max_length: tokens of a text, special ones included; what the model takes by default.

        Raises:
            ValueError: a label or score that does not exist, or a number out of range.
        """
        if score not in SCORES:
            raise ValueError(
                f"`score` must be one of {', '.join(SCORES)}, got {score!r}{did_you_mean(score, SCORES)}: "
                "pass one of these."
            )
        if not 0 <= _number("epsilon", epsilon) < 1:
            raise ValueError(f"`epsilon` must lie in [0, 1), got {epsilon!r}: 1e-16 is the default, 0 forbids.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}: raise it.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.label = _label_index(model.config, label)
        self.score = score
        self.beta = _number("beta", beta)
        self.threshold = _number("threshold", threshold)
        self.epsilon = epsilon
        self.with_prompt = with_prompt
        self.prompt = prompt
        # Padding stands on the right, whatever the tokenizer does: there it moves no position and no causal
        # attention sees it. It is the padding of the model's config, for decoders read the last token that is not
        # that, and RoBERTa counts its positions by it. Rows of one text need none.
        config = model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        fits = pad is not None and 0 <= pad < getattr(config, "vocab_size", math.inf)
        if getattr(config, "summary_type", None) == "last":
            fits = False  # XLNet reads the last position, padding or not
        self.pad = pad if fits else 0
        self.batch_size = batch_size if fits else 1
        self.max_length, self.room = _lengths(model, tokenizer, max_length)
        self._cut = {"prompts": 0, "outputs": 0, "texts": 0, "told": 0}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        label: int | str,
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> Classifier:
        """Load model and tokenizer from a folder or a hub repository.

        Args:
            name: of the folder or repository.
            label: as in the constructor.
            trust_remote_code: whether to run the Python code that comes with the model.
            revision: branch, tag or commit on the hub.
            dtype: of the model; auto: its own.
            options: as in the constructor.

        Raises:
            ValueError: neither can be loaded, or the model comes without a trained head.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            files = ModelOptions(trust_remote_code=trust_remote_code, revision=revision, dtype=dtype).files
            tokenizer = AutoTokenizer.from_pretrained(name, **files)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, output_loading_info=True, **files
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`model` {str(name)!r} is no sequence classifier that transformers can load "
                f"({type(error).__name__}: {error}): check the name, and the connection if it is a hub id."
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"`model` {str(name)!r} has no weights for {', '.join(sorted(info['missing_keys']))}: pass a model "
                "that was trained as a sequence classifier."
            )
        return cls(model, tokenizer, label, **options)

    @property
    def log_bound(self) -> float:
        if self.score == "threshold":
            return math.log1p(self.epsilon)
        return 0.0 if self.score == "log_probability" and self.beta >= 0 else math.inf

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        if not self.with_prompt:
            return self
        other = copy.copy(self)
        other.prompt = prompt
        return other

    @torch.no_grad()
    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        rows = self._rows(texts)
        values = [0.0] * len(rows)
        for chosen in _batches([len(row["input_ids"]) for row in rows], self.batch_size, MAX_TOKENS):
            inputs = self._padded([rows[k] for k in chosen])
            found = self._of_logits(self.model(**inputs).logits.double()).tolist()
            for k, value in zip(chosen, found, strict=True):
                values[k] = value
        return values

    def _rows(self, texts: list[str]) -> list[dict[str, list[int]]]:
        """Return the tokenizer's columns for each text, none empty and none too long."""
        if not texts:
            return []
        whole = self.tokenizer(
            [self.prompt + text for text in texts],
            return_attention_mask=True, return_special_tokens_mask=True, truncation=False, padding=False, verbose=False,
        )  # fmt: skip
        special = whole.pop("special_tokens_mask")
        rows = [dict(zip(whole, columns, strict=True)) for columns in zip(*whole.values(), strict=True)]
        cut = []
        for k, row in enumerate(rows):
            length = len(row["input_ids"])
            if not length:
                rows[k] = {name: [int(name == "attention_mask")] for name in row}
                rows[k]["input_ids"] = [self._stand_in()]
            elif length > self.max_length:
                cut.append(k)
                drop = [i for i in range(length) if not special[k][i]][: length - self.max_length]
                gone = set(drop)
                rows[k] = {name: [v for i, v in enumerate(column) if i not in gone] for name, column in row.items()}
        if cut:
            self._tell(len(texts), [texts[k] for k in cut])
        else:
            self._cut["texts"] += len(texts)
        return rows

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad, "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0)}
        length = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor(
                [row[name] + [fill.get(name, 0)] * (length - len(row[name])) for row in rows], device=self.model.device
            )
            for name in rows[0]
        }

    def _stand_in(self) -> int:
        """Return the token that a text without any is read as."""
        config = self.model.config.get_text_config()
        for source in (self.tokenizer, config):
            for name in ("bos", "cls", "eos", "sep", "pad", "unk"):
                token = getattr(source, f"{name}_token_id", None)
                if isinstance(token, int) and 0 <= token < getattr(config, "vocab_size", math.inf):
                    return token
        raise ValueError(
            f"`texts` must hold at least one token each for {self}, whose tokenizer has no special ones, got '': set "
            "`with_prompt`, or give the tokenizer a beginning-of-sequence token."
        )

    def _tell(self, count: int, cut: list[str]) -> None:
        """Count the outputs whose text was cut, and warn when the first is and whenever their number has doubled."""
        lengths = map(len, self.tokenizer(cut, add_special_tokens=False, verbose=False).input_ids)
        outputs = sum(length > self.room for length in lengths)
        state = self._cut
        state["texts"] += count
        state["outputs"] += outputs
        state["prompts"] += len(cut) - outputs
        total = state["outputs"] + state["prompts"]
        if total < 2 * state["told"]:
            return
        state["told"] = total
        warnings.warn(
            f"{self} takes {self.max_length} tokens, and {total} of {state['texts']} texts so far were longer: of "
            f"{state['prompts']} the beginning of the prompt was cut, of {state['outputs']} that of the output, too; "
            "shorten them, or use a classifier with a longer context.",
            stacklevel=2,
        )

    def _of_logits(self, logits: Tensor) -> Tensor:
        """Return log phi [N] for logits [N, labels]."""
        single = logits.shape[1] == 1
        logit = logits[:, 0] * (1 if self.label else -1) if single else logits[:, self.label]
        if self.score == "threshold":
            return torch.log((logit >= self.threshold).double() + self.epsilon)
        if self.score == "logit":
            return self.beta * logit
        if single or self.model.config.problem_type == "multi_label_classification":
            return self.beta * torch.nn.functional.logsigmoid(logit)
        return self.beta * logits.log_softmax(1)[:, self.label]

    def __repr__(self) -> str:
        return f"Classifier({type(self.model).__name__}, label {self.label}, {self.score})"


def _lengths(model: Any, tokenizer: Any, max_length: int | None) -> tuple[int, int]:
    """Return how many tokens a text may have, with and without the special ones that the tokenizer adds.

    Raises:
        ValueError: a ``max_length`` that leaves no room for text, or for which the model has no positions.
    """
    tables = [
        # Positions begin after the padding's index where the table has one: RoBERTa's 514 hold 512 tokens.
        module.weight.shape[0] - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, torch.nn.Embedding)
    ]
    most = min(tables, default=math.inf)
    if max_length is None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = [getattr(tokenizer, "model_max_length", None), context, *tables]
        # XLNet's config has -1 for no limit.
        max_length = min((int(limit) for limit in limits if limit and limit > 0), default=sys.maxsize)
    special = tokenizer.num_special_tokens_to_add()
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not special < max_length <= most:
        raise ValueError(
            f"`max_length` must lie between {special + 1}, for the tokenizer adds {special} special tokens, and the "
            f"model's {most} positions, got {max_length!r}: leave it out for the most that model and tokenizer take."
        )
    return max_length, max_length - special


def _batches(lengths: Sequence[int], most: int, max_tokens: int) -> list[list[int]]:
    """Return the rows of each forward pass: of like length, ``most`` at most, padded to ``max_tokens`` at most."""
    batches: list[list[int]] = []
    for k in sorted(range(len(lengths)), key=lambda k: lengths[k]):
        if not batches or len(batches[-1]) == most or (len(batches[-1]) + 1) * lengths[k] > max_tokens:
            batches.append([])
        batches[-1].append(k)
    return batches


def _label_index(config: Any, label: int | str) -> int:
    """Return the index of a label given as such or by its name; a single logit has labels 0 and 1."""
    count = max(config.num_labels, 2)
    names = {str(name): int(index) for index, name in config.id2label.items()}
    if isinstance(label, str) and label in names:
        # A single logit speaks for its only name.
        return 1 if config.num_labels == 1 else names[label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
        return label
    known = [*names, *map(str, range(count))]
    raise ValueError(
        f"`label` must be a name or an index of the classifier's labels, {', '.join(names)} or 0 to {count - 1}, got "
        f"{label!r}{did_you_mean(label, known)}: pass one of these."
    )


class Continuation(Potential):
    """Infilling: phi = p0(o_T | s_0, s_1:T), the language model's own probability of a fixed continuation.

    sigma is then the law of what stands between the prompt and o_T, and Z that of o_T after the
    prompt (Zhao et al. 2024, Sec. 3.3). Evaluated by one teacher-forced pass.
    """

    def __init__(
        self,
        model: Any,
        continuation_ids: Sequence[int],
        *,
        prompt_ids: Sequence[int] = (),
        eos_token_id: int | None = None,
        batch_size: int = 64,
    ) -> None:
        """Condition a causal language model's outputs on what has to follow them.

        Args:
            model: the language model whose outputs are to be scored, in transformers.
            continuation_ids: o_T, at least one token, without a beginning-of-sequence token.
            prompt_ids: s_0; ``given`` sets it.
            eos_token_id: if given, outputs that end with this token have phi = 0: nothing follows them.
            batch_size: sequences per forward pass.

        Raises:
            ValueError: an empty continuation, or a batch size below 1.
        """
        if not len(continuation_ids):
            raise ValueError("`continuation_ids` must hold at least one token, got none: pass what has to follow.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}: raise it.")
        self.model = model.eval()
        self.continuation_ids = list(continuation_ids)
        self.prompt_ids = list(prompt_ids)
        self.eos_token_id = eos_token_id
        self.batch_size = batch_size

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        return Continuation(
            self.model,
            self.continuation_ids,
            prompt_ids=prompt_ids,
            eos_token_id=self.eos_token_id,
            batch_size=self.batch_size,
        )

    @property
    def log_bound(self) -> float:
        return 0.0

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        values = [-math.inf] * len(token_ids)
        open_ = [k for k, row in enumerate(token_ids) if not row or row[-1] != self.eos_token_id]
        open_.sort(key=lambda k: len(token_ids[k]))  # rows of like length go together
        for start in range(0, len(open_), self.batch_size):
            chosen = open_[start : start + self.batch_size]
            for k, value in zip(chosen, self._follow([token_ids[k] for k in chosen]), strict=True):
                values[k] = value
        return values

    @torch.no_grad()
    def _follow(self, outputs: list[list[int]]) -> list[float]:
        rows = [[*self.prompt_ids, *output, *self.continuation_ids] for output in outputs]
        length, count = max(map(len, rows)), len(self.continuation_ids)
        context = getattr(self.model.config, "max_position_embeddings", math.inf)
        if length > context or min(map(len, rows)) == count:
            raise ValueError(
                f"`token_ids` with prompt and continuation must hold {count + 1} to {context} tokens, got "
                f"{min(map(len, rows))} to {length}: give a prompt, or shorten it or the outputs."
            )
        # Padding on the right is never seen by what comes before it.
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.model.device)
        keep = length - min(map(len, rows)) + count + 1  # the last positions, which hold every continuation
        logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits.float()
        values = []
        for k, row in enumerate(rows):
            first = len(row) - count - 1 - (length - logits.shape[1])
            log_p = logits[k, first : first + count].log_softmax(-1)
            values.append(log_p.gather(1, ids[k, len(row) - count : len(row), None]).double().sum().item())
        return values

    def __repr__(self) -> str:
        return f"Continuation({len(self.continuation_ids)} tokens)"
