from __future__ import annotations

import math

import pytest
import torch

from herd.kernels.cpu_memory import dtype_tag, elements, f32_array
from herd.kernels.cpu_vector import vector_load, vector_multiply_add, vector_store, vector_zero

from .compiled import compiled
from .tolerances import noise


def kernel_of(width: int):
    @compiled
    def kernel(px, py, pout, count, tag):
        x, y, out = elements(px, count, tag), f32_array(py, count), f32_array(pout, count // width)
        scalars = f32_array(py, count)
        total = vector_zero(width)
        for i in range(0, count, width):
            total = vector_multiply_add(scalars[i], vector_load(x, i, width), total)
        vector_store(y, 0, total)
        out[0] = y[0]

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 4, 8, 16], ids=lambda w: f"width {w}")
def test_multiply_add_of_vectors(width: int, dtype: torch.dtype) -> None:
    """Widths narrower and wider than any one register, and one that is no power of two, each rounded once a step."""
    count = 5 * width
    x, y = noise(count, dtype=dtype), noise(count, seed=1)
    scalars = y[::width].clone()
    out = torch.zeros(5)
    kernel_of(width)(x.data_ptr(), y.data_ptr(), out.data_ptr(), count, dtype_tag(x))
    expected = torch.zeros(width, dtype=torch.float64)
    for scalar, row in zip(scalars, x.view(5, width).double(), strict=True):
        expected = (scalar.double() * row + expected).float().double()
    assert torch.equal(y[:width], expected.float())
    assert out[0] == y[0]
    assert math.isfinite(out[0])


@compiled
def round_vectors(px, pout, count, x_tag, out_tag):
    x, out = elements(px, count, x_tag), elements(pout, count, out_tag)
    for i in range(0, count, 16):
        vector_store(out, i, vector_load(x, i, 16))


def test_storing_rounds_to_bfloat16_as_torch_does() -> None:
    """Any bits, halves between two neighbours among them."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0))
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00008000, 1, 0x80000000 - 2**32, 0])
    x = torch.cat((bits, halves, halves)).to(torch.int32).view(torch.float32)
    out = torch.empty(len(x), dtype=torch.bfloat16)
    round_vectors(x.data_ptr(), out.data_ptr(), len(x), dtype_tag(x), dtype_tag(out))
    nan = x.isnan()
    assert 100 < nan.sum() < len(x)
    assert out[nan].isnan().all()
    assert torch.equal(out[~nan].view(torch.int16), x[~nan].bfloat16().view(torch.int16))
