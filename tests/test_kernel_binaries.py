"""The kernels compiled for an H200 (sm_90) without one: registers, spills, and the width of loads.

    python tests/test_kernel_binaries.py          prints the table

The public functions are called as they would be on a GPU, but each launch compiles its kernel for
the arguments at hand, with the types, the alignments and the options that Triton's launcher finds in them,
and runs nothing. This takes a process of its own, where Triton believes in a GPU and does not interpret.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: Registers of a multiprocessor, and bytes that 132 of them must have on order for 4.8 TB/s at 700 ns.
REGISTERS, BYTES_IN_FLIGHT = 65_536, 25_000


def loads_of(sass: str) -> tuple[Counter[int], Counter[int]]:
    """Count loads from global memory by width in bytes: (everywhere, in loops)."""
    lines, labels, loops = sass.splitlines(), {}, set()
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = i
        jump = re.search(r"\bBRA\b[^`]*`\((\.L_\w+)\)", line)
        if jump and jump[1] in labels:
            loops.update(range(labels[jump[1]], i + 1))
    everywhere, inside = Counter[int](), Counter[int]()
    for i, line in enumerate(lines):
        if load := re.search(r"\bLDG(?:STS)?\.([\w.]+)", line):
            parts = load[1].split(".")
            width = next((w for part, w in WIDTHS.items() if part in parts), 4)
            everywhere[width] += 1
            inside[width] += i in loops
    return everywhere, +inside


WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def spills_of(sass: str) -> int:
    """Count loads from and stores to local memory."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def examine(kernel: Any) -> dict[str, Any]:
    """Disassemble a compiled kernel with the tools in Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    everywhere, inside = loads_of(sass)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": spills_of(sass),
        "tensor cores": len(re.findall(r"\bH(?:G)?MMA\b", sass)),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "loads": sorted(everywhere.items()),
        "loads in loops": sorted(inside.items()),
    }


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (name, calls that launch the kernels) for the shapes and types that matter."""
    from vllm_twist.kernels import ops, reference

    def rows(n: int, vocab: int, dtype: torch.dtype, stride: int | None = None, first: int = 0) -> torch.Tensor:
        return torch.empty(n, stride or vocab, dtype=dtype)[:, first : first + vocab]

    def step(logits: torch.Tensor, log_psi: torch.Tensor | None, own: bool = False) -> None:
        n = len(logits)
        more = (torch.ones(n), torch.ones(n)) if own else (None, None)
        ops.twist_softmax(logits, log_psi, *more, backend="triton")
        lanes = torch.arange(n)
        ops.twist_sample(logits, log_psi, torch.empty(n), lanes, lanes, *more, backend="triton")

    n, vocab = 256, 128_256
    yield "bf16", lambda: step(rows(n, vocab, BF16), rows(n, vocab, BF16))
    yield "bf16, one piece", lambda: step(rows(5000, 8192, BF16), rows(5000, 8192, BF16))
    yield "bf16, own temperatures and scales", lambda: step(rows(n, vocab, BF16), rows(n, vocab, BF16), True)
    yield "bf16, no twist", lambda: step(rows(n, vocab, BF16), None)
    yield "fp16", lambda: step(rows(n, vocab, FP16), rows(n, vocab, FP16))
    yield "fp32", lambda: step(rows(n, vocab, FP32), rows(n, vocab, FP32))
    yield "fp32, twist bf16", lambda: step(rows(n, vocab, FP32), rows(n, vocab, BF16))
    yield "bf16, 32001 tokens", lambda: step(rows(n, 32_001, BF16), rows(n, 32_001, BF16))
    yield "bf16, sliced", lambda: step(rows(n, 32_001, BF16, 32_064, 3), rows(n, 32_001, BF16, 32_072, 11))
    yield "bf16, rows unlike", lambda: step(rows(n, 50_257, BF16, 50_304), rows(n, 50_257, BF16))

    def control() -> None:
        memory = torch.frombuffer(bytearray(2 * 64 * 32_000 + 16), dtype=BF16, offset=2)
        ops.twist_softmax(memory[: 64 * 32_000].view(64, 32_000), None, backend="triton")

    yield "control: odd addresses", control

    def resample(k: int, pinned: bool = False) -> None:
        on, reals = torch.ones(64, dtype=torch.bool), torch.ones(64)
        wide = torch.empty(64, k)
        schemes = torch.zeros(64, dtype=torch.int64)
        ops.resample(
            wide, on[:, None].expand(64, k), on, reals.double(), schemes, wide, on if pinned else None, backend="triton"
        )

    for k in (16, 64, 256, 1024):
        yield f"{k} lanes", lambda k=k: resample(k)
        yield f"{k} lanes, one pinned", lambda k=k: resample(k, pinned=True)

    def bookkeeping(k: int, pinned: bool = False) -> None:
        slots, g = 1024, 1024 // k
        reals = [torch.empty(slots, dtype=dtype) for dtype in (torch.float64, torch.float64, FP32)]
        ints = [torch.empty(slots, dtype=torch.int32) for _ in range(2)]
        longs = torch.empty(slots, dtype=torch.int64)
        stops = torch.empty(slots, 2, dtype=torch.int32)
        lanes = reference.Lanes(*reals, *ints, torch.zeros(slots, dtype=torch.bool), longs, stops)
        table = torch.empty(g, k, dtype=torch.int32)
        flags = torch.zeros(g, dtype=torch.bool) if pinned else None
        groups = reference.Groups(table, ints[0][:g], reals[0][:g], longs[:g], longs[:g], *[ints[0][:g]] * 2, flags)
        totals = reference.Totals(reals[0], reals[0], ints[0])
        moved = ops.advance(lanes, groups, ints[0], reals[2], reals[2], backend="triton")
        gain = reals[2] if pinned else None
        ops.settle(lanes, groups, totals, ints[0], moved, longs, reals[2], reals[2], gain, backend="triton")

    for k in (16, 64, 256, 1024):
        yield f"step of {k} lanes", lambda k=k: bookkeeping(k)
    yield "step of 16 lanes, pinned", lambda: bookkeeping(16, True)

    def out_of_a_batch() -> None:
        logits, log_psi, lanes = rows(300, vocab, BF16), rows(n, vocab, BF16), torch.arange(n)
        ops.twist_softmax(logits, log_psi, None, None, lanes, backend="triton")
        ops.twist_sample(logits, log_psi, torch.empty(n), lanes, lanes, None, None, lanes, backend="triton")

    yield "bf16, rows out of a batch", out_of_a_batch

    def low_rank(dtype: torch.dtype, rank: int, one: bool = False) -> None:
        count, tokens = (5000 * 64, 8192) if one else (n, vocab)
        logits, lanes = rows(1, tokens, dtype).expand(count, -1) if one else rows(n, vocab, dtype), torch.arange(count)
        twist = reference.LowRank(rows(count, rank, dtype), rows(tokens, rank, dtype), torch.empty(tokens, dtype=dtype))
        ops.twist_softmax(logits, twist, backend="triton")
        ops.twist_sample(logits, twist, torch.empty(count), lanes, lanes, backend="triton")

    yield "bf16, rank 64", lambda: low_rank(BF16, 64)
    yield "bf16, rank 64, one piece", lambda: low_rank(BF16, 64, True)
    yield "bf16, rank 16", lambda: low_rank(BF16, 16)
    yield "bf16, rank 100", lambda: low_rank(BF16, 100)
    yield "fp32, rank 64", lambda: low_rank(FP32, 64)

    def fork(width: int, dtype: torch.dtype) -> None:
        lanes = torch.arange(64)
        same = [torch.empty(64, 128, dtype=torch.int32)], torch.ones(1, dtype=torch.int32), lanes.int(), lanes
        ops.fork_rows(*same, lanes.int(), lanes.int(), backend="triton")
        ops.copy_partial_blocks([torch.empty(100, width, dtype=dtype)], 100, *same, lanes.int(), backend="triton")

    yield "blocks in words of 16 bytes", lambda: fork(4096, BF16)
    yield "blocks in bytes", lambda: fork(4097, torch.uint8)


def compile_all() -> dict[str, dict[str, Any]]:
    """Compile every kernel for every case; return what was found, by "kernel (case)"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from vllm_twist.kernels import advance, fork, low_rank, resample, twist_softmax

    class H200:
        """As much of a driver as compiling takes."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(H200())
    launched: list[tuple[str, Any]] = []
    options: dict[str, Any] = {}

    class Compiler:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def compile_(*args: Any, **kwargs: Any) -> None:
                compiled = self.kernel.warmup(*args, grid=grid, **{**kwargs, **options})
                launched.append((self.kernel.__name__, compiled))

            return compile_

    for module in (twist_softmax, low_rank, resample, advance, fork):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                setattr(module, name, Compiler(value))
    found = {}
    everything = dict(cases())
    for case, launch in everything.items():
        launch()
        found.update({f"{name} ({case})": examine(kernel) for name, kernel in launched})
        launched.clear()
    options["maxnreg"] = 24
    everything["bf16"]()
    found["control: 24 registers"] = examine(launched[0][1])
    return found


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(repo_root)}
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def only(binaries: dict[str, dict[str, Any]], kernel: str, *cases: str) -> list[dict[str, Any]]:
    return [binaries[f"{kernel} ({case})"] for case in cases]


def test_every_kernel_is_compiled(binaries: dict[str, dict[str, Any]]) -> None:
    """A kernel that no case launches would go unexamined."""
    from vllm_twist.kernels import advance, fork, low_rank, resample, twist_softmax

    modules = twist_softmax, low_rank, resample, advance, fork
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {name.split(" (")[0] for name in binaries if not name.startswith("control")} == kernels


def test_nothing_spills(binaries: dict[str, dict[str, Any]]) -> None:
    """No kernel keeps values in local memory; one that is given too few registers does, and it shows."""
    assert binaries["control: 24 registers"]["spills"] > 0
    for name, found in binaries.items():
        if not name.startswith("control"):
            assert found["spills"] == found["stack"] == 0, name


@pytest.mark.parametrize("case", ["bf16", "bf16, one piece", "bf16, no twist", "fp16", "fp32", "fp32, twist bf16"])
def test_streaming_softmax_loads_16_bytes(binaries: dict[str, dict[str, Any]], case: str) -> None:
    """Where rows and vocabulary are multiples of 16, no load in the whole kernel is narrower, the tail included."""
    (found,) = only(binaries, "softmax_pieces_kernel", case)
    assert {width for width, _ in found["loads"]} == {16}
    assert found["loads in loops"]


def test_streaming_softmax_loads_16_bytes_from_any_row(binaries: dict[str, dict[str, Any]]) -> None:
    """Odd vocabularies, slices and per-row parameters: the loop stays wide, all else is outside of it.

    Where logits and twist rows are misaligned differently, the logits' loads do. The control, at
    addresses that are no multiple of 16, shows what narrow loads look like.
    """
    names = "bf16, 32001 tokens", "bf16, sliced", "bf16, own temperatures and scales", "bf16, rows out of a batch"
    for found in only(binaries, "softmax_pieces_kernel", *names):
        assert {width for width, _ in found["loads in loops"]} == {16}
    (unlike,) = only(binaries, "softmax_pieces_kernel", "bf16, rows unlike")
    assert {width for width, _ in unlike["loads in loops"]} == {2, 16}
    (control,) = only(binaries, "softmax_pieces_kernel", "control: odd addresses")
    assert 2 in dict(control["loads in loops"])


def test_streaming_softmax_keeps_the_memory_busy(binaries: dict[str, dict[str, Any]]) -> None:
    """Registers allow enough programs at once for their loads to cover the latency of the memory."""
    for case in ("bf16", "bf16, no twist", "fp16", "fp32", "fp32, twist bf16", "bf16, 32001 tokens", "bf16, sliced"):
        (found,) = only(binaries, "softmax_pieces_kernel", case)
        threads = REGISTERS // found["registers"] // 32 * 32
        assert min(threads, 2048) * 16 * dict(found["loads in loops"])[16] > BYTES_IN_FLIGHT


def test_race_and_block_copy_load_16_bytes(binaries: dict[str, dict[str, Any]]) -> None:
    """The draw where rows are aligned, and the copy of blocks where all of them are."""
    for found in only(binaries, "race_kernel", "bf16", "bf16, no twist", "fp16", "fp32", "fp32, twist bf16"):
        assert {width for width, _ in found["loads in loops"]} == {16}
    (wide,) = only(binaries, "copy_partial_blocks_kernel", "blocks in words of 16 bytes")
    assert 16 in dict(wide["loads in loops"])
    assert not {1, 2} & set(dict(wide["loads"]))
    (narrow,) = only(binaries, "copy_partial_blocks_kernel", "blocks in bytes")
    assert 1 in dict(narrow["loads in loops"])


def test_low_rank_kernels_use_the_tensor_cores(binaries: dict[str, dict[str, Any]]) -> None:
    """In bfloat16 they do, and read logits and ``up`` 16 bytes at a time; the bias alone, two entries at a time."""
    for kernel in ("low_rank_softmax_kernel", "low_rank_race_kernel"):
        for found in only(binaries, kernel, "bf16, rank 64", "bf16, rank 64, one piece", "bf16, rank 16"):
            assert found["tensor cores"] > 0
            assert {width for width, _ in found["loads in loops"]} == {4, 16}
        (single,) = only(binaries, kernel, "fp32, rank 64")
        assert {width for width, _ in single["loads in loops"]} == {16} and single["tensor cores"] == 0


def main() -> None:
    found = compile_all()
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"{'kernel (case)':66} {'regs':>4} {'spills':>6} {'shared':>6} {'warps':>5}  loads, in loops: bytes x count")
    for name, x in found.items():
        loads = [", ".join(f"{w}x{n}" for w, n in x[key]) or "none" for key in ("loads", "loads in loops")]
        print(f"{name:66} {x['registers']:4} {x['spills']:6} {x['shared']:6} {x['warps']:5}  {loads[0]}; {loads[1]}")


if __name__ == "__main__":
    main()
