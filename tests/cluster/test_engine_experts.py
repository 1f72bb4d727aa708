"""A step that lacks an expert: whose requests end, and that nobody else notices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from herd.cluster.errors import ExpertUnavailable
from herd.cluster.overlap import OverlapTuner
from herd.model.decoder import Batch, Decoder
from herd.model.experts import ExpertsUnavailable
from herd.model.kv_cache import KvCache

from ..expert_backends import Fails, FarExperts, nothing_fails, send_experts_away
from ..tiny_models import EngineLab, random_ids, tiny_config, tiny_decoder

VOCAB = 61


@pytest.fixture
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def submit_all(lab: EngineLab) -> list[str]:
    """Requests of many lengths, greedy and seeded, some with a prefix in common."""
    shared = random_ids(9, vocab_size=VOCAB, seed=99)
    prompts = [random_ids(n, vocab_size=VOCAB, seed=n) for n in (1, 12, 5, 20)] + [[*shared, n] for n in (3, 4)]
    return [lab.submit(prompt, max_tokens=10, temperature=n % 2, seed=n) for n, prompt in enumerate(prompts)]


def undisturbed(decoder: Decoder) -> list[list[int]]:
    lab = EngineLab(decoder)
    ids = submit_all(lab)
    lab.run()
    return [lab.tokens(id_) for id_ in ids]


def first_row_of_the_last_busy_expert(counts_E: Sequence[int]) -> Sequence[int]:
    return [sum(counts_E) - next(count for count in reversed(counts_E) if count)]


def failing_at(calls: set[int]) -> Fails:
    return lambda call, layer, counts_E: first_row_of_the_last_busy_expert(counts_E) if call in calls else ()


def check_ends(lab: EngineLab, ids: list[str], expected: list[list[int]]) -> int:
    """Everybody has what is due, or a part of it and the error. Returns how many have the error."""
    num_lost = 0
    for id_, tokens in zip(ids, expected, strict=True):
        error = lab.end(id_).error
        if error is None:
            assert lab.tokens(id_) == tokens
            continue
        assert isinstance(error, ExpertUnavailable)
        assert (error.status, error.code) == (503, "expert_unavailable")
        assert "nobody hosts an expert" in error.message
        assert lab.tokens(id_) == tokens[: len(lab.tokens(id_))]
        num_lost += 1
    return num_lost


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_one_lost_row_costs_one_request_and_nobody_else_a_token(decoder: Decoder, overlap: Any) -> None:
    """In any call of any step: prefill, decoding, prefix hits."""
    expected = undisturbed(decoder)
    experts = send_experts_away(decoder)
    call = 0
    while True:
        experts.calls, experts.fails = 0, failing_at({call})
        lab = EngineLab(decoder, budget=16, overlap=OverlapTuner(overlap))
        ids = submit_all(lab)
        lab.run()
        stats = lab.engine.stats()
        assert experts.is_idle
        if stats.abandoned_steps == 0:
            assert call > 50, "the calls of a whole run"
            break
        assert stats.abandoned_steps == 1
        assert stats.failed_steps == 0
        assert stats.computed_tokens == sum(len(rows) for rows in lab.logits.values())
        assert check_ends(lab, ids, expected) == 1
        again = submit_all(lab)
        lab.run()
        assert check_ends(lab, again, expected) == 0, "what the abandoned step wrote was found again"
        call += 7


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_losses_again_and_again_in_a_tight_pool(decoder: Decoder, prefix_caching: bool, overlap: Any) -> None:
    """Requests are preempted and come back in steps that are abandoned."""
    prompts = [random_ids(16, vocab_size=VOCAB, seed=seed) for seed in range(10)]
    expected = [EngineLab(decoder).generate(prompt, max_tokens=20) for prompt in prompts]
    experts = send_experts_away(decoder, failing_at({*range(20, 600, 90)}))
    lab = EngineLab(
        decoder,
        num_pages=EngineLab(decoder).kv.layout.pages_for(36) + 20,
        budget=11,
        max_num_seqs=4,
        prefix_caching=prefix_caching,
        overlap=OverlapTuner(overlap),
    )
    ids = [lab.submit(prompt, max_tokens=20) for prompt in prompts]
    lab.run()
    stats = lab.engine.stats()
    assert stats.preemptions > 0
    assert check_ends(lab, ids, expected) == stats.abandoned_steps >= 3
    assert len(lab.runner._tables._free_rows) == 4
    assert experts.is_idle


def raise_once(decoder: Decoder, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward pass lacks an expert for these tokens, once it has written its keys and values."""
    forward = decoder.forward

    def failing(batch: Batch, cache: KvCache) -> Tensor:
        monkeypatch.setattr(decoder, "forward", forward)
        forward(batch, cache)
        raise ExpertsUnavailable("nobody hosts an expert", rows)

    monkeypatch.setattr(decoder, "forward", failing)


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        pytest.param([0], {0}, id="first token of all"),
        pytest.param([4], {0}, id="last token of the first"),
        pytest.param([5, 6, 7], {1}, id="all tokens of one"),
        pytest.param([7, 8], {1, 2}, id="on both sides of a border"),
        pytest.param([4, 14], {0, 2}, id="not in between"),
        pytest.param(list(range(15)), {0, 1, 2}, id="everybody"),
    ],
)
def test_tokens_are_traced_to_their_requests(
    decoder: Decoder, rows: list[int], lost: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_ids(length, vocab_size=VOCAB, seed=length) for length in (5, 3, 7)]
    expected = [EngineLab(decoder).generate(prompt, max_tokens=6) for prompt in prompts]
    lab = EngineLab(decoder)
    ids = [lab.submit(prompt, max_tokens=6) for prompt in prompts]
    raise_once(decoder, rows, monkeypatch)
    lab.engine.step()
    assert {n for n, id_ in enumerate(ids) if lab.outputs[id_]} == lost
    lab.run()
    assert check_ends(lab, ids, expected) == len(lost)
    assert lab.engine.stats().steps == (0 if len(lost) == 3 else 6)


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_lacks_an_expert_costs_its_own_request(decoder: Decoder, half: int) -> None:
    experts = send_experts_away(decoder, failing_at({half}))
    lab = EngineLab(decoder, overlap=OverlapTuner("on"))
    ids = [lab.submit(random_ids(5, vocab_size=VOCAB, seed=seed)) for seed in range(2)]
    lab.run()
    assert [lab.end(id_).error is not None for id_ in ids] == [half == 0, half == 1]
    assert experts.is_idle


def test_a_prompt_in_pieces_goes_on_with_the_piece_that_was_abandoned(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = random_ids(3, vocab_size=VOCAB, seed=1), random_ids(30, vocab_size=VOCAB, seed=2)
    expected = EngineLab(decoder).generate(long, max_tokens=5)
    lab = EngineLab(decoder, budget=8, max_num_seqs=2)
    lost, kept = lab.submit(short, max_tokens=20), lab.submit(long, max_tokens=5)
    lab.engine.step()
    lab.engine.step()
    computed = lab.engine.stats().computed_tokens
    raise_once(decoder, [0], monkeypatch)
    lab.engine.step()
    assert isinstance(lab.end(lost).error, ExpertUnavailable)
    assert lab.engine.stats().computed_tokens == computed
    lab.run()
    assert lab.tokens(kept) == expected
    positions = [position for position, _ in lab.logits[kept]]
    assert positions == list(range(34)), "no position that counted was computed twice, none was left out"


def test_far_experts_give_the_tokens_of_near_ones(decoder: Decoder) -> None:
    expected = undisturbed(decoder)
    experts: FarExperts = send_experts_away(decoder, nothing_fails)
    assert undisturbed(decoder) == expected
    assert experts.calls > 0
