"""Frames survive any cut of the byte stream, and no bytes whatever lead to anything but messages or ProtocolError."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster import token_frames
from herd.cluster.token_frames import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abort,
    FrameReader,
    Hello,
    ProtocolError,
    Stats,
    Updates,
    encode_abort,
    encode_hello,
    encode_stats,
    encode_updates,
)

ints = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False)
ends = st.one_of(
    st.none(),
    st.fixed_dictionaries({"finish_reason": st.sampled_from(["stop", "length", "abort"]), "num_cached_tokens": ints}),
    st.fixed_dictionaries({"error": st.dictionaries(st.text(), st.one_of(st.none(), st.text(), ints))}),
)
logprob = st.tuples(floats, st.lists(ints, max_size=3), st.lists(floats, max_size=3)).map(list)


@st.composite
def update(draw):
    tokens = draw(st.lists(ints, max_size=4))
    logprobs = draw(st.one_of(st.none(), st.lists(logprob, min_size=len(tokens), max_size=len(tokens))))
    return [draw(ints), tokens, logprobs, draw(ends)]


messages = st.one_of(
    st.lists(update(), max_size=5).map(lambda u: (encode_updates(u), Updates(u))),
    st.lists(ints, max_size=5).map(lambda h: (encode_abort(h), Abort(h))),
    st.dictionaries(st.text(), st.one_of(ints, floats), max_size=4).map(lambda d: (encode_stats(d), Stats(d))),
    st.tuples(st.text(), st.text()).map(lambda p: (encode_hello(*p), Hello(PROTOCOL_VERSION, *p))),
)


def framed(payload: bytes | None) -> bytes:
    assert payload is not None
    return struct.pack("<I", len(payload)) + payload


@given(st.lists(messages, max_size=6), st.data())
def test_any_cut_of_the_stream_gives_the_same_messages(sent, data):
    stream = b"".join(frame for frame, _ in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader, got = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += reader.feed(stream[start:end])
    assert got == [message for _, message in sent]


@given(st.lists(messages, max_size=3), st.binary(max_size=200), st.booleans())
def test_garbage_is_a_protocol_error_after_the_good_messages(sent, garbage, in_frame):
    stream = b"".join(frame for frame, _ in sent) + (framed(garbage) if in_frame else garbage)
    got = []
    try:
        for message in FrameReader().feed(stream):
            got.append(message)
    except ProtocolError:
        pass
    assert got[: len(sent)] == [message for _, message in sent]


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), floats, st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=20,
)


@given(st.one_of(plain, st.lists(st.one_of(st.integers(-1, 4), plain), max_size=4)))
def test_any_msgpack_is_a_message_or_a_protocol_error(value):
    try:
        (message,) = FrameReader().feed(framed(msgpack.packb(value)))
    except ProtocolError:
        return
    assert isinstance(message, Hello | Updates | Abort | Stats)


@pytest.mark.parametrize(
    "value",
    [
        [],
        [1],
        [9, []],
        [1, [[1, [2], None]]],
        [1, [["1", [2], None, None]]],
        [1, [[1, ["2"], None, None]]],
        [1, [[1, [2], [], None]]],
        [1, [[1, [2], None, []]]],
        [2, [1.5]],
        [2, [True]],
        [3, []],
        [0, "1", "secret", "engine"],
        [0, 1, "secret"],
        {"kind": 1},
    ],
)
def test_wrong_shapes_are_refused(value):
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(framed(msgpack.packb(value))))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\x01",
        b"\x92\x01",
        b"\x92\x02\x90\x00",
        b"\x92\x03\x81\x91\x01\x01",
        b"\x92\x03\x81\x01\x01",
        b"\x92\x03\xc7\x0c\xff" + b"\xff" * 12,
        b"\x92\x03\xd6\xff\x00\x00\x00\x00",
        b"\x94\x00\x01\xa2\xff\xfe\xa1x",
    ],
)
def test_hostile_msgpack_is_a_protocol_error(payload):
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(framed(payload)))


def test_an_oversize_frame_is_refused_before_it_is_read():
    with pytest.raises(ProtocolError, match="limit"):
        list(FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES + 1)))
    with pytest.raises(ProtocolError, match="limit"):
        list(FrameReader(max_bytes=10).feed(encode_hello("secret", "engine")))


def test_a_limit_raised_between_messages_applies_to_the_next():
    reader = FrameReader(max_bytes=64)
    got = []
    for message in reader.feed(encode_hello("s", "e") + encode_abort(list(range(100)))):
        got.append(message)
        reader.max_bytes = MAX_FRAME_BYTES
    assert got == [Hello(PROTOCOL_VERSION, "s", "e"), Abort(list(range(100)))]


def test_updates_too_large_for_one_frame_become_several(monkeypatch):
    monkeypatch.setattr(token_frames, "MAX_FRAME_BYTES", 200)
    updates = [[handle, list(range(20)), None, None] for handle in range(20)]
    got = list(FrameReader(max_bytes=200).feed(encode_updates(updates)))
    assert len(got) > 1
    assert [u for message in got if isinstance(message, Updates) for u in message.updates] == updates
    with pytest.raises(ProtocolError):
        encode_updates([[1, list(range(1000)), None, None]])
