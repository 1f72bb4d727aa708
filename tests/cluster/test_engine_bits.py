"""No bit of any logit depends on who else is computed, in which pieces, or in one batch or two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from herd.cluster.overlap import OverlapTuner
from herd.model.decoder import Decoder

from ..expert_backends import send_experts_away
from ..tiny_models import EngineLab, random_ids, sequence_logits, tiny_config, tiny_decoder

VOCAB = 61
LENGTHS = (1, 12, 5, 30, 19, 2)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch's own products promise no equal bits")
    return request.param


@pytest.fixture
def decoder(dtype: torch.dtype) -> Decoder:
    """A dense layer among those with experts; wider than other tiny models, so that sums are of some length."""
    config = tiny_config(hidden_size=96, expert_width=160, dense_width=200, moe_layers=frozenset({0, 2, 3}))
    return tiny_decoder(config, dtype=dtype)


def busy(decoder: Decoder, overlap: OverlapTuner | None = None, **settings: Any) -> tuple[EngineLab, list[str]]:
    """An engine that has run requests of many lengths, greedy and seeded, with a prefix in common."""
    lab = EngineLab(decoder, overlap=overlap, **settings)
    shared = random_ids(9, vocab_size=VOCAB, seed=99)
    prompts = [random_ids(n, vocab_size=VOCAB, seed=n) for n in LENGTHS] + [[*shared, n] for n in range(3, 6)]
    ids = [lab.submit(prompt, max_tokens=14, temperature=n % 2, seed=n) for n, prompt in enumerate(prompts)]
    lab.run()
    return lab, ids


def check_logits(lab: EngineLab, ids: list[str], decoder: Decoder) -> None:
    for id_ in ids:
        alone_TV = sequence_logits(decoder, lab.prompts[id_] + lab.tokens(id_), 64)
        for position, row_V in lab.logits[id_]:
            assert torch.equal(row_V, alone_TV[position]), (id_, position)


@pytest.mark.parametrize("budget", [8, 23, 512])
def test_company_and_pieces_change_no_bit(decoder: Decoder, budget: int) -> None:
    lab, ids = busy(decoder, budget=budget)
    check_logits(lab, ids, decoder)


@pytest.mark.parametrize("budget", [8, 23, 512])
def test_halves_change_no_bit(decoder: Decoder, budget: int) -> None:
    whole, ids = busy(decoder, budget=budget)
    experts = send_experts_away(decoder)
    halves, _ = busy(decoder, OverlapTuner("on"), budget=budget)
    assert halves.engine.stats().split_steps > 10
    assert experts.most_under_way == 2
    assert whole.engine.stats().split_steps == 0
    for id_ in ids:
        assert halves.tokens(id_) == whole.tokens(id_)
        for (position, row_V), (expected_position, expected_V) in zip(
            halves.logits[id_], whole.logits[id_], strict=True
        ):
            assert position == expected_position
            assert torch.equal(row_V, expected_V), (id_, position)


def test_halves_in_a_pool_that_is_too_small_for_all(decoder: Decoder) -> None:
    num_pages = EngineLab(decoder).kv.layout.pages_for(60)
    lab, ids = busy(decoder, OverlapTuner("on"), num_pages=num_pages, budget=11, max_num_seqs=4)
    stats = lab.engine.stats()
    assert stats.preemptions > 0
    assert stats.split_steps > 10
    check_logits(lab, ids, decoder)


def test_whichever_way_the_tuner_takes(decoder: Decoder) -> None:
    """Its clock runs backwards now and then, so that it changes its mind."""
    ticks = iter(range(10**6))
    tuner = OverlapTuner("auto", lambda: next(ticks) * 7919 % 1013)
    lab, ids = busy(decoder, tuner)
    stats = lab.engine.stats()
    assert 0 < stats.split_steps < stats.steps
    check_logits(lab, ids, decoder)
