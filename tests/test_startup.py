"""What is refused before an engine starts, and what merely having the package installed does."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import ENGINE
from support.models import HIDDEN, Tiny

from vllm_twist import SUPPORTED_VLLM, TwistHead, TwistHeadConfig


def start(tiny: Tiny, **options: Any) -> Any:
    from vllm import LLM

    return LLM(str(tiny.path), **{**ENGINE, "twist_head": str(tiny.head_path), **options})


def head_of(folder: Path, **changes: Any) -> str:
    config = {"head_type": "linear", "hidden_size": HIDDEN, "vocab_size": 4, **changes}
    TwistHead.create(TwistHeadConfig(**config)).save_pretrained(folder)
    return str(folder)


REFUSED = [
    ({"twist_particles": 0}, r"`twist_particles` must be at least 1, got 0"),
    ({"twist_particles": 65}, r"`twist_particles` must be at most `max_num_seqs`=64, got 65"),
    ({"twist_resampling": "sytematic"}, r"did you mean 'systematic'"),
    ({"twist_ess_treshold": 0.5}, r"unknown option `twist_ess_treshold` \(did you mean 'twist_ess_threshold'\?\)"),
    ({"twist_head": None, "twist_scale": 2.0}, r"`twist_head` is missing"),
    ({"twist_head": "no/such/folder/here"}, r"`twist_head` 'no/such/folder/here' is neither a local folder nor a hub"),
    ({"twist_head": "nobody/no-such-head"}, r"`twist_head` 'nobody/no-such-head' is neither a local folder nor a hub"),
    ({"scheduler_cls": "x.Y"}, r"`scheduler_cls` cannot be combined with `twist_head`"),
    ({"worker_cls": "x.Y"}, r"`worker_cls` cannot be combined with `twist_head`"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, r"`speculative_config` cannot be"),
    ({"spec_method": "ngram", "spec_tokens": 2}, r"`speculative_config` cannot be combined .* got 'ngram'"),
    ({"kv_offloading_size": 0.1}, r"`kv_transfer_config` cannot be combined .*: drop it, and `kv_offloading_size`"),
    ({"enable_lora": True}, r"`enable_lora` cannot be combined"),
    ({"max_num_active_seqs": 8}, r"`twist_particles` must be at most `max_num_active_seqs`=8, got 16: lower it"),
    ({"pipeline_parallel_size": 2}, r"`pipeline_parallel_size` must be 1 with `twist_head`, got 2"),
    ({"runner": "pooling"}, r"`twist_head` needs a generating model"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refused_at_start_up(small: Tiny, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        start(small, **options)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("parallel_config", "enable_batch_sharded_sampling", True),
        ("model_config", "return_sampling_mask", True),
        ("cache_config", "kv_sharing_fast_prefill", True),
    ],
)
def test_unsupported_by_the_device_path(small: Tiny, part: str, name: str, value: Any):
    """What vLLM allows on a GPU only, and forks would not follow."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_twist import TwistConfig
    from vllm_twist.engine.plugin import configure

    config = EngineArgs(str(small.path), **ENGINE).create_engine_config()
    setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=rf"`{name}` cannot be combined with `twist_head`, got {value}: drop it"):
        configure(config, TwistConfig.from_options({"twist_head": str(small.head_path)}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 32}, r"its hidden_size is 32, the model's is 64"),
        ({"vocab_size": 7}, r"its vocab_size is 7, the model's is 4"),
    ],
)
def test_head_that_does_not_fit(small: Tiny, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        start(small, twist_head=head_of(tmp_path, **changes))


def test_malformed_head(small: Tiny, tmp_path: Path):
    head = head_of(tmp_path)
    (tmp_path / "twist_config.json").write_text(json.dumps({"head_type": "linear", "hidden_size": 64}))
    with pytest.raises(ValueError, match=r"twist_config.json.*lacks vocab_size"):
        start(small, twist_head=head)


def test_quantised_head(small: Tiny, tmp_path: Path):
    """The weights are read before any engine process starts, so that the error is seen."""
    from safetensors.torch import load_file, save_file

    head = head_of(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"has dtype torch.int8, expected a floating-point one"):
        start(small, twist_head=head)


def test_sliding_window_model_is_refused(tmp_path: Path):
    """Block tables of other kinds than full attention are not forked."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=4, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=32, max_position_embeddings=256, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    head = head_of(tmp_path / "head")
    from vllm import LLM

    with pytest.raises(ValueError, match=r"one KV cache group of full attention, this one has 1 \(SlidingWindowSpec\)"):
        LLM(str(tmp_path / "model"), twist_head=head, **ENGINE)


@pytest.mark.parametrize(
    "name, value, options, message",
    [
        ("VLLM_USE_RUST_FRONTEND", True, {}, r"`VLLM_USE_RUST_FRONTEND` must be 0 with `twist_head`, got 1: unset it"),
        ("VLLM_USE_V2_MODEL_RUNNER", True, {}, r"`VLLM_USE_V2_MODEL_RUNNER`=1 .* needs Triton, but Triton has no back"),
    ],
)
def test_environment_is_refused(small, monkeypatch, name: str, value: Any, options: dict[str, Any], message: str):
    """Variables that would lead around the plugin, or to a crash later."""
    from vllm import envs, triton_utils

    monkeypatch.setattr(triton_utils, "HAS_TRITON", False)
    monkeypatch.setattr(envs, name, value, raising=False)
    with pytest.raises(ValueError, match=message):
        start(small, **options)


def test_old_ray_executor_is_refused(small: Tiny, monkeypatch: pytest.MonkeyPatch):
    """It calls the model runner where the new one calls the worker."""
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    from vllm_twist import TwistConfig
    from vllm_twist.engine.plugin import configure

    config = EngineArgs(str(small.path), **ENGINE).create_engine_config()
    config.parallel_config.distributed_executor_backend = "ray"
    monkeypatch.setattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False, raising=False)
    with pytest.raises(ValueError, match=r"`VLLM_USE_RAY_V2_EXECUTOR_BACKEND` must be 1 with `twist_head`, got 0: uns"):
        configure(config, TwistConfig.from_options({"twist_head": str(small.head_path)}))


def test_particles_beyond_the_kernels(small: Tiny, monkeypatch: pytest.MonkeyPatch):
    """Model Runner V2 resamples at most so many lanes in one program; V1 has no limit."""
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    from vllm_twist import TwistConfig
    from vllm_twist.engine.plugin import configure
    from vllm_twist.kernels.ops import MAX_LANES

    options = {**ENGINE, "max_num_seqs": 2 * MAX_LANES, "max_num_batched_tokens": 4 * MAX_LANES}
    settings = {"twist_head": str(small.head_path), "twist_particles": MAX_LANES + 1}
    config = EngineArgs(str(small.path), **options).create_engine_config()
    for v2 in (False, True):
        monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", v2, raising=False)
        if not v2:
            configure(config, TwistConfig.from_options(settings))
            config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
            continue
        message = rf"`twist_particles` must be at most {MAX_LANES} under Model Runner V2, got {MAX_LANES + 1}: lower it"
        with pytest.raises(ValueError, match=message):
            configure(config, TwistConfig.from_options(settings))


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0+cpu", "0.34.0rc1"])
def test_unsupported_vllm(small: Tiny, monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=re.escape(f"needs vLLM {SUPPORTED_VLLM}, got {version}: install")):
        start(small)


def settings_of(args: Any) -> Any:
    from vllm_twist import TwistConfig

    return TwistConfig.from_dict(args.additional_config["twist"])


def test_settings_survive_every_copy(small: Tiny):
    """They lie in a field of vLLM's own, which is what copies of the arguments carry."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    for kind in (EngineArgs, AsyncEngineArgs):
        mine = {"mine": 1}
        args = kind(str(small.path), twist_head="x", twist_particles=4, additional_config=mine)
        settings = settings_of(args)
        assert (settings.head, settings.defaults.particles) == ("x", 4)
        assert mine == {"mine": 1} and args.additional_config["mine"] == 1
        assert set(vars(args)) == {field.name for field in dataclasses.fields(args)}
        for copied in (
            kind(**vars(args)), dataclasses.replace(args), copy.copy(args), copy.deepcopy(args),
            pickle.loads(pickle.dumps(args)), AsyncEngineArgs(**vars(args)),
            kind(str(small.path), additional_config=dataclasses.asdict(args)["additional_config"]),
        ):  # fmt: skip
            assert settings_of(copied) == settings
        changed = settings_of(dataclasses.replace(args, twist_scale=2.0, twist_particles=None))
        assert (changed.head, changed.defaults.particles, changed.defaults.scale) == ("x", 4, 2.0)
        assert settings_of(args) == settings
        assert dataclasses.replace(args, additional_config={}).additional_config == {}


def test_settings_by_hand_are_checked(small: Tiny):
    with pytest.raises(ValueError, match=r"`additional_config` must hold what `TwistConfig.to_dict` returns .*colour"):
        start(small, twist_head=None, additional_config={"twist": {"head": "x", "colour": 1}})


@pytest.mark.parametrize("twist", [False, True], ids=["plain", "twisted"])
def test_engine_from_arguments(small: Tiny, twist: bool):
    """As ``vllm bench`` does, which goes by ``vars()``."""
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    options = {"twist_head": str(small.head_path), "twist_particles": 2} if twist else {}
    llm = LLM.from_engine_args(EngineArgs(str(small.path), **ENGINE, **options))
    params = SamplingParams(max_tokens=2, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [2, 3]}], params, use_tqdm=False)
    assert list(output.kv_transfer_params or ()) == (["twist"] if twist else [])


def test_every_command_takes_the_options(small: Tiny, monkeypatch: pytest.MonkeyPatch):
    """Those that start an engine take them from their command line, and start a plain one without."""
    import importlib

    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setattr(sys, "argv", ["vllm", "bench"])  # else vLLM leaves out the benchmarks
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(dest="subparser")
    modules = "openai serve launch benchmark.main collect_env download_kernels preload run_batch snapshot"
    for name in modules.split():
        for command in importlib.import_module(f"vllm.entrypoints.cli.{name}").cmd_init():
            command.subparser_init(subparsers)
    model = ["--model", str(small.path)]
    commands = {
        "serve": [], "bench latency": model, "bench throughput": model, "bench startup": model, "preload": model,
        "bench mm-processor": model, "launch render": model, "run-batch": [*model, "-i", "x", "-o", "y"],
    }  # fmt: skip
    flags = ["--twist-head", "x", "--twist-particles", "3", "--no-twist-return-particles"]

    def parse(kind: type, *words: str) -> Any:
        options = parser.parse_args(words)
        options.model = str(small.path)  # `serve` takes it from its positional argument
        return kind.from_cli_args(options)

    for command, required in commands.items():
        for kind in (EngineArgs, AsyncEngineArgs):
            assert parse(kind, *command.split(), *required).additional_config == {}
            args = parse(kind, *command.split(), *required, *flags)
            assert (settings_of(args).head, settings_of(args).defaults.particles) == ("x", 3)
            assert settings_of(kind(**vars(args))) == settings_of(args)


def test_vllm_that_has_moved(small: Tiny, monkeypatch: pytest.MonkeyPatch):
    """All patches or none, one warning, no exception; whoever asks for a twist is told why there is none."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    from vllm_twist.engine import compat, plugin

    for owner, name in ((EngineArgs, "__init__"), (AsyncEngineArgs, "__init__"), (EngineArgs, "create_engine_config")):
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    untouched = EngineArgs.create_engine_config
    monkeypatch.delattr(EngineArgs, "from_cli_args")
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.twist"), "warning", lambda text, *args: said.append(text % args))
    compat.give_up.cache_clear()
    plugin.register()
    plugin.register()
    (warning,) = said
    assert f"has no EngineArgs.from_cli_args; vllm-twist supports {SUPPORTED_VLLM}" in warning
    assert EngineArgs.create_engine_config is untouched
    assert EngineArgs(str(small.path)).additional_config == {}
    for kind in (EngineArgs, AsyncEngineArgs):
        message = rf"`twist_head` needs vLLM {SUPPORTED_VLLM}, got 0.3.*could not be activated \(RuntimeError: vLLM"
        with pytest.raises(ValueError, match=message):
            kind(str(small.path), twist_head="x")


def test_speculator_is_refused(small: Tiny, tmp_path: Path):
    """A checkpoint that brings its own speculative decoding, with no option that says so."""
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "speculators_model_type": "eagle3",
        "speculators_version": "0.1", "draft_vocab_size": 4, "norm_before_residual": True,
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 2, "verifier_accept_k": 1}],
            "verifier": {"name_or_path": str(small.path), "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": json.loads((small.path / "config.json").read_text()),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    from vllm import LLM

    with pytest.raises(ValueError, match=r"`speculative_config` cannot be combined .*: drop it; where the model is a"):
        LLM(str(tmp_path), twist_head=str(small.head_path), **ENGINE)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.2rc1"])
def test_supported_vllm(monkeypatch: pytest.MonkeyPatch, version: str):
    from vllm_twist.engine.compat import check_vllm_version

    monkeypatch.setattr(metadata, "version", lambda name: version)
    check_vllm_version()


SAMPLE = """
import os, json, sys
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
{preamble}
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256,
          kv_cache_memory_bytes=2**26, seed=0, **json.loads(sys.argv[2]))
params = [SamplingParams(max_tokens=24, seed=s, logprobs=4, detokenize=False) for s in range(3)]
outs = llm.generate([{{"prompt_token_ids": [2, 9, 4]}}] * 3, params, use_tqdm=False)
logprobs = [[[(t, l.logprob) for t, l in e.items()] for e in o.outputs[0].logprobs] for o in outs]
keys = [sorted(o.kv_transfer_params or {{}}) for o in outs]
print("RESULT", json.dumps([[o.outputs[0].token_ids, *rest] for o, *rest in zip(outs, logprobs, keys)]))
"""


def sample(tiny: Tiny, preamble: str = "", plugins: str | None = None, **options: Any) -> str:
    env = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    script = SAMPLE.format(preamble=preamble)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny.path), json.dumps(options)],
        capture_output=True, text=True, env=env, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))


def test_installed_but_unused_changes_nothing(wide: Tiny):
    """An engine without a head is bitwise what vLLM gives with no plugin loaded at all."""
    assert sample(wide) == sample(wide, plugins="")


@pytest.mark.parametrize(
    "preamble",
    [
        "",
        "import vllm_twist",
        "import vllm.entrypoints.llm, vllm_twist",
        # Where vLLM looks for its platform, and loads the plugin, in the middle of this import.
        "from vllm.engine.arg_utils import EngineArgs; EngineArgs(sys.argv[1], twist_head='x')",
    ],
)
def test_keyword_is_known_without_and_with_an_import(wide: Tiny, preamble: str):
    """LLM(..., twist_head=...) works whether vllm_twist is imported never, before or after vllm."""
    result = sample(wide, preamble=preamble, twist_head=str(wide.head_path), twist_particles=2)
    assert json.loads(result.removeprefix("RESULT "))[0][2] == ["twist"]


def test_model_and_its_graphs_are_vllms_own(small: Tiny):
    """Beside scheduler, worker, processor and V1's scheduling, a twisted engine is configured as a plain one is.

    So what is compiled and captured in graphs is the model as vLLM runs it: the head and the step come after.
    """
    from vllm.engine.arg_utils import EngineArgs

    options = {**ENGINE, "enforce_eager": False}
    plain, twisted = (
        EngineArgs(model=str(small.path), **options, **twist).create_engine_config()
        for twist in ({}, {"twist_head": str(small.head_path)})
    )
    assert twisted.compilation_config == plain.compilation_config
    changed = {
        (part, name)
        for part in ("model_config", "parallel_config", "scheduler_config", "cache_config")
        for name, value in vars(getattr(plain, part)).items()
        if getattr(getattr(twisted, part), name) != value
    }
    ours = {("model_config", "logits_processors"), ("parallel_config", "worker_cls")}
    ours |= {("scheduler_config", "scheduler_cls"), ("scheduler_config", "async_scheduling")}
    # Of no effect but for models that mix full and sliding-window attention.
    ours |= {("scheduler_config", "disable_hybrid_kv_cache_manager")}
    assert changed <= ours, changed
