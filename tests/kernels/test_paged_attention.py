from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.paged_attention import (
    SPAN,
    PagedKeys,
    SpanList,
    paged_attention,
    paged_attention_ref,
    span_arrays,
)

from .pages import make_pages
from .tolerances import assert_as_exact, noise

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(1, 1, 8, 3, id="one head on one, block of 3"),
    pytest.param(3, 2, 16, 4, id="three heads on each"),
    pytest.param(4, 1, 64, 12, id="four heads, block of 12"),
    pytest.param(5, 2, 128, 16, id="Scout's group and head_dim"),
    pytest.param(3, 3, 8, 16, id="block wider than head_dim"),
    pytest.param(2, 1, 6, 1, id="one token a page"),
]
PIECES = [
    pytest.param([1, 1, 1, 1], id="decoding"),
    pytest.param([1, 7, 1, 16], id="decoding beside prefill"),
    pytest.param([9, 8, 3, 2], id="prefill about the query tile"),
]


def lens_for(B: int) -> list[int]:
    """Less than a page, exactly full pages, one beyond, and many; each no shorter than any piece."""
    return [max(1, B - 1) + 16, -(-16 // B) * B, -(-16 // B) * B + 1, 6 * B + 19]


def queries(pieces: list[int], H: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[int]]:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece)
    return noise(starts[-1], H, d, dtype=dtype, seed=9), starts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(("G", "K", "d", "B"), SHAPES)
def test_paged_attention(G: int, K: int, d: int, B: int, pieces: list[int], dtype: torch.dtype) -> None:
    pages = make_pages(lens_for(B), K=K, d=d, B=B, dtype=dtype)
    q, starts = queries(pieces, G * K, d, dtype)
    out = paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), d**-0.5)
    reference = paged_attention_ref(q, pages.k_pages, pages.v_pages, pages.keys(starts), d**-0.5)
    truth = paged_attention_ref(q.double(), *pages.double(), pages.keys(starts), d**-0.5)
    assert out.is_contiguous()
    assert_as_exact(out, reference, truth)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 12])
def test_whole_prompts_from_position_zero(length: int) -> None:
    """Every length about the borders of pages of 4; the first query sees one key, its own."""
    pages = make_pages([length], K=2, d=8, B=4)
    q, starts = queries([length], 4, 8)
    out = paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), 0.3)
    truth = paged_attention_ref(q.double(), *pages.double(), pages.keys(starts), 0.3)
    assert_as_exact(out, paged_attention_ref(q, pages.k_pages, pages.v_pages, pages.keys(starts), 0.3), truth)
    first_value = pages.v_pages[pages.tables_SN[0, 0].long(), :, 0].repeat_interleave(2, 0)
    torch.testing.assert_close(out[0], first_value, atol=1e-6, rtol=1e-6)


def test_softmax_survives_scores_of_hundreds() -> None:
    """The running peak is updated late and by much: earlier sums shrink to nothing."""
    pages = make_pages([40], K=1, d=8, B=4)
    q, starts = queries([3], 2, 8)
    for scale in (60.0, -60.0):
        out = paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), scale)
        truth = paged_attention_ref(q.double(), *pages.double(), pages.keys(starts), scale)
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), truth, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company_and_any_piece(data: st.DataObject) -> None:
    """Whatever else is in the batch, and however the sequence was cut."""
    lens = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    pieces = [data.draw(st.integers(1, length)) for length in lens]
    dtype = data.draw(st.sampled_from(DTYPES))
    pages = make_pages(lens, K=2, d=8, B=4, dtype=dtype)
    q, starts = queries(pieces, 6, 8, dtype)
    together = paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), 0.35)
    for s, (lo, hi) in enumerate(pairwise(starts)):
        for row in range(lo, hi):
            keys = pages.only(s, lens[s] - (hi - 1 - row))
            alone = paged_attention(q[row : row + 1], pages.k_pages, pages.v_pages, keys, 0.35)
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("pieces", [[1, 1], [5, 3], [1, 6]])
def test_what_lies_behind_a_sequence_does_not_matter(pieces: list[int]) -> None:
    """A page is handed on as its last owner left it: with NaN, if a request went wrong."""
    pages = make_pages([10, 6], K=2, d=8, B=4)
    q, starts = queries(pieces, 4, 8)
    clean = paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), 0.35)
    pages.spoil_behind()
    assert torch.equal(paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), 0.35), clean)


def test_padding_of_tables_is_not_read() -> None:
    """Rows of the page table are padded with any valid page."""
    pages = make_pages([3, 21], K=1, d=8, B=4)
    q, starts = queries([1, 1], 2, 8)
    out = paged_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), 0.35)
    tables = pages.tables_SN.clone()
    tables[0, 1:] = tables[1, 0]
    other = PagedKeys.build(tables, pages.lens, starts)
    assert torch.equal(paged_attention(q, pages.k_pages, pages.v_pages, other, 0.35), out)


def test_spans_of_a_batch() -> None:
    """Decoding sequences only, in order; a filling one has none."""
    spans = SpanList.build([1, SPAN, 9, SPAN + 1, 0, 2 * SPAN + 3], [0, 1, 2, 5, 6, 7, 8], "cpu")
    assert spans.first_S.tolist() == [0, 1, 2, 2, 4, 4, 7]
    assert spans.sequence_and_span_W2.tolist() == [[0, 0], [1, 0], [3, 0], [3, 1], [5, 0], [5, 1], [5, 2]]
    assert spans.sequence_and_span_W2.dtype == spans.first_S.dtype == torch.int32
    filled, first = span_arrays(np.array([SPAN + 1, 5]), np.array([0, 1, 2]), 5)
    assert filled.tolist() == [[0, 0], [0, 1], [1, 0], [-1, -1], [-1, -1]]
    assert first.tolist() == [0, 2, 3]
