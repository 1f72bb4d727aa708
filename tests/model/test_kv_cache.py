from __future__ import annotations

from collections import Counter

import pytest
import torch

from herd.model.kv_cache import KvCache, layer_places, page_bytes

from ..tiny_models import tiny_config


def test_every_layer_has_a_place_of_its_own() -> None:
    config = tiny_config(num_layers=8, rope_layers=frozenset({0, 1, 2, 4, 5, 6}), moe_layers=frozenset())
    places = layer_places(config, layers_per_page=2)
    assert len(set(places)) == 8
    assert Counter(place.local for place in places) == {True: 6, False: 2}
    assert {(place.page_of_block, place.slot) for place in places if place.local} == {
        (page, slot) for page in range(3) for slot in range(2)
    }
    assert [place.local for place in places] == [config.is_local(i) for i in range(8)]


def test_without_chunks_all_layers_are_of_one_group() -> None:
    places = layer_places(tiny_config(attention_chunk_size=None), layers_per_page=4)
    assert [(place.local, place.page_of_block, place.slot) for place in places] == [(False, 0, i) for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_share_one_storage_without_overlap(dtype: torch.dtype) -> None:
    config = tiny_config()
    cache = KvCache(config, num_pages=6, layers_per_page=1, block_size=4, dtype=dtype)
    assert cache.num_bytes == 6 * page_bytes(config, 1, 4, dtype)
    for layer in range(config.num_layers):
        k_pages, v_pages = cache.layer(layer)
        assert k_pages.shape == (6, config.num_kv_heads, config.head_dim, 4)
        assert v_pages.shape == (6, config.num_kv_heads, 4, config.head_dim)
        assert k_pages[0].is_contiguous()
        assert v_pages[0].is_contiguous()
    shared = KvCache(config, num_pages=6, layers_per_page=3, block_size=4, dtype=dtype)
    for layer in range(3):
        for view in shared.layer(layer):
            assert not view.any()
            view.fill_(layer + 1)
    for layer in range(3):
        for view in shared.layer(layer):
            assert (view == layer + 1).all()


def test_bytes_of_a_token_of_scout() -> None:
    """4096 bytes a token and layer in bfloat16, half of it in fp8."""
    config = tiny_config(num_heads=40, num_kv_heads=8, head_dim=128)
    assert page_bytes(config, layers_per_page=12, block_size=16, dtype=torch.bfloat16) == 4096 * 16 * 12
    assert page_bytes(config, layers_per_page=12, block_size=16, dtype=torch.float8_e4m3fn) == 2048 * 16 * 12


def test_fp8_pages() -> None:
    config = tiny_config()
    cache = KvCache(config, num_pages=6, layers_per_page=1, block_size=4, dtype=torch.float8_e4m3fn)
    assert cache.num_bytes == 6 * page_bytes(config, 1, 4, torch.float8_e4m3fn)
    assert all(view.dtype is torch.float8_e4m3fn for view in cache.layer(0))
