"""Weights of every kind that linear maps take, and float64 references of them."""

from __future__ import annotations

import torch
from torch import Tensor

from herd.kernels.quantized import QuantizedWeight, QuantKind, quantize

from .tolerances import noise

KINDS: list[tuple[QuantKind | None, int]] = [
    (None, 0),
    ("int8", 0),
    ("int8", 32),
    ("int4", 0),
    ("int4", 32),
    ("int4", 128),
    ("fp8", 0),
    ("fp8", 64),
]
"""(kind, input channels per scale; 0 for one scale per output channel); None: not quantised."""


def kind_id(kind: tuple[QuantKind | None, int]) -> str:
    return f"{kind[0] or 'plain'}{f' by {kind[1]}' if kind[1] else ''}"


def made(
    outputs: int, inputs: int, kind: tuple[QuantKind | None, int], dtype: torch.dtype, seed: int = 1
) -> Tensor | QuantizedWeight:
    """A seeded weight [outputs, inputs]; `dtype` is that of a plain one."""
    weight = noise(outputs, inputs, seed=seed, scale=inputs**-0.5)
    if kind[0] is None:
        return weight.to(dtype)
    return quantize(weight, kind[0], kind[1] or inputs)
