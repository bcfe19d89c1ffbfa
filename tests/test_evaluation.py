"""``vllm-twist eval``: its numbers against enumeration, and its files."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engines import PROMPTS
from support.laws import Law, enumerate_law
from support.models import Tiny

from vllm_twist.bounds import Estimate
from vllm_twist.cli import eval as cli_eval
from vllm_twist.cli import main
from vllm_twist.evaluation import Evaluation, EvaluationConfig, Evaluator, plot, table
from vllm_twist.model_options import ModelOptions
from vllm_twist.potentials import Constant, Continuation, Function, Potential, Scaled, Sum, TokenLogistic

HORIZON = 4


class Encoding:
    def __init__(self, ids: list[int]) -> None:
        self.input_ids = ids


class Tokenizer:
    """Stands in for the tokenizer that the tiny models do not have."""

    def __call__(self, text: str) -> Encoding:
        return Encoding(PROMPTS["below"])

    eos_token_id = 1

    def batch_decode(self, token_ids: list[list[int]], **options: Any) -> list[str]:
        return [""] * len(token_ids)


class WithTokenizer:
    def __init__(self, llm: Any) -> None:
        self.generate, self.llm_engine = llm.generate, llm.llm_engine

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()


def log_phi(token_ids: list[list[int]], texts: list[str]) -> list[float]:
    return [0.9 * row.count(2) - 0.4 * len(row) for row in token_ids]


def forbid_three(token_ids: list[list[int]], texts: list[str]) -> list[float]:
    return [-math.inf if 3 in row or len(row) < 3 else 0.0 for row in token_ids]


def exact(small: Tiny) -> tuple[Law, dict[tuple[int, ...], float]]:
    """Return p0 phi by enumeration, and log q of every sequence of the twist-induced proposal."""
    base = enumerate_law(small, PROMPTS["below"], HORIZON)
    law = Law(base.log_p, {s: value + log_phi([list(s)], [""])[0] for s, value in base.log_p.items()})
    log_q = {}
    for sequence in base.log_p:
        log_q[sequence] = 0.0
        for t, token in enumerate(sequence):
            logits, log_psi = small.logits_and_log_psi([PROMPTS["below"] + list(sequence[:t])])
            log_q[sequence] += float((logits + log_psi).double().log_softmax(-1)[0, token])
    return law, log_q


def holds(found: Estimate | None, value: float) -> bool:
    """Return whether the value is within 4 standard errors: false alarms have odds of 6e-5."""
    assert found is not None
    return abs(found.mean - value) <= 4 / 1.96 * found.ci95


def test_numbers_equal_enumeration(engine: Any, small: Tiny) -> None:
    """log Z, both divergences, and every bound on its side of log Z; more particles, smaller gap."""
    law, log_q = exact(small)
    config = EvaluationConfig(HORIZON, (1, 2, 16), repeats=40, samples=300, log_phi_max=2.0)
    evaluator = Evaluator(WithTokenizer(engine(small)), Function(log_phi), config)
    seen = []
    evaluation = evaluator.evaluate(["x"], seen.append)
    (found,) = evaluation.prompts
    assert seen == [found] and found.reason is None and found.exact_samples == 300
    assert holds(found.log_z, law.log_z)
    sigma = {s: math.exp(value - law.log_z) for s, value in law.log_target.items()}
    backward = sum(p * (math.log(p) - log_q[s]) for s, p in sigma.items())
    forward = sum(math.exp(q) * (q - math.log(sigma[s])) for s, q in log_q.items())
    assert holds(found.kl_q_sigma, forward) and holds(found.kl_sigma_q, backward)
    assert found.kl_q_sigma is not None and found.kl_q_sigma.ci95 < forward, "the interval should tell it from 0"
    assert [(row.proposal, row.particles, row.resample) for row in found.rows] == [
        (proposal, k, resample) for proposal in ("twist", "base") for k in (1, 2, 16) for resample in (True, False)
    ]
    for row in found.rows:
        assert row.lower is not None and row.upper is not None and row.sandwich is not None
        assert row.lower.mean - 4 / 1.96 * row.lower.ci95 < law.log_z < row.upper.mean + 4 / 1.96 * row.upper.ci95
        if row.particles == 1:
            assert holds(row.lower, law.log_z - (forward if row.proposal == "twist" else base_divergence(law)))
    gaps = {(row.proposal, row.particles): row.sandwich.gap.mean for row in found.rows if row.sandwich}
    assert gaps["twist", 16] < gaps["twist", 1] / 2 and gaps["base", 16] < gaps["base", 1] / 2
    values = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert values["prompts"][0]["rows"][0].keys() >= {"proposal", "particles", "resample", "lower", "upper", "reason"}
    assert values["prompts"][0]["log_z"].keys() == {"mean", "ci95"}
    assert "twist" in table(found) and f"{found.rows[0].lower.mean:.3f}" in table(found)


def base_divergence(law: Law) -> float:
    """Return KL(p0 || sigma)."""
    return law.log_z - sum(math.exp(p) * (law.log_target[s] - p) for s, p in law.log_p.items())


def test_infilling_equals_enumeration(engine: Any, conditional: Tiny) -> None:
    """Means over o_T of log Z(o_T) and KL(sigma || q), every o_T with an exact sample and bounds of its own."""
    prompt, horizon = PROMPTS["below"], 2
    starts = [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]  # an output that ends has phi = 0
    rows = torch.tensor([prompt + start for start in starts])
    following = conditional.log_p(rows.tolist()).double()
    n = len(prompt)
    log_p = following[:, n - 1 : n + 1].gather(2, rows[:, n:, None])[..., 0].sum(1)
    joint = log_p[:, None] + following[:, -1]  # [s, o]
    log_z = joint.logsumexp(0)
    weight = log_z.softmax(0)
    backward = []
    for o in range(conditional.vocab):
        log_q = torch.zeros(len(starts), dtype=torch.float64)
        for t in range(horizon):
            values = [conditional.logits_and_log_psi([prompt + start[:t]], [o]) for start in starts]
            log_q += torch.stack(
                [(a + b).double().log_softmax(-1)[0, s[t]] for (a, b), s in zip(values, starts, strict=True)]
            )
        log_sigma = joint[:, o] - log_z[o]
        backward.append((log_sigma.exp() * (log_sigma - log_q)).sum())
    config = EvaluationConfig(horizon, (32,), repeats=60, condition_tokens=1)
    evaluator = Evaluator(WithTokenizer(engine(conditional)), None, config, conditional.model)
    (found,) = evaluator.evaluate(["x"]).prompts
    assert holds(found.log_z, float((weight * log_z).sum()))
    assert holds(found.kl_sigma_q, float((weight * torch.stack(backward)).sum()))
    assert found.kl_sigma_q is not None and found.kl_sigma_q.ci95 < found.kl_sigma_q.mean
    many = next(row for row in found.rows if row.proposal == "twist")
    assert many.sandwich is not None and many.sandwich.gap.mean < 1
    mean, slack = float((weight * log_z).sum()), 4 / 1.96
    assert many.lower is not None and many.lower.mean - slack * many.lower.ci95 < mean
    assert many.upper is not None and mean < many.upper.mean + slack * many.upper.ci95
    assert (
        found.kl_q_sigma is None and found.reason and "KL(q||sigma): the proposal's sample had phi = 0" in found.reason
    )
    json.dumps(Evaluation([found], config).to_dict(), allow_nan=False)


def test_infilling_needs_samples_that_go_on(engine: Any, conditional: Tiny) -> None:
    config = EvaluationConfig(40, (1,), repeats=2, max_draws=50, condition_tokens=100)
    (found,) = Evaluator(WithTokenizer(engine(conditional)), None, config, conditional.model).evaluate(["x"]).prompts
    assert (
        found.log_z is None and found.reason and "0 of 50 samples of p0 went on for 140 tokens; raise" in found.reason
    )
    with pytest.raises(
        ValueError, match="`potential` must be given, or `condition_tokens` in its place, got None and 0"
    ):
        Evaluator(WithTokenizer(engine(conditional)), None, EvaluationConfig())
    with pytest.raises(ValueError, match="`model` must be given with `condition_tokens`, got None"):
        Evaluator(WithTokenizer(engine(conditional)), None, config)


def test_a_fixed_continuation_is_the_condition(engine: Any, conditional: Tiny) -> None:
    law = {}
    for condition in ([2], [3, 2]):
        config = EvaluationConfig(2, (4,), repeats=60, samples=2)
        potential = Continuation(conditional.model, condition, eos_token_id=conditional.eos)
        (found,) = Evaluator(WithTokenizer(engine(conditional)), potential, config).evaluate(["x"]).prompts
        rows = [PROMPTS["below"] + [a, b] + condition for a in (0, 2, 3) for b in (0, 2, 3)]
        log_p = conditional.log_p(rows).double()[:, len(PROMPTS["below"]) - 1 : -1]
        tokens = torch.tensor(rows)[:, len(PROMPTS["below"]) :, None]
        law[tuple(condition)] = float(log_p.gather(2, tokens).sum((1, 2)).logsumexp(0))
        assert holds(found.log_z, law[tuple(condition)])
    assert abs(law[2,] - law[3, 2]) > 0.5


def test_without_a_bound_on_phi(engine: Any, small: Tiny) -> None:
    """No exact samples and so no upper bounds, with the reason; log Z from the mean of Z-hat."""
    law, _ = exact(small)
    config = EvaluationConfig(HORIZON, (1, 8), repeats=40, samples=40)
    (found,) = Evaluator(WithTokenizer(engine(small)), Function(log_phi), config).evaluate(["x"]).prompts
    assert all(row.upper is None and row.lower is not None for row in found.rows)
    assert found.kl_sigma_q is None and found.kl_q_sigma is not None
    assert found.reason and "phi has no known bound; pass `--log-phi-max`" in found.reason
    assert all(row.reason == found.reason for row in found.rows)
    assert found.log_z_from == "mean of Z-hat" and holds(found.log_z, law.log_z)


def test_where_no_particle_hits_the_target(engine: Any, small: Tiny) -> None:
    """phi = 0 for many: a lower bound of -inf is null with the reason, and JSON stays valid."""
    config = EvaluationConfig(HORIZON, (1, 64), repeats=30, samples=30, log_phi_max=0.0)
    evaluation = Evaluator(WithTokenizer(engine(small)), Function(forbid_three), config).evaluate(["x"])
    (found,) = evaluation.prompts
    one, many = (next(row for row in found.rows if row.particles == k) for k in (1, 64))
    assert one.lower is None and one.reason and "Z-hat was 0 in" in one.reason and one.upper is not None
    assert many.lower is not None and many.reason is None
    assert found.kl_q_sigma is None and found.reason and "KL(q||sigma): Z-hat was 0 in" in found.reason
    json.dumps(evaluation.to_dict(), allow_nan=False)
    none = EvaluationConfig(HORIZON, (1,), repeats=2, samples=2, log_phi_max=30.0, max_draws=50)
    (found,) = Evaluator(WithTokenizer(engine(small)), Function(forbid_three), none).evaluate(["x"]).prompts
    assert found.reason and "0 of 50 samples of p0 were accepted; raise `--max-draws`" in found.reason
    assert found.draws == 50 and found.exact_samples == 0


def test_potentials_know_their_bounds() -> None:
    logistic = TokenLogistic(0.0, [1.0])
    assert logistic.log_bound == 0 and Constant(2.0).log_bound == 2 and Function(log_phi).log_bound == math.inf
    assert (3 * logistic + 2.0).log_bound == 2 and (-1 * logistic).log_bound == math.inf
    assert Scaled(Function(log_phi), 0).log_bound == 0 and Sum((logistic, Function(log_phi))).log_bound == math.inf

    class Silent(Potential):
        def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
            return [0.0] * len(token_ids)

    assert Silent().log_bound == math.inf


def test_command(repo_root: Path, tmp_path: Path) -> None:
    """The command as a user types it, on the shipped model: table, JSON and picture.

    In a process of its own: it shuts its engine down, and in this one others are kept.
    """
    (tmp_path / "prompts.txt").write_text("I bought this\n\nThe battery\n")
    head = str(repo_root / "models/tiny-reviews-positive")
    args = ["--model", str(repo_root / "models/tiny-reviews"), "--twist-head", head, "--potential", head]
    args += ["--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "8", "--particles", "1,4", "--repeats", "6"]
    args += ["--samples", "20", "--json", str(tmp_path / "out/eval.json"), "--plot", str(tmp_path / "out/eval.png")]
    engine = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26, "max_model_len": 128}
    command = [sys.executable, "-m", "vllm_twist.cli", "eval", *args, "--engine-args", json.dumps(engine)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "'I bought this'" in printed and "'The battery'" in printed and "lower bound" in printed
    values = json.loads((tmp_path / "out/eval.json").read_text())
    assert [prompt["prompt"] for prompt in values["prompts"]] == ["I bought this", "The battery"]
    for prompt in values["prompts"]:
        assert len(prompt["rows"]) == 8 and prompt["exact_samples"] == 20
        for row in prompt["rows"]:
            assert row["lower"]["ci95"] > 0 and row["upper"]["ci95"] > 0
    assert (tmp_path / "out/eval.png").read_bytes().startswith(b"\x89PNG")


def test_command_loads_what_phi_needs(repo_root: Path, tmp_path: Path) -> None:
    """The language model in transformers for a continuation and for infilling, and only for these."""
    (tmp_path / "potential.json").write_text(json.dumps({"type": "continuation", "text": " I returned it."}))
    args = argparse.Namespace(model=str(repo_root / "models/tiny-reviews"), potential=str(tmp_path), condition_tokens=0)
    potential, model = cli_eval._load(args, ModelOptions())
    assert isinstance(potential, Continuation) and potential.model is model and len(potential.continuation_ids) == 4
    args.potential, args.condition_tokens = None, 3
    potential, model = cli_eval._load(args, ModelOptions())
    assert potential is None and model.config.hidden_size == 128
    args.condition_tokens = 0
    with pytest.raises(ValueError, match="`--potential` is missing: name log phi, or pass `--condition-tokens`"):
        cli_eval._load(args, ModelOptions())
    args.potential = str(repo_root / "models/tiny-reviews-positive")
    potential, model = cli_eval._load(args, ModelOptions())
    assert isinstance(potential, TokenLogistic) and model is None


def test_prompts_may_be_chats(repo_root: Path) -> None:
    """Through the template of the model's tokenizer, and shown as what the model reads."""
    from transformers import AutoTokenizer

    from vllm_twist.evaluation.evaluator import _Prompt

    tokenizer = AutoTokenizer.from_pretrained(repo_root / "models/tiny-reviews")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    llm = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    evaluator = Evaluator(llm, Function(log_phi), EvaluationConfig())
    chat = _Prompt(evaluator, 0, [{"role": "user", "content": "A lamp?"}])
    assert chat.prompt == "user: A lamp?\nassistant:" == tokenizer.decode(chat.prompt_ids)
    text = _Prompt(evaluator, 0, "A lamp?")
    assert text.prompt == "A lamp?" and text.prompt_ids == tokenizer("A lamp?").input_ids
    with pytest.raises(ValueError, match=r"`prompts` must give at least one token each, got none for \[\]"):
        _Prompt(evaluator, 0, [])


def test_plot_of_many_prompts(tmp_path: Path) -> None:
    """Gaps where bounds are missing; six panels at most."""
    from vllm_twist.evaluation import PromptEvaluation, Row

    rows = [
        Row("twist", k, True, Estimate(-1 / k, 0.1), None if k == 4 else Estimate(1 / k, 0.1), None) for k in (1, 4, 16)
    ]
    prompts = [PromptEvaluation(str(i), None, None, None, None, rows, 0, 0, "none") for i in range(8)]
    plot(Evaluation(prompts, EvaluationConfig(particles=(1, 4, 16))), str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "1"], "`repeats` must be at least 2, got 1: raise it"),
        (["--particles", "0,4"], r"`particles` must hold numbers of at least 1, got \[0, 4\]"),
        (["--ess-threshold", "0"], "`ess_threshold` must be above 0, got 0.0"),
        (["--prompts", "/nowhere"], "`--prompts` /nowhere cannot be read"),
        (["--prompts", "EMPTY"], "`--prompts` .* must hold a prompt a line, got none"),
        (["--condition-tokens", "2"], "`--potential` must not be given with `--condition-tokens`, got .*: drop one"),
        (["--condition-tokens", "-1"], "`condition_tokens` must be at least 0, got -1"),
        (["--potential", "nothing"], "`potential` must be module:attribute"),
    ],
)
def test_bad_flags(
    flags: list[str], message: str, repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before an engine is started."""
    import re

    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "prompts.txt").write_text("I bought this\n")
    flags = [str(tmp_path / "empty.txt") if flag == "EMPTY" else flag for flag in flags]
    head = str(repo_root / "models/tiny-reviews-positive")
    args = ["--model", "m", "--twist-head", head, "--potential", head, "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["eval", *args, *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_draws_that_do_not_fit_into_one_step(engine: Any, small: Tiny) -> None:
    """Prompts of more tokens than a step takes are drawn for in turns, whose outputs are not each other's."""
    from vllm_twist.evaluation.evaluator import _Prompt

    llm = engine(small, max_num_batched_tokens=64)
    prompt = _Prompt(Evaluator(WithTokenizer(llm), Function(log_phi), EvaluationConfig(particles=(1,))), 0, "x")
    count = 64 // len(PROMPTS["below"]) + 60
    outputs = prompt._draw(count, 12, torch.Generator().manual_seed(1))
    assert len(outputs) == count and all(0 < len(output) <= 12 for output in outputs)
    assert outputs[:30] != outputs[64 // len(PROMPTS["below"]) :][:30]
    assert outputs == prompt._draw(count, 12, torch.Generator().manual_seed(1))


def test_reweighing_is_by_particle(engine: Any, small: Tiny) -> None:
    """With phi = psi_T nothing changes: log Z-hat is the engine's own."""
    from vllm_twist import results

    class PsiOfLast(Potential):
        def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
            values = []
            for row in token_ids:
                _, log_psi = small.logits_and_log_psi([PROMPTS["below"] + row[:-1]])
                values.append(float(log_psi[0, row[-1]]))
            return values

    from vllm_twist.evaluation.evaluator import _Prompt

    config = EvaluationConfig(HORIZON, (4,), repeats=5, samples=2)
    llm = engine(small)
    phi = PsiOfLast()
    prompt = _Prompt(Evaluator(WithTokenizer(llm), phi, config), 0, "x")
    params = [prompt._params("twist", 4, True, str(i), None, None) for i in range(5)]
    outputs = llm.generate([{"prompt_token_ids": PROMPTS["below"]}] * 5, params, use_tqdm=False)
    own = [results(output)[0].log_z for output in outputs]
    assert prompt._log_z(params, [phi] * 5) == pytest.approx(own, abs=1e-4)
    assert torch.tensor(own).std() > 0
