"""The engine against transformers, over tiny checkpoints of every form: all logits of all positions that a step
computed, and the greedy tokens. transformers sees one finished sequence at a time, whole and without a cache, so any
error of chunks, pages, prefixes, batches or resumption shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ..oracles import FORMS, TOLERANCE, Oracle
from ..tiny_models import EngineLab, random_ids

LENGTHS = (1, 12, 5, 30, 47)
"""One token; a whole chunk; less than one; past two and a half; ends one before a border."""


@pytest.fixture(scope="module", params=FORMS)
def oracle(request: pytest.FixtureRequest, oracles: Callable[[str], Oracle]) -> Oracle:
    return oracles(request.param)


def prompt_of(oracle: Oracle, length: int, seed: int = 0) -> list[int]:
    return random_ids(length, vocab_size=oracle.config.vocab_size, seed=seed)


def check(lab: EngineLab, oracle: Oracle, id_: str, num_cached: int = 0) -> None:
    """All logits within tolerance, every position past the cached prefix computed, every token the oracle's choice."""
    prompt, output = lab.prompts[id_], lab.tokens(id_)
    expected_TV = oracle.logits(prompt + output)
    computed = lab.logits[id_]
    assert {position for position, _ in computed} == set(range(num_cached, len(prompt) + len(output) - 1))
    positions = [position for position, _ in computed]
    logits = torch.stack([row for _, row in computed])
    assert logits.std() > 1, "flat logits would prove nothing"
    torch.testing.assert_close(logits, expected_TV[positions], atol=TOLERANCE, rtol=0)
    assert output == expected_TV[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_prefill_at_once_and_in_a_batch_of_mixed_lengths(oracle: Oracle) -> None:
    lab = EngineLab(oracle.decoder, budget=512)
    ids = [lab.submit(prompt_of(oracle, length, seed), max_tokens=6) for seed, length in enumerate(LENGTHS)]
    lab.run()
    for id_ in ids:
        check(lab, oracle, id_)


@pytest.mark.parametrize("budget", [5, 17])
def test_prefill_in_uneven_pieces(oracle: Oracle, budget: int) -> None:
    lab = EngineLab(oracle.decoder, budget=budget, max_num_seqs=3, block_size=3)
    ids = [lab.submit(prompt_of(oracle, length, seed), max_tokens=4) for seed, length in enumerate(LENGTHS)]
    lab.run()
    for id_ in ids:
        check(lab, oracle, id_)


def test_decode_past_several_chunks(oracle: Oracle) -> None:
    lab = EngineLab(oracle.decoder, block_size=16)
    ids = [lab.submit(prompt_of(oracle, length), max_tokens=45) for length in (4, 11)]
    lab.run()
    for id_ in ids:
        check(lab, oracle, id_)
        assert len(lab.tokens(id_)) == 45


def test_prefix_hit(oracle: Oracle) -> None:
    lab = EngineLab(oracle.decoder, block_size=4)
    block_size = lab.kv.layout.block_size
    shared = prompt_of(oracle, 32)
    first = lab.submit(shared, max_tokens=10)
    lab.run()
    same = lab.submit(shared, max_tokens=10)
    lab.run()
    longer = [lab.submit(shared + prompt_of(oracle, n, seed=n), max_tokens=10) for n in (3, 20)]
    lab.run()
    check(lab, oracle, first)
    assert lab.tokens(same) == lab.tokens(first)
    for id_ in (same, *longer):
        num_cached = lab.end(id_).num_cached_tokens
        assert num_cached >= min(len(lab.prompts[id_]) - 1, 32) - block_size
        assert num_cached > 0
        check(lab, oracle, id_, num_cached)
    assert lab.engine.stats().prefix_hit_tokens == sum(lab.end(id_).num_cached_tokens for id_ in (first, same, *longer))


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_and_resumed(oracle: Oracle, prefix_caching: bool) -> None:
    layout = EngineLab(oracle.decoder).kv.layout
    num_pages = layout.pages_for(60) + layout.pages_for(8)
    lab = EngineLab(oracle.decoder, num_pages=num_pages, prefix_caching=prefix_caching, budget=16, max_num_seqs=4)
    ids = [lab.submit(prompt_of(oracle, 16, seed), max_tokens=44) for seed in range(4)]
    lab.run()
    assert lab.engine.stats().preemptions > 0
    for id_ in ids:
        check(lab, oracle, id_)
        assert len(lab.tokens(id_)) == 44
    num_computed = sum(len(rows) for rows in lab.logits.values())
    assert num_computed == lab.engine.stats().computed_tokens
    if not prefix_caching:
        assert num_computed > 4 * 59, "nobody computed anything twice"
