"""What a run of training can be taken up from: one file beside the head."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from vllm_twist.training.config import TrainingConfig

STATE_NAME = "training_state.pt"
#: What may change between a run and the one that goes on from it.
FREE = ("updates", "save_every", "sampler", "attention")


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint: all in one file, in one move, so that a run that dies meanwhile leaves the last one."""
    torch.save(state, folder / f"{STATE_NAME}.tmp")
    os.replace(folder / f"{STATE_NAME}.tmp", folder / STATE_NAME)


def load_state(out: str | Path | None, config: TrainingConfig, run: dict[str, Any], device: Any) -> dict[str, Any]:
    """Return the checkpoint in ``out``.

    Args:
        config: of the run that goes on.
        run: further values that have to be those of the checkpoint, by key.
        device: for its tensors.

    Raises:
        ValueError: there is none, or it is of another run.
    """
    path = Path(out or "") / STATE_NAME
    if out is None or not path.is_file():
        raise ValueError(f"`resume` needs a checkpoint, {path} does not exist: pass the `out` of the first run.")
    state = torch.load(path, map_location=device, weights_only=True)
    now = {**{name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}, **run}
    # What the run had no option for was as it is by default.
    defaults = {option.name: option.default for option in dataclasses.fields(TrainingConfig)}
    then = {**defaults, **state["config"], **{name: state[name] for name in run}}
    for name, value in now.items():
        if name == "prompts" and not then[name]:
            continue  # saved before the first update
        if then.get(name) != value:
            raise ValueError(
                f"`{name}` must be that of the run to resume, {then.get(name)!r}, got {value!r}: pass the same, or "
                "start anew in another folder."
            )
    return state
