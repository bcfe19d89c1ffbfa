"""The command, as a user types it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_twist import TwistHead
from vllm_twist.cli import main
from vllm_twist.cli import train as cli_train
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


def test_flags_have_the_names_of_other_trainers(repo_root: Path, tmp_path: Path, prompts: Path, monkeypatch):
    """``--output-dir``, ``--learning-rate`` and ``--model-revision`` are ``--out``, ``--lr`` and ``--revision``."""
    seen: list[Any] = []
    monkeypatch.setattr(cli_train, "TwistTrainer", lambda *args, **options: seen.append(args) or contextlib.nullcontext(
        SimpleNamespace(train=lambda prompts, out, **options: seen.append(out))
    ))  # fmt: skip
    arguments = ["train", "--model", "m", "--potential", "p", "--prompts", str(prompts)]
    for names in (("--output-dir", "--learning-rate", "--model-revision"), ("--out", "--lr", "--revision")):
        out, lr, revision = names
        assert main([*arguments, out, str(tmp_path), lr, "0.5", revision, "v1"]) == 0
    assert seen[:2] == seen[2:] and seen[1] == tmp_path
    assert (seen[0][2].lr, seen[0][2].revision) == (0.5, "v1")


def test_help_imports_no_command(capsys):
    """The list of commands is shown without the time that torch takes."""
    code = "import sys; from vllm_twist import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'vllm_twist.training' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900)
    assert "train" in done.stdout


class Started(Exception):
    """An engine would start now."""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return what our code loads from now on, by name of the loader, with its keywords; an engine does not start."""
    import transformers
    import vllm

    seen: list[tuple[str, dict[str, Any]]] = []

    def spy(kind: Any) -> Any:
        original = kind.from_pretrained

        def load(name: Any, *args: Any, **options: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("vllm_twist"):
                seen.append((kind.__name__, options))
            return original(name, *args, **options)

        return load

    def start(model: str, **options: Any) -> None:
        seen.append(("LLM", options))
        raise Started

    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", spy(kind))
    monkeypatch.setattr(vllm, "LLM", start)
    return seen


@pytest.mark.parametrize(
    ("command", "changes", "expected"),
    [
        ("train", {"sampler": "transformers", "updates": "1"}, ["AutoTokenizer", "AutoModelForCausalLM"]),
        ("train", {"sampler": "vllm"}, ["AutoTokenizer", "AutoModelForCausalLM", "AutoConfig", "LLM"]),
        ("eval", {}, ["AutoModelForCausalLM", "AutoTokenizer", "LLM"]),
        ("eval", {"potential": "", "condition-tokens": "2"}, ["AutoModelForCausalLM", "LLM"]),
        ("trace", {}, ["LLM"]),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_every_loader_gets_the_base_models_options(
    repo_root: Path, tmp_path: Path, prompts: Path, loads, command: str, changes, expected: list[str], given: bool
):
    """Model, tokenizer, config and engine: code of the model's own, revision and dtype, or the defaults of each."""
    potential = tmp_path / "potential.json"
    potential.write_text(json.dumps({"type": "continuation", "text": " I returned it."}))
    model, head = str(repo_root / "models/tiny-reviews"), str(repo_root / "models/tiny-reviews-positive")
    of_command = {
        "train": {"potential": str(potential), "prompts": str(prompts), "out": str(tmp_path / "out"), "particles": "4"},
        "eval": {"potential": str(potential), "prompts": str(prompts), "twist-head": head},
        "trace": {"prompt": "I bought", "plot": str(tmp_path / "x.png"), "twist-head": head},
    }
    options = {"model": model, **of_command[command], **changes}
    arguments = [part for name, value in options.items() if value for part in (f"--{name}", value)]
    if given:
        arguments += ["--trust-remote-code", "--revision", "v1.2", "--dtype", "bfloat16"]
    with pytest.raises(Started) if "LLM" in expected else contextlib.nullcontext():
        assert main([command, *arguments]) == 0
    assert [name for name, _ in loads] == expected
    for name, found in loads:
        assert (found["trust_remote_code"], found["revision"]) == ((True, "v1.2") if given else (False, None)), name
        if name in ("AutoModelForCausalLM", "LLM"):
            assert found["dtype"] == ("bfloat16" if given else "float32" if command == "train" else "auto"), name
    if command == "train" and not loads[-1][0] == "LLM":
        state = torch.load(tmp_path / "out/training_state.pt", weights_only=True)["config"]
        assert (state["revision"], state["trust_remote_code"]) == (("v1.2", True) if given else (None, False))


def test_prompts_of_every_command_are_read_alike(
    repo_root: Path, tmp_path: Path, prompts: Path, monkeypatch, capsys
):
    """JSON lines are prompts and not text; what looks like JSON but is none ends every command alike."""
    seen: list[Any] = []
    monkeypatch.setattr(cli_train.TwistTrainer, "train", lambda self, prompts, *args, **options: seen.append(prompts))
    prompts.write_text('{"prompt": "I bought"}\n{"messages": [{"role": "user", "content": "A lamp?"}]}\n')
    assert main(flags(repo_root, prompts, tmp_path / "out")) == 0
    assert seen == [["I bought", [{"role": "user", "content": "A lamp?"}]]]
    prompts.write_text('{"promt": "I bought"}\n')
    head = str(repo_root / "models/tiny-reviews-positive")
    evaluate = ["eval", "--model", "m", "--twist-head", head, "--potential", head, "--prompts", str(prompts)]
    trace = ["trace", "--model", "m", "--twist-head", head, "--plot", "x.png", "--prompt", prompts.read_text()]
    for arguments in (flags(repo_root, prompts, tmp_path / "out"), evaluate, trace):
        assert main(arguments) == 2
        assert "must have one key, `prompt` or `messages`, got `promt` (did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": " "}, "`revision` must be a branch, tag or commit, got ' '"),
        ({"dtype": "float8"}, "`dtype` must be one of auto, float32, bfloat16, float16, got 'float8'"),
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
