"""Wire twists into an engine: options in, classes chosen, unsupported set-ups refused."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from vllm_twist.config import PREFIX, TwistConfig, engine_options
from vllm_twist.engine import compat

_MODULE = "vllm_twist.engine"


def register() -> None:
    """Entry point in ``vllm.general_plugins``; safe to call in any process, any number of times."""
    compat.patch_engine_args(add_cli_args, TwistConfig.from_options, prepare, configure)


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
    for option in engine_options():
        flag = f"--{PREFIX}-{option.name.replace('_', '-')}"
        text = f"{option.metadata['help']} (default: {option.default})"
        if isinstance(option.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=type(option.default), default=argparse.SUPPRESS, help=text)


def prepare(engine_args: Any) -> None:
    """Check the arguments and set those that must be settled before the engine config is built.

    Raises:
        ValueError: the vLLM version or a combination of options is not supported.
    """
    compat.check_vllm_version()
    for name, remedy in (
        ("scheduler_cls", "drop it; a twist head brings its own scheduler"),
        ("speculative_config", "drop it; speculative decoding and twists exclude each other"),
        ("kv_transfer_config", "drop it; a group's KV blocks cannot be transferred"),
        ("ec_transfer_config", "drop it"),
    ):
        value = getattr(engine_args, name, None)
        if value is not None:
            raise ValueError(f"`{name}` cannot be combined with `twist_head`, got {value!r}: {remedy}.")
    if engine_args.worker_cls != "auto":
        raise ValueError(
            f"`worker_cls` cannot be combined with `twist_head`, got {engine_args.worker_cls!r}: drop it; "
            "a twist head brings its own worker."
        )
    if engine_args.enable_lora:
        raise ValueError("`enable_lora` cannot be combined with `twist_head`, got True: merge the adapter instead.")


def configure(vllm_config: Any, twist: TwistConfig) -> None:
    """Put the twist classes into a finished engine config.

    Raises:
        ValueError: the model, platform or parallel layout is not supported, or the head does not fit.
    """
    from vllm_twist.engine.admission import check_head
    from vllm_twist.engine.scoring import read_potential
    from vllm_twist.engine.worker import WORKERS
    from vllm_twist.twist import TwistHead, load_config

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.runner_type != "generate":
        raise ValueError(f"`twist_head` needs a generating model, got runner {model.runner_type!r}: drop it.")
    if model.is_encoder_decoder:
        raise ValueError(f"`twist_head` needs a decoder-only model, got {model.model!r}: drop it.")
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "`pipeline_parallel_size` must be 1 with `twist_head`, got "
            f"{parallel.pipeline_parallel_size}: use tensor parallelism."
        )
    for name, value, neutral in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, 1),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1),
        ("enable_batch_sharded_sampling", parallel.enable_batch_sharded_sampling, False),
        ("enable_return_routed_experts", vllm_config.aux_output_config.enabled, False),
        ("return_sampling_mask", model.return_sampling_mask, False),
        ("watermark_config", vllm_config.watermark_config, None),
    ):
        if value != neutral:
            raise ValueError(f"`{name}` cannot be combined with `twist_head`, got {value!r}: drop it.")
    if parallel.worker_cls not in WORKERS:
        raise ValueError(
            f"`twist_head` supports the CPU and CUDA workers of vLLM, this platform uses {parallel.worker_cls!r}: "
            "serve on one of these."
        )
    head = load_config(twist.head)
    check_head(head, model)
    twist = dataclasses.replace(twist, conditional=head.conditional)
    # The workers load it again; here its errors still reach the one who starts the engine.
    TwistHead.from_pretrained(twist.head, dtype=model.dtype)
    if twist.potential is not None:
        read_potential(twist.potential, None)
    if twist.defaults.particles > vllm_config.scheduler_config.max_num_seqs:
        raise ValueError(
            f"`twist_particles` must be at most `max_num_seqs`={vllm_config.scheduler_config.max_num_seqs}, got "
            f"{twist.defaults.particles}: lower it or raise `max_num_seqs`."
        )
    v2, scheduler = vllm_config.use_v2_model_runner, vllm_config.scheduler_config
    if not v2:
        # Its step reads the weights back, so that there is nothing to overlap.
        scheduler.async_scheduling = False
    parallel.worker_cls = f"{_MODULE}.worker.{WORKERS[parallel.worker_cls]}"
    kind = "TwistAsyncScheduler" if scheduler.async_scheduling else "TwistScheduler"
    scheduler.scheduler_cls = f"{_MODULE}.scheduler.{kind}"
    processor = "logits_processor_v2:TwistLogitsProcessorV2" if v2 else "logits_processor:TwistLogitsProcessor"
    # Last, so that p0 is complete when the twist is applied.
    model.logits_processors = [*(model.logits_processors or ()), f"{_MODULE}.{processor}"]
    vllm_config.additional_config = {**vllm_config.additional_config, PREFIX: twist.to_dict()}
    compat.patch_frontend()
