from __future__ import annotations

import pytest
import torch

from herd.kernels.silu_mul import silu_mul, silu_mul_ref

from .tolerances import assert_as_exact, noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "F"),
    [
        pytest.param(0, 16, id="no rows"),
        pytest.param(1, 1, id="one number"),
        pytest.param(3, 17, id="tail of one"),
        pytest.param(7, 768, id="pocket"),
    ],
)
def test_silu_mul(N: int, F: int, dtype: torch.dtype) -> None:
    x = noise(N, 2 * F, dtype=dtype, scale=3.0)
    out = silu_mul(x)
    assert out.shape == (N, F)
    if N:
        assert_as_exact(out, silu_mul_ref(x), silu_mul_ref(x.double()))


def test_far_tails_and_nan() -> None:
    """Large gates pass, very negative ones close, to the last; NaN in either half shows."""
    gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 1e30, float("nan"), 1.0]])
    up = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1, float("nan")]])
    out = silu_mul(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(out, silu_mul_ref(torch.cat((gate, up), dim=1)), atol=1e-30, rtol=1e-6, equal_nan=True)


def test_gate_comes_first() -> None:
    assert silu_mul(torch.tensor([[0.0, 5.0]])).item() == 0.0
    assert silu_mul(torch.tensor([[5.0, 0.0]])).item() == 0.0
    assert silu_mul(torch.tensor([[20.0, -2.0]])).item() == pytest.approx(-40.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_numbers_bits_do_not_depend_on_its_place(dtype: torch.dtype) -> None:
    """In a whole vector or in the tail."""
    gate, up = noise(40, dtype=dtype, scale=3.0), noise(40, dtype=dtype, seed=1)
    whole = silu_mul(torch.cat((gate, up))[None])[0]
    for count in range(1, 40):
        assert torch.equal(silu_mul(torch.cat((gate[:count], up[:count]))[None])[0], whole[:count])
