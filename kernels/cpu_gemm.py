"""Products of rows with packed weights on CPU, and whole SwiGLU MLPs of them in one call. Threads divide panels of
output channels and rows, never a sum, so the bits do not depend on their number. Knows descriptors
(`cpu_gemm_layout`), not who owns them.

Shapes: N rows sorted by expert, E experts, F expert width."""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# llvmlite states other types than it returns; intrinsics are called without the typing context.
from __future__ import annotations

from array import array
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from .cpu_gemm_layout import FIELDS, OUT, PANEL, PANEL_OF_BF16, PANEL_OF_F32, PANELS, X_STRIDE
from .cpu_memory import call_address, fetch_add, i64_array, jit, stack
from .cpu_threads import parallel_address
from .silu_mul import silu_mul_rows

_NEXT, _EXPERTS, _TABLE, _COUNTS, _X, _OUT, _X_BYTES, _PART = range(8)
"""Fields of a job: the next item; experts, and the addresses of their descriptors (of every second entry of a table)
and of their numbers of rows; addresses of x and out; bytes of a number; rows of an item."""
_ROWS, _WIDTH, _STRIDE = range(1, 4)
"""Fields of a job of gates, in place of the three after the first: rows, F, numbers from one row of out to the next."""
_FIELDS = 8
_JOB_BYTES = 8 * _FIELDS

_PART_ROWS = 48
"""Rows of an item where there are too few panels to go round."""
_SMALL = 4 << 20
"""Multiplications, counting at least eight rows, below which waking other threads takes longer than it saves."""


@jit
def _multiply_items(pjob):
    """Takes items, one panel times some rows each, until there are none."""
    job = i64_array(pjob, _FIELDS)
    experts, x_bytes, part = job[_EXPERTS], job[_X_BYTES], job[_PART]
    table, counts = i64_array(job[_TABLE], 2 * experts), i64_array(job[_COUNTS], experts)
    function = PANEL_OF_BF16 if x_bytes == 2 else PANEL_OF_F32
    first_item, first_row = 0, 0
    item = fetch_add(pjob, 1)
    for e in range(experts):
        rows = counts[e]
        if rows > 0:
            d = i64_array(table[2 * e], FIELDS)
            parts = (rows + part - 1) // part
            items = d[PANELS] * parts
            while item < first_item + items:
                panel, row = (item - first_item) // parts, (item - first_item) % parts * part
                at_x = job[_X] + (first_row + row) * d[X_STRIDE] * x_bytes
                at_out = job[_OUT] + (first_row + row) * d[OUT] * x_bytes
                call_address(d[function], (table[2 * e], panel, at_x, min(part, rows - row), at_out))
                item = fetch_add(pjob, 1)
            first_item += items
            first_row += rows


@jit
def _gate_items(pjob):
    """Takes items, some rows of gate and up each, until there are none."""
    job = i64_array(pjob, _FIELDS)
    F, stride, x_bytes, part = job[_WIDTH], job[_STRIDE], job[_X_BYTES], job[_PART]
    row = fetch_add(pjob, part)
    while row < job[_ROWS]:
        rows = min(part, job[_ROWS] - row)
        at_x, at_out = job[_X] + row * 2 * F * x_bytes, job[_OUT] + row * stride * x_bytes
        if x_bytes == 2:
            silu_mul_rows(at_x, at_out, rows, F, stride, np.uint16(0))
        else:
            silu_mul_rows(at_x, at_out, rows, F, stride, np.float32(0.0))
        row = fetch_add(pjob, part)


@jit
def _multiply(ptable, pcounts, experts, px, pout, x_bytes, threads, pparallel, pmultiply):
    """out = x W^T for each expert and its rows."""
    pjob = stack(_JOB_BYTES)
    job = i64_array(pjob, _FIELDS)
    table, counts = i64_array(ptable, 2 * experts), i64_array(pcounts, experts)
    panels, most, work = 0, 0, 0
    for e in range(experts):
        if counts[e] > 0:
            d = i64_array(table[2 * e], FIELDS)
            panels += d[PANELS]
            most = max(most, counts[e])
            work += max(counts[e], 8) * d[OUT] * d[X_STRIDE]
    job[_NEXT], job[_EXPERTS], job[_TABLE], job[_COUNTS] = 0, experts, ptable, pcounts
    job[_X], job[_OUT], job[_X_BYTES] = px, pout, x_bytes
    job[_PART] = max(most, 1)
    if threads > 1 and work >= _SMALL:
        if panels < 4 * threads:
            job[_PART] = _PART_ROWS
        call_address(pparallel, (pmultiply, pjob, threads, 0))
    else:
        _multiply_items(pjob)


@jit
def _gate(rows, F, stride, px, pout, x_bytes, threads, pparallel, pgate):
    """out = silu(gate) * up"""
    pjob = stack(_JOB_BYTES)
    job = i64_array(pjob, _FIELDS)
    job[_NEXT], job[_ROWS], job[_WIDTH], job[_STRIDE] = 0, rows, F, stride
    job[_X], job[_OUT], job[_X_BYTES], job[_PART] = px, pout, x_bytes, rows
    if threads > 1 and rows * F >= _SMALL // PANEL:
        job[_PART] = (rows + 4 * threads - 1) // (4 * threads)
        call_address(pparallel, (pgate, pjob, threads, 0))
    else:
        _gate_items(pjob)


@jit
def _one(pdescriptor, rows, px, pout, x_bytes, threads, pparallel, pmultiply):
    ptable, pcounts = stack(16), stack(8)
    i64_array(ptable, 2)[0] = pdescriptor
    i64_array(pcounts, 1)[0] = rows
    _multiply(ptable, pcounts, 1, px, pout, x_bytes, threads, pparallel, pmultiply)


@jit
def _mlps(ptable, pcounts, experts, px, phidden, pgated, pout, x_bytes, threads, pparallel, pmultiply, pgate):
    """One thread finishes an expert before the next, so that its hidden rows stay in a cache; more do each of the three
    steps for all experts together."""
    table, counts = i64_array(ptable, 2 * experts), i64_array(pcounts, experts)
    at_once = 1 if threads <= 1 else experts
    for first in range(0, experts, at_once):
        rows, F, stride, D, x_stride = 0, 0, 0, 0, 0
        for e in range(first, first + at_once):
            if counts[e] > 0:
                up, down = i64_array(table[2 * e], FIELDS), i64_array(table[2 * e + 1], FIELDS)
                rows += counts[e]
                F, stride, D, x_stride = up[OUT] // 2, down[X_STRIDE], down[OUT], up[X_STRIDE]
        if rows:
            at, numbers = ptable + 16 * first, pcounts + 8 * first
            _multiply(at, numbers, at_once, px, phidden, x_bytes, threads, pparallel, pmultiply)
            _gate(rows, F, stride, phidden, pgated, x_bytes, threads, pparallel, pgate)
            _multiply(at + 8, numbers, at_once, pgated, pout, x_bytes, threads, pparallel, pmultiply)
            px += rows * x_stride * x_bytes
            pout += rows * D * x_bytes


@cache
def _functions() -> tuple[int, int, int]:
    """Addresses: of OpenMP's function that starts threads, and of the two that they run."""

    @cfunc(types.void(types.int64), cache=True)
    def multiply(pjob):
        _multiply_items(pjob)

    @cfunc(types.void(types.int64), cache=True)
    def gate(pjob):
        _gate_items(pjob)

    _keep_alive.extend((multiply, gate))
    return parallel_address(), multiply.address, gate.address


_keep_alive: list[Any] = []


def _threads() -> tuple[int, int, int, int]:
    """How many there are to be, and `_functions` if that is more than one."""
    threads = torch.get_num_threads()
    if threads == 1 or not parallel_address():
        return 1, 0, 0, 0
    return threads, *_functions()


def multiply(descriptor: int, x_TI: Tensor, out_TO: Tensor) -> None:
    """out = x W^T. `descriptor`: address of one that is prepared for the type of x and out; x has as many numbers a row
    as it says."""
    threads, pparallel, pmultiply, _ = _threads()
    rows, x_bytes = x_TI.shape[0], x_TI.itemsize
    _one(descriptor, rows, x_TI.data_ptr(), out_TO.data_ptr(), x_bytes, threads, pparallel, pmultiply)


def multiply_mlps(table: int, counts_E: array[int], width: int, x_ND: Tensor, out_ND: Tensor) -> None:
    """out = down(silu(gate) * up) of each expert's rows, rounded after each of the three. table: address of two
    addresses of descriptors for each expert, of gate and up and of down, of equal shapes and prepared for the type of x
    and out (any for experts without rows); width: numbers in a row of down's input."""
    threads, *functions = _threads()
    N = x_ND.shape[0]
    hidden = x_ND.new_empty(3 * N * width)
    phidden, x_bytes = hidden.data_ptr(), x_ND.itemsize
    addresses = (x_ND.data_ptr(), phidden, phidden + 2 * N * width * x_bytes, out_ND.data_ptr())
    _mlps(table, counts_E.buffer_info()[0], len(counts_E), *addresses, x_bytes, threads, *functions)
