"""The innermost loops of matrix products on CPU, written as LLVM instructions: tiles of a few rows times up to 64
output channels whose sums stay in registers. Every sum is one chain over the input channels in ascending order, so it
does not depend on the tile that it is computed in.

There are two ways to add products, each with bits of its own: `dots` adds pairs of bfloat16 products by one instruction
(avx512bf16); without it everything is widened to float32 and added by fused multiply-adds. Knows nothing of threads or
of how tiles cover a product."""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# llvmlite states other types than it returns; intrinsics are called without the typing context.
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cpu_gemm_decode import F32, FLOATS, I8, I32, I64, LANES, Decoder
from .cpu_gemm_layout import F32 as STORED_F32
from .cpu_gemm_layout import FP8, INT8, PANEL
from .cpu_vector import call


def most_rows(storage: int, wide: int) -> int:
    """Rows of the largest tile. `wide`: the machine has 32 registers of 512 bits; otherwise 16 of 256 are assumed."""
    if wide:
        return 5 if storage >= INT8 else 6
    return 2 if storage in (INT8, FP8) else 4


def _tile_blocks(storage: int, wide: int, width: int, rows: int) -> int:
    """Blocks of 16 channels that a tile of so many rows has."""
    if wide or width == 1 or rows == 1:
        return width
    return 2 if storage in (INT8, FP8) else 1


def _intrinsic(define):
    """`intrinsic`, typed as kernels call it: without the typing context."""
    return intrinsic(prefer_literal=True)(define)


def tile_kind(storage: int, dots: int, x_bytes: int, wide: int) -> int:
    """Which instructions: one integer, because it is a constant of compiled functions. x_bytes: 2 for bfloat16 rows, 4
    for float32."""
    return ((storage * 2 + dots) * 2 + wide) * 8 + x_bytes


@_intrinsic
def add_tiles(typingctx, kind, width, x, pw, steps, ptotals, pscales, pfetch, fetch_step):
    """(literals: kind, width; a tuple; then integers). Adds to the float32 totals of some rows, 64 totals a row, the
    products of `steps` > 0 steps along the input channels.

    width: blocks of 16 channels in a panel; x: 1 to `most_rows` rows, their address, bytes between them; pscales: 64
    float32 factors of these steps' sum, which is then made apart, or 0 for none; pfetch: where to fetch into the caches
    from, ahead of time, as much as a step reads, going on by fetch_step bytes with each step."""
    x_bytes, wide = kind.literal_value % 8, kind.literal_value // 8 % 2
    dots, storage = bool(kind.literal_value // 16 % 2), kind.literal_value // 32
    panel_blocks = width.literal_value

    def codegen(context, builder, signature, args):
        rows, px, x_stride = (builder.extract_value(args[2], n) for n in range(3))
        done = builder.append_basic_block("tiles_done")
        switch = builder.switch(rows, done)
        for count in range(1, most_rows(storage, wide) + 1):
            with builder.goto_block(builder.append_basic_block(f"rows_{count}")):
                switch.add_case(I64(count), builder.block)
                blocks = _tile_blocks(storage, wide, panel_blocks, count)
                for first in range(0, panel_blocks, blocks):
                    decoder = Decoder(builder, storage, dots, panel_blocks, first, blocks)
                    tile = _Tile(builder, decoder, storage, dots, x_bytes, count, first, blocks)
                    tile.emit(px, x_stride, *args[3:])
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    # The literals are in the signature because Numba finds compiled code by it.
    return types.void(kind, width, types.UniTuple(types.int64, 3), *[types.int64] * 6), codegen


class _Tile:
    """`rows` rows x `blocks` blocks of 16 channels from block `first` of a panel on."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        decoder: Decoder,
        storage: int,
        dots: bool,
        x_bytes: int,
        rows: int,
        first: int,
        blocks: int,
    ) -> None:
        self._builder, self._decoder, self._dots, self._x_bytes = builder, decoder, dots, x_bytes
        self._x_step = x_bytes * (1 if storage == STORED_F32 else 2)
        self._rows, self._first, self._blocks = range(rows), first, blocks

    def emit(self, px, x_stride, pw, steps, ptotals, pscales, pfetch, fetch_step) -> None:
        builder = self._builder
        weights, totals = builder.inttoptr(pw, I8.as_pointer()), builder.inttoptr(ptotals, F32.as_pointer())
        xs = [builder.inttoptr(builder.add(px, builder.mul(x_stride, I64(row))), I8.as_pointer()) for row in self._rows]
        self._fetch, self._fetch_step = builder.inttoptr(pfetch, I8.as_pointer()), fetch_step
        apart = builder.icmp_unsigned("!=", pscales, I64(0))
        before = [self._load(totals, row) for row in self._rows]
        zero = ir.Constant(FLOATS, [0.0] * 16)
        start = [builder.select(apart, zero, total) for row in before for total in self._decoder.stored(row)]
        sums = self._loop(weights, xs, steps, start)
        sums = [self._decoder.natural(sums[n : n + self._blocks]) for n in range(0, len(sums), self._blocks)]
        with builder.if_else(apart) as (scaled, plain):
            with scaled:
                scales = self._load(builder.inttoptr(pscales, F32.as_pointer()), 0)
                for row, values, old in zip(self._rows, sums, before, strict=True):
                    self._store(totals, row, [self._fma(*terms) for terms in zip(scales, values, old, strict=True)])
            with plain:
                for row, values in zip(self._rows, sums, strict=True):
                    self._store(totals, row, values)

    def _loop(self, weights, xs, steps, start):
        """All steps, with the sums in registers."""
        builder = self._builder
        entry = builder.block
        loop, after = builder.append_basic_block("steps"), builder.append_basic_block("steps_done")
        builder.branch(loop)
        builder.position_at_end(loop)
        step, sums = builder.phi(I64), [builder.phi(FLOATS) for _ in start]
        added = self._step(weights, xs, step, list(sums))
        step_next = builder.add(step, I64(1))
        for phi, first, last in zip([step, *sums], [I64(0), *start], [step_next, *added], strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(last, loop)
        builder.cbranch(builder.icmp_signed("<", step_next, steps), loop, after)
        builder.position_at_end(after)
        return added

    def _step(self, weights, xs, step, sums):
        builder, size = self._builder, self._decoder.step_bytes
        at = builder.gep(weights, [builder.mul(step, I64(size))])
        ahead = builder.gep(self._fetch, [builder.mul(step, self._fetch_step)])
        for line in range(0, size, 64):
            arguments = [builder.gep(ahead, [I64(line)]), I32(0), I32(3), I32(1)]
            call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        for channel, vectors in enumerate(self._decoder.vectors(at)):
            for row in self._rows:
                x = self._broadcast(xs[row], step, channel)
                for n, vector in enumerate(vectors, row * self._blocks):
                    sums[n] = self._dot(sums[n], vector, x) if self._dots else self._fma(vector, x, sums[n])
        return sums

    def _broadcast(self, x, step, channel: int):
        """The row's channel (with `dots`, its pair of channels) in all lanes."""
        builder = self._builder
        offset = builder.mul(step, I64(self._x_step))
        if self._x_bytes == 4:
            pointer = builder.gep(x, [builder.add(offset, I64(4 * channel))])
            return self._splat(builder.load(builder.bitcast(pointer, F32.as_pointer()), align=4), FLOATS)
        pair = builder.load(builder.bitcast(builder.gep(x, [offset]), I32.as_pointer()), align=2)
        if self._dots:
            return self._splat(pair, LANES)
        bits = builder.and_(pair, I32(0xFFFF0000)) if channel else builder.shl(pair, I32(16))
        return self._splat(builder.bitcast(bits, F32), FLOATS)

    def _splat(self, value, vector: ir.VectorType):
        undefined = ir.Constant(vector, ir.Undefined)
        seed = self._builder.insert_element(undefined, value, I32(0))
        return self._builder.shuffle_vector(seed, undefined, ir.Constant(LANES, [0] * 16))

    def _vector(self, floats, row: int, block: int):
        pointer = self._builder.gep(floats, [I64(PANEL * row + 16 * (self._first + block))])
        return self._builder.bitcast(pointer, FLOATS.as_pointer())

    def _load(self, floats, row: int):
        return [self._builder.load(self._vector(floats, row, block), align=4) for block in range(self._blocks)]

    def _store(self, floats, row: int, values) -> None:
        for block, value in enumerate(values):
            self._builder.store(value, self._vector(floats, row, block), align=4)

    def _fma(self, a, b, c):
        return call(self._builder, "llvm.fma.v16f32", FLOATS, [a, b, c])

    def _dot(self, total, a, b):
        """total + a[0] b[0] + a[1] b[1]"""
        return call(self._builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [total, a, b])
