"""The Triton kernels against the PyTorch reference: on the GPU where there is one, else under Triton's interpreter.

On a GPU both sides compute there. Without one: Triton decides when it is imported whether kernels are
interpreted, and vLLM imports it too, so these tests run in a process of their own with ``TRITON_INTERPRET=1``
for all that were selected, and each reports what became of it there. With the variable set they run directly.

Statistical tests are Pearson chi-squares at fixed keys, against the quantile that a sound sampler
exceeds once in 10,000 times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from elsewhere import Line
from torch import Tensor

from vllm_twist.kernels import advance as advancing
from vllm_twist.kernels import fork, low_rank, ops, reference
from vllm_twist.kernels import resample as resampling
from vllm_twist.kernels import twist_softmax as fused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
on_the_host = pytest.mark.on_the_host
# The interpreter computes with numpy, which remarks on -inf - -inf where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

INF, NAN = math.inf, math.nan
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCABULARIES = [1, 17, 1000, 32_000, 32_001, 128_256, 151_936]
#: Keys whose first and second word is 2**31 - 1, the one that is nearest to a uniform of 1.
TOP_KEYS = (-2573957223134789632, -2469218509977026560)


def start_elsewhere(line: Line, request: pytest.FixtureRequest) -> None:
    """Run the selected tests of this file under the interpreter."""
    if not (INTERPRETED or GPU):
        selected = [item.nodeid for item in request.session.items if item.path == Path(__file__)]
        folder = request.getfixturevalue("tmp_path_factory").mktemp("kernels")
        line.add_tests("kernels", selected, {"TRITON_INTERPRET": "1"}, folder)


@pytest.fixture(scope="module")
def outcomes(line: Line) -> dict[str, str]:
    """Return what each test failed with under the interpreter, "" if it passed."""
    return line.outcomes("kernels")


@pytest.fixture(autouse=True)
def where_kernels_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the tests' tensors on the GPU, or put the outcome under the interpreter in the place of the test."""
    if INTERPRETED or GPU:
        if GPU and request.node.get_closest_marker("on_the_host") is None:
            torch.set_default_device(DEVICE)
        yield
        torch.set_default_device(None)
        return
    outcomes, name = request.getfixturevalue("outcomes"), request.node.name

    def report(**_: Any) -> None:
        failure = outcomes.get(f"test_kernels.{name}", "it did not run under the interpreter")
        if failure:
            pytest.fail(failure, pytrace=False)

    request.node.obj = report
    yield


class Launches:
    """Record the grid of every launch, then launch."""

    def __init__(self) -> None:
        self.grids: list[tuple[str, tuple[int, ...]]] = []

    def spy(self, name: str, kernel: Any) -> Any:
        launches = self

        class Spy:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
                launches.grids.append((name, grid))
                return kernel[grid]

        return Spy()

    def of(self, name: str) -> list[tuple[int, ...]]:
        return [grid for kernel, grid in self.grids if kernel == name]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorder = Launches()
    for module in (fused, low_rank, resampling, advancing, fork):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, recorder.spy(name, getattr(module, name)))
    yield recorder


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def keys_for(n: int, *, seed: int = 1234) -> Tensor:
    keys = reference.lane_keys(torch.full((n,), seed), reference.TOKEN_STREAM, torch.arange(n))
    return reference.at_position(keys, torch.full((n,), 5))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return ``x`` [N, V] as rows inside memory that is NaN elsewhere: a load outside a row shows."""
    n, vocab = x.shape
    if layout == "one row":
        return x[:1].expand(n, -1)
    row, first, step = {
        "contiguous": (vocab, 0, 1),
        "padded": (-(-vocab // 64) * 64, 0, 1),
        "odd stride": (vocab + 3, 0, 1),
        "odd start": (vocab + 8, 5, 1),
        "every other row": (vocab + 1, 1, 2),
    }[layout]
    memory = torch.full((n * step, row), NAN, dtype=x.dtype)
    view = memory[::step, first : first + vocab]
    view.copy_(x)
    return view


def exact(logits: Tensor, log_psi: Tensor | None, beta: float = 1.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    x = logits.double() * beta
    return x.logsumexp(-1), (x if log_psi is None else x + scale * log_psi.double()).logsumexp(-1)


#: Ten float32 roundings of the largest term; the interpreter has no fused multiply-add, which adds a
#: rounding of x log2(e) to each exponent.
CLOSE = {"rtol": 1.2e-6, "atol": 1e-5, "check_dtype": False, "equal_nan": True}


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == FP32
        torch.testing.assert_close(a, b, **CLOSE)


# The twisted softmax.


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_softmax_vocabularies(vocab: int, dtype: torch.dtype, launches: Launches) -> None:
    """One token, tails of any length, 151,936: the grid proves that Triton ran, in pieces for long rows."""
    logits = (10 * torch.randn(2, vocab, generator=generator(vocab))).to(dtype)
    log_psi = (3 * torch.randn(2, vocab, generator=generator(vocab + 1))).to(dtype)
    close(ops.twist_softmax(logits, log_psi, backend="triton"), exact(logits, log_psi))
    pieces = max(math.ceil(math.ceil(vocab / 4096) / 2), 1)
    assert launches.of("softmax_pieces_kernel") == [(2 * pieces,)]
    assert launches.of("softmax_merge_kernel") == ([(2,)] if pieces > 1 else [])
    assert pieces > 1 or vocab < 32_000


@pytest.mark.parametrize("types", [(BF16, BF16), (FP32, FP32), (FP32, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize(
    "layouts",
    [
        ("contiguous", "contiguous"),
        ("padded", "padded"),
        ("odd stride", "odd stride"),
        ("odd start", "odd start"),
        ("every other row", "every other row"),
        ("padded", "contiguous"),
        ("contiguous", "padded"),
        ("odd start", "odd stride"),
        ("one row", "odd start"),
    ],
    ids=" and ".join,
)
def test_softmax_rows_anywhere(layouts: tuple[str, str], types: tuple[torch.dtype, torch.dtype]) -> None:
    """Rows start anywhere in memory, both alike or not: every path of the aligned loads, with NaN on either side.

    9,001 entries are two full tiles and a tail; rows of 4,096 and 4,089 entries end at a tile's end when
    they begin at its start and in it, 5 entries have no full tile.
    """
    for vocab in (9_001, 4_096, 4_089, 5) if types == (BF16, BF16) else (4_089,):
        logits = laid_out((10 * torch.randn(5, vocab, generator=generator(1))).to(types[0]), layouts[0])
        log_psi = laid_out((3 * torch.randn(5, vocab, generator=generator(2))).to(types[1]), layouts[1])
        close(ops.twist_softmax(logits, log_psi, backend="triton"), exact(logits, log_psi))


@pytest.mark.parametrize("layout", ["contiguous", "odd stride", "odd start", "every other row"])
@pytest.mark.parametrize("vocab", [4_090, 4_096, 8_191, 8_192, 12_288])
def test_softmax_of_the_last_tokens(vocab: int, layout: str) -> None:
    """Nearly all mass on the last 7 entries, which lie in a tile more where a row begins in one, and on the first."""
    logits = torch.randn(5, vocab, generator=generator(1))
    logits[:, -7:] += 20
    logits[:, 0] += 18
    log_psi = torch.randn(5, vocab, generator=generator(2))
    logits, log_psi = laid_out(logits.to(BF16), layout), laid_out(log_psi.to(BF16), layout)
    close(ops.twist_softmax(logits, log_psi, backend="triton"), exact(logits, log_psi))


@pytest.mark.parametrize("sign", [-30.0, 30.0])
def test_softmax_of_saturated_logits(sign: float) -> None:
    """Logits and twists at +-30, all alike and against one another: no overflow, no lost terms."""
    signs = torch.where(torch.arange(10_000) % 3 == 0, -1.0, 1.0)
    logits = torch.stack([torch.full((10_000,), sign), sign * signs])
    log_psi = torch.stack([torch.full((10_000,), -sign), -sign * signs])
    for dtype in (BF16, FP32):
        arguments = logits.to(dtype), log_psi.to(dtype)
        close(ops.twist_softmax(*arguments, backend="triton"), exact(*arguments))


def test_softmax_far_from_zero() -> None:
    """Logits near +-20,000, where the exponential of a difference is all that float32 can hold."""
    logits = torch.randn(2, 5_000, generator=generator(3)) + torch.tensor([[2e4], [-2e4]])
    log_psi = torch.randn(2, 5_000, generator=generator(4))
    close(ops.twist_softmax(logits, log_psi, backend="triton"), exact(logits, log_psi))


def test_softmax_without_a_twist() -> None:
    """No twist is a twist of one: lse_psi is lse0, bit for bit."""
    logits = torch.randn(3, 40_000, generator=generator(5))
    lse0, lse_psi = ops.twist_softmax(logits, None, backend="triton")
    assert torch.equal(lse0, lse_psi)
    close((lse0, lse_psi), exact(logits, None))


def test_softmax_temperature_and_scale() -> None:
    """Each row has its own; a scale of zero is no twist even where log psi is -inf."""
    logits = torch.randn(4, 6_000, generator=generator(6))
    log_psi = torch.randn(4, 6_000, generator=generator(7))
    log_psi[3, ::2] = -INF
    beta, scale = torch.tensor([1.0, 0.5, 2.0, 1.0]), torch.tensor([0.3, 1.0, -2.0, 0.0])
    got = ops.twist_softmax(logits, log_psi, beta, scale, backend="triton")
    close(got, reference.twist_softmax(logits, log_psi, beta, scale))
    for i in range(3):
        close(tuple(x[i] for x in got), exact(logits[i], log_psi[i], float(beta[i]), float(scale[i])))
    assert got[0][3] == got[1][3]


def masked_rows(vocab: int) -> tuple[Tensor, Tensor]:
    """Rows that are, in order: partly masked, all but one (first, last), all, all by the twist, NaN, +inf."""
    logits = torch.randn(8, vocab, generator=generator(8))
    log_psi = torch.randn(8, vocab, generator=generator(9))
    logits[0, ::2] = -INF
    logits[1, 1:] = -INF
    logits[2, :-1] = -INF
    logits[3] = -INF
    log_psi[4] = -INF
    logits[5, 3] = NAN
    log_psi[6, 3] = INF
    logits[7, vocab // 2 :] = -INF  # whole tiles, and whole pieces of the longer rows
    return logits, log_psi


@pytest.mark.parametrize("vocab", [17, 9_001, 40_000])
def test_softmax_of_masked_rows(vocab: int) -> None:
    """-inf counts for nothing, no token left is -inf, NaN and +inf come through: as in the reference."""
    logits, log_psi = masked_rows(vocab)
    got = ops.twist_softmax(logits, log_psi, backend="triton")
    close(got, reference.twist_softmax(logits, log_psi))
    assert got[0][3] == got[1][3] == got[1][4] == -INF and got[0][4] > -INF
    assert got[0][5].isnan() and got[1][5].isnan() and got[1][6] == INF


def test_every_piece_of_the_softmax_counts() -> None:
    """One allowed token per row, a piece further each: a piece that did not run, or was not merged, gives -inf."""
    vocab = 40_000
    n_pieces, share = fused.pieces(5, vocab, fused.SOFTMAX_TILE, DEVICE)
    assert n_pieces == 5
    logits = torch.full((5, vocab), -INF)
    at = torch.arange(5) * share * fused.SOFTMAX_TILE + 100
    logits[torch.arange(5), at] = torch.arange(5.0)
    lse0, _ = ops.twist_softmax(logits, None, backend="triton")
    torch.testing.assert_close(lse0, torch.arange(5.0), **CLOSE)


def test_pieces_cover_the_row_and_fill_the_device() -> None:
    """A few rows of a long vocabulary go to more programs than there are processors, many rows to one each."""
    cpu = torch.device("cpu")
    for tile in (fused.SOFTMAX_TILE, fused.RACE_TILE):
        for rows in (0, 1, 2, 16, 256, 1024, 5000):
            for vocab in VOCABULARIES:
                n, share = fused.pieces(rows, vocab, tile, cpu)
                assert n * share * tile >= vocab > (n - 1) * share * tile
                assert n <= fused.most_pieces(vocab)
        assert 16 * fused.pieces(16, 151_936, tile, cpu)[0] > fused.processors(cpu)
        assert fused.pieces(5000, 151_936, tile, cpu)[0] == 1


# The draw.

uniforms_from = fused.counter_uniform


@triton.jit
def _uniforms(keys, out, n, TILE: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, TILE)
    tl.store(out + row * n + at, uniforms_from(tl.load(keys + row), at), mask=at < n)


def test_uniforms_are_the_references_bit_for_bit() -> None:
    """uint32 here, int32 there: wrap-around, logical shifts and conversion to float32 agree, at the extremes too."""
    keys = torch.cat([keys_for(60), torch.tensor([0, -1, 2**63 - 1, -(2**63), *TOP_KEYS])])
    n = 5_000
    out = torch.zeros(len(keys), n)
    _uniforms[(len(keys),)](keys, out, n, TILE=8192)
    assert torch.equal(out.view(torch.int32), reference.counter_uniforms(keys, n).view(torch.int32))
    assert out.max() == 1 - 2.0**-24


def draw_both(logits: Tensor, log_psi: Tensor | None, ancestors: Tensor | None, keys: Tensor, *more: Any) -> Tensor:
    """Draw with both backends, compare all three results, and return the tokens."""
    lse0, _ = reference.twist_softmax(logits, None, *more[:1])
    got = ops.twist_sample(logits, log_psi, lse0, ancestors, keys, *more, backend="triton")
    want = reference.twist_sample(logits, log_psi, lse0, ancestors, keys, *more)
    assert got[0].dtype == torch.int64 and torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return got[0]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_draw_vocabularies(vocab: int, dtype: torch.dtype, launches: Launches) -> None:
    """The same noise gives the same tokens as the reference, from the ancestors' rows; long rows race in pieces.

    Two scores within a rounding could swap: odds of 1e-5 in all these draws together.
    """
    logits = (4 * torch.randn(3, vocab, generator=generator(vocab))).to(dtype)
    log_psi = torch.randn(3, vocab, generator=generator(vocab + 1)).to(dtype)
    ancestors = torch.tensor([2, 0] if vocab > 100_000 else [2, 0, 0, 1, 1])
    draw_both(logits, log_psi, ancestors, keys_for(len(ancestors)))
    pieces = max(math.ceil(math.ceil(vocab / 2048) / 4), 1)
    assert launches.of("race_kernel") == [(len(ancestors) * pieces,)]
    assert launches.of("race_merge_kernel") == ([(len(ancestors),)] if pieces > 1 else [])
    assert pieces > 1 or vocab < 32_000


@pytest.mark.parametrize("layout", ["padded", "odd stride", "odd start", "every other row", "one row"])
def test_draw_rows_anywhere(layout: str) -> None:
    """Sliced and strided rows, between NaN, with and without ancestors and a twist."""
    logits = laid_out(torch.randn(6, 3_001, generator=generator(10)).to(BF16), layout)
    log_psi = laid_out(torch.randn(6, 3_001, generator=generator(11)), "odd stride")
    keys = keys_for(6)
    draw_both(logits, log_psi, None, keys)
    draw_both(logits, log_psi, torch.tensor([5, 5, 0, 1, 1, 3]), keys)
    draw_both(logits, None, torch.tensor([5, 5, 0, 1, 1, 3]), keys)


def test_draw_temperature_and_scale() -> None:
    """Those of the ancestor's row, not of the lane's; a scale of zero is no twist even where log psi is -inf."""
    logits = 2 * torch.randn(4, 500, generator=generator(12))
    log_psi = torch.randn(4, 500, generator=generator(13))
    log_psi[3, ::2] = -INF
    more = torch.tensor([1.0, 0.5, 2.0, 1.0]), torch.tensor([0.3, 1.0, -2.0, 0.0])
    draw_both(logits, log_psi, torch.tensor([3, 2, 1, 0]).repeat(10), keys_for(40), *more)


@pytest.mark.parametrize("level", [30.0, 300.0, 20_000.0])
def test_draw_from_saturated_logits(level: float) -> None:
    """Far from zero the bound that skips tiles has to allow for the scores' own rounding."""
    vocab = 9_001
    logits = level + torch.randn(12, vocab, generator=generator(14))
    logits[6:] -= 2 * level
    log_psi = torch.full((12, vocab), -level)
    draw_both(logits, log_psi, None, keys_for(12))
    draw_both(torch.full((1, vocab), level), None, torch.zeros(12).long(), keys_for(12))


@pytest.mark.parametrize("vocab", [17, 9_001, 40_000])
def test_draw_from_masked_rows(vocab: int) -> None:
    """The one token left is drawn; a row without any gives token 0; no row gives an index outside the vocabulary."""
    logits, log_psi = masked_rows(vocab)
    rows = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    token = draw_both(logits, log_psi, rows, keys_for(7))
    assert token[0] % 2 == 1 and token[6] < vocab // 2
    assert token[1:6].tolist() == [0, vocab - 1, 0, 0, 3]
    lse0 = torch.zeros(8)
    got, log_p, _ = ops.twist_sample(logits, log_psi, lse0, torch.tensor([3, 4, 5]), keys_for(3), backend="triton")
    assert got[:2].tolist() == [0, 0] and 0 <= int(got[2]) < vocab
    nothing = torch.full((1, vocab), NAN)
    got, _, _ = ops.twist_sample(nothing, None, torch.zeros(1), None, keys_for(1), backend="triton")
    assert got.tolist() == [0]


def test_forbidden_tokens_lose_to_the_worst_noise() -> None:
    """The smallest noise is finite: at -inf the allowed token would tie with forbidden ones."""
    logits = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    assert draw_both(logits, torch.zeros(2, 2), None, torch.tensor(TOP_KEYS)).tolist() == [0, 1]


def test_every_piece_of_the_race_counts() -> None:
    """A winner in each piece is found, in the first where two are equal."""
    vocab = 40_000
    n_pieces, share = fused.pieces(5, vocab, fused.RACE_TILE, DEVICE)
    assert n_pieces == 5
    logits = torch.zeros(5, vocab)
    at = torch.arange(5) * share * fused.RACE_TILE + 100
    logits[torch.arange(5), at] = 200.0
    assert torch.equal(draw_both(logits, None, None, keys_for(5)), at)


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Return Pearson's statistic and its 1 - 1e-4 quantile (Wilson & Hilferty 1931)."""
    expected = counts.sum() * probabilities.double()
    assert expected.min() >= 5  # below, the statistic has another law
    df = len(counts) - 1
    quantile = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), quantile


@triton.jit
def half_the_noise(u):
    return -0.5 * tl.log(-tl.log(1.0 - u))


@pytest.mark.parametrize("factors", [False, True], ids=["values", "factors"])
@pytest.mark.parametrize(
    ("tile", "broken"), [(2048, False), (16, False), (2048, True)], ids=["one piece", "four pieces", "broken sampler"]
)
def test_draws_follow_the_twisted_law(
    tile: int, broken: bool, factors: bool, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    """300 lanes on two rows against softmax(l + g) of their ancestor's; false alarm 1e-4 for each row.

    Refused: the untwisted law, the other row's, and the right one where the kernel's noise is halved.
    """
    if broken and GPU:
        pytest.skip("a kernel that is compiled keeps its noise")
    # The interpreter is quick with wide tiles, which a matrix product on the chip has no room for.
    monkeypatch.setattr(low_rank if factors else fused, "RACE_TILE", min(tile, 64) if factors and GPU else tile)
    monkeypatch.setattr(fused, "MIN_PIECE", 16)
    if broken:
        monkeypatch.setattr(fused, "_gumbel", half_the_noise)
    n, allowed = 300, torch.tensor([3, 14, 17, 33, 49])  # in each of four pieces of 16
    base = torch.tensor([[1.0, 0.0, -0.5, 0.4, -1.0], [-1.0, 0.5, 0.5, -0.5, 1.5]])
    twist = torch.tensor([[-2.0, 1.3, 0.8, -1.0, 1.6], [1.9, -1.1, 0.8, 0.5, -2.5]])
    logits, log_psi = torch.full((2, 50), -INF), torch.full((2, 50), 9.0)
    logits[:, allowed], log_psi[:, allowed] = base, twist
    ancestors = torch.arange(n) % 2
    given = reference.LowRank(torch.eye(2), log_psi.T.contiguous(), torch.zeros(50)) if factors else log_psi
    token, _, _ = ops.twist_sample(logits, given, torch.zeros(2), ancestors, keys_for(n), backend="triton")
    for row in (0, 1):
        counts = torch.bincount(token[ancestors == row], minlength=50)
        assert counts.sum() == counts[allowed].sum() == n // 2
        statistic, quantile = chi_square(counts[allowed].double(), (base + twist)[row].softmax(-1))
        assert (statistic > quantile) == broken
        for wrong in (base[row], (base + twist)[1 - row]):
            statistic, quantile = chi_square(counts[allowed].double(), wrong.softmax(-1))
            assert statistic > quantile
    blocks, kernel = (-(-n // low_rank.ROW_BLOCK), "low_rank_race_kernel") if factors else (n, "race_kernel")
    assert launches.of(kernel) == [(blocks * (1 if tile == 2048 else 4),)]


# Low-rank twists in factors.


def factors(n: int, vocab: int, rank: int, dtype: torch.dtype = FP32, seed: int = 20) -> reference.LowRank:
    z, up = (torch.randn(size, rank, generator=generator(seed + size)) for size in (n, vocab))
    return reference.LowRank(z.to(dtype), (up / rank**0.5).to(dtype), torch.randn(vocab, generator=generator(seed)))


def low_rank_both(
    logits: Tensor, twist: reference.LowRank, ancestors: Tensor | None, keys: Tensor, *more: Any
) -> Tensor:
    """Compare the log-sums and the draw with those of the values written out; return the tokens.

    Two scores within a rounding could swap: odds of 1e-4 in all these draws together.
    """
    lse = ops.twist_softmax(logits, twist, *more, backend="triton")
    close(lse, reference.twist_softmax(logits, twist.values(), *more))
    got = ops.twist_sample(logits, twist, lse[0], ancestors, keys, *more, backend="triton")
    want = reference.twist_sample(logits, twist.values(), lse[0], ancestors, keys, *more)
    assert torch.equal(got[0], want[0])
    close(got[1:], want[1:])
    parents = torch.arange(len(keys)) if ancestors is None else ancestors
    if not more:
        torch.testing.assert_close(twist.at(parents, got[0]), got[2], **CLOSE)
    return got[0]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("vocab", "rank"), [(1, 1), (17, 8), (200, 16), (1000, 64), (200, 100), (17, 128)])
def test_low_rank_vocabularies(vocab: int, rank: int, dtype: torch.dtype, launches: Launches) -> None:
    """Ranks and vocabularies with and without padding, two blocks of rows, the second with six."""
    n = 70
    logits = (4 * torch.randn(n, vocab, generator=generator(vocab))).to(dtype)
    low_rank_both(logits, factors(n, vocab, rank, dtype), torch.arange(n).flip(0) // 2, keys_for(n))
    assert launches.of("low_rank_softmax_kernel") == launches.of("low_rank_race_kernel") == [(2,)]
    assert launches.of("low_rank_merge_kernel") == [(n,)] and not launches.of("race_kernel")


@pytest.mark.parametrize("vocab", [32_000, 32_001])
def test_low_rank_in_pieces(vocab: int, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long vocabulary goes to four programs, whose results are merged; in wider tiles, for the interpreter."""
    if not GPU:
        monkeypatch.setattr(low_rank, "SOFTMAX_TILE", 2048)
        monkeypatch.setattr(low_rank, "RACE_TILE", 2048)
        monkeypatch.setattr(low_rank, "ROW_BLOCK", 4)
    logits = torch.randn(3, vocab, generator=generator(vocab))
    low_rank_both(logits, factors(3, vocab, 64), torch.tensor([2, 0, 0, 1, 1]), keys_for(5))
    assert launches.of("low_rank_softmax_kernel") == [(4,)] and launches.of("softmax_merge_kernel") == [(3,)]
    assert launches.of("low_rank_race_kernel") == [(4 * -(-5 // low_rank.ROW_BLOCK),)]


def test_low_rank_rows_anywhere() -> None:
    """Strided factors and logits between NaN, rows out of a batch, temperatures and scales; zero is no twist."""
    n, vocab = 6, 300
    logits = laid_out(torch.randn(9, vocab, generator=generator(21)), "odd start")
    z, up, bias = factors(n, vocab, 20)
    twist = reference.LowRank(laid_out(z, "every other row"), laid_out(up, "odd start"), bias)
    low_rank_both(logits[:n], twist, None, keys_for(n))
    more = torch.linspace(0.5, 2, n), torch.tensor([0.0, 1.0, -2.0, 0.3, 1.0, 0.0]), torch.tensor([8, 1, 0, 3, 3, 7])
    low_rank_both(logits, twist, torch.tensor([5, 5, 0, 1, 1, 3, 2, 4]), keys_for(8), *more)


def test_low_rank_masked_rows() -> None:
    """-inf counts for nothing and is not drawn; a row without a token gives token 0; NaN stays in its row."""
    logits, _ = masked_rows(1000)
    z, up, bias = factors(8, 1000, 8)
    twist = reference.LowRank(torch.where(torch.arange(8)[:, None] == 6, NAN, z), up, bias)
    got = ops.twist_softmax(logits, twist, backend="triton")
    close(got, reference.twist_softmax(logits, twist))
    assert got[0][3] == got[1][3] == -INF and got[1][6].isnan() and got[0][6].isfinite()
    rows = torch.tensor([0, 1, 2, 3, 7])
    token, *_ = ops.twist_sample(logits, twist, got[0], rows, keys_for(5), backend="triton")
    assert torch.equal(token, reference.twist_sample(logits, twist, got[0], rows, keys_for(5))[0])
    assert token[0] % 2 == 1 and token[1:4].tolist() == [0, 999, 0] and token[4] < 500


def test_low_rank_factors_are_checked() -> None:
    """Factors that do not fit each other or the kernels are refused; an empty batch is none of that."""
    logits, twist = torch.zeros(2, 4), factors(2, 4, 3)
    for changes, message in (
        ({"up": torch.zeros(5, 3)}, r"`log_psi.up` must be .* \[4, any\] .* got float32 \[5, 3\]"),
        ({"z": torch.zeros(2, 2)}, r"`log_psi.z` must be float32 \[2, 3\] .* got float32 \[2, 2\]"),
        ({"z": twist.z.bfloat16()}, r"`log_psi.z` must be float32 .* got bfloat16"),
        ({"bias": torch.zeros(3)}, r"`log_psi.bias` must be .* \[4\] .* got float32 \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.twist_softmax(logits, twist._replace(**changes))
    with pytest.raises(ValueError, match="`log_psi.up` must have a rank of at most 128 for Triton, got 129: pass"):
        ops.twist_softmax(logits, factors(2, 4, 129), backend="triton")
    empty = factors(0, 4, 3)
    assert ops.twist_softmax(logits[:0], empty, backend="triton")[0].shape == (0,)


def test_factors_are_kept_where_they_are_fewer_bytes() -> None:
    """From ``FUSED_ROWS`` on, at ranks up to 96, for the kernels alone; not where that was measured to be slower."""
    cpu, rows = torch.device("cpu"), ops.FUSED_ROWS
    assert ops.keeps_factors(rows, 64, DEVICE, "triton") and ops.keeps_factors(rows, 96, DEVICE, "triton")
    assert not ops.keeps_factors(rows - 1, 64, DEVICE, "triton") and not ops.keeps_factors(rows, 97, DEVICE, "triton")
    assert not ops.keeps_factors(rows, 64, cpu) and not ops.keeps_factors(rows, 64, cpu, "torch")
    assert not any(ops.keeps_factors(measured, 64, DEVICE, "triton") for measured in (16, 64, 256, 512))


# Resampling.


def groups(g: int, k: int, seed: int) -> list[Tensor]:
    """Groups with schemes, thresholds, permissions and live lanes of their own, some lanes without weight."""
    random = generator(seed)
    log_w = 3 * torch.rand(g, 1, generator=random) * torch.randn(g, k, generator=random) - 500
    log_w[torch.rand(g, k, generator=random) < 0.1] = -INF
    live = torch.rand(g, k, generator=random) < torch.rand(g, 1, generator=random) * 1.5
    allowed = torch.rand(g, generator=random) < 0.8
    thresholds = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64).repeat_interleave(g // 4)
    return [log_w, live, allowed, thresholds, torch.arange(g) % 4, torch.rand(g, k, generator=random)]


def resample_both(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Resample with both backends and compare: ancestors exactly, values to one rounding of their type.

    For an ESS in float64 that is one of the log-sums it is made from, near 1,000.
    """
    got = ops.resample(*arguments, backend="triton")
    want = reference.resample(*arguments)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1.2e-7 if a.dtype == FP32 else 1e-12, atol=0, equal_nan=True)
    return got


@pytest.mark.parametrize("k", [1, 2, 3, 5, 32, 33, 64, 100, 1000, 1024])
def test_resample_equals_the_reference(k: int, launches: Launches) -> None:
    """All schemes at once, any live subset, K of all sizes, one launch."""
    g = 16
    arguments = groups(g, k, seed=k)
    *_, resampled = resample_both(*arguments)
    assert launches.grids == [("resample_kernel", (g,))]
    assert not resampled.all() and (k < 3 or resampled.any())


@pytest.mark.parametrize("k", [1, 2, 3, 33, 100])
def test_resample_around_a_pinned_lane(k: int) -> None:
    """Multinomial and residual groups, pinned or not, lane 0 live or not, weightless or not."""
    log_w, live, allowed, thresholds, schemes, uniforms = groups(32, k, seed=k)
    schemes = 2 + schemes % 2
    pinned = torch.rand(32, generator=generator(5)) < 0.7
    ancestors, *_ = resample_both(log_w, live, allowed, thresholds, schemes, uniforms, pinned)
    assert (ancestors[pinned, 0] == 0).all()
    others = reference.resample(log_w, live, allowed, thresholds, schemes, uniforms)[0]
    # With two lanes it depends on the numbers, which are others on a GPU, whether a pin shows.
    assert k == 1 or (GPU and k == 2) or (ancestors != others).any()
    assert torch.equal(ancestors[~pinned], others[~pinned])


def test_resample_types_and_strides() -> None:
    """float64 weights keep their type and precision; rows may be slices, and one row may serve all groups."""
    log_w, live, allowed, thresholds, schemes, uniforms = groups(16, 24, seed=1)
    got = resample_both(log_w.double(), live, allowed, thresholds.float(), schemes, uniforms.double())
    assert got[1].dtype == got[2].dtype == torch.float64
    cut = slice(3, 20)
    resample_both(log_w[:, cut], live[:, cut], allowed, thresholds, schemes, uniforms[:1, cut].expand(16, -1))
    resample_both(log_w[:, ::2], live[:, ::2], allowed, thresholds, schemes, uniforms[:, ::2])


def ask(log_w: Tensor, u: float, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Resample one population by each scheme with all uniforms at ``u``."""
    log_w = log_w.expand(4, -1)
    live = torch.ones_like(log_w, dtype=torch.bool) if live is None else live.expand(4, -1)
    uniforms = torch.full(log_w.shape, u)
    return ops.resample(log_w, live, torch.ones(4).bool(), torch.ones(4), torch.arange(4), uniforms, backend="triton")


@pytest.mark.parametrize("u", [0.0, 2.0**-33, 0.5, 1 - 2.0**-24, 1.0])
def test_weightless_lanes_have_no_children(u: float) -> None:
    """Points at both ends of the range, with zero weights at both ends and in between."""
    log_w = torch.tensor([-INF, 0.0, -INF, -INF, 1.0, -30.0, -INF])
    ancestors, new, _, resampled = ask(log_w, u)
    assert resampled.all() and (log_w[ancestors] > -INF).all()
    torch.testing.assert_close(new, torch.full((4, 7), float(log_w.logsumexp(0)) - math.log(7)))


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2.0**-24, 1.0])
def test_float32_cumulative_sum_below_one(u: float) -> None:
    """A float32 sum that ends below the last point must not spill into the weightless tail, nor into gaps."""
    log_w = torch.full((1024,), -INF)
    log_w[:1000] = torch.sin(4 * torch.arange(1000.0))
    log_w[1:1000:3] = -INF
    ancestors, _, _, resampled = ask(log_w, u)
    assert resampled.all() and (log_w[ancestors] > -INF).all()


@pytest.mark.parametrize("bad", [[-INF, -INF, -INF], [0.0, NAN, 1.0], [0.0, INF, 1.0]])
def test_weights_that_cannot_be_normalised(bad: list[float]) -> None:
    """The group is left alone and says so by an ESS of NaN; the same lanes not live do not matter."""
    ancestors, new, size, resampled = ask(torch.tensor(bad), 0.5)
    assert not resampled.any() and size.isnan().all() and torch.equal(ancestors, torch.arange(3).expand(4, -1))
    torch.testing.assert_close(new, torch.tensor(bad).expand(4, -1), equal_nan=True)
    live = torch.tensor([True] * 2 + [False] * 3)
    ancestors, new, size, resampled = ask(torch.tensor([0.0, 0.0, *bad]), 0.5, live)
    assert resampled.all() and (size == 2).all() and (new[:, :2] == 0).all()
    assert torch.equal(ancestors[:, 2:], torch.arange(2, 5).expand(4, -1))


def test_equal_weights_copy_nothing() -> None:
    """Low-variance schemes keep everyone, whatever the round-off of 1/K."""
    for k in (2, 3, 49, 1000):
        ancestors, _, size, _ = ask(torch.full((k,), -1.7), 0.5)
        for scheme in (reference.SYSTEMATIC, reference.STRATIFIED, reference.RESIDUAL):
            assert torch.equal(ancestors[scheme], torch.arange(k))
        torch.testing.assert_close(size, torch.full((4,), float(k)))


def test_no_live_lane() -> None:
    """And one: nothing to choose from."""
    for live in ([False] * 3, [False, True, False]):
        ancestors, new, _, resampled = ask(torch.zeros(3), 0.9, torch.tensor(live))
        assert not resampled.any() and (new == 0).all() and torch.equal(ancestors, torch.arange(3).expand(4, -1))


# The bookkeeping of a step.


def population(seed: int, k: int, g: int = 9, stops: int = 2) -> tuple[reference.Lanes, reference.Groups, Tensor]:
    """Return lanes in 2 g k slots, g groups and a batch: with ended lanes, absent ones and empty places.

    Group 0 is all there; 1 has an ended lane in the batch, 2 one outside; 3 is partly elsewhere; 4 has lanes yet to
    come; 5 lanes out of step; 6 is at its first token and 7 at its last; 8 has lost its lane 0 for good.
    """
    random, size = generator(seed), 2 * g * k

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    lanes = reference.Lanes(
        log_w=(6 * uniform(size) - 300).double(),
        log_p=(-50 * uniform(size)).double(),
        log_psi=uniform(size) - 0.5,
        position=torch.full((size,), 7, dtype=torch.int32),
        last=torch.full((size,), 12, dtype=torch.int32),
        ended=torch.zeros(size, dtype=torch.bool),
        keys=keys_for(size, seed=seed),
        stops=torch.randint(-1, 30, (size, stops), generator=random, dtype=torch.int32),
    )
    members = torch.randperm(size, generator=random)[: g * k].reshape(g, k).int()
    sizes = torch.full((g,), k, dtype=torch.int32)
    slots = members.long()
    batch = torch.ones(g, k, dtype=torch.bool)
    lanes.ended[slots[1:3, -1]] = True
    batch[2, -1] = batch[3, k // 2] = False
    sizes[4] += 1
    lanes.position[slots[5, 0]] += 1
    lanes.position[slots[6]], lanes.position[slots[7]] = 0, 11
    members[8, 0], batch[8, 0] = -1, False
    sizes[8] -= 1
    rows = torch.full((size,), -1, dtype=torch.int32)
    here = slots[batch]
    rows[here[torch.randperm(len(here), generator=random)]] = torch.arange(len(here), dtype=torch.int32)
    thresholds = torch.tensor([1.0, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9], dtype=torch.float64)
    pinned = torch.rand(g, generator=random) < 0.5 if seed % 2 else None
    keys, began = keys_for(g, seed=seed + 1), torch.full((g,), k + 1, dtype=torch.int32)
    where = torch.randperm(g + 2, generator=random)[:g].int()
    groups = reference.Groups(members, sizes, thresholds, torch.arange(g) % 4, keys, began, where, pinned)
    return lanes, groups, rows


def copied(state: Any) -> Any:
    return type(state)(*(x.clone() for x in state))


def no_totals(rows: int) -> reference.Totals:
    nothing = torch.full((rows,), -INF, dtype=torch.float64)
    return reference.Totals(nothing, nothing.clone(), torch.zeros(rows, dtype=torch.int32))


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 16, 33, 200])
def test_advance_and_settle_equal_the_reference(k: int, gains: bool, launches: Launches) -> None:
    """Groups in every state at once, any slots, rows in any order; who resampled and who could not."""
    lanes, groups, row_of = population(k, k)
    slots = row_of.argsort()[-int((row_of >= 0).sum()) :]
    count, random = len(slots), generator(k)
    assert torch.equal(row_of[slots], torch.arange(count, dtype=torch.int32))
    lse0, lse_psi = 3 * torch.randn(2, count, generator=random)
    token = torch.randint(0, 30, (count,), generator=random)
    log_p, log_psi = torch.randn(2, count, generator=random)
    log_psi[:3] = torch.tensor([INF, -INF, NAN])[:count]
    gain = torch.randn(count, generator=random) if gains else None
    totals = no_totals(11)
    totals.left[groups.rows[:4]] = torch.tensor([-298.0, -INF, -310.0, 0.0], dtype=torch.float64)
    totals.num_resamplings[:] = torch.arange(11)
    outcome = {}
    for backend in ("triton", "torch"):
        state, sums = copied(lanes), copied(totals)
        moved = ops.advance(state, groups, row_of, lse0, lse_psi, backend=backend)
        report = ops.settle(state, groups, sums, row_of, moved, token, log_p, log_psi, gain, backend=backend)
        outcome[backend] = state, moved, sums, report
    for mine, theirs in zip(outcome["triton"][:3], outcome["torch"][:3], strict=True):
        for name, a, b in zip(mine._fields, mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(outcome["triton"][3], outcome["torch"][3], rtol=1e-12, atol=0)
    assert launches.grids == [("advance_kernel", (9,)), ("settle_kernel", (9,))]

    state, moved, sums, report = outcome["triton"]
    fired = {g for g in range(9) if any(moved.resampled[row_of[s]] for s in groups.members[g] if s >= 0 <= row_of[s])}
    assert fired <= {0, 1, 2, 8} and (k < 5 or {0, 2} <= fired)
    ended = lanes.ended[slots]
    rows = torch.arange(count)
    assert torch.equal(moved.ancestors[ended], rows[ended]) and not ended[moved.ancestors[~ended]].any()
    for name in ("log_w", "log_p", "log_psi", "position"):
        untouched = torch.ones(len(row_of), dtype=torch.bool)
        untouched[slots[~ended]] = False
        assert torch.equal(getattr(state, name)[untouched], getattr(lanes, name)[untouched]), name
    assert (state.position[slots[~ended]] == lanes.position[slots[~ended]] + 1).all()
    assert state.log_psi.isfinite().all()
    stopped = (lanes.stops[slots] == token[:, None]).any(-1) | (lanes.position[slots] == 11)
    assert torch.equal(state.ended[slots], ended | stopped)
    for g, (members, at) in enumerate(zip(groups.members, groups.rows, strict=True)):
        own = members[members >= 0].long()
        inside = row_of[own[row_of[own] >= 0]].long()
        weights = torch.cat([state.log_w[own], totals.left[at, None]])
        if len(inside):
            expected = weights.logsumexp(0) - math.log(k + 1)
            torch.testing.assert_close(sums.log_z[at], expected, rtol=1e-12, atol=0)
        else:
            assert sums.log_z[at] == totals.log_z[at]
        assert sums.num_resamplings[at] == totals.num_resamplings[at] + (g in fired)
        assert (report[5, inside] == sums.log_z[at]).all() and (report[6, inside] == sums.num_resamplings[at]).all()
    assert torch.equal(sums.left, totals.left)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("weights", "left", "log_z"),
    [
        ([-INF, -INF], -INF, -INF),
        ([-INF, -INF], -3.0, -3.0 - math.log(2)),
        ([-INF, 800.0], -INF, 800.0 - math.log(2)),
        ([0.0, NAN], 0.0, NAN),
        ([0.0, INF], 0.0, INF),
    ],
)
def test_log_z_of_weights_at_the_edge(weights: list[float], left: float, log_z: float, backend: str) -> None:
    lanes, groups, _ = population(1, 2)
    totals = no_totals(11)
    lanes.log_w[groups.members[0].long()] = torch.tensor(weights, dtype=torch.float64)
    lanes.log_psi[:] = 0
    totals.left[groups.rows[0]] = left
    row_of = torch.full_like(lanes.last, -1)
    row_of[groups.members[0].long()] = torch.arange(2, dtype=torch.int32)
    groups = groups._replace(particles=torch.full_like(groups.sizes, 2), thresholds=torch.zeros_like(groups.thresholds))
    zeros = torch.zeros(2)
    moved = ops.advance(lanes, groups, row_of, zeros, zeros, backend=backend)
    ops.settle(lanes, groups, totals, row_of, moved, zeros.long(), zeros, zeros, backend=backend)
    assert totals.log_z[groups.rows[0]].item() == pytest.approx(log_z, rel=1e-12, nan_ok=True)


def test_advance_keeps_the_mean_weight_of_a_group() -> None:
    """Resampling leaves the sum of a group's weights as it was, which is what makes Z-hat unbiased."""
    lanes, groups, row_of = population(3, 16)
    count = int((row_of >= 0).sum())
    lse = torch.randn(2, count, generator=generator(3))
    slots = groups.members[0].long()
    moved_to = lanes.log_w[slots] + (lse[1] - lse[0])[row_of[slots].long()] - lanes.log_psi[slots]
    ops.advance(lanes, groups, row_of, *lse, backend="triton")
    assert len(lanes.log_w[slots].unique()) == 1
    torch.testing.assert_close(lanes.log_w[slots].logsumexp(0), moved_to.logsumexp(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "odd stride", "odd start"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_out_of_a_batch(layout: str, dtype: torch.dtype) -> None:
    """Lanes' rows are read where they are in the batch: the same as from rows gathered before."""
    vocab, rows = 9_001, torch.tensor([5, 0, 3])
    logits = laid_out((3 * torch.randn(7, vocab, generator=generator(21))).to(dtype), layout)
    log_psi = torch.randn(3, vocab, generator=generator(22)).to(dtype)
    beta, scale = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.3])
    got = ops.twist_softmax(logits, log_psi, beta, scale, rows, backend="triton")
    want = reference.twist_softmax(logits[rows], log_psi, beta, scale)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    ancestors = torch.tensor([2, 2, 0, 1])
    for backend in ("triton", "torch"):
        drawn = ops.twist_sample(logits, log_psi, want[0], ancestors, keys_for(4), beta, scale, rows, backend=backend)
        expected = reference.twist_sample(logits[rows], log_psi, want[0], ancestors, keys_for(4), beta, scale)
        for a, b in zip(drawn, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


# Forks.


def forked(seed: int, lanes: int = 6, rows: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, ancestors (lane 1 to lanes 0 and 4, lane 5 to lane 3), first and computed."""
    order = torch.randperm(rows, generator=generator(seed))[:lanes].int()
    ancestors = torch.tensor([1, 1, 2, 5, 1, 5])
    first = torch.tensor([40, 40, 7, 0, 40, 0])
    computed = torch.tensor([77, 77, 9, 64, 77, 64])
    return order, ancestors, first, computed


def test_fork_rows_equals_the_reference(launches: Launches) -> None:
    """Tables of two block sizes and a token history at once; survivors and rows that are no lane's stay."""
    rows, ancestors, first, computed = forked(0)
    sizes = torch.tensor([16, 32, 1], dtype=torch.int32)
    tables = [torch.randint(1000, (9, width), dtype=torch.int32, generator=generator(width)) for width in (10, 5, 4000)]
    tables[1] = torch.cat([tables[1]] * 2, dim=1)[:, 3:8]  # a slice of wider rows
    want, got = [t.clone() for t in tables], [t.clone() for t in tables]
    reference.fork_rows(want, sizes, rows, ancestors, first, computed)
    ops.fork_rows(got, sizes, rows, ancestors, first, computed, pointers=ops.row_pointers(got), backend="triton")
    for a, b, before in zip(got, want, tables, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, before)
    child, parent = int(rows[0]), int(rows[1])
    assert torch.equal(got[0][child, 2:4], got[0][parent, 2:4])  # blocks 2 and 3 hold tokens 32..63
    assert torch.equal(got[0][child, 4:], tables[0][child, 4:])  # the partial block stays the child's
    assert torch.equal(got[2][child, 40:77], got[2][parent, 40:77])
    assert torch.equal(got[2][child, 77:], tables[2][child, 77:]) and torch.equal(
        got[2][child, :40], tables[2][child, :40]
    )
    assert launches.grids == [("fork_rows_kernel", (6, 3))]


def kv_caches(layout: str, blocks: int = 12) -> list[Tensor]:
    """Three layers of a KV cache, blocks of 4 tokens, in the layouts that vLLM allocates."""
    shape = (2, 4, 3, 8)  # key and value, tokens, heads, width
    random = generator(3)

    def numbers(*size: int) -> Tensor:
        return torch.randint(-100, 100, size, generator=random).to(BF16)

    if layout == "block first":
        return [numbers(blocks, *shape) for _ in range(3)]
    if layout == "key and value planes":
        return [numbers(2, blocks, *shape[1:]).transpose(0, 1) for _ in range(3)]
    if layout == "heads before tokens":
        return [numbers(blocks, 2, 3, 4, 8).permute(0, 1, 3, 2, 4) for _ in range(3)]
    if layout == "layers in one block":
        whole = numbers(blocks, 3, *shape)
        return [whole[:, i] for i in range(3)]
    if layout == "padded blocks":
        return [numbers(blocks, 500)[:, :192].view(blocks, *shape) for _ in range(3)]
    if layout == "layers that share memory":
        cache = numbers(blocks, *shape)
        return [cache, cache.view(blocks, 2, 4, 24), numbers(blocks, *shape)]
    if layout == "two kernel blocks to one":
        return [numbers(2 * blocks, 2, 2, 3, 8) for _ in range(3)]
    if layout == "two kernel blocks to one, in planes":
        return [numbers(2, 2 * blocks, 2, 3, 8).transpose(0, 1) for _ in range(3)]
    if layout == "odd bytes":
        return [torch.randint(0, 255, (blocks, 4, 77), dtype=torch.uint8, generator=random) for _ in range(3)]
    assert layout == "flattened latent"
    return [numbers(blocks, 4, 40) for _ in range(3)]


LAYOUTS = [
    "block first",
    "key and value planes",
    "heads before tokens",
    "layers in one block",
    "padded blocks",
    "layers that share memory",
    "two kernel blocks to one",
    "two kernel blocks to one, in planes",
    "odd bytes",
    "flattened latent",
]


def clones(caches: list[Tensor]) -> list[Tensor]:
    """Copy caches with their strides and whatever they share."""
    storages = {}
    for cache in caches:
        storage = cache.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.clone())
    return [
        torch.empty(0, dtype=c.dtype).set_(
            storages[c.untyped_storage().data_ptr()], c.storage_offset(), c.shape, c.stride()
        )
        for c in caches
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_partial_blocks(layout: str, launches: Launches) -> None:
    """Every KV layout, against the reference and vLLM's own block copy; full blocks and survivors' stay."""
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    caches, blocks = kv_caches(layout), 12
    rows, ancestors, _, _ = forked(1)
    computed = torch.tensor([7, 7, 6, 8, 7, 8])  # lane 3's parent ends at a block boundary: nothing to copy
    table = torch.zeros(9, 3, dtype=torch.int32)
    table[rows.long(), 0] = 11
    table[rows.long(), 1] = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int32)
    table[rows.long(), 2] = 10
    arguments = [table], torch.tensor([4], dtype=torch.int32), rows, ancestors, computed
    got, want, upstream = clones(caches), clones(caches), clones(caches)
    ops.copy_partial_blocks(got, blocks, *arguments, backend="triton")
    reference.copy_partial_blocks(want, blocks, *arguments)
    copy_kv_cache_blocks_inplace(upstream, blocks, [(2, 1), (2, 5)])
    for a, b, c, before in zip(got, want, upstream, caches, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a, before)
    (grid,) = launches.of("copy_partial_blocks_kernel")
    segments, aligned = ops.block_segments(got, blocks)
    assert grid == (6 * len(segments), 1)
    runs = {
        "key and value planes": 6,
        "two kernel blocks to one, in planes": 6,
        "layers in one block": 1,
        "layers that share memory": 2,
    }
    assert len(segments) == runs.get(layout, 3)
    assert aligned == (layout not in ("odd bytes", "padded blocks"))


def test_copy_partial_blocks_of_two_tables() -> None:
    """Groups of layers with block sizes of their own; more work than one program per run; a long run."""
    caches = [torch.randn(20, 5_000, generator=generator(i)) for i in range(2)]
    rows, ancestors, _, _ = forked(2)
    computed = torch.tensor([37, 37, 6, 48, 37, 48])
    tables = [torch.zeros(9, width, dtype=torch.int32) for width in (4, 2)]
    tables[0][rows.long()] = torch.arange(24, dtype=torch.int32).reshape(6, 4) % 10
    tables[1][rows.long()] = 10 + torch.arange(12, dtype=torch.int32).reshape(6, 2) % 10
    # The partial blocks: column 37 // 16 = 2 of the one, 37 // 32 = 1 of the other; 48 is partial in the second alone.
    for table, column in zip(tables, (2, 1), strict=True):
        table[rows.long(), column] = torch.arange(6, dtype=torch.int32) + (0 if column == 2 else 10)
    arguments = tables, torch.tensor([16, 32]), rows, ancestors, computed
    got, want = clones(caches), clones(caches)
    pointers, segments = ops.row_pointers(tables), ops.block_segments(got, 20)
    ops.copy_partial_blocks(got, 20, *arguments, pointers=pointers, segments=segments, backend="triton")
    reference.copy_partial_blocks(want, 20, *arguments)
    for a, b, before in zip(got, want, caches, strict=True):
        assert torch.equal(a, b)
        changed = (a != before).any(1).nonzero()[:, 0].tolist()
        assert changed == [0, 4, 10, 13, 14]


# The public functions.


@pytest.mark.skipif(GPU, reason="its kernels run on the CPU, under the interpreter")
def test_auto_takes_pytorch_off_the_gpu(launches: Launches) -> None:
    """And "torch" does; only "triton" launches anything."""
    logits = torch.randn(2, 10, generator=generator(17))
    for backend, count in (("auto", 0), ("torch", 0), ("triton", 1)):
        lse0, _ = ops.twist_softmax(logits, None, backend=backend)
        ops.twist_sample(logits, None, lse0, None, keys_for(2), backend=backend)
        ops.resample(*groups(4, 3, seed=0), backend=backend)
        names = ["softmax_pieces_kernel", "race_kernel", "resample_kernel"] * count
        assert [name for name, _ in launches.grids] == names


def test_empty_batches() -> None:
    """No rows, groups or lanes: nothing is launched, and the results are empty."""
    empty = torch.zeros(0, dtype=torch.int64)
    assert ops.twist_softmax(torch.zeros(0, 5), None, backend="triton")[0].shape == (0,)
    token, *_ = ops.twist_sample(torch.zeros(0, 5), None, torch.zeros(0), None, empty, backend="triton")
    assert token.shape == (0,)
    flags, reals = torch.zeros(0, 3).bool(), torch.zeros(0, 3)
    assert ops.resample(reals, flags, flags[:, 0], reals[:, 0], empty, reals, backend="triton")[0].shape == (0, 3)
    ops.fork_rows([], empty, empty, empty, empty, empty, backend="triton")
    ops.copy_partial_blocks([], 4, [], empty, empty, empty, empty, backend="triton")


def test_one_step_on_both_backends() -> None:
    """Weigh, resample, fork and draw: the same tokens, weights and histories, three times over."""
    k, vocab = 8, 300
    states = {}
    for backend in ("triton", "torch"):
        random, log_w, last = generator(18), torch.zeros(1, k), torch.zeros(k)
        history = torch.zeros(k, 16, dtype=torch.int32)
        lanes, zeros = torch.arange(k), torch.zeros(k, dtype=torch.int64)
        for step in range(3):
            logits, log_psi = (2 * torch.randn(k, vocab, generator=random) for _ in range(2))
            lse0, lse_psi = ops.twist_softmax(logits, log_psi, backend=backend)
            log_w = log_w + (lse_psi - lse0 - last)
            keys = reference.at_position(keys_for(k, seed=9), torch.full((k,), step))
            uniforms = reference.counter_uniforms(keys[:1], k)
            ones = torch.ones(1)
            ancestors, log_w, _, _ = ops.resample(
                log_w, ones.bool().expand(1, k), ones.bool(), 2 * ones, zeros[:1], uniforms, backend=backend
            )
            ancestors = ancestors[0]
            ops.fork_rows(
                [history], torch.ones(1).int(), lanes, ancestors, zeros, torch.full((k,), step), backend=backend
            )
            token, _, last = ops.twist_sample(logits, log_psi, lse0, ancestors, keys, backend=backend)
            history[:, step] = token.int()
        states[backend] = history, log_w
    assert torch.equal(states["triton"][0], states["torch"][0])
    torch.testing.assert_close(states["triton"][1], states["torch"][1])
    assert len(states["torch"][0][:, 0].unique()) < k  # it did fork


def softmax_call(**changes: Any) -> None:
    arguments = {"logits": torch.zeros(2, 4), "log_psi": torch.zeros(2, 4), **changes}
    ops.twist_softmax(**arguments)


def sample_call(**changes: Any) -> None:
    arguments = {"lse0": torch.zeros(2), "ancestors": torch.zeros(3).long(), "keys": keys_for(3), **changes}
    ops.twist_sample(torch.zeros(2, 4), None, **arguments)


def resample_call(**changes: Any) -> None:
    names = ("log_w", "live", "allowed", "thresholds", "schemes", "uniforms")
    ops.resample(**{**dict(zip(names, groups(4, 3, seed=0), strict=True)), **changes})


def advance_call(**changes: Any) -> None:
    lanes, groups, row_of = population(0, 3)
    count = int((row_of >= 0).sum())
    lanes = lanes._replace(**{name: changes.pop(name) for name in list(changes) if name in lanes._fields})
    groups = groups._replace(**{name: changes.pop(name) for name in list(changes) if name in groups._fields})
    ops.advance(
        lanes, groups, **{"row_of": row_of, "lse0": torch.zeros(count), "lse_psi": torch.zeros(count), **changes}
    )


def fork_call(**changes: Any) -> None:
    rows, ancestors, first, computed = forked(0)
    arguments = {"tables": [torch.zeros(9, 80).int()], "block_sizes": torch.ones(1).int(), "rows": rows, **changes}
    ops.fork_rows(**{"ancestors": ancestors, "first": first, "computed": computed, **arguments})


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (softmax_call, {"backend": "cuda"}, r"`backend` must be one of auto, triton, torch, got 'cuda': pass one"),
        (
            softmax_call,
            {"logits": torch.zeros(4)},
            r"`logits` must be bfloat16 or float16 or float32 \[any, any\] on cpu, dense .*, got float32 \[4\] on cpu",
        ),
        (softmax_call, {"logits": torch.zeros(2, 4).double()}, "`logits` must be .*, got float64"),
        (softmax_call, {"logits": torch.zeros(4, 2).T}, r"`logits` must be .* with strides \[1, 2\]: pass one row"),
        (softmax_call, {"logits": torch.zeros(2, 0)}, "`logits` must hold at least one token, got a vocabulary of 0"),
        (
            softmax_call,
            {"log_psi": torch.zeros(2, 5)},
            r"`log_psi` must be .* \[2, 4\] .* got float32 \[2, 5\] .*: pass",
        ),
        (softmax_call, {"inverse_temperature": torch.ones(3)}, r"`inverse_temperature` must be float32 \[2\] .* \[3\]"),
        (softmax_call, {"scale": torch.ones(2).double()}, r"`scale` must be float32 \[2\] on cpu, got float64 \[2\]"),
        (softmax_call, {"log_psi": torch.zeros(2, 4, device="meta")}, "`log_psi` must be .* on cpu, .* on meta: pass"),
        (sample_call, {"lse0": torch.zeros(3)}, r"`lse0` must be float32 \[2\] .*: pass what twist_softmax returned"),
        (sample_call, {"keys": torch.zeros(3)}, r"`keys` must be int64 \[any\] .* got float32 \[3\] .*: pass one key"),
        (sample_call, {"ancestors": None}, r"`keys` must be int64 \[2\] on cpu, got int64 \[3\]"),
        (sample_call, {"ancestors": torch.zeros(2).long()}, r"`ancestors` must be int64 \[3\] .*: pass one row index"),
        (
            resample_call,
            {"log_w": torch.zeros(3)},
            r"`log_w` must be float32 or float64 \[any, any\] .* got float32 \[3\]",
        ),
        (
            resample_call,
            {"log_w": torch.zeros(4, 0)},
            r"`log_w` must hold at least one lane per group, got K = 0: pass",
        ),
        (
            resample_call,
            {"live": torch.ones(4, 3)},
            r"`live` must be bool \[4, 3\] .* got float32 \[4, 3\] .*: pass a mask",
        ),
        (resample_call, {"allowed": torch.ones(3).bool()}, r"`allowed` must be bool \[4\] .*: pass one flag"),
        (resample_call, {"thresholds": torch.ones(4).int()}, "`thresholds` must be float32 or float64 .* got int32"),
        (resample_call, {"schemes": torch.ones(4)}, r"`schemes` must be int64 \[4\] .*: pass one code"),
        (resample_call, {"pinned": torch.ones(3).bool()}, r"`pinned` must be bool \[4\] .*: pass one flag per group"),
        (resample_call, {"uniforms": torch.ones(4, 2)}, r"`uniforms` must be .* \[4, 3\] .*: pass counter_uniforms"),
        (advance_call, {"log_w": torch.zeros(54)}, r"`lanes.log_w` must be float64 \[54\] .* got float32 \[54\]"),
        (advance_call, {"ended": torch.zeros(3).bool()}, r"`lanes.ended` must be bool \[54\] .* got bool \[3\]"),
        (
            advance_call,
            {"stops": torch.zeros(54, 3).int()},
            r"`lanes.stops` must be .* a power of two .* got \[54, 3\]",
        ),
        (advance_call, {"members": torch.zeros(9, 3)}, r"`groups.members` must be int32 \[any, any\] .* got float32"),
        (advance_call, {"sizes": torch.zeros(4).int()}, r"`groups.sizes` must be int32 \[9\] .* got int32 \[4\]"),
        (advance_call, {"row_of": torch.zeros(54)}, r"`row_of` must be int32 \[54\] .* got float32 .*: pass a row per"),
        (advance_call, {"lse_psi": torch.zeros(2)}, r"`lse_psi` must be float32 \[24\] .* got float32 \[2\]"),
        (softmax_call, {"rows": torch.zeros(2).int()}, r"`rows` must be int64 \[any\] .* got int32 \[2\]"),
        (softmax_call, {"rows": torch.zeros(3).long()}, r"`log_psi` must be .* \[3, 4\] .* got float32 \[2, 4\]"),
        (fork_call, {"tables": [torch.zeros(9, 80)]}, r"`tables\[0\]` must be int32 \[any, any\] .* got float32"),
        (
            fork_call,
            {"block_sizes": torch.ones(2).int()},
            r"`block_sizes` must be int32 or int64 \[1\] .* got int32 \[2\]",
        ),
        (fork_call, {"rows": torch.zeros(5).int()}, r"`rows` must be .* \[6\] .* got int32 \[5\] .*: pass the row"),
        (fork_call, {"ancestors": torch.zeros(6)}, r"`ancestors` must be int64 \[any\] .* got float32 \[6\]"),
        (fork_call, {"first": torch.zeros(5).long()}, r"`first` must be .* \[6\] .*: pass a number of tokens per lane"),
        (fork_call, {"computed": torch.zeros(6)}, r"`computed` must be int32 or int64 \[6\] .* got float32 \[6\]"),
        (fork_call, {"pointers": torch.zeros(2, 2).long(), "backend": "triton"}, r"`pointers` must be int64 \[1, 2\]"),
    ],
)
@on_the_host
def test_arguments_are_checked(call: Callable[..., None], changes: dict[str, Any], message: str) -> None:
    if GPU and changes.get("backend") == "triton":
        pytest.skip("it takes tensors on the CPU, under the interpreter")
    with pytest.raises(ValueError, match=message):
        call(**changes)


@on_the_host
def test_caches_are_checked() -> None:
    """A cache whose blocks are not its first dimension would be copied wrongly."""
    with pytest.raises(
        ValueError, match=r"`caches\[1\]` must have a multiple of `num_blocks` = 5 .* got \[2, 5, 3\]: permute"
    ):
        ops.block_segments([torch.zeros(10, 3), torch.zeros(2, 5, 3)], 5)


def test_too_many_lanes_for_one_program() -> None:
    """More than 1,024 lanes are refused by the kernel alone."""
    arguments = groups(4, 1025, seed=0)
    ops.resample(*arguments, backend="torch")
    with pytest.raises(ValueError, match="`log_w` must have at most 1024 lanes .* got 1025: pass backend='torch'"):
        ops.resample(*arguments, backend="triton")


@on_the_host
def test_triton_off_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter a launch on CPU tensors would fail deep inside Triton."""
    monkeypatch.setattr(fused, "softmax_pieces_kernel", object.__new__(triton.JITFunction))
    with pytest.raises(
        ValueError, match="`backend` 'triton' needs tensors on a CUDA device, got cpu: pass backend='auto'"
    ):
        softmax_call(backend="triton")
