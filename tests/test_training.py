"""The trainer, on models small enough to enumerate what it should find."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Tiny, llama_config
from torch import Tensor

from vllm_twist import TwistHead, TwistHeadConfig
from vllm_twist.objectives import OBJECTIVES
from vllm_twist.potentials import Function, Potential
from vllm_twist.training import STATE_NAME, TrainingConfig, TwistTrainer, attention, teacher_forcing
from vllm_twist.training.samplers import LAWS, DrawRequest, Draws, TransformersSampler

HORIZON = 3
PROMPTS = [(0, 2), (3, 3, 0)]


def log_phi(token_ids: list[list[int]], texts: list[str]) -> list[float]:
    """phi in (0, 1), uneven, and not a function of the last token."""
    return [-0.1 - 1.3 * abs(sum((i + 1) * token for i, token in enumerate(row)) % 5 - 2) for row in token_ids]


def config(**changes: Any) -> TrainingConfig:
    options = {"head": "linear", "max_tokens": HORIZON, "sampler": "transformers", "particles": 256, "lr": 0.03}
    return TrainingConfig(**{**options, **changes})


def make(tiny: Tiny, potential: Any = log_phi, **options: Any) -> TwistTrainer:
    """Return a trainer whose model is fresh and knows its folder, so that an engine can load it, too."""
    from transformers import AutoModelForCausalLM

    keywords = {name: options.pop(name) for name in ("head", "sampler", "engine_args") if name in options and not
                isinstance(options[name], str)}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny.path)
    return TwistTrainer(model, potential, config(**options), **keywords)


def outputs_of(tiny: Tiny, horizon: int = HORIZON) -> list[list[int]]:
    """Return every output: sequences that end with EOS, and those of full length."""
    found = []
    for length in range(1, horizon + 1):
        for row in itertools.product(range(tiny.vocab), repeat=length):
            if tiny.eos not in row[:-1] and (row[-1] == tiny.eos or length == horizon):
                found.append(list(row))
    return found


def laws(trainer: TwistTrainer, prompt: tuple[int, ...], rows: list[list[int]], phi: Potential | None = None) -> Any:
    """Return log p0, log q and log sigma [N] of all outputs of a prompt."""
    with torch.no_grad():
        scores = trainer.score(prompt, rows)
    total = {name: torch.where(scores.mask, getattr(scores, name), 0).sum(1).double() for name in ("log_p", "log_q")}
    values = torch.tensor((phi or Function(log_phi))(rows, [""] * len(rows)), dtype=torch.float64)
    return total["log_p"], total["log_q"], (total["log_p"] + values).log_softmax(0)


def divergence(
    trainer: TwistTrainer, tiny: Tiny, phi: Potential | None = None, prompts: Sequence[tuple[int, ...]] = PROMPTS
) -> tuple[float, float]:
    """Return the exact KL(q || sigma) and KL(sigma || q), means over the prompts."""
    rows = outputs_of(tiny)
    found = []
    for prompt in prompts:
        _, log_q, log_sigma = laws(trainer, prompt, rows, phi and phi.given(prompt, ""))
        assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
        found.append([(log_q.exp() * (log_q - log_sigma)).sum(), (log_sigma.exp() * (log_sigma - log_q)).sum()])
    forward, backward = torch.tensor(found).mean(0).tolist()
    return forward, backward


def chi_square(rows: list[list[int]], drawn: list[list[int]], log_law: Tensor) -> tuple[float, int]:
    """Return the statistic of drawn outputs against a law over rows, and its degrees of freedom.

    Outputs of which fewer than 5 are expected count as one.
    """
    expected = log_law.exp() * len(drawn)
    counts = torch.zeros_like(expected)
    index = {tuple(row): k for k, row in enumerate(rows)}
    for row in drawn:
        counts[index[tuple(row)]] += 1
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    keep = expected > 0
    return ((counts - expected)[keep].square() / expected[keep]).sum().item(), int(keep.sum()) - 1


def limit(freedom: int, z: float = 3.72) -> float:
    """Return the quantile of chi-square that is passed with odds 1e-4 (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def rough_head(tiny: Tiny, seed: int) -> TwistHead:
    head = TwistHead.create(TwistHeadConfig("linear", tiny.head.config.hidden_size, tiny.vocab), seed=seed)
    with torch.no_grad():
        head.weight *= 2
    return head


# -- The teacher-forced pass -------------------------------------------------------------------
ROWS = [[2, 0, 3], [1], [3, 1], [0, 0, 0], [2]]


@pytest.mark.parametrize("chunks", ["whole", "in parts", "by length"])
def test_scores_are_those_of_one_row_at_a_time(small: Tiny, monkeypatch, chunks: str):
    """Against a plain forward pass of every prefix; in parts: one row per pass, two tokens per vocabulary product;
    by length: rows of like length in passes of their own.
    """
    if chunks == "in parts":
        monkeypatch.setattr(teacher_forcing, "MAX_TOKENS", 1)
        monkeypatch.setattr(teacher_forcing, "MAX_VALUES", 2 * small.vocab)
    if chunks == "by length":
        monkeypatch.setattr(teacher_forcing, "MIN_PADDING", 0)
        assert teacher_forcing._passes([3, 1, 2, 3, 1], 3, 100) == [[1, 4], [2, 0, 3]]
        assert teacher_forcing._passes([64] * 7 + [60] * 5, 3, 10**4) == [[*range(7, 12), *range(7)]]
    trainer = make(small, head=rough_head(small, 5))
    scores = trainer.score(PROMPTS[1], ROWS)
    assert scores.mask.sum(1).tolist() == [len(row) for row in ROWS]
    loss = 0.0
    for k, row in enumerate(ROWS):
        for t, token in enumerate(row):
            ids = torch.tensor([[*PROMPTS[1], *row[:t]]])
            hidden = trainer.model.model(ids).last_hidden_state[:, -1]
            log_p = trainer.model.lm_head(hidden).log_softmax(-1)[0]
            log_psi = trainer.head(hidden)[0]
            log_norm = torch.logsumexp(log_p + log_psi, 0)
            assert scores.log_p[k, t].item() == pytest.approx(log_p[token].item(), abs=1e-5)
            assert scores.log_psi[k, t].item() == pytest.approx(log_psi[token].item(), abs=1e-5)
            assert scores.log_norm[k, t].item() == pytest.approx(log_norm.item(), abs=1e-5)
            loss = loss + (log_psi[token] - log_norm) * (t + 1)
    expected = torch.autograd.grad(loss, list(trainer.head.parameters()))
    weights = torch.arange(1, scores.mask.shape[1] + 1)
    ours = (torch.where(scores.mask, scores.log_psi - scores.log_norm, 0) * weights).sum()
    found = torch.autograd.grad(ours, list(trainer.head.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


# -- Drawing -----------------------------------------------------------------------------------
@pytest.mark.parametrize("law", ["p0", "q"])
def test_transformers_sampler_draws_the_law(small: Tiny, law: str):
    """Chi-square over all outputs, odds of a false alarm 1e-4; the other law fails it."""
    trainer = make(small, head=rough_head(small, 5))
    sampler = TransformersSampler(trainer.model, trainer.end_ids)
    sampler.set_head(trainer.head)
    (draws,) = sampler.sample([DrawRequest(PROMPTS[1], 4000, law, 3, HORIZON)])
    rows = outputs_of(small)
    log_p, log_q, _ = laws(trainer, PROMPTS[1], rows)
    right, wrong = (log_p, log_q) if law == "p0" else (log_q, log_p)
    statistic, freedom = chi_square(rows, draws.token_ids, right)
    assert statistic < limit(freedom)
    statistic, freedom = chi_square(rows, draws.token_ids, wrong)
    assert statistic > 2 * limit(freedom)
    if law == "q":
        scores = trainer.score(PROMPTS[1], draws.token_ids)
        torch.testing.assert_close(torch.tensor(draws.log_w), towards_psi(scores), atol=1e-4, rtol=0)


def towards_psi(scores: Any) -> Tensor:
    """Return log p0 psi / q [B] of draws from q without resampling."""
    steps = torch.where(scores.mask, scores.log_p - scores.log_q, 0).sum(1)
    return (steps + scores.final(scores.log_psi)).detach()


def test_particles_stand_for_their_target(small: Tiny):
    """E[Z-hat sum_k W_k f(s_k)] = Z E_sigma[f] for the indicators of all outputs, target p0 psi.

    800 populations of 8, resampled by ESS. Each mean has a z-score; the largest of 40 exceeds 4.5 with
    odds 3e-4. Without the weights it is beyond that.
    """
    trainer = make(small, head=rough_head(small, 5))
    sampler = TransformersSampler(trainer.model, trainer.end_ids)
    sampler.set_head(trainer.head)
    rows = outputs_of(small)
    index = {tuple(row): k for k, row in enumerate(rows)}
    log_p, _, _ = laws(trainer, PROMPTS[0], rows)
    scores = trainer.score(PROMPTS[0], rows)
    target = (log_p + scores.final(scores.log_psi).detach()).exp()
    runs = sampler.sample([DrawRequest(PROMPTS[0], 8, "smc", seed, HORIZON) for seed in range(800)])

    def largest_z(weigh: bool) -> float:
        sums = torch.zeros(len(runs), len(rows), dtype=torch.float64)
        for i, draws in enumerate(runs):
            for row, log_w in zip(draws.token_ids, draws.log_w, strict=True):
                sums[i, index[tuple(row)]] += math.exp(log_w) / 8 if weigh else target.sum().item() / 8
        error = sums.std(0) / math.sqrt(len(runs))
        keep = (sums > 0).sum(0) >= 20  # a normal approximation needs some hits
        return ((sums.mean(0) - target).abs() / error)[keep].max().item()

    assert largest_z(True) < 4.5
    assert largest_z(False) > 4.5


def test_draws_follow_from_the_seed(small: Tiny):
    trainer = make(small, head=rough_head(small, 5))
    sampler = TransformersSampler(trainer.model, trainer.end_ids)
    sampler.set_head(trainer.head)
    for law in LAWS:
        one, again, other = sampler.sample([DrawRequest(PROMPTS[0], 50, law, seed, HORIZON) for seed in (1, 1, 2)])
        assert one == again and one.token_ids != other.token_ids


def test_exact_positives_are_samples_of_sigma(small: Tiny):
    """Chi-square against sigma, odds of a false alarm 1e-4; p0 fails it."""
    trainer = make(small, objective="dpg", proposal_only=True, positives="exact", particles=1000)
    trainer._start(4)
    target = trainer._drawing.target(0, PROMPTS)
    trainer._drawing.find_exact(trainer.sampler, [target])
    assert len(target.exact) == 1000
    rows = outputs_of(small)
    log_p, _, log_sigma = laws(trainer, PROMPTS[0], rows)
    statistic, freedom = chi_square(rows, target.exact, log_sigma)
    assert statistic < limit(freedom)
    statistic, freedom = chi_square(rows, target.exact, log_p)
    assert statistic > 2 * limit(freedom)


# -- Learning ----------------------------------------------------------------------------------
WAYS = [("ctl", "approximate"), ("ctl", "exact"), ("ctl", "smc"), ("rl", "approximate"), ("pcl", "approximate"),
        ("sixo", "approximate"), ("sixo", "exact"), ("sixo", "smc"), ("fudge", "approximate"), ("dpg", "approximate"),
        ("dpg", "exact"), ("dpg", "smc")]  # fmt: skip


class LastStep(Potential):
    """phi(s_1:T) = psi(s_{T-1}, s_T) / e^3 of the bigram model's own head, which makes that head its twist at every t.

    A linear head on that model is a table of log psi over pairs of tokens, so the optimum can be reached.
    """

    def __init__(self, bigram: Tiny, prompt_ids: Sequence[int] = ()) -> None:
        self.bigram, self.prompt_ids = bigram, list(prompt_ids)

    def given(self, prompt_ids: Sequence[int], prompt: str) -> Potential:
        return LastStep(self.bigram, prompt_ids)

    def log_phi(self, token_ids: list[list[int]], texts: list[str]) -> list[float]:
        pairs = torch.tensor([[*self.prompt_ids, *row][-2:] for row in token_ids])
        _, log_psi = self.bigram.logits_and_log_psi(pairs[:, :1].tolist())
        return (log_psi.gather(1, pairs[:, 1:])[:, 0] - 3).tolist()


BIGRAM_PROMPTS = [(0,), (3,)]


@pytest.mark.parametrize(("objective", "positives"), WAYS)
def test_learning_reaches_the_target(bigram: Tiny, objective: str, positives: str):
    """Both KLs, by enumeration, fall to a tenth or less of the fresh head's."""
    phi = LastStep(bigram)
    trainer = make(
        bigram, phi, objective=objective, positives=positives, updates=40, proposal_only=objective == "dpg",
        prompts_per_update=2, particles=128,
    )  # fmt: skip
    before = divergence(trainer, bigram, phi, BIGRAM_PROMPTS)
    trainer.train(BIGRAM_PROMPTS)
    after = divergence(trainer, bigram, phi, BIGRAM_PROMPTS)
    assert before[0] > 0.3 and before[1] > 0.3
    assert after[0] < before[0] / 10 and after[1] < before[1] / 10, (before, after)


def test_ways_cover_every_objective():
    assert {objective for objective, _ in WAYS} == set(OBJECTIVES)


def test_infilling_reaches_every_condition(bigram: Tiny):
    """One conditional head for all o_T: E_o KL(sigma(. | o) || q(. | o)) falls to a fifth of the fresh head's.

    sigma(s | o) is p0(s) p0(o | s) over the outputs of two tokens that do not end.
    """
    rows = [row for row in outputs_of(bigram, 2) if bigram.eos not in row]
    conditions = [(token,) for token in range(bigram.vocab) if token != bigram.eos]

    def divergence(trainer: TwistTrainer) -> float:
        whole = [row + list(o) for o in conditions for row in rows]
        with torch.no_grad():
            scores = trainer.score((0,), whole, conditions[0])
            joint = scores.log_p.double().sum(1).reshape(len(conditions), len(rows))
            weight = joint.logsumexp(1).softmax(0)
            total = 0.0
            for o, log_sigma, p in zip(conditions, joint.log_softmax(1), weight, strict=True):
                log_q = trainer.score((0,), rows, o).log_q.double().sum(1)
                total += p.item() * (log_sigma.exp() * (log_sigma - log_q)).sum().item()
        return total

    trainer = make(
        bigram,
        None,
        condition_tokens=1,
        max_tokens=2,
        particles=16,
        prompts_per_update=6,
        updates=30,
        head="mlp",
        lr=0.01,
    )
    before = divergence(trainer)
    trainer.train([(0,)])
    after = divergence(trainer)
    assert before > 0.1 and after < before / 5, (before, after)


def test_at_the_optimum_nothing_is_left_to_learn(bigram: Tiny):
    """With the exact twist all weights are equal: ESS is K, KL and gap are 0, and the CTL gradient vanishes.

    It does so for every batch, not only on average.
    """
    head = copy.deepcopy(bigram.head)
    trainer = make(bigram, LastStep(bigram), head=head, positives="exact", max_tokens=6, particles=32)
    metrics = trainer.step(BIGRAM_PROMPTS)
    assert metrics["ess"] == pytest.approx(32, rel=1e-4)
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["gap"] == pytest.approx(0, abs=1e-3)
    trainer = make(bigram, LastStep(bigram), head=copy.deepcopy(bigram.head), max_tokens=6, particles=32)
    trainer.step(BIGRAM_PROMPTS)
    assert max(p.grad.abs().max().item() for p in trainer.head.parameters()) < 1e-5
    fresh = make(bigram, LastStep(bigram), max_tokens=6, particles=32)
    assert fresh.step(BIGRAM_PROMPTS)["ess"] < 20
    assert max(p.grad.abs().max().item() for p in fresh.head.parameters()) > 1e-2


# -- Going on ----------------------------------------------------------------------------------
def assert_same_run(whole: TwistTrainer, parts: TwistTrainer) -> None:
    assert whole.update == parts.update
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, parts.head.state_dict()[name]), name
    a, b = whole.optimizer.state_dict()["state"], parts.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def without_speed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in metrics.items() if name != "tokens_per_s"} for metrics in history]


@pytest.mark.parametrize("options", [{}, {"positives": "smc"}, {"positives": "exact"}], ids=lambda o: str(*o.values()))
def test_a_resumed_run_is_the_uninterrupted_one(small: Tiny, tmp_path: Path, options: dict[str, str]):
    """Six updates are three and three more, bit for bit: head, optimizer and metrics."""
    whole = make(small, updates=6, particles=16, **options)
    history = whole.train(PROMPTS)
    parts = make(small, updates=3, particles=16, **options)
    first = parts.train(PROMPTS, tmp_path)
    resumed = make(small, updates=6, particles=16, **options)
    second = resumed.train(PROMPTS, tmp_path, resume=True)
    assert without_speed(first + second) == without_speed(history)
    assert_same_run(whole, resumed)
    saved = TwistHead.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in whole.head.state_dict().items())


def test_what_is_saved_by_hand_is_resumed(small: Tiny, tmp_path: Path):
    """After ``train``, after ``step``, and before the first update."""
    whole = make(small, updates=4, particles=4)
    whole.train(PROMPTS)
    by_hand = make(small, updates=2, particles=4)
    by_hand.save(tmp_path / "fresh")
    by_hand.train(PROMPTS[:2])
    by_hand.save(tmp_path / "trained")
    stepped = make(small, particles=4)
    stepped.step(PROMPTS)
    stepped.save(tmp_path / "stepped")
    for folder in ("fresh", "trained", "stepped"):
        resumed = make(small, updates=4, particles=4)
        resumed.train(PROMPTS, tmp_path / folder, resume=True)
        assert_same_run(whole, resumed)


def test_what_was_not_the_same_run_is_not_resumed(small: Tiny, tmp_path: Path):
    make(small, updates=2, particles=4).train(PROMPTS, tmp_path)
    for changes, message in [
        ({"lr": 0.5}, "`lr` must be that of the run to resume, 0.03, got 0.5"),
        ({"seed": 1}, "`seed` must be that of the run to resume"),
        ({"objective": "rl"}, "`objective` must be that of the run to resume, 'ctl', got 'rl'"),
        ({"revision": "v2"}, "`revision` must be that of the run to resume, None, got 'v2'"),
        ({"trust_remote_code": True}, "`trust_remote_code` must be that of the run to resume, False, got True"),
        ({"dtype": "bfloat16"}, "`dtype` must be that of the run to resume, 'auto', got 'bfloat16'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(small, **{"updates": 4, "particles": 4, **changes}).train(PROMPTS, tmp_path, resume=True)
    with pytest.raises(ValueError, match="`prompts` must be that of the run to resume"):
        make(small, updates=4, particles=4).train(PROMPTS[:1], tmp_path, resume=True)
    with pytest.raises(ValueError, match="`resume` needs a checkpoint, .*elsewhere.* does not exist"):
        make(small, updates=4, particles=4).train(PROMPTS, tmp_path / "elsewhere", resume=True)


def test_a_checkpoint_without_an_option_has_its_default(small: Tiny, tmp_path: Path):
    """As those have that were written before there was the option."""
    make(small, updates=2, particles=4).train(PROMPTS, tmp_path)
    state = torch.load(tmp_path / STATE_NAME, weights_only=True)
    for name in ("revision", "trust_remote_code"):
        del state["config"][name]
    torch.save(state, tmp_path / STATE_NAME)
    with pytest.raises(ValueError, match="`revision` must be that of the run to resume, None, got 'v2'"):
        make(small, updates=3, particles=4, revision="v2").train(PROMPTS, tmp_path, resume=True)
    assert len(make(small, updates=3, particles=4).train(PROMPTS, tmp_path, resume=True)) == 1


def test_processes_are_one_with_more_prompts(small: Tiny, tmp_path: Path, repo_root: Path):
    """Two processes of accelerate launch, gloo, leave the head that one leaves with two prompts per update.

    CTL, whose weights are normalised: within a prompt, so that nothing depends on where it was drawn.
    """
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "from vllm_twist.training import TrainingConfig, TwistTrainer\n"
        "from test_training import PROMPTS, config, log_phi\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "trainer = TwistTrainer(model, log_phi, config(particles=16, updates=4))\n"
        "assert trainer._processes.world == 2\n"
        "trainer.train(PROMPTS + [(2,)], sys.argv[2])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "tests"), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run([*launch, script, small.path, tmp_path / "two"], check=True, env=environment, timeout=900)
    one = make(small, particles=16, updates=4, prompts_per_update=2)
    one.train([*PROMPTS, (2,)], tmp_path / "one")
    two = TwistHead.from_pretrained(tmp_path / "two").state_dict()
    fresh = make(small).head.state_dict()
    for name, value in one.head.state_dict().items():
        # Adam divides by the gradient's size, so rounding in the mean of two shows as more than rounding here.
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=0)
        assert not torch.allclose(fresh[name], value, atol=2e-2)
    with pytest.raises(ValueError, match="`processes` must be that of the run to resume, 2, got 1"):
        make(small, particles=16, updates=8).train([*PROMPTS, (2,)], tmp_path / "two", resume=True)


def test_tensorboard(small: Tiny, tmp_path: Path, monkeypatch):
    make(small, updates=3, particles=4).train(PROMPTS, log_dir=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "ess", "kl", "log_z", "tokens_per_s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"`log_dir` needs TensorBoard.*pip install 'vllm-twist\[tensorboard\]'"):
        make(small, updates=3, particles=4).train(PROMPTS, log_dir=tmp_path)


# -- Attention ---------------------------------------------------------------------------------
def grouped(tmp_path: Path) -> Any:
    """Return a model whose key heads are shared by two query heads each."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(8, 1, num_attention_heads=4)).eval()


@pytest.mark.parametrize("max_tokens", [8, 1000])
def test_packed_rows_do_not_see_each_other(tmp_path: Path, max_tokens: int):
    """Packed states are those of rows on their own, whatever fits a pass."""
    model = grouped(tmp_path)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        packed = attention.packed_states(model, PROMPTS[1], ROWS, max_tokens)
        alone = [
            model.model(torch.tensor([[*PROMPTS[1], *row[:-1]]])).last_hidden_state[0, len(PROMPTS[1]) - 1 :]
            for row in ROWS
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


class _Bottom:
    """Stands for xformers' LowerTriangularFromBottomRightMask."""

    def materialize(self, shape: tuple[int, ...]) -> Tensor:
        queries, keys = shape[-2:]
        return torch.full(shape, -torch.inf).triu(keys - queries + 1)


class _Blocks:
    """Stands for xformers' BlockDiagonalCausalMask."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> _Blocks:
        return cls(lengths)

    def materialize(self, shape: tuple[int, ...]) -> Tensor:
        blocks = [_Bottom().materialize((n, n)) for n in self.lengths]
        return torch.block_diag(*[b.exp() for b in blocks]).log()


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: float | None) -> Tensor:
    """Return what xformers.ops.memory_efficient_attention does [B, Q, heads, D], spelled out."""
    bias = 0 if attn_bias is None else attn_bias.materialize((query.shape[1], key.shape[1]))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5) + bias
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


@pytest.fixture
def xformers(monkeypatch) -> Any:
    """xformers with plain torch in place of its kernels, which need a GPU: its own masks if it is installed."""
    import types

    try:
        from xformers import ops
    except ImportError:
        ops = types.ModuleType("xformers.ops")
        bias = types.ModuleType("xformers.ops.fmha.attn_bias")
        bias.LowerTriangularFromBottomRightMask, bias.BlockDiagonalCausalMask = _Bottom, _Blocks
        for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"):
            monkeypatch.setitem(sys.modules, name, {"xformers.ops": ops, "xformers.ops.fmha.attn_bias": bias}.get(
                name, types.ModuleType(name)))  # fmt: skip
        sys.modules["xformers"].ops = ops
    monkeypatch.setattr(ops, "memory_efficient_attention", plain_attention, raising=False)
    attention.register_xformers()
    return ops


def test_xformers_attention_is_sdpa(xformers: Any, tmp_path: Path):
    """Packed, with a KV cache and one token at a time; query heads in groups. Padded batches are refused."""
    model = grouped(tmp_path)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = attention.packed_states(model, PROMPTS[1], ROWS, 100)
        tokens = torch.tensor([[3, 5, 2, 7, 4, 6]])
        plain = model(tokens).logits
        model.set_attn_implementation("xformers")
        torch.testing.assert_close(
            attention.packed_states(model, PROMPTS[1], ROWS, 100), expected, atol=1e-5, rtol=1e-4
        )
        first = model(tokens[:, :3], use_cache=True)
        second = model(tokens[:, 3:5], past_key_values=first.past_key_values, use_cache=True)
        third = model(tokens[:, 5:], past_key_values=second.past_key_values)
        found = torch.cat([first.logits, second.logits, third.logits], 1)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="`attention` xformers takes no padded batches"):
            model(tokens.expand(2, -1), attention_mask=torch.tensor([[1] * 6, [0] + [1] * 5]))


def test_attention_that_cannot_run_is_refused(small: Tiny):
    """For real, on this machine: a package that is missing, or one that has no kernel for a CPU."""
    for name, install in (("xformers", r"'vllm-twist\[xformers\]'"), ("flash_attention_2", "flash-attn")):
        message = rf"`attention` {name} (needs the package .* pip install {install}|cannot run on cpu.*use sdpa)"
        if torch.cuda.is_available():
            pytest.skip("a GPU may run it")
        with pytest.raises(ValueError, match=message):
            make(small, attention=name)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_makes_no_difference(small: Tiny, name: str):
    scores = make(small, head=rough_head(small, 5), attention=name).score(PROMPTS[0], ROWS)
    other = make(small, head=rough_head(small, 5)).score(PROMPTS[0], ROWS)
    torch.testing.assert_close(scores.log_psi, other.log_psi, atol=1e-5, rtol=1e-4)


# -- The engine --------------------------------------------------------------------------------
ENGINE_ARGS = {"block_size": 32, "kv_cache_memory_bytes": 2**26, "enable_prefix_caching": True, "max_num_seqs": 64}


@pytest.fixture(scope="module")
def sampler(small: Tiny) -> Any:
    from vllm_twist.training.samplers.vllm import EngineSampler

    made = EngineSampler(
        str(small.path), rough_head(small, 0), end_ids=frozenset({small.eos}), max_model_len=64, dtype="float32",
        **ENGINE_ARGS,
    )  # fmt: skip
    yield made
    made.close()


class Kept:
    """A sampler that outlives its trainer."""

    def __init__(self, sampler: Any) -> None:
        self.set_head, self.sample = sampler.set_head, sampler.sample

    def close(self) -> None:
        pass


def test_a_swapped_head_is_in_force_at_once(small: Tiny, sampler: Any):
    """After every swap the weights are those of the new head, to rounding, and not those of the one before.

    Prefix caching is on and the prompt, longer than a block, the same throughout.
    """
    prompt = tuple(2 + i % 2 for i in range(40))
    before = None
    for seed in range(5):
        trainer = make(small, head=rough_head(small, seed))
        sampler.set_head(trainer.head)
        (draws,) = sampler.sample([DrawRequest(prompt, 32, "q", 7, 8)])
        expected = towards_psi(trainer.score(prompt, draws.token_ids)).log_softmax(0)
        found = torch.tensor(draws.log_w).log_softmax(0)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
        if before is not None:
            stale = towards_psi(before.score(prompt, draws.token_ids)).log_softmax(0)
            assert (found - stale).abs().max() > 0.1
        before = trainer


def test_a_head_that_is_not_finite_is_refused(small: Tiny, sampler: Any):
    head = rough_head(small, 1)
    head.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="`weights` must be finite in torch.float32, bias is not"):
        sampler.set_head(head)


@pytest.mark.parametrize("law", ["p0", "q"])
def test_engine_draws_the_law_of_the_swapped_head(small: Tiny, sampler: Any, law: str):
    """Chi-square over all outputs, odds of a false alarm 1e-4; those of the head before fail it."""
    trainer, stale = make(small, head=rough_head(small, 5)), make(small, head=rough_head(small, 6))
    for head in (stale.head, trainer.head):
        sampler.set_head(head)
    requests = [DrawRequest(PROMPTS[1], 64, law, 1000 * seed, HORIZON) for seed in range(40)]
    drawn = [row for draws in sampler.sample(requests) for row in draws.token_ids]
    rows = outputs_of(small)
    log_p, log_q, _ = laws(trainer, PROMPTS[1], rows)
    statistic, freedom = chi_square(rows, drawn, log_q if law == "q" else log_p)
    assert statistic < limit(freedom)
    statistic, freedom = chi_square(rows, drawn, laws(stale, PROMPTS[1], rows)[1])
    assert statistic > 2 * limit(freedom)


@pytest.mark.parametrize("positives", ["approximate", "smc", "exact"])
def test_learning_with_the_engine(small: Tiny, sampler: Any, positives: str):
    trainer = make(small, sampler=Kept(sampler), positives=positives, updates=40, particles=64, lr=0.01)
    before = divergence(trainer, small)
    trainer.train(PROMPTS)
    after = divergence(trainer, small)
    assert after[0] < before[0] / 2 and after[1] < before[1] / 2, (before, after)


def test_infilling_with_the_engine(bigram: Tiny):
    """Conditions and their exact samples, and draws of a conditional head, from the engine: what it weighs is what
    the trainer computes, and the loss falls."""
    options = {"condition_tokens": 1, "max_tokens": 2, "particles": 16, "prompts_per_update": 6, "head": "mlp"}
    with make(bigram, None, sampler="vllm", engine_args=ENGINE_ARGS, updates=25, lr=0.01, **options) as trainer:
        history = trainer.train([(0,)])
        assert sum(m["loss"] for m in history[-5:]) < sum(m["loss"] for m in history[:5])
        requests = [DrawRequest((0,), 16, "q", 3, 2, condition) for condition in ((2,), (3, 4))]
        trainer.sampler.set_head(trainer.head)
        for request, draws in zip(requests, trainer.sampler.sample(requests), strict=True):
            found = torch.tensor(draws.log_w).log_softmax(0)
            by_condition = [towards_psi(trainer.score((0,), draws.token_ids, o)).log_softmax(0) for o in ((2,), (3, 4))]
            own = by_condition.pop(requests.index(request))
            torch.testing.assert_close(found, own, atol=2e-4, rtol=0)
            assert (found - by_condition[0]).abs().max() > 0.01


def test_a_resumed_run_with_an_engine_of_its_own(small: Tiny, tmp_path: Path):
    """Six updates are three and three more, bit for bit, each run starting an engine."""
    runs = []
    for updates, resume in ((6, False), (3, False), (6, True)):
        out = tmp_path / str(updates if not resume else 3)
        with make(small, updates=updates, particles=32, sampler="vllm", engine_args=ENGINE_ARGS) as trainer:
            history = trainer.train(PROMPTS, out, resume=resume)
            runs.append((trainer, history))
    (whole, history), (_, first), (resumed, second) = runs
    assert without_speed(first + second) == without_speed(history)
    assert_same_run(whole, resumed)


AT_HOME = """
import os, random, signal, sys, threading
import numpy, torch
from vllm_twist import TwistHead
from vllm_twist.training.samplers.vllm import EngineSampler
from vllm_twist.training.samplers import DrawRequest

def start():
    options = dict(block_size=32, kv_cache_memory_bytes=2**26, max_num_seqs=8, dtype="float32")
    return EngineSampler(sys.argv[1], head, end_ids=frozenset({1}), max_model_len=64, **options)

def state():
    numbers = numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return random.getstate(), *numbers, torch.set_num_threads

def inside(sampler):
    return not hasattr(sampler.llm.llm_engine.engine_core, "resources")

if __name__ == "__main__":
    head = TwistHead.from_pretrained(sys.argv[2])
    asked = [DrawRequest((0, 2), 4, "q", 3, 8)]
    before = state()
    first = start()
    print("undisturbed:", state() == before and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ)
    beside = start()
    drawn = [sampler.sample(asked) for sampler in (first, beside)]
    print("inside:", inside(first), inside(beside), "alike:", drawn[0] == drawn[1], flush=True)

    (process,) = beside.llm.llm_engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)  # so that the call is under way when the engine dies
    threading.Timer(3, os.kill, (process.pid, signal.SIGKILL)).start()
    try:
        beside.set_head(head)
    except RuntimeError as error:
        print("said:", error)
    print("goes on:", first.sample(asked) == drawn[0])
    first.close()
    again = start()
    print("again:", inside(again), again.sample(asked) == drawn[0], flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def at_home(small: Tiny, tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, str]:
    """Start an engine in a process, another beside it that dies, and a third in the place of the first."""
    script = tmp_path_factory.mktemp("home") / "home.py"
    script.write_text(AT_HOME)
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, str(script), str(small.path), str(small.head_path)],
        cwd=repo_root, env={**environment, "PYTHONPATH": str(repo_root)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert "again" in found, done.stderr[-3000:]
    return found


def test_an_engine_on_a_cpu_lives_in_the_process(at_home: dict[str, str]):
    """One at a time does; it draws what others draw and can be replaced, and starting it leaves the process alone."""
    assert at_home["undisturbed"] == at_home["goes on"] == "True"
    assert at_home["inside"] == "True False alike: True" and at_home["again"] == "True True"


def test_an_engine_that_dies_ends_the_run(at_home: dict[str, str]):
    """The trainer must not wait for ever for an answer that cannot come any more."""
    assert at_home["said"].startswith("the engine that draws has died: its own messages say why")


# -- Refusals ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objectiv": "ctl"},
            r"unknown option `objectiv` \(did you mean 'objective'\?\): the known ones are objective",
        ),
        ({"objective": "ctrl"}, r"`objective` must be one of ctl, .*got 'ctrl' \(did you mean 'ctl'\?\)"),
        ({"objective": "dpg"}, "`objective` must give a twist that can weigh particles, got 'dpg'.*`proposal_only`"),
        ({"objective": "rl", "positives": "exact"}, "`positives` must be approximate for rl, which has none"),
        ({"positives": "some"}, "`positives` must be one of approximate, exact, smc, got 'some'"),
        ({"head": "linaer"}, r"`head` must be one of .*\(did you mean 'linear'\?\)"),
        ({"particles": 1}, "`particles` must be at least 2, got 1"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"updates": 2.5}, "`updates` must be an integer of at least 1, got 2.5"),
        ({"lr": 0}, "`lr` must be a positive number, got 0"),
        ({"lr": math.nan}, "`lr` must be a positive number, got nan"),
        ({"sampler": "vlm"}, r"`sampler` must be one of auto, vllm, transformers, got 'vlm' \(did you mean 'vllm'"),
        ({"attention": "flash"}, "`attention` must be one of sdpa, eager, flash_attention_2, xformers, got 'flash'"),
        ({"dtype": "int8"}, "`dtype` must be one of auto, float32"),
        ({"proposal_only": 3}, "`proposal_only` must be 0 or 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_options(options)


def test_what_does_not_fit_is_named(small: Tiny):
    from transformers import GraniteConfig, GraniteForCausalLM

    with pytest.raises(
        ValueError, match="`potential` must be given, or `condition_tokens` in its place, got None and 0"
    ):
        make(small, None)
    with pytest.raises(ValueError, match="`potential` must be given, or `condition_tokens`"):
        make(small, condition_tokens=2)
    with pytest.raises(ValueError, match="`head` must be TwistHeadConfig.*linear.*got TwistHeadConfig.*mlp"):
        make(small, head=TwistHead.create(TwistHeadConfig("mlp", 64, 4)))
    with pytest.raises(ValueError, match="`prompts` must hold at least one, got none"):
        make(small).train([])
    with pytest.raises(ValueError, match="`prompts` must be token ids, got text but no tokenizer"):
        make(small).train(["text"])
    with pytest.raises(ValueError, match="`prompt_ids` must hold 1 to 253 tokens, got 300"):
        make(small).train([[2] * 300])
    with pytest.raises(ValueError, match="`prompt_ids` must hold 1 to 253 tokens, got 0"):
        make(small).train([[]])
    with pytest.raises(ValueError, match="`model` 'no/where' is no causal language model that transformers can load"):
        TwistTrainer("no/where", log_phi, config())
    with pytest.raises(ValueError, match="`model` must be loaded from somewhere for the engine to load it, too"):
        TwistTrainer(small.model.__class__(small.model.config), log_phi, config(sampler="vllm")).train(PROMPTS)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    scaled = GraniteForCausalLM(GraniteConfig(vocab_size=8, num_key_value_heads=2, logits_scaling=8.0, **sizes))
    with pytest.raises(ValueError, match="`model` must have its output embedding's product as logits, got a Granite"):
        TwistTrainer(scaled, log_phi, config())


def test_exact_positives_have_limits(small: Tiny, monkeypatch):
    trainer = make(small, lambda ids, texts: [0.5] * len(ids), positives="exact", updates=1)
    with pytest.raises(
        ValueError, match="`positives` must not be exact for a potential above 1, got log phi up to 0.5"
    ):
        trainer.train(PROMPTS)
    monkeypatch.setattr("vllm_twist.training.draws.MAX_ROUNDS", 3)
    trainer = make(small, lambda ids, texts: [-30.0] * len(ids), positives="exact", updates=1, particles=8)
    with pytest.raises(
        ValueError, match="for a target this rare: 24 samples of p0 gave 0 of 8; use approximate or smc"
    ):
        trainer.train(PROMPTS)
    trainer = make(small, None, condition_tokens=200, max_tokens=40, updates=1, particles=8)
    with pytest.raises(ValueError, match="`condition_tokens` must leave outputs that go on for 240 tokens"):
        trainer.train(PROMPTS)


def test_a_sampler_may_be_any_program(small: Tiny):
    """What it draws is all that is used of it: the same sequences give the same update, whoever drew them."""
    rows = [[2, 0, 3], [1], [3, 1], [0, 0, 0]]

    class Fixed:
        heads = 0

        def set_head(self, head: TwistHead) -> None:
            self.heads += 1

        def sample(self, requests: list[DrawRequest]) -> list[Draws]:
            return [Draws(rows) for _ in requests]

        def close(self) -> None:
            self.heads = -1

    fixed = Fixed()
    with make(small, sampler=fixed, particles=4, updates=2) as trainer:
        trainer.train(PROMPTS)
        assert fixed.heads == 2
    assert fixed.heads == -1
