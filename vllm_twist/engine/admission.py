"""Which requests are twisted, and whether they can be served: checked before the engine sees them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_twist.config import PREFIX, TwistConfig
from vllm_twist.engine.groups import blocks_at_length, longest_that_fits
from vllm_twist.engine.stop_strings import detector_for
from vllm_twist.engine.wire import GROUP_KEY
from vllm_twist.kernels.ops import MAX_LANES
from vllm_twist.twist import TwistHeadConfig, check_fits

# Temperatures below this are greedy to vLLM.
_GREEDY = 1e-5


class TwistValidationError(VLLMValidationError, ValueError):
    """A request that cannot be twisted as asked: a ``ValueError`` offline, HTTP 400 on the server."""


def read_config(vllm_config: Any) -> TwistConfig:
    """Return the twist settings that travel in an engine's ``additional_config``."""
    return TwistConfig.from_dict(vllm_config.additional_config[PREFIX])


def is_twisted(vllm_config: Any) -> bool:
    """Return whether an engine of this config has a twist head."""
    extra = vllm_config.additional_config
    return isinstance(extra, dict) and PREFIX in extra


def check_body(body: Any) -> None:
    """Refuse twist settings in a request's JSON body that would be passed over in silence.

    Raises:
        TwistValidationError: a key beside ``vllm_xargs``, or settings for a beam search.
    """
    extra = body.get("vllm_xargs") or {}
    for key in body:
        if key.startswith(PREFIX):
            raise TwistValidationError(
                f'`{key}` must be sent in `vllm_xargs`, got it beside: send "vllm_xargs": {{"{key}": ...}}.'
            )
    if body.get("use_beam_search"):
        for key in extra:
            if key.startswith(f"{PREFIX}_"):
                raise TwistValidationError(
                    f"`{key}` is not supported together with `use_beam_search`, got {extra[key]!r}: drop one of the "
                    "two; a beam search is never twisted."
                )


def check_lanes(particles: int, vllm_config: Any, remedy: str) -> None:
    """Refuse a group whose lanes the engine can never run side by side.

    Raises:
        ValueError: naming the limit that the particles exceed.
    """
    scheduler = vllm_config.scheduler_config
    limits = {"max_num_seqs": scheduler.max_num_seqs, "max_num_active_seqs": scheduler.max_num_active_seqs}
    for name, most in limits.items():
        if most is not None and particles > most:
            raise ValueError(
                f"`{PREFIX}_particles` must be at most `{name}`={most}, got {particles}: "
                f"{remedy.format(name=f'a larger `{name}`')}."
            )
    if vllm_config.use_v2_model_runner and particles > MAX_LANES:
        raise ValueError(
            f"`{PREFIX}_particles` must be at most {MAX_LANES} under Model Runner V2, got {particles}: "
            f"{remedy.format(name='VLLM_USE_V2_MODEL_RUNNER=0')}."
        )


def num_engines(parallel: Any) -> int:
    """Return over how many engines a frontend's ``cache_config.num_gpu_blocks`` is the sum.

    Those whose answers vLLM's client adds up (``MPClient._apply_ready_response``): all, unless it is one rank of
    offline data parallelism or manages its own node's engines alone.
    """
    if parallel.data_parallel_rank_local is not None or parallel.distributed_executor_backend == "external_launcher":
        return 1
    return parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size


def check_head(config: TwistHeadConfig, model_config: Any) -> None:
    """Raise ValueError unless the engine can serve a head of this config beside the model."""
    check_fits(config, model_config.get_hidden_size(), model_config.get_vocab_size())


def fit_length(
    prompt_len: int,
    max_tokens: int,
    particles: int,
    *,
    max_model_len: int,
    block_size: int,
    num_blocks: int,
    share_prompt: bool,
) -> int:
    """Return the length (prompt included) up to which the group's particles may grow.

    A request without a ``max_tokens`` of its own (it reaches to the end of the context) is cut to
    what its particles fit into, as if the context ended there.

    Raises:
        ValueError: the group could never fit into the KV cache.
    """
    length = min(prompt_len + max_tokens, max_model_len)
    needed = blocks_at_length(prompt_len, length, particles, block_size, share_prompt)
    if needed <= num_blocks:
        return length
    open_ended = prompt_len + max_tokens >= max_model_len
    longest = longest_that_fits(prompt_len, particles, block_size, num_blocks, share_prompt)
    if open_ended and longest > prompt_len:
        return longest
    raise ValueError(
        f"`twist_particles`={particles} can never fit into the KV cache: a prompt of {prompt_len} and "
        f"`max_tokens`={max_tokens} need up to {needed} blocks of {block_size} tokens, the cache has "
        f"{num_blocks}: lower `twist_particles` or `max_tokens`, or give the engine more KV cache."
    )


def shared_again(vllm_config: Any, params: Any) -> int:
    """Return how many tokens of a prefix lanes surely share once they are computed anew after a preemption.

    They find each other's blocks in the prefix cache, if it is on and they may read it. What exceeds the part of a
    request that one step computes (``long_prefill_token_threshold``) they compute side by side, each for itself.
    """
    if not vllm_config.cache_config.enable_prefix_caching or params.skip_reading_prefix_cache:
        return 0
    return vllm_config.scheduler_config.long_prefill_token_threshold or vllm_config.model_config.max_model_len


def neutral_params(params: Any, extra_args: dict[str, Any], truncated: bool) -> Any:
    """Return parameters for a lane: whatever p0 needs, and nothing that draws.

    The token is drawn with the group's own noise, and logprobs follow the particle's lineage, so the
    engine's sampler must do neither. Top-k and top-p belong to p0; ``truncated`` says that the sampler
    applies them before the twist, else they are the lane's own business. The request's own ``extra_args``, all
    but the twist's, are for other logits processors, which belong to p0.
    """
    lane = copy.copy(params)
    # Cached by vLLM; it depends on the seed.
    getattr(lane, "__dict__", {}).pop("sampling_type", None)
    lane.n = 1
    lane.seed = None
    if not truncated:
        lane.top_k = 0
        lane.top_p = 1.0
    lane.logprobs = None
    own = {key: value for key, value in (params.extra_args or {}).items() if not key.startswith(PREFIX)}
    lane.extra_args = {**own, **extra_args}
    return lane


def check_pinned(
    pinned: tuple[int, ...], params: Any, max_tokens: int, vocab_size: int, detector: Any = None
) -> None:
    """Refuse a continuation that the engine could not have drawn.

    ``detector`` looks for stop strings, where there are any (``stop_strings``).

    Raises:
        ValueError: it leaves the vocabulary, is longer than ``max_tokens``, goes on after a token
            or a stop string that ends it, or ends where nothing ends it.
    """
    name = f"`{PREFIX}_pinned`"
    ends = {params.eos_token_id, *(params.stop_token_ids or ())} - {None}
    stops = ", ".join(map(str, sorted(ends))) or "none"
    if max(pinned) >= vocab_size:
        raise ValueError(
            f"{name} must hold token ids below {vocab_size}, got {max(pinned)}: use the model's tokenizer."
        )
    if len(pinned) > max_tokens:
        raise ValueError(
            f"{name} must have at most `max_tokens`={max_tokens} tokens, got {len(pinned)}: raise `max_tokens` to "
            "what the continuation was drawn with."
        )
    early = [i for i, token in enumerate(pinned[:-1]) if token in ends]
    if early:
        raise ValueError(
            f"{name} must end with the first token that ends an output ({stops}), got {pinned[early[0]]} at index "
            f"{early[0]} of {len(pinned)}: cut it after that token."
        )
    ended = pinned[-1] in ends
    for i, token in enumerate(pinned if detector is not None else ()):
        found = detector.update([token], token in ends)
        ended = ended or found is not None
        if found is not None and i < len(pinned) - 1:
            raise ValueError(
                f"{name} must end where its text first contains a stop string, got {found!r} at index {i} of "
                f"{len(pinned)}: cut it after that token."
            )
    if detector is not None:
        stops = f"{stops}; or a stop string"
    if len(pinned) < max_tokens and not ended:
        raise ValueError(
            f"{name} must end with a token that ends an output ({stops}) or have `max_tokens`={max_tokens} tokens, "
            f"got {len(pinned)} tokens ending with {pinned[-1]}: append the terminating token, or lower `max_tokens` "
            "to what the continuation was drawn with."
        )


def check_condition(condition: tuple[int, ...] | None, conditional: bool, max_model_len: int, vocab_size: int) -> None:
    """Refuse a condition that the head does not take, or that the model cannot read.

    Raises:
        ValueError: it is missing, not asked for, leaves the vocabulary or does not fit the context.
    """
    name = f"`{PREFIX}_condition`"
    if condition is None:
        if conditional:
            raise ValueError(
                f"{name} is missing, got none, but the twist head is conditional: pass the token ids of o_T, or send "
                "`twist`=0 for plain sampling."
            )
        return
    if not conditional:
        raise ValueError(
            f"{name} needs a conditional twist head, got {len(condition)} token ids for one that is not: drop it, or "
            "serve a conditional head."
        )
    if max(condition) >= vocab_size:
        raise ValueError(
            f"{name} must hold token ids below {vocab_size}, got {max(condition)}: use the model's tokenizer."
        )
    if len(condition) >= max_model_len:
        raise ValueError(
            f"{name} must have fewer than `max_model_len`={max_model_len} tokens, got {len(condition)}: shorten it."
        )


def _refuse(name: str, got: Any, remedy: str) -> None:
    raise ValueError(f"`{name}` is not supported together with a twist, got {got!r}: {remedy}.")


def _check_params(params: Any) -> None:
    """Refuse sampling parameters that a twisted request cannot honour."""
    untwist = "drop it, or send `twist`=0 for plain sampling"
    if params.temperature < _GREEDY:
        raise ValueError(
            f"`temperature` must be above 0 with a twist, got {params.temperature}: the target is a "
            "distribution; raise the temperature, or send `twist`=0 for greedy decoding."
        )
    if params.structured_outputs is not None:
        _refuse("structured_outputs", params.structured_outputs, untwist)
    for name in (
        "prompt_logprobs", "prompt_logprob_token_ids", "logprob_token_ids", "trace_decode_token_ids",
        "thinking_token_budget", "repetition_detection",
    ):  # fmt: skip
        value = getattr(params, name)
        if value is not None and value is not False:
            _refuse(name, value, untwist)


def admit(vllm_config: Any, request: Any) -> None:
    """Check a processed request against the engine and mark it as twisted, or leave it plain.

    Args:
        vllm_config: the engine's ``VllmConfig``, twist settings in ``additional_config``.
        request: the ``EngineCoreRequest``; its private copy of the sampling parameters is marked.

    Raises:
        TwistValidationError: naming the argument, what it got, what it takes and the remedy.
    """
    params = request.sampling_params
    if params is None:
        return
    config = read_config(vllm_config)
    try:
        settings = config.defaults.override(params.extra_args)
        if settings is None:
            return
        _check_params(params)
        if request.resumable:
            _refuse("resumable", True, "send the whole prompt at once")
        if request.prompt_embeds is not None:
            _refuse("prompt_embeds", "embeddings", "send token ids or text")
        if request.mm_features:
            _refuse("multi_modal_data", "multi-modal input", "send text only, or `twist`=0")
        check_lanes(settings.particles, vllm_config, "lower it, or start the engine with {name}")
        model = vllm_config.model_config
        check_condition(settings.condition, config.conditional, model.max_model_len, model.get_vocab_size())
        cache = vllm_config.cache_config
        engines = num_engines(vllm_config.parallel_config)
        prompt_len = len(request.prompt_token_ids)
        length = fit_length(
            prompt_len,
            params.max_tokens,
            settings.particles,
            max_model_len=model.max_model_len,
            block_size=cache.block_size,
            # One block is vLLM's null block.
            num_blocks=cache.num_gpu_blocks // engines - 1,
            share_prompt=prompt_len <= shared_again(vllm_config, params),
        )
        detector = detector_for(cached_tokenizer_from_config(model), request) if params.stop else None
        if settings.pinned is not None:
            check_pinned(settings.pinned, params, length - prompt_len, model.get_vocab_size(), detector)
    except ValueError as error:
        raise TwistValidationError(str(error)) from error
    # The request's own seed beside: vLLM counts it up for the second of its n groups, and so on.
    fields = {**dataclasses.asdict(settings), "seed": params.seed}
    params.extra_args = {**(params.extra_args or {}), GROUP_KEY: fields}
