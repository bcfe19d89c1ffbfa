"""Workers that carry a twist head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_twist.engine.admission import check_head, read_config
from vllm_twist.engine.fork_v1 import fork
from vllm_twist.engine.logits_processor import TwistLogitsProcessor
from vllm_twist.twist import TiedHead, TwistHead

#: Our worker classes, by the class that the platform would have used.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "CPUTwistWorker",
    "vllm.v1.worker.gpu_worker.Worker": "GPUTwistWorker",
}


class Readout:
    """Read log psi off the hidden states that the model's LM head sees.

    Replaces ``model.compute_logits`` by one that keeps the hidden states of the sampled rows. A
    tied head's rows go through the LM head together with the model's own, in one product.
    """

    def __init__(self, model: nn.Module, head: TwistHead, processor: TwistLogitsProcessor) -> None:
        self.head = head
        self.processor = processor
        self.compute_logits: Callable[..., Tensor | None] = model.compute_logits  # type: ignore[assignment]
        self.hidden: Tensor | None = None
        self.tied: Tensor | None = None
        model.compute_logits = self  # type: ignore[assignment]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        self.hidden, self.tied = hidden, None
        rows = self.processor.rows
        if not (isinstance(self.head, TiedHead) and rows):
            return self.compute_logits(hidden, *args, **kwargs)
        index = torch.tensor(rows, device=hidden.device)
        both = self.compute_logits(torch.cat([hidden, self.head.update(hidden[index])]), *args, **kwargs)
        if both is None:
            return None
        logits, tied = both[: len(hidden)], both[len(hidden) :]
        self.tied = tied.new_zeros(logits.shape).index_copy_(0, index, tied) if len(rows) < len(hidden) else tied
        return logits

    def log_psi(self, rows: Tensor) -> Tensor:
        """Return log psi [L, V] for rows [L] of the last forward pass."""
        if self.tied is not None:
            return self.head.activate(self.tied[rows])
        assert self.hidden is not None, "log_psi before a forward pass"
        return self.head(self.hidden[rows])


if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class TwistWorkerMixin(_Base):
    """Load the head beside the model; fork after sampling; send the step back with the output."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        config = read_config(self.vllm_config)
        runner = self.model_runner
        self.twist = next(p for p in runner.input_batch.logitsprocs.all if isinstance(p, TwistLogitsProcessor))
        self.readout = Readout(runner.get_model(), self._read_head(config.head), self.twist)
        self.twist.log_psi_of = self.readout.log_psi
        self.twist.is_partial = lambda row: bool(runner.discard_request_mask.np[row])

    def _read_head(self, head: str) -> TwistHead:
        model_config = self.vllm_config.model_config
        loaded = TwistHead.from_pretrained(head, dtype=model_config.dtype)  # type: ignore[arg-type]
        check_head(loaded.config, model_config)
        return loaded.requires_grad_(False).to(self.device)

    def load_twist_head(self, head: str) -> None:
        """Replace the head of the running engine: ``llm.collective_rpc("load_twist_head", args=(path,))``.

        The KV cache depends on the model alone, so nothing cached goes stale. Call it between
        requests: a group that lives through the change is weighted by two different twists.
        """
        self.readout.head = self._read_head(head)

    @torch.inference_mode()
    def set_twist_head_weights(self, weights: bytes) -> None:
        """Replace the weights of the running engine's head by others of the same config, in place.

        ``weights`` is what ``safetensors.torch.save`` makes of its state dict: bytes pass vLLM's
        serialisation as they are. For the KV cache see ``load_twist_head``.
        """
        from safetensors.torch import load

        state = load(weights)
        for name, tensor in state.items():
            if not tensor.to(self.vllm_config.model_config.dtype).isfinite().all():
                raise ValueError(
                    f"`weights` must be finite in {self.vllm_config.model_config.dtype}, {name} is not: lower the "
                    "learning rate, or use a dtype of wider range."
                )
        self.readout.head.load_state_dict(state)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.twist.table.release(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        step = self.twist.take_step()
        if step is not None:
            forks = step.forks()
            if forks:
                fork(self.model_runner, forks)
            output.twist = step
        return output


def __getattr__(name: str) -> type:
    # Built on demand: importing a platform's worker has side effects on the others.
    for base, ours in WORKERS.items():
        if name == ours:
            worker = type(name, (TwistWorkerMixin, resolve_obj_by_qualname(base)), {"__module__": __name__})
            globals()[name] = worker
            return worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
