"""The product of any number of rows with one panel of output channels of a packed weight: a function compiled for each
kind of weight. A row's sums are made of the same operations in the same order whatever rows are beside it. Knows
nothing of threads or of who owns the memory."""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# llvmlite states other types than it returns; intrinsics are called without the typing context.
from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from llvmlite import binding
from numba import cfunc, types

from .cpu_gemm_layout import (
    BF16,
    BLOCK_BYTES,
    F32,
    FIELDS,
    GROUP_STEPS,
    INT8,
    OUT,
    PANEL,
    SCALES,
    STEPS,
    WEIGHTS,
    WIDE_PANELS,
    X_STRIDE,
)
from .cpu_gemm_tile import add_tiles, most_rows, tile_kind
from .cpu_memory import f32_array, f32_to_bf16, i64_array, jit, stack, u16_array

_CHUNK = 192
"""Rows whose totals lie on the stack together."""
_BLOCK = 256
"""Steps that many rows take together, so that this piece of the panel stays in a cache."""

_AHEAD = (8192, 8192, 16384, 16384, 16384)
"""Bytes by which a single tile fetches weights early, by storage: the processor follows the sequence by itself, but not
far enough where a byte takes long to compute with."""


@cache
def host_has_dots() -> bool:
    """Whether this machine multiplies pairs of bfloat16, and looks up bytes in tables."""
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512bf16", "avx512bw", "avx512vbmi"))


@cache
def host_is_wide() -> bool:
    """Whether this machine has 32 registers of 512 bits."""
    return binding.get_host_cpu_features().get("avx512f", False)


@cache
def _stamp() -> int:
    """Changes with the files that write a panel function's instructions, which Numba's disk cache does not look at."""
    names = ("cpu_gemm_decode.py", "cpu_gemm_layout.py", "cpu_gemm_tile.py", "cpu_memory.py", "cpu_vector.py")
    return 1 + zlib.crc32(b"".join((Path(__file__).parent / name).read_bytes() for name in names))


def panel_address(storage: int, x_dtype: torch.dtype) -> int:
    """Address of the panel function for rows of `x_dtype`, compiled on first use. Raises TypeError for other types than
    bfloat16 and float32, and where these two meet."""
    half = x_dtype is torch.bfloat16
    if not half and x_dtype is not torch.float32:
        raise TypeError(f"CPU products take rows of bfloat16 or float32, not {x_dtype}")
    if storage == (F32 if half else BF16):
        raise TypeError(f"rows of {x_dtype} meet weights of {torch.float32 if half else torch.bfloat16}")
    return panel_function(storage, int(half and host_has_dots()), 2 if half else 4, int(host_is_wide())).address


@cache
def panel_function(storage: int, dots: int, x_bytes: int, wide: int):
    """(descriptor, panel, x, rows, out): multiplies all rows with one panel and writes its channels of out [rows, OUT].
    The closure holds integers only: Numba's disk cache recognises nothing else from one process to the next."""
    kind = tile_kind(storage, dots, x_bytes, wide)
    quantised, most = int(storage >= INT8), most_rows(storage, wide)
    chunk, block, block_bytes = _CHUNK, _BLOCK, BLOCK_BYTES[storage]
    ahead = _AHEAD[storage]
    step_x = x_bytes * (1 if storage == F32 else 2)
    totals_bytes = _CHUNK * PANEL * 4
    stamp = _stamp()

    def panel(pdescriptor, index, px, rows, pout):
        assert stamp  # in the closure, and so in the cache's key
        d = i64_array(pdescriptor, FIELDS)
        steps, group, x_stride, wide_panels = d[STEPS], d[GROUP_STEPS], d[X_STRIDE] * x_bytes, d[WIDE_PANELS]
        blocks_before = 4 * min(index, wide_panels) + max(0, index - wide_panels)
        width = 4 if index < wide_panels else 1
        pweights, step_bytes = d[WEIGHTS] + blocks_before * steps * block_bytes, width * block_bytes
        channels = min(16 * width, d[OUT] - 16 * blocks_before)
        groups = steps // group if group else 1
        pscales = d[SCALES] + index * groups * PANEL * 4 if quantised else 0
        ptotals = stack(totals_bytes)
        totals = f32_array(ptotals, chunk * PANEL)
        for first in range(0, rows, chunk):
            count = min(chunk, rows - first)
            totals[: count * PANEL] = np.float32(0.0)
            tiles = (count + most - 1) // most
            at_once = steps if tiles == 1 else block
            if group:
                at_once = max(group, at_once // group * group)
            for step in range(0, steps, at_once):
                n = min(at_once, steps - step)
                after, fetch_step = pweights + (step + n) * step_bytes, step_bytes // tiles
                span = group if group else n
                for tile in range(tiles):
                    row, end = count * tile // tiles, count * (tile + 1) // tiles
                    at_total = ptotals + row * PANEL * 4
                    for k in range(step, step + n, span):
                        at = pweights + k * step_bytes
                        at_x = px + (first + row) * x_stride + k * step_x
                        # One tile fetches what it reads itself, several share what comes after these steps.
                        fetch = at + ahead if tiles == 1 else after + (tile * n + k - step) * fetch_step
                        scales = pscales + k // span * PANEL * 4 if group else 0
                        x = end - row, at_x, x_stride
                        if width == 4:
                            add_tiles(kind, 4, x, at, span, at_total, scales, fetch, fetch_step)
                        elif not quantised:
                            add_tiles(kind, 1, x, at, span, at_total, 0, fetch, fetch_step)
            for row in range(count):
                at = pout + ((first + row) * d[OUT] + 16 * blocks_before) * x_bytes
                factors = pscales if quantised and not group else 0
                if x_bytes == 2:
                    _finish_bf16(ptotals + row * PANEL * 4, factors, channels, at)
                else:
                    _finish_f32(ptotals + row * PANEL * 4, factors, channels, at)

    return cfunc(types.void(*[types.int64] * 5), cache=True)(panel)


@jit
def _finish_bf16(ptotals, pscales, count, pout):
    totals, out = f32_array(ptotals, count), u16_array(pout, count)
    if pscales:
        scales = f32_array(pscales, count)
        for j in range(count):
            out[j] = f32_to_bf16(totals[j] * scales[j])
    else:
        for j in range(count):
            out[j] = f32_to_bf16(totals[j])


@jit
def _finish_f32(ptotals, pscales, count, pout):
    totals, out = f32_array(ptotals, count), f32_array(pout, count)
    if pscales:
        scales = f32_array(pscales, count)
        for j in range(count):
            out[j] = totals[j] * scales[j]
    else:
        out[:] = totals
