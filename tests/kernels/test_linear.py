from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from herd.kernels import cpu_gemm_panel
from herd.kernels.linear import Linear, linear_ref
from herd.kernels.quantized import QuantizedWeight, quantize

from .tolerances import assert_as_exact, noise
from .weights import KINDS, kind_id, made

SHAPES = [
    pytest.param(0, 64, 64, id="no rows"),
    pytest.param(1, 64, 48, id="one row, less than a panel"),
    pytest.param(40, 64, 1, id="one output"),
    pytest.param(3, 96, 100, id="a panel and a tail that is no multiple of 16"),
    pytest.param(5, 32, 80, id="a panel and one block"),
    pytest.param(7, 128, 64, id="a row more than a tile"),
    pytest.param(13, 256, 128, id="enough rows to unpack"),
    pytest.param(64, 640, 192, id="more input channels than are taken together"),
    pytest.param(300, 576, 72, id="more rows than have their totals together"),
]
DTYPES = [torch.bfloat16, torch.float32]
LARGE = [(2048, 2048), (1024, 5120)]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(x: Tensor, weight: Tensor | QuantizedWeight) -> None:
    """Against float64, by the measure of sums made one product after the other in float32."""
    linear = Linear(weight)
    outputs, inputs = weight.shape
    assert (linear.in_features, linear.out_features) == (inputs, outputs)
    out = linear(x)
    assert out.shape == (len(x), outputs)
    assert out.is_contiguous()
    if len(x):
        truth = linear_ref(x.double(), weight if isinstance(weight, QuantizedWeight) else weight.double())
        assert_as_exact(out, in_order(x, weight), truth)


def in_order(x_TI: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    weight_OI = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
    total_TO = torch.zeros(x_TI.shape[0], weight_OI.shape[0])
    for x_T, weight_O in zip(x_TI.float().t(), weight_OI.t(), strict=True):
        total_TO += x_T[:, None] * weight_O
    return total_TO.to(x_TI.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize(("T", "I", "O"), SHAPES)
def test_linear(T: int, I: int, O: int, kind: tuple, dtype: torch.dtype) -> None:  # noqa: E741
    if kind[1] and (I % kind[1] or kind[1] == I):
        pytest.skip("groups that do not divide this")
    check(noise(T, I, dtype=dtype), made(O, I, kind, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [(None, 0), ("int8", 0), ("fp8", 0)], ids=kind_id)
@pytest.mark.parametrize(("T", "I", "O"), [(1, 1, 8), (3, 17, 33), (20, 7, 130)])
def test_odd_numbers_of_input_channels(T: int, I: int, O: int, kind: tuple, dtype: torch.dtype) -> None:  # noqa: E741
    """A row's last pair must not take in the next row's first number."""
    x = noise(T + 1, I, dtype=dtype)
    x[-1] = float("nan")
    check(x[:T], made(O, I, kind, dtype))


@pytest.mark.parametrize("wide", [0, 1], ids=["16 registers", "32 registers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_what_older_processors_run(kind: tuple, dtype: torch.dtype, wide: int, monkeypatch) -> None:
    """Without dots of pairs, with few and with many registers; equal bits of a row in company for each."""
    monkeypatch.setattr(cpu_gemm_panel, "host_has_dots", lambda: False)
    monkeypatch.setattr(cpu_gemm_panel, "host_is_wide", lambda: bool(wide))
    x, weight = noise(33, 256, dtype=dtype), made(144, 256, kind, dtype)
    check(x, weight)
    linear = Linear(weight)
    whole = linear(x)
    for rows in range(1, 20):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_stored_value_is_exact(dtype: torch.dtype) -> None:
    """All codes of int8, with -128, of fp8, with its NaN and what lies below its normal range, and of int4."""
    codes = torch.arange(256, dtype=torch.uint8)
    one = torch.ones(256, 1)
    identity = torch.eye(2, dtype=dtype)[:1]
    int8 = QuantizedWeight("int8", torch.stack((codes, codes.flip(0)), 1).view(torch.int8), one, 2)
    fp8 = QuantizedWeight("fp8", torch.stack((codes, codes.flip(0)), 1).view(torch.float8_e4m3fn), one, 2)
    int4 = QuantizedWeight("int4", codes[:, None], one, 2)
    for weight in (int8, fp8, int4):
        for x in (identity, identity.flip(1)):
            expected = linear_ref(x, weight).nan_to_num(nan=1e9)
            for rows in (1, 20):
                out = Linear(weight)(x.expand(rows, 2)).nan_to_num(nan=1e9)
                keep = expected != 1e9  # 0 times NaN is NaN, too
                assert torch.equal(out[-1:, keep[0]], expected[:, keep[0]])
                assert (out[-1, ~keep[0]] == out.new_tensor(1e9)).all()


ALL_ROWS = [*range(1, 71), 97, 191, 192, 193, 229]
SOME_ROWS = [*range(1, 15), 18, 64, 70, 193]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize(("O", "I"), LARGE)
@pytest.mark.parametrize(
    "counts", [pytest.param(ALL_ROWS, marks=pytest.mark.slow, id="all"), pytest.param(SOME_ROWS, id="some")]
)
def test_a_rows_bits_do_not_depend_on_its_company(
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    kind: tuple,
    dtype: torch.dtype,
    counts: list[int],
    threads: int,
) -> None:
    linear = Linear(made(O, I, kind, dtype))
    x = noise(230, I, dtype=dtype)
    assert agrees(linear, x, linear(x), counts)


def agrees(linear, x: Tensor, whole: Tensor, counts: list[int]) -> bool:
    """Whether the first rows, the last ones and some between have the bits that they have among all."""
    for rows in counts:
        for start in {0, 3, len(x) - rows}:
            if start + rows <= len(x) and not torch.equal(linear(x[start : start + rows]), whole[start : start + rows]):
                return False
    return True


@pytest.mark.parametrize(("O", "I"), LARGE)
def test_torchs_own_product_fails_the_same_check(O: int, I: int) -> None:  # noqa: E741
    weight, x = noise(O, I, seed=1), noise(230, I)
    assert not agrees(lambda rows: functional.linear(rows, weight), x, functional.linear(x, weight), SOME_ROWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_threads_change_no_bit(kind: tuple, dtype: torch.dtype) -> None:
    linear = Linear(made(1024, 512, kind, dtype))
    before = torch.get_num_threads()
    try:
        for rows in (1, 9, 100, 400):
            x = noise(rows, 512, dtype=dtype)
            outs = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                outs.append(linear(x))
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(kind: tuple, bad: float, threads: int) -> None:
    for dtype in DTYPES:
        linear = Linear(made(80, 128, kind, dtype))
        x = noise(41, 128, dtype=dtype)
        clean = linear(x)
        x[[2, 40]] = bad
        x[17, 5] = bad
        spoiled = linear(x)
        good = [row for row in range(41) if row not in (2, 17, 40)]
        assert torch.equal(spoiled[good], clean[good])
        assert not spoiled[[2, 17, 40]].isfinite().any()


def test_several_python_threads_at_once(threads: int) -> None:
    linears = [Linear(made(512, 512, kind, torch.bfloat16)) for kind in KINDS]
    x = noise(150, 512, dtype=torch.bfloat16)
    expected = [linear(x) for linear in linears]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(40):
            n = (first + turn) % len(linears)
            if not torch.equal(linears[n](x), expected[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_keeps_the_callers_weight(dtype: torch.dtype) -> None:
    """Tied embeddings use the same tensor as a table."""
    weight = noise(16, 32, dtype=dtype)
    before = weight.clone()
    Linear(weight)(noise(2, 32, dtype=dtype))
    assert torch.equal(weight, before)


def test_rows_and_weights_may_lie_anyhow() -> None:
    weight, x = noise(32, 48).t(), noise(32, 5).t()
    assert torch.equal(Linear(weight)(x), Linear(weight.contiguous())(x.contiguous()))


def test_a_quantised_weight_takes_rows_of_both_types() -> None:
    weight = quantize(noise(64, 64), "int8", 64)
    linear = Linear(weight)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        assert linear(noise(3, 64, dtype=dtype)).dtype is dtype


def test_rows_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"bfloat16 meet weights of torch.float32"):
        Linear(noise(16, 16))(noise(1, 16, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"float32 meet weights of torch.bfloat16"):
        Linear(noise(16, 16, dtype=torch.bfloat16))(noise(1, 16))
    with pytest.raises(TypeError, match="float64"):
        Linear(quantize(noise(16, 16), "int8", 16))(noise(1, 16).double())


def test_other_types_are_torchs() -> None:
    x, weight = noise(3, 8).double(), noise(4, 8).double()
    assert torch.equal(Linear(weight)(x), functional.linear(x, weight))


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings OpenMP's GNU interface on Linux")
def test_there_are_threads_to_share_work_with() -> None:
    from herd.kernels.cpu_threads import parallel_address

    assert parallel_address()
