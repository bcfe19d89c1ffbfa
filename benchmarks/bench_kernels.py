"""Time of each kernel against a device copy, the PyTorch reference and the compiled reference, in one run.

    python -m benchmarks.bench_kernels [--csv benchmarks/results/kernels.csv]

With a GPU: the Triton kernels on 16 to 1,024 rows of 32,000 to 151,936 tokens, and one resampling step with its
fork. Without one: the PyTorch backend on small sizes, to keep the benchmark itself working. ``--parts sweep`` times
the kernels with other tiles and numbers of programs than theirs, against theirs; where factors pay (``FUSED_ROWS``)
is read off the heads' rows.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import append_row, hardware, versions
from vllm_twist.kernels import ops, reference

PARTS = ("softmax", "heads", "groups", "sweep")


class Case(NamedTuple):
    """One operation at one size: what is timed, what it is compared to, and the bytes that it has to move."""

    op: str
    size: str
    dtype: str
    moved: int
    run: Callable[[], Any]
    baseline: Callable[..., Any]
    arguments: tuple[Any, ...]


def quartiles(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Return the quartiles of the time of one call in milliseconds; on a GPU with a cold L2 cache."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return list(do_bench(run, warmup=50, rep=20 * repeats, quantiles=[0.25, 0.5, 0.75]))
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.quantiles(times, n=4)


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Return GB/s of a device copy, bytes read and bytes written counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * size / quartiles(lambda: target.copy_(source), device, repeats)[1] / 1e6


def softmax_cases(rows: list[int], vocabularies: list[int], types: list[torch.dtype], device: Any) -> Iterator[Case]:
    for dtype in types:
        for vocab in vocabularies:
            for n in rows:
                logits = torch.randn(n, vocab, device=device).mul_(3).to(dtype)
                log_psi = torch.randn(n, vocab, device=device).to(dtype)
                name, size = str(dtype).removeprefix("torch."), f"{n} x {vocab}"
                moved = 2 * n * vocab * dtype.itemsize
                lse0, _ = reference.twist_softmax(logits, log_psi)
                lanes = torch.arange(n, device=device)
                keys = reference.lane_keys(torch.zeros_like(lanes), reference.TOKEN_STREAM, lanes)
                ancestors = lanes // 2 * 2
                softmax, sample = (logits, log_psi), (logits, log_psi, lse0, ancestors, keys)
                yield Case(
                    "twist_softmax",
                    size,
                    name,
                    moved,
                    lambda a=softmax: ops.twist_softmax(*a),
                    reference.twist_softmax,
                    softmax,
                )
                yield Case(
                    "twist_sample",
                    size,
                    name,
                    moved,
                    lambda a=sample: ops.twist_sample(*a),
                    reference.twist_sample,
                    sample,
                )


def low_rank_step(
    logits: Tensor,
    z: Tensor,
    up: Tensor,
    bias: Tensor,
    ancestors: Tensor,
    keys: Tensor,
    *,
    op: Any = reference,
    kept: bool = False,
) -> Any:
    """Log-sums and draw of a low-rank head's step, its values kept in factors or written out."""
    twist = reference.LowRank(z, up, bias) if kept else torch.nn.functional.linear(z, up, bias)
    lse0, _ = op.twist_softmax(logits, twist)
    return op.twist_sample(logits, twist, lse0, ancestors, keys)


def head_cases(rows: list[int], vocab: int, hidden: int, rank: int, dtype: torch.dtype, device: Any) -> Iterator[Case]:
    """Heads with their softmax: is there anything to gain by fusing the two, or two products into one?

    ``low_rank``: the values of the head written out and streamed in again, against ``torch.compile`` of both
    together, which may keep them on the chip; and a whole step, softmax and draw, with the values kept in factors by
    kernels of our own or written out. ``tied``: the model's rows and the head's through the LM head in one
    product, as the engine does it, against one product for each.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

    name, linear = str(dtype).removeprefix("torch."), torch.nn.functional.linear
    lm_head, down, up, bias = normal(vocab, hidden), normal(rank, hidden), normal(vocab, rank), normal(vocab)
    for n in rows:
        h, size = normal(n, hidden), f"{n} x {vocab}"
        logits = normal(n, vocab)

        def low_rank(logits: Tensor, h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return reference.twist_softmax(logits, linear(linear(h, down), up, bias))

        yield Case(
            "low_rank and softmax",
            size,
            name,
            (n * vocab + vocab * rank) * dtype.itemsize,
            lambda x=logits, h=h: ops.twist_softmax(x, linear(linear(h, down), up, bias)),
            low_rank,
            (logits, h, down, up, bias),
        )

        lanes = torch.arange(n, device=device)
        keys = reference.lane_keys(lanes, reference.TOKEN_STREAM, lanes)
        drawn = logits, linear(h, down), up, bias, lanes.flip(0), keys
        for kept, passes in ((True, 2), (False, 5)):
            yield Case(
                f"low_rank step, {'in factors' if kept else 'written out'}",
                size,
                name,
                (passes * n * vocab + (2 if kept else 1) * vocab * rank) * dtype.itemsize,
                lambda drawn=drawn, kept=kept: low_rank_step(*drawn, op=ops, kept=kept),
                low_rank_step,
                drawn,
            )

        def two_products(h: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
            return linear(h, lm_head), linear(update, lm_head)

        yield Case(
            "tied, one product",
            size,
            name,
            vocab * hidden * dtype.itemsize,
            lambda h=h: linear(torch.cat([h, h]), lm_head),
            two_products,
            (h, h),
        )


def group_cases(sizes: list[tuple[int, int]], layers: int, device: Any) -> Iterator[Case]:
    """Resample groups whose weights are uneven, then fork: tables, histories and partial blocks of 16 tokens."""
    for g, k in sizes:
        n, size = g * k, f"{g} x {k}"
        log_w = 2 * torch.randn(g, k, device=device)
        flags = torch.ones(g, k, dtype=torch.bool, device=device)
        ones, schemes = torch.ones(g, device=device), torch.zeros(g, dtype=torch.int64, device=device)
        uniforms = torch.rand(g, k, device=device)
        weights = (log_w, flags, flags[:, 0].contiguous(), ones, schemes, uniforms)
        moved = n * (4 + 1 + 4 + 8 + 4)
        lanes = torch.arange(n, device=device)
        state = reference.Lanes(
            log_w=log_w.reshape(-1).double(),
            log_p=torch.zeros(n, dtype=torch.float64, device=device),
            log_psi=torch.zeros(n, device=device),
            position=torch.full((n,), 5, dtype=torch.int32, device=device),
            last=torch.full((n,), 10**9, dtype=torch.int32, device=device),
            ended=torch.zeros(n, dtype=torch.bool, device=device),
            keys=lanes,
            stops=torch.full((n, 1), -1, dtype=torch.int32, device=device),
        )
        members = lanes.int().reshape(g, k)
        counts = torch.full((g,), k, dtype=torch.int32, device=device)
        table_of = reference.Groups(members, counts, ones.double(), schemes, lanes[:g], counts, lanes[:g].int())
        sums = torch.zeros(n, device=device), log_w.reshape(-1).clone()
        step = (state, table_of, members.reshape(-1), *sums)
        yield Case(
            "advance",
            size,
            "float64",
            n * (8 + 4 + 4 + 4 + 1 + 8 + 4 + 4 + 4 + 8 + 4 + 8 + 8 + 8 + 1),
            lambda a=step: ops.advance(*a),
            reference.advance,
            step,
        )
        yield Case("resample", size, "float32", moved, lambda a=weights: ops.resample(*a), reference.resample, weights)

        picked = reference.resample(*weights)[0]
        ancestors = (picked + torch.arange(g, device=device)[:, None] * k).reshape(-1)
        dead = int((ancestors != lanes).sum())
        computed, first = torch.full_like(lanes, 300), torch.full_like(lanes, 100)
        table = torch.arange(n * 32, dtype=torch.int32, device=device).reshape(n, 32)
        tokens = torch.zeros(n, 4096, dtype=torch.int32, device=device)
        table[:, 300 // 16] = torch.arange(n, dtype=torch.int32, device=device)
        blocks = torch.tensor([16, 1], dtype=torch.int32, device=device)
        fork = ([table, tokens], blocks, lanes, ancestors, first, computed)
        pointers = ops.row_pointers([table, tokens])
        yield Case(
            "fork_rows",
            size,
            "int32",
            2 * 4 * dead * (12 + 200),
            lambda a=fork, p=pointers: ops.fork_rows(*a, pointers=p),
            reference.fork_rows,
            fork,
        )
        # One KV head of 64 in bfloat16: blocks of 4 KiB per layer.
        caches = [torch.zeros(n, 2, 16, 64, dtype=torch.bfloat16, device=device) for _ in range(layers)]
        copy = (caches, n, [table], blocks[:1], lanes, ancestors, computed)
        made = {"pointers": ops.row_pointers([table]), "segments": ops.block_segments(caches, n)}

        def together(resample: Any = weights, rows: Any = fork, blocks: Any = copy, p: Any = pointers, m: Any = made):
            ops.resample(*resample)
            ops.fork_rows(*rows, pointers=p)
            ops.copy_partial_blocks(*blocks, **m)

        def together_in_torch(resample: Any, rows: Any, blocks: Any) -> None:
            reference.resample(*resample)
            reference.fork_rows(*rows)
            reference.copy_partial_blocks(*blocks)

        yield Case(
            "copy_partial_blocks",
            size,
            f"{layers} layers bfloat16",
            2 * dead * layers * 4096,
            lambda a=copy, m=made: ops.copy_partial_blocks(*a, **m),
            reference.copy_partial_blocks,
            copy,
        )
        yield Case(
            "resample and fork",
            size,
            f"{layers} layers bfloat16",
            moved + 2 * dead * (4 * 212 + layers * 4096),
            together,
            together_in_torch,
            (weights, fork, copy),
        )


def sweep_cases(rows: list[int], vocab: int, dtype: torch.dtype, device: Any) -> Iterator[Case]:
    """The passes over the vocabulary with other tiles and numbers of programs, against the chosen ones."""
    from vllm_twist.kernels import low_rank, twist_softmax

    def setting(module: Any, run: Callable[..., Any], **values: int) -> Callable[..., Any]:
        def with_it(*arguments: Any) -> Any:
            before = {name: getattr(module, name) for name in values}
            vars(module).update(values)
            try:
                return run(*arguments)
            finally:
                vars(module).update(before)

        return with_it

    name = str(dtype).removeprefix("torch.")
    for n in rows:
        size, lanes = f"{n} x {vocab}", torch.arange(n, device=device)
        logits, log_psi = (torch.randn(n, vocab, device=device).to(dtype) for _ in range(2))
        lse0, _ = reference.twist_softmax(logits, log_psi)
        keys = reference.lane_keys(lanes, reference.TOKEN_STREAM, lanes)
        factors = [torch.randn(m, min(64, vocab), device=device).to(dtype) for m in (n, vocab)]
        twist = reference.LowRank(*factors, torch.zeros(vocab, dtype=dtype, device=device))
        moved = 2 * n * vocab * dtype.itemsize
        softmax, sample = (logits, log_psi), (logits, log_psi, lse0, lanes, keys)
        kept = (logits, twist)
        tried: list[tuple[str, Any, str, Callable[..., Any], tuple[Any, ...], tuple[int, ...]]] = [
            ("twist_softmax", twist_softmax, "SOFTMAX_TILE", ops.twist_softmax, softmax, (1024, 2048, 4096, 8192)),
            ("twist_sample", twist_softmax, "RACE_TILE", ops.twist_sample, sample, (1024, 2048, 4096, 8192)),
            ("twist_softmax", twist_softmax, "PROGRAMS_PER_PROCESSOR", ops.twist_softmax, softmax, (4, 8, 16, 32)),
            ("twist_sample", twist_softmax, "PROGRAMS_PER_PROCESSOR", ops.twist_sample, sample, (4, 8, 16, 32)),
            ("low_rank softmax", low_rank, "SOFTMAX_TILE", ops.twist_softmax, kept, (32, 64, 128)),
            ("low_rank softmax", low_rank, "ROW_BLOCK", ops.twist_softmax, kept, (32, 64, 128)),
        ]
        for op, module, what, run, arguments, values in tried:
            for value in values:
                call = setting(module, run, **{what: value})
                title = f"{op}, {what} {value}"
                yield Case(title, size, name, moved, lambda c=call, a=arguments: c(*a), run, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["softmax", "heads", "groups"])
    parser.add_argument("--rows", type=int, nargs="+", help="rows, in place of each part's own")
    parser.add_argument("--vocabularies", type=int, nargs="+", help="tokens, likewise")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the reference out")
    parser.add_argument("--csv", type=Path, help="append one row per operation and size")
    args = parser.parse_args()

    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    rows, words, half = args.rows, args.vocabularies, torch.bfloat16
    if gpu:
        wide = (words or [128_256])[-1]
        cases = {
            "softmax": softmax_cases(
                rows or [16, 64, 256, 1024], words or [32_000, 128_256, 151_936], [half, torch.float32], device
            ),
            "heads": head_cases(rows or [16, 32, 64, 128, 256, 512], wide, 4096, 64, half, device),
            "groups": group_cases([(64, 16), (8, 128), (1, 1024)], 32, device),
            "sweep": sweep_cases(rows or [64, 256], wide, half, device),
        }
    else:
        torch.set_num_threads(1)
        wide = (words or [32_000])[-1]
        cases = {
            "softmax": softmax_cases(rows or [16], words or [1_000, 32_000], [torch.float32], device),
            "heads": head_cases(rows or [16, 64], wide, 512, 64, torch.float32, device),
            "groups": group_cases([(8, 16)], 4, device),
            "sweep": sweep_cases(rows or [16], wide, torch.float32, device),
        }
    backend = "triton" if gpu else "torch"
    software = f"{versions()} triton {metadata.version('triton')}"
    bandwidth = copy_bandwidth(device, 2**28 if gpu else 2**24, args.repeats)
    print(f"{hardware()} · {software} · backend {backend} · device copy {bandwidth:.0f} GB/s · {args.repeats} repeats")
    header = f"{'op':>20} {'size':>14} {'dtype':>18} {'ms: median (quartiles)':>26} {'GB/s':>6} {'of copy':>7}"
    print(f"{header} {'reference ms':>12} {'speed-up':>8} {'compiled ms':>11} {'speed-up':>8}", flush=True)
    for case in (case for part in args.parts for case in cases[part]):
        try:
            low, median, high = quartiles(case.run, device, args.repeats)
        except Exception as error:  # a tile that the chip has no room for; the other rows are wanted all the same
            print(f"{case.op:>20} {case.size:>14} {case.dtype:>18} failed: {type(error).__name__}: {str(error)[:200]}")
            continue
        plain = quartiles(lambda c=case: c.baseline(*c.arguments), device, args.repeats)[1]
        compiled = compiled_median(case, device, args.repeats) if not args.no_compile else None
        rate = case.moved / median / 1e6
        print(
            f"{case.op:>20} {case.size:>14} {case.dtype:>18} {f'{median:.4f} ({low:.4f}-{high:.4f})':>26} {rate:6.1f} "
            f"{rate / bandwidth:7.2f} {plain:12.4f} {plain / median:8.2f} "
            + (f"{compiled:11.4f} {compiled / median:8.2f}" if compiled else f"{'-':>11} {'-':>8}")
        )
        if args.csv:
            row = {
                "date": datetime.date.today().isoformat(),
                "hardware": hardware(),
                "versions": software,
                "command": " ".join(["python -m benchmarks.bench_kernels", *sys.argv[1:]]),
                "backend": backend,
                "op": case.op,
                "size": case.size,
                "dtype": case.dtype,
                "ms_q25": round(low, 5),
                "ms_median": round(median, 5),
                "ms_q75": round(high, 5),
                "gb_per_s": round(rate, 2),
                "copy_gb_per_s": round(bandwidth, 1),
                "reference_ms": round(plain, 5),
                "compiled_ms": round(compiled, 5) if compiled else "",
            }
            append_row(args.csv, row)
    if not gpu:
        print("No GPU here: these are the PyTorch backend's times. The GPU rows are not yet measured.")


def compiled_median(case: Case, device: torch.device, repeats: int) -> float | None:
    """Return the median time of ``torch.compile`` of the reference; None for an op without a fixed shape to compile."""
    if case.op in ("advance", "fork_rows", "copy_partial_blocks", "resample and fork"):
        return None
    if case.baseline.__module__ == ops.__name__:  # kernels against themselves
        return None
    torch.compiler.reset()
    compiled = torch.compile(case.baseline, dynamic=False)
    arguments: tuple[Tensor, ...] = case.arguments
    return quartiles(lambda: compiled(*arguments), device, repeats)[1]


if __name__ == "__main__":
    main()
