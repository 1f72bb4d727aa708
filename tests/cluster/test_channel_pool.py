"""Channels to the shards of a map come, are tried again, and go with it, whatever connecting runs into."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from herd.cluster.channel_pool import ChannelPool
from herd.cluster.expert_map import ExpertMap, ShardEndpoint
from herd.cluster.transport import Channel, HandshakeRefused, PeerLost

from .transport_ends import DEADLINE_S, until

BACKOFF_S = [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
UNEXPECTED = [RuntimeError("CUDA out of memory"), KeyError("a defect"), OSError("no more files")]


class FakeChannel:
    """Remembers that it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


class World:
    """A pool whose shards refuse as the test says, on a clock that stands still unless the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.tried: list[str] = []
        self.channels: list[tuple[str, FakeChannel]] = []
        self.failed: list[tuple[str, str]] = []
        self.errors: dict[str, Exception] = {}
        """What connecting to a shard raises."""
        self.on_connect: Callable[[], object] = lambda: None
        self.on_channel: Callable[[], object] = lambda: None
        self.on_failed: Callable[[], object] = lambda: None
        self._num_marks = 0
        self.pool = ChannelPool(
            self._connect, on_channel=self._take_channel, on_failed=self._take_failure, clock=lambda: self.now
        )

    def publish(self, *names: str) -> None:
        """A map of these shards."""
        shards = {name: ShardEndpoint(name, slot, "node", "host", 1, "") for slot, name in enumerate(names)}
        self.pool.update(ExpertMap(1, "model", "token", shards, dict.fromkeys(names, ())))
        self.settle()

    def advance(self, now: float) -> None:
        self.now = now
        self.settle()

    def settle(self) -> None:
        """Wait until the pool has tried all that is due: each turn of it reports, then tries one."""
        for _ in range(4):
            self._num_marks += 1
            mark = (f"mark {self._num_marks}", "")
            self.pool.lost(*mark)
            until(lambda mark=mark: mark in self.failed)
        self.failed = [failure for failure in self.failed if not failure[0].startswith("mark")]

    def _connect(self, endpoint: ShardEndpoint, map_: ExpertMap) -> Channel:
        assert map_.shards[endpoint.shard_id] == endpoint
        self.tried.append(endpoint.shard_id)
        self.on_connect()
        if error := self.errors.get(endpoint.shard_id):
            raise error
        channel: Any = FakeChannel()
        return channel

    def _take_channel(self, shard_id: str, channel: Any) -> None:
        self.channels.append((shard_id, channel))
        self.on_channel()

    def _take_failure(self, shard_id: str, reason: str) -> None:
        self.failed.append((shard_id, reason))
        if not shard_id.startswith("mark"):
            self.on_failed()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    assert world.pool._thread.is_alive()
    world.pool.close()
    assert not world.pool._thread.is_alive()


def test_every_shard_of_the_map_gets_one_channel(world: World):
    world.publish("a", "b", "c")
    world.publish("a", "b", "c")
    assert sorted(name for name, _ in world.channels) == sorted(world.tried) == ["a", "b", "c"]
    assert not any(channel.closed for _, channel in world.channels)
    assert world.failed == []


@pytest.mark.parametrize(
    "error", [PeerLost("gone"), HandshakeRefused("another token", "token"), *UNEXPECTED], ids=lambda error: repr(error)
)
def test_a_shard_out_of_reach_is_tried_ever_less_often_and_others_at_once(world: World, error: Exception, caplog):
    world.errors["a"] = error
    world.publish("a")
    for tries, delay_s in enumerate(BACKOFF_S, 1):
        at = world.now
        world.advance(at + delay_s - 0.001)
        assert world.tried == ["a"] * tries
        world.advance(at + delay_s)
        assert world.tried == ["a"] * (tries + 1)
    assert world.failed == [("a", str(error))] * len(world.tried)
    assert ("Traceback" in caplog.text) == (error in UNEXPECTED)
    world.publish("a", "b")
    assert [name for name, _ in world.channels] == ["b"]
    world.errors.clear()
    world.advance(world.now + 1.0)
    assert [name for name, _ in world.channels] == ["b", "a"]


def test_the_first_retry_after_a_connection_comes_soon_again(world: World):
    world.errors["a"] = PeerLost("gone")
    world.publish("a")
    for delay_s in BACKOFF_S:
        world.advance(world.now + delay_s)
    world.errors.clear()
    world.advance(world.now + 1.0)
    assert len(world.channels) == 1
    world.pool.lost("a", "reset")
    world.advance(world.now + BACKOFF_S[0])
    assert len(world.channels) == 2


def test_a_lost_channel_is_reported_and_connected_again(world: World):
    world.publish("a", "b")
    world.pool.lost("a", "reset")
    world.settle()
    assert world.failed == [("a", "reset")]
    assert len(world.tried) == 2
    world.advance(world.now + BACKOFF_S[0])
    assert world.tried[2:] == ["a"]
    assert len(world.channels) == 3


def test_what_leaves_the_map_is_not_tried_again(world: World):
    world.errors["a"] = PeerLost("gone")
    world.publish("a", "b")
    world.publish("b")
    world.pool.lost("a", "reset")
    world.advance(world.now + 10.0)
    assert sorted(world.tried) == ["a", "b"]
    world.errors.clear()
    world.publish("a", "b")
    assert sorted(name for name, _ in world.channels) == ["a", "b"]


def test_a_channel_that_nobody_wants_any_more_is_closed(world: World):
    made: list[FakeChannel] = []
    connect = world._connect

    def connect_late(endpoint: ShardEndpoint, map_: ExpertMap) -> Channel:
        channel: Any = connect(endpoint, map_)
        made.append(channel)
        world.pool.update(ExpertMap(2, "model", "token", {}, {}))
        return channel

    world.pool._connect = connect_late
    world.publish("a")
    assert [channel.closed for channel in made] == [True]
    assert world.channels == world.failed == []


def test_a_channel_that_comes_while_the_pool_closes_is_closed():
    world = World()
    connecting, go = threading.Event(), threading.Event()
    made: list[FakeChannel] = []

    def connect(endpoint: ShardEndpoint, map_: ExpertMap) -> Channel:
        channel: Any = FakeChannel()
        made.append(channel)
        connecting.set()
        assert go.wait(DEADLINE_S)
        return channel

    world.pool._connect = connect
    endpoint = ShardEndpoint("a", 0, "node", "host", 1, "")
    world.pool.update(ExpertMap(1, "model", "token", {"a": endpoint}, {"a": ()}))
    assert connecting.wait(DEADLINE_S)
    closing = threading.Thread(target=world.pool.close)
    closing.start()
    until(lambda: world.pool._closing)
    go.set()
    closing.join()
    assert [channel.closed for channel in made] == [True]
    assert world.channels == []


@pytest.mark.parametrize("error", UNEXPECTED, ids=repr)
def test_a_receiver_that_fails_gets_another_channel_later_and_the_first_is_closed(world: World, error, caplog):
    world.on_channel = lambda: _raise(error)
    world.publish("a")
    for tries, delay_s in enumerate(BACKOFF_S, 1):
        assert len(world.channels) == tries
        world.advance(world.now + delay_s)
    assert all(channel.closed for _, channel in world.channels)
    assert world.failed == [("a", str(error))] * len(world.channels)
    assert "Traceback" in caplog.text
    world.on_channel = lambda: None
    world.advance(world.now + 1.0)
    assert not world.channels[-1][1].closed


def test_a_report_that_fails_stops_nothing(world: World, caplog):
    world.on_failed = lambda: _raise(RuntimeError("the watcher is gone"))
    world.errors["a"] = PeerLost("gone")
    world.publish("a", "b")
    world.pool.lost("b", "reset")
    world.errors.clear()
    world.advance(world.now + BACKOFF_S[0])
    assert sorted(name for name, _ in world.channels) == ["a", "b", "b"]
    assert "the watcher is gone" in caplog.text


def _raise(error: Exception) -> None:
    raise error
