"""Losses that teach a twist head from sampled sequences: pure maths on log probabilities (nats).

    loss                arguments beside masks                     log psi at the optimum    Zhao et al. 2024
    ctl_loss            log_psi, log_p, log_q, log_phi             log psi* + c_t            Sec. 4.1
    ctl_positives_loss  Positives; log_psi, log_p, log_q           log psi* + c_t            Sec. 4.1
    sixo_loss           Positives; log_psi, log_p, log_q           log psi* - log Z          Table 1
    rl_loss             log_psi, log_norm, log_phi                 log psi*                  Table 1, App. C.1
    pcl_loss            log_psi, log_p, log_q, log_phi, log_z      log psi* (t < T)          App. C.1
    fudge_loss          logit, log_phi                             log psi* (phi < 1)        Table 1
    dpg_loss            Positives; log_norm                        log psi* + c(s_1:t-1)     App. E

with psi*_t(s_1:t) the expectation of phi under p0 given s_1:t (Eq. 11 of Zhao et al. 2024, arXiv
2404.17546). ``OBJECTIVES`` says the same to programs, and ``get_objective`` refuses what cannot be
a twist.

One convention for all. Rows are sequences, padded on the right; column t belongs to token s_t:

    log_psi   [B, T]  log psi_t(s_1:t); carries the gradient
    log_norm  [B, T]  log Z^pi_t(s_1:t-1) = log sum_v p0(v | s_1:t-1) psi_t(s_1:t-1, v), ``log_normaliser``
    log_p     [B, T]  log p0(s_t | s_1:t-1)
    log_q     [B, T]  log q(s_t | s_1:t-1), q being what the sequences were drawn from
    log_phi   [B]     log phi of the sequences; -inf where phi = 0
    log_w     [B]     log weights of the sequences, normalised here; None for equal ones
    mask      [B, T]  True up to and with the final token, False beyond, where nothing is ever read

All of these come from one teacher-forced pass over sequences that are given: no loss is
differentiated through sampling. Values are in float32 or wider, whatever comes in.

A sequence that has ended stays as it is: later targets keep its whole probability, with psi_t =
psi at its final token and p0 = q = 1 for the steps it no longer takes. So losses that compare the
laws of prefixes (CTL, SIXO, FUDGE) count it at every t up to the longest length in the call; in
those made of steps (RL, PCL, DPG) a step not taken is exactly consistent and adds 0. All are means
over t, not the paper's sums, up to that longest length: it keeps the scale of the gradient apart
from the length, and padding beyond changes nothing.

Conditional twists psi_t(s_1:t, o_T) take the same functions, a condition o being to sigma what a
prompt is: one more thing that is given (Sec. 3.3). ``log_psi`` is evaluated at each row's own o,
and log phi = log sigma(o | s_1:T).

    CTL             has a normaliser per prompt and condition: call it for each, and average.
    RL, PCL, DPG    are means over rows: rows of any prompts and conditions may share a call, unless
                    they are weighted, for weights are normalised over the call.
    SIXO            likewise; its negatives pair s ~ p0 with an o of the same law that knows nothing
                    of s: another row's, ``mismatched``.
    FUDGE           likewise; o must know nothing of the tokens after t, so pair s ~ p0 with
                    another row's o here, too, and label it sigma(o | s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vllm_twist.config import did_you_mean


@dataclass(frozen=True)
class Positives:
    """Sequences that stand for the target sigma.

    Attributes:
        log_psi: log twist values [B, T]; carries the gradient.
        mask: True [B, T] up to and with the final token of each sequence, False beyond.
        log_w: log weights [B] towards sigma (nats), up to a constant: ``log_weights`` of draws from a
            proposal, or the final weights of twisted SMC. None for exact samples.
    """

    log_psi: Tensor
    mask: Tensor
    log_w: Tensor | None = None


def ctl_loss(log_psi: Tensor, log_p: Tensor, log_q: Tensor, log_phi: Tensor, mask: Tensor) -> Tensor:
    """Return the contrastive twist learning (CTL) loss with positives from the same batch.

    CTL matches every marginal of the target: mean over t of KL(sigma(s_1:t) || pi_t(s_1:t)), where
    sigma ~ p0 phi and pi_t ~ p0 psi_t. Up to a term free of psi that is

        mean_t [ -sum_k a_k log psi_t(s^k) + log 1/B sum_k exp(log p0(s^k_1:t) - log q(s^k_1:t) + log psi_t(s^k)) ]
        a = softmax_k(log p0(s^k) + log phi(s^k) - log q(s^k)),

    whose gradient is -mean_t sum_k (a_k - b_tk) d log psi_t(s^k), with b_tk the softmax over k of the
    exponents above: the positives' weights minus the negatives' (Zhao et al. 2024, arXiv 2404.17546,
    Sec. 4.1; approximate positives as in Sec. 4.1.2, from self-normalised importance sampling). The
    mean over t, not the paper's sum, keeps the scale of the gradient apart from the length. At psi = 1
    the value is near 0, and it falls to -mean_t KL(sigma(s_1:t) || p0(s_1:t)).

    Sequences of one batch share a prompt, for every prompt has its own normaliser, and may differ in
    length. As a sequence that has ended counts, as positive and as negative, at every t up to the
    longest length in the batch, the constant that psi_t is free up to has to agree between the steps
    at which sequences end and all later ones. To leave it out instead would compare only the
    survivors, and the twist of an early end against that of going on would never be learned.

    Args:
        log_psi: log twist values [B, T] of the sampled tokens, prefix by prefix; carries the gradient.
        log_p: log p0 of each token given its prefix [B, T].
        log_q: log proposal probability of each token given its prefix [B, T].
        log_phi: log potential [B] of the full sequences; -inf where phi = 0.
        mask: True [B, T] up to and with the final token of each sequence, False beyond. What the
            other arguments hold beyond is never read.

    Returns:
        The loss, a float32 (or wider) scalar. Only ``log_psi`` receives a gradient.

    Raises:
        ValueError: shapes that disagree, a mask with gaps or an empty row, phi zero for the whole
            batch, or values that are not finite.
    """
    mask = _check(log_psi, mask, {"log_p": log_p, "log_q": log_q}, {"log_phi": log_phi})
    _check_weights("log_phi", log_phi)
    dtype = _wide(log_psi)
    horizon = mask.shape[1]
    log_psi = _stay(log_psi.to(dtype), mask, horizon)
    with torch.no_grad():
        log_w = _prefix_log_weights(log_p.to(dtype), log_q.to(dtype), mask, horizon)
        positive = torch.softmax(log_w[:, -1] + log_phi.to(dtype), 0)
    return _mean_over_steps(_log_mean_exp(log_w + log_psi) - positive @ log_psi, mask)


def ctl_positives_loss(positives: Positives, log_psi: Tensor, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """Return the CTL loss with positives of their own: exact samples of sigma, or weighted ones.

    ``ctl_loss`` with a and the first log psi those of other sequences (Zhao et al. 2024, Sec. 4.1.2),

        mean_t [ -sum_j a_j log psi_t(s+^j) + log 1/B sum_k exp(log p0(s^k_1:t) - log q(s^k_1:t) + log psi_t(s^k)) ]

    with a_j = 1/P for exact samples and softmax_j(log w^j) for a population of twisted SMC. Every
    prefix of a positive is used with the weight of the whole. Positives and negatives share a prompt
    and may differ in number and length; ``log_psi`` of both carries a gradient.

    Args:
        positives: what stands for sigma.
        log_psi: log twist values [B, T] of the negatives, drawn from q without resampling; with
            ``log_p``, ``log_q`` and ``mask`` as in ``ctl_loss``.

    Raises:
        ValueError: as ``ctl_loss``, for either batch.
    """
    negative_log_psi, log_w, positive_log_psi, positive, live = _contrast(positives, log_psi, log_p, log_q, mask)
    return _mean_over_steps(_log_mean_exp(log_w + negative_log_psi) - positive @ positive_log_psi, live)


def sixo_loss(positives: Positives, log_psi: Tensor, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """Return the SIXO loss: tell sigma from p0 at every length by a classifier whose logit is log psi_t.

        mean_t [ -sum_j a_j log sigmoid(log psi_t(s+^j)) - sum_k b_tk log sigmoid(-log psi_t(s^k)) ]

    (Zhao et al. 2024, Table 1: noise-contrastive estimation, after Lawson et al. 2022) with a as in
    ``ctl_positives_loss`` and b_tk = softmax_k(log p0(s^k_1:t) - log q(s^k_1:t)), 1/B for draws from
    p0, which are the paper's: pass their ``log_p`` as ``log_q``. The optimum is log sigma(s_1:t) /
    p0(s_1:t) = log psi* - log Z. Approximate positives may be the negatives' own sequences:
    ``Positives(log_psi, mask, log_weights(log_p, log_q, log_phi, mask))``.

    Args:
        positives: what stands for sigma.
        log_psi: log twist values [B, T] of the negatives; with ``log_p``, ``log_q`` and ``mask`` as in
            ``ctl_loss``.

    Raises:
        ValueError: as ``ctl_loss``, for either batch.
    """
    negative_log_psi, log_w, positive_log_psi, positive, live = _contrast(positives, log_psi, log_p, log_q, mask)
    negative = torch.softmax(log_w, 0)
    values = -(positive @ logsigmoid(positive_log_psi)) - (negative * logsigmoid(-negative_log_psi)).sum(0)
    return _mean_over_steps(values, live)


def rl_loss(log_psi: Tensor, log_norm: Tensor, log_phi: Tensor, mask: Tensor, log_w: Tensor | None = None) -> Tensor:
    """Return the soft-Q loss: the square by which a twist misses what its successors say of it.

        mean_k mean_t ( target_t - log psi_t )^2     target_t = log sum_v p0(v | s_1:t) psi_{t+1}(s_1:t, v)
                                                     and log phi at the final token

    (Zhao et al. 2024, Table 1 and App. C.1) with targets held fixed: ``log_norm`` gets no gradient.
    The sequences may be drawn from anything that reaches all of them; the optimum, log psi*, is the
    same.

    Args:
        log_psi: log twist values [B, T]; carries the gradient.
        log_norm: log normaliser [B, T] of each step, see ``log_normaliser``; the first is not used.
        log_phi: log potential [B], finite.
        mask: True [B, T] up to and with the final token of each sequence, False beyond.
        log_w: log weights [B] of the sequences, where they are not equal.

    Raises:
        ValueError: shapes that disagree, a mask with gaps or an empty row, or values that are not
            finite, which phi = 0 is here.
    """
    mask = _check(log_psi, mask, {"log_norm": log_norm}, {"log_phi": log_phi})
    _check_finite("log_phi", log_phi)
    dtype = _wide(log_psi)
    with torch.no_grad():
        target = _one_step_on(log_norm.to(dtype), log_phi.to(dtype), mask)
    return _mean_of_squares(target - torch.where(mask, log_psi.to(dtype), 0), mask, log_w)


def pcl_loss(
    log_psi: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    log_phi: Tensor,
    mask: Tensor,
    log_z: Tensor,
    log_w: Tensor | None = None,
) -> Tensor:
    """Return the path consistency (PCL) loss: the squared log weight of each single step.

        mean_k mean_t ( log psi_t - log psi_{t-1} - log q(s_t | s_1:t-1) / p0(s_t | s_1:t-1) )^2
                        with phi in place of psi at the final token and Z in place of psi_0

    (Zhao et al. 2024, App. C.1, after Nachum et al. 2017). It is zero only where psi and q are both
    optimal, so q is learned, too, and unlike in the other losses ``log_q`` is that of the present
    proposal wherever the sequences came from, and carries a gradient. With the twist-induced
    proposal and log_norm of ``log_normaliser``, pass

        log_q = log_p + log_psi - log_norm        log_z = log_norm[:, 0]

    The residuals are then those of ``rl_loss``, with the gradient through both of their sides, except
    that the last two are one: log psi_t is log psi* for t < T, and at a step at which every token
    ends the sequence only the proposal reads psi_T, and it stays free up to c(s_1:T-1).

    Args:
        log_psi: log twist values [B, T]; carries a gradient. The final one is not used.
        log_p: log p0 of each token given its prefix [B, T].
        log_q: log probability of each token given its prefix [B, T] under the proposal that is
            learned; carries a gradient.
        log_phi: log potential [B], finite.
        mask: True [B, T] up to and with the final token of each sequence, False beyond.
        log_z: the value of the prompt, [] or [B]: where the paths start; may carry a gradient.
        log_w: log weights [B] of the sequences, where they are not equal.

    Raises:
        ValueError: shapes that disagree, a mask with gaps or an empty row, or values that are not
            finite, which phi = 0 is here.
    """
    mask = _check(log_psi, mask, {"log_p": log_p, "log_q": log_q}, {"log_phi": log_phi})
    _check_finite("log_phi", log_phi)
    if log_z.shape not in (torch.Size(), log_phi.shape):
        raise ValueError(
            f"`log_z` must have shape [] or [{len(log_phi)}], got {list(log_z.shape)}: pass one value per prompt or "
            "per sequence."
        )
    _check_finite("log_z", log_z)
    dtype = _wide(log_psi)
    log_psi, log_step = log_psi.to(dtype), log_q.to(dtype) - log_p.to(dtype)
    final = ~torch.nn.functional.pad(mask[:, 1:], (0, 1)) & mask
    after = torch.where(final, log_phi.to(dtype).detach()[:, None], log_psi)
    before = torch.cat([log_z.to(dtype).expand(len(mask))[:, None], log_psi[:, :-1]], 1)
    return _mean_of_squares(torch.where(mask, after - before - log_step, 0), mask, log_w)


def fudge_loss(logit: Tensor, log_phi: Tensor, mask: Tensor, log_w: Tensor | None = None) -> Tensor:
    """Return the FUDGE loss: predict from every prefix the label that its rollout under p0 gets.

        mean_k mean_t [ -phi log psi_t - (1 - phi) log(1 - psi_t) ]        psi_t = sigmoid(logit_t)

    (Zhao et al. 2024, Table 1, after Yang and Klein 2021): phi in [0, 1] is the probability of the
    label, and all prefixes of a rollout share it. The twist is log psi = logsigmoid(logit), not the
    logit itself, so whoever samples with it has to apply logsigmoid, too. The optimum is log psi*,
    beyond all bounds where phi = 1 for certain.

    Args:
        logit: output of the head [B, T] for tokens drawn from p0; carries the gradient.
        log_phi: log potential [B], at most 0; -inf where phi = 0.
        mask: True [B, T] up to and with the final token of each sequence, False beyond.
        log_w: log weights [B] towards p0, where the sequences come from elsewhere.

    Raises:
        ValueError: shapes that disagree, a mask with gaps or an empty row, values that are not
            finite, or phi above 1.
    """
    mask = _check(logit, mask, {}, {"log_phi": log_phi}, name="logit")
    if log_phi.isnan().any() or (log_phi > 0).any():
        raise ValueError(
            f"`log_phi` must be at most 0 for FUDGE, got up to {log_phi.max():g}: it predicts a probability, "
            "subtract an upper bound of log phi or use another objective."
        )
    dtype = _wide(logit)
    logit = _stay(logit.to(dtype), mask, mask.shape[1])
    with torch.no_grad():
        phi = log_phi.to(dtype).exp()[:, None]
        weights = _normalised(log_w, log_phi, dtype)
    values = weights @ (phi * logsigmoid(logit) + (1 - phi) * logsigmoid(-logit))
    return -_mean_over_steps(values, mask)


def dpg_loss(positives: Positives, log_norm: Tensor) -> Tensor:
    """Return the distributional policy gradient (DPG) loss of the proposal q ~ p0 psi: KL(sigma || q).

        mean_t sum_j a_j ( log Z^pi_t(s_1:t-1) - log psi_t(s_1:t) ) = 1/T [ KL(sigma || q) - KL(sigma || p0) ]

    (Zhao et al. 2024, App. E, after Parshakova et al. 2019), whose gradient is -mean_t sum_j a_j
    (d log psi_t(s_1:t) - E_q[d log psi_t(s_1:t-1, v)]): exact over the vocabulary, by ``log_norm``. A
    factor c(s_1:t-1) of psi_t cancels in q, so it is learned by nothing (Lemma E.1) and psi_t is no
    twist (Prop. E.2): ``get_objective`` refuses it unless ``proposal_only``.

    Args:
        positives: what stands for sigma.
        log_norm: log normaliser [B, T] of each step, see ``log_normaliser``; carries a gradient.

    Raises:
        ValueError: shapes that disagree, a mask with gaps or an empty row, values that are not
            finite, or weights that are zero for all.
    """
    mask = _check_positives(positives, {"log_norm": log_norm})
    dtype = _wide(positives.log_psi)
    steps = torch.where(mask, log_norm.to(dtype) - positives.log_psi.to(dtype), 0)
    return _mean_over_steps(_normalised(positives.log_w, steps[:, 0], dtype) @ steps, mask)


def log_normaliser(log_p: Tensor, log_psi: Tensor) -> Tensor:
    """Return log sum_v p0(v) psi(v) [...] of a step from both over the vocabulary [..., V] (Eq. 15), in float32.

    ``log_p`` is normalised. The gradient reaches ``log_psi`` as the probabilities of q ~ p0 psi.
    """
    dtype = _wide(log_psi)
    return torch.logsumexp(log_p.to(dtype) + log_psi.to(dtype), -1)


def log_weights(log_p: Tensor, log_q: Tensor, log_phi: Tensor, mask: Tensor) -> Tensor:
    """Return log p0 phi / q [B] of sequences drawn from q: their weights towards sigma, without gradient.

    Args:
        log_p: log p0 of each token given its prefix [B, T].
        log_q: log proposal probability of each token given its prefix [B, T].
        log_phi: log potential [B]; -inf where phi = 0.
        mask: True [B, T] up to and with the final token of each sequence, False beyond.

    Raises:
        ValueError: as ``ctl_loss``.
    """
    mask = _check(log_p, mask, {"log_q": log_q}, {"log_phi": log_phi}, name="log_p")
    _check_weights("log_phi", log_phi)
    dtype = _wide(log_p)
    with torch.no_grad():
        return _prefix_log_weights(log_p.to(dtype), log_q.to(dtype), mask, mask.shape[1])[:, -1] + log_phi.to(dtype)


def mismatched(count: int, generator: torch.Generator) -> Tensor:
    """Return for each of ``count`` rows the index of another, int64 [count], each once.

    Rows are independent, so row k's sequence with the condition of row ``mismatched[k]`` is a draw
    from the product of both marginals. A plain permutation would leave true pairs among the false.

    Raises:
        ValueError: a single row, which has no other.
    """
    if count < 2:
        raise ValueError(f"`count` must be at least 2, got {count}: a condition can only be exchanged for another's.")
    shift = torch.randint(1, count, (), generator=generator, device=generator.device)
    return (torch.arange(count, device=generator.device) + shift) % count


@dataclass(frozen=True)
class Objective:
    """What a way of learning twists gives.

    Attributes:
        name: what users call it.
        title: what the paper calls it.
        loss: the function of this module.
        free: what log psi stays free up to at the optimum, beside log psi*.
        squashed: whether log psi is logsigmoid of the head's output, not the output itself.
        refusal: why the result is no twist for SMC; empty if it is one.
    """

    name: str
    title: str
    loss: Callable[..., Tensor]
    free: str
    squashed: bool = False
    refusal: str = ""

    @property
    def smc_twist(self) -> bool:
        """Whether what is learned may weigh particles, not only propose tokens."""
        return not self.refusal


#: The objectives by name.
OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("ctl", "CTL, contrastive twist learning", ctl_loss, "a constant per step and prompt"),
        Objective("rl", "RL, soft Q-learning", rl_loss, "nothing"),
        Objective("pcl", "PCL, path consistency learning", pcl_loss, "nothing, before the last step"),
        Objective("sixo", "SIXO, noise-contrastive estimation", sixo_loss, "-log Z of the prompt"),
        Objective("fudge", "FUDGE, future discriminators", fudge_loss, "nothing", squashed=True),
        Objective(
            "dpg",
            "DPG, distributional policy gradient",
            dpg_loss,
            "any function of the previous tokens",
            refusal="DPG learns psi_t only up to a factor c(s_1:t-1), which cancels in the proposal but not in the "
            "weights (Zhao et al. 2024, Prop. E.2)",
        ),
    )
}


def get_objective(name: str, *, proposal_only: bool = False) -> Objective:
    """Return the objective of this name.

    Args:
        name: a key of ``OBJECTIVES``.
        proposal_only: whether psi will shape the proposal alone, particles never being weighed or
            resampled by it before the end.

    Raises:
        ValueError: a name that does not exist, or an objective whose psi is no twist without
            ``proposal_only``.
    """
    if name not in OBJECTIVES:
        known = tuple(OBJECTIVES)
        raise ValueError(
            f"`objective` must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}: "
            "pass one of these."
        )
    objective = OBJECTIVES[name]
    if objective.refusal and not proposal_only:
        raise ValueError(
            f"`objective` must give a twist that can weigh particles, got {name!r}: {objective.refusal}. Set "
            "`proposal_only` to use it as a proposal without resampling, or take another objective."
        )
    return objective


# -- Checks ------------------------------------------------------------------------------------
def _check(
    log_psi: Tensor, mask: Tensor, tokens: dict[str, Tensor], sequences: dict[str, Tensor], name: str = "log_psi"
) -> Tensor:
    """Return the mask as bool if all shapes agree and every token's values are finite."""
    if log_psi.ndim != 2 or 0 in log_psi.shape:
        raise ValueError(f"`{name}` must have shape [B, T], got {list(log_psi.shape)}: pass one row per sequence.")
    for other, tensor in (*tokens.items(), ("mask", mask)):
        if tensor.shape != log_psi.shape:
            raise ValueError(
                f"`{other}` must have the shape {list(log_psi.shape)} of `{name}`, got {list(tensor.shape)}: "
                "pass one value per token."
            )
    for other, tensor in sequences.items():
        if tensor.shape != log_psi.shape[:1]:
            raise ValueError(
                f"`{other}` must have shape [{log_psi.shape[0]}], got {list(tensor.shape)}: pass one value per "
                "sequence."
            )
    mask = mask.bool()
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "`mask` must be True up to each sequence's final token and False beyond, got gaps: no padding "
            "on the left, and at least one token per row."
        )
    for other, tensor in ((name, log_psi), *tokens.items()):
        if not tensor[mask].isfinite().all():
            raise ValueError(
                f"`{other}` must be finite for every token, got inf or nan: lower the learning rate, or "
                "compute it in float32."
            )
    return mask


def _check_positives(positives: Positives, tokens: dict[str, Tensor]) -> Tensor:
    """Return the mask of the positives as bool if they are fit for use."""
    sequences = {} if positives.log_w is None else {"positives.log_w": positives.log_w}
    mask = _check(positives.log_psi, positives.mask, tokens, sequences, name="positives.log_psi")
    if positives.log_w is not None:
        _check_weights("positives.log_w", positives.log_w)
    return mask


def _check_weights(name: str, log_w: Tensor) -> None:
    if log_w.isnan().any() or (log_w == torch.inf).any() or (log_w == -torch.inf).all():
        raise ValueError(
            f"`{name}` must be below inf and above -inf for at least one sequence, got otherwise: no "
            "sequence of the batch has a weight to learn from, draw more."
        )


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(
            f"`{name}` must be finite, got inf or nan: squares of it are compared; bound phi away from 0, or use "
            "an objective that takes phi = 0, such as CTL."
        )


# -- Shared pieces -----------------------------------------------------------------------------
def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _stay(values: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """Return values [B, horizon] in which a sequence that has ended keeps its final one."""
    final = mask.sum(1, keepdim=True) - 1
    return values.gather(1, torch.minimum(torch.arange(horizon, device=mask.device), final))


def _prefix_log_weights(log_p: Tensor, log_q: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """Return log p0(s_1:t) - log q(s_1:t) [B, horizon]."""
    # Ratio first, then the sum: the two log probabilities are long and nearly equal.
    return _stay(torch.where(mask, log_p - log_q, 0).cumsum(1), mask, horizon)


def _normalised(log_w: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [B] of sequences, equal ones for None."""
    if log_w is None:
        return torch.full((len(like),), 1 / len(like), dtype=dtype, device=like.device)
    if log_w.shape != like.shape:
        raise ValueError(
            f"`log_w` must have shape {list(like.shape)}, got {list(log_w.shape)}: pass one value per sequence."
        )
    _check_weights("log_w", log_w)
    return torch.softmax(log_w.detach().to(dtype), 0)


def _log_mean_exp(values: Tensor) -> Tensor:
    """Return the log-mean over the rows of [B, T]."""
    return torch.logsumexp(values, 0) - torch.log(values.new_tensor(float(len(values))))


def _mean_over_steps(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values [T] over the steps that any row of the mask [..., T] takes."""
    live = mask.any(0)
    return torch.where(live, values, 0).sum() / live.sum()


def _mean_of_squares(residuals: Tensor, mask: Tensor, log_w: Tensor | None) -> Tensor:
    """Return the mean over steps of the weighted mean over rows of squares [B, T], 0 where masked."""
    weights = _normalised(log_w, residuals[:, 0], residuals.dtype)
    return _mean_over_steps(weights @ residuals.square(), mask)


def _one_step_on(log_norm: Tensor, log_phi: Tensor, mask: Tensor) -> Tensor:
    """Return what comes after each token [B, T]: the next step's normaliser or, at the end, log phi; 0 beyond."""
    following = torch.nn.functional.pad(log_norm[:, 1:], (0, 1))
    goes_on = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return torch.where(mask, torch.where(goes_on, following, log_phi[:, None]), 0)


def _contrast(
    positives: Positives, log_psi: Tensor, log_p: Tensor, log_q: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return both batches up to one length T: negatives' log psi and log p0/q, positives' log psi and weights, steps.

    Shapes [B, T], [B, T], [P, T], [P] and [2, T], the last the steps that either batch takes.
    """
    mask = _check(log_psi, mask, {"log_p": log_p, "log_q": log_q}, {})
    positive_mask = _check_positives(positives, {})
    dtype = torch.promote_types(_wide(log_psi), _wide(positives.log_psi))
    horizon = max(mask.shape[1], positive_mask.shape[1])
    with torch.no_grad():
        log_w = _prefix_log_weights(log_p.to(dtype), log_q.to(dtype), mask, horizon)
        weights = _normalised(positives.log_w, positives.log_psi[:, 0], dtype)
        live = torch.stack(
            [torch.nn.functional.pad(m.any(0), (0, horizon - m.shape[1])) for m in (mask, positive_mask)]
        )
    return (
        _stay(log_psi.to(dtype), mask, horizon),
        log_w,
        _stay(positives.log_psi.to(dtype), positive_mask, horizon),
        weights,
        live,
    )
