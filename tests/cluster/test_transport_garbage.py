"""Peers that lie, stammer, lack the token or say nothing: each ends its own connection, is counted, and nobody else
notices. 10,000 frames of garbage in all."""

from __future__ import annotations

import itertools
import socket
from contextlib import suppress
from random import Random
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.cluster.errors import ProtocolError
from herd.cluster.expert_frames import DTYPES, HEADER_BYTES, Kind, encode_groups, encode_header
from herd.cluster.frame_channel import FrameChannel
from herd.cluster.frame_peer import FramePeer
from herd.cluster.handshake import Terms
from herd.cluster.host_slots import HostSlots
from herd.cluster.slot_channel import SlotChannel
from herd.cluster.tcp_channel import TcpChannel
from herd.cluster.transport import PeerLost, Request
from herd.cluster.transport_server import TransportServer

from .transport_ends import (
    DEADLINE_S,
    HIDDEN,
    MAX_CALLS,
    MAX_ROWS,
    bystander,
    call,
    layout,
    open_channel,
    shared_server,
    until,
    works,
)

__all__ = ["bystander", "shared_server"]

TO_PEERS, TO_CHANNELS, TO_SERVERS = 6000, 3000, 1000
BATCH = 20
"""Frames that one example of hypothesis sends."""
ROW_BYTES = layout().row_bytes


@pytest.fixture(params=["shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def frame(rows_in_stream: bool, kind: int = Kind.COMPUTE, **wrong: Any) -> bytes:
    """A good call of three rows, or reply to it, but for what is `wrong`; the checksum is right."""
    is_call = kind == Kind.COMPUTE
    pairs = wrong.pop("groups", [(0, 1), (2, 2)] if is_call else [])
    rows = bytes(3 * ROW_BYTES) if rows_in_stream and kind in (Kind.COMPUTE, Kind.RESULT) else b""
    body = wrong.pop("body", encode_groups(pairs) + rows)
    good: dict[str, Any] = {"dtype": DTYPES[torch.float32], "epoch": 1, "call_id": 5, "layer": 0, "rows": 3}
    good |= {"hidden": HIDDEN, "num_groups": len(pairs), "timeout_us": 10**6, "load": 0, "slot": 0}
    return encode_header(**good | {"kind": kind, "payload": len(body)} | wrong) + body


LYING = {
    "another kind": {"kind": Kind.RESULT},
    "no kind": {"kind": 77},
    "another dtype": {"dtype": 2},
    "another hidden size": {"hidden": HIDDEN + 1},
    "no rows": {"rows": 0, "groups": []},
    "no groups": {"groups": []},
    "too many rows": {"rows": MAX_ROWS + 1, "groups": [(0, MAX_ROWS + 1)]},
    "a huge number of rows": {"rows": 2**32 - 1, "groups": [(0, 2**32 - 1)], "payload": 2**40},
    "a group without rows": {"groups": [(0, 3), (1, 0)]},
    "groups that do not add up": {"groups": [(0, 1), (2, 3)]},
    "groups that overflow": {"groups": [(0, 2**32 - 1), (2, 4)]},
    "more groups than rows": {"groups": [(0, 1)] * 4},
    "a huge number of groups": {"num_groups": 2**32 - 1},
    "a short payload": {"payload": 4},
    "a huge payload": {"payload": 2**63},
    "no such slot": {"slot": MAX_CALLS},
    "another magic": {"magic": 1},
    "another version": {"version": 9},
}


@pytest.mark.parametrize("lie", LYING.values(), ids=list(LYING))
def test_a_lying_header_ends_the_connection(shared_server, kind, lie):
    before = shared_server.counters.protocol_errors
    assert outcome(shared_server, kind, frame(kind == "tcp", **lie)) == "closed"
    assert shared_server.counters.protocol_errors == before + 1


def test_the_same_frame_without_a_lie_is_answered(shared_server, kind):
    assert outcome(shared_server, kind, frame(kind == "tcp")) == "answered"
    assert outcome(shared_server, kind, frame(kind == "tcp", epoch=99)) == "answered"  # with STALE_MAP
    assert outcome(shared_server, kind, frame(kind == "tcp", groups=[(2**32 - 1, 3)], layer=2**32 - 1)) == "answered"


def test_a_slot_in_use_is_not_given_twice():
    """The server would compute two calls in the same memory."""
    peer, engine = a_peer("host")
    engine.send(frame(False, slot=1) + frame(False, slot=1))
    with pytest.raises(ProtocolError, match="slot"):
        peer.receive()


@pytest.mark.parametrize("rows", ["host", "stream"])
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_good_frames_arrive_however_the_stream_is_cut(rows, data):
    peer, engine = a_peer(rows)
    owner: Any = peer._owner
    sent = [torch.randn(3, HIDDEN) for _ in range(MAX_CALLS)]
    stream = b""
    for slot, rows_ND in enumerate(sent):
        body = encode_groups([(slot, 1), (9, 2)]) + (rows_ND.numpy().tobytes() if rows == "stream" else b"")
        stream += frame(rows == "stream", call_id=slot, slot=slot, num_groups=2, body=body)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=6, unique=True)))
    with engine:
        for start, end in itertools.pairwise([0, *cuts, len(stream)]):
            engine.sendall(stream[start:end])
            peer.receive()
    assert [(r.call_id, r.slot, r.groups) for r in owner.requests] == [
        (slot, slot, [(slot, 1), (9, 2)]) for slot in range(MAX_CALLS)
    ]
    if rows == "stream":
        assert all(torch.equal(r.rows_ND, rows_ND) for r, rows_ND in zip(owner.requests, sent, strict=True))
    peer.close()


def test_a_wrong_checksum_ends_the_connection(shared_server, kind):
    bad = bytearray(frame(kind == "tcp"))
    bad[HEADER_BYTES - 1] ^= 1
    assert outcome(shared_server, kind, bytes(bad)) == "closed"


def test_an_end_in_the_middle_of_a_frame_is_an_end(shared_server, kind):
    whole = frame(kind == "tcp")
    peers = shared_server.num_peers
    for cut in (1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, len(whole) - 1):
        channel = open_channel(kind, shared_server)
        channel._sock.sendall(whole[:cut])  # type: ignore[attr-defined]
        channel.close()
    until(lambda: shared_server.num_peers == peers)


def outcome(server: TransportServer, kind: str, data: bytes) -> str:
    """What the server does with these bytes after a handshake."""
    channel = open_channel(kind, server)
    sock: socket.socket = channel._sock  # type: ignore[attr-defined]
    sock.settimeout(DEADLINE_S)
    with suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    try:
        return "answered" if sock.recv(HEADER_BYTES) else "closed"
    except ConnectionResetError:
        return "closed"
    finally:
        channel.close()


# Ten thousand frames

SMALL = range(21)
HUGE = (2**31, 2**32 - 1)
LIES = {
    "kind": [*Kind, 0, 6, 255],
    "dtype": SMALL,
    "epoch": SMALL,
    "call_id": SMALL,
    "rows": [*SMALL, *HUGE],
    "hidden": [0, HIDDEN - 1, HIDDEN + 1, 2**32 - 1],
    "num_groups": [*SMALL, *HUGE],
    "payload": [*SMALL, *HUGE, 2**64 - 1],
    "slot": [*SMALL, *HUGE],
    "magic": SMALL,
    "version": SMALL,
}


def garbage(random: Random, is_call: bool, rows_in_stream: bool) -> bytes:
    """A frame that lies in some fields, or is flipped, cut, or random."""
    kind = Kind.COMPUTE if is_call else random.choice([Kind.RESULT, Kind.ERROR, Kind.BUSY])
    wrong: dict[str, Any] = {"kind": kind}
    match random.choice(["lie", "lie", "groups", "body", "flip", "cut", "random"]):
        case "lie":
            names = random.sample(sorted(LIES), random.randint(0, 3))
            return frame(rows_in_stream, **wrong | {name: random.choice(LIES[name]) for name in names})
        case "groups":
            pairs = [(random.randrange(9), random.choice([0, 1, 1, 2, 3, *HUGE])) for _ in range(random.randrange(5))]
            return frame(rows_in_stream, **wrong, groups=pairs)
        case "body":
            return frame(rows_in_stream, **wrong, body=random.randbytes(random.randrange(100)))
        case "random":
            return random.randbytes(random.randint(1, 200))
        case how:
            whole = bytearray(frame(rows_in_stream, **wrong))
            at = random.randrange(1, len(whole))
            if how == "cut":
                return bytes(whole[:at])
            whole[at] ^= 1 << random.randrange(8)
            return bytes(whole)


class Owner:
    """What a peer needs of a shared_server."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def accept(self, request: Request) -> None:
        self.requests.append(request)

    def release(self, request: Request) -> int:
        return 0

    def lost(self, peer: FramePeer, reason: str) -> None:
        pass

    def watch(self, peer: FramePeer) -> None:
        pass


def a_peer(rows: str) -> tuple[FramePeer, socket.socket]:
    """A server's end, and the socket of an engine that may send what it likes."""
    ours, theirs = socket.socketpair()
    terms = Terms(HIDDEN, DTYPES[torch.float32], MAX_ROWS, MAX_CALLS, rows)
    slots = HostSlots(layout(), MAX_ROWS, MAX_CALLS)
    return FramePeer(Owner(), ours, slots, layout(), terms, lambda: 0.0), theirs


@pytest.mark.parametrize("rows", ["host", "stream"])
@settings(max_examples=TO_PEERS // 2 // BATCH, deadline=None)
@given(st.integers(0, 2**64))
def test_whatever_an_engine_sends_becomes_sound_requests_or_an_end(rows, seed):
    random = Random(seed)
    for _ in range(BATCH):
        peer, engine = a_peer(rows)
        owner: Any = peer._owner
        sent = garbage(random, True, rows == "stream")
        cut = random.randint(0, len(sent))
        with engine, suppress(ProtocolError):
            for part in filter(None, (sent[:cut], sent[cut:])):
                engine.sendall(part)
                peer.receive()
        peer.close()
        for request in owner.requests:
            counts = [rows for _, rows in request.groups]
            assert all(counts)
            assert 1 <= sum(counts) == request.num_rows == len(request.rows_ND) <= MAX_ROWS
            assert 0 <= request.slot < MAX_CALLS
        assert len({request.slot for request in owner.requests}) == len(owner.requests)


@pytest.mark.parametrize("cls", [SlotChannel, TcpChannel])
@settings(max_examples=TO_CHANNELS // 2 // BATCH, deadline=None)
@given(st.integers(0, 2**64))
def test_whatever_a_shard_sends_becomes_a_reply_to_a_call_or_an_end(cls: type[FrameChannel], seed):
    random = Random(seed)
    for _ in range(BATCH):
        ours, shard = socket.socketpair()
        channel = cls(ours, HostSlots(layout(), MAX_ROWS, MAX_CALLS), layout(), MAX_ROWS, MAX_CALLS)
        channel.submit(call(5, torch.ones(3, HIDDEN)))
        replies = []
        with shard, suppress(PeerLost):
            shard.sendall(garbage(random, False, cls.rows_in_stream))
            replies += channel.poll()
        assert len(replies) <= 1
        for reply in replies:
            assert (reply.call_id, reply.num_rows) == (5, 3)
            assert reply.kind in (Kind.RESULT, Kind.STALE_MAP, Kind.BUSY, Kind.ERROR)
            if reply.kind == Kind.RESULT:
                channel.take(reply, torch.empty(3, HIDDEN), [(0, 3)])
        channel.close()


def test_garbage_over_real_connections_leaves_no_trace(shared_server, bystander):
    """And, between all of it, the bystander's calls are answered."""
    process = psutil.Process()
    seen = {"answered": 0, "closed": 0}

    @settings(max_examples=TO_SERVERS // BATCH, deadline=None)
    @given(st.integers(0, 2**64), st.sampled_from(["shm", "tcp"]))
    def send(seed: int, kind: str) -> None:
        random = Random(seed)
        for _ in range(BATCH):
            seen[outcome(shared_server, kind, garbage(random, True, kind == "tcp"))] += 1
        works(bystander)

    outcome(shared_server, "tcp", b"warm up")
    until(lambda: shared_server.num_peers == 1)
    fds, memory = process.num_fds(), process.memory_info().rss
    send()
    until(lambda: shared_server.num_peers == 1)
    assert seen["closed"] > TO_SERVERS // 2
    assert seen["answered"] > 0
    assert process.num_fds() <= fds
    assert process.memory_info().rss - memory < 64 << 20
