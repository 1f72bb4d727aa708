from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from herd.kernels.attention_inputs import attention_inputs, attention_inputs_ref, rope_ref, rope_table

from .tolerances import assert_as_exact, noise

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(1, 1, 1, 2, 1, id="the least of everything"),
    pytest.param(5, 5, 1, 16, 4, id="five heads on one"),
    pytest.param(7, 6, 2, 8, 3, id="odd block size"),
    pytest.param(19, 4, 4, 64, 12, id="one head each"),
    pytest.param(33, 9, 3, 128, 16, id="Scout's head_dim"),
]
MODES = ["rope and norm", "rope", "temperature", "plain"]


def settings_of(mode: str, T: int, d: int) -> dict:
    table = rope_table([500000.0 ** (-2 * j / d) for j in range(d // 2)], 24)
    rope = mode.startswith("rope")
    return {
        "table_R": table if rope else None,
        "rows_T": torch.arange(T) * 5 % 24 if rope else None,
        "q_scale_T": 1 + torch.rand(T, generator=torch.Generator().manual_seed(3)) if mode == "temperature" else None,
        "qk_norm_eps": 1e-5 if mode == "rope and norm" else None,
    }


def empty_pages(P: int, K: int, d: int, B: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The middle one of three layers."""
    return torch.zeros(P, 3, K, d, B, dtype=dtype)[:, 1], torch.zeros(P, 3, K, B, d, dtype=dtype)[:, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("T", "H", "K", "d", "B"), SHAPES)
def test_attention_inputs(T: int, H: int, K: int, d: int, B: int, mode: str, dtype: torch.dtype) -> None:
    qkv, settings = noise(T, (H + 2 * K) * d, dtype=dtype), settings_of(mode, T, d)
    P = T // B + 2
    slots = torch.randperm(P * B, generator=torch.Generator().manual_seed(1))[:T]
    ours, reference, truth = (empty_pages(P, K, d, B, t) for t in (dtype, dtype, torch.float64))
    q = attention_inputs(qkv, *ours, slots, num_heads=H, **settings)
    q_reference = attention_inputs_ref(qkv, *reference, slots, num_heads=H, **settings)
    q_truth = attention_inputs_ref(qkv.double(), *truth, slots, num_heads=H, **settings)
    assert_as_exact(q, q_reference, q_truth)
    assert_as_exact(ours[0], reference[0], truth[0])
    assert torch.equal(ours[1], reference[1]), "values are copied as they are"


def test_only_the_named_slots_are_written() -> None:
    """Other slots of the same page, other pages and other layers keep what they hold."""
    k_all, v_all = torch.full((4, 3, 2, 8, 5), 7.0), torch.full((4, 3, 2, 5, 8), 7.0)
    slots = torch.tensor([2 * 5 + 4, 1 * 5 + 0])
    attention_inputs(
        noise(2, 8 * 8), k_all[:, 1], v_all[:, 1], slots, num_heads=4, **settings_of("rope and norm", 2, 8)
    )
    changed = torch.zeros(4, 3, 5, dtype=torch.bool)
    changed[2, 1, 4] = changed[1, 1, 0] = True
    assert torch.equal((k_all != 7).any(2).any(2), changed)
    assert torch.equal((v_all != 7).any(2).any(-1), changed)


def test_a_token_is_the_same_alone_and_in_company() -> None:
    T, H, K, d, B = 9, 6, 2, 16, 4
    qkv, settings, slots = noise(T, (H + 2 * K) * d), settings_of("rope and norm", T, d), torch.arange(T)
    together = empty_pages(3, K, d, B, torch.float32)
    q = attention_inputs(qkv, *together, slots, num_heads=H, **settings)
    alone = empty_pages(3, K, d, B, torch.float32)
    for t in range(T):
        one = settings | {"rows_T": settings["rows_T"][t : t + 1]}
        row = attention_inputs(qkv[t : t + 1].contiguous(), *alone, slots[t : t + 1], num_heads=H, **one)
        assert torch.equal(row[0], q[t])
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


def test_rope_rotates_interleaved_pairs_and_keeps_relative_angles() -> None:
    table = rope_table([1.0, 0.01], 50)
    assert table.shape == (50, 2, 2)
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    rotated = rope_ref(x, table, torch.tensor([3]))[0, 0]
    expected = [math.cos(3), math.sin(3), -math.sin(0.03), math.cos(0.03)]
    torch.testing.assert_close(rotated, torch.tensor(expected), atol=1e-6, rtol=0)
    q, k = noise(1, 1, 4), noise(1, 1, 4, seed=1)
    dots = [
        (rope_ref(q, table, torch.tensor([p + 7])) * rope_ref(k, table, torch.tensor([p]))).sum() for p in (0, 13, 42)
    ]
    torch.testing.assert_close(torch.stack(dots), dots[0].expand(3), atol=1e-5, rtol=0)


def test_angles_are_computed_in_double_precision() -> None:
    table = rope_table([0.7], 100_000)
    angle = 99_999 * 0.7
    assert table[-1, 0].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-7)
