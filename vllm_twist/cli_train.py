"""``vllm-twist train``: the flags of ``TrainingConfig``, and where things are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from vllm_twist.flags import add_options
from vllm_twist.prompts import read_prompts
from vllm_twist.training import TrainingConfig, TwistTrainer


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        description="Learn a twist head that steers a language model towards a potential. Runs unchanged under "
        "accelerate launch, each process drawing for prompts of its own.",
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument(
        "--potential",
        help="log phi of outputs: module:attribute, path.py:attribute, a potential.json or a folder with one",
    )
    parser.add_argument("--prompts", type=Path, required=True, help="file with one prompt a line, as text or JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for the head, which can be served as it is")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write the metrics for TensorBoard into DIR")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON",
        help="further arguments of vllm.LLM for the engine that draws, such as '{\"tensor_parallel_size\": 2}'",
    )  # fmt: skip
    add_options(parser, TrainingConfig)


def run(args: argparse.Namespace) -> None:
    """Train as the flags say.

    Raises:
        ValueError: flags that are wrong or do not fit together, a file that cannot be read.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    names = [option.name for option in dataclasses.fields(TrainingConfig)]
    config = TrainingConfig.from_options({name: getattr(args, name) for name in names})
    prompts = read_prompts(args.prompts)
    with TwistTrainer(args.model, args.potential, config, engine_args=args.engine_args) as trainer:
        trainer.train(prompts, args.out, resume=args.resume, progress=True, log_dir=args.tensorboard)
