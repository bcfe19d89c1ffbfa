"""The CTL loss against a language model small enough to enumerate.

The model has two tokens and three steps; in the second family token 1 ends a sequence, so that
lengths differ. Expectations are exact sums wherever the name of a test does not say "sampled".
"""

import itertools
import math

import pytest
import torch

from vllm_twist.objectives import ctl_loss

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

    def log_p(self, prefix):
        return sum(log_p_next(prefix[:i])[x].item() for i, x in enumerate(prefix))

    def state(self, sequence, t):
        """Return the prefix that a sequence has at time t: itself once it has ended."""
        return sequence[: min(t, len(sequence))]

    def ctl(self, theta):
        """Return the exact mean over t of KL(sigma(s_1:t) || pi_t), from its definition."""
        total = 0
        for t in range(1, T + 1):
            states = sorted({self.state(s, t) for s in self.full})
            sigma = torch.stack([
                sum(self.sigma[k] for k, s in enumerate(self.full) if self.state(s, t) == state) for state in states
            ])  # fmt: skip
            log_p = torch.tensor([self.log_p(state) for state in states], dtype=torch.float64)
            log_pi = torch.log_softmax(log_p + theta[[self.index[state] for state in states]], 0)
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
