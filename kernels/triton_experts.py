"""SwiGLU MLPs of many experts on a GPU, over rows grouped by expert; the numbers of rows never come to the host. Knows
nothing of how tokens choose their experts.

Shapes: T tokens, N rows sorted by expert, D hidden, E experts, F expert width; a tile is R output channels of M rows.

Two launches: gate and up with SwiGLU, then down, which adds a token's only expert to what the shared expert gave. The
grid is a bound that follows from shapes; a program finds its expert and rows from the counts, and programs beyond the
last row do nothing. All programs of an expert are neighbours, those with the same output channels above all, so that
its weight is read from memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .expert_table import ExpertTable, PackedExpert
from .gpu_weight import GpuWeight
from .launch import Platform, launch, platform
from .quantized import QuantizedWeight
from .route import Route, combine_ref_, gather_scaled_ref
from .silu_mul import silu_mul_ref
from .triton_expert_kernels import down_kernel, gate_up_kernel
from .triton_linear import Tile, constants, linear_ref, tile_constants, tile_for, tiles_on
from .triton_route import DeviceRoute, combine_triton_, gather_scaled_triton
from .triton_tokens import fp8_tokens, fp8_tokens_ref
from .variant import Variant
from .weight_form import TARGETS, WeightForm, forms_on


def moe_mlp_ref(
    x_TD: Tensor,
    plan: Route,
    gate_up_E: Sequence[Tensor | QuantizedWeight],
    down_E: Sequence[Tensor | QuantizedWeight],
    shared_TD: Tensor,
    fp8_rows: bool = False,
) -> Tensor:
    """`moe_mlp` over weights that are not laid out: [2F, D] and [D, F]. `fp8_rows` rounds the rows of both products."""

    def linear(rows: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        if fp8_rows:
            q, scale_N = fp8_tokens_ref(rows)
            rows = q.to(rows.dtype) * scale_N[:, None].to(rows.dtype)
        return linear_ref(rows, weight)

    parts = [
        linear(silu_mul_ref(linear(rows, gate_up)), down)
        for rows, gate_up, down in zip(
            gather_scaled_ref(x_TD, plan).split(plan.counts_E), gate_up_E, down_E, strict=True
        )
    ]
    return combine_ref_(shared_TD.clone(), torch.cat(parts), plan)


def grouped_mlp_triton(rows_ND: Tensor, counts_E: Tensor, table: ExpertTable, exact: bool) -> Tensor:
    """The first counts_E[0] rows through expert 0, and so on; counts_E int32 on the device, its sum at most N. Rows
    have their scores already. Returns [N, D]; rows beyond the sum of counts_E are undefined."""
    h_NF = _gate_up(rows_ND, None, counts_E, table, exact)
    out_ND = torch.empty_like(rows_ND)
    _down(h_NF, counts_E, table, exact, out_ND, None, None)
    return out_ND


def moe_mlp(x_TD: Tensor, route: DeviceRoute, table: ExpertTable, shared_TD: Tensor, exact: bool) -> Tensor:
    """shared + the sum of each token's experts in ascending order of their ids, on inputs times scores. [T, D]; the
    bits of gather_scaled, grouped_mlp_triton and combine_ in turn."""
    h_NF = _gate_up(x_TD, route, route.counts_E, table, exact)
    if route.rows_TK.shape[1] == 1:
        out_TD = torch.empty_like(shared_TD)
        _down(h_NF, route.counts_E, table, exact, out_TD, route.tokens_N, shared_TD)
        return out_TD
    rows_ND = torch.empty((h_NF.shape[0], x_TD.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
    _down(h_NF, route.counts_E, table, exact, rows_ND, None, None)
    return combine_triton_(shared_TD.clone(), rows_ND, route.rows_TK)


def mlp_triton(x_TD: Tensor, expert: PackedExpert, exact: bool, cap: float | None = None) -> Tensor:
    """One MLP, shared or dense, over all rows: [T, D] -> [T, D]."""
    gate_up, down = expert.gate_up.packed, expert.down.packed
    h_TF = _gate_up(x_TD, None, None, None, exact, gate_up, cap)
    out_TD = torch.empty((x_TD.shape[0], down.out_features), dtype=x_TD.dtype, device=x_TD.device)
    _down(h_TF, None, None, exact, out_TD, None, None, down, cap)
    return out_TD


def _gate_up(
    x: Tensor,
    route: DeviceRoute | None,
    counts_E: Tensor | None,
    table: ExpertTable | None,
    exact: bool,
    alone: GpuWeight | None = None,
    cap: float | None = None,
) -> Tensor:
    """silu(gate) * up of every row, [N, F] of x's dtype. Rows are x's, or those of its tokens that `route` says."""
    packed = alone or table.gate_up  # type: ignore[union-attr]
    N = x.shape[0] if route is None else route.tokens_N.shape[0]
    width = packed.out_features // 2
    tile, tiles = _tiles(N, packed, table, exact)
    if route is not None and (tile.wide or packed.kind == "fp8_rows"):
        x, route = gather_scaled_triton(x, route.tokens_N, route.scores_N), None
    h_NF = torch.empty((N, width), dtype=x.dtype, device=x.device)
    rows, row_scales = fp8_tokens(x, table.cap if table else cap) if packed.kind == "fp8_rows" else (x, None)
    launch(
        gate_up_kernel,
        (tiles * -(-width // (tile.channels // 2)),),
        rows,
        row_scales,
        route and route.tokens_N,
        route and route.scores_N,
        h_NF,
        *_weights(packed, counts_E, table, 0),
        N,
        width,
        packed.in_features,
        SCORED=route is not None,
        **_experts(table),
        **constants(packed),
        **tile_constants(tile),
    )
    return h_NF


def _down(
    h_NF: Tensor,
    counts_E: Tensor | None,
    table: ExpertTable | None,
    exact: bool,
    out: Tensor,
    tokens_N: Tensor | None,
    shared_TD: Tensor | None,
    alone: GpuWeight | None = None,
    cap: float | None = None,
) -> None:
    """Rows of h times down: to the same rows of `out`, or plus shared's to those of their tokens."""
    packed = alone or table.down  # type: ignore[union-attr]
    N = h_NF.shape[0]
    tile, tiles = _tiles(N, packed, table, exact)
    rows, row_scales = fp8_tokens(h_NF, table.cap if table else cap) if packed.kind == "fp8_rows" else (h_NF, None)
    launch(
        down_kernel,
        (tiles * -(-packed.out_features // tile.channels),),
        rows,
        row_scales,
        tokens_N,
        shared_TD,
        out,
        *_weights(packed, counts_E, table, 2),
        N,
        packed.out_features,
        packed.in_features,
        SCATTER=tokens_N is not None,
        **_experts(table),
        **constants(packed),
        **tile_constants(tile),
    )


def _tiles(N: int, packed: GpuWeight, table: ExpertTable | None, exact: bool) -> tuple[Tile, int]:
    """The tile, and the most tiles of rows that N rows can need."""
    experts = min(table.num_experts, N) if table else 1
    rows, channels = -(-N // max(experts, 1)), packed.out_features * experts
    tile = tile_for(rows, channels, exact, platform(), packed.group > 0)
    return tile, N // tile.rows + experts if table else -(-N // tile.rows)


def _weights(
    packed: GpuWeight, counts_E: Tensor | None, table: ExpertTable | None, row: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, int]:
    """counts, addresses, values, scales, E. A table's own values and scales stand for their types only."""
    if table is None:
        return None, None, packed.values, packed.scales_GO, 1
    return counts_E, table.addresses[row], packed.values, packed.scales_GO, table.num_experts


def _experts(table: ExpertTable | None) -> dict[str, Any]:
    return {"TABLE": table is not None, "EP": max(128, triton.next_power_of_2(table.num_experts)) if table else 1}


_ROLES = {"experts of tokens": (True, True), "experts of rows": (True, False), "one MLP": (False, False)}
"""What launches are for: with a table of experts? with a route?"""


def variants() -> list[Variant]:
    """Up to 128 experts, and MLPs alone."""
    forms: list[tuple[Platform, WeightForm, tuple[str, ...]]] = [
        (where, form, targets) for where in TARGETS for form, targets in forms_on(where) if form.for_experts
    ]
    listed = [
        _variant(kernel, form, targets, tile, where, role)
        for where, form, targets in forms
        for role in _ROLES
        for tile in tiles_on(where, (5120, 16384), form.group > 0)
        for kernel in (gate_up_kernel, down_kernel)
    ]
    # Wide tiles and e4m3 rows are gathered beforehand, so two roles may launch the same.
    return list({(*v.constexprs.values(), v.kernel, v.num_stages, v.targets): v for v in reversed(listed)}.values())


def _variant(
    kernel: Any, form: WeightForm, targets: tuple[str, ...], tile: Tile, where: Platform, role: str
) -> Variant:
    table, routed = _ROLES[role]
    scored = routed and not tile.wide and form.kind != "fp8_rows"
    types: dict[str, str | None] = {
        **form.types("x" if kernel is gate_up_kernel else "h"),
        "tokens": "*i32" if (scored if kernel is gate_up_kernel else routed) else None,
        "scores": "*fp32" if scored else None,
        "shared": "*bf16" if routed else None,
        "out": "*bf16",
        "counts": "*i32" if table else None,
        "addresses": "*i64" if table else None,
        "values": form.weight,
        **dict.fromkeys(("E", "N", "F", "D"), "i32"),
    }
    constexprs = {
        **{name: None for name, kind in types.items() if not kind},
        "SCORED": scored,
        "SCATTER": routed,
        "TABLE": table,
        "EP": 128 if table else 1,
        **form.constants(where),
        "R": tile.channels,
        "M": tile.rows,
        "WIDE": tile.wide,
    }
    signature = {name: kind for name in kernel.arg_names if (kind := types.get(name))}
    name = f"{kernel.__name__.removesuffix('_kernel')}, {role}, {form.name}"
    return Variant(
        f"{name}, {tile}",
        kernel,
        signature,
        {name: constexprs[name] for name in kernel.arg_names if name in constexprs},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=tuple(name for name, kind in signature.items() if kind[0] == "*" or name in "FD"),
        targets=targets,
        same_bits="" if tile.wide else name,
    )
