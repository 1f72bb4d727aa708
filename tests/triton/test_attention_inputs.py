"""The Triton kernel between projection and attention: on the GPU, or interpreted on the CPU where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from herd.kernels.attention_inputs import attention_inputs_ref
from herd.kernels.triton_attention_inputs import triton_attention_inputs

from ..kernels.test_attention_inputs import DTYPES, MODES, SHAPES, empty_pages, settings_of
from ..kernels.tolerances import assert_as_exact, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
ODD = pytest.param(5, 4, 2, 24, 4, id="head_dim no power of two")
SCOUT = pytest.param(300, 40, 8, 128, 64, marks=pytest.mark.gpu, id="Scout")


def on_device(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in settings.items()}


def pages_on(P: int, K: int, d: int, B: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The middle one of three layers."""
    k, v = empty_pages(P, K, d, B, dtype)
    assert k._base is not None
    assert v._base is not None
    return k._base.to(DEVICE)[:, 1], v._base.to(DEVICE)[:, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("T", "H", "K", "d", "B"), [*SHAPES, ODD, SCOUT])
def test_attention_inputs(T: int, H: int, K: int, d: int, B: int, mode: str, dtype: torch.dtype) -> None:
    qkv, settings = noise(T, (H + 2 * K) * d, dtype=dtype).to(DEVICE), on_device(settings_of(mode, T, d))
    P = T // B + 2
    slots = torch.randperm(P * B, generator=torch.Generator().manual_seed(1))[:T].to(DEVICE)
    ours, reference, truth = (pages_on(P, K, d, B, t) for t in (dtype, dtype, torch.float64))
    q = triton_attention_inputs(qkv, *ours, slots, num_heads=H, **settings)
    q_reference = attention_inputs_ref(qkv, *reference, slots, num_heads=H, **settings)
    q_truth = attention_inputs_ref(qkv.double(), *truth, slots, num_heads=H, **settings)
    assert_as_exact(q, q_reference, q_truth)
    assert_as_exact(ours[0], reference[0], truth[0])
    assert torch.equal(ours[1], reference[1]), "values are copied as they are"


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_pages(dtype: torch.dtype) -> None:
    """Values are rounded to the nearest, large ones to the largest; NaN stays. Keys are at most a step away, where
    their last bit decided."""
    T, H, K, d, B = 9, 4, 2, 16, 4
    qkv = noise(T, (H + 2 * K) * d, dtype=dtype, scale=40).to(DEVICE)
    qkv[3, -5:] = torch.tensor([1e4, -1e4, float("inf"), float("nan"), 2e-3])
    slots, settings = torch.arange(T).to(DEVICE), on_device(settings_of("rope", T, d))
    ours, reference = pages_on(4, K, d, B, FP8), pages_on(4, K, d, B, FP8)
    triton_attention_inputs(qkv, *ours, slots, num_heads=H, **settings)
    attention_inputs_ref(qkv, *reference, slots, num_heads=H, **settings)
    v = ours[1].float()
    assert torch.equal(v.nan_to_num(1000), reference[1].float().nan_to_num(1000))
    assert v[0, 1, 3, -5:].nan_to_num(1000).tolist() == [448, -448, 448, 1000, 2**-9]
    k, k_reference = ours[0].float(), reference[0].float()
    torch.testing.assert_close(k, k_reference, rtol=1 / 8, atol=2**-9)
    assert (k != k_reference).float().mean() < 0.01


def test_only_the_named_slots_are_written() -> None:
    """Other slots of the same page, other pages and other layers keep what they hold; a token without a slot has
    none."""
    k_all, v_all = (torch.full(shape, 7.0).to(DEVICE) for shape in ((4, 3, 2, 8, 5), (4, 3, 2, 5, 8)))
    slots = torch.tensor([2 * 5 + 4, -1, 1 * 5 + 0]).to(DEVICE)
    settings = on_device(settings_of("rope and norm", 3, 8))
    qkv = noise(3, 8 * 8).to(DEVICE)
    q = triton_attention_inputs(qkv, k_all[:, 1], v_all[:, 1], slots, num_heads=4, **settings)
    changed = torch.zeros(4, 3, 5, dtype=torch.bool)
    changed[2, 1, 4] = changed[1, 1, 0] = True
    assert torch.equal((k_all != 7).any(2).any(2).cpu(), changed)
    assert torch.equal((v_all != 7).any(2).any(-1).cpu(), changed)
    assert q.isfinite().all()


def test_a_token_is_the_same_alone_and_in_company() -> None:
    T, H, K, d, B = 9, 6, 2, 16, 4
    qkv, settings = noise(T, (H + 2 * K) * d).to(DEVICE), on_device(settings_of("rope and norm", T, d))
    slots = torch.arange(T).to(DEVICE)
    together, alone = pages_on(3, K, d, B, torch.float32), pages_on(3, K, d, B, torch.float32)
    q = triton_attention_inputs(qkv, *together, slots, num_heads=H, **settings)
    for t in range(T):
        one = settings | {"rows_T": settings["rows_T"][t : t + 1]}
        row = triton_attention_inputs(qkv[t : t + 1].contiguous(), *alone, slots[t : t + 1], num_heads=H, **one)
        assert torch.equal(row[0], q[t])
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])
