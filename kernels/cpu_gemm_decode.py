"""How weights become numbers again inside a product on CPU: LLVM instructions that read one step of a packed panel
(layouts: `cpu_gemm_pack`) as float32 vectors, or as pairs of bfloat16 for the instruction that multiplies those. Every
stored value is represented exactly. Knows nothing of sums."""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# llvmlite states other types than it returns; intrinsics are called without the typing context.
from __future__ import annotations

import struct

import torch
from llvmlite import ir

from .cpu_gemm_layout import BF16, BLOCK_BYTES, FP8, INT4, INT8
from .cpu_vector import call, splat

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, LANES = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
_BYTES, _WORDS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)


class Decoder:
    """Reads `blocks` blocks of 16 output channels, from the `first` on, of a panel of `width`. `dots`: for the
    instruction on pairs of bfloat16."""

    def __init__(self, builder: ir.IRBuilder, storage: int, dots: bool, width: int, first: int, blocks: int) -> None:
        self._builder, self._storage, self._dots = builder, storage, dots
        self._blocks = range(first, first + blocks)
        self.step_bytes = BLOCK_BYTES[storage] * width

    def vectors(self, step) -> list[list[ir.Value]]:
        """The step at this address, for each input channel (with `dots`: for its one pair) a vector per block, in the
        order in which sums add them."""
        if self._storage in (INT8, FP8):
            units = [self._load(step, 64 * unit, _BYTES) for unit in sorted({block // 2 for block in self._blocks})]
            if self._dots:
                return [[pairs for unit in units for pairs in self._pairs_of_bytes(unit)]]
            lanes = [self._builder.bitcast(unit, LANES) for unit in units]
            return [
                [self._float_of_byte(unit, at) for unit in lanes for at in (channel, channel + 2)] for channel in (0, 1)
            ]
        if self._storage == INT4:
            packed = self._load(step, 0, LANES)
            if self._dots:
                return [[self._pairs_of_nibbles(packed, block) for block in self._blocks]]
            return [
                [self._float_of_nibble(packed, 16 * channel + 4 * block) for block in self._blocks]
                for channel in (0, 1)
            ]
        if self._storage == BF16:
            pairs = [self._load(step, 64 * block, LANES) for block in self._blocks]
            return [pairs] if self._dots else [[self._half(pair, odd) for pair in pairs] for odd in (False, True)]
        return [[self._load(step, 64 * block, FLOATS) for block in self._blocks]]

    def natural(self, sums: list[ir.Value]) -> list[ir.Value]:
        """Sums of products with `vectors`, with their channels in order: bytes widened to float32 come out with even
        and odd channels of two blocks apart."""
        even_then_odd = [n + offset for n in range(0, 16, 4) for offset in (0, 16, 1, 17)]
        return self._repair(sums, even_then_odd, [n + 2 for n in even_then_odd])

    def stored(self, sums: list[ir.Value]) -> list[ir.Value]:
        """The reverse of `natural`."""
        even = [n + offset for n in range(0, 16, 4) for offset in (0, 2, 16, 18)]
        return self._repair(sums, even, [n + 1 for n in even])

    def _repair(self, sums: list[ir.Value], first: list[int], second: list[int]) -> list[ir.Value]:
        if self._dots or self._storage not in (INT8, FP8):
            return sums
        pairs = zip(sums[0::2], sums[1::2], strict=True)
        return [self._builder.shuffle_vector(a, b, _lanes(mask)) for a, b in pairs for mask in (first, second)]

    def _load(self, step, offset: int, vector: ir.VectorType):
        builder = self._builder
        return builder.load(builder.bitcast(builder.gep(step, [I64(offset)]), vector.as_pointer()), align=1)

    def _half(self, pair, odd: bool):
        builder = self._builder
        bits = builder.and_(pair, splat(LANES, 0xFFFF0000)) if odd else builder.shl(pair, splat(LANES, 16))
        return builder.bitcast(bits, FLOATS)

    def _pairs_of_nibbles(self, packed, block: int):
        """A table of 32 whose halves agree, so that the fifth bit of an index, the next nibble's, does not matter."""
        builder = self._builder
        words = builder.bitcast(packed, _WORDS)
        index = builder.lshr(words, splat(_WORDS, 4 * block)) if block else words
        table = ir.Constant(_WORDS, [_bf16_bits(float(n - 16 * (n > 7))) for n in range(16)] * 2)
        found = call(self._builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, [table, index])
        return builder.bitcast(found, LANES)

    def _pairs_of_bytes(self, codes):
        """Magnitudes select both bytes of a bfloat16 from tables of 128, the sign bit is the code's own."""
        builder = self._builder
        values = [_bf16_bits(value) for value in _magnitudes(self._storage)]
        low, high = (self._byte_table(codes, [value >> shift & 0xFF for value in values]) for shift in (0, 8))
        high = builder.or_(high, builder.and_(codes, splat(_BYTES, 0x80)))
        if self._storage == INT8:
            lowest = builder.icmp_signed("==", codes, splat(_BYTES, 0x80))
            high = builder.select(lowest, splat(_BYTES, _bf16_bits(-128.0) >> 8), high)
        for start in (0, 8):
            order = [lane + n + side for lane in range(start, 64, 16) for n in range(8) for side in (0, 64)]
            yield builder.bitcast(builder.shuffle_vector(low, high, _lanes(order)), LANES)

    def _byte_table(self, codes, table: list[int]):
        halves = (ir.Constant(_BYTES, table[:64]), codes, ir.Constant(_BYTES, table[64:]))
        return call(self._builder, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, halves)

    def _float_of_nibble(self, packed, bit: int):
        builder = self._builder
        top = builder.shl(packed, splat(LANES, 28 - bit)) if bit < 28 else packed
        return builder.sitofp(builder.ashr(top, splat(LANES, 28)), FLOATS)

    def _float_of_byte(self, codes, at: int):
        builder = self._builder
        top = builder.shl(codes, splat(LANES, 24 - 8 * at)) if at < 3 else codes
        code = builder.lshr(top, splat(LANES, 24))
        magnitude = builder.and_(code, splat(LANES, 0x7F))
        if self._storage == INT8:
            lowest = builder.icmp_signed("==", code, splat(LANES, 0x80))
            value = builder.sitofp(builder.select(lowest, splat(LANES, 128), magnitude), FLOATS)
        else:
            scaled = builder.bitcast(builder.shl(magnitude, splat(LANES, 20)), FLOATS)
            is_nan = builder.icmp_signed("==", magnitude, splat(LANES, 0x7F))
            value = builder.fmul(scaled, splat(FLOATS, 2.0**120))
            value = builder.select(is_nan, splat(FLOATS, float("nan")), value)
        sign = builder.and_(top, splat(LANES, 0x80000000))
        return builder.bitcast(builder.or_(builder.bitcast(value, LANES), sign), FLOATS)


def _magnitudes(storage: int) -> list[float]:
    """What the 128 codes without a sign mean."""
    if storage == INT8:
        return [float(n) for n in range(128)]
    return torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()


def _bf16_bits(value: float) -> int:
    """For values that bfloat16 represents."""
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def _lanes(order: list[int]):
    return ir.Constant(ir.VectorType(I32, len(order)), order)
