"""Rows as e4m3 with a scale each, on a GPU or interpreted. A program holds 4,096 channels at a time."""

from __future__ import annotations

import pytest
import torch

from herd.kernels.triton_tokens import fp8_tokens, fp8_tokens_ref

from ..kernels.tolerances import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("D", [32, 1111, 4100], ids=["few channels", "a prime number", "two turns"])
def test_tokens(D: int, cap: float | None, dtype: torch.dtype) -> None:
    """The reference's numbers and scales exactly, from subnormals to clipped ones."""
    x = (noise(6, D) * torch.logspace(-3, 1, 6)[:, None]).to(dtype).to(DEVICE)
    x[1] = torch.linspace(-1e-3, 1e-3, D).to(dtype)
    x[1, 0] = 0.5
    q, scale = fp8_tokens(x, cap)
    expected, expected_scale = fp8_tokens_ref(x, cap)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q, expected.view(torch.uint8))


def test_a_row_of_zeros_and_one_without_numbers() -> None:
    x = torch.zeros(3, 64, device=DEVICE)
    x[1, 7] = float("nan")
    x[2] = 2.0
    q, scale = fp8_tokens(x)
    assert q[0].tolist() == [0] * 64
    assert scale.isfinite().tolist() == [True, False, True]
    assert (q[2].view(torch.float8_e4m3fn).float() * scale[2] == 2.0).all()


def test_halfway_goes_to_even() -> None:
    """Every e4m3 number and what lies between two of them; 448 among them makes the scale 1."""
    numbers = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, between, -numbers, -between))[None].to(DEVICE)
    q, scale = fp8_tokens(x)
    assert scale.tolist() == [1.0]
    assert torch.equal(q, x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_the_cap_clips() -> None:
    x = torch.tensor([[3000.0, -1300.0, 600.0, 0.0]], device=DEVICE)
    q, scale = fp8_tokens(x, cap=1200.0)
    assert (q.view(torch.float8_e4m3fn).float() * scale).tolist() == [
        [1200.0, -1200.0, pytest.approx(600, rel=1e-6), 0.0]
    ]
