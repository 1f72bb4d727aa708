"""The handshake as two generators talking to each other, without sockets: right peers agree, wrong ones learn why."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.expert_frames import DTYPES, PROTOCOL_VERSION
from herd.cluster.handshake import (
    MAX_CALLS,
    MAX_MESSAGE_BYTES,
    PREFIX,
    Message,
    Terms,
    agreed,
    check_agreed,
    decode_body,
    decode_prefix,
    encode_message,
    engine_part,
    refusal,
    shard_part,
    terms_message,
)
from herd.cluster.row_slots import MAX_SLOT_BYTES
from herd.cluster.transport import HandshakeRefused

from .transport_ends import MODEL, SHARD, TOKEN, layout

TERMS = terms_message(layout(), 16, 4, "host", None)


def travelled(message: Message) -> Message:
    """The message as it arrives."""
    frame = encode_message(message)
    assert decode_prefix(frame[: PREFIX.size]) == len(frame) - PREFIX.size
    return decode_body(frame[PREFIX.size :])


def shake(
    engine: tuple[str, str, str] = (TOKEN, SHARD, MODEL),
    shard: tuple[str, str, str] = (TOKEN, SHARD, MODEL),
    terms: Message = TERMS,
    log: list[Message] | None = None,
) -> tuple[str, Terms]:
    """What both ends make of each other."""
    ours, theirs = engine_part(*engine), shard_part(*shard, layout())
    next(theirs)
    message = travelled(next(ours))
    while True:
        if log is not None:
            log.append(message)
        answer = travelled(theirs.send(message))
        if log is not None:
            log.append(answer)
        try:
            message = travelled(ours.send(answer))
        except StopIteration as end:
            device = end.value
            break
    with pytest.raises(StopIteration) as done:
        theirs.send(travelled(terms))
    return device, done.value.value


def reason(**peers: Any) -> str:
    with pytest.raises(HandshakeRefused) as refused:
        shake(**peers)
    return refused.value.reason


def test_right_peers_agree():
    device, terms = shake()
    assert device == "cpu"
    assert terms == Terms(8, DTYPES[torch.float32], 16, 4, "host")
    check_agreed(travelled(agreed()))


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_any_text_serves_as_token_shard_and_model(token, shard, model):
    peer = (token, shard, model)
    assert shake(peer, peer)[0] == "cpu"


@given(st.sampled_from([("token", 0), ("shard", 1), ("model", 2)]), st.text(min_size=1, max_size=9))
def test_a_wrong_token_shard_or_model_is_named(which, extra):
    name, index = which
    wrong = [TOKEN, SHARD, MODEL]
    wrong[index] += extra
    assert reason(engine=tuple(wrong)) == name


def test_the_token_does_not_travel_and_nothing_can_be_used_again():
    logs: list[list[Message]] = [[], []]
    for log in logs:
        shake(log=log)
    assert TOKEN not in repr(logs)
    secrets = [value for log in logs for message in log for value in message.values() if type(value) is bytes]
    assert len(secrets) == len(set(secrets)) == 8


def test_a_replayed_proof_is_refused():
    log: list[Message] = []
    shake(log=log)
    hello, _, claim, _ = log
    again = shard_part(TOKEN, SHARD, MODEL, layout())
    next(again)
    again.send(hello)
    with pytest.raises(HandshakeRefused) as refused:
        again.send(claim)
    assert refused.value.reason == "token"


def test_a_shard_without_the_token_cannot_send_back_the_engines_own_proof():
    engine = engine_part(TOKEN, SHARD, MODEL)
    hello = next(engine)
    claim = engine.send(hello)
    with pytest.raises(HandshakeRefused) as refused:
        engine.send({"proof": claim["proof"], "device": "cpu"})
    assert refused.value.reason == "token"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden": 16}, "layout"),
        ({"dtype": DTYPES[torch.bfloat16]}, "layout"),
        ({"max_calls": MAX_CALLS + 1}, "limits"),
        ({"max_calls": 0}, "limits"),
        ({"max_rows": 0}, "limits"),
        ({"max_rows": -1}, "limits"),
        ({"max_rows": MAX_SLOT_BYTES // 32 + 1}, "limits"),
        ({"max_rows": 2**63}, "limits"),
        ({"max_rows": "many"}, "garbage"),
        ({"max_rows": True}, "garbage"),
        ({"rows": "carrier pigeon"}, "garbage"),
        ({"rows": "cuda"}, "garbage"),
        ({"cuda": [1]}, "garbage"),
        ({"more": 1}, "garbage"),
    ],
)
def test_terms_have_bounds(change, expected):
    assert reason(terms=TERMS | change) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=31),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(["nonce", "proof", "shard", "model", "hidden", "max_rows", "refused", "device"]) | st.text()
messages = st.dictionaries(keys, values, max_size=6)


@given(st.integers(0, 2), messages)
def test_a_shard_refuses_any_other_message(step, message):
    shard = shard_part(TOKEN, SHARD, MODEL, layout())
    engine = engine_part(TOKEN, SHARD, MODEL)
    next(shard)
    good = next(engine)
    if step >= 1:
        good = engine.send(shard.send(good))
    if step >= 2:
        shard.send(good)
    with pytest.raises(HandshakeRefused):
        shard.send(message)


@given(st.integers(0, 1), messages)
def test_an_engine_refuses_any_other_answer(step, message):
    shard = shard_part(TOKEN, SHARD, MODEL, layout())
    engine = engine_part(TOKEN, SHARD, MODEL)
    next(shard)
    good = next(engine)
    if step:
        engine.send(shard.send(good))
    with pytest.raises(HandshakeRefused):
        engine.send(message)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message_are_refused(body):
    with suppress(HandshakeRefused):
        assert type(decode_body(body)) is dict


@given(st.binary(min_size=PREFIX.size, max_size=PREFIX.size))
def test_a_random_prefix_is_refused(prefix):
    with pytest.raises(HandshakeRefused):
        decode_prefix(prefix)


def test_another_version_is_named_and_a_long_message_refused():
    with pytest.raises(HandshakeRefused, match=f"version {PROTOCOL_VERSION + 1}") as refused:
        decode_prefix(encode_message({}, version=PROTOCOL_VERSION + 1)[: PREFIX.size])
    assert refused.value.reason == "version"
    magic = encode_message({})[:4]
    with pytest.raises(HandshakeRefused):
        decode_prefix(PREFIX.pack(magic, PROTOCOL_VERSION, MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("word", ["token", "full", "silent", "left", "failed"])
def test_a_refusal_carries_its_reason(word):
    with pytest.raises(HandshakeRefused, match="the shard") as refused:
        check_agreed(decode_body(refusal(word)[PREFIX.size :]))
    assert refused.value.reason == word


@pytest.mark.parametrize("word", ["some new reason", "x" * 4000, ["token"], None, 7, b"token"], ids=repr)
def test_a_reason_that_nobody_knows_is_garbage(word):
    for refuse in (check_agreed, engine_at_its_nonce().send, engine_at_its_proof().send):
        with pytest.raises(HandshakeRefused) as refused:
            refuse({"refused": word})
        assert refused.value.reason == "garbage"
        assert len(str(refused.value)) < 100


def test_an_engine_learns_why_it_is_refused_at_every_step():
    for refuse in (check_agreed, engine_at_its_nonce().send, engine_at_its_proof().send):
        with pytest.raises(HandshakeRefused) as refused:
            refuse({"refused": "model"})
        assert refused.value.reason == "model"


@pytest.mark.parametrize("word", ["token", "x" * 4000, "made up"])
def test_a_shard_is_not_told_reasons(word):
    """It would take words of whoever connects into its counters."""
    for steps in range(3):
        shard = shard_part(TOKEN, SHARD, MODEL, layout())
        engine = engine_part(TOKEN, SHARD, MODEL)
        next(shard)
        good = next(engine)
        if steps >= 1:
            good = engine.send(shard.send(good))
        if steps >= 2:
            shard.send(good)
        with pytest.raises(HandshakeRefused) as refused:
            shard.send({"refused": word})
        assert refused.value.reason == "garbage"


def engine_at_its_nonce() -> Generator[Message, Message, str]:
    engine = engine_part(TOKEN, SHARD, MODEL)
    next(engine)
    return engine


def engine_at_its_proof() -> Generator[Message, Message, str]:
    engine = engine_at_its_nonce()
    engine.send({"nonce": bytes(32)})
    return engine
