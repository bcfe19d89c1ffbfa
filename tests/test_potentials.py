"""Potentials against their definitions on tiny random models, and every way of getting one wrong."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from vllm_twist import potentials
from vllm_twist.potentials import (
    Classifier,
    Constant,
    Continuation,
    Function,
    Intermediate,
    Potential,
    TokenLogistic,
    load_potential,
)

OUTPUTS = [[3, 4, 1], [5], [4, 4, 4, 4, 1]]
TEXTS = ["good bad", "fine", "bad bad bad bad"]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "was")


def lengths(token_ids, texts):
    return [-float(len(row)) for row in token_ids]


def zero_for_short(token_ids, texts):
    return [-math.inf if len(row) < 2 else -0.5 for row in token_ids]


# -- Algebra -----------------------------------------------------------------------------------
def test_a_function_sees_outputs_and_texts():
    seen = []
    assert Function(lambda token_ids, texts: seen.append((token_ids, texts)) or [0, -1.5, -math.inf])(
        OUTPUTS, TEXTS
    ) == [0.0, -1.5, -math.inf]
    assert seen == [(OUTPUTS, TEXTS)]


def test_numbers_of_any_kind_become_floats():
    for values in (torch.tensor([-1.0, 0.0, -2.5]), torch.tensor([-1.0, 0.0, -2.5]).numpy(), (-1, 0, -2.5)):
        got = Function(lambda token_ids, texts, values=values: values)(OUTPUTS, TEXTS)
        assert got == [-1.0, 0.0, -2.5] and all(type(value) is float for value in got)


def test_sums_multiply_phi_and_scalings_raise_it_to_a_power():
    a, b = Function(lengths), Function(zero_for_short)
    cases: list[tuple[Potential, list[float]]] = [
        (a + b, [-3.5, -math.inf, -5.5]),
        (a + 1, [-2.0, 0.0, -4.0]),
        (1.5 + a, [-1.5, 0.5, -3.5]),
        (b - a, [2.5, -math.inf, 4.5]),
        (a - 2.0, [-5.0, -3.0, -7.0]),
        (2 * a, [-6.0, -2.0, -10.0]),
        (a * 0.5 + b * 2, [-2.5, -math.inf, -3.5]),
        (-a, [3.0, 1.0, 5.0]),
        (sum([a, a, 3 * a]), [-15.0, -5.0, -25.0]),
        (10 * (a + b), [-35.0, -math.inf, -55.0]),
        (0 * b, [0.0, 0.0, 0.0]),  # phi^0 = 1, not the NaN of 0 * -inf
        (Constant(0.25), [0.25, 0.25, 0.25]),
    ]
    for potential, expected in cases:
        assert potential(OUTPUTS, TEXTS) == pytest.approx(expected), potential
        assert potential([], []) == []
    assert repr(2 * a + b - 1) == "((2 * lengths + zero_for_short) + -1 * 1)"


def test_a_part_that_reads_the_prompt_gets_it_through_the_algebra():
    class Prompted(Potential):
        value = 0.0

        def given(self, prompt_ids, prompt):
            other = Prompted()
            other.value = prompt_ids[0] + len(prompt)
            return other

        def log_phi(self, token_ids, texts):
            return [self.value] * len(texts)

    potential = 3 * (Prompted() + Function(lengths)) - 1
    assert potential(OUTPUTS, TEXTS) == [-10, -4, -16]
    assert potential.given([7], "ab")(OUTPUTS, TEXTS) == [17, 23, 11]
    assert potential(OUTPUTS, TEXTS) == [-10, -4, -16]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda i, t: [0.0, 0.0], "must return 3 values, one per output, got 2: return log phi of every output"),
        (lambda i, t: [0.0, math.nan, 0.0], "must return numbers below .inf, got nan for output 1"),
        (lambda i, t: [0.0, 0.0, math.inf], "must return numbers below .inf, got inf for output 2"),
        (lambda i, t: None, "must return a list of numbers, got NoneType"),
        (lambda i, t: 1.0, "must return a list of numbers, got float"),
        (lambda i, t: ["a", "b", "c"], "must return a list of numbers, got list"),
        (lambda i, t: torch.zeros(3, 2), "must return a list of numbers, got Tensor"),
        (lambda i, t: 1 / 0, "must return log phi of 3 outputs, but raised ZeroDivisionError: division by zero"),
        (
            lambda i: [0.0] * 3,
            r"must return log phi of 3 outputs, but raised TypeError: .*it is called as log_phi\(token_ids, texts\)",
        ),
    ],
)
def test_bad_values_are_named(function, message):
    potential = Function(function, "mine.py:log_phi")
    with pytest.raises(ValueError, match=f"`potential` mine.py:log_phi {message}"):
        potential(OUTPUTS, TEXTS)
    with pytest.raises(ValueError, match=f"`potential` mine.py:log_phi {message}"):
        (2 * potential + Function(lengths))(OUTPUTS, TEXTS)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`texts` must hold one text per output, 3, got 2: decode every output"):
        Function(lengths)(OUTPUTS, TEXTS[:2])
    with pytest.raises(ValueError, match="must return numbers below .inf, got inf for output 1.* multiple of -inf"):
        (-1 * Function(zero_for_short))(OUTPUTS, TEXTS)
    for scale in (math.nan, math.inf, "2", True):
        with pytest.raises(ValueError, match="`scale` must be a finite number, got"):
            Function(lengths) * scale
    with pytest.raises(ValueError, match="`potential` must be a finite number, got 'x': pass a plain number"):
        Function(lengths) + "x"


# -- Intermediate potentials -------------------------------------------------------------------
def step_potential(token_ids):
    """log phi_t = -(s_t + 0.1 t + 0.3 s_{t-1} s_t)."""
    return [
        [-(s + 0.1 * t + 0.3 * s * (row[t - 2] if t > 1 else 0)) for t, s in enumerate(row, 1)] for row in token_ids
    ]


def test_intermediate_potentials_multiply_up():
    potential = Intermediate(step_potential)
    rows = step_potential(OUTPUTS)
    assert potential.steps(OUTPUTS) == rows
    assert potential(OUTPUTS, TEXTS) == pytest.approx([sum(row) for row in rows])
    assert potential.past(OUTPUTS)[0] == pytest.approx([0, rows[0][0], rows[0][0] + rows[0][1]])
    assert repr(2 * potential) == "2 * step_potential"


def test_the_optimal_twist_of_the_whole_is_past_present_and_future():
    """log E[prod of all phi | s_1:t] = past + log phi_t + log E[prod of later phi | s_1:t], enumerated."""
    potential, horizon = Intermediate(step_potential), 4
    generator = torch.Generator().manual_seed(0)
    p = {
        prefix: torch.rand(2, generator=generator).softmax(0).tolist()
        for t in range(horizon)
        for prefix in itertools.product(range(2), repeat=t)
    }

    def expectation(prefix, value):
        total = 0.0
        for rest in itertools.product(range(2), repeat=horizon - len(prefix)):
            s = (*prefix, *rest)
            total += math.prod(p[s[:t]][s[t]] for t in range(len(prefix), horizon)) * math.exp(value(list(s)))
        return math.log(total)

    for prefix in [prefix for prefix in p if prefix]:
        t = len(prefix)
        whole = expectation(prefix, lambda s: potential([s], [""])[0])
        future = expectation(prefix, lambda s, t=t: sum(potential.steps([s])[0][t:]))
        steps, past = potential.steps([list(prefix)])[0], potential.past([list(prefix)])[0]
        assert whole == pytest.approx(past[-1] + steps[-1] + future, abs=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda ids: [[0.0]], "must return 3 rows, one per output, got 1"),
        (lambda ids: None, "must return 3 rows, one per output, got NoneType"),
        (lambda ids: [[0.0] for _ in ids], "must return 3 values, one per token, got 1"),
        (lambda ids: [[math.nan] * len(row) for row in ids], "must return numbers below .inf, got nan for token 0"),
    ],
)
def test_bad_steps_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        Intermediate(function)(OUTPUTS, TEXTS)


# -- Token counts ------------------------------------------------------------------------------
def test_token_logistic_is_the_sigmoid_of_a_sum(tmp_path: Path):
    weights = [0.0, -0.25, 0.0, 1.5, -2.0, 0.75]
    potential = TokenLogistic(0.5, weights)
    expected = [-math.log1p(math.exp(-(0.5 + sum(weights[i] for i in row)))) for row in OUTPUTS]
    assert potential(OUTPUTS, TEXTS) == pytest.approx(expected, rel=1e-6)  # float32
    assert potential([[4] * 500], [""]) == pytest.approx([-999.5])  # no log of 0
    potential.save(tmp_path / "potential.json")
    for spec in (tmp_path, str(tmp_path), tmp_path / "potential.json"):
        assert load_potential(spec)(OUTPUTS, TEXTS) == potential(OUTPUTS, TEXTS)


def test_the_shipped_potential_likes_praise(repo_root: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(repo_root / "models/tiny-reviews")
    potential = load_potential(repo_root / "models/tiny-reviews-positive")
    texts = [" blender and I love it. Highly recommend!", " blender and I hate it. A waste of money."]
    good, bad = potential(tokenizer(texts, add_special_tokens=False).input_ids, texts)
    assert bad < math.log(0.5) < good < 0


def test_misuse_of_token_logistic_is_named():
    with pytest.raises(ValueError, match="`token_ids` must lie below 4, the number of weights, got 5"):
        TokenLogistic(0.0, [0.0] * 4)(OUTPUTS, TEXTS)
    with pytest.raises(ValueError, match="`weights` must be a list of numbers, got str"):
        TokenLogistic(0.0, "0")
    with pytest.raises(ValueError, match="`weights` must be a finite number, got nan"):
        TokenLogistic(0.0, [0.0, math.nan])
    with pytest.raises(ValueError, match="`bias` must be a finite number, got None"):
        TokenLogistic(None, [0.0])


# -- Classifiers -------------------------------------------------------------------------------
def word_tokenizer(special: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, unk_token="[UNK]", pad_token="[PAD]" if pad else None
    )


def bert(labels: int, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(labels)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            initializer_range=0.3,
            num_labels=labels,
            **options,
        )
    )


def llama(labels: int, pad_token_id: int | None = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(labels)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            initializer_range=0.3,
            num_labels=labels,
            pad_token_id=pad_token_id,
        )
    )


@torch.no_grad()
def logits_one_by_one(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    model.eval()
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts]).double()


CLASSIFIERS = {"encoder": lambda: (bert(3), word_tokenizer()), "decoder": lambda: (llama(3), word_tokenizer(False))}


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_classifier_of_several_classes(make, batch_size):
    """Padded batches give what single texts give, 1e-5: float32 in another order."""
    model, tokenizer = make()
    logits = logits_one_by_one(model, tokenizer, TEXTS)
    assert logits.std() > 0.1
    for label in range(3):

        def potential(label=label, **options):
            return Classifier(model.train(), tokenizer, label, batch_size=batch_size, **options)(OUTPUTS, TEXTS)

        log_p = logits.log_softmax(1)[:, label]
        assert potential() == pytest.approx(log_p.tolist(), abs=1e-5)
        assert potential(beta=10.0) == pytest.approx((10 * log_p).tolist(), abs=1e-4)
        logit = logits[:, label]
        assert potential(score="logit", beta=-2.0) == pytest.approx((-2 * logit).tolist(), abs=1e-5)
        threshold = logit.median().item() - 1e-3
        inside = [value >= threshold for value in logit.tolist()]
        assert sorted(inside) == [False, True, True]
        for epsilon, floor in ((1e-16, math.log(1e-16)), (0.0, -math.inf)):
            got = potential(score="threshold", threshold=threshold, epsilon=epsilon)
            assert got == pytest.approx([0.0 if i else floor for i in inside], abs=1e-12)


def test_classifier_of_one_logit_has_two_labels():
    """p(1) = sigmoid(r) and p(0) = 1 - sigmoid(r), whose logit is -r: the toxicity target of the paper."""
    model, tokenizer = bert(1), word_tokenizer()
    r = logits_one_by_one(model, tokenizer, TEXTS)[:, 0]
    by_label = [torch.tensor(Classifier(model, tokenizer, label)(OUTPUTS, TEXTS)).double() for label in (0, 1)]
    torch.testing.assert_close(by_label[1], r.sigmoid().log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_label[0].exp() + by_label[1].exp(), torch.ones(3).double(), atol=1e-6, rtol=0)
    assert Classifier(model, tokenizer, 0, score="logit")(OUTPUTS, TEXTS) == pytest.approx((-r).tolist(), abs=1e-5)
    assert Classifier(model, tokenizer, "LABEL_0")(OUTPUTS, TEXTS) == pytest.approx(by_label[1].tolist())


def test_multi_label_classifier_has_a_sigmoid_per_label():
    model, tokenizer = bert(3, problem_type="multi_label_classification"), word_tokenizer()
    logits = logits_one_by_one(model, tokenizer, TEXTS)
    got = Classifier(model, tokenizer, 2)(OUTPUTS, TEXTS)
    assert got == pytest.approx(torch.nn.functional.logsigmoid(logits[:, 2]).tolist(), abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])  # where the tokenizer would cut
def test_long_texts_are_cut_at_the_beginning(side):
    model, tokenizer = bert(2), word_tokenizer()
    tokenizer.truncation_side = side
    words = ["good", "bad", "fine", "was", "good"] * 20
    short = Classifier(model, tokenizer, 0)
    with pytest.warns(UserWarning, match="takes 16 tokens, and 1 of 1 texts so far .* of 1 that of the output, too"):
        full = Classifier(model, tokenizer, 0)([[1]], [" ".join(words)])
    assert full == pytest.approx(short([[1]], [" ".join(words[-14:])]), abs=1e-5)
    with pytest.warns(UserWarning, match="takes 4 tokens"):
        got = Classifier(model, tokenizer, 0, max_length=4)([[1]], [" ".join(words)])
    assert got == pytest.approx(short([[1]], ["was good"]), abs=1e-5)


def test_a_long_prompt_leaves_outputs_whole():
    """Of prompt and output the prompt is cut first, so that different outputs have different phi."""
    model, tokenizer = bert(2), word_tokenizer()
    potential = Classifier(model, tokenizer, 0, with_prompt=True).given([9], "was bad " * 50)
    alone = Classifier(model, tokenizer, 0)
    texts = ["good", "bad fine", "good " * 12 + "bad"]
    outputs = [[1]] * 3
    with pytest.warns(UserWarning, match="3 of 3 texts so far were longer: of 3 the beginning .*, of 0 that of the"):
        got = potential(outputs, texts)
    after = [("was bad " * 50 + text).split()[-14:] for text in texts]
    assert got == pytest.approx(alone(outputs, [" ".join(words) for words in after]), abs=1e-5)
    assert min(abs(a - b) for a, b in itertools.combinations(got, 2)) > 1e-3
    # Every so often only, or a long run would show nothing else; copies count together.
    with pytest.warns(UserWarning, match="6 of 8 texts so far were longer: of 5 .*, of 1 that of the output, too"):
        other = potential.given([9], "")
        other(outputs[:2], ["good", "bad"])
        potential(outputs, ["good", "bad", "fine " * 100])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential(outputs, texts)


@pytest.mark.parametrize("pads", ["neither", "tokenizer", "model", "outside"])
def test_decoders_whose_padding_does_not_fit(pads):
    """Llama's head reads the last token that differs from its own padding; another padding would be read."""
    model = llama(3, pad_token_id={"model": 5, "outside": -1}.get(pads))
    tokenizer = word_tokenizer(False, pad=pads != "neither")
    texts = ["good was", "fine was good", "was was fine fine"]
    logits = logits_one_by_one(model, tokenizer, texts)
    got = Classifier(model, tokenizer, 1)(OUTPUTS, texts)
    assert got == pytest.approx(logits.log_softmax(1)[:, 1].tolist(), abs=1e-5)


def test_classifier_reads_the_prompt_if_asked():
    model, tokenizer = bert(2), word_tokenizer()
    reads, ignores = (Classifier(model, tokenizer, 0, with_prompt=flag) for flag in (True, False))
    outputs, texts = [[1]], [" good"]
    after = ignores(outputs, ["bad good"])
    assert (2 * reads).given([9], "bad")(outputs, texts) == pytest.approx([2 * after[0]])
    assert ignores.given([9], "bad")(outputs, texts) == ignores(outputs, texts) != after
    assert reads(outputs, texts) == ignores(outputs, texts)


def test_classifier_from_a_folder(tmp_path: Path):
    model, tokenizer = bert(2, id2label={0: "negative", 1: "positive"}), word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = Classifier(model, tokenizer, 1, beta=2)(OUTPUTS, TEXTS)
    loaded = Classifier.from_pretrained(tmp_path / "model", "positive", beta=2)
    assert loaded(OUTPUTS, TEXTS) == pytest.approx(expected, abs=1e-6)
    spec = {"type": "classifier", "model": str(tmp_path / "model"), "label": "positive", "beta": 2}
    (tmp_path / "potential.json").write_text(json.dumps(spec))
    assert load_potential(tmp_path)(OUTPUTS, TEXTS) == pytest.approx(expected, abs=1e-6)
    assert repr(loaded) == "Classifier(BertForSequenceClassification, label 1, log_probability)"
    # A language model has no such head; transformers would make one up and merely log it.
    model.bert.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="`model` .*headless' has no weights for classifier.bias, classifier.weight"):
        Classifier.from_pretrained(tmp_path / "headless", 0)
    with pytest.raises(ValueError, match="`model` .*absent' is no sequence classifier that transformers can load"):
        Classifier.from_pretrained(tmp_path / "absent", 0)


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (2, {}, r"`label` must be .* negative, positive or 0 to 1, got 2: pass one"),
        (-1, {}, "`label` must be .* got -1"),
        (True, {}, "`label` must be .* got True"),
        ("positiv", {}, r"`label` must be .* got 'positiv' \(did you mean 'positive'\?\)"),
        (0, {"score": "logits"}, r"`score` must be one of log_probability, .* \(did you mean 'logit'\?\)"),
        (0, {"epsilon": 1.0}, r"`epsilon` must lie in \[0, 1\), got 1.0"),
        (0, {"epsilon": "0"}, "`epsilon` must be a finite number, got '0'"),
        (0, {"beta": math.inf}, "`beta` must be a finite number, got inf"),
        (0, {"threshold": None}, "`threshold` must be a finite number, got None"),
        (0, {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_misuse_of_classifiers_is_named(label, options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(bert(2, id2label={0: "negative", 1: "positive"}), word_tokenizer(), label, **options)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_texts_without_tokens_are_read_as_a_special_one(batch_size):
    """An output of nothing but EOS has no text; encoders see their special tokens even then."""
    model, tokenizer = llama(2), word_tokenizer(False)
    tokenizer.add_special_tokens({"bos_token": "[CLS]"})
    got = Classifier(model, tokenizer, 0, batch_size=batch_size)([[1]] * 3, ["good", "", " "])
    expected = [Classifier(model, tokenizer, 0)([[1]], [text])[0] for text in ("good", "[CLS]", "[CLS]")]
    assert got == pytest.approx(expected, abs=1e-5)
    assert len(Classifier(bert(2), word_tokenizer(), 0)([[1]], [""])) == 1
    # No bos, cls, eos or sep: the padding; without any special token there is nothing to read.
    assert math.isfinite(Classifier(model, word_tokenizer(False), 0)([[1]], [""])[0])
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"good": 0}, unk_token="good")))
    blank = llama(2, pad_token_id=None)
    blank.config.bos_token_id = blank.config.eos_token_id = None
    with pytest.raises(ValueError, match="`texts` must hold at least one token each for .*, got '': set `with_prompt`"):
        Classifier(blank, bare, 0)([[1]], [""])


def tiny_classifier(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    size = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, vocab_size=len(WORDS),
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    encoder = {**size, "max_position_embeddings": 16, "intermediate_size": 32}
    if kind == "gpt2":
        return GPT2ForSequenceClassification(
            GPT2Config(**{**size, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 3, **options})
        )
    if kind == "xlnet":
        xlnet = dict(d_model=32, n_layer=2, n_head=2, d_inner=32, vocab_size=len(WORDS), num_labels=3, pad_token_id=0)
        return XLNetForSequenceClassification(XLNetConfig(**xlnet, initializer_range=0.3))
    config, model = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
        "llama": (LlamaConfig, LlamaForSequenceClassification),
    }[kind]
    return model(config(**{**encoder, **options}))


KINDS_OF_MODEL = ("bert", "roberta", "gpt2", "llama", "xlnet")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_a_score_does_not_depend_on_the_batch(monkeypatch, kind, side):
    """Whichever side the tokenizer pads on, in batches bounded by rows or by tokens; 1e-5: float32 in another order."""
    model, tokenizer = tiny_classifier(kind), word_tokenizer(kind in ("bert", "roberta"))
    tokenizer.padding_side = side
    texts = ["good", "was bad fine good", "fine " * 9, "bad was", "was " * 12 + "bad"]
    expected = logits_one_by_one(model, tokenizer, texts).log_softmax(1)[:, 1].tolist()
    assert max(expected) - min(expected) > 0.1
    shapes = []
    model.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    for most in (2**14, 20):
        monkeypatch.setattr("vllm_twist.potentials.models.MAX_TOKENS", most)
        assert Classifier(model, tokenizer, 1)([[1]] * 5, texts) == pytest.approx(expected, abs=1e-5)
    assert all(rows == 1 or rows * length <= 20 for rows, length in shapes[-3:])
    if kind != "xlnet":
        assert shapes[0][0] == 5, "one padded batch was not tried"
    assert Classifier(model, tokenizer, 1).log_phi([], []) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tokenizer_pads", [True, False])
def test_padding_that_is_the_end_token(kind, tokenizer_pads):
    """Decoders read the last token that is no padding: an end that is one changes nothing, in any batch."""
    model, tokenizer = tiny_classifier(kind, pad_token_id=3, eos_token_id=3), word_tokenizer(False, pad=False)
    tokenizer.add_special_tokens({"eos_token": "[SEP]", **({"pad_token": "[SEP]"} if tokenizer_pads else {})})
    texts = ["good was", "good was [SEP]", "fine bad was fine bad", "good was [SEP] [SEP]"]
    got = Classifier(model, tokenizer, 1)([[1]] * 4, texts)
    assert got[0] == pytest.approx(got[1], abs=1e-5) == pytest.approx(got[3], abs=1e-5)
    expected = logits_one_by_one(model, tokenizer, texts).log_softmax(1)[:, 1].tolist()
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_texts_as_long_as_the_model_takes(kind):
    """Positions begin after the padding's index in RoBERTa: 16 hold 15 tokens, and its 514 hold 512 at padding 1."""
    model, tokenizer = tiny_classifier(kind), word_tokenizer(kind in ("bert", "roberta"))
    tokenizer.model_max_length = 10**30
    potential = Classifier(model, tokenizer, 1)
    limit = {"roberta": 15, "xlnet": 10**30}.get(kind, 16)
    assert potential.max_length == min(limit, sys.maxsize) or kind == "xlnet" and potential.max_length >= 10**18
    for length in range(11, 20):
        text = ["good bad was fine".split()[i % 4] for i in range(length)]
        room = potential.room
        with pytest.warns(UserWarning) if length > room else contextlib.nullcontext():
            got = Classifier(model, tokenizer, 1)([[1]], [" ".join(text)])
        expected = logits_one_by_one(model, tokenizer, [" ".join(text[-min(length, room) :])]).log_softmax(1)[:, 1]
        assert got == pytest.approx(expected.tolist(), abs=1e-5)
    if kind not in ("llama", "xlnet"):  # whose positions are not learned
        with pytest.raises(ValueError, match=f"`max_length` must lie between .* {limit} positions, got {limit + 1}"):
            Classifier(model, tokenizer, 1, max_length=limit + 1)
    tokenizer.model_max_length = 12
    assert Classifier(model, tokenizer, 1).max_length == 12


def test_room_for_text_is_asked_for():
    for length in (0, 2, -1, True, "8"):
        with pytest.raises(ValueError, match=f"`max_length` must lie between 3, .* 2 special tokens.*got {length!r}"):
            Classifier(bert(2), word_tokenizer(), 0, max_length=length)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_classifiers_in_half_precision(kind):
    """As in float32 but for the rounding: bfloat16 has 8 bits, so logits of a few units are off by some 0.05."""
    model, tokenizer = tiny_classifier(kind), word_tokenizer(kind == "bert")
    exact = Classifier(model, tokenizer, 1)(OUTPUTS, TEXTS)
    got = Classifier(model.to(torch.bfloat16), tokenizer, 1)(OUTPUTS, TEXTS)
    assert got == pytest.approx(exact, abs=0.2) and got != exact


# -- Continuations -----------------------------------------------------------------------------
def teacher_forced(tiny: Tiny, prompt: list[int], output: list[int], continuation: list[int]) -> float:
    """Return log p0(continuation | prompt, output) token by token, each from a pass of its own."""
    context, total = prompt + output, 0.0
    for token in continuation:
        total += tiny.log_p([context])[0, -1, token].item()
        context = context + [token]
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("prompt", [[], [0, 7, 9]])
@pytest.mark.parametrize("continuation", [[3], [11, 2, 30, 4, 4]])
def test_continuation_is_what_teacher_forcing_gives(wide: Tiny, prompt, continuation, batch_size):
    """Outputs of many lengths in one padded pass, in the order they came; 1e-4: float32 in another order."""
    outputs = [[5, 6], [1], [8, 3, 20, 20, 20, 39, 2], [0, 0, 0], [12]]
    potential = Continuation(wide.model, continuation, batch_size=batch_size).given(prompt, "")
    expected = [teacher_forced(wide, prompt, output, continuation) for output in outputs]
    assert max(expected) - min(expected) > 0.1
    assert potential(outputs, [""] * 5) == pytest.approx(expected, abs=1e-4)


def test_continuation_is_a_probability(small: Tiny):
    """Over all continuations of two tokens phi adds up to one, and over all paths to Z = p0(o_T | s_0)."""
    pairs = list(itertools.product(range(4), repeat=2))
    total = sum(math.exp(Continuation(small.model, pair)([[2, 3]], [""])[0]) for pair in pairs)
    assert total == pytest.approx(1, abs=1e-5)
    paths = [list(path) for path in pairs]
    log_phi = Continuation(small.model, [3]).given([0], "")(paths, [""] * 16)
    z = sum(math.exp(v + teacher_forced(small, [0], path, [])) for v, path in zip(log_phi, paths, strict=True))
    assert z != pytest.approx(1, abs=0.1)  # the paths' own probabilities are missing here
    log_p = [teacher_forced(small, [], [0], path) for path in paths]
    z = sum(math.exp(v + p) for v, p in zip(log_phi, log_p, strict=True))
    whole = sum(math.exp(teacher_forced(small, [], [0], [*path, 3])) for path in paths)
    assert z == pytest.approx(whole, abs=1e-5)


def test_nothing_follows_an_end(wide: Tiny):
    potential = Continuation(wide.model, [3], eos_token_id=1)
    got = potential([[5, 1], [1, 5]], ["", ""])
    assert got == pytest.approx([-math.inf, teacher_forced(wide, [], [1, 5], [3])], abs=1e-4)
    assert potential([[1]], [""]) == [-math.inf]
    assert potential.given([4], "")([[5, 1]], [""]) == [-math.inf]


def test_continuation_from_json(wide: Tiny, tmp_path: Path):
    tokenizer = word_tokenizer()  # adds special tokens, which do not belong into a continuation
    (tmp_path / "infill.json").write_text(json.dumps({"type": "continuation", "text": "was bad"}))
    potential = load_potential(tmp_path / "infill.json", model=wide.model, tokenizer=tokenizer)
    assert repr(potential) == "Continuation(2 tokens)"
    expected = teacher_forced(wide, [2, 2], [6], [WORDS.index("was"), WORDS.index("bad")])
    assert potential.given([2, 2], "")([[6]], ["fine"]) == pytest.approx([expected], abs=1e-4)
    with pytest.raises(ValueError, match="`model` and `tokenizer` must be given for a continuation, got None"):
        load_potential(tmp_path / "infill.json")


def test_misuse_of_continuations_is_named(wide: Tiny):
    with pytest.raises(ValueError, match="`continuation_ids` must hold at least one token, got none"):
        Continuation(wide.model, [])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        Continuation(wide.model, [1], batch_size=0)
    with pytest.raises(ValueError, match="must hold 2 to 256 tokens, got 257 to 257: give a prompt, or shorten"):
        Continuation(wide.model, [1])([[2] * 256], [""])
    with pytest.raises(ValueError, match="must hold 2 to 256 tokens, got 1 to 2: give a prompt"):
        Continuation(wide.model, [1])([[], [2]], ["", ""])


# -- Loading -----------------------------------------------------------------------------------
MODULE = """
import math
from dataclasses import dataclass
from vllm_twist.potentials import Function

@dataclass
class Scorer:
    weight: float

    def log_phi(self, token_ids, texts):
        return [-self.weight * len(text) for text in texts]

class Space:
    scorer = Scorer(2.0)

def log_phi(token_ids, texts):
    return [-float(len(row)) for row in token_ids]

def fails(token_ids, texts):
    raise KeyError("score")

number = 3
combined = 2 * Function(log_phi) - 1
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that defines potentials, whose folder is on the path, as module rewards_for_tests."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("rewards_for_tests", MODULE), ("broken", "1 / 0"), ("needy", "import not_installed_at_all")):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path / "rewards_for_tests.py"


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize(
    ("attribute", "expected"),
    [("log_phi", [-3, -1, -5]), ("combined", [-7, -3, -11]), ("Space.scorer.log_phi", [-16, -8, -30])],
)
def test_load_from_a_module_or_file(module: Path, by_file, attribute, expected):
    spec = f"{module if by_file else 'rewards_for_tests'}:{attribute}"
    potential = load_potential(spec)
    assert potential(OUTPUTS, TEXTS) == expected
    if attribute == "log_phi":
        assert repr(potential) == spec


def test_load_what_is_loaded_already():
    potential = Function(lengths)
    assert load_potential(potential) is potential
    assert load_potential(lengths)(OUTPUTS, TEXTS) == potential(OUTPUTS, TEXTS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rewards", "`potential` must be module:attribute, .* got 'rewards': name where log_phi is found"),
        (":log_phi", "must be module:attribute, .* got ':log_phi'"),
        ("rewards_for_tests:", "must be module:attribute, .* got 'rewards_for_tests:'"),
        ("no_such_module:log_phi", "must name a module that can be imported, got 'no_such_module', which is not found"),
        ("no_such.module:log_phi", "must name a module that can be imported, got 'no_such.module'"),
        ("{folder}/absent.py:log_phi", "must name a Python file, got none at '.*absent.py': check the path"),
        ("rewards_for_tests:logphi", r"got 'logphi', which it has not \(did you mean 'log_phi'\?\): check the name"),
        ("{folder}/rewards_for_tests.py:absent", "must name an attribute of .*, got 'absent', which it has not"),
        ("rewards_for_tests:Space.other", "got 'other', which it has not"),
        ("rewards_for_tests:number", r"must be a callable log_phi\(token_ids, texts\) or a Potential, got int"),
        ("rewards_for_tests:Scorer", "got the class Scorer: pass a function or an instance"),
        ("broken:log_phi", "must be importable, but that raised ZeroDivisionError: division by zero: fix the module"),
        ("{folder}/broken.py:log_phi", "must be importable, but that raised ZeroDivisionError"),
        ("needy:log_phi", "raised ModuleNotFoundError: No module named 'not_installed_at_all': fix the module"),
        ("{folder}/needy.py:log_phi", "raised ModuleNotFoundError: No module named 'not_installed_at_all'"),
        ("..relative:log_phi", "must be importable, but that raised TypeError"),
        (3, "`potential` 3 must be a callable"),
    ],
)
def test_what_cannot_be_loaded_is_named(module: Path, spec, message):
    if isinstance(spec, str):
        spec = spec.format(folder=module.parent)
    with pytest.raises(ValueError, match=message):
        load_potential(spec)


def test_a_loaded_callable_that_raises_is_named(module: Path):
    potential = load_potential(f"{module}:fails")
    with pytest.raises(ValueError, match=re.escape(f"`potential` {module}:fails must return log phi of 3 outputs")):
        potential(OUTPUTS, TEXTS)


def test_documented_files(repo_root: Path, tmp_path: Path, wide: Tiny):
    """docs/training.md has an example of every type, which loads, and every key with its default."""
    text = (repo_root / "docs/training.md").read_text().partition("## What `potential.json` may hold")[2]
    text = text.partition("\n## ")[0]
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)]
    assert [example.get("type", "token_logistic") for example in examples] == list(potentials.KINDS)
    model, tokenizer = bert(2, id2label={0: "NEGATIVE", 1: "POSITIVE"}), word_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "classifier")
    loaded = []
    for example in examples:
        if "model" in example:
            example["model"] = str(tmp_path / "classifier")
        (tmp_path / "potential.json").write_text(json.dumps(example))
        loaded.append(load_potential(tmp_path, model=wide.model, tokenizer=tokenizer))
    assert [type(potential) for potential in loaded] == [TokenLogistic, Classifier, Continuation]
    signatures = [inspect.signature(f).parameters for f in (Classifier, Classifier.from_pretrained)]
    rows = re.findall(r"^\| `(\w+)`.*?\|.*?\|(.*)\|$", text, re.MULTILINE)
    assert [name for name, _ in rows if name != "type"] == list(potentials.KINDS)
    for name, cell in rows[-len(potentials.KINDS) :]:
        kind = potentials.KINDS[name]
        for key in kind.required:
            assert f"`{key}`" in cell
        for key in kind.optional:
            (default,) = [s[key].default for s in signatures if key in s]
            if key == "max_length":
                default = "what the model takes"
            shown = f"`{default}`" if key in ("score", "dtype") else default
            shown = shown if isinstance(shown, str) else json.dumps(shown)
            assert re.search(rf"`{key}` \({re.escape(shown)}[;)]", cell), key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"potential.json' cannot be read \(FileNotFoundError\): check the path"),
        ("{", "must hold JSON, got otherwise"),
        ("[]", "must hold a JSON object, got list"),
        ('{"type": "clasifier"}', r"`type` must be one of token_logistic, .* \(did you mean 'classifier'\?\)"),
        ('{"type": 3}', "`type` must be one of .*, got 3"),
        ('{"bias": 0, "weight": []}', r"the keys of a token_logistic must be .* \(did you mean 'weights'\?\)"),
        ('{"bias": 0}', "a token_logistic must have the key `weights`, got none: add it"),
        ('{"type": "classifier", "model": "x"}', "a classifier must have the key `label`"),
        ('{"bias": "0", "weights": []}', "`bias` must be a finite number, got '0'"),
        ('{"bias": 0, "weights": 3}', "`weights` must be a list of numbers, got int"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text, message):
    if text is not None:
        (tmp_path / "potential.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_potential(tmp_path)
