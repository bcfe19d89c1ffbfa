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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_twist.objectives import get_objective
from vllm_twist.potentials import LogPhi, Potential, load_potential
from vllm_twist.prompts import Prompt, encode_prompt
from vllm_twist.training import attention
from vllm_twist.training.checkpoint import load_state, save_state
from vllm_twist.training.config import TrainingConfig
from vllm_twist.training.draws import Drawing, laws_of, loss_of, metrics_of
from vllm_twist.training.processes import Processes
from vllm_twist.training.samplers.base import Sampler, check_length, end_token_ids, logits_of
from vllm_twist.training.samplers.transformers import TransformersSampler
from vllm_twist.training.teacher_forcing import Scores, score
from vllm_twist.twist import TwistHead, TwistHeadConfig


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
        self._drawing = Drawing(config, self.model, self.tokenizer, self.end_ids, self.potential)
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
        self._prompts: Sequence[Sequence[int]] = ()
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
        self._prompts = rows
        if resume:
            state = load_state(out, self.config, self._run(), self.model.device)
            self.head.load_state_dict(state["head"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.update = state["update"]
        self._start(max(map(len, rows)))
        writer = _tensorboard(log_dir) if log_dir is not None and self._processes.is_main else None
        history: list[dict[str, float]] = []
        for _ in self._bar(progress, history):
            history.append(self.step(rows))
            if writer is not None:
                for name, value in history[-1].items():
                    writer.add_scalar(name, value, self.update)
            if out is not None and (self.update % self.config.save_every == 0 or self.update == self.config.updates):
                self.save(out)
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
        self._prompts = prompts
        if self.sampler is None:
            self._start(max(map(len, prompts)))
        assert self.sampler is not None
        self.sampler.set_head(self.head)
        slots = self._processes.slots(self.update, self.config.prompts_per_update)
        targets = [self._drawing.target(slot, prompts) for slot in slots]
        drawn, tokens = self._drawing.draw(self.sampler, targets)
        losses, metrics = [], []
        for target, sets in zip(targets, drawn, strict=True):
            scored = {}
            for law, draws in sets.items():
                scores = self.score(target.prompt_ids, draws.token_ids, target.condition)
                scored[law] = self._drawing.weighed(target, law, draws, scores)
            losses.append(loss_of(self.config, scored))
            metrics.append(metrics_of(scored))
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
        at_once = particles * self.config.prompts_per_update * max(1, len(set(laws_of(self.config)) - {"exact"}))
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
    def save(self, out: str | Path) -> None:
        """Write the head, ready to be served, and what ``train(resume=True)`` goes on from."""
        if self._processes.is_main:
            self.head.save_pretrained(out)
            state = {
                "update": self.update,
                "config": dataclasses.asdict(self.config),
                **self._run(),
                "head": self.head.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            save_state(Path(out), state)
        self._processes.wait()

    def _run(self) -> dict[str, Any]:
        """Return what else has to be as in the run that a checkpoint is of; before the first update any prompts do."""
        rows = [tuple(row) for row in self._prompts]
        digest = hashlib.sha256(repr(rows).encode()).hexdigest() if rows else ""
        return {"prompts": digest, "processes": self._processes.world}


def _tensorboard(log_dir: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"`log_dir` needs TensorBoard, which is not installed ({error}): pip install 'vllm-twist[tensorboard]'."
        ) from error
    return SummaryWriter(str(log_dir))
