"""Numba access to tensor memory: typed arrays over raw addresses, and bfloat16 as 16-bit integers.

Passing addresses instead of NumPy arrays keeps a call at about a microsecond and admits bfloat16, which NumPy lacks.
Callers own the tensors and vouch for shapes and contiguity. Knows nothing of what the numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from numba.np.numpy_support import carray

jit = numba.njit(
    nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", boundscheck=False
)
"""Compiled once and cached on disk. No `nnan`/`ninf`: infinities are masks and NaN must stay visible."""


def _pointer_intrinsic(pointee: types.Type, llvm_type: ir.Type) -> Callable[..., Any]:
    """(address) -> typed pointer."""

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], llvm_type.as_pointer())

        return types.CPointer(pointee)(types.int64), codegen

    return pointer


def _bitcast_intrinsic(source: types.Type, target: types.Type, llvm_type: ir.Type) -> Callable[..., Any]:
    """(value of `source`) -> the same bits as `target`."""

    @intrinsic
    def bitcast(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], llvm_type)

        return target(source), codegen

    return bitcast


_pointer_u8 = _pointer_intrinsic(types.uint8, ir.IntType(8))
_pointer_u16 = _pointer_intrinsic(types.uint16, ir.IntType(16))
_pointer_f32 = _pointer_intrinsic(types.float32, ir.FloatType())
_pointer_i32 = _pointer_intrinsic(types.int32, ir.IntType(32))
_pointer_i64 = _pointer_intrinsic(types.int64, ir.IntType(64))
_bits_to_f32 = _bitcast_intrinsic(types.uint32, types.float32, ir.FloatType())
_f32_to_bits = _bitcast_intrinsic(types.float32, types.uint32, ir.IntType(32))


@jit
def f32_array(address, count):
    return carray(_pointer_f32(address), (count,), np.float32)


@jit
def u8_array(address, count):
    return carray(_pointer_u8(address), (count,), np.uint8)


@jit
def u16_array(address, count):
    """Also the bits of bfloat16."""
    return carray(_pointer_u16(address), (count,), np.uint16)


@jit
def i32_array(address, count):
    return carray(_pointer_i32(address), (count,), np.int32)


@jit
def i64_array(address, count):
    return carray(_pointer_i64(address), (count,), np.int64)


@jit
def bf16_to_f32(bits):
    return _bits_to_f32(np.uint32(bits) << np.uint32(16))


@jit
def f32_to_bf16(value):
    """Round to nearest even; NaN stays NaN."""
    bits = _f32_to_bits(np.float32(value))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(0x7FC0) if value != value else np.uint16(rounded)


@jit
def exp_f32(x):
    """e^x in float32 to 5 ulp (2.5 near 0), as straight-line code that vectorises (libm's exp does not).

    x = n ln2 + r with |r| <= ln2 / 2; e^r by its Taylor polynomial of degree 7; 2^n through the exponent bits.
    Below -87.3 the result is 0, above 88 infinity; NaN stays NaN.
    """
    clamped = min(max(x, np.float32(-87.3)), np.float32(88.0))
    n = np.floor(clamped * np.float32(1.4426950408889634) + np.float32(0.5))
    r = clamped - n * np.float32(0.6931471805599453)
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    y = p * _bits_to_f32(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    y = np.float32(0.0) if x < np.float32(-87.3) else y
    y = np.float32(np.inf) if x > np.float32(88.0) else y
    return x if x != x else y


@intrinsic(prefer_literal=True)
def stack(typingctx, size):
    """(literal size) -> address of so many bytes on the stack, aligned to 64, for the rest of the calling function."""
    count = size.literal_value

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(ir.IntType(8), count))
        memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(size), codegen


@intrinsic
def fetch_add(typingctx, address, value):
    """(address, integer) -> the int64 there, which grows by the value at once for all threads."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call_address(typingctx, address, arguments):
    """(address of a C function of int64 arguments and no result, tuple of them)."""

    def codegen(context, builder, signature, args):
        values = [builder.extract_value(args[1], n) for n in range(len(arguments))]
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(values))
        builder.call(builder.inttoptr(args[0], function.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(arguments))), codegen


BF16_TAG = np.uint16(0)
F32_TAG = np.float32(0)


def dtype_tag(tensor: torch.Tensor) -> np.uint16 | np.float32:
    """A value whose *type* tells a kernel how to read the tensor: bfloat16 bits or float32."""
    if tensor.dtype is torch.bfloat16:
        return BF16_TAG
    if tensor.dtype is torch.float32:
        return F32_TAG
    raise TypeError(f"CPU kernels take bfloat16 or float32, not {tensor.dtype}")


def elements(address, count, tag):
    """Inside kernels: `count` elements at `address`, typed by `tag`."""
    raise NotImplementedError("only inside compiled kernels")


def load(array, index):
    """Inside kernels: one element as float32."""
    raise NotImplementedError("only inside compiled kernels")


def store(array, index, value):
    """Inside kernels: write one float32, rounded to the array's type."""
    raise NotImplementedError("only inside compiled kernels")


@overload(elements)
def _elements(address, count, tag):
    if tag == types.uint16:
        return lambda address, count, tag: carray(_pointer_u16(address), (count,), np.uint16)
    return lambda address, count, tag: carray(_pointer_f32(address), (count,), np.float32)


@overload(load)
def _load(array, index):
    if array.dtype == types.uint16:
        return lambda array, index: bf16_to_f32(array[index])
    return lambda array, index: array[index]


@overload(store)
def _store(array, index, value):
    if array.dtype == types.uint16:

        def store_bf16(array, index, value):
            array[index] = f32_to_bf16(value)

        return store_bf16

    def store_f32(array, index, value):
        array[index] = value

    return store_f32
