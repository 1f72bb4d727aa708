from __future__ import annotations

import pytest
import torch

from herd.kernels.linear import Linear, linear_ref

from .tolerances import assert_as_exact, noise

SHAPES = [
    pytest.param(1, 64, 48, id="one row"),
    pytest.param(5, 17, 33, id="odd sizes"),
    pytest.param(3, 64, 1, id="one output"),
    pytest.param(2, 1, 8, id="one input"),
    pytest.param(130, 96, 64, id="more rows than a tile"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "I", "O"), SHAPES)
def test_linear(T: int, I: int, O: int, dtype: torch.dtype) -> None:  # noqa: E741
    x, weight = noise(T, I, dtype=dtype), noise(O, I, dtype=dtype, seed=1)
    linear = Linear(weight)
    assert (linear.in_features, linear.out_features) == (I, O)
    out = linear(x)
    assert out.is_contiguous()
    assert_as_exact(out, linear_ref(x, weight), linear_ref(x.double(), weight.double()))


def test_packing_keeps_the_callers_weight() -> None:
    """Tied embeddings use the same tensor as a table."""
    weight = noise(16, 32, dtype=torch.bfloat16)
    before = weight.clone()
    Linear(weight)(noise(2, 32, dtype=torch.bfloat16))
    assert torch.equal(weight, before)
