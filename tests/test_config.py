"""Settings: defaults, overrides, and every refusal with its words."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from vllm_twist.config import SCHEMES, RequestConfig, TwistConfig, did_you_mean, engine_options, option_names

KNOWN_KEYS = (
    "the known ones are twist, twist_particles, twist_ess_threshold, twist_resampling, twist_scale, "
    "twist_return_particles, twist_proposal, twist_pinned, twist_condition, twist_trace"
)


def test_settings_need_no_torch() -> None:
    """Whoever only reads options, or prints their help, does not wait for it."""
    check = "import sys, vllm_twist.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_defaults() -> None:
    """What README and --help promise."""
    assert dataclasses.astuple(RequestConfig()) == (16, 0.5, "systematic", 1.0, False, "twist", None, None, False)


def test_names_are_the_same_everywhere() -> None:
    """The keyword of an engine and the key of a request come from one list of fields."""
    names = option_names()
    assert names[0] == "twist_head"
    assert [name.removeprefix("twist_") for name in names[1:-2]] == [f.name for f in engine_options()]
    assert names[-2:] == ("twist_potential", "twist_potential_timeout")
    own = {f.name for f in dataclasses.fields(RequestConfig)} - {f.name for f in engine_options()}
    assert own == {"proposal", "pinned", "condition", "trace"}
    for name in own:
        with pytest.raises(ValueError, match=f"unknown option `twist_{name}`"):
            TwistConfig.from_options({"twist_head": "head", f"twist_{name}": "x"})
    assert all(f.metadata["help"] for f in dataclasses.fields(RequestConfig))


def test_settings_are_frozen() -> None:
    """One object serves every request of an engine."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        RequestConfig().particles = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("particles", 1, 1),
        ("ess_threshold", 0, 0.0),
        ("ess_threshold", 7, 7.0),
        ("scale", -2, -2.0),
        ("scale", 0, 0.0),
        ("return_particles", 1, True),
        ("return_particles", 0, False),
        *(("resampling", scheme, scheme) for scheme in SCHEMES),
    ],
)
def test_values_at_the_edge_are_taken(field: str, given: Any, kept: Any) -> None:
    """Flags arrive as 0 and 1 over HTTP; the value kept has the type of its field."""
    got = getattr(RequestConfig(**{field: given}), field)
    assert got == kept and type(got) is type(kept)


REFUSED = [
    ("particles", 0, "`twist_particles` must be at least 1, got 0: raise it to 1 or more"),
    ("particles", 2.0, "`twist_particles` must be an integer of at least 1, got 2.0: pass a whole number"),
    ("particles", True, "`twist_particles` must be an integer of at least 1, got True"),
    ("particles", "8", "`twist_particles` must be an integer of at least 1, got '8'"),
    ("ess_threshold", -0.1, r"`twist_ess_threshold` must lie in \[0, inf\), got -0.1: 0 never resamples, 0.5 is"),
    ("ess_threshold", math.inf, r"`twist_ess_threshold` must lie in \[0, inf\), got inf"),
    ("ess_threshold", math.nan, r"`twist_ess_threshold` must lie in \[0, inf\), got nan"),
    # JSON has integers of any length; float() of this one raises OverflowError.
    ("ess_threshold", 10**400, r"`twist_ess_threshold` must lie in \[0, inf\), got 1000000"),
    ("ess_threshold", "0.5", "`twist_ess_threshold` must be a number, got '0.5': pass a plain number"),
    ("ess_threshold", False, "`twist_ess_threshold` must be a number, got False"),
    ("resampling", "systemic", r"`twist_resampling` must be one of systematic, stratified, multinomial, residual, got"),
    ("resampling", "systemic", r"got 'systemic' \(did you mean 'systematic'\?\): pass one of these"),
    ("resampling", "best", "got 'best': pass one of these"),
    ("resampling", ["residual"], "`twist_resampling` must be one of"),
    ("scale", math.nan, "`twist_scale` must be a finite number, got nan: 1 is the twist as learned, 0 turns it off"),
    ("scale", -math.inf, "`twist_scale` must be a finite number, got -inf"),
    ("scale", None, "`twist_scale` must be a number, got None: pass a plain number"),
    ("return_particles", 2, r"`twist_return_particles` must be 0 or 1 \(false or true\), got 2: pass 0 or 1"),
    ("return_particles", "yes", "`twist_return_particles` must be 0 or 1 .* got 'yes'"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_values_out_of_range(field: str, value: Any, message: str) -> None:
    """Refused alike when set for the engine, as a request's key, and in code."""
    with pytest.raises(ValueError, match=message):
        RequestConfig(**{field: value})
    with pytest.raises(ValueError, match=message):
        RequestConfig().override({f"twist_{field}": value})
    if value is not None:  # for an engine None means "as by default"
        with pytest.raises(ValueError, match=message):
            TwistConfig.from_options({"twist_head": "head", f"twist_{field}": value})


def test_override() -> None:
    """A request changes what it names and nothing else; keys of other plugins pass."""
    engine = RequestConfig(particles=4, scale=0.7)
    assert engine.override(None) is not None and engine.override(None) == engine
    assert engine.override({}) == engine
    assert engine.override({"kv_transfer": 1, "priority": 3}) == engine
    got = engine.override({"twist_particles": 9, "twist_return_particles": 1, "twist": 1})
    assert got == RequestConfig(particles=9, scale=0.7, return_particles=True)
    assert engine == RequestConfig(particles=4, scale=0.7)


@pytest.mark.parametrize("off", [0, False])
def test_twist_off(off: Any) -> None:
    """``twist=0`` asks for the base model, but a wrong key beside it is still an error."""
    assert RequestConfig().override({"twist": off}) is None
    assert RequestConfig().override({"twist": off, "twist_particles": 3}) is None
    with pytest.raises(ValueError, match="`twist_particles` must be at least 1"):
        RequestConfig().override({"twist": off, "twist_particles": 0})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"twist_particle": 3}, r"unknown request key `twist_particle` \(did you mean 'twist_particles'\?\): the"),
        # A misspelling without the prefix would otherwise be passed over in silence.
        ({"twits_particles": 3}, r"unknown request key `twits_particles` \(did you mean 'twist_particles'\?\)"),
        ({"twistqqq": 1}, f"unknown request key `twistqqq`: {KNOWN_KEYS}"),
        ({"twist_head": "x"}, "`twist_head` is an option of the engine, not of a request, got 'x': start an engine"),
        ({"twist_potential_timeout": 3}, "start an engine with `--twist-potential-timeout`; a request may set"),
        ({"twist": 2}, r"`twist` must be 0 or 1 \(false or true\), got 2"),
    ],
)
def test_unknown_request_keys(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestConfig().override(extra)


def test_engine_options() -> None:
    """None means "as by default", so that a command line may pass all of its flags."""
    got = TwistConfig.from_options({"twist_head": "user/head", "twist_particles": 8, "twist_scale": None})
    assert got == TwistConfig("user/head", RequestConfig(particles=8))
    assert TwistConfig.from_dict(got.to_dict()) == got


def test_engine_options_over_others() -> None:
    """What is given replaces what is there; the rest stays."""
    base = TwistConfig.from_options({"twist_head": "user/head", "twist_particles": 8, "twist_potential": "a:b"})
    got = TwistConfig.from_options({"twist_scale": 2.0, "twist_particles": None, "twist_potential_timeout": 5}, base)
    assert got == TwistConfig("user/head", RequestConfig(particles=8, scale=2.0), "a:b", 5.0)
    assert TwistConfig.from_options({"twist_head": "other"}, base).head == "other"


@pytest.mark.parametrize("values", [None, "head", {}, {"head": "x", "colour": 1}, {"head": "x", "defaults": {"k": 1}}])
def test_settings_that_are_none(values: Any) -> None:
    with pytest.raises(ValueError, match="`additional_config` must hold what `TwistConfig.to_dict` returns under 'twi"):
        TwistConfig.from_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"twist_particles": 8, "twist_scale": 2.0}, "`twist_head` is missing, got twist_particles, twist_scale: pass"),
        ({"twist_head": "", "twist_scale": 2.0}, "`twist_head` is missing, got twist_scale: pass the folder or hub id"),
        ({}, "`twist_head` is missing, got no option: pass the folder or hub id of a twist head, or drop"),
        ({"twist_heads": "x"}, r"unknown option `twist_heads` \(did you mean 'twist_head'\?\): the known ones"),
        ({"zzz": 1}, "unknown option `zzz`: the known ones are twist_head, twist_particles,"),
    ],
)
def test_engine_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwistConfig.from_options(options)


def test_did_you_mean() -> None:
    assert did_you_mean("colour", ["color", "size"]) == " (did you mean 'color'?)"
    assert did_you_mean("qqq", ["color", "size"]) == ""
    assert did_you_mean(7, ("color",)) == ""
