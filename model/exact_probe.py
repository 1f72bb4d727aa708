"""Exact mode's promise, tried on the real shapes before anybody relies on it: a row has the same bits alone, in any
company, at any place, and computed by one thread or by all. Each kind of operation and shape of a model is tried once,
on random rows. Knows operations, not why they might differ.

Shapes: R rows, D in features, H query heads, K key/value heads, d head_dim, B tokens a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..kernels.grouped_mlp import ExpertWeights
from ..kernels.linear import Linear
from ..kernels.paged_attention import PagedKeys, paged_attention
from .decoder import Decoder

_ROWS = 70
_LENGTHS = (41, 1100)
"""Keys: few, and more than one span of any kernel."""
_COMPANIES = (1, 2, 3, 5, 8, 17, 33, 64)
"""Numbers of rows that are tried, each from the first row on and up to the last."""

Check = tuple[str, Callable[[Tensor], Tensor], int]
"""(what it is, the operation on rows [R, D], D)"""


class NumericsError(Exception):
    """Exact mode cannot be promised; the message names the operation and its shape."""


def probe_operations(checks: Iterable[Check], dtype: torch.dtype, device: torch.device) -> None:
    """Try each operation of a description once. Raises NumericsError at the first whose rows depend on their company
    or on the number of threads."""
    seen = set()
    for what, operation, width in checks:
        if what in seen:
            continue
        seen.add(what)
        generator = torch.Generator().manual_seed(width)
        rows_RD = torch.randn(_ROWS, width, generator=generator).to(device=device, dtype=dtype)
        whole = operation(rows_RD)
        for start, end in _ranges():
            if not torch.equal(operation(rows_RD[start:end].contiguous()), whole[start:end]):
                raise NumericsError(
                    f"{what}: rows {start} to {end - 1} of {_ROWS} have other bits when they are computed without the "
                    "others; use engine.numerics=fast, which promises no equal bits"
                )
        if not torch.equal(_by_one_thread(operation, rows_RD, device), whole):
            raise NumericsError(
                f"{what}: one thread computes other bits than {torch.get_num_threads()}; use engine.threads=1, or "
                "engine.numerics=fast, which promises no equal bits"
            )


def probe_decoder(decoder: Decoder, block_size: int, kv_dtype: torch.dtype) -> None:
    """Try all kinds of operations of a model, its experts too where it holds them. Raises NumericsError."""
    config, dtype, device = decoder.config, decoder.dtype, decoder.device
    checks: list[Check] = [linear_check("output head", decoder.head)]
    for layer in decoder.layers:
        checks.append(linear_check("attention's input", layer.attention.qkv))
        checks.append(linear_check("attention's output", layer.attention.output))
        checks.append(expert_check("shared expert" if layer.router else "dense layer", layer.mlp))
        if layer.router is not None:
            checks.append(linear_check("router", layer.router))
    for experts in getattr(decoder.experts, "experts", {}).values():
        checks += [expert_check("routed expert", expert) for expert in experts]
    probe_operations(checks, dtype, device)
    for length in _LENGTHS:
        probe_attention(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            block_size,
            min(length, config.max_position_embeddings),
            dtype,
            device,
            kv_dtype,
        )


def linear_check(name: str, linear: Linear) -> Check:
    """A linear map as `probe_operations` takes it."""
    return f"{name}: linear {linear.in_features} -> {linear.out_features} in {linear.kind}", linear, linear.in_features


def expert_check(name: str, expert: ExpertWeights) -> Check:
    """A SwiGLU MLP as `probe_operations` takes it."""
    gate_up, down = expert.gate_up, expert.down
    shape = f"{gate_up.in_features} -> {gate_up.out_features // 2} -> {down.out_features}"
    return f"{name}: expert {shape} in {gate_up.kind} and {down.kind}", expert, gate_up.in_features


def probe_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Try attention over `length` keys: its last queries one by one, in one piece, in two, and beside another
    sequence. Raises NumericsError."""
    generator = torch.Generator().manual_seed(length)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    num_pages = -(-length // block_size)
    k_pages = noise(num_pages, num_kv_heads, head_dim, block_size).to(kv_dtype or dtype)
    v_pages = noise(num_pages, num_kv_heads, block_size, head_dim).to(kv_dtype or dtype)
    count = min(_ROWS // 2, length)
    q_RHd = noise(count, num_heads, head_dim)
    table_N = torch.arange(num_pages, dtype=torch.int32, device=device)

    def attend(pieces: list[tuple[int, int]]) -> Tensor:
        """Queries [start, end) of each piece, as sequences of one batch."""
        ends = [length - count + end for _, end in pieces]
        starts = [0]
        for start, end in pieces:
            starts.append(starts[-1] + end - start)
        keys = PagedKeys.build(table_N.expand(len(pieces), -1).contiguous(), ends, starts)
        rows = torch.cat([q_RHd[start:end] for start, end in pieces])
        return paged_attention(rows, k_pages, v_pages, keys, head_dim**-0.5)

    whole = attend([(0, count)])
    half = count // 2
    tries = [[(0, half), (half, count)], [(row, row + 1) for row in range(count)], [(half, count), (0, half)]]
    wanted = [whole, whole, torch.cat((whole[half:], whole[:half]))]
    for pieces, expected in zip(tries, wanted, strict=True):
        if not torch.equal(attend(pieces), expected):
            raise NumericsError(
                f"attention: {num_heads} and {num_kv_heads} heads of {head_dim}, pages of {block_size}, {length} keys: "
                f"queries have other bits in {len(pieces)} pieces than in one; use engine.numerics=fast, which "
                "promises no equal bits"
            )


def _ranges() -> Iterator[tuple[int, int]]:
    for rows in _COMPANIES:
        yield 0, rows
        yield _ROWS - rows, _ROWS


def _by_one_thread(operation: Callable[[Tensor], Tensor], rows_RD: Tensor, device: torch.device) -> Tensor:
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return operation(rows_RD)
    torch.set_num_threads(1)
    try:
        return operation(rows_RD)
    finally:
        torch.set_num_threads(threads)
