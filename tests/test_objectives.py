"""The losses against a language model small enough to enumerate.

The model has two tokens and three steps; in the second family token 1 ends a sequence, so that
lengths differ. Expectations are exact sums wherever the name of a test does not say "sampled".
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from support.branches import branches
from torch.nn.functional import logsigmoid, pad

from vllm_twist.objectives import (
    OBJECTIVES,
    Positives,
    ctl_loss,
    ctl_positives_loss,
    dpg_loss,
    fudge_loss,
    get_objective,
    log_normaliser,
    log_weights,
    mismatched,
    pcl_loss,
    rl_loss,
    sixo_loss,
)
from vllm_twist.smc import Target, smc

V, T, END = 2, 3, 1
PREFIXES = [p for t in range(1, T + 1) for p in itertools.product(range(V), repeat=t)]


def log_p_next(prefix):
    """log p0 [V] of the token after a prefix: logits 1.5 sin(1 + t + 2a + 0.7b + 3x) of the last two tokens."""
    t, (b, a) = len(prefix) + 1, (0, 0, *prefix)[-2:]
    logits = [1.5 * math.sin(1 + t + 2 * a + 0.7 * b + 3 * x) for x in range(V)]
    return torch.tensor(logits, dtype=torch.float64).log_softmax(0)


def log_phi_of(sequence):
    return -1.2 * abs(sum((i + 1) * s for i, s in enumerate(sequence)) % 5 - 2)


class TabularLM:
    """All outputs of at most T tokens with their p0 and phi; with ``ends`` token 1 ends an output."""

    def __init__(self, ends):
        self.ends = ends
        self.prefixes = [p for p in PREFIXES if not (ends and END in p[:-1])]
        self.index = {p: i for i, p in enumerate(self.prefixes)}
        self.full = [p for p in self.prefixes if len(p) == T or (ends and p[-1] == END)]
        log_joint = torch.tensor([self.log_p(s) + log_phi_of(s) for s in self.full], dtype=torch.float64)
        self.sigma = torch.softmax(log_joint, 0)
        # psi* of a prefix: the expectation of phi over its completions
        self.log_psi_star = torch.stack([
            torch.logsumexp(torch.stack([log_joint[k] for k, s in enumerate(self.full) if s[: len(p)] == p]), 0)
            - self.log_p(p) for p in self.prefixes
        ])  # fmt: skip
        # Per prefix: the table indices of all tokens that could have been its last, and their log p0.
        self.siblings = torch.tensor([[self.index[(*p[:-1], x)] for x in range(V)] for p in self.prefixes])
        self.log_p_step = torch.stack([log_p_next(p[:-1]) for p in self.prefixes])

    def log_p(self, prefix):
        return sum(log_p_next(prefix[:i])[x].item() for i, x in enumerate(prefix))

    def state(self, sequence, t):
        """Return the prefix that a sequence has at time t: itself once it has ended."""
        return sequence[: min(t, len(sequence))]

    def marginals(self):
        """Yield for t = 1..T the table indices of all prefixes of that time, their sigma and their log p0."""
        for t in range(1, T + 1):
            states = sorted({self.state(s, t) for s in self.full})
            sigma = torch.stack([
                sum(self.sigma[k] for k, s in enumerate(self.full) if self.state(s, t) == state) for state in states
            ])  # fmt: skip
            log_p = torch.tensor([self.log_p(state) for state in states], dtype=torch.float64)
            yield [self.index[state] for state in states], sigma, log_p

    def ctl(self, theta):
        """Return the exact mean over t of KL(sigma(s_1:t) || pi_t), from its definition."""
        total = 0
        for index, sigma, log_p in self.marginals():
            log_pi = torch.log_softmax(log_p + theta[index], 0)
            total = total + (sigma * (sigma.log() - log_pi)).sum()
        return total / T

    def batch(self, sequences, log_q_next):
        """Return what the loss takes beside log psi, and the table indices [B, T] of the prefixes."""
        pad = float("nan")  # the loss must never read it
        rows = {name: [] for name in ("index", "log_p", "log_q", "mask")}
        for s in sequences:
            padding = T - len(s)
            rows["index"].append([self.index[s[:t]] for t in range(1, len(s) + 1)] + [0] * padding)
            for name, log_next in (("log_p", log_p_next), ("log_q", log_q_next)):
                rows[name].append([log_next(s[:i])[x].item() for i, x in enumerate(s)] + [pad] * padding)
            rows["mask"].append([True] * len(s) + [False] * padding)
        double = {name: torch.tensor(rows[name], dtype=torch.float64) for name in ("log_p", "log_q")}
        double["log_phi"] = torch.tensor([log_phi_of(s) for s in sequences], dtype=torch.float64)
        return torch.tensor(rows["index"]), {**double, "mask": torch.tensor(rows["mask"])}

    def enumerated(self):
        """Return a batch that is an exact sum: every output as often as uniform tokens would draw it.

        Each of the V^T strings of T tokens stands once, cut where it ends. So p0 / q with q uniform
        turns the batch mean into the expectation under p0, prefix by prefix.
        """
        uniform = torch.full((V,), -math.log(V), dtype=torch.float64)
        strings = itertools.product(range(V), repeat=T)
        cut = [s[: s.index(END) + 1] if self.ends and END in s else s for s in strings]
        return self.batch(cut, lambda prefix: uniform)

    def log_q_next(self, prefix, theta):
        """Return log q [V] after a prefix for the proposal q ~ p0 psi."""
        log_psi = torch.stack([theta[self.index[(*prefix, x)]] for x in range(V)])
        return torch.log_softmax(log_p_next(prefix) + log_psi, 0)

    def sampled(self, count, theta, generator):
        """Return a batch of ``count`` draws from q ~ p0 psi."""
        theta = theta.detach()
        table = {(): self.log_q_next((), theta)}
        for prefix in self.prefixes:
            if prefix not in self.full:
                table[prefix] = self.log_q_next(prefix, theta)
        index, rest = self.batch(self.full, table.__getitem__)
        log_q = torch.where(rest["mask"], rest["log_q"], 0).sum(1)
        drawn = torch.multinomial(log_q.exp(), count, replacement=True, generator=generator)
        return index[drawn], {name: tensor[drawn] for name, tensor in rest.items()}


LMS = {"fixed length": TabularLM(ends=False), "ending early": TabularLM(ends=True)}
each_lm = pytest.mark.parametrize("lm", LMS.values(), ids=LMS.keys())


def poor_twist(lm):
    values = [0.4 * math.cos(1.3 * sum((i + 1) * x for i, x in enumerate(p)) + len(p)) for p in lm.prefixes]
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss, theta, index, rest):
    theta = theta.clone().requires_grad_()
    log_psi = torch.where(rest["mask"], theta[index], torch.nan)
    loss(log_psi, **rest).backward()
    return theta.grad


def exact_gradient(lm, theta):
    theta = theta.clone().requires_grad_()
    lm.ctl(theta).backward()
    return theta.grad


# Losses with one mistake each; the comparisons below must tell every one of them from the real one.
def forgets_phi(log_psi, log_p, log_q, log_phi, mask):
    return ctl_loss(log_psi, log_p, log_q, torch.zeros_like(log_phi), mask)


def forgets_proposal(log_psi, log_p, log_q, log_phi, mask):
    return ctl_loss(log_psi, log_p, log_p, log_phi, mask)


def wrong_sign(log_psi, log_p, log_q, log_phi, mask):
    return -ctl_loss(log_psi, log_p, log_q, log_phi, mask)


def sums_over_t(log_psi, log_p, log_q, log_phi, mask):
    return T * ctl_loss(log_psi, log_p, log_q, log_phi, mask)


def negatives_without_psi(log_psi, log_p, log_q, log_phi, mask):
    """The negatives' weights are p0/q, as if they came from p0 and not from pi_t."""
    log_w = torch.where(mask, log_p - log_q, 0).cumsum(1)
    last = torch.minimum(torch.arange(T), mask.sum(1, keepdim=True) - 1)
    a, b = torch.softmax(log_w[:, -1] + log_phi, 0), torch.softmax(log_w, 0)
    return -((a[:, None] - b) * log_psi.gather(1, last)).sum() / T


def drops_the_ended(log_psi, log_p, log_q, log_phi, mask):
    """Only sequences that still run at t are compared: nothing teaches when to end."""
    log_w = torch.where(mask, log_p - log_q, 0).cumsum(1)
    a = torch.softmax((log_w[:, -1] + log_phi)[:, None].masked_fill(~mask, -torch.inf), 0)
    log_psi = torch.where(mask, log_psi, 0)
    log_z = torch.logsumexp((log_w + log_psi).masked_fill(~mask, -torch.inf), 0)
    return (log_z - (a * log_psi).sum(0)).sum() / T


MISTAKES = [forgets_phi, forgets_proposal, wrong_sign, sums_over_t, negatives_without_psi]


@each_lm
def test_enumerated_gradient_is_that_of_ctl(lm):
    """Sums of a few float64 terms: equal to rounding."""
    theta = poor_twist(lm)
    got = gradient(ctl_loss, theta, *lm.enumerated())
    torch.testing.assert_close(got, exact_gradient(lm, theta), atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    ("lm", "mistaken"),
    [(lm, m) for lm in LMS.values() for m in MISTAKES] + [(LMS["ending early"], drops_the_ended)],
)
def test_enumerated_gradient_tells_mistakes(lm, mistaken):
    """A wrong loss is off by more than 1e10 times what the test above allows."""
    theta = poor_twist(lm)
    got = gradient(mistaken, theta, *lm.enumerated())
    assert (got - exact_gradient(lm, theta)).abs().max() > 1e-3


@each_lm
def test_enumerated_value_is_ctl_up_to_a_constant(lm):
    """The value differs from the mean KL by the same number whatever psi, and is 0 at psi = 1."""
    index, rest = lm.enumerated()

    def value(theta):
        return ctl_loss(torch.where(rest["mask"], theta[index], torch.nan), **rest)

    ones, poor = torch.zeros(len(lm.prefixes), dtype=torch.float64), poor_twist(lm)
    assert value(ones).item() == pytest.approx(0, abs=1e-14)
    assert (value(poor) - value(ones)).item() == pytest.approx((lm.ctl(poor) - lm.ctl(ones)).item(), abs=1e-14)


@each_lm
def test_gradient_is_that_of_the_fixed_weight_surrogate(lm):
    """Central differences of -1/T sum (a_k - b_tk) log psi_t(s^k), a and b held at the present psi.

    The surrogate is linear in log psi, so the differences are exact but for rounding, 1e-16 / 1e-4.
    """
    theta = poor_twist(lm)
    index, rest = lm.sampled(6, theta, torch.Generator().manual_seed(0))
    lengths = rest["mask"].sum(1).tolist()
    log_w = [[sum((rest["log_p"] - rest["log_q"])[k, :t]) for t in range(1, n + 1)] for k, n in enumerate(lengths)]
    full = torch.stack([log_w[k][-1] + rest["log_phi"][k] for k in range(6)])
    positive = (full - full.logsumexp(0)).exp()

    def at(values, k, t):
        return values[k][min(t, lengths[k] - 1)]

    negative = []
    for t in range(max(lengths)):
        log_b = torch.stack([at(log_w, k, t) + theta[at(index, k, t)] for k in range(6)])
        negative.append((log_b - log_b.logsumexp(0)).exp())

    def surrogate(table):
        return -sum(
            (positive[k] - negative[t][k]) * table[at(index, k, t)] for t in range(max(lengths)) for k in range(6)
        ) / max(lengths)

    step, expected = 1e-4, torch.zeros_like(theta)
    for i in range(len(theta)):
        e = torch.zeros_like(theta)
        e[i] = step
        expected[i] = (surrogate(theta + e) - surrogate(theta - e)) / (2 * step)
    torch.testing.assert_close(gradient(ctl_loss, theta, index, rest), expected, atol=1e-10, rtol=0)


def sampled_z_scores(lm, loss, batches):
    """Return, per prefix, (mean gradient over batches of 2,000 draws - exact gradient) / standard error."""
    theta = poor_twist(lm)
    index, rest = lm.sampled(batches * 2000, theta, torch.Generator().manual_seed(1))
    parts = [{name: tensor[i::batches] for name, tensor in rest.items()} for i in range(batches)]
    gradients = torch.stack([gradient(loss, theta, index[i::batches], part) for i, part in enumerate(parts)])
    return (gradients.mean(0) - exact_gradient(lm, theta)) / (gradients.std(0) / math.sqrt(batches))


@each_lm
def test_sampled_gradient_is_that_of_ctl(lm):
    """100 batches of 2,000 draws from q.

    Bound 5: Student's t with 99 degrees of freedom passes it with probability 2.5e-6, so one of
    at most 14 prefixes does with 3.5e-5. Self-normalising biases each batch by about 1/2000 of the
    gradient, under a tenth of a standard error, 1/sqrt(2000 * 100).
    """
    assert sampled_z_scores(lm, ctl_loss, batches=100).abs().max() < 5


@each_lm
@pytest.mark.parametrize("mistaken", MISTAKES)
def test_sampled_gradient_tells_mistakes(lm, mistaken):
    assert sampled_z_scores(lm, mistaken, batches=25).abs().max() > 10


def off_by_constants(lm, theta):
    """Return the largest deviation of log psi from log psi* + c, c being free where it may be.

    Without an end of their own the prefixes of each length have a constant to themselves; with one,
    an early end is part of all later targets and ties the constants of all lengths.
    """
    error = theta.detach() - lm.log_psi_star
    groups = torch.tensor([0 if lm.ends else len(p) for p in lm.prefixes])
    return max((error[groups == g] - error[groups == g].mean()).abs().max().item() for g in groups.unique())


@each_lm
def test_enumerated_training_finds_the_optimal_twist(lm):
    """The loss is convex and smooth in the table: Newton-like steps reach the optimum to rounding."""
    theta = torch.zeros(len(lm.prefixes), dtype=torch.float64, requires_grad=True)
    index, rest = lm.enumerated()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = ctl_loss(torch.where(rest["mask"], theta[index], torch.nan), **rest)
        value.backward()
        return value

    optimizer.step(closure)
    assert off_by_constants(lm, torch.zeros_like(theta)) > 0.3
    assert off_by_constants(lm, theta) < 1e-6
    assert lm.ctl(theta.detach()).item() == pytest.approx(0, abs=1e-12)


@each_lm
def test_sampled_training_nears_the_optimal_twist(lm):
    """On-policy steps as in training, from an error above 1 to below 0.01.

    The bound can be that tight with 512 draws a step: at the optimum all weights of a batch agree,
    the gradient vanishes for every draw, and the noise dies out on the way there.
    """
    theta = torch.zeros(len(lm.prefixes), dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(2)
    assert off_by_constants(lm, theta) > 1
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(300):
        index, rest = lm.sampled(512, theta, generator)
        optimizer.zero_grad()
        ctl_loss(torch.where(rest["mask"], theta[index], torch.nan), **rest).backward()
        optimizer.step()
    assert off_by_constants(lm, theta) < 0.01


def some_batch():
    theta = poor_twist(LMS["ending early"])
    index, rest = LMS["ending early"].sampled(16, theta, torch.Generator().manual_seed(3))
    return {"log_psi": theta[index], **rest}


def test_a_constant_per_step_changes_nothing_at_fixed_length():
    lm = LMS["fixed length"]
    theta = poor_twist(lm)
    index, rest = lm.sampled(16, theta, torch.Generator().manual_seed(3))
    shifted = theta[index] + torch.tensor([0.5, -3.0, 20.0])
    torch.testing.assert_close(ctl_loss(shifted, **rest), ctl_loss(theta[index], **rest), atol=1e-13, rtol=0)


def test_padding_changes_nothing():
    batch = some_batch()
    padded = {
        name: tensor if name == "log_phi" else torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in batch.items()
    }
    torch.testing.assert_close(ctl_loss(**padded), ctl_loss(**batch), atol=1e-15, rtol=0)


def test_a_zero_phi_is_a_zero_weight():
    """phi = 0 equals phi = e^-1000 to rounding."""
    batch = some_batch()
    batch["log_phi"][3] = -torch.inf
    exact = ctl_loss(**batch)
    batch["log_phi"][3] = -1000
    torch.testing.assert_close(exact, ctl_loss(**batch), atol=1e-15, rtol=0)


def test_long_sequences_in_half_precision_stay_finite():
    """1,000 tokens at log p0 = -12 are e^-12000: sums of logs hold them where products would be 0.

    Both bfloat16 and float32 inputs are summed in float32, so the two agree exactly.
    """
    generator = torch.Generator().manual_seed(4)
    log_psi = torch.randn(8, 1000, generator=generator).bfloat16()
    log_q = (-12 + torch.randn(8, 1000, generator=generator)).bfloat16()
    rest = {"log_phi": torch.zeros(8).bfloat16(), "mask": torch.ones(8, 1000, dtype=torch.bool)}
    half = ctl_loss(log_psi, torch.full_like(log_q, -12), log_q, **rest)
    single = ctl_loss(log_psi.float(), torch.full_like(log_q, -12).float(), log_q.float(), **rest)
    assert half.isfinite() and half.dtype == torch.float32
    assert half == single


def test_only_log_psi_gets_a_gradient():
    batch = some_batch()
    for name in ("log_psi", "log_p", "log_q", "log_phi"):
        batch[name].requires_grad_()
    ctl_loss(**batch).backward()
    assert [name for name in batch if batch[name].grad is not None] == ["log_psi"]


def holes(mask):
    return mask.index_fill(1, torch.tensor([0]), False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("log_psi", lambda x: x[0], r"`log_psi` must have shape \[B, T\], got \[3\]"),
        ("log_psi", lambda x: x[:0], r"`log_psi` must have shape \[B, T\], got \[0, 3\]"),
        ("log_p", lambda x: x[:, :2], r"`log_p` must have the shape \[16, 3\] of `log_psi`, got \[16, 2\]"),
        ("log_q", lambda x: x[0], r"`log_q` must have the shape \[16, 3\]"),
        ("mask", lambda x: x[:3], r"`mask` must have the shape \[16, 3\]"),
        ("log_phi", lambda x: x[:, None], r"`log_phi` must have shape \[16\], got \[16, 1\]"),
        ("mask", holes, "`mask` must be True up to each sequence's final token"),
        ("log_psi", lambda x: x + torch.inf, "`log_psi` must be finite for every token"),
        ("log_p", lambda x: x - torch.inf, "`log_p` must be finite for every token"),
        ("log_q", lambda x: x * torch.nan, "`log_q` must be finite for every token"),
        ("log_phi", lambda x: x - torch.inf, "`log_phi` must be below inf and above -inf for at least one"),
        ("log_phi", lambda x: x * torch.nan, "`log_phi` must be below inf"),
        ("log_phi", lambda x: x + torch.inf, "`log_phi` must be below inf"),
    ],
)
def test_misuse_is_named(name, change, message):
    batch = some_batch()
    batch[name] = change(batch[name])
    with pytest.raises(ValueError, match=message):
        ctl_loss(**batch)


# -- The other losses --------------------------------------------------------------------------
CEILING = 0.1  # phi reaches 1, which FUDGE can only reach in the limit: its potential is phi e^-0.1


def log_norm_of(lm, theta, index):
    return log_normaliser(lm.log_p_step[index], theta[lm.siblings[index]])


def exact_sigma(lm, theta):
    """Return every output once, weighted by sigma."""
    index, rest = lm.batch(lm.full, log_p_next)
    return Positives(torch.where(rest["mask"], theta[index], torch.nan), rest["mask"], lm.sigma.log()), index


@dataclass
class Batch:
    """The enumerated batch of a language model, as the losses take it, with a table of values theta."""

    lm: TabularLM
    theta: torch.Tensor
    held: torch.Tensor  # what a stop-gradient sees of the table

    def __post_init__(self):
        self.index, rest = self.lm.enumerated()
        self.log_p, self.log_q, self.log_phi, self.mask = (rest[k] for k in ("log_p", "log_q", "log_phi", "mask"))
        self.log_psi = self.valid(self.theta[self.index])
        self.log_norm = self.valid(log_norm_of(self.lm, self.theta, self.index))
        self.held_log_norm = self.valid(log_norm_of(self.lm, self.held, self.index))
        # With these the mean over the batch is the expectation under p0.
        self.log_w = log_weights(self.log_p, self.log_q, torch.zeros_like(self.log_phi), self.mask)
        self.positives, index = exact_sigma(self.lm, self.theta)
        self.positives_log_norm = torch.where(
            self.positives.mask, log_norm_of(self.lm, self.theta, index), torch.nan
        )  # fmt: skip

    def valid(self, values):
        return torch.where(self.mask, values, torch.nan)

    def negatives(self):
        return self.log_psi, self.log_p, self.log_q, self.mask

    def pcl(self, log_norm=None, **changes):
        log_norm = self.log_norm if log_norm is None else log_norm
        log_q = self.log_p + self.log_psi - log_norm
        given = {"log_phi": self.log_phi, "mask": self.mask, "log_z": log_norm[:, 0], "log_w": self.log_w, **changes}
        return pcl_loss(self.log_psi, self.log_p, log_q, **given)


def exact_sixo(lm, theta, held):
    total = 0
    for index, sigma, log_p in lm.marginals():
        total -= (sigma * torch.log(theta[index].sigmoid())).sum()
        total -= (log_p.exp() * torch.log(1 - theta[index].sigmoid())).sum()
    return total / T


def exact_rl(lm, theta, held):
    total = 0
    for i, p in enumerate(lm.prefixes):
        if p in lm.full:
            target = log_phi_of(p)
        else:
            children = held[[lm.index[(*p, x)] for x in range(V)]]
            target = (log_p_next(p).exp() * children.exp()).sum().log()
        total = total + math.exp(lm.log_p(p)) * (target - theta[i]) ** 2
    return total / T


def exact_pcl(lm, theta, held):
    """The squared log weight (Eq. 16) of every step of q ~ p0 psi, at t = 1 but for its constant."""
    total = 0
    for i, p in enumerate(lm.prefixes):
        log_w = log_phi_of(p) - theta[i] if p in lm.full else 0
        if len(p) > 1:
            log_w = log_w + (log_p_next(p[:-1]).exp() * theta[lm.siblings[i]].exp()).sum().log()
            log_w = log_w - theta[lm.index[p[:-1]]]
        total = total + math.exp(lm.log_p(p)) * log_w**2
    return total / T


def exact_fudge(lm, theta, held):
    total = 0
    for index, _, log_p in lm.marginals():
        label, psi = (lm.log_psi_star[index] - CEILING).exp(), theta[index].sigmoid()
        total = total - (log_p.exp() * (label * psi.log() + (1 - label) * (1 - psi).log())).sum()
    return total / T


def exact_dpg(lm, theta, held):
    """KL(sigma || q) - KL(sigma || p0) of whole outputs, over T."""
    total = 0
    for sigma, s in zip(lm.sigma, lm.full, strict=True):
        log_q = sum(lm.log_q_next(s[:i], theta)[x] for i, x in enumerate(s))
        total = total + sigma * (lm.log_p(s) - log_q)
    return total / T


def exact_ctl(lm, theta, held):
    return lm.ctl(theta) - lm.ctl(torch.zeros_like(theta))


@dataclass
class Case:
    """One loss: on the enumerated batch, by definition, its optimum, and losses with one mistake each."""

    loss: Callable[[Batch], Any]
    exact: Callable[..., Any]
    free: str  # what the optimum is free up to: nothing, step, token (a constant per previous tokens), last token
    mistakes: dict[str, Callable[[Batch], Any]]
    offset: Callable[[TabularLM], float] = lambda lm: 0.0  # of log psi at the optimum
    squashed: bool = False

    def gradient(self, lm, theta, loss=None):
        table = theta.clone().requires_grad_()
        (loss or self.loss)(Batch(lm, table, theta)).backward()
        return table.grad

    def exact_gradient(self, lm, theta):
        table = theta.clone().requires_grad_()
        self.exact(lm, table, theta).backward()
        return table.grad

    def error(self, lm, theta):
        """Return the largest deviation of log psi from its optimum up to what is free there."""
        log_psi = logsigmoid(theta.detach()) if self.squashed else theta.detach()
        error = log_psi - lm.log_psi_star - self.offset(lm)

        def group(prefix):
            if self.free == "step":
                return 0 if lm.ends else len(prefix)
            by_parent = self.free == "token" or (self.free == "last token" and len(prefix) == T)
            return prefix[:-1] if by_parent else None

        groups = {}
        for value, prefix in zip(error.tolist(), lm.prefixes, strict=True):
            groups.setdefault(group(prefix), []).append(value)
        means = {key: 0 if key is None else sum(values) / len(values) for key, values in groups.items()}
        return max(abs(value - means[key]) for key, values in groups.items() for value in values)


def log_z_of(lm):
    return torch.logsumexp(torch.tensor([lm.log_p(s) + log_phi_of(s) for s in lm.full], dtype=torch.float64), 0).item()


def unweighted(positives):
    return Positives(positives.log_psi, positives.mask)


CASES = {
    "ctl": Case(
        lambda b: ctl_positives_loss(b.positives, *b.negatives()),
        exact_ctl,
        free="step",
        mistakes={
            "positives' weights forgotten": lambda b: ctl_positives_loss(unweighted(b.positives), *b.negatives()),
            "roles exchanged": lambda b: -ctl_positives_loss(b.positives, *b.negatives()),
            "proposal forgotten": lambda b: ctl_positives_loss(b.positives, b.log_psi, b.log_p, b.log_p, b.mask),
            "p0 as negatives": lambda b: sixo_loss(b.positives, *b.negatives()),
        },
    ),
    "sixo": Case(
        lambda b: sixo_loss(b.positives, *b.negatives()),
        exact_sixo,
        free="nothing",
        mistakes={
            "positives' weights forgotten": lambda b: sixo_loss(unweighted(b.positives), *b.negatives()),
            "proposal forgotten": lambda b: sixo_loss(b.positives, b.log_psi, b.log_p, b.log_p, b.mask),
            "sign of the logit": lambda b: sixo_loss(
                Positives(-b.positives.log_psi, b.positives.mask, b.positives.log_w), -b.log_psi, *b.negatives()[1:]
            ),
            "unit gain": lambda b: ctl_positives_loss(b.positives, *b.negatives()),
        },
        offset=lambda lm: -log_z_of(lm),
    ),
    "rl": Case(
        lambda b: rl_loss(b.log_psi, b.held_log_norm, b.log_phi, b.mask, b.log_w),
        exact_rl,
        free="nothing",
        mistakes={
            "weights forgotten": lambda b: rl_loss(b.log_psi, b.log_norm, b.log_phi, b.mask),
            "phi forgotten": lambda b: rl_loss(b.log_psi, b.log_norm, 0 * b.log_phi, b.mask, b.log_w),
            "the step's own normaliser": lambda b: rl_loss(
                b.log_psi, pad(b.log_norm, (1, 0))[:, :-1], b.log_phi, b.mask, b.log_w
            ),
            "targets move": lambda b: b.pcl(),
        },
    ),
    "pcl": Case(
        lambda b: b.pcl(),
        exact_pcl,
        free="last token",
        mistakes={
            "targets held": lambda b: b.pcl(log_norm=b.held_log_norm),
            "prompt's value 1": lambda b: b.pcl(log_z=torch.tensor(0.0)),
            "phi forgotten": lambda b: b.pcl(log_phi=0 * b.log_phi),
            "weights forgotten": lambda b: b.pcl(log_w=None),
        },
    ),
    "fudge": Case(
        lambda b: fudge_loss(b.log_psi, b.log_phi - CEILING, b.mask, b.log_w),
        exact_fudge,
        free="nothing",
        mistakes={
            "weights forgotten": lambda b: fudge_loss(b.log_psi, b.log_phi - CEILING, b.mask),
            "phi for log phi": lambda b: fudge_loss(b.log_psi, (b.log_phi - CEILING).exp() - 1, b.mask, b.log_w),
            "label exchanged": lambda b: fudge_loss(-b.log_psi, b.log_phi - CEILING, b.mask, b.log_w),
        },
        offset=lambda lm: -CEILING,
        squashed=True,
    ),
    "dpg": Case(
        lambda b: dpg_loss(b.positives, b.positives_log_norm),
        exact_dpg,
        free="token",
        mistakes={
            "not normalised": lambda b: dpg_loss(b.positives, b.positives_log_norm.detach()),
            "positives' weights forgotten": lambda b: dpg_loss(unweighted(b.positives), b.positives_log_norm),
            "roles exchanged": lambda b: -dpg_loss(b.positives, b.positives_log_norm),
        },
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def test_every_objective_is_compared():
    assert set(CASES) == set(OBJECTIVES)


@each_lm
@each_case
def test_gradient_is_the_exact_one(case, lm):
    """Sums of a few float64 terms: equal to rounding."""
    theta = poor_twist(lm)
    torch.testing.assert_close(case.gradient(lm, theta), case.exact_gradient(lm, theta), atol=1e-13, rtol=0)


@each_lm
@each_case
def test_value_is_the_exact_one(case, lm):
    """CTL and DPG leave out terms free of psi; here they are zero at psi = 1."""
    theta = poor_twist(lm)
    assert case.loss(Batch(lm, theta, theta)).item() == pytest.approx(case.exact(lm, theta, theta).item(), abs=1e-13)


@each_lm
@each_case
def test_gradient_is_that_of_finite_differences(case, lm):
    """Central differences, what a stop-gradient sees held: truncation 1e-10, rounding 1e-16 / 1e-5."""
    theta, step = poor_twist(lm), 1e-5
    expected = torch.zeros_like(theta)
    for i in range(len(theta)):
        shift = torch.zeros_like(theta)
        shift[i] = step
        up, down = (case.loss(Batch(lm, theta + sign * shift, theta)) for sign in (1, -1))
        expected[i] = (up - down) / (2 * step)
    torch.testing.assert_close(case.gradient(lm, theta), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("case", "mistaken"),
    [pytest.param(case, m, id=f"{name}: {what}") for name, case in CASES.items() for what, m in case.mistakes.items()],
)
@each_lm
def test_exact_gradient_tells_mistakes_of_all(case, mistaken, lm):
    """A wrong loss is off by more than 1e10 times what the test above allows."""
    theta = poor_twist(lm)
    assert (case.gradient(lm, theta, mistaken) - case.exact_gradient(lm, theta)).abs().max() > 1e-3


@each_lm
@pytest.mark.parametrize("name", [name for name in CASES if name != "rl"])
def test_training_finds_the_optimum_of_its_kind(name, lm):
    """Up to its own constants: none, the prompt's log Z, one per step, or one per previous tokens.

    1e-5: a gradient of 1e-10 over curvatures down to 1e-5 (a rare prefix).
    """
    case = CASES[name]
    theta = torch.zeros(len(lm.prefixes), dtype=torch.float64, requires_grad=True)
    assert case.error(lm, theta) > 0.1
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=1000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = case.loss(Batch(lm, theta, theta.detach()))
        value.backward()
        return value

    optimizer.step(closure)
    assert case.error(lm, theta) < 1e-5


@each_lm
def test_rl_finds_the_optimum_backwards_from_the_end(lm):
    """Steps scaled by each prefix's curvature, 2 p0(prefix) / T: after n of them the last n lengths are exact."""
    case = CASES["rl"]
    theta = poor_twist(lm)
    curvature = 2 / T * torch.tensor([math.exp(lm.log_p(p)) for p in lm.prefixes], dtype=torch.float64)
    for _ in range(T - 1):
        theta = theta - case.gradient(lm, theta) / curvature
    assert case.error(lm, theta) > 1e-3
    theta = theta - case.gradient(lm, theta) / curvature
    assert case.error(lm, theta) < 1e-12


def test_golden_losses():
    """Ten digits from an independent program, as sums over t; log psi* + 0.7 is off by 0.7 at the end alone."""
    lm = LMS["fixed length"]
    sub, best = poor_twist(lm), lm.log_psi_star

    def ctl(theta):
        return T * (CASES["ctl"].loss(Batch(lm, theta, theta)) - CASES["ctl"].loss(Batch(lm, best, best))).item()

    def rl(theta):
        return T * CASES["rl"].loss(Batch(lm, theta, theta)).item()

    steps = torch.tensor([[0.5, -2.0, 7.0][len(p) - 1] for p in lm.prefixes])
    assert ctl(sub) == pytest.approx(0.1623041448, abs=6e-11)
    assert ctl(best + steps) == pytest.approx(0, abs=1e-14)
    assert rl(sub) == pytest.approx(2.8984073395, abs=6e-11)
    assert rl(best) == pytest.approx(0, abs=1e-28)
    assert rl(best + 0.7) == pytest.approx(0.49, abs=1e-14)
    # KL(sigma || q) at the suboptimal twist, from the DPG loss
    log_ratio = torch.tensor([lm.log_p(s) for s in lm.full], dtype=torch.float64)
    kl_p0 = (lm.sigma * (lm.sigma.log() - log_ratio)).sum()
    dpg = CASES["dpg"].loss(Batch(lm, sub, sub))
    assert (T * dpg + kl_p0).item() == pytest.approx(0.1172789374, abs=6e-11)


@each_lm
def test_same_batch_is_a_case_of_given_positives(lm):
    """The positives' weights of ctl_loss are ``log_weights``, and sixo_loss can share a batch likewise."""
    index, rest = lm.sampled(64, poor_twist(lm), torch.Generator().manual_seed(5))
    log_psi = torch.where(rest["mask"], (2 * poor_twist(lm))[index], torch.nan)
    positives = Positives(log_psi, rest["mask"], log_weights(**rest))
    negatives = {name: tensor for name, tensor in rest.items() if name != "log_phi"}
    assert ctl_positives_loss(positives, log_psi, **negatives) == ctl_loss(log_psi, **rest)


@each_lm
def test_a_single_exact_positive_is_unbiased(lm):
    """The mean over one exact sample of sigma, enumerated, of the gradient: exact, without weights."""
    theta = poor_twist(lm)
    for name, loss in (("ctl", ctl_positives_loss), ("sixo", sixo_loss)):
        total = 0
        for k, sigma in enumerate(lm.sigma):

            def one(b, k=k, loss=loss):
                # Cut to its own length: a batch of positives may be narrower than that of negatives.
                length = int(b.positives.mask[k].sum())
                kept = Positives(b.positives.log_psi[k : k + 1, :length], b.positives.mask[k : k + 1, :length])
                return loss(kept, *b.negatives())

            total = total + sigma * CASES[name].gradient(lm, theta, one)
        torch.testing.assert_close(total, CASES[name].exact_gradient(lm, theta), atol=1e-13, rtol=0)


def test_smc_positives_are_properly_weighted():
    """Over all 256 runs of twisted SMC with two particles: E[Z-hat gradient] / Z is the exact gradient.

    The final weights times Z-hat estimate Z E_sigma without bias, and the positives enter linearly.
    """
    lm = LMS["fixed length"]
    theta = poor_twist(lm)
    table = {}

    def rows(prefixes, value):
        return torch.stack([table.setdefault((value, p), value(p)) for p in map(tuple, prefixes.tolist())])

    target = Target(
        log_p=partial(rows, value=log_p_next),
        log_psi=partial(rows, value=lambda p: torch.stack([theta[lm.index[(*p, x)]] for x in range(V)])),
        log_phi=partial(rows, value=lambda p: torch.tensor(log_phi_of(p), dtype=torch.float64)),
        horizon=T,
    )
    runs = list(branches(lambda draw: smc(target, 2, draw)))
    assert len(runs) == 2 ** (2 * T) * 2**2
    z = math.exp(log_z_of(lm))
    for name, loss in (("ctl", ctl_positives_loss), ("sixo", sixo_loss)):
        good = bad = 0
        for p, run in runs:
            index, rest = lm.batch([tuple(s) for s in run.sequences.tolist()], log_p_next)

            def population(b, log_w, loss=loss, index=index, mask=rest["mask"]):
                return loss(Positives(b.theta[index], mask, log_w), *b.negatives())

            share = p * run.log_z.exp() / z
            good = good + share * CASES[name].gradient(lm, theta, partial(population, log_w=run.log_w))
            bad = bad + share * CASES[name].gradient(lm, theta, partial(population, log_w=None))
        exact = CASES[name].exact_gradient(lm, theta)
        torch.testing.assert_close(good, exact, atol=1e-12, rtol=0)
        assert (bad - exact).abs().max() > 1e-3


def test_dpg_optimum_is_no_twist():
    """Prop. E.2: a factor c(s_1:t-1) leaves the proposal and the DPG loss alone, and spoils the marginals."""
    lm = LMS["fixed length"]
    spoilt = lm.log_psi_star + torch.tensor([2.0 * sum(p[:-1]) for p in lm.prefixes])
    best = CASES["dpg"].loss(Batch(lm, lm.log_psi_star, lm.log_psi_star))
    assert CASES["dpg"].loss(Batch(lm, spoilt, spoilt)).item() == pytest.approx(best.item(), abs=1e-14)
    assert lm.ctl(lm.log_psi_star).item() == pytest.approx(0, abs=1e-14)
    assert lm.ctl(spoilt) > 0.1


# -- Conditions --------------------------------------------------------------------------------
class Conditional:
    """A label o of each output: sigma(o=1|s) = 0.9 phi(s), and 1 minus that for o = 0."""

    def __init__(self, lm):
        self.lm = lm
        self.log_phi = torch.tensor([[self.log_label(s, o) for s in lm.full] for o in (0, 1)], dtype=torch.float64)
        self.log_p = torch.tensor([lm.log_p(s) for s in lm.full], dtype=torch.float64)
        self.z = (self.log_p + self.log_phi).logsumexp(1).exp()
        self.sigma = (self.log_p + self.log_phi).softmax(1)  # [o, output]
        self.log_psi_star = torch.stack([
            torch.stack([
                torch.logsumexp(torch.stack([
                    self.log_p[k] + self.log_phi[o, k] for k, s in enumerate(lm.full) if s[: len(p)] == p
                ]), 0) - lm.log_p(p) for p in lm.prefixes
            ]) for o in (0, 1)
        ])  # fmt: skip

    @staticmethod
    def log_label(sequence, o):
        label = 0.9 * math.exp(log_phi_of(sequence))
        return math.log(label if o else 1 - label)

    def sixo_batches(self, theta, negative_conditions):
        """Return positives (s, o) ~ p0(s) sigma(o|s), and negatives s ~ p0 with a law [o, output] of o."""
        index, rest = self.lm.batch(self.lm.full * 2, log_p_next)
        condition = torch.tensor([0] * len(self.lm.full) + [1] * len(self.lm.full))
        log_psi = torch.where(rest["mask"], theta[condition[:, None], index], torch.nan)
        positives = Positives(log_psi, rest["mask"], (self.log_p + self.log_phi).flatten())
        # Log p0/q of whole rows, put at the first token: a pair's law does not depend on t.
        log_pair = pad((self.log_p + negative_conditions.log()).flatten()[:, None], (0, T - 1))
        return positives, (log_psi, log_pair, torch.zeros_like(log_pair), rest["mask"])


def test_conditional_ctl_is_a_loss_per_condition():
    """Averaged over conditions the gradient is exact for each; pooled in one call it is not."""
    lm = LMS["ending early"]
    conditional = Conditional(lm)
    theta = torch.stack([poor_twist(lm), -poor_twist(lm)]).requires_grad_()
    index, rest = lm.enumerated()
    sequences = [lm.prefixes[row[mask][-1]] for row, mask in zip(index, rest["mask"], strict=True)]
    batches = []
    for o in (0, 1):
        log_phi = torch.tensor([conditional.log_label(s, o) for s in sequences], dtype=torch.float64)
        batches.append({**rest, "log_psi": torch.where(rest["mask"], theta[o, index], torch.nan), "log_phi": log_phi})
    exact = 0
    for o in (0, 1):
        for states, _, log_p in lm.marginals():
            sigma = (log_p + conditional.log_psi_star[o, states]).softmax(0)
            log_pi = (log_p + theta[o, states]).log_softmax(0)
            exact = exact + (sigma * (sigma.log() - log_pi)).sum() / T / 2
    (expected,) = torch.autograd.grad(exact, theta)
    (got,) = torch.autograd.grad(sum(ctl_loss(**b) for b in batches) / 2, theta, retain_graph=True)
    torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)
    pooled = ctl_loss(**{name: torch.cat([b[name] for b in batches]) for name in batches[0]})
    (wrong,) = torch.autograd.grad(pooled, theta)
    assert (wrong - expected).abs().max() > 1e-2


def test_conditional_sixo_finds_the_posterior_ratio():
    """log sigma(s_1:t|o) / p0(s_1:t) for each o, from pairs whose o knows nothing of s; one that does spoils it."""
    lm = LMS["fixed length"]
    conditional = Conditional(lm)
    optimum = conditional.log_psi_star - conditional.z.log()[:, None]
    independent = conditional.z[:, None].expand_as(conditional.log_phi)
    leaking = 0.7 * independent + 0.3 * conditional.log_phi.exp()  # what a permutation with fixed points gives

    def gradient_at_optimum(law):
        theta = optimum.clone().requires_grad_()
        positives, negatives = conditional.sixo_batches(theta, law)
        (gradient,) = torch.autograd.grad(sixo_loss(positives, *negatives), theta)
        return gradient.abs().max().item()

    assert gradient_at_optimum(independent) < 1e-14
    assert gradient_at_optimum(leaking) > 1e-3


def test_mismatched_pairs_are_never_true_ones():
    generator = torch.Generator().manual_seed(6)
    seen = set()
    for _ in range(64):  # misses one of the three shifts with probability 3 (2/3)^64 = 2e-11
        index = mismatched(4, generator)
        assert sorted(index.tolist()) == [0, 1, 2, 3]
        assert (index != torch.arange(4)).all()
        seen.add(tuple(index.tolist()))
    assert len(seen) == 3
    with pytest.raises(ValueError, match="`count` must be at least 2, got 1: a condition can only be exchanged"):
        mismatched(1, generator)


# -- Batches, precision and misuse of all losses -----------------------------------------------
def some_arguments(dtype=torch.float64):
    """Return every argument that a loss may take, of one batch of sampled sequences."""
    lm = LMS["ending early"]
    theta = poor_twist(lm)
    index, rest = lm.sampled(16, theta, torch.Generator().manual_seed(3))
    rest = {"log_psi": theta[index], "log_norm": log_norm_of(lm, theta, index), **rest}
    rest["log_z"], rest["log_w"] = rest["log_norm"][:, 0], log_weights(**{
        name: rest[name] for name in ("log_p", "log_q", "log_phi", "mask")
    })  # fmt: skip
    return {name: tensor if name == "mask" else tensor.to(dtype) for name, tensor in rest.items()}


#: Every loss, by the names of its arguments; positives are the batch itself.
LOSSES = {
    "ctl": lambda a: ctl_loss(a["log_psi"], a["log_p"], a["log_q"], a["log_phi"], a["mask"]),
    "ctl_positives": lambda a: ctl_positives_loss(
        Positives(a["log_psi"], a["mask"], a["log_w"]), a["log_psi"], a["log_p"], a["log_q"], a["mask"]
    ),
    "sixo": lambda a: sixo_loss(
        Positives(a["log_psi"], a["mask"], a["log_w"]), a["log_psi"], a["log_p"], a["log_q"], a["mask"]
    ),
    "rl": lambda a: rl_loss(a["log_psi"], a["log_norm"], a["log_phi"], a["mask"], a["log_w"]),
    "pcl": lambda a: pcl_loss(
        a["log_psi"], a["log_p"], a["log_q"], a["log_phi"], a["mask"], a["log_z"], a["log_w"]
    ),
    "fudge": lambda a: fudge_loss(a["log_psi"], a["log_phi"], a["mask"], a["log_w"]),
    "dpg": lambda a: dpg_loss(Positives(a["log_psi"], a["mask"], a["log_w"]), a["log_norm"]),
}  # fmt: skip
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
PER_SEQUENCE = ("log_phi", "log_w", "log_z")


@each_loss
def test_padding_changes_no_loss_and_is_never_read(loss):
    arguments = some_arguments()
    padded = {
        name: tensor if name in PER_SEQUENCE else pad(tensor, (0, 4), value=0 if name == "mask" else math.nan)
        for name, tensor in arguments.items()
    }
    gradients = []
    for batch in (arguments, padded):
        batch["log_psi"].requires_grad_()
        value = loss(batch)
        gradients.append(torch.autograd.grad(value, batch["log_psi"])[0][:, :T])
        assert value.item() == pytest.approx(loss(arguments).item(), abs=1e-15)
    torch.testing.assert_close(*gradients, atol=1e-15, rtol=0)
    assert (gradients[0][~arguments["mask"]] == 0).all()


@pytest.mark.parametrize("loss", [ctl_positives_loss, sixo_loss])
def test_the_longer_batch_sets_the_last_step(loss):
    """Short positives stay as they are until the negatives end, and the other way round."""
    long, short = some_arguments(), some_arguments()
    keep = short["mask"].sum(1) < T
    assert 0 < keep.sum() < len(keep)
    short = {name: tensor[keep] if name in PER_SEQUENCE else tensor[keep, : T - 1] for name, tensor in short.items()}
    wide = {name: tensor if name in PER_SEQUENCE else pad(tensor, (0, 1)) for name, tensor in short.items()}

    def value(positive, negative):
        positives = Positives(positive["log_psi"], positive["mask"], positive["log_w"])
        return loss(positives, *(negative[name] for name in ("log_psi", "log_p", "log_q", "mask")))

    torch.testing.assert_close(value(short, long), value(wide, long), atol=1e-15, rtol=0)
    torch.testing.assert_close(value(long, short), value(long, wide), atol=1e-15, rtol=0)
    assert (value(short, short) - value(wide, wide)).abs() < 1e-15  # no step that neither takes
    cut = {name: tensor if name in PER_SEQUENCE else tensor[:, : T - 1] for name, tensor in long.items()}
    assert (value(short, long) - value(short, cut)).abs() > 1e-3
    assert (value(long, short) - value(cut, short)).abs() > 1e-3


@each_loss
def test_long_sequences_lose_nothing_in_float32(loss):
    """1,000 tokens at log p0 = -12 are e^-12000. Sums of 1,000 float32 logs err by under 1e-4 of their spread."""
    generator = torch.Generator().manual_seed(4)
    arguments = {name: torch.randn(8, 1000, generator=generator).double() for name in ("log_psi", "log_norm")}
    arguments["log_q"] = -12 + 0.1 * torch.randn(8, 1000, generator=generator).double()
    arguments["log_p"] = torch.full_like(arguments["log_q"], -12)
    arguments["log_phi"] = -torch.rand(8, generator=generator).double()
    arguments["log_z"] = arguments["log_w"] = arguments["log_phi"]
    results = []
    for dtype in (torch.float32, torch.float64):
        batch = {name: tensor.to(dtype) for name, tensor in arguments.items()}
        batch["mask"] = torch.ones(8, 1000, dtype=torch.bool)
        batch["log_psi"].requires_grad_()
        value = loss(batch)
        assert value.dtype == dtype
        results.append((value.double().detach(), torch.autograd.grad(value, batch["log_psi"])[0].double()))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=1e-4)


@each_loss
def test_half_precision_is_widened(loss):
    """bfloat16 inputs give what the same numbers in float32 give."""
    half = some_arguments(torch.bfloat16)
    single = {name: tensor if name == "mask" else tensor.float() for name, tensor in half.items()}
    assert loss(half).dtype == torch.float32
    assert loss(half) == loss(single)


@pytest.mark.parametrize("logit", [-200.0, -30.0, 30.0, 200.0])
def test_saturated_classifiers_keep_their_gradients(logit):
    """log(1 - sigmoid) loses its argument from 17 on in float32, and its gradient, 1/0, with it."""
    values = torch.full((4, 2), logit, requires_grad=True)
    mask, zeros = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 2)
    label = 0.25
    (fudge,) = torch.autograd.grad(fudge_loss(values, torch.full((4,), math.log(label)), mask), values)
    torch.testing.assert_close(fudge, (values.detach().sigmoid() - label) / 8)
    (sixo,) = torch.autograd.grad(sixo_loss(Positives(values, mask), values, zeros, zeros, mask), values)
    torch.testing.assert_close(sixo, (2 * values.detach().sigmoid() - 1) / 8)
    naive = -(label * values.sigmoid().log() + (1 - label) * (1 - values.sigmoid()).log()).mean()
    assert not naive.isfinite() or abs(logit) < 100


def test_a_zero_phi_is_a_zero_weight_to_all_that_take_it():
    """phi = 0 equals phi = e^-1000 to rounding."""
    for name in ("ctl", "ctl_positives", "sixo", "fudge", "dpg"):
        arguments = some_arguments()
        values = []
        for log_phi in (-torch.inf, -1000.0):
            arguments["log_phi"][3] = arguments["log_w"][3] = log_phi
            values.append(LOSSES[name](arguments))
        torch.testing.assert_close(*values, atol=1e-15, rtol=0)


GRADIENTS = {
    "ctl": {"log_psi"}, "ctl_positives": {"log_psi"}, "sixo": {"log_psi"}, "rl": {"log_psi"},
    "pcl": {"log_psi", "log_p", "log_q", "log_z"}, "fudge": {"log_psi"}, "dpg": {"log_psi", "log_norm"},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_what_is_learned_and_nothing_else(name):
    arguments = {key: tensor if key == "mask" else tensor.detach() for key, tensor in some_arguments().items()}
    for key, tensor in arguments.items():
        if key != "mask":
            tensor.requires_grad_()
    LOSSES[name](arguments).backward()
    assert {key for key, tensor in arguments.items() if tensor.grad is not None} == GRADIENTS[name]


def test_log_normaliser_has_the_proposal_as_gradient():
    """For log psi far from 0 in float32, too."""
    log_p = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_psi = (100 * torch.randn(5, 100, generator=torch.Generator().manual_seed(1))).requires_grad_()
    log_norm = log_normaliser(log_p, log_psi)
    assert log_norm.isfinite().all()
    (gradient,) = torch.autograd.grad(log_norm.sum(), log_psi)
    torch.testing.assert_close(gradient, (log_p + log_psi).softmax(-1))
    assert log_normaliser(log_p, torch.zeros(5, 100)).abs().max() < 1e-6


FINITE, WEIGHTS = "must be finite, got inf or nan: squares", "must be below inf and above -inf for at least one"


@pytest.mark.parametrize(
    ("loss", "name", "change", "message"),
    [
        ("ctl_positives", "log_p", lambda x: x[:, :2], r"`log_p` must have the shape \[16, 3\] of `log_psi`, got"),
        ("ctl_positives", "log_w", lambda x: x[:3], r"`positives.log_w` must have shape \[16\], got \[3\]"),
        ("ctl_positives", "log_w", lambda x: x - torch.inf, f"`positives.log_w` {WEIGHTS}"),
        ("ctl_positives", "mask", holes, "`mask` must be True up to each sequence's final token"),
        ("sixo", "log_q", lambda x: x * torch.nan, "`log_q` must be finite for every token"),
        ("sixo", "log_w", lambda x: x * torch.nan, f"`positives.log_w` {WEIGHTS}"),
        ("rl", "log_norm", lambda x: x[:, 1:], r"`log_norm` must have the shape \[16, 3\] of `log_psi`, got \[16, 2\]"),
        ("rl", "log_norm", lambda x: x + torch.inf, "`log_norm` must be finite for every token"),
        ("rl", "log_phi", lambda x: x[:1], r"`log_phi` must have shape \[16\], got \[1\]"),
        ("rl", "log_phi", lambda x: x.index_fill(0, torch.tensor([2]), -torch.inf), f"`log_phi` {FINITE}"),
        ("rl", "log_w", lambda x: x[:, None], r"`log_w` must have shape \[16\], got \[16, 1\]"),
        ("rl", "log_w", lambda x: x + torch.inf, f"`log_w` {WEIGHTS}"),
        ("pcl", "log_phi", lambda x: x * torch.nan, f"`log_phi` {FINITE}"),
        ("pcl", "log_z", lambda x: x[:3], r"`log_z` must have shape \[\] or \[16\], got \[3\]"),
        ("pcl", "log_z", lambda x: x * torch.nan, f"`log_z` {FINITE}"),
        ("fudge", "log_psi", lambda x: x[0], r"`logit` must have shape \[B, T\], got \[3\]"),
        ("fudge", "log_phi", lambda x: 0 * x + 0.5, "`log_phi` must be at most 0 for FUDGE, got up to 0.5"),
        ("fudge", "log_phi", lambda x: x * torch.nan, "`log_phi` must be at most 0 for FUDGE, got up to nan"),
        ("dpg", "log_psi", lambda x: x * torch.nan, "`positives.log_psi` must be finite for every token"),
        ("dpg", "log_norm", lambda x: x[1:], r"`log_norm` must have the shape \[16, 3\] of `positives.log_psi`"),
    ],
)
def test_misuse_of_any_loss_is_named(loss, name, change, message):
    arguments = some_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        LOSSES[loss](arguments)


def test_misuse_of_log_weights_is_named():
    batch = {name: tensor for name, tensor in some_batch().items() if name != "log_psi"}
    with pytest.raises(ValueError, match=f"`log_phi` {WEIGHTS}"):
        log_weights(**{**batch, "log_phi": batch["log_phi"] - torch.inf})
    with pytest.raises(ValueError, match=r"`log_q` must have the shape \[16, 3\] of `log_p`"):
        log_weights(**{**batch, "log_q": batch["log_q"][1:]})


# -- The registry ------------------------------------------------------------------------------
def test_objectives_by_name():
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert get_objective(name, proposal_only=True) is objective
        assert objective.smc_twist == (name != "dpg")
        if objective.smc_twist:
            assert get_objective(name) is objective
        assert objective.squashed == CASES[name].squashed


def test_dpg_is_refused_as_a_twist():
    with pytest.raises(ValueError, match=r"`objective` .* got 'dpg': DPG .* c\(s_1:t-1\).*Prop. E.2.*`proposal_only`"):
        get_objective("dpg")


def test_unknown_objectives_are_named():
    with pytest.raises(ValueError, match=r"`objective` must be one of ctl, .*got 'sixxo' \(did you mean 'sixo'\?\)"):
        get_objective("sixxo")
