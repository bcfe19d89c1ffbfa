"""Learn a twist head: draw with the present head, score by one teacher-forced pass, take a step.

    with TwistTrainer("models/tiny-reviews", potential, TrainingConfig(objective="ctl")) as trainer:
        trainer.train(["I bought this", "The battery"], out="my-head")

The base model is frozen. Sequences come from a ``Sampler``, the vLLM engine where it is installed,
and are data: what carries the gradient is log psi of their tokens, read off hidden states that one
pass of the model in transformers gives (Zhao et al. 2024, Sec. 4; ``vllm_twist.objectives``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_twist.objectives import (
    Positives,
    ctl_loss,
    ctl_positives_loss,
    dpg_loss,
    fudge_loss,
    get_objective,
    log_weights,
    pcl_loss,
    rl_loss,
    sixo_loss,
)
from vllm_twist.potentials import Continuation, LogPhi, Potential, load_potential
from vllm_twist.prompts import Prompt, encode_prompt
from vllm_twist.resampling import ess, log_mean_exp
from vllm_twist.training import attention
from vllm_twist.training.config import TrainingConfig
from vllm_twist.training.processes import Processes
from vllm_twist.training.samplers.base import (
    DrawRequest,
    Draws,
    Sampler,
    check_length,
    end_token_ids,
    logits_of,
)
from vllm_twist.training.samplers.transformers import TransformersSampler
from vllm_twist.training.teacher_forcing import Scores, score
from vllm_twist.twist import TwistHead, TwistHeadConfig

STATE_NAME = "training_state.pt"
#: Draws from p0, in batches of ``particles``, after which a search for exact samples is given up.
MAX_ROUNDS = 100


# -- The sequences of one update ---------------------------------------------------------------
@dataclass(frozen=True)
class _Drawn:
    """Outputs of one prompt by one law, scored."""

    scores: Scores
    log_phi: Tensor
    log_w: Tensor | None  # towards sigma; None for exact samples

    @property
    def positives(self) -> Positives:
        return Positives(self.scores.log_psi, self.scores.mask, self.log_w)


@dataclass
class _Target:
    """One prompt of one update, with a condition of its own where there is one."""

    slot: int
    prompt_ids: tuple[int, ...]
    potential: Potential | None
    condition: tuple[int, ...] | None = None
    exact: list[list[int]] = field(default_factory=list)


def _laws(config: TrainingConfig) -> tuple[str, ...]:
    """Return which sequences an update needs: those of ``sampling.LAWS``, and exact samples of sigma."""
    needed = {
        "ctl": ("q", config.positive_law),
        "sixo": ("p0", config.positive_law),
        "dpg": (config.positive_law,),
        "rl": ("q",),
        "pcl": ("q",),
        "fudge": ("p0",),
    }[config.objective]
    return tuple(dict.fromkeys(needed))


def _loss(config: TrainingConfig, drawn: dict[str, _Drawn]) -> Tensor:
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


# -- The trainer -------------------------------------------------------------------------------
class TwistTrainer:
    """Learn a twist head for one base model and one potential.

    Under ``accelerate launch`` every process draws for prompts of its own and the gradients are
    averaged, so that n processes do what one does with n times ``prompts_per_update``. Weights are
    normalised within a prompt, hence within a process.

    Everything random follows from ``config.seed`` and the number of the update. Given the tokens an
    update is deterministic, so a resumed run repeats an uninterrupted one bit for bit wherever the
    sampler does.

    Attributes:
        head: the head, in float32.
        update: how many updates it has seen.
        sampler: what draws; made when first needed unless one is given.
    """

    def __init__(
        self,
        model: Any,
        potential: str | Path | LogPhi | Potential | None,
        config: TrainingConfig | None = None,
        *,
        tokenizer: Any = None,
        head: TwistHead | None = None,
        sampler: Sampler | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Load what has to be loaded.

        Args:
            model: folder or hub id of a causal language model, or one loaded by transformers.
            potential: what ``load_potential`` takes; None with ``condition_tokens``.
            tokenizer: the model's, where it is not found beside it. Without any, prompts are token ids
                and the potential gets empty texts.
            head: to go on with; a fresh one by default.
            sampler: to draw with instead of the one that the config names.
            engine_args: further arguments of ``vllm.LLM`` for the engine that draws.

        Raises:
            ValueError: parts that do not fit together.
        """
        self.config = config = config or TrainingConfig()
        self._processes = Processes()
        self.model, self.tokenizer = self._load(model, tokenizer)
        self.end_ids = end_token_ids(self.model, self.tokenizer)
        if (potential is None) != bool(config.condition_tokens):
            raise ValueError(
                f"`potential` must be given, or `condition_tokens` in its place, got {potential!r} and "
                f"{config.condition_tokens}: pass one of the two."
            )
        self.potential = (
            None if potential is None else load_potential(potential, model=self.model, tokenizer=self.tokenizer)
        )
        shape = TwistHeadConfig(
            config.head,
            self.model.config.get_text_config().hidden_size,
            self.model.get_output_embeddings().weight.shape[0],
            config.rank if TwistHead.kinds[config.head].uses_rank else None,
            activation="log_sigmoid" if get_objective(config.objective, proposal_only=True).squashed else "identity",
            conditional=bool(config.condition_tokens),
        )
        self.head = head or TwistHead.create(shape, seed=config.seed)
        if self.head.config != shape:
            raise ValueError(
                f"`head` must be {shape}, got {self.head.config}: pass one of that kind, or change config."
            )
        self.head.to(self.model.device, torch.float32).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=config.lr)
        self.update = 0
        self.sampler = sampler
        self._packed = config.attention in attention.PACKED
        self._engine_args = dict(engine_args or {})

    def __enter__(self) -> TwistTrainer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the sampler; the head stays."""
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None

    # -- Training
    def train(
        self,
        prompts: Sequence[Prompt],
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool = False,
        log_dir: str | Path | None = None,
    ) -> list[dict[str, float]]:
        """Update until ``config.updates`` is reached; return the metrics of each update made here.

        Args:
            prompts: what to continue, texts, token ids, or chat messages, which go through the tokenizer's chat
                template. Updates take them in turn.
            out: folder for the head; it can be served as it is. Checkpoints go there, too.
            resume: whether to go on from the checkpoint in ``out``.
            progress: whether to show a bar with loss, ESS, KL or gap, and tokens per second.
            log_dir: folder for TensorBoard.

        Raises:
            ValueError: no prompts, one that does not fit, a checkpoint that is missing or of another
                run, or a batch from which nothing can be learned.
        """
        rows = self._encode(prompts)
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()
        if resume:
            self._resume(out, digest)
        self._start(max(map(len, rows)))
        writer = _tensorboard(log_dir) if log_dir is not None and self._processes.is_main else None
        history: list[dict[str, float]] = []
        for _ in self._bar(progress, history):
            history.append(self.step(rows))
            if writer is not None:
                for name, value in history[-1].items():
                    writer.add_scalar(name, value, self.update)
            if out is not None and (self.update % self.config.save_every == 0 or self.update == self.config.updates):
                self.save(out, digest)
        if writer is not None:
            writer.close()
        return history

    def _bar(self, progress: bool, history: list[dict[str, float]]) -> Iterator[int]:
        """Yield once per update to come, showing the metrics of the last one."""
        from tqdm import tqdm

        total = self.config.updates
        with tqdm(
            total=total, initial=self.update, desc=self.config.objective, unit="update",
            disable=not (progress and self._processes.is_main),
        ) as bar:  # fmt: skip
            while self.update < total:
                yield self.update
                bar.update(1)
                shown = {name.replace("_", " "): f"{value:.4g}" for name, value in history[-1].items()}
                bar.set_postfix(shown)

    def step(self, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Make one update on the next of these prompts (token ids); return its metrics.

        ``loss``, and ``tokens_per_s``: tokens drawn per second of the whole update. Of the draws from the
        proposal q, where the objective has any: ``ess``, their effective sample size towards sigma;
        ``log_z``, the log-mean of their weights; and ``kl``, that minus the mean of the log weights, an
        estimate of KL(q || sigma) that is low as far as log_z is. With exact positives also ``gap``: the
        single-particle upper bound of log Z minus the lower one, KL(q || sigma) + KL(sigma || q).
        """
        began = time.perf_counter()
        if self.sampler is None:
            self._start(max(map(len, prompts)))
        assert self.sampler is not None
        self.sampler.set_head(self.head)
        targets = [
            self._target(slot, prompts) for slot in self._processes.slots(self.update, self.config.prompts_per_update)
        ]
        laws = _laws(self.config)
        drawn, tokens = self._draw(targets, laws)
        losses, metrics = [], []
        for target, sets in zip(targets, drawn, strict=True):
            scored = {law: self._scored(target, law, draws) for law, draws in sets.items()}
            losses.append(_loss(self.config, scored))
            metrics.append(_metrics(scored))
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self._processes.average_gradients(list(self.head.parameters()))
        self.optimizer.step()
        self.update += 1
        means = {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
        means = self._processes.average({"loss": loss.item(), **means})
        speed = self._processes.world * tokens / (time.perf_counter() - began)
        return {**means, "tokens_per_s": speed}

    # -- Drawing
    def _target(self, slot: int, prompts: Sequence[Sequence[int]]) -> _Target:
        prompt_ids = tuple(prompts[slot % len(prompts)])
        check_length(self.model, prompt_ids, self.config.max_tokens + self.config.condition_tokens)
        if self.potential is None:
            return _Target(slot, prompt_ids, None)  # comes with its condition
        text = "" if self.tokenizer is None else self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        return _Target(slot, prompt_ids, self.potential.given(prompt_ids, text))

    def _request(self, target: _Target, law: str, count: int, extra: str = "", length: int = 0) -> DrawRequest:
        seed = random.Random(f"{self.config.seed} {target.slot} {law} {extra}").getrandbits(62)
        condition = target.condition if law in ("q", "smc") else None
        return DrawRequest(target.prompt_ids, count, law, seed, length or self.config.max_tokens, condition)

    def _draw(self, targets: list[_Target], laws: Sequence[str]) -> tuple[list[dict[str, Draws]], int]:
        """Return the sequences of each target by law, and how many tokens were drawn for them."""
        assert self.sampler is not None
        tokens = 0
        if self.config.condition_tokens:
            tokens += self._find_conditions(targets)
        elif "exact" in laws:
            tokens += self._find_exact(targets)
        requests = [
            self._request(target, law, self.config.particles) for target in targets for law in laws if law != "exact"
        ]
        answers = iter(self.sampler.sample(requests) if requests else [])
        drawn = []
        for target in targets:
            sets = {law: Draws(target.exact) if law == "exact" else next(answers) for law in laws}
            tokens += sum(len(row) for law in sets if law != "exact" for row in sets[law].token_ids)
            drawn.append(sets)
        return drawn, tokens

    def _find_exact(self, targets: list[_Target]) -> int:
        """Fill ``exact`` with samples of p0 accepted with probability phi; return the number of tokens drawn."""
        assert self.sampler is not None
        count, tokens = self.config.particles, 0
        for attempt in range(MAX_ROUNDS):
            wanting = [target for target in targets if len(target.exact) < count]
            if not wanting:
                return tokens
            requests = [self._request(target, "p0", count, f"exact {attempt}") for target in wanting]
            for target, request, draws in zip(wanting, requests, self.sampler.sample(requests), strict=True):
                tokens += sum(map(len, draws.token_ids))
                log_phi = self._log_phi(target, draws.token_ids)
                if (log_phi > 0).any():
                    raise ValueError(
                        f"`positives` must not be exact for a potential above 1, got log phi up to "
                        f"{log_phi.max():g}: subtract its upper bound, or use approximate or smc."
                    )
                uniforms = torch.rand(count, generator=torch.Generator().manual_seed(request.seed ^ 1))
                accepted = (uniforms.log() < log_phi.cpu()).nonzero()[:, 0].tolist()
                target.exact.extend(draws.token_ids[k] for k in accepted[: count - len(target.exact)])
        found = min(len(target.exact) for target in targets)
        raise ValueError(
            f"`positives` must not be exact for a target this rare: {MAX_ROUNDS * count} samples of p0 gave {found} of "
            f"{count}; use approximate or smc."
        )

    def _find_conditions(self, targets: list[_Target]) -> int:
        """Give each target a condition and the exact sample that comes with it; return the number of tokens drawn.

        s_1:T and the c tokens after it are drawn from p0 together: s_1:T is then an exact sample of
        sigma(. | o_T) (Zhao et al. 2024, Sec. 3.3). What ends before has no condition and is drawn again.
        """
        assert self.sampler is not None
        length, tokens = self.config.max_tokens, 0
        whole = length + self.config.condition_tokens
        for attempt in range(MAX_ROUNDS):
            wanting = [target for target in targets if target.condition is None]
            if not wanting:
                return tokens
            requests = [self._request(target, "p0", 4, f"condition {attempt}", whole) for target in wanting]
            for target, draws in zip(wanting, self.sampler.sample(requests), strict=True):
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

    # -- Scoring
    def _scored(self, target: _Target, law: str, draws: Draws) -> _Drawn:
        scores = self.score(target.prompt_ids, draws.token_ids, target.condition)
        if law == "p0" and self.config.objective != "fudge":
            return _Drawn(scores, torch.zeros(len(draws.token_ids)), None)  # their phi is not asked for
        log_phi = self._log_phi(target, draws.token_ids)
        if law == "q":
            log_w = log_weights(scores.log_p, scores.log_q.detach(), log_phi, scores.mask)
        elif law == "smc":
            drawn = torch.tensor(draws.log_w, device=log_phi.device)
            log_w = drawn + log_phi - scores.final(scores.log_psi.detach())
        else:
            log_w = None
        return _Drawn(scores, log_phi, log_w)

    def _log_phi(self, target: _Target, token_ids: list[list[int]]) -> Tensor:
        texts = [""] * len(token_ids)
        if self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        assert target.potential is not None
        return torch.tensor(target.potential(token_ids, texts), device=self.model.device)

    def score(
        self, prompt_ids: Sequence[int], token_ids: Sequence[Sequence[int]], condition: Sequence[int] | None = None
    ) -> Scores:
        """Return log p0, log psi and the proposal's normaliser of given outputs of one prompt, with gradient."""
        return score(self.model, self.head, prompt_ids, token_ids, condition, packed=self._packed)

    # -- Set-up
    def _load(self, model: Any, tokenizer: Any) -> tuple[Any, Any]:
        attention.prepare(self.config.attention)
        if isinstance(model, str | Path):
            device = self._processes.device
            dtype = "float32" if self.config.dtype == "auto" and device.type == "cpu" else self.config.dtype
            tokenizer = tokenizer or self.config.load_tokenizer(model)
            model = self.config.load_model(model, dtype=dtype, attn_implementation=self.config.attention)
            model.to(device)
        else:
            model.set_attn_implementation(self.config.attention)
        model.eval().requires_grad_(False)
        attention.check(self.config.attention, model)
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            own = model(input_ids=ids).logits[:, -1].float()
            ours = logits_of(model, model.base_model(input_ids=ids).last_hidden_state[:, -1])
        if not torch.allclose(own, ours, atol=0.05, rtol=0.02):
            raise ValueError(
                f"`model` must have its output embedding's product as logits, got a {type(model).__name__}, which "
                "scales or caps them: its p0 would be another; use a model that does not."
            )
        return model, tokenizer

    def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if not len(prompts):
            raise ValueError("`prompts` must hold at least one, got none: pass what the model should continue.")
        rows = [tuple(encode_prompt(prompt, self.tokenizer)) for prompt in prompts]
        for row in rows:
            check_length(self.model, row, self.config.max_tokens + self.config.condition_tokens)
        return rows

    def _start(self, longest: int) -> None:
        """Make the sampler, for prompts of at most this length."""
        if self.sampler is not None:
            return
        name = self.config.sampler
        if name == "auto":
            name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        if name == "transformers":
            self.sampler = TransformersSampler(self.model, self.end_ids)
            return
        if not importlib.util.find_spec("vllm"):
            raise ValueError("`sampler` must be transformers without vLLM, got 'vllm': install it, or pass that.")
        path = self.model.config._name_or_path
        if not path:
            raise ValueError(
                "`model` must be loaded from somewhere for the engine to load it, too, got one without a name: save it "
                "and pass the folder, or use the transformers sampler."
            )
        from vllm_twist.training.samplers.vllm import MAX_NUM_SEQS, EngineSampler

        particles = self.config.particles
        at_once = particles * self.config.prompts_per_update * max(1, len(set(_laws(self.config)) - {"exact"}))
        self.sampler = EngineSampler(
            path,
            self.head,
            end_ids=self.end_ids,
            **{
                "max_model_len": longest + self.config.max_tokens + self.config.condition_tokens,
                "max_num_seqs": max(particles, min(at_once, MAX_NUM_SEQS)),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                **self.config.files,
                **self._engine_args,
            },
        )

    # -- Checkpoints
    def save(self, out: str | Path, digest: str = "") -> None:
        """Write the head, ready to be served, and what ``train(resume=True)`` goes on from."""
        if self._processes.is_main:
            out = Path(out)
            self.head.save_pretrained(out)
            state = {
                "update": self.update,
                "config": dataclasses.asdict(self.config),
                "prompts": digest,
                "processes": self._processes.world,
                "head": self.head.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            # All in one file, in one move: a run that dies while saving leaves the last checkpoint whole.
            torch.save(state, out / f"{STATE_NAME}.tmp")
            os.replace(out / f"{STATE_NAME}.tmp", out / STATE_NAME)
        self._processes.wait()

    def _resume(self, out: str | Path | None, digest: str) -> None:
        path = Path(out or "") / STATE_NAME
        if out is None or not path.is_file():
            raise ValueError(f"`resume` needs a checkpoint, {path} does not exist: pass the `out` of the first run.")
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        free = ("updates", "save_every", "sampler", "attention")
        now = {
            **{k: v for k, v in dataclasses.asdict(self.config).items() if k not in free},
            "prompts": digest,
            "processes": self._processes.world,
        }
        # What the run had no option for was as it is by default.
        defaults = {option.name: option.default for option in dataclasses.fields(TrainingConfig)}
        then = {**defaults, **state["config"], "prompts": state["prompts"], "processes": state["processes"]}
        for name, value in now.items():
            if then.get(name) != value:
                raise ValueError(
                    f"`{name}` must be that of the run to resume, {then.get(name)!r}, got {value!r}: pass the same, or "
                    "start anew in another folder."
                )
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update = state["update"]


def _metrics(scored: dict[str, _Drawn]) -> dict[str, float]:
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


def _tensorboard(log_dir: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"`log_dir` needs TensorBoard, which is not installed ({error}): pip install 'vllm-twist[tensorboard]'."
        ) from error
    return SummaryWriter(str(log_dir))
