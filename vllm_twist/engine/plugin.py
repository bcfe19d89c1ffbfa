"""Wire twists into an engine: options in, classes chosen, unsupported set-ups refused."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from vllm.logger import init_logger

from vllm_twist.config import PREFIX, TwistConfig, engine_options
from vllm_twist.engine import compat
from vllm_twist.options import add_flags

logger = init_logger(__name__)

_MODULE = "vllm_twist.engine"


def register() -> None:
    """Entry point in ``vllm.general_plugins``; safe to call in any process, any number of times.

    It never raises: people who use no twists must not be hurt.
    """
    try:
        compat.patch_engine_args(add_cli_args, TwistConfig.from_options, prepare, configure)
    except Exception as error:
        compat.give_up(f"{type(error).__name__}: {error}")


def add_cli_args(parser: Any) -> None:
    """Add the ``--twist-*`` flags, in a group of their own."""
    group = parser.add_argument_group(
        title="TwistConfig",
        description="Twisted sequential Monte Carlo: sample from p0 * psi instead of from the model.",
    )
    group.add_argument(
        "--twist-head", type=str, default=argparse.SUPPRESS, help="folder or hub id of a twist head; turns twists on"
    )
    group.add_argument(
        "--twist-potential",
        type=str,
        default=argparse.SUPPRESS,
        help="log phi of finished outputs, as module:attribute or path.py:attribute: makes the target p0 * phi",
    )
    group.add_argument(
        "--twist-potential-timeout",
        type=float,
        default=argparse.SUPPRESS,
        help=f"seconds that the potential may take for one group (default: {TwistConfig.potential_timeout:g})",
    )
    add_flags(group, engine_options(), prefix=f"{PREFIX}-", suppress=True)


def prepare(engine_args: Any) -> None:
    """Check what must be right before the engine config is built.

    Raises:
        ValueError: the vLLM version, the environment or a combination of options is not supported.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    compat.check_vllm_version()
    if envs.VLLM_USE_V2_MODEL_RUNNER and not HAS_TRITON:
        raise ValueError(
            "`VLLM_USE_V2_MODEL_RUNNER`=1 in the environment asks for Model Runner V2, which needs Triton, but Triton "
            "has no backend on this machine: unset it. Some packages set it when they are imported, genlm.backend for "
            "one: import vLLM before them."
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError(
            "`VLLM_USE_RUST_FRONTEND` must be 0 with `twist_head`, got 1: unset it; requests of the Rust frontend pass "
            "by the checks and the results of twisted ones."
        )
    if engine_args.scheduler_cls is not None:
        raise ValueError(
            f"`scheduler_cls` cannot be combined with `twist_head`, got {engine_args.scheduler_cls!r}: drop it; a "
            "twist head brings its own scheduler."
        )
    if engine_args.worker_cls != "auto":
        raise ValueError(
            f"`worker_cls` cannot be combined with `twist_head`, got {engine_args.worker_cls!r}: drop it; "
            "a twist head brings its own worker."
        )


def check_model(model: Any) -> None:
    """Refuse a model whose particles could not be forked.

    Raises:
        ValueError: it does not generate, or keeps something that is no KV cache of attention.
    """
    if model.runner_type != "generate":
        raise ValueError(f"`twist_head` needs a generating model, got runner {model.runner_type!r}: drop it.")
    if model.is_encoder_decoder:
        raise ValueError(f"`twist_head` needs a decoder-only model, got {model.model!r}: drop it.")
    if model.is_hybrid or model.is_attention_free:
        raise ValueError(
            f"`twist_head` needs a model of attention layers alone, got {model.model!r}, whose recurrent layers keep a "
            "state that is not forked: use another model."
        )


def check_options(vllm_config: Any) -> None:
    """Refuse what a twisted engine cannot be combined with.

    Raises:
        ValueError: naming the option.
    """
    from vllm import envs

    from vllm_twist.engine.worker import WORKERS

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    # What is there in the end counts: each has more than one option or environment variable that brings it.
    for part, name, remedy in (
        ("speculative_config", "speculative_config", "drop it; where the model is a speculator name its target"),
        ("kv_transfer_config", "kv_transfer_config", "drop it, and `kv_offloading_size`; a group's KV blocks stay"),
        ("ec_transfer_config", "ec_transfer_config", "drop it"),
        ("lora_config", "enable_lora", "drop it, or merge the adapter"),
        ("diffusion_config", "diffusion_config", "use another model"),
        ("watermark_config", "watermark_config", "drop it"),
    ):
        value = getattr(vllm_config, part)
        if value is not None:
            got = getattr(value, "method", None) or getattr(value, "kv_connector", None) or type(value).__name__
            raise ValueError(f"`{name}` cannot be combined with `twist_head`, got {got!r}: {remedy}.")
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "`pipeline_parallel_size` must be 1 with `twist_head`, got "
            f"{parallel.pipeline_parallel_size}: use tensor parallelism."
        )
    for name, value, neutral in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, 1),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1),
        ("enable_batch_sharded_sampling", bool(parallel.enable_batch_sharded_sampling), False),
        ("enable_return_routed_experts", vllm_config.aux_output_config.enabled, False),
        ("return_sampling_mask", model.return_sampling_mask, False),
        ("kv_sharing_fast_prefill", vllm_config.cache_config.kv_sharing_fast_prefill, False),
        ("hisparse_config", vllm_config.attention_config.hisparse_config, None),
    ):
        if value != neutral:
            raise ValueError(f"`{name}` cannot be combined with `twist_head`, got {value!r}: drop it.")
    if parallel.distributed_executor_backend == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        raise ValueError(
            "`VLLM_USE_RAY_V2_EXECUTOR_BACKEND` must be 1 with `twist_head`, got 0: unset it; the old executor passes "
            "by the worker."
        )
    if parallel.worker_cls not in WORKERS:
        raise ValueError(
            f"`twist_head` supports the CPU and CUDA workers of vLLM, this platform uses {parallel.worker_cls!r}: "
            "serve on one of these."
        )


def configure(vllm_config: Any, twist: TwistConfig, unify: bool = True) -> None:
    """Put the twist classes into a finished engine config.

    Args:
        unify: keep the KV cache of sliding-window layers as that of full ones, so that all are forked alike.

    Raises:
        ValueError: the model, platform or parallel layout is not supported, or the head does not fit.
    """
    from vllm_twist.engine.admission import check_head, check_lanes
    from vllm_twist.engine.scoring import read_potential
    from vllm_twist.engine.worker import WORKERS
    from vllm_twist.twist import TwistHead, load_config

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    check_model(model)
    check_options(vllm_config)
    head = load_config(twist.head)
    check_head(head, model)
    twist = dataclasses.replace(twist, conditional=head.conditional)
    # The workers load it again; here its errors still reach the one who starts the engine.
    TwistHead.from_pretrained(twist.head, dtype=model.dtype)
    if twist.potential is not None:
        read_potential(twist.potential, None)
    check_lanes(twist.defaults.particles, vllm_config, "lower it, or start with {name}")
    v2, scheduler = vllm_config.use_v2_model_runner, vllm_config.scheduler_config
    if unify:
        scheduler.disable_hybrid_kv_cache_manager = True
        if len(set(getattr(model.hf_text_config, "layer_types", None) or ())) > 1:
            logger.info(
                "The KV cache of all layers is that of full attention, so that particles can be forked: "
                "`disable_hybrid_kv_cache_manager` is on."
            )
    if not v2:
        # Its step reads the weights back, so that there is nothing to overlap.
        scheduler.async_scheduling = False
    parallel.worker_cls = f"{_MODULE}.worker.{WORKERS[parallel.worker_cls]}"
    kind = "TwistAsyncScheduler" if scheduler.async_scheduling else "TwistScheduler"
    scheduler.scheduler_cls = f"{_MODULE}.scheduler.{kind}"
    processor = "v2.logits_processor:TwistLogitsProcessorV2" if v2 else "v1.logits_processor:TwistLogitsProcessor"
    # Last, so that p0 is complete when the twist is applied.
    model.logits_processors = [*(model.logits_processors or ()), f"{_MODULE}.{processor}"]
    vllm_config.additional_config = {**vllm_config.additional_config, PREFIX: twist.to_dict()}
    compat.patch_frontend()
