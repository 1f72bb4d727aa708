"""SIMD vectors of float32 as values inside Numba kernels, because LLVM's own vectoriser leaves the accumulators of
attention in memory. A width that the CPU lacks is split by LLVM, so one kernel serves every machine.

Widths are compile-time constants of the calling kernel. Arrays are those of `cpu_memory.elements`, bfloat16 bits or
float32 alike. Knows nothing of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """(float32 array, index, vector)."""

    def codegen(context, builder, signature, args):
        builder.store(
            args[2], _pointer(context, builder, array, args[0], args[1], ir.FloatType(), value.width), align=4
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@_operation
def vector_multiply_add(typingctx, scalar, value, accumulator):
    """(float32 scalar, vector, accumulator) -> scalar * vector + accumulator, rounded once."""

    def codegen(context, builder, signature, args):
        lane, vector = ir.IntType(32), ir.VectorType(ir.FloatType(), value.width)
        undefined = ir.Constant(vector, ir.Undefined)
        seed = builder.insert_element(undefined, args[0], lane(0))
        first = ir.Constant(ir.VectorType(lane, value.width), [0] * value.width)
        splat = builder.shuffle_vector(seed, undefined, first)
        signature_type = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, signature_type, f"llvm.fma.v{value.width}f32")
        return builder.call(fma, [splat, args[1], args[2]])

    return value(types.float32, value, value), codegen
