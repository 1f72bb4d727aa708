"""Causal attention of query pieces over keys and values in pages, for decoding (one query) and chunked prefill alike.

Shapes: T query tokens of S sequences, H query heads, K key/value heads, d head_dim, P pages, B tokens a page, N pages
of the longest sequence. A sequence's pages begin at the first key it may see, so the kernel knows nothing of attention
chunks: local layers pass pages from the chunk's start, global ones all pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from .tiled_attention import tiled_attention


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """Where the keys of S sequences lie."""

    tables_SN: Tensor
    """int32 page ids in order of position; rows are padded with anything valid."""
    lens_S: Tensor
    """int32 number of keys from the first page's first token up to and including the piece's last token."""
    lens: list[int]
    """The same on the host."""


def paged_attention_ref(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, q_starts: list[int], keys: PagedKeys, scale: float
) -> Tensor:
    """Reference of `paged_attention`, in the precision of q: every score at once, one sequence at a time."""
    out_THd = torch.empty_like(q_THd)
    H = q_THd.shape[1]
    B = v_pages.shape[2]
    for s, length in enumerate(keys.lens):
        lo, hi = q_starts[s], q_starts[s + 1]
        k_KLd, v_KLd = _gather(k_pages, v_pages, keys.tables_SN[s, : -(-length // B)], length)
        k = k_KLd.repeat_interleave(H // k_KLd.shape[0], dim=0)
        v = v_KLd.repeat_interleave(H // k_KLd.shape[0], dim=0)
        scores = torch.einsum("qhd,hnd->hqn", q_THd[lo:hi], k) * scale
        visible = torch.arange(length, device=q_THd.device) <= torch.arange(
            length - (hi - lo), length, device=q_THd.device
        ).unsqueeze(1)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out_THd[lo:hi] = torch.einsum("hqn,hnd->qhd", weights, v)
    return out_THd


def _gather(k_pages: Tensor, v_pages: Tensor, table_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, [K, length, d] each."""
    K, d = v_pages.shape[1], v_pages.shape[3]
    pages = table_N.long()
    k_KLd = k_pages[pages].permute(1, 0, 3, 2).contiguous().view(K, -1, d)[:, :length]
    v_KLd = v_pages[pages].transpose(0, 1).reshape(K, -1, d)[:, :length]
    return k_KLd, v_KLd


def paged_attention(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, q_starts: list[int], keys: PagedKeys, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v, causal, query head h reading key/value head h // (H / K).

    q_THd [T, H, d]: the pieces of S sequences one after the other, sequence s owning rows q_starts[s]:q_starts[s+1];
    its queries are the last of its keys. k_pages [P, K, d, B] (keys transposed inside a page) and v_pages
    [P, K, B, d] views. Returns [T, H, d].
    """
    if not q_THd.is_cuda:
        starts = torch.tensor(q_starts)
        return tiled_attention(q_THd, k_pages, v_pages, keys.tables_SN, keys.lens_S, starts, scale)
    return _gathered(q_THd, k_pages, v_pages, q_starts, keys, scale)


def _gathered(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, q_starts: list[int], keys: PagedKeys, scale: float
) -> Tensor:
    """The same on a device without a kernel of ours yet: torch's attention over gathered keys."""
    if q_THd.shape[0] == len(keys.lens):
        return _decode_gathered(q_THd, k_pages, v_pages, keys, scale)
    out_THd = torch.empty_like(q_THd)
    singles: list[int] = []
    for s, length in enumerate(keys.lens):
        lo, hi = q_starts[s], q_starts[s + 1]
        if hi - lo == 1:
            singles.append(s)
        else:
            out_THd[lo:hi] = _piece_gathered(q_THd[lo:hi], k_pages, v_pages, keys.tables_SN[s], length, scale)
    if singles:
        rows = torch.tensor([q_starts[s] for s in singles], device=q_THd.device)
        picked = torch.tensor(singles, device=q_THd.device)
        subset = PagedKeys(keys.tables_SN[picked], keys.lens_S[picked], [keys.lens[s] for s in singles])
        out_THd[rows] = _decode_gathered(q_THd[rows], k_pages, v_pages, subset, scale)
    return out_THd


def _piece_gathered(
    q_QHd: Tensor, k_pages: Tensor, v_pages: Tensor, table_N: Tensor, length: int, scale: float
) -> Tensor:
    """One sequence, several queries."""
    B = v_pages.shape[2]
    k_KLd, v_KLd = _gather(k_pages, v_pages, table_N[: -(-length // B)], length)
    mask = torch.ones((q_QHd.shape[0], length), dtype=torch.bool, device=q_QHd.device).tril_(length - q_QHd.shape[0])
    out = functional.scaled_dot_product_attention(
        q_QHd.transpose(0, 1)[None], k_KLd[None], v_KLd[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _decode_gathered(q_SHd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: PagedKeys, scale: float) -> Tensor:
    """One query per sequence: gather every sequence's pages, padded to the longest."""
    S = q_SHd.shape[0]
    K, B, d = v_pages.shape[1:]
    width = -(-max(keys.lens) // B)
    pages_SN = keys.tables_SN[:, :width].long()
    k_SKLd = k_pages[pages_SN].permute(0, 2, 1, 4, 3).reshape(S, K, width * B, d)
    v_SKLd = v_pages[pages_SN].transpose(1, 2).reshape(S, K, width * B, d)
    visible = torch.arange(width * B, device=q_SHd.device) < keys.lens_S[:, None]
    # No mask hides the NaN that another request may have left behind this one's last token.
    stale = ~visible[:, None, :, None]
    k_SKLd, v_SKLd = k_SKLd.masked_fill(stale, 0.0), v_SKLd.masked_fill(stale, 0.0)
    out = functional.scaled_dot_product_attention(
        q_SHd[:, :, None], k_SKLd, v_SKLd, attn_mask=visible[:, None, None], scale=scale, enable_gqa=True
    )
    return out[:, :, 0]
