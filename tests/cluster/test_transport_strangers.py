"""Who gets in: peers without the token, of another model, shard or layout, that speak something else or nothing at all
are turned away, counted by reason, and leave nothing behind."""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import suppress

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.cluster import transport_server
from herd.cluster.handshake import (
    PREFIX,
    Message,
    decode_body,
    decode_prefix,
    encode_message,
    engine_part,
    terms_message,
)
from herd.cluster.transport import HandshakeRefused
from herd.cluster.transport_server import TransportServer

from .transport_ends import (
    DEADLINE_S,
    HIDDEN,
    MAX_CALLS,
    MAX_ROWS,
    MODEL,
    SHARD,
    TOKEN,
    bystander,
    join,
    layout,
    make_server,
    open_channel,
    shared_server,
    until,
    works,
)

__all__ = ["bystander", "shared_server"]

TERMS = terms_message(layout(), MAX_ROWS, MAX_CALLS, "host", None)


@pytest.fixture(params=["shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Stranger:
    """A socket to a server that says what the test wants."""

    def __init__(self, server: TransportServer, kind: str = "shm") -> None:
        host, port, path = server.address
        self.sock = socket.create_connection((host, port)) if kind == "tcp" else socket.socket(socket.AF_UNIX)
        if kind == "shm":
            self.sock.connect(path)
        self.sock.settimeout(DEADLINE_S)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # it may have been turned away already
            self.sock.sendall(data)

    def receive(self) -> Message:
        return decode_body(self.sock.recv(decode_prefix(self.sock.recv(PREFIX.size))))

    def prove(self) -> None:
        """Everything up to the terms."""
        part = engine_part(TOKEN, SHARD, MODEL)
        message = next(part)
        with suppress(StopIteration):
            while True:
                self.send(encode_message(message))
                message = part.send(self.receive())

    def is_closed(self) -> bool:
        """Wait for the end of the connection."""
        with suppress(ConnectionResetError):
            while self.sock.recv(4096):
                pass
        return True


def refused_since(server: TransportServer, before: Counter[str]) -> dict[str, int]:
    return dict(server.counters.refused - before)


@pytest.mark.parametrize("wrong", [{"token": "guess"}, {"shard_id": "shard-2"}, {"model": "another"}], ids=str)
def test_a_wrong_token_shard_or_model_is_refused_and_told(shared_server, kind, wrong):
    (name,) = wrong
    reason = name.removesuffix("_id")
    before = shared_server.counters.refused.copy()
    with pytest.raises(HandshakeRefused) as refused:
        open_channel(kind, shared_server, **wrong)
    assert refused.value.reason == reason
    assert refused_since(shared_server, before) == {reason: 1}
    assert shared_server.num_peers == 1


@pytest.mark.parametrize("rows", [layout(hidden=HIDDEN * 2), layout(torch.bfloat16)], ids=str)
def test_another_layout_is_refused(shared_server, kind, rows):
    with pytest.raises(HandshakeRefused) as refused:
        join(shared_server.address, kind, rows)
    assert refused.value.reason == "layout"


MAGIC = encode_message({})[:4]
NO_HANDSHAKES = {
    "http": b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n",
    "short nonce": encode_message({"nonce": b"short"}),
    "version": encode_message({"nonce": bytes(32)}, version=9),
    "no nonce, and more": encode_message({}) + bytes(5000),
    "no msgpack": PREFIX.pack(MAGIC, 1, 5) + b"\xc1\xc1\xc1\xc1\xc1",
    "too long": PREFIX.pack(MAGIC, 1, 60000),
    "zeros": bytes(100_000),
}


@pytest.mark.parametrize("data", NO_HANDSHAKES.values(), ids=list(NO_HANDSHAKES))
def test_bytes_instead_of_a_handshake_end_it(shared_server, kind, data):
    before = shared_server.counters.refused.copy()
    with Stranger(shared_server, kind) as stranger:
        stranger.send(data)
        assert stranger.is_closed()
    reason = "version" if data == NO_HANDSHAKES["version"] else "garbage"
    assert refused_since(shared_server, before) == {reason: 1}


def test_nobody_gets_a_word_into_the_counters(shared_server, kind):
    """A peer without the token that "refuses" the shard: with many different reasons, or one that is too long to be
    repeated to it."""
    before = shared_server.counters.refused.copy()
    reasons = [*(f"reason {number} {'x' * 2000}" for number in range(50)), "x" * 4000, b"\0" * 4000, ["x"], "token", 7]
    for reason in reasons:
        with Stranger(shared_server, kind) as stranger:
            stranger.send(encode_message({"refused": reason}))
            assert stranger.receive() == {"refused": "garbage"}
            assert stranger.is_closed()
    assert refused_since(shared_server, before) == {"garbage": len(reasons)}
    assert shared_server.alive


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyError("a defect")], ids=repr)
def test_a_failure_at_one_handshake_ends_that_one_only(shared_server, kind, error, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise error

    before = shared_server.counters.refused.copy()
    with monkeypatch.context() as patch:
        patch.setattr(shared_server, "_open_slots", fail)
        with pytest.raises(HandshakeRefused, match="failed at the handshake") as refused:
            open_channel(kind, shared_server)
    assert refused.value.reason == "failed"
    assert refused_since(shared_server, before) == {"failed": 1}
    assert "failed at a handshake" in caplog.text
    assert shared_server.alive
    channel = open_channel(kind, shared_server)
    works(channel)
    channel.close()


def test_random_handshakes_end_and_leave_nothing(shared_server, bystander):
    seen = shared_server.counters.refused.total()
    fds = psutil.Process().num_fds()

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=200), st.sampled_from([b"", MAGIC, encode_message({"nonce": bytes(32)})]))
    def send(data: bytes, start: bytes) -> None:
        nonlocal seen
        with Stranger(shared_server) as stranger:
            stranger.send(start + data)
            with suppress(OSError):
                stranger.sock.shutdown(socket.SHUT_WR)
            assert stranger.is_closed()
        seen += 1
        assert shared_server.counters.refused.total() == seen

    send()
    works(bystander)
    assert psutil.Process().num_fds() <= fds


@pytest.mark.parametrize("proven", [False, True])
def test_silent_peers_are_closed_in_time(kind, proven, monkeypatch):
    monkeypatch.setattr(transport_server, "GREETING_TIMEOUT_S", 0.1)
    server = make_server()
    server.start()
    with Stranger(server, kind) as silent, Stranger(server, kind) as other:
        if proven:
            silent.prove()
        assert silent.is_closed()
        assert other.is_closed()
    assert server.counters.refused == {"silent": 2}
    server.stop()


def test_only_so_many_may_stand_at_the_door(kind, monkeypatch):
    monkeypatch.setattr(transport_server, "MAX_GREETINGS", 3)
    server = make_server()
    server.start()
    crowd = [Stranger(server, kind) for _ in range(5)]
    assert crowd[0].is_closed()
    assert crowd[1].is_closed()
    channel = open_channel(kind, server)  # the oldest gave way once more
    works(channel)
    assert server.counters.refused == {"full": 3}
    for stranger in crowd:
        stranger.sock.close()
    channel.close()
    server.stop()


@pytest.mark.parametrize("rows", ["host", "cuda"])
def test_memory_that_did_not_come_is_refused(shared_server, kind, rows):
    before = shared_server.counters.refused.copy()
    with Stranger(shared_server, kind) as stranger:
        stranger.prove()
        stranger.send(encode_message(TERMS | {"rows": rows, "cuda": [1, "2"] if rows == "cuda" else None}))
        assert stranger.receive() == {"refused": "slots"}
        assert stranger.is_closed()
    assert refused_since(shared_server, before) == {"slots": 1}


def test_whoever_does_not_wait_for_the_end_is_refused(shared_server, kind):
    with Stranger(shared_server, kind) as stranger:
        stranger.prove()
        stranger.send(encode_message(TERMS | {"rows": "stream"}) + b"more")
        assert stranger.receive() == {"refused": "garbage"}
        assert stranger.is_closed()


def test_descriptors_that_nobody_asked_for_are_closed(shared_server):
    process = psutil.Process()
    with open(os.devnull) as file, Stranger(shared_server) as stranger:
        stranger.send(encode_message({"nonce": bytes(32)}))
        assert "nonce" in stranger.receive()
        fds = process.num_fds()
        claim = encode_message({})
        for byte in claim[:-1]:
            socket.send_fds(stranger.sock, [bytes([byte])], [file.fileno()] * 3)
        until(lambda: process.num_fds() == fds + 1)  # the last one is kept until the handshake ends
        stranger.send(claim[-1:])
        assert stranger.is_closed()
        until(lambda: process.num_fds() < fds)  # and the connection's own


def test_a_peer_that_leaves_in_the_middle_is_counted(shared_server, kind):
    before = shared_server.counters.refused.copy()
    with Stranger(shared_server, kind) as stranger:
        stranger.prove()
    until(lambda: refused_since(shared_server, before) == {"left": 1})
