"""``vllm-twist eval``: bounds of log Z and divergences, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from vllm_twist.evaluation import EvaluationConfig, Evaluator, plot, table
from vllm_twist.flags import add_options
from vllm_twist.model_options import ModelOptions
from vllm_twist.potentials import Potential, load_potential, reads_model
from vllm_twist.prompts import read_prompts


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers like 1,4,16, got {text!r}") from None


def add_parser(subparsers: Any) -> None:
    defaults = EvaluationConfig()
    parser = subparsers.add_parser(
        "eval",
        description="Measure how well a twist head samples from p0 phi: lower and upper bounds of log Z with and "
        "without twist-induced proposal and resampling, and the divergences of the proposal.",
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--twist-head", required=True, help="folder or hub id of the head")
    parser.add_argument(
        "--potential",
        help="log phi of outputs: module:attribute, path.py:attribute, a potential.json or a folder with one",
    )
    parser.add_argument("--prompts", type=Path, required=True, help="file with one prompt a line, as text or JSON")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="picture of the bounds against K (needs vllm-twist[plot])")
    for name, kind, text in (
        ("max_tokens", int, "length at which outputs are cut"),
        ("particles", _numbers, "numbers of particles K, separated by commas"),
        ("repeats", int, "independent groups per bound"),
        ("samples", int, "samples of q and of sigma for the divergences"),
        ("max_draws", int, "samples of p0 to spend per prompt on exact samples of sigma, by rejection"),
        ("log_phi_max", float, "an upper bound of log phi, for potentials that do not know their own"),
        ("ess_threshold", float, "resample when ESS falls below this times K, in the rows that do"),
        ("seed", int, "seed of everything random"),
        (
            "condition_tokens",
            int,
            "in place of a potential: measure infilling, outputs that so many given tokens follow; every repeat has "
            "tokens of its own",
        ),
    ):
        default = getattr(defaults, name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} (default: {shown})"
        )
    add_options(parser, ModelOptions)
    parser.add_argument(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 2}'",
    )


def _load(args: argparse.Namespace, options: ModelOptions) -> tuple[Potential | None, Any]:
    """Return the potential, if there is one, and the language model in transformers, if it takes part in phi."""
    if args.potential is None:
        if not args.condition_tokens:
            raise ValueError("`--potential` is missing: name log phi, or pass `--condition-tokens` for infilling.")
        return None, options.load_model(args.model)
    if args.condition_tokens:
        raise ValueError(
            f"`--potential` must not be given with `--condition-tokens`, got {args.potential!r}: drop one of the two."
        )
    if not reads_model(args.potential):
        return load_potential(args.potential), None
    model, tokenizer = options.load_model(args.model), options.load_tokenizer(args.model)
    return load_potential(args.potential, model=model, tokenizer=tokenizer), model


def run(args: argparse.Namespace) -> None:
    """Evaluate as the flags say.

    Raises:
        ValueError: flags that are wrong, or a file that cannot be read.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    config = EvaluationConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(EvaluationConfig)})
    prompts = read_prompts(args.prompts)
    potential, model = _load(args, config)
    for path in (args.json, args.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    import vllm

    import vllm_twist

    options = {
        "max_num_seqs": max(256, *config.particles),
        "seed": config.seed,
        "dtype": config.dtype,
        **config.files,
        **args.engine_args,
    }
    llm = vllm.LLM(args.model, twist_head=args.twist_head, **options)
    try:
        found = Evaluator(llm, potential, config, model).evaluate(
            prompts, lambda prompt: print(table(prompt), flush=True)
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
    found = dataclasses.replace(
        found,
        source={
            "model": args.model,
            "twist_head": args.twist_head,
            "potential": args.potential,
            "vllm": vllm.__version__,
            "vllm_twist": vllm_twist.__version__,
        },
    )
    if args.json is not None:
        args.json.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
    if args.plot is not None:
        plot(found, str(args.plot))
