"""Weights of a linear map in fewer bits: what they are and how they come from full precision. Every layout on a device
and every file format is made from this one. Knows nothing of which weights to quantise or of how products are computed.

Shapes: O out features, I in features, G groups of input channels that share a scale, C input channels of one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QuantKind = Literal["int8", "int4", "fp8"]

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_SCALE = 1e-12
_INT4_STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0)
"""How many steps the largest value of a group may be away from zero; beyond 8 it is clipped, which costs that value and
gains all others a finer step."""
_COST_UNITS = 4096.0
"""Squared errors are counted in whole units of 1/4096 of a squared step: float32 sums of them are exact, so the chosen
scale does not depend on the order in which a machine adds them up."""
_CHUNK = 1 << 18
"""Values per thread and turn of the search: its temporaries stay in the cache."""


class NotFinite(ValueError):
    """A weight holds NaN or infinity."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """W[o, i] = q[o, i] * scales[o, i // group]."""

    kind: QuantKind
    q: Tensor
    """int8: int8 [O, I]. int4: uint8 [O, I / 2], two's complement nibbles, even input channels in the low ones.
    fp8: float8_e4m3fn [O, I]."""
    scales_OG: Tensor
    """float32 or bfloat16 [O, I / group]; those of int4 may be negative."""
    group: int
    """Input channels per scale; I for one scale per output channel."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        columns = self.q.shape[1]
        return self.q.shape[0], 2 * columns if self.kind == "int4" else columns

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def num_bytes(self) -> int:
        return self.q.nbytes + self.scales_OG.nbytes

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device; itself if it is there."""
        return QuantizedWeight(self.kind, self.q.to(device), self.scales_OG.to(device), self.group)

    def values_OI(self) -> Tensor:
        """q as float32, without scales."""
        if self.kind != "int4":
            return self.q.float()
        low, high = self.q & 0xF, self.q >> 4
        nibbles = torch.stack((low, high), dim=-1).flatten(-2).to(torch.int8)
        return torch.where(nibbles > 7, nibbles - 16, nibbles).float()

    def dequantize(self) -> Tensor:
        """[O, I] float32."""
        rows, columns = self.shape
        values = self.values_OI().view(rows, -1, self.group)
        return (values * self.scales_OG.float()[:, :, None]).view(rows, columns)


def quantize(weight_OI: Tensor, kind: QuantKind, group: int) -> QuantizedWeight:
    """Round to nearest with one scale for each `group` input channels of an output channel; `group` divides I (and is
    even for int4). Scales are float32, those of int4 bfloat16.

    int8 and fp8 map the largest value of a group to the largest number. int4 takes, of a few scales, the one with the
    least squared error, so outliers may be clipped, and negative ones where the largest value is positive, so that it
    has the eighth step on its side. The bits depend on nothing but the weight. Raises NotFinite.
    """
    rows, columns = weight_OI.shape
    assert columns % group == 0, f"groups of {group} do not divide {columns} input channels"
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn if kind == "fp8" else torch.int8, device=weight_OI.device)
    scales_OG = torch.empty(
        rows, columns // group, dtype=torch.bfloat16 if kind == "int4" else torch.float32, device=weight_OI.device
    )
    step = max(1, _CHUNK * torch.get_num_threads() // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        grouped_OGC = weight_OI[piece].float().contiguous().view(-1, columns // group, group)
        if kind == "int4":
            scales_OG[piece] = _int4_scales(grouped_OGC)
        else:
            scales_OG[piece] = (grouped_OGC.abs().amax(-1) / _LARGEST[kind]).clamp_(min=_SMALLEST_SCALE)
        values_OI = (grouped_OGC / scales_OG[piece].float()[:, :, None]).view(-1, columns)
        if kind == "fp8":
            q[piece] = values_OI.clamp_(-448, 448).to(torch.float8_e4m3fn)
        else:
            q[piece] = values_OI.round_().clamp_(*((-8, 7) if kind == "int4" else (-127, 127))).to(torch.int8)
    if not bool(scales_OG.isfinite().all()):
        raise NotFinite("the weight holds NaN or infinite values")
    return QuantizedWeight(kind, pack_nibbles(q) if kind == "int4" else q, scales_OG, group)


def _int4_scales(grouped_OGC: Tensor) -> Tensor:
    """For each group the scale of least squared error among `_INT4_STEPS`, the first of equals. bfloat16 [O, G]."""
    highest_OG, lowest_OG = grouped_OGC.amax(-1), grouped_OGC.amin(-1)
    largest_OG = torch.maximum(highest_OG, -lowest_OG).clamp_(min=_SMALLEST_SCALE)
    largest_OG = torch.where(highest_OG > -lowest_OG, -largest_OG, largest_OG)
    best_OG = least_OG = None
    steps_OGC, rounded_OGC = torch.empty_like(grouped_OGC), torch.empty_like(grouped_OGC)
    for step in _INT4_STEPS:
        scales_OG = (largest_OG / step).bfloat16()
        scale_OG = scales_OG.float()
        torch.div(grouped_OGC, scale_OG[:, :, None], out=steps_OGC)
        torch.round(steps_OGC, out=rounded_OGC).clamp_(-8, 7)
        units_OG = steps_OGC.sub_(rounded_OGC).square_().mul_(_COST_UNITS).round_().sum(-1)
        cost_OG = units_OG.mul_(scale_OG.square_())
        if best_OG is None or least_OG is None:
            best_OG, least_OG = scales_OG, cost_OG
        else:
            best_OG = torch.where(cost_OG < least_OG, scales_OG, best_OG)
            least_OG = torch.minimum(cost_OG, least_OG)
    assert best_OG is not None
    return best_OG


def concatenate(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one kind and group over the same input channels, one's output channels below the other's."""
    first = parts[0]
    assert all((part.kind, part.group) == (first.kind, first.group) for part in parts)
    scales = [part.scales_OG for part in parts]
    if len({scale.dtype for scale in scales}) > 1:
        scales = [scale.float() for scale in scales]
    q = torch.cat([part.q.view(torch.uint8) for part in parts]).view(first.q.dtype)
    return QuantizedWeight(first.kind, q, torch.cat(scales), first.group)


def pack_nibbles(q_OI: Tensor) -> Tensor:
    """int8 [O, I] in -8..7 -> uint8 [O, I / 2], even input channels in the low nibbles."""
    nibbles = (q_OI & 0xF).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
