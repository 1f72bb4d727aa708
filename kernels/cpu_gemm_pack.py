"""Weights packed for products on CPU: who owns the memory that descriptors point to. The plain weight is not kept.
Knows layouts (`cpu_gemm_layout`), not products."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from .cpu_gemm_layout import (
    BF16,
    BLOCK_BYTES,
    F32,
    FIELDS,
    FP8,
    GROUP_STEPS,
    INT4,
    INT8,
    OUT,
    PANEL,
    PANEL_OF_BF16,
    PANEL_OF_F32,
    PANELS,
    SCALES,
    STEPS,
    WEIGHTS,
    WIDE_PANELS,
    X_STRIDE,
)
from .cpu_gemm_panel import panel_address
from .cpu_memory import i32_array, jit, u8_array, u16_array
from .quantized import QuantizedWeight

_STORAGE = {"int8": INT8, "fp8": FP8, "int4": INT4}


class CpuWeight:
    """One weight [O, I] in the layout of products, with the descriptor that kernels find it by."""

    __slots__ = ("__weakref__", "_address", "_descriptor", "_dtypes", "_memory", "_scales", "_storage", "x_stride")

    def __init__(self, weight: Tensor | QuantizedWeight) -> None:
        outputs, inputs = weight.shape
        if isinstance(weight, QuantizedWeight):
            self._storage, values, group = _STORAGE[weight.kind], weight.q, weight.group
        else:
            self._storage, values, group = BF16 if weight.dtype is torch.bfloat16 else F32, weight, inputs
        channels = 1 if self._storage == F32 else 2
        steps = -(-inputs // channels)
        self.x_stride = steps * channels
        """Numbers from one row of x to the next: one more than `inputs` where these are odd, and zero there."""
        wide = -(-outputs // PANEL) if self._storage >= INT8 else outputs // PANEL
        tail = max(0, -(-(outputs - wide * PANEL) // 16))
        self._memory = torch.empty((4 * wide + tail) * steps * BLOCK_BYTES[self._storage], dtype=torch.uint8)
        padding = 0 if self._storage == INT4 else self.x_stride - inputs
        values = functional.pad(values.view(_word(values)), (0, padding)) if padding else values.contiguous()
        arguments = (values.data_ptr(), self._memory.data_ptr(), outputs, steps, wide, tail)
        if self._storage <= BF16:
            _pack_words(*arguments)
        elif self._storage == INT4:
            _pack_nibbles(*arguments)
        else:
            _pack_bytes(*arguments, self._storage == INT8)
        self._scales = _packed_scales(weight.scales_OG, wide) if isinstance(weight, QuantizedWeight) else None
        self._dtypes: frozenset[torch.dtype] = frozenset()
        self._descriptor = np.zeros(FIELDS, np.int64)
        self._descriptor[WEIGHTS] = self._memory.data_ptr()
        self._descriptor[SCALES] = 0 if self._scales is None else self._scales.data_ptr()
        self._descriptor[[OUT, X_STRIDE, STEPS]] = outputs, self.x_stride, steps
        self._descriptor[GROUP_STEPS] = group // 2 if group < inputs else 0
        self._descriptor[[PANELS, WIDE_PANELS]] = wide + tail, wide
        self._address = self._descriptor.ctypes.data

    def prepared(self, dtype: torch.dtype) -> int:
        """Address of the descriptor, ready for rows of `dtype`: compiles on first use. Raises TypeError for rows that
        do not fit the weight's type."""
        if dtype not in self._dtypes:
            field = PANEL_OF_BF16 if dtype is torch.bfloat16 else PANEL_OF_F32
            self._descriptor[field] = panel_address(self._storage, dtype)
            self._dtypes |= {dtype}
        return self._address


def _word(values: Tensor) -> torch.dtype:
    """Integers of the same size, which can be padded whatever the type."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.itemsize]


def _packed_scales(scales_OG: Tensor, panels: int) -> Tensor:
    """float32 [panel, group, 64]"""
    outputs, groups = scales_OG.shape
    padded = functional.pad(scales_OG.float(), (0, 0, 0, panels * PANEL - outputs))
    return padded.view(panels, PANEL, groups).transpose(1, 2).contiguous()


@jit
def _pack_words(pvalues, pout, outputs, steps, wide, tail):
    """Words of four bytes: one float32, or two of bfloat16. Sixteen steps at a time, a cache line of each channel,
    which would not stay in the cache until the next step if channels are a power of two apart."""
    values, out = i32_array(pvalues, outputs * steps), i32_array(pout, (4 * wide + tail) * 16 * steps)
    for panel in range(wide + tail):
        first = min(panel, wide) * 64 + max(0, panel - wide) * 16
        channels = 64 if panel < wide else 16
        for start in range(0, steps, 16):
            end = min(start + 16, steps)
            for n in range(channels):
                o = first + n
                for step in range(start, end):
                    out[first * steps + step * channels + n] = values[o * steps + step] if o < outputs else 0


@jit
def _pack_bytes(pvalues, pout, outputs, steps, wide, tail, signed):
    values, out = u16_array(pvalues, outputs * steps), u16_array(pout, wide * 64 * steps)
    for panel in range(wide):
        for step in range(steps):
            at = (panel * steps + step) * 64
            for n in range(64):
                o = panel * 64 + n
                pair = values[o * steps + step] if o < outputs else np.uint16(0)
                if signed:
                    pair = _sign_and_magnitude(pair & 0xFF) | _sign_and_magnitude(pair >> 8) << 8
                out[at + n // 32 * 32 + n % 16 // 4 * 8 + n // 16 % 2 * 4 + n % 4] = pair


@jit
def _sign_and_magnitude(byte):
    """Of a two's complement; -128 becomes -0."""
    return byte if byte < 128 else np.uint16(0x80) | ((np.uint16(256) - byte) & np.uint16(0x7F))


@jit
def _pack_nibbles(pvalues, pout, outputs, steps, wide, tail):
    values, out = u8_array(pvalues, outputs * steps), u16_array(pout, wide * 32 * steps)
    for panel in range(wide):
        for step in range(steps):
            at = (panel * steps + step) * 32
            for lane in range(16):
                even, odd = np.uint16(0), np.uint16(0)
                for block in range(4):
                    o = panel * 64 + block * 16 + lane
                    pair = np.uint16(values[o * steps + step] if o < outputs else 0)
                    even |= (pair & np.uint16(0xF)) << np.uint16(4 * block)
                    odd |= (pair >> np.uint16(4)) << np.uint16(4 * block)
                out[at + 2 * lane], out[at + 2 * lane + 1] = even, odd
