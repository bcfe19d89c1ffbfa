"""Twist heads: learned log psi_t(s_1:t) read from the hidden state of the prefix.

    log psi_t(s_1:t) = head(h_{t-1})[s_t]

h_{t-1} is the final hidden state that feeds the LM head at the position of s_{t-1}, so one
evaluation values every possible next token (Zhao et al. 2024, App. G.1). The scale and the
constant of log psi at each t are free: a constant per step cancels in the weights.

A conditional head gives log psi_t(s_1:t, o_T) for a target that depends on a condition o_T, such as
what the output shall lead up to (Zhao et al. 2024, Sec. 3.3 and App. G.1). It reads [h_{t-1}, c], with
c the final hidden state of o_T's last token in a pass of the frozen model over o_T alone, without
the prompt and without special tokens that o_T does not hold itself.
"""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vllm_twist.config import did_you_mean
from vllm_twist.kernels.reference import LowRank

CONFIG_NAME = "twist_config.json"
WEIGHTS_NAME = "model.safetensors"

LMHead = Callable[[Tensor], Tensor]

#: What turns a head's output into log psi. ``log_sigmoid`` makes psi a probability, as FUDGE learns it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda output: output,
    "log_sigmoid": nn.functional.logsigmoid,
}


@dataclass(frozen=True)
class TwistHeadConfig:
    """What a head is made of.

    Attributes:
        head_type: a key of ``TwistHead.kinds``.
        hidden_size: width H of the model's hidden states.
        vocab_size: number V of the model's logits.
        rank: r, of the kinds that use it.
        activation: a key of ``ACTIVATIONS``, applied to the output.
        conditional: whether the head reads a condition beside the prefix.
    """

    head_type: str
    hidden_size: int
    vocab_size: int
    rank: int | None = None
    activation: str = "identity"
    conditional: bool = False

    @property
    def input_size(self) -> int:
        """Width of what the head reads: H, or 2 H with a condition."""
        return self.hidden_size * (2 if self.conditional else 1)

    def __post_init__(self) -> None:
        kinds = tuple(TwistHead.kinds)
        if self.head_type not in kinds:
            raise ValueError(
                f"`head_type` must be one of {', '.join(kinds)}, got {self.head_type!r}"
                f"{did_you_mean(self.head_type, kinds)}: set it in {CONFIG_NAME}."
            )
        for name in ("hidden_size", "vocab_size", "rank"):
            value = getattr(self, name)
            if name == "rank" and value is None and not TwistHead.kinds[self.head_type].uses_rank:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"`{name}` of a {self.head_type} head must be a positive integer, got {value!r}: "
                    f"set it in {CONFIG_NAME}."
                )
        if self.activation not in tuple(ACTIVATIONS):
            raise ValueError(
                f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
                f"{did_you_mean(self.activation, tuple(ACTIVATIONS))}: set it in {CONFIG_NAME}."
            )
        if not isinstance(self.conditional, bool):
            raise ValueError(f"`conditional` must be true or false, got {self.conditional!r}: set it in {CONFIG_NAME}.")
        able = [kind for kind in kinds if TwistHead.kinds[kind].takes_condition]
        if self.conditional and self.head_type not in able:
            raise ValueError(
                f"`conditional` is not supported by a {self.head_type} head, which is an update of the prefix's "
                f"hidden state: use {', '.join(able)}."
            )


class TwistHead(nn.Module, ABC):
    """Map hidden states [N, H] to log twist values [N, V].

    Build one with ``TwistHead.create(TwistHeadConfig(...))``; load with ``from_pretrained``. A kind of
    head defines ``output``; ``forward`` is the same for all.
    """

    kinds: ClassVar[dict[str, type[TwistHead]]] = {}
    uses_rank: ClassVar[bool] = False
    takes_condition: ClassVar[bool] = True

    config: TwistHeadConfig

    def __init_subclass__(cls, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TwistHead.kinds[kind] = cls

    def __init__(self, config: TwistHeadConfig) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def create(config: TwistHeadConfig, *, seed: int = 0) -> TwistHead:
        """Return a fresh head with log psi close to 0 (Glorot-normal weights, zero biases)."""
        head = TwistHead.kinds[config.head_type](config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in head.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_normal_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        return head

    @abstractmethod
    def output(self, inputs: Tensor, lm_head: LMHead | None = None) -> Tensor:
        """Return what the activation turns into log psi, [N, V], for inputs [N, H] or [N, 2 H]."""

    def forward(self, hidden: Tensor, lm_head: LMHead | None = None, condition: Tensor | None = None) -> Tensor:
        """Return log psi [N, V] for hidden states [N, H] (nats).

        Args:
            hidden: final hidden states of the prefixes.
            lm_head: hidden states to logits, needed by ``tied`` heads only.
            condition: hidden states c of the conditions [N, H], or [H] for one that all share;
                needed by conditional heads, and by them only.

        Raises:
            ValueError: a condition that is missing, of another shape, or not asked for; a tied head
                without ``lm_head``.
        """
        return self.activate(self.logit(hidden, lm_head, condition))

    def logit(self, hidden: Tensor, lm_head: LMHead | None = None, condition: Tensor | None = None) -> Tensor:
        """Return the output before the activation [N, V]: what the FUDGE loss takes. See ``forward``."""
        return self.output(self._inputs(hidden, condition), lm_head)

    def activate(self, output: Tensor) -> Tensor:
        """Return log psi of the head's output, both of any one shape."""
        return ACTIVATIONS[self.config.activation](output)

    def _inputs(self, hidden: Tensor, condition: Tensor | None) -> Tensor:
        if condition is None:
            if self.config.conditional:
                raise ValueError("`condition` is missing: the twist head is conditional, pass the hidden state of o_T.")
            return hidden
        if not self.config.conditional:
            raise ValueError("`condition` must be None for a twist head that is not conditional: drop it.")
        if condition.shape not in (hidden.shape, hidden.shape[-1:]):
            raise ValueError(
                f"`condition` must have shape {list(hidden.shape)} or {list(hidden.shape[-1:])}, got "
                f"{list(condition.shape)}: pass one hidden state per row, or one for all."
            )
        return torch.cat([hidden, condition.to(hidden.dtype).expand_as(hidden)], -1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``twist_config.json`` and ``model.safetensors`` into ``folder`` (made if missing)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {field.name: field.default for field in fields(self.config)}
        config = {key: value for key, value in asdict(self.config).items() if value != defaults[key]}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}, folder / WEIGHTS_NAME)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the head to a repository on the Hugging Face hub, made if missing; return the commit's address.

        Args:
            repo_id: "user/name", which ``from_pretrained`` and ``--twist-head`` take.
            private: whether a new repository is private; the account's default by default.
            options: further ones of ``HfApi.upload_folder``: ``commit_message``, ``revision`` or ``create_pr``.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None) -> TwistHead:
        """Load a head from a folder or a hub repository, in ``dtype`` (float32 by default).

        Raises:
            ValueError: a missing or malformed file, tensors that do not match the config, or
                values that are not finite in ``dtype``.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = load_config(path)
        weights_path = _fetch(path, WEIGHTS_NAME)
        head = TwistHead.kinds[config.head_type](config)
        try:
            state = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(
                f"`twist_head` {str(path)!r}: {WEIGHTS_NAME} is malformed ({error}): save it anew."
            ) from error
        expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if expected != got:
            raise ValueError(
                f"`twist_head` {str(path)!r}: {WEIGHTS_NAME} holds {got}, but its {CONFIG_NAME} calls for "
                f"{expected}: make the two agree."
            )
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"`twist_head` {str(path)!r}: tensor {name} has dtype {tensor.dtype}, expected a "
                    "floating-point one: save the head unquantised."
                )
            if not torch.isfinite(tensor.to(dtype or torch.float32)).all():
                raise ValueError(
                    f"`twist_head` {str(path)!r}: tensor {name} is not finite in {dtype or torch.float32}: "
                    "train it again, or serve the model in a dtype of wider range."
                )
        head.load_state_dict(state)
        return head.to(dtype) if dtype is not None else head

    def check_fits(self, hidden_size: int, vocab_size: int) -> None:
        """Raise ValueError, with both numbers, unless the head fits a model of this shape."""
        check_fits(self.config, hidden_size, vocab_size)


def check_fits(config: TwistHeadConfig, hidden_size: int, vocab_size: int) -> None:
    """Raise ValueError, with both numbers, unless a head of this config fits the model."""
    for name, model_value in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        head_value = getattr(config, name)
        if head_value != model_value:
            raise ValueError(
                f"`twist_head` does not fit the model: its {name} is {head_value}, the model's is "
                f"{model_value}: use a head trained on this model."
            )


class LinearHead(TwistHead, kind="linear"):
    """W x + b, with ``weight`` [V, X] and ``bias`` [V]; X is H, or 2 H with a condition."""

    def __init__(self, config: TwistHeadConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.input_size))
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def output(self, inputs: Tensor, lm_head: LMHead | None = None) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


class MLPHead(TwistHead, kind="mlp"):
    """Three linear layers X -> H -> H -> V with ReLU between them (App. G.1 of the paper); X is H, or 2 H."""

    def __init__(self, config: TwistHeadConfig) -> None:
        super().__init__(config)
        h, v = config.hidden_size, config.vocab_size
        self.layers = nn.ModuleList([nn.Linear(config.input_size, h), nn.Linear(h, h), nn.Linear(h, v)])

    def output(self, inputs: Tensor, lm_head: LMHead | None = None) -> Tensor:
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(inputs)))))


class LowRankHead(TwistHead, kind="low_rank"):
    """U D x + b with ``down`` D [r, X] and ``up`` U [V, r]: megabytes at V = 128k; X is H, or 2 H."""

    uses_rank = True

    def __init__(self, config: TwistHeadConfig) -> None:
        super().__init__(config)
        rank = config.rank or 0  # checked by the config
        self.down = nn.Parameter(torch.empty(rank, config.input_size))
        self.up = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def output(self, inputs: Tensor, lm_head: LMHead | None = None) -> Tensor:
        return nn.functional.linear(nn.functional.linear(inputs, self.down), self.up, self.bias)

    def factors(self, hidden: Tensor, condition: Tensor | None = None) -> LowRank:
        """Return the output before the activation in factors; see ``forward``."""
        return LowRank(nn.functional.linear(self._inputs(hidden, condition), self.down), self.up, self.bias)


class TiedHead(TwistHead, kind="tied"):
    """LMHead(u(h)), u(h) = U relu(D h + d): an update of the hidden state read out by the LM head.

    Costs r * 2H parameters whatever the vocabulary. In the engine ``u(h)`` travels through the
    LM head in the same matrix product as h itself (``update``).
    """

    uses_rank = True
    takes_condition = False

    def __init__(self, config: TwistHeadConfig) -> None:
        super().__init__(config)
        rank = config.rank or 0  # checked by the config
        self.down = nn.Parameter(torch.empty(rank, config.hidden_size))
        self.down_bias = nn.Parameter(torch.empty(rank))
        self.up = nn.Parameter(torch.empty(config.hidden_size, rank))

    def update(self, hidden: Tensor) -> Tensor:
        """Return u(h) [N, H] for h [N, H]."""
        return nn.functional.linear(torch.relu(nn.functional.linear(hidden, self.down, self.down_bias)), self.up)

    def output(self, inputs: Tensor, lm_head: LMHead | None = None) -> Tensor:
        if lm_head is None:
            raise ValueError("`lm_head` is missing: a tied head is read out through the model's LM head, pass it.")
        return lm_head(self.update(inputs))


def _fetch(path: str | Path, name: str) -> Path:
    """Return the local file ``name`` of a folder, or of a hub repository (downloaded if need be)."""
    if Path(path).is_dir():
        found = Path(path) / name
        if not found.is_file():
            raise ValueError(
                f"`twist_head` {str(path)!r} has no {name}: pass a folder written by TwistHead.save_pretrained."
            )
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(str(path), name))
    except (OSError, HFValidationError) as error:  # every hub failure is an OSError: absent, gated, offline
        raise ValueError(
            f"`twist_head` {str(path)!r} is neither a local folder nor a hub repository with {name} "
            f"({type(error).__name__}): check the name, and the connection if it is a hub id."
        ) from error


def load_config(path: str | Path) -> TwistHeadConfig:
    """Read ``twist_config.json`` of a head without its weights.

    Raises:
        ValueError: the file is missing or malformed, or a key is unknown or missing.
    """
    config_path = _fetch(path, CONFIG_NAME)
    where = f"`twist_head` {str(path)!r}: {CONFIG_NAME}"
    try:
        values = json.loads(config_path.read_text())
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}): save the head anew.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold an object, got {type(values).__name__}: save the head anew.")
    known = tuple(TwistHeadConfig.__dataclass_fields__)
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where} has an unknown key {key!r}{did_you_mean(key, known)}: the known ones are {', '.join(known)}."
            )
    missing = [key for key in ("head_type", "hidden_size", "vocab_size") if key not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: add it.")
    return TwistHeadConfig(**values)
