"""What a shard's handler and its operator see of the transport, over each kind of connection in this process."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from herd.cluster.expert_frames import Kind
from herd.cluster.host_slots import HostSlots
from herd.cluster.transport import Request

from .transport_ends import (
    HIDDEN,
    MAX_CALLS,
    MAX_ROWS,
    Gate,
    Process,
    call,
    collect,
    open_channel,
    rows_of,
    serve,
    twice,
    until,
    until_lost,
)

__all__ = ["serve"]


@pytest.fixture(params=["local", "shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_the_handler_gets(kind, serve):
    seen: list[Request] = []

    def handler(waiting: deque[Request]) -> None:
        seen.append(waiting.popleft())
        seen[-1].reply(Kind.RESULT)

    channel = open_channel(kind, serve(handler, clock=lambda: 100.0))
    rows_ND = rows_of(channel, 5)
    channel.submit(call(2**63, rows_ND, [(3, 2), (9, 3)], epoch=2**40, layer=17, timeout_s=2.5))
    collect(channel, 1)
    (request,) = seen
    assert (request.call_id, request.epoch, request.layer, request.deadline_s) == (2**63, 2**40, 17, 102.5)
    assert request.groups == [(3, 2), (9, 3)]
    assert torch.equal(request.rows_ND, rows_ND)
    channel.close()


@pytest.mark.parametrize(("timeout_s", "seconds"), [(-1.0, 0.0), (1e9, (2**32 - 1) / 1e6)])
def test_timeouts_have_bounds(kind, serve, timeout_s, seconds):
    seen: list[float] = []

    def handler(waiting: deque[Request]) -> None:
        seen.append(waiting[0].deadline_s)
        waiting.popleft().reply(Kind.RESULT)

    channel = open_channel(kind, serve(handler, clock=lambda: 0.0))
    channel.submit(call(1, rows_of(channel, 1), timeout_s=timeout_s))
    collect(channel, 1)
    assert seen == [pytest.approx(seconds)]
    channel.close()


def test_replies_may_come_in_another_order(kind, serve):
    def last_first(waiting: deque[Request]) -> None:
        if len(waiting) == MAX_CALLS or gate.offered[0] != [0]:
            twice(deque([waiting.pop()]))
        else:
            waiting[-1].rows_ND.mul_(2)
            waiting.pop().reply(Kind.RESULT)

    gate = Gate(last_first)
    server = serve(gate)
    channel = open_channel(kind, server)
    sent = [rows_of(channel, 3, seed=number) for number in range(MAX_CALLS)]
    channel.submit(call(0, sent[0]))
    until(lambda: gate.offered)
    for number in range(1, MAX_CALLS):
        channel.submit(call(number, sent[number]))
    gate.open(MAX_CALLS)
    replies = collect(channel, MAX_CALLS)
    assert [reply.call_id for reply in replies] == [0, 3, 2, 1]
    for reply in replies:
        out_ND = torch.empty(3, HIDDEN)
        channel.take(reply, out_ND, [(0, 3)])
        assert torch.equal(out_ND, sent[reply.call_id] * 2)
    channel.close()


def test_calls_that_come_while_the_handler_works_are_seen_together(kind, serve):
    gate = Gate()
    server = serve(gate)
    first, second = open_channel(kind, server), open_channel(kind, server)
    first.submit(call(0, rows_of(first, 1)))
    until(lambda: gate.offered)
    first.submit(call(1, rows_of(first, 1)))
    second.submit(call(2, rows_of(second, 1)))
    first.submit(call(3, rows_of(first, 1)))
    gate.open(2)
    collect(first, 3)
    collect(second, 1)
    assert gate.offered[0] == [0]
    assert sorted(gate.offered[1]) == [1, 2, 3]
    first.close()
    second.close()


def test_rows_beyond_the_queue_are_refused_at_once(kind, serve):
    gate = Gate()
    server = serve(gate, max_queued_rows=MAX_ROWS + 4)
    channel = open_channel(kind, server)
    channel.submit(call(0, rows_of(channel, 1)))
    until(lambda: gate.offered)
    for number, count in enumerate((MAX_ROWS, 5, 4), 1):
        channel.submit(call(number, rows_of(channel, count)))
    gate.open()
    first = [(reply.call_id, reply.kind) for reply in collect(channel, 2)]
    assert first == [(0, Kind.RESULT), (2, Kind.BUSY)]
    gate.open()
    then = [(reply.call_id, reply.kind) for reply in collect(channel, 2)]
    assert then == [(1, Kind.RESULT), (3, Kind.RESULT)]
    assert (server.counters.requests, server.counters.busy) == (4, 1)
    assert server.counters.rows == MAX_ROWS + 10
    channel.close()


def test_the_load_is_what_others_wait_for(kind, serve):
    gate = Gate(lambda waiting: twice(deque([waiting.popleft()])))
    server = serve(gate)
    engines = [open_channel(kind, server), open_channel(kind, server)]
    engines[0].submit(call(9, rows_of(engines[0], 1)))
    until(lambda: gate.offered)
    counts = {0: 3, 2: 2, 1: 4, 3: 1}  # even ones are of the first engine
    for number, count in counts.items():
        engines[number % 2].submit(call(number, rows_of(engines[number % 2], count)))
    gate.open(5)
    replies = {reply.call_id: reply for reply in [*collect(engines[0], 3), *collect(engines[1], 2)]}
    order = [calls[0] for calls in gate.offered[1:]]
    assert sorted(order) == [0, 1, 2, 3]
    for at, number in enumerate(order):
        others = [counts[other] for other in order[at + 1 :] if other % 2 != number % 2]
        assert replies[number].load == sum(others)
    for engine in engines:
        engine.close()


def test_a_failing_handler_ends_its_requests_and_not_the_server(kind, serve):
    def fail_once(waiting: deque[Request]) -> None:
        if server.counters.handler_errors == 0:
            waiting.popleft()
            raise RuntimeError("out of luck")
        twice(waiting)

    server = serve(fail_once)
    channel = open_channel(kind, server)
    channel.submit(call(1, rows_of(channel, 1)))
    (reply,) = collect(channel, 1)
    assert (reply.kind, reply.message) == (Kind.ERROR, "the shard failed: out of luck")
    channel.submit(call(2, rows_of(channel, 1)))
    assert collect(channel, 1)[0].kind == Kind.RESULT
    channel.close()


def test_a_result_that_the_device_does_not_give_is_an_error(kind, serve, monkeypatch):
    """A GPU's errors show when its work is waited for, which is in `publish`."""
    failed: list[int] = []

    def publish(self: HostSlots, slot: int, rows_ND: torch.Tensor) -> None:
        if not failed:
            failed.append(slot)
            raise RuntimeError("device-side assert")

    monkeypatch.setattr(HostSlots, "publish", publish)
    server = serve()
    channel = open_channel(kind, server)
    channel.submit(call(1, rows_of(channel, 2)))
    (reply,) = collect(channel, 1)
    assert (reply.kind, reply.message) == (Kind.ERROR, "the shard failed: device-side assert")
    assert server.counters.handler_errors == 1
    assert server._queued_rows == 0
    for number in range(2, MAX_CALLS + 3):  # every slot, also the one of the failure
        channel.submit(call(number, rows_of(channel, 2)))
        (reply,) = collect(channel, 1)
        assert reply.kind == Kind.RESULT
        channel.drop(reply)
    channel.close()


def test_a_request_that_cannot_be_taken_in_ends_its_peer_only(kind, serve, monkeypatch, caplog):
    server = serve()
    stays, goes = open_channel(kind, server), open_channel(kind, server)
    with monkeypatch.context() as patch:
        patch.setattr(HostSlots, "rows", _out_of_memory)
        goes.submit(call(1, rows_of(goes, 1)))
        assert until_lost(goes)
    until(lambda: server.num_peers == 1)
    assert server.alive
    assert (server.counters.peer_failures, server.counters.protocol_errors) == (1, 0)
    assert "CUDA out of memory" in caplog.text
    assert server._queued_rows == 0
    again = open_channel(kind, server)
    for channel in (stays, again):
        channel.submit(call(2, rows_of(channel, 1)))
        assert collect(channel, 1)[0].kind == Kind.RESULT
    for channel in (stays, goes, again):
        channel.close()


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_how_long_the_handler_has_been_at_it_shows_from_outside(kind, serve):
    now = [50.0]
    gate = Gate()
    server = serve(gate, clock=lambda: now[0])
    assert server.stuck_for_s == 0.0
    channel = open_channel(kind, server)
    channel.submit(call(1, rows_of(channel, 1)))
    until(lambda: gate.offered)
    now[0] = 57.0
    assert server.stuck_for_s == 7.0
    gate.open()
    collect(channel, 1)
    until(lambda: server.stuck_for_s == 0.0)
    channel.close()


def test_a_closed_engine_takes_its_waiting_requests_along(kind, serve):
    gate = Gate()
    server = serve(gate, max_queued_rows=2 * MAX_ROWS)
    stays, goes = open_channel(kind, server), open_channel(kind, server)
    stays.submit(call(0, rows_of(stays, 1)))
    until(lambda: gate.offered)
    goes.submit(call(1, rows_of(goes, MAX_ROWS)))
    stays.submit(call(2, rows_of(stays, 1)))
    gate.open()
    collect(stays, 1)
    until(lambda: len(gate.offered) == 2)
    goes.close()
    gate.open(2)
    collect(stays, 1)
    until(lambda: server.num_peers == 1)
    assert server._queued_rows == 0
    stays.submit(call(3, rows_of(stays, MAX_ROWS)))
    assert collect(stays, 1)[0].kind == Kind.RESULT
    stays.close()
    until(lambda: server.num_peers == 0)


def test_requests_of_a_gone_engine_are_not_offered(kind, serve):
    gate = Gate(lambda waiting: twice(deque([waiting.popleft()])))
    server = serve(gate)
    stays, goes = open_channel(kind, server), open_channel(kind, server)
    stays.submit(call(0, rows_of(stays, 1)))
    until(lambda: gate.offered)
    goes.submit(call(1, rows_of(goes, 1)))
    goes.submit(call(2, rows_of(goes, 1)))
    gate.open()
    until(lambda: len(gate.offered) == 2)
    goes.close()
    gate.open()
    until(lambda: server.num_peers == 1)
    stays.submit(call(3, rows_of(stays, 1)))
    gate.open(2)
    assert [reply.call_id for reply in collect(stays, 2)] == [0, 3]
    assert gate.offered == [[0], [1, 2], [3]]
    assert server.counters.abandoned == 1
    assert server._queued_rows == 0
    stays.close()


def test_an_answer_to_a_gone_engine_is_dropped_even_if_the_handler_kept_the_request(kind, serve):
    kept: list[Request] = []

    def keep_first(waiting: deque[Request]) -> None:
        if not kept:
            kept.append(waiting.popleft())
        else:
            twice(waiting)

    server = serve(keep_first)
    goes = open_channel(kind, server)
    goes.submit(call(1, rows_of(goes, 1)))
    until(lambda: kept)
    goes.close()
    until(lambda: server.num_peers == 0)
    kept[0].reply(Kind.RESULT)
    assert server._queued_rows == 0


@pytest.mark.parametrize("kind", ["shm", "tcp"], indirect=True)
def test_a_killed_engine_leaves_nothing_behind(kind, serve):
    gate = Gate(lambda waiting: twice(deque([waiting.popleft()])))
    server = serve(gate)
    with Process("engine", server.address, kind) as engine:
        assert engine.receive() == "submitted"
        until(lambda: gate.offered)
        engine.kill()
    gate.open(MAX_CALLS)
    until(lambda: server.num_peers == 0)
    assert (server._queued_rows, len(server._waiting)) == (0, 0)
    other = open_channel(kind, server)
    other.submit(call(1, rows_of(other, 1)))
    gate.open()
    assert collect(other, 1)[0].kind == Kind.RESULT
    other.close()
