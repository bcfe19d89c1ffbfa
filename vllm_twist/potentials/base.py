"""Potentials: log phi of finished outputs, what makes a target of a language model.

    sigma(s_1:T) = p0(s_1:T) phi(s_1:T) / Z        (Zhao et al. 2024, arXiv 2404.17546, Eq. 1)

A ``Potential`` is called with the token ids of outputs (the terminating token included, the prompt
not) and their texts, and returns log phi (nats) of each: finite, or -inf where the target forbids
one. ``load_potential`` makes one from what a user can name on a command line.

    potential = load_potential("my_rewards.py:log_phi")
    target = 10 * potential + Classifier.from_pretrained("my/classifier", "POSITIVE") - 2.0

Sums multiply the phi, and scaling raises phi to a power: exp(beta r) is ``beta * r`` (Eq. 19).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_twist.config import did_you_mean
from vllm_twist.model_options import ModelOptions

#: Maps output tokens (the terminating one included, the prompt not) and their texts to log phi (nats).
LogPhi = Callable[[list[list[int]], list[str]], list[float]]

POTENTIAL_NAME = "potential.json"


class Potential(ABC):
    """log phi of finished outputs. Subclasses give ``log_phi``; a call checks what goes in and comes out."""

    @abstractmethod
    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> Sequence[float]:
        """Return log phi (nats) of each of N outputs; -inf where phi = 0."""

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        """Return the potential of outputs that follow this prompt: itself, unless it reads prompts."""
        return self

    @property
    def log_bound(self) -> float:
        """An upper bound of log phi over all outputs, +inf where none is known; rejection sampling needs one."""
        return math.inf

    def __call__(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        """Return log phi (nats) of each of N outputs, finite or -inf.

        Raises:
            ValueError: as many texts as outputs are not given, or the potential fails or does not
                return N numbers below +inf.
        """
        if len(token_ids) != len(texts):
            raise ValueError(
                f"`texts` must hold one text per output, {len(token_ids)}, got {len(texts)}: decode every output."
            )
        if not token_ids:
            return []
        return _log_values(self, self.log_phi(token_ids, texts), len(token_ids))

    def __add__(self, other: Potential | float) -> Potential:
        return Sum((self, _as_potential(other)))

    def __radd__(self, other: float) -> Potential:
        return _as_potential(other) + self

    def __sub__(self, other: Potential | float) -> Potential:
        return self + -1 * _as_potential(other)

    def __mul__(self, scale: float) -> Potential:
        return Scaled(self, scale)

    __rmul__ = __mul__

    def __neg__(self) -> Potential:
        return Scaled(self, -1)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}: pass a plain number.")
    return float(value)


def _as_potential(value: Potential | float) -> Potential:
    return value if isinstance(value, Potential) else Constant(value)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _log_values(potential: Potential, values: Any, count: int, per: str = "output") -> list[float]:
    """Return the values as floats if there are ``count`` of them, none of them NaN or +inf."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`potential` {potential} must return a list of numbers, got {type(values).__name__} ({error}): "
            f"return log phi of every {per}."
        ) from error
    if len(numbers) != count:
        raise ValueError(
            f"`potential` {potential} must return {count} values, one per {per}, got {len(numbers)}: "
            f"return log phi of every {per}, in order."
        )
    for row, number in enumerate(numbers):
        if math.isnan(number) or number == math.inf:
            raise ValueError(
                f"`potential` {potential} must return numbers below +inf, got {number} for {per} {row}: "
                "return log phi, -inf where phi is 0; a negative multiple of -inf is +inf."
            )
    return numbers


# -- Sums and scalings -------------------------------------------------------------------------
class Constant(Potential):
    """The same log phi for every output: a factor of Z, and nothing else."""

    def __init__(self, value: float) -> None:
        self.value = _number("potential", value)

    @property
    def log_bound(self) -> float:
        return self.value

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        return [self.value] * len(token_ids)

    def __repr__(self) -> str:
        return f"{self.value:g}"


class Sum(Potential):
    """log phi = log phi_1 + log phi_2 + ..."""

    def __init__(self, parts: Sequence[Potential]) -> None:
        self.parts = tuple(parts)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        values = [part(token_ids, texts) for part in self.parts]
        return [math.fsum(row) for row in zip(*values, strict=True)]

    @property
    def log_bound(self) -> float:
        return sum(part.log_bound for part in self.parts)

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        return Sum([part.given(prompt_ids, prompt) for part in self.parts])

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self.parts))})"


class Scaled(Potential):
    """log phi = scale * log phi_1; a scale of 0 is log phi = 0, also where phi_1 = 0."""

    def __init__(self, part: Potential, scale: float) -> None:
        self.part = part
        self.scale = _number("scale", scale)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        return [self.scale * value if self.scale else 0.0 for value in self.part(token_ids, texts)]

    @property
    def log_bound(self) -> float:
        return self.scale * self.part.log_bound if self.scale > 0 else 0.0 if self.scale == 0 else math.inf

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        return Scaled(self.part.given(prompt_ids, prompt), self.scale)

    def __repr__(self) -> str:
        return f"{self.scale:g} * {self.part}"


# -- Functions ---------------------------------------------------------------------------------
class Function(Potential):
    """A Python callable ``log_phi(token_ids: list[list[int]], texts: list[str]) -> list[float]``."""

    def __init__(self, function: LogPhi, name: str | None = None) -> None:
        self.function = function
        self.name = name or _name_of(function)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> Sequence[float]:
        try:
            return self.function(token_ids, texts)
        except Exception as error:
            raise ValueError(
                f"`potential` {self.name} must return log phi of {len(token_ids)} outputs, but raised "
                f"{type(error).__name__}: {error}: it is called as log_phi(token_ids, texts)."
            ) from error

    def __repr__(self) -> str:
        return self.name


class Intermediate(Potential):
    """Potentials of every prefix: phi = prod_t phi_t(s_1:t) (Zhao et al. 2024, App. B.1).

    As a ``Potential`` it is the product, so that every objective applies as it is. What they learn is
    then the twist of the whole, whose optimum is the product of what is past and what is to come,

        log psi'_t = sum_{tau < t} log phi_tau + log psi_t        log psi*_t = log phi_t + log Phi*_t

    and a head that need not learn the past has ``past`` added to its log psi in the loss. The weights
    of SMC with such a head are those of Eq. 47: w_t = phi_{t-1} psi_t / psi_{t-1} * p0 / q.
    """

    def __init__(self, log_phi_t: Callable[[list[list[int]]], Sequence[Sequence[float]]]) -> None:
        """``log_phi_t`` maps N outputs to a row each: log phi_t of the prefixes of 1, 2, ... tokens."""
        self.log_phi_t = log_phi_t

    def steps(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Return log phi_t of every prefix of each output.

        Raises:
            ValueError: a row that does not hold one number below +inf for every token.
        """
        rows = self.log_phi_t(token_ids)
        if not isinstance(rows, Sequence) or len(rows) != len(token_ids):
            got = len(rows) if isinstance(rows, Sequence) else type(rows).__name__
            raise ValueError(
                f"`potential` {self} must return {len(token_ids)} rows, one per output, got {got}: "
                "return log phi_t of every prefix."
            )
        return [_log_values(self, row, len(output), "token") for row, output in zip(rows, token_ids, strict=True)]

    def past(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Return, for every prefix of each output, the sum of log phi_tau over tau < t."""
        return [[math.fsum(row[:t]) for t in range(len(row))] for row in self.steps(token_ids)]

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        return [math.fsum(row) for row in self.steps(token_ids)]

    def __repr__(self) -> str:
        return _name_of(self.log_phi_t)


class TokenLogistic(Potential):
    """phi = sigmoid(bias + sum of the weights of the output's tokens): a label's probability.

    Saved as JSON: ``bias``, a number, and ``weights``, one number per token of the vocabulary.
    """

    def __init__(self, bias: float, weights: Sequence[float]) -> None:
        self.bias = _number("bias", bias)
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(
                f"`weights` must be a list of numbers, got {type(weights).__name__}: pass one per token of the "
                "vocabulary."
            )
        self.weights = [_number("weights", weight) for weight in weights]

    @property
    def log_bound(self) -> float:
        return 0.0

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        highest = max(max(row, default=0) for row in token_ids)
        if highest >= len(self.weights):
            raise ValueError(
                f"`token_ids` must lie below {len(self.weights)}, the number of weights, got {highest}: use the "
                "potential with the model whose tokenizer it was made for."
            )
        logits = torch.tensor([self.bias + sum(self.weights[i] for i in row) for row in token_ids])
        return torch.nn.functional.logsigmoid(logits).tolist()

    def save(self, path: str | Path) -> None:
        """Write the file that ``load_potential`` reads."""
        Path(path).write_text(json.dumps({"bias": self.bias, "weights": self.weights}) + "\n")

    def __repr__(self) -> str:
        return f"TokenLogistic({len(self.weights)} weights)"


# -- Models ------------------------------------------------------------------------------------
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


# -- Loading -----------------------------------------------------------------------------------
def load_potential(spec: str | Path | LogPhi | Potential, *, model: Any = None, tokenizer: Any = None) -> Potential:
    """Return the potential that ``spec`` names.

    It is one of

        module:attribute     a ``Potential``, or a callable log_phi(token_ids, texts) -> list[float]
        path.py:attribute    likewise, from a file
        potential.json       or a folder with such a file, holding one of
                             {"bias": b, "weights": [...]}               a ``TokenLogistic``
                             {"type": "classifier", "model": folder or hub id, "label": ..., ...}
                             {"type": "continuation", "text": "..."}
        a callable, or a ``Potential``, which is returned as it is

    Further keys of a classifier are the options of ``Classifier`` and of its ``from_pretrained``.

    Args:
        spec: what to load. Code that it names is run.
        model: the language model that is sampled, for a continuation.
        tokenizer: its tokenizer, for a continuation.

    Raises:
        ValueError: anything that is missing, malformed or unknown.
    """
    if isinstance(spec, Potential):
        return spec
    if isinstance(spec, str | Path):
        path = Path(spec)
        if path.suffix == ".json" or path.is_dir():
            return _from_json(path / POTENTIAL_NAME if path.is_dir() else path, model, tokenizer)
        source, colon, attribute = str(spec).rpartition(":")
        if not colon or not source or not attribute:
            raise ValueError(
                f"`potential` must be module:attribute, path.py:attribute, a {POTENTIAL_NAME} or a folder with one, "
                f"got {str(spec)!r}: name where log_phi is found."
            )
        found = _attribute(source, attribute)
    else:
        found = spec
    if isinstance(found, Potential):
        return found
    if isinstance(found, type) or not callable(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise ValueError(
            f"`potential` {spec} must be a callable log_phi(token_ids, texts) or a Potential, got {what}: "
            "pass a function or an instance."
        )
    return Function(found, str(spec) if isinstance(spec, str | Path) else None)


def reads_model(spec: Any) -> bool:
    """Return whether ``load_potential`` needs the language model for this: a file that says "continuation"."""
    if not isinstance(spec, str | Path):
        return False
    path = Path(spec) / POTENTIAL_NAME if Path(spec).is_dir() else Path(spec)
    try:
        fields = json.loads(path.read_text()) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return False  # load_potential says what is wrong
    return isinstance(fields, dict) and fields.get("type") == "continuation"


def _attribute(source: str, attribute: str) -> Any:
    """Return an attribute, possibly dotted, of a module or of a Python file."""
    where = f"`potential` {source}:{attribute}"
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise ValueError(f"{where} must name a Python file, got none at {source!r}: check the path.")
    try:
        module = _from_file(Path(source)) if is_file else importlib.import_module(source)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{source}.".startswith(f"{absent}."):
            raise ValueError(
                f"{where} must name a module that can be imported, got {source!r}, which is not found: check "
                "the name, put it on PYTHONPATH, or give the file as path.py:attribute."
            ) from error
        raise ValueError(
            f"{where} must be importable, but that raised {type(error).__name__}: {error}: fix the module."
        ) from error
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [known for known in dir(found) if not known.startswith("_")]
            raise ValueError(
                f"{where} must name an attribute of {source}, got {name!r}, which it has not"
                f"{did_you_mean(name, known)}: check the name."
            )
        found = getattr(found, name)
    return found


def _from_file(path: Path) -> Any:
    name = f"_vllm_twist_potential_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclass(frozen=True)
class _Kind:
    """A type of JSON potential: how it is built, and the keys it needs and may have."""

    build: Callable[[dict[str, Any], Any, Any], Potential]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def _classifier(fields: dict[str, Any], model: Any, tokenizer: Any) -> Potential:
    return Classifier.from_pretrained(fields.pop("model"), fields.pop("label"), **fields)


def _continuation(fields: dict[str, Any], model: Any, tokenizer: Any) -> Potential:
    if model is None or tokenizer is None:
        raise ValueError(
            "`model` and `tokenizer` must be given for a continuation, got None: its phi is the language model's own."
        )
    return Continuation(model, tokenizer(fields["text"], add_special_tokens=False).input_ids)


KINDS = {
    "token_logistic": _Kind(lambda fields, model, tokenizer: TokenLogistic(**fields), ("bias", "weights")),
    "classifier": _Kind(
        _classifier,
        ("model", "label"),
        (
            "score", "beta", "threshold", "epsilon", "with_prompt", "batch_size", "max_length", "trust_remote_code",
            "revision", "dtype",
        ),
    ),
    "continuation": _Kind(_continuation, ("text",)),
}


def _from_json(path: Path, model: Any, tokenizer: Any) -> Potential:
    where = f"`potential` {str(path)!r}"
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({type(error).__name__}): check the path.") from error
    except ValueError as error:
        raise ValueError(f"{where} must hold JSON, got otherwise ({error}): write it anew.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(fields).__name__}: write it anew.")
    name = fields.pop("type", "token_logistic")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"{where}: `type` must be one of {', '.join(KINDS)}, got {name!r}{did_you_mean(name, list(KINDS))}: "
            "pass one of these."
        )
    known = kind.required + kind.optional
    for key in fields:
        if key not in known:
            raise ValueError(
                f"{where}: the keys of a {name} must be among {', '.join(known)}, got {key!r}"
                f"{did_you_mean(key, known)}: rename or remove it."
            )
    for key in kind.required:
        if key not in fields:
            raise ValueError(f"{where}: a {name} must have the key `{key}`, got none: add it.")
    return kind.build(fields, model, tokenizer)
