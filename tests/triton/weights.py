"""Weights of every kind for the tests of products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from herd.kernels.quantized import QuantizedWeight, QuantKind, quantize
from herd.kernels.triton_linear import TritonLinear

from ..kernels.tolerances import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Kind:
    """A kind of weight; `group` 0 is one scale per output channel."""

    name: QuantKind | Literal["plain"]
    group: int = 0
    fp8_rows: bool = False

    def __str__(self) -> str:
        return f"{self.name}{f' group {self.group}' if self.group else ''}{' rows too' * self.fp8_rows}"

    def weight(self, rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor | QuantizedWeight:
        full = noise(rows, columns, seed=seed, scale=columns**-0.5)
        if self.name == "plain":
            return full.to(dtype).to(DEVICE)
        return quantize(full, self.name, self.group or columns).to(DEVICE)

    def linear(self, weight: Tensor | QuantizedWeight, exact: bool = True) -> TritonLinear:
        return TritonLinear(weight, exact, "fp8" if self.fp8_rows else None)


PLAIN, INT8, INT4, FP8 = Kind("plain"), Kind("int8"), Kind("int4", 32), Kind("fp8")
FP8_ROWS = Kind("fp8", fp8_rows=True)
KINDS = [PLAIN, INT8, INT4, FP8, FP8_ROWS]
FEWER_KINDS = [PLAIN, INT4, FP8_ROWS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (INT8, FP8))]
"""The interpreter takes 20 ms for a program; int8 and fp8 differ from int4 in how two values come out of a word."""
GROUPED = [Kind("int8", 32), Kind("int8", 96), Kind("int4", 64), Kind("int4", 96), Kind("int4"), Kind("fp8", 64)]


def widest(weight: Tensor | QuantizedWeight) -> Tensor:
    """The weight's exact values."""
    if isinstance(weight, Tensor):
        return weight.double()
    rows, columns = weight.shape
    values = weight.values_OI().double().view(rows, -1, weight.group)
    return (values * weight.scales_OG.double()[:, :, None]).view(rows, columns)
