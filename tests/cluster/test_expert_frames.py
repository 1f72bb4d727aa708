"""Headers and groups: what goes in comes out; nothing else gets in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.errors import ProtocolError
from herd.cluster.expert_frames import (
    GROUP_BYTES,
    HEADER_BYTES,
    MAGIC,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Kind,
    decode_groups,
    decode_header,
    decode_message,
    encode_groups,
    encode_header,
    encode_message,
)

U8, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
WIDTHS = {
    "kind": U8,
    "dtype": U8,
    "epoch": U64,
    "call_id": U64,
    "layer": U32,
    "rows": U32,
    "hidden": U32,
    "num_groups": U32,
    "timeout_us": U32,
    "load": U32,
    "payload": U64,
    "slot": U32,
}
fields = st.fixed_dictionaries(WIDTHS)
SOME = dict.fromkeys(WIDTHS, 1)
groups = st.lists(st.tuples(U32, st.integers(1, 1000)), min_size=1, max_size=40)


@given(fields, st.integers(0, 5))
def test_a_header_comes_back_from_any_offset(values, offset):
    frame = encode_header(**values)
    assert len(frame) == HEADER_BYTES
    header = decode_header(memoryview(bytes(offset) + frame + b"more"), offset)
    assert {name: getattr(header, name) for name in values} == values
    assert (header.magic, header.version) == (MAGIC, PROTOCOL_VERSION)


@given(fields, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(values, bit):
    frame = bytearray(encode_header(**values))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode_header(memoryview(frame))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_no_header(frame):
    with pytest.raises(ProtocolError):
        decode_header(memoryview(frame))


@pytest.mark.parametrize("wrong", [{"magic": MAGIC + 1}, {"version": PROTOCOL_VERSION + 1}])
def test_a_right_checksum_does_not_excuse_another_magic_or_version(wrong):
    with pytest.raises(ProtocolError, match="version"):
        decode_header(memoryview(encode_header(**SOME, **wrong)))


@given(groups)
def test_groups_come_back(pairs):
    frame = encode_groups(pairs)
    assert len(frame) == len(pairs) * GROUP_BYTES
    assert decode_groups(memoryview(frame), sum(rows for _, rows in pairs)) == pairs


@given(groups, st.integers(-3, 3).filter(bool))
def test_groups_of_more_or_fewer_rows_than_the_call_are_refused(pairs, off):
    with pytest.raises(ProtocolError, match="rows"):
        decode_groups(memoryview(encode_groups(pairs)), sum(rows for _, rows in pairs) + off)


@given(groups, st.data())
def test_an_empty_group_is_refused(pairs, data):
    at = data.draw(st.integers(0, len(pairs)))
    frame = encode_groups([*pairs[:at], (3, 0), *pairs[at:]])
    with pytest.raises(ProtocolError, match="without rows"):
        decode_groups(memoryview(frame), sum(rows for _, rows in pairs))


@given(st.text(max_size=3000))
def test_a_message_comes_back_and_a_long_one_loses_its_end(text):
    frame = encode_message(text)
    assert len(frame) <= MAX_MESSAGE_BYTES
    came = decode_message(memoryview(frame))
    if len(text.encode("utf-8", "replace")) <= MAX_MESSAGE_BYTES:
        assert came == text
    else:
        assert text.startswith(came.rstrip("\N{REPLACEMENT CHARACTER}"))


@given(st.binary(max_size=200))
def test_no_message_is_too_bad_to_read(frame):
    assert isinstance(decode_message(memoryview(frame)), str)


def test_kinds_keep_their_numbers():
    """Engines and shards of one protocol version may be of different releases."""
    assert {kind.name: int(kind) for kind in Kind} == {
        "COMPUTE": 1,
        "RESULT": 2,
        "STALE_MAP": 3,
        "BUSY": 4,
        "ERROR": 5,
    }
