"""y = x W^T on a GPU, with the weight plain or in fewer bits. Knows nothing of what the weight is.

Shapes: T rows, I input channels, O output channels; a tile is R output channels of M rows.

In exact mode a row's bits depend on the row and the weight alone: the tile's size changes with the number of rows, the
order of additions does not. Otherwise many rows take larger MMAs, and plain weights the platform's library."""

# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from .gpu_weight import GpuWeight, pack
from .launch import Platform, launch, platform
from .precision import widened
from .quantized import QuantizedWeight
from .triton_tile import fp8_pointer, rounded, sliced_product, wide_product
from .triton_tokens import fp8_tokens
from .variant import Variant
from .weight_form import TARGETS, forms_on


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut into programs. `wide` tiles have other bits than those that are not; all others share
    theirs."""

    rows: int
    channels: int
    wide: bool = False
    num_warps: int = 4
    num_stages: int = 4

    def __str__(self) -> str:
        return f"{self.channels} x {self.rows}{' wide' * self.wide}, {self.num_stages} stages"


_FEW = Tile(8, 16, num_stages=5)
_FEW_OF_MANY_CHANNELS = Tile(8, 32)
_FEW_CHANNELS = Tile(8, 16, num_stages=7)
_SOME = Tile(16, 32)
_MANY = Tile(32, 64, num_stages=3)
_MANY_IN_FEW_REGISTERS = Tile(32, 32, num_stages=3)
"""For weights in groups, whose partial sums take as many registers as the sums."""
_WIDE = Tile(64, 128, wide=True, num_warps=4, num_stages=3)
_WIDEST = Tile(128, 128, wide=True, num_warps=8, num_stages=3)

_ALL_BUSY = 12288
"""Output channels from which 32 per program still give every multiprocessor work for all its schedulers."""
_ONE_PROGRAM_EACH = 1024
"""Output channels up to which a program has a multiprocessor to itself, so that it may hold more in flight."""


def tile_for(rows: int, channels: int, exact: bool, where: Platform, grouped: bool = False) -> Tile:
    """The tile where `rows` rows share a weight, and all weights of the call together have `channels` output
    channels. `grouped`: with more than one scale per output channel."""
    tile = _tile_for(rows, channels, exact)
    if grouped and tile == _MANY:
        tile = _MANY_IN_FEW_REGISTERS
    if where == "hip":
        # Its 64 KiB hold fewer stages, and its compiler keeps one of them in registers.
        return replace(tile, num_stages=2)
    if where == "ampere":
        # Its compiler fetches operands ahead, for which the largest tiles leave no registers.
        return {_MANY: _MANY_IN_FEW_REGISTERS, _WIDEST: _WIDE}.get(tile, tile)
    return tile


def _tile_for(rows: int, channels: int, exact: bool) -> Tile:
    if rows > 64 and not exact:
        return _WIDE if rows <= 128 else _WIDEST
    if rows > 16:
        return _MANY
    if rows > 8:
        return _SOME
    if channels <= _ONE_PROGRAM_EACH:
        return _FEW_CHANNELS
    return _FEW if channels < _ALL_BUSY else _FEW_OF_MANY_CHANNELS


def linear_ref(x_TI: Tensor, weight_OI: Tensor | QuantizedWeight) -> Tensor:
    """[T, I] x [O, I] -> [T, O] of x's dtype, rounded once."""
    wide_TI = widened(x_TI)
    weight = weight_OI if isinstance(weight_OI, Tensor) else weight_OI.dequantize()
    return functional.linear(wide_TI, weight.to(wide_TI.dtype)).to(x_TI.dtype)


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x,
    x_scales,
    weight,
    scales,
    out,
    T,
    O,  # noqa: E741
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Neighbouring programs share their output channels, so that many rows read each weight from memory once."""
    tiles = tl.cdiv(T, M)
    program = tl.program_id(0)
    rows_M = program % tiles * M + tl.arange(0, M)
    channels_R = program // tiles * R + tl.arange(0, R)
    there_M = rows_M < T
    read_R = tl.minimum(channels_R, O - 1)
    if KIND == "fp8_rows":
        x = fp8_pointer(x)
        weight = fp8_pointer(weight)
    starts_M = rows_M * K
    if WIDE:
        y_RM = wide_product(
            x, starts_M, there_M, weight, scales, read_R, O, K, KIND, GROUP, PLANE, EVEN, ASM, R, M
        )  # fmt: skip
    else:
        y_RM = sliced_product(
            x, starts_M, there_M, 0, weight, scales, read_R, O, K, KIND, GROUP, PLANE, False, EVEN, ASM, R, M
        )  # fmt: skip
    if KIND == "fp8_rows":
        y_RM *= tl.load(x_scales + rows_M, mask=there_M, other=0.0)[None, :]
    places_RM = rows_M[None, :] * O + channels_R[:, None]
    tl.store(out + places_RM, rounded(y_RM, out.dtype.element_ty), mask=there_M[None, :] & (channels_R < O)[:, None])


class TritonLinear:
    """A bias-free linear map, laid out for the device on which its weight is."""

    __slots__ = ("_cap", "exact", "in_features", "out_features", "packed")

    def __init__(
        self,
        weight_OI: Tensor | QuantizedWeight | GpuWeight,
        exact: bool = True,
        activations: Literal["fp8"] | None = None,
        cap: float | None = None,
    ) -> None:
        """`activations="fp8"` rounds each row to e4m3 too; its weight must be fp8 with one scale per output channel.
        `cap` bounds the largest value that a row's scale is made for."""
        laid_out = isinstance(weight_OI, GpuWeight)
        self.packed = weight_OI if laid_out else pack(weight_OI, activations == "fp8")
        self.out_features, self.in_features = self.packed.out_features, self.packed.in_features
        self.exact = exact
        self._cap = cap

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] contiguous -> [T, O] of x's dtype."""
        if self.packed.kind == "plain" and not self.exact:
            return functional.linear(x_TI, self.packed.values)
        T, O = x_TI.shape[0], self.out_features  # noqa: E741
        out_TO = torch.empty((T, O), dtype=x_TI.dtype, device=x_TI.device)
        tile = tile_for(T, O, self.exact, platform(), self.packed.group > 0)
        rows, row_scales = fp8_tokens(x_TI, self._cap) if self.packed.kind == "fp8_rows" else (x_TI, None)
        launch(
            linear_kernel,
            (-(-T // tile.rows) * -(-O // tile.channels),),
            rows,
            row_scales,
            self.packed.values,
            self.packed.scales_GO,
            out_TO,
            T,
            O,
            self.in_features,
            **constants(self.packed),
            **tile_constants(tile),
        )
        return out_TO


def constants(packed: GpuWeight) -> dict[str, Any]:
    """The compile-time constants that a weight brings to any kernel."""
    return {
        "KIND": packed.kind,
        "GROUP": packed.group,
        "PLANE": packed.plane,
        "EVEN": packed.in_features % packed.step == 0,
        "ASM": platform() in ("cuda", "ampere"),
    }


def tile_constants(tile: Tile) -> dict[str, Any]:
    return {
        "R": tile.channels,
        "M": tile.rows,
        "WIDE": tile.wide,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def tiles_on(where: Platform, channels: Sequence[int], grouped: bool) -> list[Tile]:
    """Every tile that weights of so many output channels meet."""
    cases = [(c, rows, exact) for c in channels for rows in (1, 16, 64, 128, 4096) for exact in (True, False)]
    return list(dict.fromkeys(tile_for(rows, c, exact, where, grouped) for c, rows, exact in cases))


def variants() -> list[Variant]:
    listed = []
    for where in TARGETS:
        for form, targets in forms_on(where):
            for tile in tiles_on(where, (16, 5120, 16384), form.group > 0):
                if tile.wide and form.kind == "plain":
                    continue
                types = {**form.types("x"), "weight": form.weight, "out": "*bf16"}
                pointers = {name: kind for name, kind in types.items() if kind}
                missing = {name: None for name, kind in types.items() if not kind}
                listed.append(
                    Variant(
                        f"linear, {form.name}, {tile}",
                        linear_kernel,
                        {**pointers, "T": "i32", "O": "i32", "K": "i32"},
                        {**missing, **form.constants(where), "R": tile.channels, "M": tile.rows, "WIDE": tile.wide},
                        num_warps=tile.num_warps,
                        num_stages=tile.num_stages,
                        divisible_by_16=(*pointers, "O", "K"),
                        targets=targets,
                        same_bits="" if tile.wide else f"linear, {form.name}",
                    )
                )
    return listed
