from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.model.detokenizer import IncrementalDetokenizer
from herd.model.tokenizer import Tokenizer

from .tokenizers_for_tests import write_ranks

invalid = st.sampled_from([b"\xff", b"\xc0\xaf", b"\xe2\x82", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\x80"])
byte_strings = st.lists(st.one_of(st.text(max_size=6).map(str.encode), invalid), max_size=10).map(b"".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_dir(write_ranks(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def id_of(tokenizer) -> dict[bytes, int]:
    return {tokenizer.token_bytes(i): i for i in range(256)}


def _cut(data: list, rng) -> list[list]:
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, len(data))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@settings(deadline=None)
@given(data=byte_strings, rng=st.randoms())
def test_pieces_equal_decoding_everything_at_once(tokenizer, id_of, data, rng):
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = [id_of[bytes([byte])] for byte in data]
    pieces = [detokenizer.push(part) for part in _cut(ids, rng)]
    assert "".join(pieces) + detokenizer.finish() == data.decode("utf-8", "replace") == tokenizer.decode(ids)


@settings(deadline=None)
@given(data=byte_strings)
def test_each_byte_gives_out_what_pythons_incremental_decoder_does(tokenizer, id_of, data):
    """In particular, bytes that nothing can mend are replaced at once and do not wait for the end."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    oracle = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in data:
        assert detokenizer.push([id_of[bytes([byte])]]) == oracle.decode(bytes([byte]))
    assert detokenizer.finish() == oracle.decode(b"", final=True)


@settings(deadline=None)
@given(text=st.text())
def test_no_broken_character_is_ever_given_out(tokenizer, id_of, text):
    detokenizer = IncrementalDetokenizer(tokenizer)
    given_out = ""
    for byte in text.encode():
        given_out += detokenizer.push([id_of[bytes([byte])]])
        assert text.startswith(given_out)
    assert given_out == text
    assert detokenizer.finish() == ""


def test_special_tokens_have_no_text_and_do_not_part_a_character(tokenizer, id_of):
    eot = tokenizer.special_tokens["<|eot|>"]
    first, second = "é".encode()
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([eot, id_of[bytes([first])], eot]) == ""
    assert detokenizer.push([eot, id_of[bytes([second])]]) == "é"


def test_a_sequence_that_ends_inside_a_character_ends_with_one_replacement(tokenizer, id_of):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([id_of[bytes([byte])] for byte in "a😀".encode()[:-1]]) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
