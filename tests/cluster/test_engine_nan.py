"""A prompt whose numbers break (NaN in the embedding of one token) harms nobody else, although its pages are reused."""

from __future__ import annotations

import pytest

from herd.cluster.errors import EngineFault
from herd.model.decoder import Decoder

from ..tiny_models import EngineLab, random_ids, tiny_config, tiny_decoder

VOCAB = 61
BROKEN = 60


@pytest.fixture
def broken_decoder() -> Decoder:
    decoder = tiny_decoder(tiny_config())
    decoder._embedding_VD[BROKEN] = float("nan")
    return decoder


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_neither_batch_mates_nor_those_who_get_its_pages_suffer(broken_decoder: Decoder, prefix_caching: bool) -> None:
    healthy = [random_ids(length, vocab_size=BROKEN, seed=length) for length in (3, 9, 14, 21)]
    expected = [EngineLab(broken_decoder).generate(prompt, max_tokens=8) for prompt in healthy]
    num_pages = 2 * EngineLab(broken_decoder).kv.layout.pages_for(32)
    lab = EngineLab(broken_decoder, num_pages=num_pages, prefix_caching=prefix_caching)
    for _ in range(3):
        bad = [
            lab.submit([*random_ids(length, vocab_size=BROKEN, seed=50 + length), BROKEN, 5, 6], max_tokens=8)
            for length in (1, 6, 13)
        ]
        mates = [lab.submit(prompt, max_tokens=8) for prompt in healthy]
        lab.run()
        assert all(isinstance(lab.end(id_).error, EngineFault) for id_ in bad)
        assert [lab.tokens(id_) for id_ in mates] == expected
        lab.assert_no_page_held()
