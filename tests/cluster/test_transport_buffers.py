"""What the transport holds: calls larger than any socket buffer, engines and shards that do not read, and nothing left
when a connection ends."""

from __future__ import annotations

import os
import socket
from collections import deque

import psutil
import pytest
import torch

from herd.cluster.expert_frames import Kind
from herd.cluster.host_slots import create_memfd, open_memfd
from herd.cluster.row_slots import MAX_SLOT_BYTES, MAX_TOTAL_BYTES
from herd.cluster.transport import HandshakeRefused

from .transport_ends import Gate, call, collect, layout, make_server, open_channel, rows_of, serve, twice, until

__all__ = ["serve"]

WIDE = layout(hidden=5120)
ROWS = 256
NUM = 4
"""Calls in flight, of 5 MiB each: more than both ends' socket buffers take."""


@pytest.fixture(params=["local", "shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def wide_server(serve, handler=twice):
    return serve(handler, rows=WIDE, max_queued_rows=4 * NUM * ROWS)


def test_calls_larger_than_the_sockets_do_not_block_while_the_shard_computes(kind, serve):
    gate = Gate()
    server = wide_server(serve, gate)
    channel = open_channel(kind, server, max_rows=ROWS)
    channel.submit(call(0, torch.ones(1, 5120)))
    until(lambda: gate.offered)
    sent = [torch.randn(ROWS, 5120) for _ in range(NUM - 1)]
    for number, rows_ND in enumerate(sent, 1):
        channel.submit(call(number, rows_ND))
    assert channel.wants_write() == (kind == "tcp")
    kept = [rows_ND.clone() for rows_ND in sent]
    for rows_ND in sent:
        rows_ND.zero_()  # what the socket did not take was copied
    gate.open(NUM)
    replies = collect(channel, NUM)
    assert not channel.wants_write()
    for reply in replies[1:]:
        out_ND = torch.empty(ROWS, 5120)
        channel.take(reply, out_ND, [(0, ROWS)])
        assert torch.equal(out_ND, kept[reply.call_id - 1] * 2)
    channel.close()


def test_an_engine_that_does_not_read_keeps_nobody_waiting(kind, serve):
    server = wide_server(serve)
    slow, quick = (open_channel(kind, server, max_rows=ROWS) for _ in range(2))
    rows_ND = torch.randn(ROWS, 5120)
    for number in range(NUM):
        slow.submit(call(number, rows_ND))
        while slow.wants_write():
            slow.flush()
    for number in range(20):
        quick.submit(call(number, rows_ND[:1]))
        (reply,) = collect(quick, 1)
        quick.drop(reply)
    until(lambda: server.counters.requests == NUM + 20)
    for reply in collect(slow, NUM):
        out_ND = torch.empty(ROWS, 5120)
        slow.take(reply, out_ND, [(0, ROWS)])
        assert torch.equal(out_ND, rows_ND * 2)
    slow.close()
    quick.close()


def test_many_rounds_of_wide_calls_in_flight(kind, serve):
    server = wide_server(serve)
    channel = open_channel(kind, server, max_rows=ROWS)
    rows_ND = torch.arange(ROWS * 5120, dtype=torch.float32).view(ROWS, 5120)
    out_ND = torch.empty_like(rows_ND)
    for turn in range(5):
        for number in range(NUM):
            channel.submit(call(number, rows_ND, ranges=[(0, ROWS - number)], groups=[(turn, ROWS - number)]))
        for reply in collect(channel, NUM):
            count = ROWS - reply.call_id
            channel.take(reply, out_ND, [(0, count)])
            assert torch.equal(out_ND[:count], rows_ND[:count] * 2 + turn)
    channel.close()


def test_connections_leave_no_descriptors_and_no_memory(kind, serve):
    server = wide_server(serve)
    process = psutil.Process()

    def live(count: int) -> None:
        for _ in range(count):
            channel = open_channel(kind, server, max_rows=ROWS)
            channel.submit(call(1, torch.ones(ROWS, 5120)))
            collect(channel, 1)
            channel.close()
        del channel
        until(lambda: server.num_peers == 0)

    live(3)
    fds, memory = process.num_fds(), process.memory_info().rss
    live(30)
    assert process.num_fds() <= fds
    assert process.memory_info().rss - memory < 20 << 20  # one connection used 5 MiB or more


def test_a_stopped_server_leaves_no_descriptors_and_no_files():
    before = psutil.Process().num_fds()
    server = make_server()
    _, _, path = server.start()
    assert os.path.exists(path)
    channel = open_channel("shm", server)
    server.stop()
    server.stop()
    channel.close()
    del channel
    assert not os.path.exists(os.path.dirname(path))
    assert psutil.Process().num_fds() == before


def test_the_memory_of_all_engines_together_is_bounded(serve):
    server = serve(rows=WIDE, max_queued_rows=1 << 20)
    max_rows = MAX_SLOT_BYTES // WIDE.row_bytes
    channels = [open_channel("tcp", server, max_rows=max_rows, max_calls=8) for _ in range(2)]
    assert 2 * 8 * max_rows * WIDE.row_bytes <= MAX_TOTAL_BYTES
    with pytest.raises(HandshakeRefused, match="no room") as refused:
        open_channel("tcp", server, max_rows=max_rows, max_calls=8)
    assert refused.value.reason == "full"
    channels.pop().close()
    until(lambda: server.num_peers == 1)
    channels.append(open_channel("tcp", server, max_rows=max_rows, max_calls=8))
    for channel in channels:
        channel.close()


def test_a_memfd_is_used_only_if_nobody_can_resize_it():
    rows = layout()
    good = create_memfd(rows, 16, 4)
    slots = open_memfd(good, rows, 16, 4)
    slots.rows(3, 16).fill_(5)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(good, 0)
    assert slots.rows(3, 16).sum() == 5 * 16 * 8
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, os.fstat(good).st_size)
    ends = socket.socketpair()
    for fd, calls in ((good, 5), (good, 3), (unsealed, 4), (ends[0].fileno(), 4), (-1, 4)):
        with pytest.raises(HandshakeRefused) as refused:
            open_memfd(fd, rows, 16, calls)
        assert refused.value.reason == "slots"
    for fd in (good, unsealed):
        os.close(fd)
    for end in ends:
        end.close()


def test_an_engine_that_never_reads_its_doorbells_loses_no_answer(serve):
    """Replies that the socket does not take wait in the server, in order."""
    server = serve(max_queued_rows=4096, handler=lambda waiting: _stale(waiting))
    channel = open_channel("shm", server, max_calls=1024, max_rows=1)
    rows_ND = rows_of(channel, 1)
    for number in range(1024):
        channel.submit(call(number, rows_ND))
        while channel.wants_write():
            channel.flush()
    until(lambda: server.counters.requests == 1024)
    replies = collect(channel, 1024)
    assert [reply.call_id for reply in replies] == list(range(1024))
    assert {reply.kind for reply in replies} == {Kind.STALE_MAP}
    channel.close()


def _stale(waiting: deque) -> None:
    while waiting:
        waiting.popleft().reply(Kind.STALE_MAP)
