"""Workers that carry a twist head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_twist.engine.admission import check_head, read_config
from vllm_twist.engine.readout import Readout
from vllm_twist.twist import TwistHead

#: Our worker classes, by the class that the platform would have used.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "CPUTwistWorker",
    "vllm.v1.worker.gpu_worker.Worker": "GPUTwistWorker",
}


if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class TwistWorkerMixin(_Base):
    """Load the head beside the model; fork after sampling; send the step back with the output."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        if self.device is not None and self.device.type == "cpu":
            # In bfloat16 vLLM's attention uses AMX, which Linux grants a process that has asked for it. PyTorch asks
            # when it first uses it: in an eager model too late for the attention, an illegal instruction till then.
            torch.cpu._init_amx()
        # Each runner's part is imported where it runs: the other's may not exist on this platform.
        name = "v2.runner.RunnerV2" if self.use_v2_model_runner else "v1.runner.RunnerV1"
        connect = resolve_obj_by_qualname(f"vllm_twist.engine.{name}")
        self.twist = connect(self.model_runner, self._read_head(read_config(self.vllm_config).head))
        self.readout: Readout = self.twist.readout

    def _read_head(self, head: str) -> TwistHead:
        model_config = self.vllm_config.model_config
        loaded = TwistHead.from_pretrained(head, dtype=model_config.dtype)  # type: ignore[arg-type]
        check_head(loaded.config, model_config)
        conditional = read_config(self.vllm_config).conditional
        if loaded.config.conditional != conditional:
            kinds = {True: "conditional", False: "not conditional"}
            raise ValueError(
                f"`twist_head` {head!r} is {kinds[not conditional]}, the engine was started with one that is "
                f"{kinds[conditional]}: start another engine for it."
            )
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
        self.twist.begin(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.twist.before_sampling()
        return self.twist.after_sampling(super().sample_tokens(grammar_output))


def __getattr__(name: str) -> type:
    # Built on demand: importing a platform's worker has side effects on the others.
    for base, ours in WORKERS.items():
        if name == ours:
            worker = type(name, (TwistWorkerMixin, resolve_obj_by_qualname(base)), {"__module__": __name__})
            globals()[name] = worker
            return worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
