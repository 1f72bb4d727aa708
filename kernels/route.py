"""Routing: which rows go to which expert, scaled by which score, and back again.

Shapes: T tokens, E experts, K experts per token, N = T * K routed rows sorted by (expert, token), D hidden. Llama 4
scores are sigmoids of the chosen logits, never renormalised, and scale the expert's *input*. Knows nothing of experts'
weights or of where they live."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu_memory import dtype_tag, elements, exp_f32, f32_array, i32_array, jit, load, store
from .precision import widened


@dataclass(frozen=True, slots=True)
class Route:
    """Where each token's rows go."""

    tokens_N: Tensor
    """int32: the token of each routed row."""
    scores_N: Tensor
    """float32: sigmoid of the chosen logit, already rounded to the model dtype."""
    rows_TK: Tensor
    """int32: the routed rows of each token, by ascending expert id (the fixed order of the final sum)."""
    counts_E: list[int]
    """Rows of each expert, on the host."""


def route_ref(logits_TE: Tensor, k: int) -> Route:
    """Top-k of each row (lowest id on ties), by torch operations."""
    T, E = logits_TE.shape
    ids_TK = logits_TE.float().sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    scores_TK = torch.sigmoid(logits_TE.gather(1, ids_TK).float()).to(logits_TE.dtype).float()
    order_N = ids_TK.flatten().argsort(stable=True)
    rows_TK = torch.empty_like(order_N)
    rows_TK[order_N] = torch.arange(T * k, device=order_N.device)
    counts = torch.bincount(ids_TK.flatten(), minlength=E).tolist()
    return Route(
        (order_N // k).int(), scores_TK.flatten()[order_N].contiguous(), rows_TK.view(T, k).int().contiguous(), counts
    )


def route(logits_TE: Tensor, k: int) -> Route:
    """Choose k experts for each of T tokens from router logits [T, E] in the model dtype."""
    if logits_TE.is_cuda:
        chosen = _on_gpu().route_device(logits_TE, k)
        return Route(chosen.tokens_N, chosen.scores_N, chosen.rows_TK, chosen.counts_E.tolist())
    T, E = logits_TE.shape
    tokens_N = torch.empty(T * k, dtype=torch.int32)
    scores_N = torch.empty(T * k, dtype=torch.float32)
    rows_TK = torch.empty((T, k), dtype=torch.int32)
    counts_E = torch.empty(E, dtype=torch.int32)
    outputs = (tokens_N.data_ptr(), scores_N.data_ptr(), rows_TK.data_ptr(), counts_E.data_ptr())
    _route(logits_TE.data_ptr(), *outputs, T, E, k, dtype_tag(logits_TE))
    return Route(tokens_N, scores_N, rows_TK, counts_E.tolist())


def gather_scaled_ref(x_TD: Tensor, plan: Route) -> Tensor:
    """Rows of x in routed order, times their scores."""
    return x_TD[plan.tokens_N.long()] * plan.scores_N.to(x_TD.dtype)[:, None]


def gather_scaled(x_TD: Tensor, plan: Route) -> Tensor:
    """[T, D] -> [N, D]: the rows that experts receive, grouped by expert, already scaled by their scores."""
    if x_TD.is_cuda:
        return _on_gpu().gather_scaled_triton(x_TD, plan.tokens_N, plan.scores_N)
    N, D = plan.tokens_N.shape[0], x_TD.shape[1]
    rows_ND = torch.empty((N, D), dtype=x_TD.dtype)
    pointers = (x_TD.data_ptr(), plan.tokens_N.data_ptr(), plan.scores_N.data_ptr(), rows_ND.data_ptr())
    _gather_scaled(*pointers, x_TD.shape[0], N, D, dtype_tag(x_TD))
    return rows_ND


def combine_ref_(shared_TD: Tensor, rows_ND: Tensor, plan: Route) -> Tensor:
    """shared += the token's expert outputs, added in ascending expert id, in float32 rounded once."""
    total = widened(rows_ND[plan.rows_TK.long()]).sum(1)
    return shared_TD.copy_((widened(shared_TD) + total).to(shared_TD.dtype))


def combine_(shared_TD: Tensor, rows_ND: Tensor, plan: Route) -> Tensor:
    """Add the experts' outputs [N, D] to the shared expert's [T, D], in place; returns the latter."""
    if shared_TD.is_cuda:
        return _on_gpu().combine_triton_(shared_TD, rows_ND, plan.rows_TK)
    T, D = shared_TD.shape
    pointers = (shared_TD.data_ptr(), rows_ND.data_ptr(), plan.rows_TK.data_ptr())
    _combine(*pointers, T, plan.rows_TK.shape[1], D, dtype_tag(shared_TD))
    return shared_TD


def _on_gpu() -> Any:
    return importlib.import_module(".triton_route", __package__)


@jit
def _route(plogits, ptokens, pscores, prows, pcounts, T, E, k, tag):
    logits = elements(plogits, T * E, tag)
    tokens, rows, counts = i32_array(ptokens, T * k), i32_array(prows, T * k), i32_array(pcounts, E)
    scores = f32_array(pscores, T * k)
    chosen = np.empty((T, k), np.int32)
    rounded = elements(plogits, 1, tag).copy()
    taken = np.zeros(E, np.bool_)
    counts[:] = 0
    for t in range(T):
        taken[:] = False
        for _ in range(k):
            best = -1
            for e in range(E):
                if not taken[e] and (best < 0 or load(logits, t * E + e) > load(logits, t * E + best)):
                    best = e
            taken[best] = True
        slot = 0
        for e in range(E):
            if taken[e]:
                chosen[t, slot] = e
                counts[e] += 1
                slot += 1
    ends = np.empty(E, np.int64)
    total = 0
    for e in range(E):
        ends[e] = total
        total += counts[e]
    for t in range(T):
        for slot in range(k):
            e = chosen[t, slot]
            n = ends[e]
            ends[e] += 1
            tokens[n] = t
            rows[t * k + slot] = n
            store(rounded, 0, np.float32(1.0) / (np.float32(1.0) + exp_f32(-load(logits, t * E + e))))
            scores[n] = load(rounded, 0)


@jit
def _gather_scaled(px, ptokens, pscores, pout, T, N, D, tag):
    x, out = elements(px, T * D, tag), elements(pout, N * D, tag)
    tokens, scores = i32_array(ptokens, N), f32_array(pscores, N)
    for n in range(N):
        source, score = tokens[n] * D, scores[n]
        for i in range(D):
            store(out, n * D + i, load(x, source + i) * score)


@jit
def _combine(pshared, prows, ptable, T, k, D, tag):
    shared, rows, table = elements(pshared, T * D, tag), elements(prows, T * k * D, tag), i32_array(ptable, T * k)
    total = np.empty(D, np.float32)
    for t in range(T):
        total[:] = np.float32(0.0)
        for slot in range(k):
            base = table[t * k + slot] * D
            for i in range(D):
                total[i] += load(rows, base + i)
        for i in range(D):
            store(shared, t * D + i, load(shared, t * D + i) + total[i])
