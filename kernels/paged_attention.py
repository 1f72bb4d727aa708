"""Causal attention of query pieces over keys and values in pages, for decoding (one query) and chunked prefill alike.

Shapes: T query tokens of S sequences, H query heads, K key/value heads, d head_dim, P pages, B tokens a page, N pages
of the longest sequence, W spans of keys. A sequence's pages begin at the first key it may see, so the kernel knows
nothing of attention chunks: local layers pass pages from the chunk's start, global ones all pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .tiled_attention import tiled_attention

SPAN = 256
"""Keys that one GPU program visits for a decoding sequence. The sums of a sequence's spans are added in order, whatever
the batch and whatever the length: bits depend on this number."""


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """Which rows are whose queries, and where the keys of S sequences lie. Made once a step: every layer of a group
    reads the same tensors."""

    tables_SN: Tensor
    """int32 page ids in order of position; rows are padded with anything valid."""
    lens_S: Tensor
    """int32 number of keys from the first page's first token up to and including the piece's last token. 0: a sequence
    that only fills up the batch (on GPUs)."""
    starts_S: Tensor
    """int64 [S + 1]: sequence s owns query rows starts[s]:starts[s + 1], the last of its keys."""
    lens: list[int]
    """`lens_S` on the host, for sizes."""
    starts: list[int]
    """`starts_S` on the host, for sizes."""
    spans: SpanList | None = None
    """On GPUs."""

    @classmethod
    def build(cls, tables_SN: Tensor, lens: Sequence[int], starts: Sequence[int]) -> PagedKeys:
        """For S sequences with `lens` keys; `starts` is [S + 1]. Everything goes to the device of `tables_SN`."""
        device = tables_SN.device
        lens_S = torch.tensor(lens, dtype=torch.int32, device=device)
        starts_S = torch.tensor(starts, dtype=torch.int64, device=device)
        spans = SpanList.build(lens, starts, device) if device.type == "cuda" else None
        return cls(tables_SN, lens_S, starts_S, list(lens), list(starts), spans)


@dataclass(frozen=True, slots=True)
class SpanList:
    """The spans of all sequences that decode: a GPU computes each by a program of its own."""

    sequence_and_span_W2: Tensor
    """int32. A sequence of -1 fills up the list, whose length must be the same in every step of a CUDA graph."""
    first_S: Tensor
    """int32 [S + 1]: the spans of sequence s are first[s]:first[s + 1]; none if its piece has several queries."""

    @classmethod
    def build(cls, lens: Sequence[int], starts: Sequence[int], device: torch.device | str) -> SpanList:
        arrays = span_arrays(np.asarray(lens), np.asarray(starts))
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


def span_arrays(
    lens_S: npt.NDArray[np.integer], starts_S: npt.NDArray[np.integer], num_spans: int | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The two arrays of a `SpanList` on the host, filled up to `num_spans`."""
    counts_S = np.where(np.diff(starts_S) == 1, -(-lens_S // SPAN), 0)
    first_S = np.concatenate(([0], np.cumsum(counts_S)))
    sequence_W = np.repeat(np.arange(len(counts_S)), counts_S)
    span_W = np.arange(first_S[-1]) - first_S[sequence_W]
    spans_W2 = np.full((len(span_W) if num_spans is None else num_spans, 2), -1, np.int32)
    spans_W2[: len(span_W), 0], spans_W2[: len(span_W), 1] = sequence_W, span_W
    return spans_W2, first_S.astype(np.int32)


def paged_attention_ref(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: PagedKeys, scale: float, *, exact: bool = True
) -> Tensor:
    """Reference of `paged_attention`, in the precision of q: every score at once, one sequence at a time."""
    out_THd = torch.empty_like(q_THd)
    H = q_THd.shape[1]
    B = v_pages.shape[2]
    for s, length in enumerate(keys.lens):
        lo, hi = keys.starts[s], keys.starts[s + 1]
        q_QHd = q_THd[lo:hi]
        k_KLd, v_KLd = _gather(k_pages, v_pages, keys.tables_SN[s, : -(-length // B)], length, q_THd.dtype)
        k = k_KLd.repeat_interleave(H // k_KLd.shape[0], dim=0)
        v = v_KLd.repeat_interleave(H // k_KLd.shape[0], dim=0)
        scores = torch.einsum("qhd,hnd->hqn", q_QHd, k) * scale
        visible = torch.arange(length, device=q_THd.device) <= torch.arange(
            length - (hi - lo), length, device=q_THd.device
        ).unsqueeze(1)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out_THd[lo:hi] = torch.einsum("hqn,hnd->qhd", weights, v)
    return out_THd


def _gather(
    k_pages: Tensor, v_pages: Tensor, table_N: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, [K, length, d] each."""
    K, d = v_pages.shape[1], v_pages.shape[3]
    pages = table_N.long()
    k_KLd = k_pages[pages].to(dtype).permute(1, 0, 3, 2).contiguous().view(K, -1, d)[:, :length]
    v_KLd = v_pages[pages].to(dtype).transpose(0, 1).reshape(K, -1, d)[:, :length]
    return k_KLd, v_KLd


def paged_attention(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: PagedKeys, scale: float, *, exact: bool = True
) -> Tensor:
    """softmax(q k^T * scale) v, causal, query head h reading key/value head h // (H / K).

    q_THd [T, H, d]: the pieces of S sequences one after the other (see `PagedKeys`). k_pages [P, K, d, B] (keys
    transposed inside a page) and v_pages [P, K, B, d]: views with contiguous pages, of q's dtype or, on GPUs,
    float8_e4m3fn, which is read as q's dtype. `exact`: a row's bits depend on its own sequence alone, not on batch
    mates nor on how the sequence was cut into pieces; the CPU path always keeps that. Returns [T, H, d].
    """
    if q_THd.is_cuda:
        from .triton_attention import triton_attention

        return triton_attention(q_THd, k_pages, v_pages, keys, scale, exact=exact)
    return tiled_attention(q_THd, k_pages, v_pages, keys.tables_SN, keys.lens_S, keys.starts_S, scale)
