"""Twist heads: what they compute, and what loading refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_twist.twist import CONFIG_NAME, WEIGHTS_NAME, TwistHead, TwistHeadConfig, check_fits, load_config

H, V, R = 6, 11, 3
CONFIGS = {
    kind: TwistHeadConfig(kind, H, V, R if TwistHead.kinds[kind].uses_rank else None)
    for kind in ("linear", "mlp", "low_rank", "tied")
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)
CONDITIONAL = ("linear", "mlp", "low_rank")
conditional_kinds = pytest.mark.parametrize("kind", CONDITIONAL)
HIDDEN = torch.randn(5, H, generator=torch.Generator().manual_seed(0))
EMBEDDING = torch.randn(V, H, generator=torch.Generator().manual_seed(1))
CONDITION = torch.randn(5, H, generator=torch.Generator().manual_seed(2))


def lm_head(hidden: Tensor) -> Tensor:
    return hidden @ EMBEDDING.to(hidden.dtype).T


def trained(kind: str, **changes: Any) -> TwistHead:
    """Return a head with no parameter left at zero."""
    head = TwistHead.create(replace(CONFIGS[kind], **changes), seed=3)
    with torch.no_grad():
        for i, parameter in enumerate(head.parameters()):
            parameter += 0.1 * torch.cos(torch.arange(parameter.numel()) + i).reshape(parameter.shape)
    return head


def test_every_kind_is_tested() -> None:
    assert set(CONFIGS) == set(TwistHead.kinds)


# What heads compute.


def expected(kind: str, p: dict[str, Tensor], inputs: Tensor = HIDDEN) -> Tensor:
    """The formulas of the docstrings, written out once more."""
    if kind == "linear":
        return inputs @ p["weight"].T + p["bias"]
    if kind == "low_rank":
        return inputs @ (p["up"] @ p["down"]).T + p["bias"]
    if kind == "tied":
        inner = (inputs @ p["down"].T + p["down_bias"]).clamp(min=0)
        return inner @ p["up"].T @ EMBEDDING.T
    h = inputs
    for i in range(3):
        h = h.clamp(min=0) if i else h
        h = h @ p[f"layers.{i}.weight"].T + p[f"layers.{i}.bias"]
    return h


@every_kind
def test_formula(kind: str) -> None:
    head = trained(kind)
    got = head(HIDDEN, lm_head)
    assert got.shape == (5, V)
    torch.testing.assert_close(got, expected(kind, dict(head.named_parameters())), rtol=1e-5, atol=1e-6)


@every_kind
def test_log_sigmoid(kind: str) -> None:
    """psi is a probability: the same output, squashed, and no underflow where it is all but impossible."""
    plain, head = trained(kind), trained(kind, activation="log_sigmoid")
    output = plain(HIDDEN, lm_head)
    torch.testing.assert_close(head(HIDDEN, lm_head), output - torch.nn.functional.softplus(output))
    assert (head(HIDDEN, lm_head) < 0).all() and torch.equal(head.logit(HIDDEN, lm_head), output)
    assert torch.equal(plain.logit(HIDDEN, lm_head), output)
    assert head.activate(torch.tensor([-200.0, 0.0])).tolist() == [-200, pytest.approx(-0.6931472)]


@conditional_kinds
@pytest.mark.parametrize("activation", ["identity", "log_sigmoid"])
def test_conditional(kind: str, activation: str) -> None:
    """The condition stands behind the prefix; each row has its own, or all share one."""
    head = trained(kind, conditional=True, activation=activation)
    both = torch.cat([HIDDEN, CONDITION], 1)
    logit = expected(kind, dict(head.named_parameters()), both)
    torch.testing.assert_close(head.logit(HIDDEN, None, CONDITION), logit, rtol=1e-5, atol=1e-6)
    log_psi = head(HIDDEN, None, CONDITION)
    assert torch.equal(log_psi, head.activate(head.logit(HIDDEN, None, CONDITION)))
    shared = torch.stack([head(HIDDEN, lm_head, condition)[0] for condition in CONDITION])
    torch.testing.assert_close(shared, torch.stack([head(HIDDEN[:1], None, c[None])[0] for c in CONDITION]))
    torch.testing.assert_close(shared[0], log_psi[0])
    # Both parts matter, and neither stands in for the other.
    for hidden, condition in ((CONDITION, HIDDEN), (HIDDEN, CONDITION.flip(0)), (HIDDEN.flip(0), CONDITION)):
        assert not torch.allclose(head(hidden, None, condition), log_psi, atol=1e-3)


def test_condition_where_it_does_not_belong() -> None:
    conditional = trained("mlp", conditional=True)
    with pytest.raises(ValueError, match="`condition` is missing: the twist head is conditional, pass the hidden"):
        conditional(HIDDEN)
    with pytest.raises(ValueError, match=r"`condition` must have shape \[5, 6\] or \[6\], got \[4, 6\]: pass one"):
        conditional(HIDDEN, None, CONDITION[:4])
    for kind in CONFIGS:
        with pytest.raises(ValueError, match="`condition` must be None for a twist head that is not conditional: drop"):
            trained(kind)(HIDDEN, lm_head, CONDITION)


@every_kind
def test_fresh_head_is_nearly_no_twist(kind: str) -> None:
    """Zero biases and Glorot weights, the same for the same seed, whatever the global generator did before."""
    torch.rand(7)
    first, second = TwistHead.create(CONFIGS[kind], seed=5), TwistHead.create(CONFIGS[kind], seed=5)
    other = TwistHead.create(CONFIGS[kind], seed=6)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        if a.ndim == 1:
            assert not a.any()
        else:
            bound = 5 * (2 / sum(a.shape)) ** 0.5  # five standard deviations, at most 66 numbers, fixed seed
            assert 0 < a.abs().max() < bound and not torch.equal(a, other.state_dict()[name])
    zero = torch.zeros(1, H)
    assert not first(zero, lm_head).any()


def test_tied_head_needs_the_lm_head() -> None:
    with pytest.raises(ValueError, match="`lm_head` is missing: a tied head is read out through .* pass it"):
        trained("tied")(HIDDEN)


# Configs.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linar", H, V), r"`head_type` must be one of linear, mlp, low_rank, tied, got 'linar' \(did you mean 'lin"),
        (("qqq", H, V), f"`head_type` must be one of .* got 'qqq': set it in {CONFIG_NAME}"),
        ((["linear"], H, V), "`head_type` must be one of"),
        (("linear", 0, V), "`hidden_size` of a linear head must be a positive integer, got 0: set it in"),
        (("mlp", H, "11"), "`vocab_size` of a mlp head must be a positive integer, got '11'"),
        (("mlp", 6.0, V), "`hidden_size` of a mlp head must be a positive integer, got 6.0"),
        (("mlp", True, V), "`hidden_size` of a mlp head must be a positive integer, got True"),
        (("low_rank", H, V), "`rank` of a low_rank head must be a positive integer, got None"),
        (("tied", H, V, -1), "`rank` of a tied head must be a positive integer, got -1"),
        (("linear", H, V, 0), "`rank` of a linear head must be a positive integer, got 0"),
        (("linear", H, V, None, "logsigmoid"), r"`activation` must be one of identity, log_sigmoid, got .* \(did you"),
        (("linear", H, V, None, None), f"`activation` must be one of .* got None: set it in {CONFIG_NAME}"),
        (("linear", H, V, None, ["relu"]), r"`activation` must be one of .* got \['relu'\]"),
        (("linear", H, V, None, "identity", "yes"), "`conditional` must be true or false, got 'yes': set it"),
        (("linear", H, V, None, "identity", 1), "`conditional` must be true or false, got 1"),
        (("tied", H, V, R, "identity", True), "`conditional` is not supported by a tied head, .*: use linear, mlp"),
    ],
)
def test_config_is_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwistHeadConfig(*arguments)


def test_fits() -> None:
    """Both numbers are in the message: which of the two is wrong is the user's question."""
    head = trained("mlp")
    head.check_fits(H, V)
    with pytest.raises(ValueError, match="does not fit the model: its hidden_size is 6, the model's is 64: use a head"):
        head.check_fits(64, V)
    with pytest.raises(ValueError, match="does not fit the model: its vocab_size is 11, the model's is 99"):
        check_fits(head.config, H, 99)


# Saving and loading.


@pytest.mark.parametrize("activation", ["identity", "log_sigmoid"])
@pytest.mark.parametrize(("kind", "conditional"), [(k, False) for k in CONFIGS] + [(k, True) for k in CONDITIONAL])
def test_round_trip(kind: str, conditional: bool, activation: str, tmp_path: Path) -> None:
    """Same outputs to the bit, and the same bytes when saved again; folders are made as needed."""
    head = trained(kind, conditional=conditional, activation=activation)
    inputs = (HIDDEN, lm_head, CONDITION if conditional else None)
    head.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    # Only what differs from the defaults, so that older readers take the heads they can serve.
    written = set(json.loads((tmp_path / "a" / "b" / CONFIG_NAME).read_text()))
    optional = {"rank": head.uses_rank, "activation": activation != "identity", "conditional": conditional}
    assert written == {"head_type", "hidden_size", "vocab_size", *(name for name, there in optional.items() if there)}
    again = TwistHead.from_pretrained(tmp_path / "a" / "b")
    assert type(again) is type(head) and again.config == head.config == load_config(str(tmp_path / "a" / "b"))
    assert torch.equal(again(*inputs), head(*inputs))
    again.save_pretrained(tmp_path / "c")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_another_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    head = trained(kind)
    head.save_pretrained(tmp_path)
    got = TwistHead.from_pretrained(tmp_path, dtype)
    assert {p.dtype for p in got.parameters()} == {dtype}
    assert torch.equal(got(HIDDEN.to(dtype), lm_head), head.to(dtype)(HIDDEN.to(dtype), lm_head))
    # A head that was saved in half precision comes back in float32 where nothing else is asked for.
    got.save_pretrained(tmp_path / "half")
    assert {p.dtype for p in TwistHead.from_pretrained(tmp_path / "half").parameters()} == {torch.float32}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained("linear").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of the saved config; None removes one."""
    config = {**json.loads((folder / CONFIG_NAME).read_text()), **changes}
    (folder / CONFIG_NAME).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"`twist_head` '{saved}' has no {name}: pass a folder written by"):
        TwistHead.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"head_type": ', rf"`twist_head` '.*': {CONFIG_NAME} is not valid JSON \(Expecting value.*\): save the"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", r"is not valid JSON \('utf-8' codec"),
        (b"[1, 2]", f"{CONFIG_NAME} must hold an object, got list: save the head anew"),
        (b"null", "must hold an object, got NoneType"),
        (b"{}", f"{CONFIG_NAME} lacks head_type, hidden_size, vocab_size: add it"),
    ],
)
def test_malformed_config(saved: Path, text: bytes, message: str) -> None:
    (saved / CONFIG_NAME).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        TwistHead.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_sizes": 11}, r"unknown key 'vocab_sizes' \(did you mean 'vocab_size'\?\): the known ones are"),
        ({"qqq": 1}, "has an unknown key 'qqq': the known ones are head_type, hidden_size, vocab_size, rank, activ"),
        ({"vocab_size": None}, f"{CONFIG_NAME} lacks vocab_size: add it"),
        ({"head_type": "gpt"}, "`head_type` must be one of linear, mlp, low_rank, tied, got 'gpt'"),
        ({"hidden_size": "6"}, "`hidden_size` of a linear head must be a positive integer, got '6'"),
        # The config and the weights contradict each other: in size, or in kind.
        ({"conditional": True}, rf"{WEIGHTS_NAME} holds .*\(11, 6\).* calls for .*\(11, 12\).*: make the two agree"),
        ({"vocab_size": 12}, rf"{WEIGHTS_NAME} holds .*\(11, 6\).* calls for .*\(12, 6\).*: make the two agree"),
        ({"head_type": "mlp"}, rf"{WEIGHTS_NAME} holds .*'weight'.* calls for .*'layers.0.weight'.*make the two agree"),
    ],
)
def test_wrong_config(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=message):
        TwistHead.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\x80\x02}q\x00."])
def test_malformed_weights(saved: Path, content: bytes) -> None:
    (saved / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"`twist_head` '{saved}': {WEIGHTS_NAME} is malformed \(.*\): save it anew"):
        TwistHead.from_pretrained(saved)


def test_truncated_weights(saved: Path) -> None:
    """A download that stopped half way."""
    whole = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} is malformed"):
        TwistHead.from_pretrained(saved)


def change_tensor(folder: Path, name: str, tensor: Tensor | None) -> None:
    state = load_file(folder / WEIGHTS_NAME)
    state.pop(name, None)
    save_file(state if tensor is None else {**state, name: tensor}, folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bias", None, rf"{WEIGHTS_NAME} holds {{'weight': \(11, 6\)}}, but its {CONFIG_NAME} calls for"),
        ("scale", torch.ones(1), r"holds .*'scale': \(1,\)"),
        ("weight", torch.ones(H, V), r"holds .*'weight': \(6, 11\).* calls for .*'weight': \(11, 6\)"),
        ("weight", torch.ones(V, H, dtype=torch.int8), "tensor weight has dtype torch.int8, expected a floating-point"),
        ("bias", torch.full((V,), float("nan")), "tensor bias is not finite in torch.float32: train it again"),
        ("bias", torch.full((V,), float("-inf")), "tensor bias is not finite in torch.float32"),
        # Finite as saved, infinite in the float32 that the head computes in.
        ("bias", torch.full((V,), 1e300, dtype=torch.float64), "tensor bias is not finite in torch.float32"),
    ],
)
def test_wrong_tensors(saved: Path, name: str, tensor: Tensor | None, message: str) -> None:
    change_tensor(saved, name, tensor)
    with pytest.raises(ValueError, match=message):
        TwistHead.from_pretrained(saved)


def test_values_beyond_the_range_of_the_dtype(saved: Path) -> None:
    """70,000 is finite in float32 and bfloat16 but not in float16: an infinite twist would make every weight NaN."""
    change_tensor(saved, "bias", torch.full((V,), 7e4))
    for dtype in (None, torch.float32, torch.bfloat16):
        TwistHead.from_pretrained(saved, dtype)
    with pytest.raises(ValueError, match="tensor bias is not finite in torch.float16: .* a dtype of wider range"):
        TwistHead.from_pretrained(saved, torch.float16)


# The hub.


def test_hub_id(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder is fetched from the hub, the two files and nothing else."""
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(saved / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    head = TwistHead.from_pretrained("someone/a-twist")
    assert asked == [("someone/a-twist", CONFIG_NAME), ("someone/a-twist", WEIGHTS_NAME)]
    assert torch.equal(head(HIDDEN), trained("linear")(HIDDEN))


def hub_error(kind: type[Exception]) -> Exception:
    # Those that carry an HTTP response insist on one; none is read here.
    return kind.__new__(kind)


@pytest.mark.parametrize(
    "kind", [RepositoryNotFoundError, GatedRepoError, LocalEntryNotFoundError, HFValidationError, ConnectionError]
)
def test_hub_failures(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, gated, offline or not a name at all: one message, the failure's name in it and its cause attached."""

    def download(repository: str, name: str) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = (
        rf"`twist_head` 'someone/missing' is neither a local folder nor a hub repository with {CONFIG_NAME} "
        rf"\({kind.__name__}\): check the name, and the connection if it is a hub id"
    )
    with pytest.raises(ValueError, match=message) as caught:
        TwistHead.from_pretrained("someone/missing")
    assert isinstance(caught.value.__cause__, kind)


def test_path_that_does_not_exist() -> None:
    """A mistyped path is no valid hub id; the real hub client says so without a connection."""
    with pytest.raises(ValueError, match=r"'/no/such/folder' is neither a local folder .* \(HFValidationError\)"):
        TwistHead.from_pretrained("/no/such/folder")


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    """By a spy in the place of the hub: the repository is made, and the folder holds the head."""
    import shutil
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    asked: list = []

    def create_repo(self, repo_id, **options):
        asked.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        asked.append((repo_id, options))
        shutil.copytree(folder_path, tmp_path / "hub")
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    head = TwistHead.create(TwistHeadConfig("linear", 4, 6))
    assert head.push_to_hub("head", private=True, commit_message="first") == "https://hub/commit"
    assert asked == [("head", {"private": True, "exist_ok": True}), ("me/head", {"commit_message": "first"})]
    loaded = TwistHead.from_pretrained(tmp_path / "hub")
    assert loaded.config == head.config and torch.equal(loaded.weight, head.weight)
