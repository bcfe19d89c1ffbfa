"""Custom logits processors: their state follows the particles.

A processor belongs to p0, and what it keeps of a request's tokens to the particle. One with a method of the name
``fork`` is told of every fork:

    fork(child, parent)       Model Runner V1: the rows of the batch; the child's last token is its own
    fork(children, parents)   Model Runner V2: request slots, int64 [L] on the device, a lane that stays its own parent;
                              it must not wait for the device

For others the state that they keep by request is copied. Under V1: entries of dictionaries that were empty when the
engine started, by row, and rows of tensors, arrays and lists as long as the batch. Under V2: rows of device tensors as
long as the batch; what is kept on the host cannot depend on tokens there.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

#: Modules whose processors need no fork: all they read is forked already.
BUILTIN = ("vllm.", "vllm_twist.")
#: Objects of these are no state, but what many share.
_SHARED = ("vllm.", "torch.", "transformers.", "tokenizers.")


def custom(processors: Iterable[Any]) -> list[Any]:
    """Return the processors that are neither vLLM's nor ours."""
    return [p for p in processors if not type(p).__module__.startswith(BUILTIN)]


def _places(processor: Any) -> list[tuple[Any, str, Any]]:
    """Return (owner, name, value) of the attributes of a processor and of the objects that it keeps."""
    owners = [processor]
    for value in vars(processor).values():
        kind = type(value)
        if hasattr(value, "__dict__") and not kind.__module__.startswith((*_SHARED, "builtins", "functools")):
            owners.append(value)
    return [(owner, name, value) for owner in owners for name, value in vars(owner).items()]


def _by_row(value: Any, rows: int) -> bool:
    """Return whether this has one entry per row of the batch."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows


def check(processor: Any, rows: int, vocab_size: int) -> None:
    """Refuse a processor whose state by request cannot be told from what it keeps by token.

    Raises:
        ValueError: naming it.
    """
    if hasattr(processor, "fork") or rows != vocab_size:
        return
    for _, name, value in _places(processor):
        if _by_row(value, rows):
            raise ValueError(
                f"`logits_processors` has {type(processor).__qualname__!r}, whose {name!r} has {rows} entries, which "
                f"may be one per request (`max_num_seqs`={rows}) or one per token ({vocab_size}): give it a method "
                "fork(child, parent) that copies what it keeps of a request, or change `max_num_seqs`."
            )


class ForksV1:
    """Forks the state of the custom processors of a worker (Model Runner V1).

    Args:
        processors: all of the runner's.
        rows: of its batch.
        vocab_size: of the model.

    Raises:
        ValueError: a processor is refused (``check``).
    """

    def __init__(self, processors: Iterable[Any], rows: int, vocab_size: int) -> None:
        self.processors, self.rows = custom(processors), rows
        #: Dictionaries that were filled before the first request have no state of one.
        self.constant: set[tuple[int, str]] = set()
        for processor in self.processors:
            check(processor, rows, vocab_size)
            places = _places(processor)
            self.constant |= {(id(owner), name) for owner, name, value in places if isinstance(value, dict) and value}

    def __call__(self, child: int, parent: int, own: dict[int, Any]) -> None:
        """Give the child's row the parent's state.

        Args:
            child, parent: rows of the batch.
            own: what stands in the child's state in place of something of the parent's, by the latter's id.
        """
        for processor in self.processors:
            if hasattr(processor, "fork"):
                processor.fork(child, parent)
                continue
            # What the processor itself holds is shared by all requests.
            memo = {id(value): value for value in vars(processor).values()}
            memo |= {id(processor): processor, **own}
            for owner, name, value in _places(processor):
                if isinstance(value, dict):
                    if (id(owner), name) not in self.constant:
                        _fork_entry(value, child, parent, memo)
                elif _by_row(value, self.rows):
                    if isinstance(value, list):
                        value[child] = _copy(value[parent], memo)
                    else:
                        value[child] = value[parent]


def _fork_entry(entries: dict[Any, Any], child: int, parent: int, memo: dict[int, Any]) -> None:
    if parent in entries:
        entries[child] = _copy(entries[parent], memo)
    else:
        entries.pop(child, None)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy, in which functions get their own closures too."""
    if isinstance(value, functools.partial):
        return functools.partial(_copy(value.func, memo), *copy.deepcopy(value.args, memo), **value.keywords)
    if isinstance(value, types.FunctionType) and value.__closure__:
        cells = tuple(types.CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in value.__closure__)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        return made
    return copy.deepcopy(value, memo)


class ForksV2:
    """Forks the state of the custom processors of a worker, on the device (Model Runner V2).

    Args:
        processors: all of the sampler's.
        states: the runner's ``RequestState``, whose tensors are forked elsewhere or are no state of a particle.
        slots: requests that it has room for.
        vocab_size: of the model.

    Raises:
        ValueError: a processor is refused (``check``).
    """

    def __init__(self, processors: Iterable[Any], states: Any, slots: int, vocab_size: int) -> None:
        self.processors, self.slots = custom(processors), slots
        for processor in self.processors:
            check(processor, slots, vocab_size)
        tensors = (getattr(value, "gpu", None) for value in vars(states).values())
        self.forked = {x.data_ptr() for x in tensors if isinstance(x, Tensor)}

    def __call__(self, slots: Tensor, ancestors: Tensor) -> None:
        """Give every lane its ancestor's state.

        Args:
            slots: of the lanes, int64 [L].
            ancestors: indices into them, int64 [L].
        """
        parents = slots[ancestors]
        for processor in self.processors:
            if hasattr(processor, "fork"):
                processor.fork(slots, parents)
                continue
            for _, _, value in _places(processor):
                # vLLM's tensors with writes staged on the host; those that the host writes whole have a `np`.
                if not hasattr(value, "np"):
                    value = getattr(value, "gpu", value)
                if isinstance(value, Tensor) and _by_row(value, self.slots) and value.device == slots.device:
                    if value.data_ptr() not in self.forked:
                        value.index_copy_(0, slots, value[parents])


def failure(error: Exception) -> str:
    """Return what ends a group whose processors' state could not be forked."""
    return (
        f"the state of a logits processor could not be copied to another particle ({type(error).__name__}: {error}): "
        "give the processor a method fork(child, parent)."
    )
