"""Weights of every kind on a GPU, or interpreted: against float64, and the promise that a row's bits do not depend on
its neighbours. One step takes 512 input channels of int4, 256 of the others; a tile has 16 to 128 output channels and
8 to 128 rows."""

from __future__ import annotations

import pytest
import torch

from herd.kernels.gpu_weight import CHANNELS, SLICES, GpuWeight, pack
from herd.kernels.quantized import quantize
from herd.kernels.triton_linear import TritonLinear, linear_ref
from herd.kernels.triton_tokens import fp8_tokens_ref

from ..kernels.tolerances import assert_as_exact, noise
from .weights import DEVICE, FP8_ROWS, GROUPED, INT4, INT8, KINDS, PLAIN, Kind, widest

SHAPES = [
    pytest.param(1, 16, 32, id="one row, one block, an eighth of a step"),
    pytest.param(1, 33, 512, id="one row, whole steps, blocks left over"),
    pytest.param(8, 7, 192, id="a whole tile of few rows, less than a block of channels"),
    pytest.param(9, 40, 288, id="a row beyond the smallest tile"),
    pytest.param(17, 67, 544, id="prime channels, a row beyond the second tile, a tail of 32"),
    pytest.param(70, 130, 96, id="many rows: wide tiles, unless exact"),
    pytest.param(131, 16, 64, id="more than one wide tile"),
]


def check(kind: Kind, T: int, O: int, K: int, dtype: torch.dtype, exact: bool) -> None:  # noqa: E741
    weight, x = kind.weight(O, K, dtype), noise(T, K, dtype=dtype).to(DEVICE)
    out = kind.linear(weight, exact)(x)
    rows = x.double()
    if kind.fp8_rows:
        q, scale = fp8_tokens_ref(x)
        rows = q.double() * scale.double()[:, None]
    truth = rows @ widest(weight).T
    assert_as_exact(out, linear_ref(x, weight) if not kind.fp8_rows else truth.to(dtype), truth)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize(("T", "O", "K"), SHAPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products(kind: Kind, T: int, O: int, K: int, exact: bool) -> None:  # noqa: E741
    check(kind, T, O, K, torch.bfloat16, exact)


@pytest.mark.parametrize("kind", GROUPED, ids=str)
def test_other_groups(kind: Kind) -> None:
    check(kind, 5, 20, 576, torch.bfloat16, exact=True)
    check(kind, 66, 20, 576, torch.bfloat16, exact=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_dtypes(kind: Kind, dtype: torch.dtype) -> None:
    check(kind, 9, 20, 352, dtype, exact=True)


@pytest.mark.parametrize("kind", [INT4, INT8], ids=str)
def test_extreme_values_are_exact(kind: Kind) -> None:
    """Every number that a weight can be, times one."""
    lowest, highest = (-8, 7) if kind.name == "int4" else (-127, 127)
    values = torch.arange(lowest, highest + 1)
    weight = quantize(torch.zeros(len(values), 64), kind.name, 64)  # type: ignore[arg-type]
    q = values[:, None].expand(-1, 64).to(torch.int8)
    weight.q.copy_((q & 0xF).to(torch.uint8)[:, 0::2] * 17 if kind.name == "int4" else q)
    weight.scales_OG.fill_(1.0)
    one_hot = torch.eye(64)[[0, 1, 31, 32, 63]].bfloat16().to(DEVICE)
    assert torch.equal(TritonLinear(weight.to(DEVICE))(one_hot).cpu().float(), values.float().expand(5, -1))


def test_every_fp8_number_is_exact() -> None:
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[numbers.float().isfinite()]
    weight = quantize(torch.ones(len(numbers), 32), "fp8", 32)
    weight.q.copy_(numbers[:, None].expand(-1, 32))
    weight.scales_OG.fill_(1.0)
    one_hot = torch.eye(32)[[0, 1, 17]].bfloat16().to(DEVICE)
    assert torch.equal(TritonLinear(weight.to(DEVICE))(one_hot).cpu().float(), numbers.float().expand(3, -1))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_keeps_its_bits_in_any_company(kind: Kind) -> None:
    x = noise(70, 544, dtype=torch.bfloat16).to(DEVICE)
    linear = kind.linear(kind.weight(32, 544, torch.bfloat16))
    together = linear(x)
    for rows in (1, 2, 7, 8, 9, 16, 17, 33, 65):
        first = (rows * 7) % (71 - rows)
        assert torch.equal(linear(x[first : first + rows].contiguous()), together[first : first + rows]), rows
    shuffled = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(linear(x[shuffled].contiguous()), together[shuffled])


def test_without_the_promise_a_row_has_other_bits() -> None:
    """The test above can fail."""
    x = noise(70, 544).to(DEVICE)
    linear = INT8.linear(INT8.weight(48, 544, torch.float32), exact=False)
    assert not torch.equal(linear(x[:1].contiguous()), linear(x)[:1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_that_are_none_stay_in_their_row(kind: Kind) -> None:
    """The last step reaches beyond the row: into the next one, which must not be seen."""
    weight = kind.weight(16, 288, torch.bfloat16)
    x = noise(4, 288, dtype=torch.bfloat16).to(DEVICE)
    expected = kind.linear(weight)(x)
    x[2, 5] = float("nan")
    for exact in (True, False):
        out = kind.linear(weight, exact)(x)
        assert out.isnan().all(dim=1).tolist() == [False, False, True, False]
        assert torch.equal(out[[0, 1, 3]], expected[[0, 1, 3]]) or not exact


@pytest.mark.parametrize("kind", [*KINDS, *GROUPED], ids=str)
def test_packed_weights_hold_what_their_description_says(kind: Kind) -> None:
    weight = kind.weight(35, 576, torch.bfloat16)
    packed = pack(weight, kind.fp8_rows)
    assert packed.in_features == 576
    assert packed.out_features == 35
    if isinstance(weight, torch.Tensor):
        assert torch.equal(packed.values, weight)
        return
    values = weight.values_OI().cpu()
    for o, i in ((0, 0), (1, 1), (15, 31), (16, 32), (34, 63), (34, 64), (7, 255), (20, 256), (33, 511), (34, 575)):
        assert stored(packed, o, i) == values[o, i]
        scale = packed.scales_GO
        assert scale is not None
        assert scale[i // weight.group, o] == weight.scales_OG[o, i // weight.group]


def stored(packed: GpuWeight, o: int, i: int) -> float:
    step, within = divmod(i, packed.step)
    slice_, within = divmod(within, packed.step // SLICES)
    plane, p = divmod(within, packed.plane)
    word = int(packed.values[o // CHANNELS, step, slice_, o % CHANNELS, p])
    if packed.kind == "int4":
        return (word >> (4 * plane) & 0xF) - 8
    byte = torch.tensor([word >> (8 * plane) & 0xFF], dtype=torch.uint8)
    return byte.view(torch.int8 if packed.kind == "int8" else torch.float8_e4m3fn).float().item()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("O", "K"), [(16384, 5120), (5120, 8192), (7168, 5120), (16, 5120), (128, 5120)],
    ids=["gate and up", "down", "qkv", "Scout's router", "Maverick's router"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [PLAIN, INT8, Kind("int8", 128), Kind("int4", 128), Kind("fp8"), FP8_ROWS], ids=str)
def test_real_shapes(kind: Kind, O: int, K: int) -> None:  # noqa: E741
    """Against float64, and bits, at 1 to 4096 rows."""
    weight = kind.weight(O, K, torch.bfloat16)
    x = noise(4096, K, dtype=torch.bfloat16).to(DEVICE)
    exact, fast = kind.linear(weight), kind.linear(weight, exact=False)
    together = exact(x)
    some = torch.arange(0, 4096, 64, device=DEVICE)
    rows = x[some].double()
    if kind.fp8_rows:
        q, scale = fp8_tokens_ref(x[some])
        rows = q.double() * scale.double()[:, None]
    truth = rows @ widest(weight).T
    for out in (together, fast(x)):
        assert_as_exact(out[some], truth.bfloat16(), truth)
    for rows_ in (1, 2, 7, 8, 9, 16, 17, 32, 64, 65, 128, 256, 1000):
        first = (rows_ * 37) % (4096 - rows_)
        assert torch.equal(exact(x[first : first + rows_].contiguous()), together[first : first + rows_]), rows_
