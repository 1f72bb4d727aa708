"""Both ends of the data plane for tests: a shard that does what the test says, and an engine over any transport."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.cluster.expert_frames import Kind
from herd.cluster.expert_map import ShardEndpoint
from herd.cluster.local_channel import connect_local
from herd.cluster.transport import Call, Channel, PeerLost, Reply, Request, RowLayout
from herd.cluster.transport_connect import connect
from herd.cluster.transport_server import Handler, TransportServer

DEADLINE_S = 20.0
HIDDEN = 8
MAX_ROWS = 16
MAX_CALLS = 4
NODE = "node-a"
TOKEN = "the cluster's secret"
MODEL = "fingerprint"
SHARD = "shard-1"
NODES = {"shm": NODE, "cuda": NODE, "tcp": "node-b"}
"""The engine's node, by the transport that it leads to: the shard's is NODE."""


Serve = Callable[..., TransportServer]


def layout(dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, device: str = "cpu") -> RowLayout:
    return RowLayout(hidden, dtype, torch.device(device))


def until(condition: Callable[[], Any], message: str = "the condition did not come true") -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, message
        threading.Event().wait(0.001)
    return value


def twice(waiting: deque[Request]) -> None:
    """Every row times two, plus its expert's number; an epoch of 99 is stale; layer 7 fails."""
    while waiting:
        request = waiting.popleft()
        if request.epoch == 99:
            request.reply(Kind.STALE_MAP)
        elif request.layer == 7:
            request.reply(Kind.ERROR, "layer sieben ist müde")
        else:
            start = 0
            for expert, count in request.groups:
                request.rows_ND[start : start + count].mul_(2).add_(expert)
                start += count
            request.reply(Kind.RESULT)


def make_server(handler: Handler = twice, rows: RowLayout | None = None, **options: Any) -> TransportServer:
    facts: dict[str, Any] = {"shard_id": SHARD, "token": TOKEN, "model": MODEL, "host": "127.0.0.1"}
    facts |= {"layout": rows or layout(), "handler": handler, "max_queued_rows": 8 * MAX_ROWS}
    return TransportServer(**facts | options)


def endpoint_of(address: tuple[str, int, str], shard_id: str = SHARD) -> ShardEndpoint:
    return ShardEndpoint(shard_id, 0, NODE, *address)


def join(address: tuple[str, int, str], kind: str, rows: RowLayout | None = None, **options: Any) -> Channel:
    """A channel over the transport of that name."""
    facts: dict[str, Any] = {"token": TOKEN, "model": MODEL, "layout": rows or layout()}
    facts |= {"max_rows": MAX_ROWS, "max_calls": MAX_CALLS, "timeout_s": DEADLINE_S}
    shard_id = options.pop("shard_id", SHARD)
    return connect(endpoint_of(address, shard_id), my_node_id=NODES[kind], **facts | options)


def open_channel(kind: str, server: TransportServer, **options: Any) -> Channel:
    """A channel over the transport of that name, or without one ("local"), to a server of this process."""
    if kind == "local":
        limits = {"max_rows": options.get("max_rows", MAX_ROWS), "max_calls": options.get("max_calls", MAX_CALLS)}
        return connect_local(server, **limits)
    return join(server.address, kind, server.layout, **options)


def call(call_id: int, rows_ND: Tensor, groups: Sequence[tuple[int, int]] = (), **options: Any) -> Call:
    """A call of all rows, by default of expert 0."""
    length = rows_ND.shape[0]
    facts: dict[str, Any] = {"epoch": 1, "layer": 0, "timeout_s": DEADLINE_S, "ranges": [(0, length)]}
    return Call(call_id, groups=list(groups) or [(0, length)], rows_ND=rows_ND, **facts | options)


def collect(channel: Channel, count: int) -> list[Reply]:
    """The next `count` replies, waiting as a dispatcher does."""
    replies: list[Reply] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(replies) < count:
        assert time.monotonic() < deadline, f"{len(replies)} of {count} replies came"
        writing = [channel] if channel.wants_write() else []
        _, writable, _ = select.select([channel], writing, [], 0.1)
        if writable:
            channel.flush()
        replies += channel.poll()
    return replies


def until_lost(channel: Channel) -> str:
    """Why the channel ended."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        select.select([channel], [], [], 0.1)
        try:
            channel.poll()
        except PeerLost as lost:
            return str(lost)
    raise AssertionError("the channel is still open")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Servers of this process, stopped at the end."""
    servers: list[TransportServer] = []

    def start(handler: Handler = twice, **options: Any) -> TransportServer:
        servers.append(make_server(handler, **options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def rows_of(channel: Channel, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rows_ND = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return rows_ND.to(channel._layout.device)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[TransportServer]:
    """One for all the tests of this module: whatever they do to it, it serves."""
    server = make_server()
    server.start()
    yield server
    server.stop()


def works(channel: Channel) -> None:
    """Assert that a call is answered."""
    rows_ND, out_ND = rows_of(channel, 3), torch.empty(3, HIDDEN)
    channel.submit(call(1, rows_ND))
    (reply,) = collect(channel, 1)
    channel.take(reply, out_ND, [(0, 3)])
    assert torch.equal(out_ND, rows_ND * 2)


@pytest.fixture(autouse=True)
def bystander(shared_server: TransportServer) -> Iterator[Channel]:
    """Another engine, whose connection lasts and whose calls are answered before and after every test."""
    channel = open_channel("shm", shared_server)
    works(channel)
    yield channel
    works(channel)
    channel.close()


class Gate:
    """A handler that waits for `open` at each call, and records what it was offered."""

    def __init__(self, then: Handler = twice) -> None:
        self._then = then
        self._permits: queue.Queue[None] = queue.Queue()
        self.offered: list[list[int]] = []

    def open(self, times: int = 1) -> None:
        for _ in range(times):
            self._permits.put(None)

    def __call__(self, waiting: deque[Request]) -> None:
        self.offered.append([request.call_id for request in waiting])
        self._permits.get(timeout=DEADLINE_S)
        self._then(waiting)


class Process:
    """One of the roles below in a process of its own, killed at the end."""

    def __init__(self, role: str, *args: Any) -> None:
        command = [sys.executable, __file__, role, *map(json.dumps, args)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def receive(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], DEADLINE_S)[0], "the process says nothing"
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def run_server(device: str, dtype: str) -> None:
    """A shard that answers until it is killed."""
    server = make_server(rows=layout(getattr(torch, dtype.removeprefix("torch.")), device=device))
    print(json.dumps(server.start()), flush=True)
    threading.Event().wait()


def run_engine(address: tuple[str, int, str], kind: str) -> None:
    """An engine that has every call in flight and reads no answer."""
    channel = join(address, kind)
    for number in range(MAX_CALLS):
        channel.submit(call(number, torch.ones(2, HIDDEN)))
    print(json.dumps("submitted"), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    roles = {"server": run_server, "engine": run_engine}
    roles[sys.argv[1]](*map(json.loads, sys.argv[2:]))
