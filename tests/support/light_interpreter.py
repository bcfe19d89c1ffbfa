"""A lighter interpreter for the Triton kernels with which vLLM keeps its books: the same source, on plain numbers.

Triton's own interpreter makes a typed array of every scalar. That is nearly all the time that Model Runner V2 takes on
a CPU, most of it in a dozen kernels that only load, add, compare and store integers, in a program for every row. Their
source runs here on Python's integers and NumPy's arrays. Each kernel's launches number 1, 2, 4, 8, ... run in Triton's
interpreter too, and must have stored the same numbers at the same addresses.
"""

from __future__ import annotations

import collections
import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

#: Where the kernels are from.
MODULES = {f"vllm.v1.worker.gpu.{name}" for name in ("block_table", "buffer_utils", "input_batch")}
NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.uint64: np.uint64, torch.bool: np.bool_}
NUMPY[torch.float32] = np.float32  # which are only copied
#: Launches of each kernel, and those that this interpreter does not know enough for.
launches: collections.Counter[str] = collections.Counter()
left: set[str] = set()


class Integer(int):
    """A loaded scalar."""

    def to(self, dtype: Any) -> Integer:
        return self


class Pointer:
    """Elements of memory; ``at`` counts from its start."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at - offset)


def memory_at(address: int, dtype: Any) -> np.ndarray:
    """Return everything from an address on; an empty tensor's may be zero, for which NumPy would allocate."""
    interface = {"version": 3, "data": (address or 64, False), "shape": (2**40,), "typestr": np.dtype(dtype).str}
    return np.asarray(types.SimpleNamespace(__array_interface__=interface))


class Stores:
    """What has been stored, in order, and what was there before."""

    def __init__(self) -> None:
        self.made: list[tuple[np.ndarray, Any, Any]] = []

    def before(self, memory: np.ndarray, at: Any) -> None:
        self.made.append((memory, np.array(at, np.int64), np.array(memory[at])))

    def undo(self) -> None:
        for memory, at, old in reversed(self.made):
            memory[at] = old

    def written(self) -> dict[int, Any]:
        """Return what there is now at every address that was stored to."""
        found = {}
        for memory, at, _ in self.made:
            start = memory.__array_interface__["data"][0]
            addresses = start + memory.itemsize * at.reshape(-1)
            found.update(zip(addresses.tolist(), memory[at.reshape(-1)].tolist(), strict=True))
        return found


class Language:
    """What the kernels use of ``triton.language``."""

    range = range
    int32, int64, uint64 = np.int32, np.int64, np.uint64

    def __init__(self) -> None:
        self.place: tuple[int, ...] = ()
        self.grid: tuple[int, ...] = ()
        self.stores: Stores | None = None

    def program_id(self, axis: int) -> int:
        return self.place[axis]

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    @staticmethod
    def arange(start: int, end: int) -> np.ndarray:
        return np.arange(start, end, dtype=np.int32)

    @staticmethod
    def where(condition: Any, then: Any, otherwise: Any) -> Any:
        if isinstance(condition, np.ndarray):
            return np.where(condition, then, otherwise)
        return then if condition else otherwise

    @staticmethod
    def pointer_type(element: Any) -> Any:
        return element

    @staticmethod
    def cast(address: int, element: Any) -> Pointer:
        return Pointer(memory_at(address, element))

    @staticmethod
    def multiple_of(x: Any, n: int) -> Any:
        return x

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
        memory, at = pointer.memory, pointer.at
        if isinstance(at, np.ndarray):
            if mask is None or mask is True:
                return memory[at]
            found = np.full(at.shape, other, memory.dtype)
            chosen = np.broadcast_to(mask, at.shape)
            found[chosen] = memory[at[chosen]]
            return found
        if mask is not None and not mask:
            return other
        value = memory[at].item()
        return Integer(value) if type(value) is int else value

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        memory, at = pointer.memory, pointer.at
        if mask is not None:
            chosen = np.broadcast_to(mask, np.shape(at))
            if not chosen.any():
                return
            if isinstance(at, np.ndarray):
                at = at[chosen]
                value = value[chosen] if isinstance(value, np.ndarray) else value
        if self.stores is not None:
            self.stores.before(memory, at)
        memory[at] = value


language = Language()
_made: dict[Callable[..., Any], Callable[..., Any]] = {}


def lightened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel, as Triton's interpreter has rewritten it, with this language in the place of Triton's."""
    from triton.runtime.interpreter import InterpretedFunction

    if function not in _made:
        known = {
            **function.__globals__,
            "tl": language,
            "interpreter_semantic": types.SimpleNamespace(to_tensor=lambda value, check: value),
        }
        for name in function.__code__.co_names:
            if isinstance(known.get(name), InterpretedFunction):
                known[name] = lightened(known[name].rewrite())
        _made[function] = types.FunctionType(function.__code__, known, None, function.__defaults__)
    return _made[function]


def run(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a kernel's programs, one after another."""

    def given(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Pointer(memory_at(value.data_ptr(), NUMPY[value.dtype]))
        return value

    kernel, names = lightened(executor.fn), executor.arg_names
    arguments = {name: given(value) for name, value in zip(names, args, strict=False)}
    arguments |= {name: given(value) for name, value in kwargs.items() if name in names}
    language.grid = (*executor.grid, 1, 1)[:3]
    for x in range(language.grid[0]):
        for y in range(language.grid[1]):
            for z in range(language.grid[2]):
                language.place = (x, y, z)
                kernel(**arguments)


@contextlib.contextmanager
def recorded() -> Iterator[Stores]:
    """Record what Triton's interpreter stores."""
    from triton.runtime.interpreter import interpreter_builder

    stores, real = Stores(), interpreter_builder.create_masked_store

    def store(pointers: Any, value: Any, mask: Any, policy: Any) -> Any:
        chosen = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[chosen].astype(np.int64)
        if len(addresses):
            memory = memory_at(int(addresses.min()), value.data.dtype)
            stores.before(memory, (addresses - addresses.min()) // memory.itemsize)
        return real(pointers, value, mask, policy)

    interpreter_builder.create_masked_store = store
    try:
        yield stores
    finally:
        del interpreter_builder.create_masked_store


def check(executor: Any, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a kernel in both interpreters.

    Raises:
        AssertionError: they did not store the same.
    """
    with recorded() as theirs:
        real(executor, *args, **kwargs)
    expected = theirs.written()
    theirs.undo()
    mine = language.stores = Stores()
    try:
        run(executor, args, kwargs)
    except (AttributeError, KeyError, TypeError):
        mine.undo()
        left.add(executor.fn.__name__)
        real(executor, *args, **kwargs)
        return
    finally:
        language.stores = None
    assert mine.written() == expected, f"{executor.fn.__name__} has another outcome in Triton's interpreter"


def install() -> None:
    """Let kernels of ``MODULES`` run here, and Triton patch its language for the others once, not for every call."""
    from triton.runtime import interpreter

    real, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()
    kept = types.SimpleNamespace(restore=lambda: None)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        name = executor.fn.__name__
        if executor.fn.__module__ not in MODULES or name in left:
            return real(executor, *args, **kwargs)
        launches[name] += 1
        if launches[name] & (launches[name] - 1):
            return run(executor, args, kwargs)
        return check(executor, real, args, kwargs)

    def patch_once(function: Any) -> Any:
        languages = (interpreter.tl, interpreter.tl.core)
        seen = tuple(sorted({id(x) for x in function.__globals__.values() if any(x is y for y in languages)}))
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return kept

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_once
