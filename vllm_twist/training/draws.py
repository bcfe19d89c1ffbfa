"""The sequences of an update: which laws an objective needs, exact samples of sigma, and what is made of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_twist.bounds import accepted
from vllm_twist.objectives import (
    Positives,
    ctl_loss,
    ctl_positives_loss,
    dpg_loss,
    fudge_loss,
    log_weights,
    pcl_loss,
    rl_loss,
    sixo_loss,
)
from vllm_twist.potentials import Continuation, Potential
from vllm_twist.resampling import ess, log_mean_exp
from vllm_twist.results import reweigh
from vllm_twist.training.config import TrainingConfig
from vllm_twist.training.samplers.base import DrawRequest, Draws, Sampler, check_length
from vllm_twist.training.teacher_forcing import Scores

#: Draws from p0, in batches of ``particles``, after which a search for exact samples is given up.
MAX_ROUNDS = 100


@dataclass(frozen=True)
class Drawn:
    """Outputs of one prompt by one law, scored."""

    scores: Scores
    log_phi: Tensor
    log_w: Tensor | None  # towards sigma; None for exact samples

    @property
    def positives(self) -> Positives:
        return Positives(self.scores.log_psi, self.scores.mask, self.log_w)


@dataclass
class Target:
    """One prompt of one update, with a condition of its own where there is one."""

    slot: int
    prompt_ids: tuple[int, ...]
    potential: Potential | None
    condition: tuple[int, ...] | None = None
    exact: list[list[int]] = field(default_factory=list)


def laws_of(config: TrainingConfig) -> tuple[str, ...]:
    """Return which sequences an update needs: those of ``samplers.LAWS``, and exact samples of sigma."""
    needed = {
        "ctl": ("q", config.positive_law),
        "sixo": ("p0", config.positive_law),
        "dpg": (config.positive_law,),
        "rl": ("q",),
        "pcl": ("q",),
        "fudge": ("p0",),
    }[config.objective]
    return tuple(dict.fromkeys(needed))


def loss_of(config: TrainingConfig, drawn: dict[str, Drawn]) -> Tensor:
    """Return the loss of one prompt's sequences."""
    positives = drawn.get(config.positive_law)
    name = config.objective
    if name == "fudge":
        rollouts = drawn["p0"]
        return fudge_loss(rollouts.scores.logit, rollouts.log_phi, rollouts.scores.mask)
    if name == "dpg":
        assert positives is not None
        return dpg_loss(positives.positives, positives.scores.log_norm)
    if name == "sixo":
        assert positives is not None
        base = drawn["p0"].scores
        return sixo_loss(positives.positives, base.log_psi, base.log_p, base.log_p, base.mask)
    own = drawn["q"]
    s, log_phi = own.scores, own.log_phi
    if name == "rl":
        return rl_loss(s.log_psi, s.log_norm, log_phi, s.mask)
    if name == "pcl":
        return pcl_loss(s.log_psi, s.log_p, s.log_q, log_phi, s.mask, s.log_norm[:, 0])
    if positives is own:
        return ctl_loss(s.log_psi, s.log_p, s.log_q, log_phi, s.mask)
    assert positives is not None
    return ctl_positives_loss(positives.positives, s.log_psi, s.log_p, s.log_q, s.mask)


def metrics_of(scored: dict[str, Drawn]) -> dict[str, float]:
    """Return what one prompt's draws say of the proposal; see ``TwistTrainer.step``."""
    if "q" not in scored:
        return {}
    log_w = scored["q"].log_w
    assert log_w is not None
    log_w = log_w.double()
    log_z, lower = log_mean_exp(log_w), log_w.mean()
    found = {"ess": ess(log_w).item(), "log_z": log_z.item(), "kl": (log_z - lower).item()}
    if "exact" in scored:
        exact = scored["exact"]
        upper = log_weights(exact.scores.log_p, exact.scores.log_q.detach(), exact.log_phi, exact.scores.mask)
        found["gap"] = (upper.double().mean() - lower).item()
    return found


class Drawing:
    """Draws for the targets of an update, and weighs what was drawn. The seeds follow from the config and the slot."""

    def __init__(
        self, config: TrainingConfig, model: Any, tokenizer: Any, end_ids: frozenset[int], potential: Potential | None
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.potential = potential

    def target(self, slot: int, prompts: Sequence[Sequence[int]]) -> Target:
        """Return what the prompt whose turn it is in this place of the endless round stands for."""
        prompt_ids = tuple(prompts[slot % len(prompts)])
        check_length(self.model, prompt_ids, self.config.max_tokens + self.config.condition_tokens)
        if self.potential is None:
            return Target(slot, prompt_ids, None)  # comes with its condition
        text = "" if self.tokenizer is None else self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        return Target(slot, prompt_ids, self.potential.given(prompt_ids, text))

    def _request(self, target: Target, law: str, count: int, extra: str = "", length: int = 0) -> DrawRequest:
        seed = random.Random(f"{self.config.seed} {target.slot} {law} {extra}").getrandbits(62)
        condition = target.condition if law in ("q", "smc") else None
        return DrawRequest(target.prompt_ids, count, law, seed, length or self.config.max_tokens, condition)

    def draw(self, sampler: Sampler, targets: list[Target]) -> tuple[list[dict[str, Draws]], int]:
        """Return the sequences of each target by law, and how many tokens were drawn for them."""
        laws, tokens = laws_of(self.config), 0
        if self.config.condition_tokens:
            tokens += self.find_conditions(sampler, targets)
        elif "exact" in laws:
            tokens += self.find_exact(sampler, targets)
        requests = [
            self._request(target, law, self.config.particles) for target in targets for law in laws if law != "exact"
        ]
        answers = iter(sampler.sample(requests) if requests else [])
        drawn = []
        for target in targets:
            sets = {law: Draws(target.exact) if law == "exact" else next(answers) for law in laws}
            tokens += sum(len(row) for law in sets if law != "exact" for row in sets[law].token_ids)
            drawn.append(sets)
        return drawn, tokens

    def find_exact(self, sampler: Sampler, targets: list[Target]) -> int:
        """Fill ``exact`` with samples of p0 accepted with probability phi; return the number of tokens drawn."""
        count, tokens = self.config.particles, 0
        for attempt in range(MAX_ROUNDS):
            wanting = [target for target in targets if len(target.exact) < count]
            if not wanting:
                return tokens
            requests = [self._request(target, "p0", count, f"exact {attempt}") for target in wanting]
            for target, request, draws in zip(wanting, requests, sampler.sample(requests), strict=True):
                tokens += sum(map(len, draws.token_ids))
                log_phi = self._log_phi(target, draws.token_ids)
                if (log_phi > 0).any():
                    raise ValueError(
                        f"`positives` must not be exact for a potential above 1, got log phi up to "
                        f"{log_phi.max():g}: subtract its upper bound, or use approximate or smc."
                    )
                keep = accepted(log_phi.cpu(), 0.0, torch.Generator().manual_seed(request.seed ^ 1))
                found = keep.nonzero()[:, 0].tolist()
                target.exact.extend(draws.token_ids[k] for k in found[: count - len(target.exact)])
        fewest = min(len(target.exact) for target in targets)
        raise ValueError(
            f"`positives` must not be exact for a target this rare: {MAX_ROUNDS * count} samples of p0 gave "
            f"{fewest} of {count}; use approximate or smc."
        )

    def find_conditions(self, sampler: Sampler, targets: list[Target]) -> int:
        """Give each target a condition and the exact sample that comes with it; return the number of tokens drawn.

        s_1:T and the c tokens after it are drawn from p0 together: s_1:T is then an exact sample of
        sigma(. | o_T) (Zhao et al. 2024, Sec. 3.3). What ends before has no condition and is drawn again.
        """
        length, tokens = self.config.max_tokens, 0
        whole = length + self.config.condition_tokens
        for attempt in range(MAX_ROUNDS):
            wanting = [target for target in targets if target.condition is None]
            if not wanting:
                return tokens
            requests = [self._request(target, "p0", 4, f"condition {attempt}", whole) for target in wanting]
            for target, draws in zip(wanting, sampler.sample(requests), strict=True):
                tokens += sum(map(len, draws.token_ids))
                for row in draws.token_ids:
                    if len(row) == whole and row[-1] not in self.end_ids:
                        target.condition, target.exact = tuple(row[length:]), [row[:length]]
                        target.potential = Continuation(
                            self.model, row[length:], prompt_ids=target.prompt_ids, eos_token_id=min(self.end_ids)
                        )
                        break
        raise ValueError(
            f"`condition_tokens` must leave outputs that go on for {whole} tokens, got none in {4 * MAX_ROUNDS} for "
            "some prompt: lower `max_tokens` or `condition_tokens`."
        )

    def weighed(self, target: Target, law: str, draws: Draws, scores: Scores) -> Drawn:
        """Return the draws with their log phi and their log weights towards sigma."""
        if law == "p0" and self.config.objective != "fudge":
            return Drawn(scores, torch.zeros(len(draws.token_ids)), None)  # their phi is not asked for
        log_phi = self._log_phi(target, draws.token_ids)
        if law == "q":
            log_w = log_weights(scores.log_p, scores.log_q.detach(), log_phi, scores.mask)
        elif law == "smc":
            drawn = torch.tensor(draws.log_w, device=log_phi.device)
            log_w = reweigh(drawn, scores.final(scores.log_psi.detach()), log_phi)
        else:
            log_w = None
        return Drawn(scores, log_phi, log_w)

    def _log_phi(self, target: Target, token_ids: list[list[int]]) -> Tensor:
        texts = [""] * len(token_ids)
        if self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        assert target.potential is not None
        return torch.tensor(target.potential(token_ids, texts), device=self.model.device)
