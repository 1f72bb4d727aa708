"""What every transport promises, as one suite run over each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.cluster import transport_connect
from herd.cluster.expert_frames import Kind
from herd.cluster.host_slots import HostSlots
from herd.cluster.slot_channel import SlotChannel
from herd.cluster.tcp_channel import TcpChannel
from herd.cluster.transport import Channel, HandshakeRefused, PeerLost

from .transport_ends import (
    HIDDEN,
    MAX_CALLS,
    MAX_ROWS,
    Process,
    Serve,
    call,
    collect,
    join,
    layout,
    open_channel,
    rows_of,
    serve,
    until_lost,
)

__all__ = ["serve"]

HOST = ("local", "shm", "tcp")
KILLABLE = ("shm", "tcp", pytest.param("cuda", marks=pytest.mark.gpu))
Open = Callable[..., Channel]


@pytest.fixture(params=[*HOST, pytest.param("cuda", marks=pytest.mark.gpu)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_(kind: str, serve: Serve) -> Iterator[Open]:
    """Channels to a shard that answers as `twice` does; on a GPU it must be another process."""
    channels: list[Channel] = []
    processes: list[Process] = []

    def start(dtype: torch.dtype = torch.float32) -> Channel:
        if kind == "cuda":
            processes.append(Process("server", "cuda", str(dtype)))
            channels.append(join(processes[-1].receive(), kind, layout(dtype, device="cuda")))
        else:
            channels.append(open_channel(kind, serve(rows=layout(dtype))))
        return channels[-1]

    yield start
    for channel in channels:
        channel.close()
    for process in processes:
        process.kill()


# Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_rows_of_any_ranges_come_back_computed_and_nothing_else_is_touched(open_, dtype, data):
    if not hasattr(open_, "channel"):  # one connection for all examples of this test
        open_.channel = open_(dtype)
    channel = open_.channel
    gaps_and_lengths = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=3))
    ranges, at = [], 0
    for gap, length in gaps_and_lengths:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    total = sum(end - start for start, end in ranges)
    cut = data.draw(st.integers(1, total))
    groups = [(3, cut)] + ([(5, total - cut)] if cut < total else [])
    rows_ND = rows_of(channel, at + 2, dtype)
    out_ND = torch.full_like(rows_ND, -1)
    channel.submit(call(1, rows_ND, groups, ranges=ranges))
    rows_ND_at_submit = rows_ND.clone()
    rows_ND.fill_(77)  # the rows were copied when submit returned
    (reply,) = collect(channel, 1)
    assert (reply.call_id, reply.kind, reply.num_rows) == (1, Kind.RESULT, total)
    channel.take(reply, out_ND, ranges)
    mine = torch.cat([torch.arange(start, end) for start, end in ranges])
    experts = torch.cat([torch.full((count, 1), expert) for expert, count in groups]).to(rows_ND)
    expected_ND = torch.full_like(rows_ND, -1)
    expected_ND[mine] = rows_ND_at_submit[mine].mul(2).add(experts)
    assert torch.equal(out_ND, expected_ND)


def test_every_call_in_flight_gets_its_own_rows(open_):
    channel = open_()
    for turn in range(3):  # taking frees: the same number of calls fits again
        sent = {}
        for number in range(MAX_CALLS):
            sent[number] = rows_of(channel, number + 1, seed=10 * turn + number)
            channel.submit(call(number, sent[number]))
        replies = collect(channel, MAX_CALLS)
        assert sorted(reply.call_id for reply in replies) == list(range(MAX_CALLS))
        for reply in replies:
            rows_ND = sent[reply.call_id]
            out_ND = torch.empty_like(rows_ND)
            channel.take(reply, out_ND, [(0, len(rows_ND))])
            assert torch.equal(out_ND, rows_ND * 2)


def test_dropping_frees_and_may_be_done_twice(open_):
    channel = open_()
    for _ in range(3):
        for number in range(MAX_CALLS):
            channel.submit(call(number, rows_of(channel, 2)))
        for reply in collect(channel, MAX_CALLS):
            channel.drop(reply)
            channel.drop(reply)


def test_the_largest_call_fits(open_):
    channel = open_()
    rows_ND = rows_of(channel, MAX_ROWS)
    channel.submit(call(1, rows_ND, [(expert, 1) for expert in range(MAX_ROWS)]))
    (reply,) = collect(channel, 1)
    out_ND = torch.empty_like(rows_ND)
    channel.take(reply, out_ND, [(0, MAX_ROWS)])
    assert torch.equal(out_ND, rows_ND * 2 + torch.arange(MAX_ROWS).to(rows_ND)[:, None])


def test_stale_maps_and_errors_come_back_and_hold_nothing(open_):
    channel = open_()
    for turn in range(MAX_CALLS + 1):
        channel.submit(call(2 * turn, rows_of(channel, 1), epoch=99))
        channel.submit(call(2 * turn + 1, rows_of(channel, 1), layer=7))
        stale, failed = sorted(collect(channel, 2), key=lambda reply: reply.call_id)
        assert (stale.kind, stale.message) == (Kind.STALE_MAP, "")
        assert (failed.kind, failed.message) == (Kind.ERROR, "layer sieben ist müde")


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": []},
        {"groups": [(0, 0), (1, 3)]},
        {"groups": [(0, 4)]},
        {"ranges": []},
        {"ranges": [(0, 1), (1, 1), (1, 3)]},
        {"ranges": [(0, 2)]},
        {"ranges": [(1, 4)]},
        {"ranges": [(-1, 2)]},
        {"rows_ND": torch.zeros(3, HIDDEN + 1)},
        {"rows_ND": torch.zeros(3, HIDDEN, dtype=torch.float64)},
        {"rows_ND": torch.zeros(HIDDEN, 3).t()},
    ],
    ids=str,
)
def test_a_callers_defect_is_stopped_before_anything_is_sent(open_, wrong):
    channel = open_()
    bad = call(1, rows_of(channel, 3), [(0, 3)])
    for name, value in wrong.items():
        setattr(bad, name, value)
    with pytest.raises(AssertionError):
        channel.submit(bad)
    channel.submit(call(2, rows_of(channel, 3)))
    (reply,) = collect(channel, 1)
    assert reply.call_id == 2


def test_too_large_and_too_many_calls_are_a_callers_defect(open_):
    channel = open_()
    with pytest.raises(AssertionError):
        channel.submit(call(0, rows_of(channel, MAX_ROWS + 1)))
    for number in range(channel.max_calls):
        channel.submit(call(number, rows_of(channel, 1)))
    with pytest.raises(AssertionError):
        channel.submit(call(9, rows_of(channel, 1)))


def test_a_result_is_taken_once_and_into_as_many_rows(open_):
    channel = open_()
    channel.submit(call(1, rows_of(channel, 2)))
    (reply,) = collect(channel, 1)
    out_ND = torch.empty_like(rows_of(channel, 4))
    for ranges in ([(0, 3)], [(0, 1)], [(3, 5)]):
        with pytest.raises(AssertionError):
            channel.take(reply, out_ND, ranges)
    channel.take(reply, out_ND, [(0, 2)])
    with pytest.raises(AssertionError):
        channel.take(reply, out_ND, [(0, 2)])


def test_closing_twice_is_harmless(open_):
    channel = open_()
    channel.close()
    channel.close()


# Ends


@pytest.mark.parametrize("kind", HOST)
def test_a_stopped_server_is_a_lost_peer(kind, serve):
    server = serve()
    channel = open_channel(kind, server)
    channel.submit(call(1, rows_of(channel, 1)))
    collect(channel, 1)
    server.stop()
    assert until_lost(channel)
    channel.close()
    if kind != "local":
        with pytest.raises(PeerLost):
            open_channel(kind, server)


@pytest.mark.parametrize("kind", KILLABLE)
def test_a_killed_shard_is_a_lost_peer_whose_answers_before_are_not_lost(kind):
    device = "cuda" if kind == "cuda" else "cpu"
    with Process("server", device, str(torch.float32)) as shard:
        channel = join(shard.receive(), kind, layout(device=device))
        rows_ND = rows_of(channel, 2)
        channel.submit(call(1, rows_ND))
        (reply,) = collect(channel, 1)
        shard.kill()
        assert until_lost(channel)
        out_ND = torch.empty_like(rows_ND)
        channel.take(reply, out_ND, [(0, 2)])
        assert torch.equal(out_ND, rows_ND * 2)
        channel.close()


# Choosing a transport


def test_shared_memory_on_the_same_node_else_tcp(serve):
    server = serve()
    with_memory, without = open_channel("shm", server), open_channel("tcp", server)
    assert isinstance(with_memory, SlotChannel)
    assert isinstance(without, TcpChannel)
    with_memory.close()
    without.close()


def test_a_node_without_shared_memory_uses_tcp(serve, monkeypatch):
    def no_memfd(*_: object) -> int:
        raise OSError("not here")

    monkeypatch.setattr("herd.cluster.transport_connect.create_memfd", no_memfd)
    channel = open_channel("shm", serve())
    assert isinstance(channel, TcpChannel)
    channel.close()


class Gpu:
    """Stands in for the GPU memory of both ends: counts what is created, and fails as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created = 0
        self.fails_at_create = self.fails_at_open = False
        monkeypatch.setattr("herd.cluster.transport_connect.CudaSlots.create", self._create)
        monkeypatch.setattr("herd.cluster.transport_server.CudaSlots.open", self._open)
        monkeypatch.setattr("herd.cluster.transport_connect._without_cuda", set())
        monkeypatch.setattr("herd.cluster.host_slots._cudart", lambda: self)

    def handle(self) -> list[int]:
        return [1]

    def cudaHostRegister(self, *_: object) -> int:
        return 0

    def cudaHostUnregister(self, *_: object) -> int:
        return 0

    def _create(self, *_: object) -> Gpu:
        self.created += 1
        if self.fails_at_create:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self

    def _open(self, *_: object) -> Gpu:
        if self.fails_at_open:
            raise HandshakeRefused("the GPU memory cannot be mapped", "slots")
        return self


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


ON_GPU = layout(device="cuda")


def slots_of(channel: Channel) -> object:
    channel.close()
    return channel._slots  # type: ignore[attr-defined]


def test_memory_of_a_gpu_where_both_ends_have_one(serve, gpu):
    server = serve(rows=ON_GPU)
    assert [slots_of(open_channel("cuda", server)) for _ in range(2)] == [gpu, gpu]
    assert gpu.created == 2


@pytest.mark.parametrize("where", ["create", "open"])
def test_memory_of_a_gpu_that_cannot_be_shared_is_not_tried_again(serve, gpu, where):
    """CUDA may keep what was offered for good."""
    setattr(gpu, f"fails_at_{where}", True)
    server = serve(rows=ON_GPU)
    for _ in range(3):
        assert isinstance(slots_of(open_channel("cuda", server)), HostSlots)
    assert gpu.created == 1
    setattr(gpu, f"fails_at_{where}", False)
    another = serve(rows=ON_GPU, shard_id="shard-2")
    assert slots_of(open_channel("cuda", another, shard_id="shard-2")) is gpu
    assert gpu.created == 2


def test_a_shard_that_goes_with_the_memory_of_a_gpu_in_its_hands_is_not_given_more(serve, gpu, monkeypatch):
    server = serve(rows=ON_GPU)
    with monkeypatch.context() as patch:
        patch.setattr("herd.cluster.greeting_peer.agreed", lambda: {"agreed": "not quite"})
        with pytest.raises(PeerLost):
            open_channel("cuda", server)
    assert isinstance(slots_of(open_channel("cuda", server)), HostSlots)
    assert gpu.created == 1


def test_only_so_many_shards_are_remembered(serve, gpu, monkeypatch):
    monkeypatch.setattr("herd.cluster.transport_connect._MAX_REMEMBERED", 2)
    gpu.fails_at_open = True
    for number in range(5):
        name = f"shard-{number}"
        slots_of(open_channel("cuda", serve(rows=ON_GPU, shard_id=name), shard_id=name))
        assert len(transport_connect._without_cuda) <= 2


def test_nobody_there_is_a_lost_peer():
    with pytest.raises(PeerLost):
        join(("127.0.0.1", 1, ""), "tcp")


def test_calls_that_could_never_be_queued_are_refused_when_connecting(serve):
    with pytest.raises(HandshakeRefused) as refused:
        open_channel("shm", serve(max_queued_rows=MAX_ROWS - 1))
    assert refused.value.reason == "limits"
