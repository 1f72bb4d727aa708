"""Paged attention on GPUs: chooses tiles and launches the kernels of `triton_decode` and `triton_prefill`.

Shapes: T query tokens of S sequences, W spans of keys, H query heads in K groups of G, D head_dim, B tokens a page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from .launch import launch
from .paged_attention import SPAN, PagedKeys, SpanList
from .triton_decode import merge_kernel, span_kernel
from .triton_prefill import piece_kernel
from .variant import Variant

_LOG2_E = 1.4426950408889634
_BLOCK = 64
"""Keys visited at a time. A span is a whole number of blocks."""
_UNROLL = 8
"""Spans that the merging kernel loads at a time."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """How a program's work is cut."""

    rows: int
    num_warps: int
    num_stages: int = 3

    def options(self, group: int, page_itemsize: int) -> dict[str, Any]:
        """As launch arguments. A group of heads is never cut. float32 leaves no room for several stages, and converting
        fp8 leaves registers for two."""
        return {
            "ROWS": max(self.rows, triton.next_power_of_2(group)),
            "BLOCK": _BLOCK,
            "num_warps": self.num_warps,
            "num_stages": {1: 2, 2: self.num_stages, 4: 1}[page_itemsize],
        }


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tiles of one architecture, as large as they get without spilling registers. Exact mode has one for
    everything: enough rows for Hopper's wide matrix instructions, few enough for decoding, where most of them are idle,
    to wait for memory all the same."""

    exact: _Tile
    fast_span: _Tile
    fast_piece: _Tile


_TILES = {
    "sm_80": _Tiles(_Tile(64, 8), _Tile(16, 4), _Tile(64, 8)),
    "sm_90": _Tiles(_Tile(64, 4), _Tile(16, 4), _Tile(128, 8)),
    "sm_100": _Tiles(_Tile(64, 8), _Tile(16, 4), _Tile(128, 8)),
    "gfx942": _Tiles(_Tile(64, 8, 2), _Tile(16, 4, 2), _Tile(64, 8, 2)),
}


@cache
def _architecture(device: torch.device) -> str:
    """The one whose tiles a device gets; Hopper's where Triton is interpreted."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def triton_attention(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: PagedKeys, scale: float, *, exact: bool = True
) -> Tensor:
    """`paged_attention` on a GPU. Grids depend on shapes alone, so that a CUDA graph may hold the launches."""
    T, H, D = q_THd.shape
    _, K, B, _ = v_pages.shape
    S = keys.lens_S.shape[0]
    spans = keys.spans or SpanList.build(keys.lens, keys.starts, q_THd.device)
    out_THd = torch.empty_like(q_THd)
    sizes = {"K": K, "G": H // K, "D": D, "DIM": max(16, triton.next_power_of_2(D)), "B": B, "SPAN": SPAN}
    page_stride = v_pages.stride(0)
    tiles = _TILES[_architecture(q_THd.device)]
    W = spans.sequence_and_span_W2.shape[0]
    if W:
        sums = torch.empty((W, H, D), dtype=torch.float32, device=q_THd.device)
        stats = torch.empty((W, H, 2), dtype=torch.float32, device=q_THd.device)
        launch(
            span_kernel,
            (K * W,),
            q_THd,
            k_pages,
            v_pages,
            sums,
            stats,
            keys.tables_SN,
            keys.lens_S,
            keys.starts_S,
            spans.sequence_and_span_W2,
            keys.tables_SN.stride(0),
            page_stride,
            scale * _LOG2_E,
            **sizes,
            **(tiles.exact if exact else tiles.fast_span).options(H // K, v_pages.itemsize),
        )
        launch(
            merge_kernel,
            (H, S),
            sums,
            stats,
            out_THd,
            keys.starts_S,
            spans.first_S,
            H=H,
            D=D,
            DIM=sizes["DIM"],
            UNROLL=_UNROLL,
            num_warps=1,
        )
    if T > S:
        tile = (tiles.exact if exact else tiles.fast_piece).options(H // K, v_pages.itemsize)
        launch(
            piece_kernel,
            (T // (tile["ROWS"] // (H // K)) + S, K),
            q_THd,
            k_pages,
            v_pages,
            out_THd,
            keys.tables_SN,
            keys.lens_S,
            keys.starts_S,
            keys.tables_SN.stride(0),
            page_stride,
            scale * _LOG2_E,
            S,
            **sizes,
            **tile,
            MERGED=exact,
        )
    return out_THd


_SIGNATURE = {
    "q_ptr": "*bf16",
    "tables": "*i32",
    "lens": "*i32",
    "starts": "*i64",
    "table_stride": "i32",
    "page_stride": "i32",
    "scale": "fp32",
}
_SPAN_SIGNATURE = {"sums_ptr": "*fp32", "stats_ptr": "*fp32", "spans": "*i32"}
_PIECE_SIGNATURE = {"out_ptr": "*bf16", "S": "i32"}


def variants() -> list[Variant]:
    """Scout's and Maverick's heads in both numerics, with pages of each size and type; Behemoth's and pocket's."""
    found = []
    shapes = [("scout", 8, 5, 128), ("behemoth", 8, 14, 128), ("pocket", 3, 3, 64)]
    cases = product(_TILES.items(), shapes, (True, False), (16, 64, 128), ("bf16", "fp8e4nv"))
    for (target, tiles), (name, K, G, D), exact, B, pages in cases:
        if name != "scout" and (B, pages) != (64, "bf16"):
            continue
        if pages == "fp8e4nv" and (B == 128 or target in ("sm_80", "gfx942")):
            continue
        sizes = {"K": K, "G": G, "D": D, "DIM": D, "B": B, "SPAN": SPAN}
        signature = _SIGNATURE | {"k_pages": f"*{pages}", "v_pages": f"*{pages}"}
        label = f"{name} pages of {B} {pages} {'exact' if exact else 'fast'}"
        for what, kernel, tile, more, further in (
            ("span", span_kernel, tiles.exact if exact else tiles.fast_span, _SPAN_SIGNATURE, {}),
            ("piece", piece_kernel, tiles.exact if exact else tiles.fast_piece, _PIECE_SIGNATURE, {"MERGED": exact}),
        ):
            constexprs = sizes | further | tile.options(G, 1 if pages == "fp8e4nv" else 2)
            num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
            whole = signature | more
            aligned = tuple(key for key, kind in whole.items() if kind.startswith("*") or key == "page_stride")
            found.append(
                Variant(
                    f"attention {what} {label}",
                    kernel,
                    whole,
                    constexprs,
                    num_warps,
                    num_stages,
                    aligned,
                    (target,),
                    same_bits=f"attention {label}" if exact else "",
                )
            )
    signature = {"sums_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": "*bf16", "starts": "*i64", "first_spans": "*i32"}
    constexprs = {"H": 40, "D": 128, "DIM": 128, "UNROLL": _UNROLL}
    merge = Variant("attention merge", merge_kernel, signature, constexprs, 1, 1, tuple(signature))
    return [*found, merge]
