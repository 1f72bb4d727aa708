"""The two kernels of SwiGLU experts: gate and up with SwiGLU, and down. `triton_experts` launches and explains them.

Shapes: N rows sorted by expert, D hidden, E experts, F expert width; a tile is R output channels of M rows."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_tile import fp8_pointer, logistic, rounded, sliced_product, wide_product


@triton.jit
def _place(counts, program, blocks, E, EP: tl.constexpr, M: tl.constexpr):
    """-> expert (E if there is nothing to do), its first row, its number of rows, tile of rows, block of channels."""
    e_E = tl.arange(0, EP)
    rows_E = tl.load(counts + e_E, mask=e_E < E, other=0)
    ends_E = tl.cumsum((rows_E + M - 1) // M, 0)
    done_E = ends_E <= program // blocks
    expert = tl.minimum(tl.sum(done_E.to(tl.int32), 0), E)
    first_tile = tl.max(tl.where(done_E, ends_E, 0), 0)
    first_row = tl.sum(tl.where(done_E, rows_E, 0), 0)
    rows = tl.sum(tl.where(e_E == expert, rows_E, 0), 0)
    tiles = tl.maximum((rows + M - 1) // M, 1)
    place = program - first_tile * blocks
    return expert, first_row, rows, place % tiles, place // tiles


@triton.jit
def _pointer(addresses, index, like):
    """The address as a pointer of the type of `like`."""
    return tl.multiple_of(tl.load(addresses + index).to(like.dtype), 16)


@triton.jit(do_not_specialize=["E", "N"])
def gate_up_kernel(
    x,
    x_scales,
    tokens,
    scores,
    out,
    counts,
    addresses,
    values,
    scales,
    E,
    N,
    F,
    D,
    SCORED: tl.constexpr,
    TABLE: tl.constexpr,
    EP: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile holds R / 2 channels of gate and the same of up. Without TABLE there is one expert, for all N rows."""
    HALF: tl.constexpr = R // 2
    program = tl.program_id(0)
    if TABLE:
        expert, first_row, count, tile, block = _place(counts, program, tl.cdiv(F, HALF), E, EP, M)
        if expert >= E:
            return
        values = _pointer(addresses, expert, values)
        if KIND != "plain":
            scales = _pointer(addresses + E, expert, scales)
    else:
        tiles = tl.cdiv(N, M)
        tile, block = program % tiles, program // tiles
        first_row, count = 0, N
        if block * HALF >= F:
            return
    within_M = tile * M + tl.arange(0, M)
    there_M = within_M < count
    rows_M = first_row + within_M
    r_R = tl.arange(0, R)
    channels_R = tl.minimum(block * HALF + r_R % HALF, F - 1) + r_R // HALF * F
    if KIND == "fp8_rows":
        x = fp8_pointer(x)
        values = fp8_pointer(values)
    if SCORED:
        starts_M = tl.load(tokens + rows_M, mask=there_M, other=0) * D
        scores_M = tl.load(scores + rows_M, mask=there_M, other=0.0)
    else:
        starts_M = rows_M * D
        scores_M = 0
    if WIDE:
        y_RM = wide_product(
            x, starts_M, there_M, values, scales, channels_R, 2 * F, D, KIND, GROUP, PLANE, EVEN, ASM, R, M
        )  # fmt: skip
    else:
        y_RM = sliced_product(
            x, starts_M, there_M, scores_M, values, scales, channels_R, 2 * F, D, KIND, GROUP, PLANE, SCORED, EVEN,
            ASM, R, M
        )  # fmt: skip
    if KIND == "fp8_rows":
        y_RM *= tl.load(x_scales + rows_M, mask=there_M, other=0.0)[None, :]
    gate_HM, up_HM = tl.split(tl.permute(tl.reshape(y_RM, [2, HALF, M]), [1, 2, 0]))
    h_HM = gate_HM * logistic(gate_HM) * up_HM
    f_H = block * HALF + tl.arange(0, HALF)
    places_HM = rows_M[None, :] * F + f_H[:, None]
    tl.store(out + places_HM, rounded(h_HM, out.dtype.element_ty), mask=there_M[None, :] & (f_H < F)[:, None])


@triton.jit(do_not_specialize=["E", "N"])
def down_kernel(
    h,
    h_scales,
    tokens,
    shared,
    out,
    counts,
    addresses,
    values,
    scales,
    E,
    N,
    D,
    F,
    SCATTER: tl.constexpr,
    TABLE: tl.constexpr,
    EP: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """With SCATTER each row goes to its token, on top of `shared`, rounded first as a row of its own would be."""
    program = tl.program_id(0)
    if TABLE:
        expert, first_row, count, tile, block = _place(counts, program, tl.cdiv(D, R), E, EP, M)
        if expert >= E:
            return
        values = _pointer(addresses, expert, values)
        if KIND != "plain":
            scales = _pointer(addresses + E, expert, scales)
    else:
        tiles = tl.cdiv(N, M)
        tile, block = program % tiles, program // tiles
        first_row, count = 0, N
        if block * R >= D:
            return
    within_M = tile * M + tl.arange(0, M)
    there_M = within_M < count
    rows_M = first_row + within_M
    d_R = block * R + tl.arange(0, R)
    if KIND == "fp8_rows":
        h = fp8_pointer(h)
        values = fp8_pointer(values)
    read_R = tl.minimum(d_R, D - 1)
    if WIDE:
        y_RM = wide_product(
            h, rows_M * F, there_M, values, scales, read_R, D, F, KIND, GROUP, PLANE, EVEN, ASM, R, M
        )  # fmt: skip
    else:
        y_RM = sliced_product(
            h, rows_M * F, there_M, 0, values, scales, read_R, D, F, KIND, GROUP, PLANE, False, EVEN, ASM, R, M
        )  # fmt: skip
    if KIND == "fp8_rows":
        y_RM *= tl.load(h_scales + rows_M, mask=there_M, other=0.0)[None, :]
    y_RM = rounded(y_RM, out.dtype.element_ty)
    inside_RM = there_M[None, :] & (d_R < D)[:, None]
    if SCATTER:
        rows_M = tl.load(tokens + rows_M, mask=there_M, other=0)
    places_RM = rows_M[None, :] * D + d_R[:, None]
    if SCATTER:
        shared_RM = tl.load(shared + places_RM, mask=inside_RM, other=0.0)
        y_RM = rounded(shared_RM.to(tl.float32) + y_RM.to(tl.float32), out.dtype.element_ty)
    tl.store(out + places_RM, y_RM, mask=inside_RM)
