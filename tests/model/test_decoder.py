"""The decoder alone, over one sequence; the engine's tests run it in batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from herd.model.config import Llama4Config
from herd.model.decoder import Decoder

from ..oracles import FORMS, TOLERANCE, Oracle
from ..tiny_models import random_ids, sequence_logits, tiny_config, tiny_decoder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("piece", "num_prefill"),
    [
        pytest.param(64, None, id="prefill at once"),
        pytest.param(5, None, id="prefill by fives"),
        pytest.param(7, 29, id="prefill by sevens, then decode"),
        pytest.param(1, None, id="token by token"),
    ],
)
def test_logits_are_those_of_transformers(
    form: str, piece: int, num_prefill: int | None, oracles: Callable[[str], Oracle]
) -> None:
    oracle = oracles(form)
    ids = random_ids(54, vocab_size=oracle.config.vocab_size, seed=3)
    logits = sequence_logits(oracle.decoder, ids, piece, num_prefill)
    torch.testing.assert_close(logits, oracle.logits(ids), atol=TOLERANCE, rtol=0)


DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="torch's own products promise no equal bits"
        ),
    ),
]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def test_a_forward_changes_nothing_but_the_cache(decoder: Decoder) -> None:
    ids = random_ids(20, vocab_size=61, seed=0)
    assert torch.equal(sequence_logits(decoder, ids, 6), sequence_logits(decoder, ids, 6))


def test_a_token_depends_on_none_after_it(decoder: Decoder) -> None:
    ids = random_ids(30, vocab_size=61, seed=0)
    whole = sequence_logits(decoder, ids, 64)
    torch.testing.assert_close(sequence_logits(decoder, ids[:17], 64), whole[:17], atol=1e-5, rtol=0)


def test_rope_layers_see_their_chunk_only() -> None:
    """With no global layer, a new chunk starts as if nothing had been before."""
    config = tiny_config(rope_layers=frozenset(range(4)))
    decoder = tiny_decoder(config)
    ids = random_ids(24, vocab_size=61, seed=0)
    whole = sequence_logits(decoder, ids, 64)
    torch.testing.assert_close(sequence_logits(decoder, ids[16:], 64), whole[16:], atol=1e-5, rtol=0)


def test_without_rope_and_temperature_order_does_not_matter() -> None:
    """Global attention is a function of the set of earlier tokens."""
    config = tiny_config(rope_layers=frozenset(), attn_temperature_tuning=False, num_layers=1, moe_layers=frozenset())
    decoder = tiny_decoder(config)
    ids = random_ids(12, vocab_size=61, seed=0)
    swapped = [*ids[:11][::-1], ids[11]]
    torch.testing.assert_close(
        sequence_logits(decoder, ids, 64)[-1], sequence_logits(decoder, swapped, 64)[-1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("position", "expected"), [(0, 1.0), (8190, 1.0), (8191, 1.0693), (131071, 1.2833), (10485759, 1.7155)]
)
def test_temperature_of_positions(position: int, expected: float) -> None:
    config = tiny_config(floor_scale=8192, max_position_embeddings=16)
    factor = tiny_decoder(config)._temperature(torch.tensor([position]))
    assert factor is not None
    assert factor.item() == pytest.approx(expected, abs=5e-5)
    assert factor.item() == pytest.approx(1 + 0.1 * math.log(1 + (position + 1) // 8192), abs=1e-6)


def test_temperature_is_exactly_one_at_first() -> None:
    factors = tiny_decoder(tiny_config(floor_scale=100))._temperature(torch.arange(99))
    assert factors is not None
    assert (factors == 1).all()
    assert tiny_decoder(tiny_config(attn_temperature_tuning=False))._temperature(torch.arange(9)) is None


def single_expert(config: Llama4Config) -> Llama4Config:
    """One expert only, so that no rounding can flip the routing."""
    return config.model_copy(update={"num_experts": 1})


def test_bfloat16_is_close_to_float32() -> None:
    config = single_expert(tiny_config())
    ids = random_ids(40, vocab_size=61, seed=0)
    exact = sequence_logits(tiny_decoder(config), ids, 7, 30)
    rounded = sequence_logits(tiny_decoder(config, dtype=torch.bfloat16), ids, 7, 30)
    assert rounded.dtype is torch.bfloat16
    error = (rounded.float() - exact).abs()
    assert error.max() < 0.1 * exact.std()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_decodes_as_it_prefills(dtype: torch.dtype) -> None:
    """A token's keys, values and logits have the same bits in whichever piece it was computed."""
    decoder = tiny_decoder(tiny_config(), dtype=dtype)
    ids = random_ids(40, vocab_size=61, seed=0)
    whole = sequence_logits(decoder, ids, 64)
    for piece, num_prefill in ((5, 21), (3, None), (1, None), (8, 1)):
        assert torch.equal(sequence_logits(decoder, ids, piece, num_prefill), whole)
