"""The engine as the sampler of training."""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm_twist.results import results
from vllm_twist.training.samplers.base import ESS_THRESHOLD, DrawRequest, Draws
from vllm_twist.twist import TwistHead

#: Most sequences in one batch of the engine, unless one request needs more.
MAX_NUM_SEQS = 1024
#: Most tokens in one step of an engine on a CPU; a compiled one computes as many to warm up.
MAX_TOKENS_PER_STEP = 2**14


class EngineSampler:
    """Draw with a vLLM engine whose twist head is replaced, in place, whenever it has learned.

    Nothing is restarted, and nothing in the engine goes stale: the head is read after the model's
    last layer, so the KV cache, prefixes cached from earlier requests included, depends on the base
    model alone, which never changes. No request is under way when the head is replaced.

    The engine reads the head in the model's dtype, the trainer in float32: in half precision the law
    drawn from and the log q that the trainer computes differ by that rounding.

    ``q`` is one request with ``count`` particles that never resample, ``smc`` one that does, ``p0`` a
    plain one with ``n = count``; all requests of a call run in one batch.

    On a CPU one engine at a time runs inside the process (``_fits_here``).
    """

    def __init__(
        self,
        model: str,
        head: TwistHead,
        *,
        end_ids: frozenset[int],
        max_model_len: int,
        max_num_seqs: int,
        dtype: str = "auto",
        **engine_args: Any,
    ) -> None:
        """Start an engine.

        Args:
            model: folder or hub id of the base model.
            head: the head to begin with; ``set_head`` takes others of the same config.
            end_ids: tokens that end an output.
            max_model_len: longest prompt and output together, in tokens.
            max_num_seqs: outputs that one call of ``sample`` asks for, at most; the largest request at least.
            dtype: as in vLLM; the one that the gradient is computed in, so that both have one p0.
            engine_args: of ``vllm.LLM``, over the defaults here, ``revision`` and such among them.
                Memory: by default the KV cache gets what ``max_num_seqs`` sequences need and no more, for a GPU
                is shared with the trainer.
        """
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # torch has run threads by now
        from vllm import LLM

        self.end_ids = sorted(end_ids)
        with tempfile.TemporaryDirectory() as folder, _alone(), _inside(_fits_here(engine_args)):
            head.save_pretrained(folder)
            options: dict[str, Any] = {
                "twist_head": folder,
                "twist_particles": 1,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "skip_tokenizer_init": True,
                "enforce_eager": not torch.cuda.is_available(),
                "seed": 0,
                **engine_args,
            }
            if not torch.cuda.is_available():
                # The smallest that vLLM has here: every fork copies one.
                options.setdefault("block_size", 32)
                # A seeded prompt that is computed in two steps fails in vLLM on a CPU: let them all fit into one.
                whole = min(options["max_num_seqs"] * options["max_model_len"], MAX_TOKENS_PER_STEP)
                options.setdefault("max_num_batched_tokens", max(2048, whole))
            if not options.keys() & {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}:
                options["kv_cache_memory_bytes"] = _kv_cache_bytes(
                    model,
                    options["max_num_seqs"],
                    options["max_model_len"],
                    4 if dtype in ("auto", "float32") else 2,
                    **{name: options[name] for name in ("trust_remote_code", "revision") if name in options},
                )
            self.llm: Any = LLM(model, **options)

    def set_head(self, head: TwistHead) -> None:
        from safetensors.torch import save

        dtype = self.llm.llm_engine.vllm_config.model_config.dtype
        state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in head.state_dict().items()}
        self._call("set_twist_head_weights", save(state))

    def _call(self, method: str, *args: Any) -> None:
        """Have the workers run a method.

        vLLM's client waits for the answer of an engine that has died meanwhile for ever; here that is an error.
        """
        outcome: list[BaseException | None] = []

        def run() -> None:
            try:
                self.llm.collective_rpc(method, args=args)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        if resources is None:  # in this process
            run()
        else:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            while thread.is_alive() and not resources.engine_dead:
                thread.join(0.5)
        if not outcome:
            raise RuntimeError(
                "the engine that draws has died: its own messages say why, a lack of memory is the most common reason; "
                "a run with checkpoints goes on with `resume`."
            )
        if outcome[0] is not None:
            raise outcome[0]

    def sample(self, requests: Sequence[DrawRequest]) -> list[Draws]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._parameters(request) for request in requests],
            use_tqdm=False,
        )
        return [self._draws(request, output) for request, output in zip(requests, outputs, strict=True)]

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None

    def _parameters(self, request: DrawRequest) -> Any:
        from vllm import SamplingParams

        extra: dict[str, Any] = {"twist": 0}
        if request.law != "p0":
            extra = {
                "twist_particles": request.count,
                "twist_ess_threshold": ESS_THRESHOLD if request.law == "smc" else 0.0,
                "twist_return_particles": 1,
            }
            if request.condition is not None:
                extra["twist_condition"] = list(request.condition)
        return SamplingParams(
            n=request.count if request.law == "p0" else 1,
            temperature=1.0,
            max_tokens=request.max_tokens,
            seed=request.seed,
            stop_token_ids=self.end_ids,
            ignore_eos=True,  # what ends an output is said above, whatever the model's files say
            detokenize=False,
            extra_args=extra,
        )

    def _draws(self, request: DrawRequest, output: Any) -> Draws:
        if request.law == "p0":
            return Draws([list(completion.token_ids) for completion in output.outputs])
        particles = results(output)[0].particles or []
        # None stands for -inf, which JSON has not.
        log_w = [-math.inf if p.log_weight is None else p.log_weight for p in particles]
        return Draws([p.token_ids for p in particles], log_w)


def _kv_cache_bytes(model: str, sequences: int, length: int, itemsize: int, **files: Any) -> int | None:
    """Return what so many sequences of this length need, with a margin; None for models that it cannot tell of."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, **files).get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if heads is None or layers is None:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    block = 128  # the largest in common use
    tokens = block * (math.ceil(length / block) + 1) * (sequences + 8)
    return 2 * layers * kv_heads * width * itemsize * tokens


def _fits_here(engine_args: dict[str, Any]) -> bool:
    """Return whether the engine is to run in this process, with its threads.

    On a CPU vLLM's own processes cost more than they give here: they wait by spinning, which takes a core from the
    model's threads, and from the trainer's. But there can be one world of ``torch.distributed`` in a process, and one
    set of vLLM's groups: the engine must be the only user of both, and have one worker.
    ``VLLM_ENABLE_V1_MULTIPROCESSING`` decides where it is set.
    """
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.platforms import current_platform

    several = engine_args.keys() & {
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"
    }  # fmt: skip
    if "VLLM_ENABLE_V1_MULTIPROCESSING" in os.environ or not current_platform.is_cpu():
        return False
    return not (several or torch.distributed.is_initialized() or model_parallel_is_initialized())


@contextlib.contextmanager
def _inside(fits: bool) -> Iterator[None]:
    """Have vLLM start an engine in this process; starting it leaves the process's own settings as they are."""
    if not fits:
        yield
        return
    from vllm import envs

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    set_num_threads, states = torch.set_num_threads, (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        yield
    finally:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        # An engine has vLLM remember the environment it started in, for all that this process may start.
        envs.disable_envs_cache()
        torch.set_num_threads = set_num_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide from the engine what a launcher of several processes says to this one, and the other ones' GPUs."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in (*hidden, "CUDA_VISIBLE_DEVICES")}
    local_rank = before["LOCAL_RANK"]
    for name in hidden:
        os.environ.pop(name, None)
    if local_rank is not None and torch.cuda.is_available():
        visible = before["CUDA_VISIBLE_DEVICES"] or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local_rank)]
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
