"""How a linear map's weight lies in a GPU's memory for the Triton products. Made from plain or quantised weights on any
device. Knows nothing of the kernels that read it.

Shapes: O out features, I in features, R = 16 output channels of one block, S = 4 slices of a step, P input channels of
one plane, G groups of input channels that share a scale.

Quantised values lie in the order in which they are read: [O / R, I / step, S, R, P] 16-bit words, so that 16 output
channels times one step are 4 KiB in one piece. A word holds several planes, four of int4 or two of int8 and fp8: word p
of a slice holds its input channels p, p + P and so on, the first in the lowest bits. Masks and one fused multiply-add
then turn two words into two bfloat16 values of one plane, and no value has to change its lane. int4 is stored as
q + 8, int8 as two's complement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from .quantized import QuantizedWeight

WeightKind = Literal["plain", "int8", "int4", "fp8", "fp8_rows"]

CHANNELS = 16
SLICES = 4
_PLANE = 32
_PLANES = {"int4": 4, "int8": 2, "fp8": 2}
_CHUNK = 2048
"""Output channels packed at a time: what bounds the temporaries."""


@dataclass(frozen=True, slots=True)
class GpuWeight:
    """W[o, i] = value[o, i] * scale[i // group, o]."""

    kind: WeightKind
    """fp8_rows: fp8 for rows that are e4m3 too, whose bytes the MMA takes as they are: P is 64 bytes, not words."""
    values: Tensor
    """plain: [O, I] as it was. Otherwise int16 (uint8 for fp8_rows) [O / R, I / step, S, R, P], padded with zeros."""
    scales_GO: Tensor | None
    """float32 or bfloat16 [G, O], O padded to a multiple of R; None for plain weights."""
    group: int
    """Input channels per scale; 0 if an output channel has one scale only."""
    plane: int
    out_features: int
    in_features: int

    @property
    def step(self) -> int:
        """Input channels that one step of the products takes."""
        return SLICES * self.plane * _PLANES.get(self.kind, 1)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.scales_GO.nbytes if self.scales_GO is not None else 0)


def pack(weight_OI: Tensor | QuantizedWeight, fp8_rows: bool = False) -> GpuWeight:
    """Lay a weight out, on the device where it is. I must be a multiple of 32."""
    O, I = weight_OI.shape  # noqa: E741
    assert I % 32 == 0, f"{I} input channels are not a multiple of 32"
    if isinstance(weight_OI, Tensor):
        plane = 16 if weight_OI.dtype is torch.float32 else 64
        return GpuWeight("plain", weight_OI.contiguous(), None, 0, plane, O, I)
    kind: WeightKind = "fp8_rows" if fp8_rows else weight_OI.kind
    group = weight_OI.group if weight_OI.group < I else 0
    assert not fp8_rows or (weight_OI.kind == "fp8" and not group), "fp8 rows need fp8 weights with a scale per channel"
    plane = 2 * _PLANE if fp8_rows else _PLANE
    step = SLICES * plane * _PLANES.get(kind, 1)
    q = weight_OI.q.view(torch.uint8)
    values = torch.cat([_words(q[start : start + _CHUNK], kind, plane, step) for start in range(0, O, _CHUNK)])
    scales_OG = weight_OI.scales_OG
    missing = (-(-I // step) * step - 1) // group + 1 - scales_OG.shape[1] if group else 0
    scales_GO = functional.pad(scales_OG.T, (0, -O % CHANNELS, 0, missing)).contiguous()
    return GpuWeight(kind, values, scales_GO, group, plane, O, I)


def _words(q: Tensor, kind: WeightKind, plane: int, step: int) -> Tensor:
    """Bytes [O, I], or pairs of nibbles [O, I / 2] -> [O / R, I / step, S, R, P]."""
    if kind == "int4":
        q = torch.stack((q & 0xF, q >> 4), dim=-1).flatten(-2) ^ 8
    q = functional.pad(q, (0, -q.shape[1] % step, 0, -q.shape[0] % CHANNELS), value=8 if kind == "int4" else 0)
    shape = (-1, CHANNELS, q.shape[1] // step, SLICES)
    if kind == "fp8_rows":
        return q.view(*shape, plane).permute(0, 2, 3, 1, 4).contiguous()
    planes = q.view(*shape, _PLANES[kind], plane).permute(4, 0, 2, 3, 1, 5)
    if kind == "int4":
        planes = torch.stack((planes[0] | (planes[1] << 4), planes[2] | (planes[3] << 4)))
    return torch.stack((planes[0], planes[1]), dim=-1).view(torch.int16).squeeze(-1)
