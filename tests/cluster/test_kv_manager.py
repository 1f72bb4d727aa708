"""What a request holds at each point of its life, in both block groups, and what it can reuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.block_pool import Group
from herd.cluster.kv_layout import KvLayout
from herd.cluster.kv_manager import KvManager, KvUsage
from herd.cluster.request import EngineRequest, Request
from herd.model.sampling_params import SamplingParams

CHUNK, BLOCK = 12, 4
ONE_TO_THREE = KvLayout.build(num_global_layers=1, num_local_layers=3, chunk=CHUNK, block_size=BLOCK, num_pages=200)
ALL_LOCAL = KvLayout.build(num_global_layers=0, num_local_layers=4, chunk=CHUNK, block_size=BLOCK, num_pages=200)
ALL_GLOBAL = KvLayout.build(num_global_layers=4, num_local_layers=0, chunk=CHUNK, block_size=BLOCK, num_pages=200)


def request_of(tokens, name: str = "r", salt: str = "") -> Request:
    return Request(EngineRequest(name, list(tokens), SamplingParams(max_tokens=1), cache_salt=salt), arrival=0)


def compute(kv: KvManager, request: Request, stop: int | None = None) -> None:
    """Attach the request if need be and compute it up to `stop`, one piece per chunk."""
    stop = request.num_tokens if stop is None else stop
    if request.num_computed_tokens == 0:
        hit = kv.match(request)
        kv.attach(request, hit)
        request.num_computed_tokens = hit.num_tokens
    while request.num_computed_tokens < stop:
        start, chunk = request.num_computed_tokens, kv.layout.chunk or stop
        piece = min(stop - start, chunk - start % chunk)
        assert kv.grow(request, piece)
        request.num_computed_tokens += piece
        kv.commit(request)
        kv.check_integrity()


def hit_length(kv: KvManager, tokens, salt: str = "") -> int:
    return kv.match(request_of(tokens, "probe", salt)).num_tokens


# The layout


def test_scout_layout_has_one_and_three_pages_of_twelve_layers() -> None:
    layout = KvLayout.build(num_global_layers=12, num_local_layers=36, chunk=8192, block_size=16, num_pages=7)
    assert (layout.layers_per_page, layout.pages_per_global_block, layout.pages_per_local_block) == (12, 1, 3)
    assert layout.page_bytes(4096) == 12 * 16 * 4096
    assert layout.with_pages(9).num_pages == 9


@pytest.mark.parametrize(("chunk", "requested", "block_size"), [(12, 5, 4), (12, 16, 12), (8192, 16, 16), (7, 6, 1)])
def test_block_size_is_lowered_to_a_divisor_of_the_chunk(chunk, requested, block_size) -> None:
    layout = KvLayout.build(num_global_layers=1, num_local_layers=1, chunk=chunk, block_size=requested)
    assert layout.block_size == block_size


def test_a_group_without_layers_takes_no_pages() -> None:
    assert (ALL_LOCAL.pages_per_global_block, ALL_LOCAL.pages_per_local_block) == (0, 1)
    assert (ALL_GLOBAL.pages_per_global_block, ALL_GLOBAL.pages_per_local_block) == (1, 0)
    assert ALL_GLOBAL.chunk is None
    unchunked = KvLayout.build(num_global_layers=2, num_local_layers=6, chunk=None, block_size=BLOCK)
    assert (unchunked.layers_per_page, unchunked.pages_per_global_block, unchunked.pages_per_local_block) == (8, 1, 0)


@pytest.mark.parametrize("wrong", [{"num_global_layers": 0, "num_local_layers": 0}, {"block_size": 0}, {"chunk": 0}])
def test_a_layout_that_holds_nothing_is_refused(wrong) -> None:
    with pytest.raises(ValueError):
        KvLayout.build(**{"num_global_layers": 1, "num_local_layers": 1, "chunk": 8, "block_size": 4} | wrong)


@pytest.mark.parametrize("layout", [ONE_TO_THREE, ALL_LOCAL, ALL_GLOBAL])
def test_pages_for_is_the_peak_of_what_a_request_holds(layout: KvLayout) -> None:
    kv = KvManager(layout, prefix_caching=False)
    request = request_of(range(70))
    kv.attach(request, kv.match(request))
    peak = 0
    for num_tokens in range(1, 71):
        assert kv.grow(request, 1)
        peak = max(peak, kv.usage.used)
        assert layout.pages_for(num_tokens) == peak
        assert kv.pages_held(request) == kv.usage.used == layout.pages_at(num_tokens)
        request.num_computed_tokens += 1
        kv.commit(request)


@given(num_pages=st.integers(0, 100), at_most=st.integers(0, 120))
def test_max_tokens_is_the_last_length_that_fits(num_pages, at_most) -> None:
    for layout in (ONE_TO_THREE, ALL_LOCAL, ALL_GLOBAL):
        layout = layout.with_pages(num_pages)
        longest = layout.max_tokens(at_most)
        assert layout.pages_for(longest) <= num_pages
        assert longest == at_most or layout.pages_for(longest + 1) > num_pages


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_sixty_four_chunks_hold_all_global_and_one_chunk_of_local(prefix_caching) -> None:
    layout = KvLayout.build(num_global_layers=12, num_local_layers=36, chunk=64, block_size=16, num_pages=1000)
    kv = KvManager(layout, prefix_caching)
    request = request_of(range(64 * 64))
    compute(kv, request, stop=64 * 64 - 1)
    global_pages, local_pages_of_one_chunk = 64 * 64 // 16, 3 * 64 // 16
    assert kv.usage.used == global_pages + local_pages_of_one_chunk == layout.pages_for(64 * 64)
    everything_global = 64 * 64 // 16 * 4
    assert kv.usage.used < everything_global * 0.27
    compute(kv, request)
    assert kv.usage.used == global_pages, "a finished chunk needs no local block"


# Growing and dropping


def test_tables_grow_at_the_end_and_start_afresh_at_a_chunk() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    request = request_of(range(40))
    compute(kv, request, stop=5)
    tables = kv.tables("r")
    epoch, global_pages, local_pages = tables.epoch, list(tables.global_pages), list(tables.local_pages)
    assert (len(global_pages), len(local_pages), tables.local_start) == (2, 6, 0)
    compute(kv, request, stop=11)
    assert tables.epoch == epoch
    assert (tables.global_pages[:2], tables.local_pages[:6]) == (global_pages, local_pages)
    assert (len(tables.global_pages), len(tables.local_pages)) == (3, 9)
    compute(kv, request, stop=12)
    assert tables.epoch > epoch
    assert (len(tables.global_pages), tables.local_pages, tables.local_start) == (3, [], 12)
    compute(kv, request, stop=13)
    assert (len(tables.global_pages), len(tables.local_pages), tables.local_start) == (4, 3, 12)


def test_epochs_are_never_repeated_for_a_request_that_comes_back() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=False)
    seen = set()
    for _ in range(3):
        request = request_of(range(10))
        compute(kv, request)
        seen.add(kv.tables("r").epoch)
        kv.free(request)
    assert len(seen) == 3
    with pytest.raises(KeyError):
        kv.tables("r")


def test_growing_is_all_or_nothing() -> None:
    kv = KvManager(ONE_TO_THREE.with_pages(11), prefix_caching=True)
    request = request_of(range(12))
    kv.attach(request, kv.match(request))
    assert not kv.grow(request, 12), "three blocks of 1 + 3 pages"
    assert kv.usage == KvUsage(total=11, free=11, cached=0, used=0)
    assert kv.grow(request, 8)
    assert kv.usage == KvUsage(total=11, free=3, cached=0, used=8)
    kv.check_integrity()


# Prefixes


def test_a_hit_is_of_whole_blocks_and_leaves_a_token() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    first = request_of(range(11))
    compute(kv, first)
    assert hit_length(kv, range(11)) == 8
    assert hit_length(kv, range(9)) == 8
    assert hit_length(kv, range(8)) == 4
    assert hit_length(kv, [*range(7), 99, 98]) == 4
    assert hit_length(kv, [99, *range(1, 11)]) == 0
    kv.free(first)
    assert hit_length(kv, range(11)) == 8
    assert kv.usage == KvUsage(total=200, free=192, cached=8, used=0)


def test_only_computed_blocks_are_found() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    request = request_of(range(20))
    compute(kv, request, stop=5)
    assert kv.grow(request, 7)
    assert hit_length(kv, range(20)) == 4


def test_requests_share_the_blocks_of_a_prefix_and_nothing_else() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    first, second = request_of(range(20), "first"), request_of([*range(16), 50, 51], "second")
    compute(kv, first)
    compute(kv, second)
    one, two = kv.tables("first"), kv.tables("second")
    assert set(one.global_pages) & set(two.global_pages) == set(one.global_pages[:4])
    assert (one.local_start, two.local_start) == (12, 12)
    assert set(one.local_pages) & set(two.local_pages) == set(one.local_pages[:3])
    kv.free(first)
    kv.check_integrity()
    assert kv.usage.used == 5 + 2 * 3


def test_salts_keep_prefixes_apart() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    compute(kv, request_of(range(11), salt="tenant"))
    assert hit_length(kv, range(11), salt="tenant") == 8
    assert hit_length(kv, range(11)) == 0
    assert hit_length(kv, range(11), salt="\ud800") == 0, "a salt may be any JSON string"


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=False)
    request = request_of(range(30))
    compute(kv, request)
    assert hit_length(kv, range(30)) == 0
    kv.free(request)
    assert kv.usage == KvUsage(total=200, free=200, cached=0, used=0)


def test_a_hit_in_a_later_chunk_needs_no_earlier_local_blocks() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    request = request_of(range(30))
    compute(kv, request)
    kv.free(request)
    again = request_of(range(30), "again")
    hit = kv.match(again)
    assert (hit.num_tokens, len(hit.global_blocks), len(hit.local_blocks)) == (28, 7, 1)
    kv.attach(again, hit)
    assert kv.tables("again").local_start == 24


def test_eviction_shortens_a_hit_block_by_block_from_its_tail() -> None:
    kv = KvManager(ONE_TO_THREE.with_pages(32), prefix_caching=True)
    request = request_of(range(24))
    compute(kv, request, stop=23)
    kv.free(request)
    # 12 pages are free; then the local blocks of the first chunk go (9 pages, the oldest, which the hit does not need),
    # then local and global blocks of the second chunk in turns.
    lengths = []
    for _ in range(10):
        lengths.append(hit_length(kv, range(24)))
        kv.pool.allocate(Group.LOCAL)
    assert lengths == [20] * 8 + [16, 12]


def test_a_model_of_local_layers_only_skips_whole_chunks() -> None:
    """Nothing flows from one chunk to the next there, so a chunk's start is a prefix that needs no block."""
    kv = KvManager(ALL_LOCAL, prefix_caching=True)
    assert hit_length(kv, range(30)) == 24
    assert hit_length(kv, range(25)) == 24
    assert hit_length(kv, range(24)) == 12
    assert hit_length(kv, range(12)) == 0
    compute(kv, request_of(range(30)))
    assert hit_length(kv, range(30)) == 28
    assert hit_length(kv, [99, *range(1, 30)]) == 24


def test_a_model_of_global_layers_only_has_no_chunks() -> None:
    kv = KvManager(ALL_GLOBAL, prefix_caching=True)
    request = request_of(range(30))
    compute(kv, request)
    assert kv.usage.used == 8
    assert kv.tables("r").local_pages == []
    assert hit_length(kv, range(30)) == 28


def test_an_evicted_prefix_is_not_found() -> None:
    kv = KvManager(ALL_GLOBAL.with_pages(8), prefix_caching=True)
    first = request_of(range(16), "first")
    compute(kv, first)
    kv.free(first)
    second = request_of(range(100, 124), "second")
    compute(kv, second)
    assert hit_length(kv, range(17)) == 8, "two blocks had to go, and they went from the tail"


def test_pages_to_admit_counts_what_others_use_as_shared() -> None:
    kv = KvManager(ONE_TO_THREE, prefix_caching=True)
    first = request_of(range(10), "first")
    compute(kv, first)
    second = request_of(range(11), "second")
    assert kv.pages_to_admit(second, kv.match(second)) == ONE_TO_THREE.pages_for(11) - 2 * 4
    kv.free(first)
    assert kv.pages_to_admit(second, kv.match(second)) == ONE_TO_THREE.pages_for(11)
    kv.attach(second, kv.match(second))
    second.num_computed_tokens = 8
    assert kv.pages_missing(second) == 4
    assert kv.grow(second, 3)
    assert kv.pages_missing(second) == 0
