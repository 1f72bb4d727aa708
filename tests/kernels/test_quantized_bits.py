"""A quantised weight's bits depend on nothing but the weight: processes that quantise for themselves must agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch

from herd.kernels.quantized import QuantizedWeight, QuantKind, concatenate, quantize

from .tolerances import noise

KINDS: list[QuantKind] = ["int8", "int4", "fp8"]
LARGE = noise(700, 1024, dtype=torch.bfloat16)
"""More than one turn of the search for one thread and for two, cut at other rows."""


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    equal = torch.equal(a.q.view(torch.uint8), b.q.view(torch.uint8)) and torch.equal(a.scales_OG, b.scales_OG)
    return equal and (a.kind, a.group) == (b.kind, b.group)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("restored_threads")
def test_bits_do_not_depend_on_layout_company_or_threads(kind: QuantKind) -> None:
    torch.set_num_threads(1)
    whole = quantize(LARGE, kind, 128)
    assert same(quantize(LARGE.t().contiguous().t(), kind, 128), whole)
    assert same(quantize(LARGE.float(), kind, 128), whole)
    assert same(concatenate([quantize(part, kind, 128) for part in LARGE.split([1, 299, 400])]), whole)
    torch.set_num_threads(2)
    assert same(quantize(LARGE, kind, 128), whole)


@pytest.mark.parametrize(
    ("kind", "digest"), [("int8", "501f59de76375b09"), ("int4", "3af26cf842fdcd38"), ("fp8", "57633ff8050ce8f2")]
)
def test_bits_never_change(kind: QuantKind, digest: str) -> None:
    """If they have to, raise `ROUNDING_VERSION` of `model/quantization.py`."""
    weight = ((torch.arange(64 * 256) * 7919 % 10007 - 5003) / 5003).pow(3).view(64, 256)
    quantized = quantize(weight, kind, 64)
    found = hashlib.blake2b(digest_size=8)
    for tensor in (quantized.q, quantized.scales_OG):
        found.update(tensor.view(torch.uint8).numpy().tobytes())
    assert found.hexdigest() == digest


def test_int4_is_better_than_its_largest_value_in_seven_steps() -> None:
    """What the search is for: at most 0.85 of the squared error, on a bell and with outliers."""
    for weight in (noise(64, 1024), noise(64, 1024).pow(3)):
        grouped = weight.view(64, -1, 128)
        scale = (grouped.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        plain = (grouped - (grouped / scale).round() * scale).square().sum()
        assert (quantize(weight, "int4", 128).dequantize() - weight).square().sum() < 0.85 * plain
