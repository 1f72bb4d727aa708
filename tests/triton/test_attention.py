"""Attention's Triton kernels: on the GPU, or interpreted on the CPU where there is none. A span has 256 keys, a block
64; a tile of exact mode has 64 rows, so 12 queries of groups of five."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.paged_attention import SPAN, PagedKeys, SpanList, paged_attention_ref, span_arrays
from herd.kernels.triton_attention import triton_attention

from ..kernels.pages import Pages, make_pages
from ..kernels.tolerances import assert_as_exact, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    pytest.param(1, 1, 64, 16, torch.float32, id="one head, four pages a block"),
    pytest.param(3, 2, 64, 64, torch.bfloat16, id="pocket's groups, a page a block"),
    pytest.param(5, 2, 128, 32, torch.float32, id="Scout's groups, two pages a block"),
    pytest.param(5, 1, 128, 128, torch.bfloat16, id="two blocks a page"),
    pytest.param(2, 2, 24, 12, torch.float32, id="nothing a power of two"),
]
BATCHES = [
    pytest.param([1, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN + 1], [1] * 5, id="decoding at the borders of spans"),
    pytest.param([SPAN + 44, 70, 64, 2 * SPAN + 8], [1, 7, 64, 30], id="pieces beside decoding"),
    pytest.param([63, 64, 65], [13, 12, 11], id="pieces about a tile, ends about a block"),
    pytest.param([SPAN + 2, 2 * SPAN - 1], [3, 40], id="pieces across the border of spans"),
    pytest.param([100], [100], id="a whole prompt"),
]


def queries(pieces: Sequence[int], H: int, d: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece)
    return noise(starts[-1], H, d, dtype=dtype, seed=9).to(DEVICE), starts


def attend(q: Tensor, pages: Pages, starts: Sequence[int], *, exact: bool = True) -> Tensor:
    return triton_attention(q, pages.k_pages, pages.v_pages, pages.keys(starts), q.shape[2] ** -0.5, exact=exact)


def alone(q_Hd: Tensor, pages: Pages, s: int, length: int, *, exact: bool = True) -> Tensor:
    """[H, d] of one query that sees the first `length` keys of a sequence."""
    keys = pages.only(s, length)
    return triton_attention(q_Hd[None], pages.k_pages, pages.v_pages, keys, q_Hd.shape[1] ** -0.5, exact=exact)[0]


def check(q: Tensor, pages: Pages, starts: Sequence[int], out: Tensor) -> None:
    scale = q.shape[2] ** -0.5
    reference = paged_attention_ref(q, pages.k_pages, pages.v_pages, pages.keys(starts), scale)
    truth = paged_attention_ref(q.double(), *pages.double(), pages.keys(starts), scale)
    assert_as_exact(out, reference, truth)


@pytest.mark.parametrize(("lens", "pieces"), BATCHES)
@pytest.mark.parametrize(("G", "K", "d", "B", "dtype"), SHAPES)
def test_attention(G: int, K: int, d: int, B: int, dtype: torch.dtype, lens: list[int], pieces: list[int]) -> None:
    """A layer's pages lie among another's, and behind each sequence lies another request's NaN."""
    pages = make_pages(lens, K=K, d=d, B=B, dtype=dtype)
    pages.spoil_behind()
    pages = pages.to(DEVICE)
    q, starts = queries(pieces, G * K, d, dtype)
    check(q, pages, starts, attend(q, pages, starts))


@pytest.mark.parametrize(("lens", "pieces"), BATCHES)
@pytest.mark.parametrize(("G", "K"), [(3, 2), (17, 1)], ids=["groups of three", "a group larger than the small tile"])
def test_fast_attention(G: int, K: int, lens: list[int], pieces: list[int]) -> None:
    """Tiles of 16 and 128 rows, without spans in pieces."""
    pages = make_pages(lens, K=K, d=32, B=32)
    pages.spoil_behind()
    pages = pages.to(DEVICE)
    q, starts = queries(pieces, G * K, 32, torch.float32)
    check(q, pages, starts, attend(q, pages, starts, exact=False))


@pytest.mark.parametrize("pieces", [[1, 1], [9, 20]], ids=["decoding", "pieces"])
def test_fp8_pages(pieces: list[int]) -> None:
    """Keys and values are read as what their bytes say."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not know e4m3")
    pages = make_pages([SPAN + 30, 40], K=2, d=64, B=64, dtype=torch.bfloat16)
    pages.spoil_behind()
    fp8 = pages.as_fp8().to(DEVICE)
    same = Pages(fp8.k_pages.bfloat16(), fp8.v_pages.bfloat16(), fp8.tables_SN, fp8.lens)
    q, starts = queries(pieces, 6, 64, torch.bfloat16)
    check(q, same, starts, attend(q, fp8, starts))


def test_softmax_survives_scores_of_hundreds() -> None:
    """The reference is updated late and by much: earlier sums shrink to nothing."""
    pages = make_pages([SPAN + 40], K=1, d=16, B=16).to(DEVICE)
    pages.k_pages.mul_(60)
    for pieces in ([1], [4]):
        q, starts = queries(pieces, 2, 16, torch.float32)
        out = attend(q, pages, starts)
        truth = paged_attention_ref(q.double(), *pages.double(), pages.keys(starts), 0.25)
        torch.testing.assert_close(out.double(), truth, atol=1e-4, rtol=1e-4)


def test_padding_of_tables_is_not_read() -> None:
    pages = make_pages([3, 300], K=1, d=16, B=16).to(DEVICE)
    q, starts = queries([1, 1], 2, 16, torch.float32)
    out = attend(q, pages, starts)
    tables = pages.tables_SN.clone()
    tables[0, 1:] = tables[1, 0]
    assert torch.equal(attend(q, Pages(pages.k_pages, pages.v_pages, tables, pages.lens), starts), out)


def test_a_batch_that_is_filled_up() -> None:
    """As for a CUDA graph: sequences without keys give zeros, spans of no sequence give nothing."""
    pages = make_pages([SPAN + 9, 20], K=2, d=16, B=16).to(DEVICE)
    q, starts = queries([1, 1, 1, 1], 4, 16, torch.float32)
    expected = attend(q[:2], pages, starts[:3])
    lens = [*pages.lens, 0, 0]
    tables = torch.cat((pages.tables_SN, pages.tables_SN))
    arrays = span_arrays(torch.tensor(lens).numpy(), torch.tensor(starts).numpy(), 8)
    spans = SpanList(*(torch.from_numpy(array).to(DEVICE) for array in arrays))
    plain = PagedKeys.build(tables, lens, starts)
    keys = PagedKeys(tables, plain.lens_S, plain.starts_S, lens, starts, spans)
    out = triton_attention(q, pages.k_pages, pages.v_pages, keys, 0.25)
    assert torch.equal(out[:2], expected)
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company_and_any_piece(data: st.DataObject) -> None:
    """Whatever else is in the batch, and however the sequence was cut; alone it decodes."""
    lens = data.draw(st.lists(st.integers(1, SPAN + 80), min_size=1, max_size=3))
    pieces = [data.draw(st.integers(1, min(length, 30))) for length in lens]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    pages = make_pages(lens, K=2, d=16, B=16, dtype=dtype)
    pages.spoil_behind()
    pages = pages.to(DEVICE)
    q, starts = queries(pieces, 10, 16, dtype)
    together = attend(q, pages, starts)
    for s, (lo, hi) in enumerate(pairwise(starts)):
        for row in {lo, hi - 1, data.draw(st.integers(lo, hi - 1))}:
            assert torch.equal(alone(q[row], pages, s, lens[s] - (hi - 1 - row)), together[row])


@pytest.mark.parametrize("cuts", [[39, 1], [12, 12, 16], [20, 1, 18, 1]])
def test_a_piece_has_the_same_bits_however_it_is_cut(cuts: list[int]) -> None:
    """About the borders of tiles of 12 queries, before and behind the border of two spans; single queries decode."""
    length = SPAN + 20
    pages = make_pages([length], K=1, d=32, B=32).to(DEVICE)
    q, starts = queries([40], 5, 32, torch.float32)
    whole = attend(q, pages, starts)
    done = 0
    for cut in cuts:
        done += cut
        keys = pages.only(0, length - 40 + done, cut)
        part = triton_attention(q[done - cut : done].contiguous(), pages.k_pages, pages.v_pages, keys, 32**-0.5)
        assert torch.equal(part, whole[done - cut : done])


def real_pages(lens: Sequence[int], B: int, dtype: torch.dtype = torch.bfloat16) -> Pages:
    """Of 8 heads of 128, made on the GPU; of two layers, of which the second is looked at."""
    counts = [-(-length // B) for length in lens]
    k, v = (
        torch.randn(sum(counts) + 1, 2, 8, *shape, dtype=torch.bfloat16, device="cuda").to(dtype)[:, 1]
        for shape in ((128, B), (B, 128))
    )
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for table, pages in zip(tables, (torch.randperm(sum(counts)) + 1).int().split(counts), strict=True):
        table[: len(pages)] = pages
    return Pages(k, v, tables.cuda(), list(lens))


CHUNK, LONG = 8192, 131072


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "B", "exact"),
    [(CHUNK, 64, True), (LONG, 64, True), (LONG, 64, False), (CHUNK, 16, True), (CHUNK, 128, True)],
)
def test_at_the_shapes_of_scout(length: int, B: int, exact: bool) -> None:
    """40 heads on 8 of 128, bfloat16, in a whole chunk and in 128k of context."""
    pages = real_pages([length, 500], B)
    for pieces in ([1, 1], [40, 1], [1, 200]):
        q, starts = queries(pieces, 40, 128, torch.bfloat16)
        check(q, pages, starts, attend(q, pages, starts, exact=exact))


@pytest.mark.gpu
def test_fp8_at_the_shapes_of_scout() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not know e4m3")
    fp8 = real_pages([CHUNK, 500], 64, torch.float8_e4m3fn)
    same = Pages(fp8.k_pages.bfloat16(), fp8.v_pages.bfloat16(), fp8.tables_SN, fp8.lens)
    for pieces in ([1, 1], [40, 1]):
        q, starts = queries(pieces, 40, 128, torch.bfloat16)
        check(q, same, starts, attend(q, fp8, starts))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "B", "dtype"),
    [
        (LONG, 64, torch.bfloat16),
        (CHUNK, 16, torch.bfloat16),
        (CHUNK, 128, torch.bfloat16),
        (CHUNK, 64, torch.float8_e4m3fn),
    ],
)
def test_bits_at_the_shapes_of_scout(length: int, B: int, dtype: torch.dtype) -> None:
    """Each row of a piece beside others, alone."""
    lens = [length, 700, length // 3]
    pages = real_pages(lens, B, dtype)
    q, starts = queries([30, 1, 13], 40, 128, torch.bfloat16)
    together = attend(q, pages, starts)
    for s, (lo, hi) in enumerate(pairwise(starts)):
        for row in range(lo, hi):
            assert torch.equal(alone(q[row], pages, s, lens[s] - (hi - 1 - row)), together[row])


@pytest.mark.gpu
def test_bits_of_a_replayed_graph() -> None:
    """A recorded launch reads lengths and tables when it is replayed."""
    pages = real_pages([5000, 300], 64)
    q, starts = queries([1, 1], 40, 128, torch.bfloat16)
    keys = pages.keys(starts)
    attend(q, pages, starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_attention(q, pages.k_pages, pages.v_pages, keys, 128**-0.5)
    shorter = PagedKeys.build(pages.tables_SN, [4000, 299], starts)
    expected = triton_attention(q, pages.k_pages, pages.v_pages, shorter, 128**-0.5)
    assert keys.spans is not None
    assert shorter.spans is not None
    keys.lens_S.copy_(shorter.lens_S)
    count = len(shorter.spans.sequence_and_span_W2)
    keys.spans.sequence_and_span_W2.fill_(-1)
    keys.spans.sequence_and_span_W2[:count].copy_(shorter.spans.sequence_and_span_W2)
    keys.spans.first_S.copy_(shorter.spans.first_S)
    graph.replay()
    assert torch.equal(out, expected)
