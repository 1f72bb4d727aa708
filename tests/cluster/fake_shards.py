"""Shards without sockets for the dispatcher's tests: channels whose shard does what the test says, and a map over them.

An expert's result is a known function of (layer, expert, row), so that a lost, doubled or mixed-up row shows."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum, auto

import torch
from torch import Tensor

from herd.cluster.dispatch import Dispatcher
from herd.cluster.expert_frames import Kind
from herd.cluster.expert_map import Expert, ExpertMap, ShardEndpoint
from herd.cluster.transport import Call, PeerLost, Reply


class Act(Enum):
    """What a shard does with its next call."""

    ANSWER = auto()
    HOLD = auto()
    BUSY = auto()
    STALE = auto()
    ERROR = auto()
    DIE_ON_SUBMIT = auto()
    DIE_LATER = auto()


def result_of(layer: int, expert: int, rows_ND: Tensor) -> Tensor:
    """What expert `expert` makes of its rows."""
    return rows_ND * 2 + layer * 100 + expert


def expected(layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> Tensor:
    """What a whole layer must give."""
    groups = rows_ND.split(list(counts_E))
    return torch.cat([result_of(layer, expert, group) for expert, group in enumerate(groups)])


class FakeChannel:
    """One connection. `acts` holds what to do with the next calls; after them it answers."""

    def __init__(self, shard: FakeShard, max_rows: int, max_calls: int) -> None:
        self.max_rows, self.max_calls = max_rows, max_calls
        self.closed = self.dead = False
        self.held: list[Call] = []
        self._shard = shard
        self._replies: deque[tuple[Reply, Tensor]] = deque()
        self._kept: dict[int, Tensor] = {}
        self._under_way = 0
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def submit(self, call: Call) -> None:
        assert self._under_way < self.max_calls, "more calls in flight than the channel takes"
        rows = sum(count for _, count in call.groups)
        assert rows == sum(end - start for start, end in call.ranges) <= self.max_rows
        act = self._shard.acts.popleft() if self._shard.acts else Act.ANSWER
        if self.dead or act is Act.DIE_ON_SUBMIT:
            raise PeerLost("it is gone")
        self._under_way += 1
        self._shard.calls.append(call)
        if act is Act.DIE_LATER:
            self.kill()
        elif act is Act.HOLD:
            self.held.append(call)
        else:
            kinds = {Act.BUSY: Kind.BUSY, Act.STALE: Kind.STALE_MAP, Act.ERROR: Kind.ERROR}
            self._answer(call, kinds.get(act, Kind.RESULT))

    def release(self, kind: Kind = Kind.RESULT) -> None:
        """Answer the call held longest, from any thread."""
        self._answer(self.held.pop(0), kind)

    def _answer(self, call: Call, kind: Kind) -> None:
        rows_ND = torch.cat([call.rows_ND[start:end] for start, end in call.ranges])
        groups = rows_ND.split([count for _, count in call.groups])
        result_ND = torch.cat([result_of(call.layer, e, g) for (e, _), g in zip(call.groups, groups, strict=True)])
        self._replies.append((Reply(call.call_id, kind, rows_ND.shape[0], 0, "planted"), result_ND))
        os.eventfd_write(self._fd, 1)

    def kill(self) -> None:
        """End as a killed process does."""
        self.dead = True
        os.eventfd_write(self._fd, 1)

    def poll(self) -> list[Reply]:
        if not self.dead:
            with suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        if self.dead and not self._replies:
            raise PeerLost("it was killed")
        replies = []
        while self._replies:
            reply, result_ND = self._replies.popleft()
            self._kept[reply.call_id] = result_ND
            replies.append(reply)
        return replies

    def take(self, reply: Reply, out_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        assert reply.kind is Kind.RESULT
        result_ND = self._free(reply)
        start = 0
        for begin, end in ranges:
            out_ND[begin:end] = result_ND[start : start + end - begin]
            start += end - begin

    def drop(self, reply: Reply) -> None:
        self._free(reply)

    def _free(self, reply: Reply) -> Tensor:
        self._under_way -= 1
        return self._kept.pop(reply.call_id)

    @property
    def num_calls(self) -> int:
        return self._under_way

    def wants_write(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)


class FakeShard:
    """A shard process: any number of connections in turn."""

    def __init__(self, name: str, slot: int, experts: Sequence[Expert]) -> None:
        self.endpoint = ShardEndpoint(name, slot, "node", "127.0.0.1", 1, "")
        self.experts = tuple(sorted(experts))
        self.acts: deque[Act] = deque()
        self.calls: list[Call] = []
        self.channels: list[FakeChannel] = []
        self.reachable = True

    @property
    def channel(self) -> FakeChannel:
        """The latest connection."""
        return self.channels[-1]


class FakeCluster:
    """Shards and the maps that name them."""

    def __init__(self, max_rows: int = 64, max_calls: int = 4) -> None:
        self.shards: dict[str, FakeShard] = {}
        self.epoch = 0
        self._max_rows, self._max_calls = max_rows, max_calls

    def add(self, name: str, experts: Sequence[Expert], acts: Sequence[Act] = ()) -> FakeShard:
        shard = FakeShard(name, len(self.shards), experts)
        shard.acts.extend(acts)
        self.shards[name] = shard
        return shard

    def connect(self, endpoint: ShardEndpoint, map_: ExpertMap) -> FakeChannel:
        shard = self.shards.get(endpoint.shard_id)
        if shard is None or not shard.reachable:
            raise PeerLost("nobody listens there")
        shard.channels.append(FakeChannel(shard, self._max_rows, self._max_calls))
        return shard.channels[-1]

    def publish(self, update: Callable[[ExpertMap], None]) -> ExpertMap:
        """The next map version, of the shards there are now."""
        self.epoch += 1
        shards: Mapping[str, FakeShard] = dict(self.shards)
        endpoints = {name: shard.endpoint for name, shard in shards.items()}
        map_ = ExpertMap(self.epoch, "model", "token", endpoints, {n: s.experts for n, s in shards.items()})
        update(map_)
        return map_

    def wait_connected(self, dispatcher: Dispatcher) -> None:
        """Replicas, too: `Dispatcher.wait_complete` is content with one shard for each expert."""
        wanted = sum(shard.reachable for shard in self.shards.values())
        deadline = time.monotonic() + 20
        while dispatcher.stats()["shards_connected"] < wanted:
            assert time.monotonic() < deadline, "not every shard got connected"
            dispatcher.refresh()
            time.sleep(0.001)
