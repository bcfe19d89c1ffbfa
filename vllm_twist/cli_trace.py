"""``vllm-twist trace``: the life of one particle group, as a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from vllm_twist.config import RequestConfig
from vllm_twist.flags import add_options
from vllm_twist.model_options import ModelOptions
from vllm_twist.prompts import encode_prompt, parse_prompt
from vllm_twist.resampling import ess
from vllm_twist.results import TwistResult, results


def add_parser(subparsers: Any) -> None:
    defaults = RequestConfig()
    parser = subparsers.add_parser(
        "trace",
        description="Run one twisted request and draw its ancestry: which particles had offspring, when the group "
        "was resampled, and how even the weights were.",
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--twist-head", required=True, help="folder or hub id of the head")
    parser.add_argument("--prompt", required=True, help="text to continue, or a JSON object as in --prompts")
    parser.add_argument("--plot", type=Path, required=True, help="picture to write (needs vllm-twist[plot])")
    parser.add_argument("--max-tokens", type=int, default=32, help="length at which outputs are cut (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the group (default: 0)")
    for name in ("particles", "ess_threshold", "resampling"):
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"as in a request (default: {value})"
        )
    add_options(parser, ModelOptions)
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="further arguments of vllm.LLM"
    )


def run(args: argparse.Namespace) -> None:
    """Run the request and write the picture.

    Raises:
        ValueError: flags that are wrong, or matplotlib is missing.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    names = ("particles", "ess_threshold", "resampling")
    RequestConfig(**{name: getattr(args, name) for name in names})  # refuses what is out of range
    model = ModelOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ModelOptions)})
    prompt = parse_prompt(args.prompt, "`--prompt`")
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    import vllm

    options = {"max_num_seqs": max(64, args.particles), "dtype": model.dtype, **model.files, **args.engine_args}
    llm = vllm.LLM(args.model, twist_head=args.twist_head, **options)
    extra = {f"twist_{name}": getattr(args, name) for name in names}
    params = vllm.SamplingParams(
        max_tokens=args.max_tokens, seed=args.seed, extra_args={**extra, "twist_trace": 1, "twist_return_particles": 1}
    )
    try:
        inputs: Any = {"prompt_token_ids": encode_prompt(prompt, llm.get_tokenizer())}
        (output,) = llm.generate([inputs], params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    (group,) = results(output)
    shown = prompt if isinstance(prompt, str) else f"{args.prompt}\n"
    print(f"{shown}{output.outputs[0].text}")
    print(f"log Z {group.log_z:.3f} · ESS {group.ess:.1f} of {args.particles} · resampled {group.num_resamplings}×")
    plot(group, repr(prompt if isinstance(prompt, str) else args.prompt), str(args.plot))


def lineage(group: TwistResult, particle: int) -> list[int]:
    """Return the place in the group of a particle's ancestor at each token of its output, the first one first."""
    assert group.trace is not None
    places = []
    for step in reversed(group.trace):
        ancestor = step.ancestors[particle]
        if ancestor is None:
            continue  # it had ended: its place held it from its last token on
        places.append(particle)
        particle = ancestor
    return places[::-1]


def plot(group: TwistResult, title: str, path: str) -> None:
    """Draw ancestry, ESS and spread of the log weights over time.

    Raises:
        ValueError: the result has no trace, or matplotlib is not installed.
    """
    if group.trace is None:
        raise ValueError("`group` must have a trace, got none: send the request with `twist_trace`=1.")
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ValueError("`--plot` needs matplotlib, got none: pip install 'vllm-twist[plot]'.") from error

    steps = group.trace
    count = len(steps[0].ancestors)
    survivors = {(t, place) for k in range(count) for t, place in enumerate(lineage(group, k), 1)}
    drawn = {(t, place) for t, place in enumerate(lineage(group, group.chosen), 1)}
    edges: dict[str, list[Any]] = {"lost": [], "kept": [], "drawn": []}
    ends = []
    for t, step in enumerate(steps, 1):
        for place, ancestor in enumerate(step.ancestors):
            if ancestor is None:
                continue
            kind = "drawn" if (t, place) in drawn else "kept" if (t, place) in survivors else "lost"
            edges[kind].append([(t - 1, ancestor), (t, place)])
            if t == len(steps) or steps[t].ancestors[place] is None:
                ends.append((t, place))

    figure = Figure(figsize=(max(7.0, 2 + 0.22 * len(steps)), 4.2 + 0.09 * count), layout="constrained", dpi=150)
    tree, size, spread = figure.subplots(3, 1, sharex=True, height_ratios=[max(2.0, 0.14 * count), 1, 1])
    style = {"lost": ("0.82", 0.8), "kept": ("#7fa8bd", 1.1), "drawn": ("#c4562e", 2.2)}
    names = {"lost": "died out", "kept": "lineage of a final particle", "drawn": "particle that was drawn"}
    for kind, (colour, width) in style.items():
        tree.add_collection(LineCollection(edges[kind], colors=colour, linewidths=width, label=names[kind]))
    tree.plot([t for t, _ in ends], [place for _, place in ends], "|", color="0.35", markersize=5, label="end")
    tree.set_ylim(count - 0.5, -0.5)
    tree.set_ylabel("particle", fontsize=9)
    tree.yaxis.set_major_locator(MaxNLocator(integer=True))
    tree.set_title(f"{title}: log Z-hat {group.log_z:.2f}, resampled {group.num_resamplings} times", fontsize=10)

    times = list(range(1, len(steps) + 1))
    live = [[w for w in step.log_w if w is not None] for step in steps]
    sizes = [float(ess(torch.tensor(w, dtype=torch.float64))) for w in live]
    size.plot(times, [len(w) for w in live], color="0.7", linestyle="--", label="live particles")
    size.plot(times, sizes, color="#0b6e99", marker=".", label="ESS of the live ones after the step")
    size.set_ylim(0, count * 1.08)
    size.set_ylabel("ESS", fontsize=9)
    finite = [[x for x in w if math.isfinite(x)] for w in live]
    shown = [(t, w) for t, w in zip(times, finite, strict=True) if w]
    spread.fill_between(
        [t for t, _ in shown], [min(w) for _, w in shown], [max(w) for _, w in shown], color="#0b6e99", alpha=0.2,
        linewidth=0, label="log weights, least to greatest",
    )  # fmt: skip
    spread.plot([t for t, _ in shown], [sorted(w)[len(w) // 2] for _, w in shown], color="#0b6e99", label="median")
    spread.set_ylabel("log weight", fontsize=9)
    spread.set_xlabel("token", fontsize=9)
    for axis in (tree, size, spread):
        for t, step in enumerate(steps, 1):
            if step.resampled:
                axis.axvline(t - 0.5, color="#c4562e", linewidth=0.8, linestyle=":", zorder=0)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False)
    spread.plot([], [], color="#c4562e", linewidth=0.8, linestyle=":", label="resampled")
    spread.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False)
    spread.set_xlim(0, len(steps) + 0.5)
    spread.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)
