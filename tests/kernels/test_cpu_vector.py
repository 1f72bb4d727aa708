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
