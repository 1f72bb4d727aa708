"""The decoder and experts that live elsewhere: what it computes meanwhile, several batches in turns, and what is left
when an expert cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.kernels.paged_attention import PagedKeys
from herd.kernels.route import Route, route
from herd.model import decoder as decoder_module
from herd.model.decoder import Batch, Decoder, GroupPages
from herd.model.experts import ExpertsUnavailable
from herd.model.kv_cache import KvCache

from ..expert_backends import send_experts_away
from ..tiny_models import random_ids, tiny_config, tiny_decoder

BLOCK = 8
LENGTHS = (5, 3, 8)


def prefills(decoder: Decoder, lengths: Sequence[int] = LENGTHS) -> tuple[list[Batch], KvCache]:
    """One batch for each prompt, none longer than a block, and an empty cache for all of them."""
    num_layers = decoder.config.num_layers
    cache = KvCache(
        decoder.config,
        num_pages=num_layers * len(lengths),
        layers_per_page=1,
        block_size=BLOCK,
        dtype=decoder.dtype,
    )
    kinds = [(place.local, place.page_of_block) for place in cache.places]
    batches = []
    for s, length in enumerate(lengths):
        positions_T, pages = torch.arange(length), {}
        for k, kind in enumerate(kinds):
            page = s * num_layers + k
            keys = PagedKeys.build(torch.tensor([[page]]).int(), [length], [0, length])
            pages[kind] = GroupPages(page * BLOCK + positions_T, keys)
        ids_T = torch.tensor(random_ids(length, vocab_size=61, seed=s))
        batches.append(Batch(ids_T, positions_T, pages))
    return batches, cache


def alone(decoder: Decoder) -> list[Tensor]:
    batches, cache = prefills(decoder)
    return [decoder.forward(batch, cache) for batch in batches]


@pytest.fixture
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def watch_routes(monkeypatch: pytest.MonkeyPatch) -> list[Route]:
    """Every routing decision, in order of the dispatches."""
    routes: list[Route] = []

    def noting(logits_TE: Tensor, k: int) -> Route:
        routes.append(route(logits_TE, k))
        return routes[-1]

    monkeypatch.setattr(decoder_module, "route", noting)
    return routes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moe_layers", [(0, 1, 2, 3), (1, 3), ()])
def test_batches_in_turns_give_what_each_gives_alone(moe_layers: Sequence[int], dtype: torch.dtype) -> None:
    decoder = tiny_decoder(tiny_config(moe_layers=frozenset(moe_layers)), dtype=dtype)
    expected = alone(decoder)
    experts = send_experts_away(decoder)
    batches, cache = prefills(decoder)
    together = decoder.forward_interleaved(batches, cache)
    assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))
    assert experts.most_under_way == (3 if moe_layers else 0)
    assert experts.calls == 3 * len(moe_layers)
    assert experts.is_idle
    assert experts.abandoned == 0


def test_what_is_computed_while_rows_travel(decoder: Decoder) -> None:
    """The shared expert, and the other batch's attention."""
    experts = send_experts_away(decoder)

    def noting(mlp: Any) -> Any:
        def noted(x_TD: Tensor) -> Tensor:
            experts.events.append(("shared", experts.calls - 1))
            return mlp(x_TD)

        return noted

    decoder.layers = [replace(layer, mlp=noting(layer.mlp)) for layer in decoder.layers]
    batches, cache = prefills(decoder)
    decoder.forward(batches[0], cache)
    assert experts.events == [(event, call) for call in range(4) for event in ("dispatch", "shared", "collect")]
    experts.events.clear()
    experts.calls = 0
    decoder.forward_interleaved(batches[:2], cache)
    expected = [("dispatch", 0), ("shared", 0)]
    for call in range(1, 8):
        expected += [("dispatch", call), ("shared", call), ("collect", call - 1)]
    assert [*experts.events] == [*expected, ("collect", 7)]


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("failing_call", range(12))
def test_tokens_that_lack_an_expert_are_named(
    failing_call: int, experts_per_token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all batches, counted through them; and no dispatch stays behind."""
    decoder = tiny_decoder(tiny_config(experts_per_token=experts_per_token))
    expected = alone(decoder)
    routes = watch_routes(monkeypatch)
    missing: list[int] = []

    def fails(call: int, layer: int, counts_E: Sequence[int]) -> Sequence[int]:
        if call != failing_call or missing:
            return ()
        expert = next(e for e, count in enumerate(counts_E) if count)
        missing.extend(range(sum(counts_E[:expert]), sum(counts_E[: expert + 1])))
        return missing

    experts = send_experts_away(decoder, fails)
    batches, cache = prefills(decoder)
    with pytest.raises(ExpertsUnavailable, match="nobody hosts an expert") as caught:
        decoder.forward_interleaved(batches, cache)
    rows_TK = routes[failing_call].rows_TK.tolist()
    first = sum(LENGTHS[: failing_call % 3])
    assert caught.value.rows == tuple(first + t for t, rows in enumerate(rows_TK) if {*rows} & {*missing})
    assert experts.is_idle
    assert experts.abandoned == (2 if failing_call < 10 else 11 - failing_call)
    again = decoder.forward_interleaved(batches, cache)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_any_error_leaves_no_dispatch_behind(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second batch's attention here, while the first one's experts are under way."""
    experts = send_experts_away(decoder)
    attention, calls = decoder_module.paged_attention, 0

    def failing(*args: Any, **settings: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("bad pages")
        return attention(*args, **settings)

    monkeypatch.setattr(decoder_module, "paged_attention", failing)
    batches, cache = prefills(decoder)
    with pytest.raises(RuntimeError, match="bad pages"):
        decoder.forward_interleaved(batches[:2], cache)
    assert experts.abandoned == 1
    assert experts.is_idle
