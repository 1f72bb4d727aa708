from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.quantized import NotFinite, QuantizedWeight, QuantKind, concatenate, pack_nibbles, quantize

KINDS: list[QuantKind] = ["int8", "int4", "fp8"]


def noise(rows: int, columns: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
)
def test_the_error_is_bounded_by_the_step(
    kind: QuantKind, rows: int, groups: int, group: int, seed: int, size: float
) -> None:
    """Integers: half a step, and int4 may clip its outliers by up to three. fp8: a sixteenth of the value, or of the
    smallest step."""
    weight_OI = noise(rows, groups * group, seed, size)
    made = quantize(weight_OI, kind, group)
    assert made.shape == tuple(weight_OI.shape)
    error = (made.dequantize() - weight_OI).abs().view(rows, groups, group)
    step = made.scales_OG.float().abs()[:, :, None]
    if kind == "fp8":
        bound = torch.maximum(weight_OI.abs().view(rows, groups, group) / 16, step * 2**-10)
    else:
        bound = step * (0.5 if kind == "int8" else 3.0)
    assert bool((error <= bound * 1.001).all())
    if kind == "int4":
        inside = (weight_OI.view(rows, groups, group) / made.scales_OG.float()[:, :, None]).clamp(-8, 7)
        unclipped = inside == weight_OI.view(rows, groups, group) / made.scales_OG.float()[:, :, None]
        assert bool((error[unclipped] <= (step.expand_as(error) * 0.5 * 1.001)[unclipped]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_representable_stays_as_it_is(kind: QuantKind) -> None:
    once = quantize(noise(5, 128), kind, 64).dequantize()
    twice = quantize(once, kind, 64).dequantize()
    # Another scale may be as good: then the values are the same to within the scale's own rounding.
    torch.testing.assert_close(twice, once, rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: QuantKind) -> None:
    weight_OI = noise(3, 64)
    weight_OI[1] = 0
    assert bool((quantize(weight_OI, kind, 32).dequantize()[1] == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused(kind: QuantKind, bad: float) -> None:
    weight_OI = noise(3, 64)
    weight_OI[2, 5] = bad
    with pytest.raises(NotFinite):
        quantize(weight_OI, kind, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_each_other(kind: QuantKind) -> None:
    weight_OI = noise(40, 64)
    whole = quantize(weight_OI, kind, 32)
    for rows in (slice(0, 1), slice(7, 20)):
        part = quantize(weight_OI[rows], kind, 32)
        assert torch.equal(part.q.view(torch.uint8), whole.q[rows].view(torch.uint8))
        assert torch.equal(part.scales_OG, whole.scales_OG[rows])


def test_nibbles_are_two_to_a_byte_even_channels_low() -> None:
    q_OI = torch.arange(-8, 8, dtype=torch.int8)[None]
    packed = pack_nibbles(q_OI)
    assert packed.tolist() == [[(int(q) & 15) | ((int(p) & 15) << 4) for q, p in q_OI.view(-1, 2)]]
    weight = QuantizedWeight("int4", packed, torch.ones(1, 1), 16)
    assert torch.equal(weight.values_OI(), q_OI.float())
    by_numpy = np.stack((packed.numpy() & 15, packed.numpy() >> 4), -1).reshape(1, -1).astype(np.int8)
    assert np.array_equal(np.where(by_numpy > 7, by_numpy - 16, by_numpy), q_OI.numpy())


def test_parts_are_put_below_each_other() -> None:
    upper, lower = quantize(noise(3, 64), "int4", 32), quantize(noise(2, 64, 1), "int4", 32)
    both = concatenate([upper, lower])
    assert both.shape == (5, 64)
    assert torch.equal(both.dequantize(), torch.cat((upper.dequantize(), lower.dequantize())))
