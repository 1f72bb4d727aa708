"""Device functions that every product of this folder is made of: one tile of W x^T over all input channels, with the
weight read as `gpu_weight` lays it out. Knows nothing of experts or of where rows come from.

Shapes: R output channels and M rows of a tile, S slices and P channels of one plane in a step.

The weight is the left operand: few rows then fill an MMA of 8 columns, and wide tiles take it from registers.

`sliced_product` is the one whose bits depend on nothing but the row and the weight. Each step of S * planes * P input
channels is dealt to four warps, a slice each, and the warps' sums are added up in a fixed order at the end. So each
warp reads no rows but its own slice of them, and sixteen output channels are enough for a program: one row still keeps
all multiprocessors busy. Tiles of other sizes do the same MMAs in the same order. `wide_product` is for many rows where
bits may depend on their number: the four warps share all channels, which admits larger MMAs.

Sums are float32. Values of quantised weights enter the MMA exactly; a group's partial sum is multiplied by its scale in
float32."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""The interpreter has no bfloat16 arithmetic, cuts bfloat16 off instead of rounding it, and has no assembly."""


def _nibble_code(n: int) -> str:
    """Two 16-bit words -> their nibbles n as two bfloat16: 0x43 before the nibble makes it 128 + q + 8."""
    return (
        "{ .reg .b32 t, one, bias; mov.b32 one, 0x3F803F80; mov.b32 bias, 0xC308C308; "
        f"shr.b32 t, $1, {4 * n}; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, bias; }}"
    )


def _int8_code(n: int) -> str:
    """Two 16-bit words -> their bytes n as two bfloat16: 128 plus the low seven bits, less 128, or 256 if bit 7 is
    set."""
    return (
        "{ .reg .b32 t, low, high, minus; mov.b32 minus, 0xBF80BF80; "
        f"shr.b32 t, $1, {8 * n}; lop3.b32 low, t, 0x007F007F, 0x43004300, 0xEA; "
        "lop3.b32 high, t, 0x00800080, 0x43004300, 0xEA; fma.rn.bf16x2 $0, high, minus, low; }"
    )


def _fp8_code(up: int) -> str:
    """Two 16-bit words whose e4m3 byte is `up` bits below the top -> two bfloat16: the bits moved into place are the
    value times 2^-120, subnormals included."""
    move = f"shl.b32 mag, $1, {up - 4}" if up > 4 else f"shr.b32 mag, $1, {4 - up}"
    return (
        "{ .reg .b32 sign, mag, factor, none; mov.b32 factor, 0x7B807B80; mov.b32 none, 0x80008000; "
        f"{move}; shl.b32 sign, $1, {up}; and.b32 mag, mag, 0x07F007F0; "
        "lop3.b32 mag, sign, 0x80008000, mag, 0xEA; fma.rn.bf16x2 $0, mag, factor, none; }"
    )


_NIBBLE_0 = tl.constexpr(_nibble_code(0))
_NIBBLE_1 = tl.constexpr(_nibble_code(1))
_NIBBLE_2 = tl.constexpr(_nibble_code(2))
_NIBBLE_3 = tl.constexpr(_nibble_code(3))
_INT8_0 = tl.constexpr(_int8_code(0))
_INT8_1 = tl.constexpr(_int8_code(1))
_FP8_0 = tl.constexpr(_fp8_code(8))
_FP8_1 = tl.constexpr(_fp8_code(0))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)) in float32, without overflow."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def times(x, scores):
    """x * score, rounded once to x's dtype. Scores are float32 that x's dtype represents."""
    if INTERPRETED:
        return rounded(x.to(tl.float32) * scores, x.dtype)
    return x * scores.to(x.dtype)


@triton.jit
def _fp8_numbers(bits):
    """e4m3 bytes in any integer type -> float32."""
    wide = ((bits & 0x80).to(tl.uint32) << 24) | ((bits & 0x7F).to(tl.uint32) << 20)
    return wide.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _assembled(words, n: tl.constexpr, KIND: tl.constexpr):
    if KIND == "int4":
        if n == 0:
            code: tl.constexpr = _NIBBLE_0
        elif n == 1:
            code: tl.constexpr = _NIBBLE_1
        elif n == 2:
            code: tl.constexpr = _NIBBLE_2
        else:
            code: tl.constexpr = _NIBBLE_3
    elif KIND == "int8":
        code: tl.constexpr = _INT8_0 if n == 0 else _INT8_1
    else:
        code: tl.constexpr = _FP8_0 if n == 0 else _FP8_1
    return tl.inline_asm_elementwise(code, "=r,r", [words], tl.bfloat16, True, 2)


@triton.jit
def _values(words, n: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Plane n of a weight tile as numbers of the rows' dtype, exactly."""
    number: tl.constexpr = tl.float32 if INTERPRETED else dtype
    if KIND == "plain":
        values = words.to(number)
    elif KIND == "fp8_rows":
        values = _fp8_numbers(words) if INTERPRETED else words
    elif ASM and dtype == tl.bfloat16:
        values = _assembled(words, n, KIND)
    elif KIND == "int4":
        values = (((words >> (4 * n)) & 15) - 8).to(number)
    elif KIND == "int8":
        values = ((words << (8 - 8 * n)) >> 8).to(number)
    else:
        values = _fp8_numbers(words >> (8 * n)).to(number)
    return values


@triton.jit
def fp8_pointer(p):
    """A pointer to bytes as one to e4m3; the interpreter computes with bytes."""
    if INTERPRETED:
        return p
    return p.to(tl.pointer_type(tl.float8e4nv), bitcast=True)


@triton.jit
def _multiply(w, x, total):
    """total + w x, float32. Bytes are e4m3."""
    if INTERPRETED:
        x = _fp8_numbers(x) if x.dtype == tl.uint8 else x.to(tl.float32)
        # NumPy's sums depend on the tile's size; in float64 it hardly ever shows.
        total = tl.dot(w.to(tl.float64), x.to(tl.float64), total.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        total = tl.dot(w, x, total, input_precision="ieee")
    return total


@triton.jit
def sliced_product(
    x,
    starts_M,
    there_M,
    scores_M,
    weight,
    scales,
    channels_R,
    O,  # noqa: E741
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    SCORED: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
):
    """float32 [R, M]: output channels `channels_R` (each below O) of the rows that begin at x + starts_M; rows that are
    not there count as zeros. GROUP is 0 for one scale per output channel; EVEN says that steps divide K. x and weight
    may both be e4m3 (as `fp8_pointer` makes them)."""
    S: tl.constexpr = 4
    PLANES: tl.constexpr = 4 if KIND == "int4" else (2 if KIND == "int8" or KIND == "fp8" else 1)
    SPAN: tl.constexpr = PLANE * PLANES
    PARTS: tl.constexpr = 1 if GROUP % SPAN == 0 else (2 if GROUP * 2 % SPAN == 0 else 4)
    steps = tl.cdiv(K, S * SPAN)
    s_S = tl.arange(0, S)
    p_P = tl.arange(0, PLANE)
    x_SPM = starts_M[None, None, :] + (s_S * SPAN)[:, None, None] + p_P[None, :, None]
    k_SPM = (s_S * SPAN)[:, None, None] + p_P[None, :, None]
    there_SPM = there_M[None, None, :]
    if KIND == "plain":
        w_SRP = (channels_R * K)[None, :, None] + (s_S * SPAN)[:, None, None] + p_P[None, None, :]
        k_SRP = (s_S * SPAN)[:, None, None] + p_P[None, None, :]
        w_step = S * SPAN
    else:
        blocks_R = (channels_R // 16) * (steps * (S * 16 * PLANE)) + (channels_R % 16) * PLANE
        w_SRP = blocks_R[None, :, None] + (s_S * (16 * PLANE))[:, None, None] + p_P[None, None, :]
        w_step = S * 16 * PLANE
    padded = tl.cdiv(O, 16) * 16
    total_SRM = tl.zeros([S, R, M], tl.float32)
    # Scales are fetched a step ahead where time is spent waiting for memory; large tiles lack the registers.
    AHEAD: tl.constexpr = PARTS == 1 and R * M <= 1024
    if GROUP and AHEAD:
        scale_SR = tl.load(scales + ((s_S * SPAN) // GROUP * padded)[:, None] + channels_R[None, :])
    for i in range(steps):
        if KIND == "plain" and not EVEN:
            words_SRP = tl.load(weight + w_SRP, mask=k_SRP < K - i * (S * SPAN), other=0.0)
        else:
            words_SRP = tl.load(weight + w_SRP)
        if GROUP and AHEAD:
            ahead_S = (tl.minimum(i + 1, steps - 1) * (S * SPAN) + s_S * SPAN) // GROUP
            next_SR = tl.load(scales + (ahead_S * padded)[:, None] + channels_R[None, :])
        part_SRM = tl.zeros([S, R, M], tl.float32)
        for n in tl.static_range(PLANES):
            if EVEN:
                rows_SPM = tl.load(x + n * PLANE + x_SPM, mask=there_SPM, other=0.0)
            else:
                inside_SPM = there_SPM & (k_SPM < K - i * (S * SPAN) - n * PLANE)
                rows_SPM = tl.load(x + n * PLANE + x_SPM, mask=inside_SPM, other=0.0)
            if SCORED:
                rows_SPM = times(rows_SPM, scores_M[None, None, :])
            values_SRP = _values(words_SRP, n, x.dtype.element_ty, KIND, ASM)
            if not GROUP:
                total_SRM = _multiply(values_SRP, rows_SPM, total_SRM)
            else:
                part_SRM = _multiply(values_SRP, rows_SPM, part_SRM)
                if (n + 1) % (PLANES // PARTS) == 0:
                    if not AHEAD:
                        first: tl.constexpr = (n + 1 - PLANES // PARTS) * PLANE
                        g_S = (i * (S * SPAN) + s_S * SPAN + first) // GROUP
                        scale_SR = tl.load(scales + (g_S * padded)[:, None] + channels_R[None, :])
                    factor_SRM = tl.broadcast_to(scale_SR.to(tl.float32)[:, :, None], [S, R, M])
                    total_SRM = tl.fma(part_SRM, factor_SRM, total_SRM)
                    part_SRM = tl.zeros([S, R, M], tl.float32)
        if GROUP and AHEAD:
            scale_SR = next_SR
        weight += w_step
        x += S * SPAN
    # Sums of two, so that no reduction of the compiler's choice decides on the order.
    halves = tl.sum(tl.reshape(total_SRM, [2, 2, R, M]), axis=1)
    total_RM = tl.sum(halves, axis=0)
    if KIND != "plain" and not GROUP:
        total_RM *= tl.load(scales + channels_R).to(tl.float32)[:, None]
    return total_RM


@triton.jit
def wide_product(
    x,
    starts_M,
    there_M,
    weight,
    scales,
    channels_R,
    O,  # noqa: E741
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
):
    """As `sliced_product` without scores, with other bits."""
    PLANES: tl.constexpr = 4 if KIND == "int4" else (2 if KIND == "int8" or KIND == "fp8" else 1)
    SPAN: tl.constexpr = PLANE * PLANES
    PARTS: tl.constexpr = 1 if GROUP % SPAN == 0 else (2 if GROUP * 2 % SPAN == 0 else 4)
    spans = tl.cdiv(K, 4 * SPAN) * 4
    p_P = tl.arange(0, PLANE)
    x_PM = starts_M[None, :] + p_P[:, None]
    if KIND == "plain":
        w_RP = (channels_R * K)[:, None] + p_P[None, :]
        w_step = SPAN
        spans = tl.cdiv(K, SPAN)
    else:
        blocks_R = (channels_R // 16) * (spans * (16 * PLANE)) + (channels_R % 16) * PLANE
        w_RP = blocks_R[:, None] + p_P[None, :]
        w_step = 16 * PLANE
    padded = tl.cdiv(O, 16) * 16
    total_RM = tl.zeros([R, M], tl.float32)
    if GROUP:
        scale_R = tl.load(scales + channels_R)
    for i in range(spans):
        if KIND == "plain" and not EVEN:
            words_RP = tl.load(weight + w_RP, mask=p_P[None, :] < K - i * SPAN, other=0.0)
        else:
            words_RP = tl.load(weight + w_RP)
        if GROUP and PARTS == 1:
            next_R = tl.load(scales + (tl.minimum(i + 1, spans - 1) * SPAN // GROUP * padded) + channels_R)
        part_RM = tl.zeros([R, M], tl.float32)
        for n in tl.static_range(PLANES):
            inside_PM = there_M[None, :]
            if not EVEN:
                inside_PM = inside_PM & (p_P[:, None] < K - i * SPAN - n * PLANE)
            rows_PM = tl.load(x + n * PLANE + x_PM, mask=inside_PM, other=0.0)
            values_RP = _values(words_RP, n, x.dtype.element_ty, KIND, ASM)
            if KIND == "fp8_rows":
                # Hopper's MMA of e4m3 keeps 14 bits of a long sum: add up here.
                total_RM += _multiply(values_RP, rows_PM, part_RM)
            elif not GROUP:
                total_RM = _multiply(values_RP, rows_PM, total_RM)
            else:
                part_RM = _multiply(values_RP, rows_PM, part_RM)
                if (n + 1) % (PLANES // PARTS) == 0:
                    if PARTS > 1:
                        first: tl.constexpr = (n + 1 - PLANES // PARTS) * PLANE
                        scale_R = tl.load(scales + ((i * SPAN + first) // GROUP * padded) + channels_R)
                    factor_RM = tl.broadcast_to(scale_R.to(tl.float32)[:, None], [R, M])
                    total_RM = tl.fma(part_RM, factor_RM, total_RM)
                    part_RM = tl.zeros([R, M], tl.float32)
        if GROUP and PARTS == 1:
            scale_R = next_R
        weight += w_step
        x += SPAN
    if KIND != "plain" and not GROUP:
        total_RM *= tl.load(scales + channels_R).to(tl.float32)[:, None]
    return total_RM
