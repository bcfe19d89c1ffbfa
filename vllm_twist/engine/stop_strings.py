"""Stop strings: where a particle's text ends, by the rules of vLLM's own detokenizer."""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer, SlowIncrementalDetokenizer


def detector_for(tokenizer: Any, request: Any) -> BaseIncrementalDetokenizer | None:
    """Return what follows a request's text as its tokens come; None for one without stop strings.

    Its ``update(new tokens, whether the last of them ends the output)`` returns the stop string that the text
    contains now, if any; ``output_text`` is what the client gets.

    Args:
        tokenizer: the model's.
        request: what has the ``sampling_params`` and the ``prompt_token_ids``, whose text the output goes on from.

    Raises:
        ValueError: there is no tokenizer.
    """
    if not request.sampling_params.stop:
        return None
    if tokenizer is None:
        raise ValueError(
            f"`stop` needs the model's tokenizer, got {request.sampling_params.stop!r} in an engine that has none: "
            "start it without `skip_tokenizer_init`, or pass `stop_token_ids`."
        )
    return IncrementalDetokenizer.from_new_request(tokenizer, request)  # type: ignore[return-value]


def fork(detector: BaseIncrementalDetokenizer | None) -> BaseIncrementalDetokenizer | None:
    """Return a copy that goes on by itself."""
    if detector is None:
        return None
    made = copy.copy(detector)
    made.token_ids = list(detector.token_ids)
    if isinstance(made, SlowIncrementalDetokenizer):
        made.tokens = list(made.tokens)
    else:
        made.stream = copy.copy(made.stream)  # type: ignore[attr-defined]
    return made
