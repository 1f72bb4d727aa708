"""Routing on a GPU: which rows go to which expert, scaled by which score, and back again, without a word to the host.
As `route` otherwise. Knows nothing of experts' weights or of where they live.

Shapes: T tokens, E experts, K experts per token, N = T * K routed rows sorted by (expert, token), D hidden, B blocks of
tokens.

A block's experts are a matrix of ones and zeros; a row's place is the rows of experts before its own, plus those of its
expert from tokens before its own. So a count along each axis sorts the rows, and no result depends on which program
comes first. Few tokens are one block and one launch; more take a launch that counts each block's rows first."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .triton_tile import logistic, rounded, times
from .variant import Variant

_BLOCKS = (1, 16, 32)
"""Tokens of a block."""
_CHANNELS = 1024
"""Channels per program of the two kernels that move rows."""


@dataclass(frozen=True, slots=True)
class DeviceRoute:
    """Where each token's rows go; everything is on the device."""

    tokens_N: Tensor
    """int32: the token of each routed row."""
    scores_N: Tensor
    """float32: sigmoid of the chosen logit, already rounded to the model dtype."""
    rows_TK: Tensor
    """int32: the routed rows of each token, by ascending expert id."""
    counts_E: Tensor
    """int32: rows of each expert."""
    offsets_E1: Tensor
    """int32: the first row of each expert, and N."""


def route_device(logits_TE: Tensor, k: int) -> DeviceRoute:
    """Choose k experts for each of T tokens: the largest logits, the lowest ids among equals; NaN counts as largest."""
    T, E = logits_TE.shape
    device = logits_TE.device
    tokens_N = torch.empty(T * k, dtype=torch.int32, device=device)
    scores_N = torch.empty(T * k, dtype=torch.float32, device=device)
    rows_TK = torch.empty((T, k), dtype=torch.int32, device=device)
    counts_E = torch.empty(E, dtype=torch.int32, device=device)
    offsets_E1 = torch.empty(E + 1, dtype=torch.int32, device=device)
    block = next(size for size in _BLOCKS if size >= T or size == _BLOCKS[-1])
    blocks = -(-T // block)
    shape = {"BLOCK": block, "EP": triton.next_power_of_2(E)}
    if blocks > 1:
        counts_BE = torch.empty((blocks, E), dtype=torch.int32, device=device)
        launch(count_kernel, (blocks,), logits_TE, counts_BE, T, E, k, **shape)
    else:
        counts_BE = counts_E
    outputs = (tokens_N, scores_N, rows_TK, counts_E, offsets_E1)
    launch(route_kernel, (blocks,), logits_TE, counts_BE, *outputs, T, E, k, **shape, ALONE=blocks == 1)
    return DeviceRoute(*outputs)


def gather_scaled_triton(x_TD: Tensor, tokens_N: Tensor, scores_N: Tensor) -> Tensor:
    """[T, D] -> [N, D]: the rows that experts receive, times their scores, rounded once."""
    N, D = tokens_N.shape[0], x_TD.shape[1]
    rows_ND = torch.empty((N, D), dtype=x_TD.dtype, device=x_TD.device)
    grid = (N, -(-D // _CHANNELS))
    launch(gather_kernel, grid, x_TD, tokens_N, scores_N, rows_ND, D, BLOCK=_CHANNELS)
    return rows_ND


def combine_triton_(shared_TD: Tensor, rows_ND: Tensor, rows_TK: Tensor) -> Tensor:
    """shared += the token's expert outputs, added up in ascending expert id, in float32 rounded once."""
    T, D = shared_TD.shape
    grid = (T, -(-D // _CHANNELS))
    launch(combine_kernel, grid, shared_TD, rows_ND, rows_TK, rows_TK.shape[1], D, BLOCK=_CHANNELS)
    return shared_TD


@triton.jit
def _chosen(logits_BE, inside_BE, e_E, k, EP: tl.constexpr):
    """int32 ones at the k largest of each row."""
    wide_BE = tl.where(logits_BE == 0, 0.0, logits_BE)  # -0 ties with 0
    wide_BE = tl.where(wide_BE != wide_BE, float("inf"), wide_BE)
    bits_BE = wide_BE.to(tl.int32, bitcast=True)
    order_BE = bits_BE ^ ((bits_BE >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    order_BE = tl.where(logits_BE != logits_BE, 0x7FFFFFFF, order_BE)
    key_BE = (order_BE.to(tl.int64) << 32) + (EP - e_E)[None, :].to(tl.int64)
    lowest = -0x7FFFFFFFFFFFFFFF
    key_BE = tl.where(inside_BE, key_BE, lowest)
    chosen_BE = tl.zeros_like(bits_BE)
    for _ in range(k):
        best_B = tl.max(tl.where(chosen_BE > 0, lowest, key_BE), axis=1)
        chosen_BE = tl.where((key_BE == best_B[:, None]) & inside_BE, 1, chosen_BE)
    return chosen_BE


@triton.jit
def _block(logits, T, E, BLOCK: tl.constexpr, EP: tl.constexpr):
    t_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e_E = tl.arange(0, EP)
    inside_BE = (t_B < T)[:, None] & (e_E < E)[None, :]
    logits_BE = tl.load(logits + t_B[:, None] * E + e_E[None, :], mask=inside_BE, other=0.0).to(tl.float32)
    return t_B, e_E, inside_BE, logits_BE


@triton.jit(do_not_specialize=["T", "k"])
def count_kernel(logits, counts, T, E, k, BLOCK: tl.constexpr, EP: tl.constexpr):
    _, e_E, inside_BE, logits_BE = _block(logits, T, E, BLOCK, EP)
    chosen_BE = _chosen(logits_BE, inside_BE, e_E, k, EP)
    tl.store(counts + tl.program_id(0) * E + e_E, tl.sum(chosen_BE, 0), mask=e_E < E)


@triton.jit(do_not_specialize=["T", "k"])
def route_kernel(
    logits,
    block_counts,
    tokens,
    scores,
    rows,
    counts,
    offsets,
    T,
    E,
    k,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    ALONE: tl.constexpr,
):
    program = tl.program_id(0)
    t_B, e_E, inside_BE, logits_BE = _block(logits, T, E, BLOCK, EP)
    chosen_BE = _chosen(logits_BE, inside_BE, e_E, k, EP)
    if ALONE:
        before_E = tl.zeros([EP], tl.int32)
        total_E = tl.sum(chosen_BE, 0)
    else:
        before_E = tl.zeros([EP], tl.int32)
        total_E = tl.zeros([EP], tl.int32)
        i_B = tl.arange(0, BLOCK)
        for start in range(0, tl.num_programs(0), BLOCK):
            b_B = start + i_B
            there_BE = (b_B < tl.num_programs(0))[:, None] & (e_E < E)[None, :]
            counts_BE = tl.load(block_counts + b_B[:, None] * E + e_E[None, :], mask=there_BE, other=0)
            total_E += tl.sum(counts_BE, 0)
            before_E += tl.sum(tl.where((b_B < program)[:, None], counts_BE, 0), 0)
    ends_E = tl.cumsum(total_E, 0)
    if program == 0:
        tl.store(counts + e_E, total_E, mask=e_E < E)
        tl.store(offsets + 1 + e_E, ends_E, mask=e_E < E)
        tl.store(offsets + e_E, e_E * 0, mask=e_E == 0)
    rank_BE = tl.cumsum(chosen_BE, 0) - chosen_BE
    place_BE = (ends_E - total_E + before_E)[None, :] + rank_BE
    slot_BE = tl.cumsum(chosen_BE, 1) - chosen_BE
    here_BE = chosen_BE > 0
    dtype: tl.constexpr = logits.dtype.element_ty
    scores_BE = rounded(logistic(logits_BE), dtype).to(tl.float32)
    tl.store(tokens + place_BE, tl.broadcast_to(t_B[:, None], [BLOCK, EP]), mask=here_BE)
    tl.store(scores + place_BE, scores_BE, mask=here_BE)
    tl.store(rows + t_B[:, None] * k + slot_BE, place_BE, mask=here_BE)


@triton.jit
def gather_kernel(x, tokens, scores, out, D, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + tl.load(tokens + row) * D + i, mask=i < D, other=0.0)
    tl.store(out + row * D + i, times(values, tl.load(scores + row)), mask=i < D)


@triton.jit(do_not_specialize=["k"])
def combine_kernel(shared, rows, table, k, D, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(k):
        row = tl.load(table + token * k + slot)
        total += tl.load(rows + row * D + i, mask=i < D, other=0.0).to(tl.float32)
    value = tl.load(shared + token * D + i, mask=i < D, other=0.0).to(tl.float32) + total
    tl.store(shared + token * D + i, rounded(value, shared.dtype.element_ty), mask=i < D)


def variants() -> list[Variant]:
    """E of the real models, 16 and 128."""
    listed = []
    for experts in (16, 128):
        names = ("logits", "block_counts", "tokens", "scores", "rows", "counts", "offsets")
        types = dict.fromkeys(names, "*i32") | {"logits": "*bf16", "scores": "*fp32"}
        whole = {"T": "i32", "E": "i32", "k": "i32"}
        for block in _BLOCKS:
            shape = {"BLOCK": block, "EP": experts}
            for alone in (True, False) if block == _BLOCKS[-1] else (True,):
                name = f"route {experts}, {block} tokens{'' if alone else ' of many'}"
                constexprs = {**shape, "ALONE": alone}
                listed.append(Variant(name, route_kernel, types | whole, constexprs, divisible_by_16=(*names, "E")))
        counts = {"logits": "*bf16", "counts": "*i32", **whole}
        listed.append(
            Variant(f"count {experts}", count_kernel, counts, shape, divisible_by_16=("logits", "counts", "E"))
        )
    rows = {"x": "*bf16", "tokens": "*i32", "scores": "*fp32", "out": "*bf16", "D": "i32"}
    listed.append(Variant("gather", gather_kernel, rows, {"BLOCK": _CHANNELS}, divisible_by_16=tuple(rows)))
    rows = {"shared": "*bf16", "rows": "*bf16", "table": "*i32", "k": "i32", "D": "i32"}
    divisible = ("shared", "rows", "table", "D")
    listed.append(Variant("combine", combine_kernel, rows, {"BLOCK": _CHANNELS}, divisible_by_16=divisible))
    return listed
