"""SIMD vectors of float32 as values inside Numba kernels, because LLVM's own vectoriser leaves the accumulators of
attention in memory and gates in single lanes. A width that the CPU lacks is split by LLVM, so one kernel serves every
machine.

Widths are compile-time constants of the calling kernel. Arrays are those of `cpu_memory.elements`, bfloat16 bits or
float32 alike. Knows nothing of what the numbers mean."""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# llvmlite states other types than it returns; intrinsics are called without the typing context.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model


class Float32Vector(types.Type):
    """Numba type of `width` float32 lanes."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"float32x{width}")


@register_model(Float32Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(ir.FloatType(), fe_type.width))


def _operation(define: Callable[..., Any]) -> Callable[..., Any]:
    """`intrinsic`, typed as kernels call it: without the typing context."""
    return intrinsic(prefer_literal=True)(define)


def _pointer(context, builder, array_type, array, index, lane: ir.Type, width: int):
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(lane, width).as_pointer())


@_operation
def vector_zero(typingctx, width):
    """(width) -> vector of zeros."""
    lanes = width.literal_value

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.VectorType(ir.FloatType(), lanes), [0.0] * lanes)

    return Float32Vector(lanes)(width), codegen


@_operation
def vector_load(typingctx, array, index, width):
    """(array, index, width) -> array[index : index + width] as float32."""
    lanes = width.literal_value

    def codegen(context, builder, signature, args):
        if array.dtype == types.float32:
            return builder.load(_pointer(context, builder, array, args[0], args[1], ir.FloatType(), lanes), align=4)
        bits = builder.load(_pointer(context, builder, array, args[0], args[1], ir.IntType(16), lanes), align=2)
        wide = ir.VectorType(ir.IntType(32), lanes)
        shifted = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes))
        return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), lanes))

    return Float32Vector(lanes)(array, types.intp, width), codegen


@_operation
def vector_store(typingctx, array, index, value):
    """(array, index, vector): rounded to nearest even if the array is of bfloat16; NaN stays NaN."""

    def codegen(context, builder, signature, args):
        if array.dtype == types.float32:
            place = _pointer(context, builder, array, args[0], args[1], ir.FloatType(), value.width)
            builder.store(args[2], place, align=4)
        else:
            place = _pointer(context, builder, array, args[0], args[1], ir.IntType(16), value.width)
            builder.store(_rounded_bits(builder, args[2]), place, align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


def _rounded_bits(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    wide = ir.VectorType(ir.IntType(32), value.type.count)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, splat(wide, 16)), splat(wide, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, splat(wide, 0x7FFF)), odd), splat(wide, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, splat(wide, 0x7FC0), rounded)
    return builder.trunc(rounded, ir.VectorType(ir.IntType(16), value.type.count))


@_operation
def vector_multiply_add(typingctx, scalar, value, accumulator):
    """(float32 scalar, vector, accumulator) -> scalar * vector + accumulator, rounded once."""

    def codegen(context, builder, signature, args):
        lane, vector = ir.IntType(32), ir.VectorType(ir.FloatType(), value.width)
        undefined = ir.Constant(vector, ir.Undefined)
        seed = builder.insert_element(undefined, args[0], lane(0))
        first = ir.Constant(ir.VectorType(lane, value.width), [0] * value.width)
        factor = builder.shuffle_vector(seed, undefined, first)
        return call(builder, f"llvm.fma.v{value.width}f32", vector, [factor, args[1], args[2]])

    return value(types.float32, value, value), codegen


@_operation
def vector_silu_multiply(typingctx, gate, up):
    """(gate, up) -> gate / (1 + e^-gate) * up, e^x as in `cpu_memory.exp_f32`; NaN in either shows."""

    def codegen(context, builder, signature, args):
        vector = args[0].type
        one = splat(vector, 1.0)
        divisor = builder.fadd(one, _exp(builder, builder.fneg(args[0])))
        return builder.fmul(builder.fdiv(args[0], divisor), args[1])

    return gate(gate, up), codegen


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    vector = x.type
    wide = ir.VectorType(ir.IntType(32), vector.count)
    suffix = f"v{vector.count}f32"

    def fma(a, b, c):
        return call(builder, f"llvm.fma.{suffix}", vector, [a, b, c])

    lowest, highest = splat(vector, -87.3), splat(vector, 88.0)
    below, above = builder.fcmp_ordered("<", x, lowest), builder.fcmp_ordered(">", x, highest)
    clamped = builder.select(below, lowest, builder.select(above, highest, x))
    n = fma(clamped, splat(vector, 1.4426950408889634), splat(vector, 0.5))
    n = call(builder, f"llvm.floor.{suffix}", vector, [n])
    r = fma(n, splat(vector, -0.6931471805599453), clamped)
    p = splat(vector, 1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = fma(p, r, splat(vector, factor))
    is_nan = builder.fcmp_unordered("uno", x, x)
    exponent = builder.fptosi(builder.select(is_nan, splat(vector, 0.0), n), wide)
    exponent = builder.shl(builder.add(exponent, splat(wide, 127)), splat(wide, 23))
    y = builder.fmul(p, builder.bitcast(exponent, vector))
    y = builder.select(below, splat(vector, 0.0), y)
    return builder.select(above, splat(vector, float("inf")), y)


def splat(vector: ir.VectorType, value: float) -> ir.Constant:
    """The constant in all lanes."""
    if isinstance(vector.element, ir.FloatType):
        value = float(np.float32(value))  # LLVM refuses what float32 cannot represent
    return ir.Constant(vector, [value] * vector.count)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    """The LLVM intrinsic of that name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)
