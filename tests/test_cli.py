"""The command, as a user types it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_twist import TwistHead
from vllm_twist.cli import main
from vllm_twist.training import TrainingConfig


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("I bought this\n\nThe battery\n")
    return path


def flags(repo_root: Path, prompt_file: Path, out: Path, **changes: str) -> list[str]:
    options = {
        "model": str(repo_root / "models/tiny-reviews"),
        "potential": str(repo_root / "models/tiny-reviews-positive"),
        "prompts": str(prompt_file),
        "out": str(out),
        "head": "low_rank",
        "rank": "8",
        "max-tokens": "8",
        "particles": "8",
        "updates": "2",
        "sampler": "transformers",
        **changes,
    }
    return ["train", *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_train_writes_a_head_and_goes_on(repo_root: Path, tmp_path: Path, prompts: Path, capsys):
    out = tmp_path / "head"
    assert main(flags(repo_root, prompts, out)) == 0
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("ctl: 100%", "loss=", "ess=", "kl=", "tokens per s="))
    head = TwistHead.from_pretrained(out)
    assert head.config.head_type == "low_rank" and head.config.rank == 8 and head.config.vocab_size == 2048
    assert main([*flags(repo_root, prompts, out, updates="3"), "--resume"]) == 0
    again = TwistHead.from_pretrained(out)
    assert not all(a.equal(b) for a, b in zip(again.parameters(), head.parameters(), strict=True))


def test_train_with_the_engine_in_its_own_process(repo_root: Path, tmp_path: Path, prompts: Path):
    """As installed: the engine runs beside the trainer, and the head's weights travel through its serialisation."""
    out = tmp_path / "head"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", None)
    command = Path(sys.executable).parent / "vllm-twist"
    done = subprocess.run(
        [command, *flags(repo_root, prompts, out, sampler="vllm")],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The engine samples from other random numbers, so its run leaves another head.
    ours, other = TwistHead.from_pretrained(out), tmp_path / "other"
    assert main(flags(repo_root, prompts, other)) == 0
    assert not TwistHead.from_pretrained(other).bias.equal(ours.bias)


def test_every_option_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in dataclasses.fields(TrainingConfig):
        assert f"--{option.name.replace('_', '-')}" in shown
        assert f"(default: {option.default})" in shown


def test_help_imports_no_command(capsys):
    """The list of commands is shown without the time that torch takes."""
    code = "import sys; from vllm_twist import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'vllm_twist.training' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900)
    assert "train" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "ctrl"},
            "`objective` must be one of ctl, rl, pcl, sixo, fudge, dpg, got 'ctrl' (did you mean 'ctl'",
        ),
        ({"objective": "dpg"}, "Set `proposal_only`"),
        ({"prompts": "/no/such/file"}, "`--prompts` /no/such/file cannot be read"),
        ({"potential": "nothing.py:log_phi"}, "nothing.py"),
        ({"model": "/no/such/model"}, "`model` '/no/such/model' is no causal language model"),
        ({"particles": "1"}, "`particles` must be at least 2, got 1"),
    ],
)
def test_errors_say_what_to_do(repo_root: Path, tmp_path: Path, prompts: Path, capsys, changes, message: str):
    assert main(flags(repo_root, prompts, tmp_path / "head", **changes)) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # loading the model shows a bar of its own
    assert last.startswith("vllm-twist train: error: ") and message in last


def test_unknown_commands_and_flags(capsys):
    for arguments in (["tarin"], ["train", "--objektive", "ctl"], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
