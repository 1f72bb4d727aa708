"""The round trip of one layer's rows between an engine and a shard, over each transport, against its floor.

    python bench/dispatch.py [--rounds 15] [--trips 200] [--out bench/results/dispatch.json]

Two processes, each on a core of its own; bfloat16 rows; the shard answers with the rows as they came. Herd: submit,
epoll, poll, take. The floor is the plainest echo in Python of the same bytes over the same mechanism, waiting in epoll
as whoever has several peers must: copy into shared memory, ring, wait, copy out; or send all over TCP, receive all,
copy out. `blocking_us` is the same echo without epoll, for one peer only. All take turns in blocks of trips; times are
medians.

A process of the lowest priority keeps each core from falling asleep: on virtual machines to wake a core that halted
takes longer than a whole trip, and microseconds decide which trips have to.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import platform
import select
import socket
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from herd.cluster.expert_frames import GROUP_BYTES, HEADER_BYTES, Kind
from herd.cluster.expert_map import ShardEndpoint
from herd.cluster.token_sockets import tune_data_socket
from herd.cluster.transport import Call, Channel, Request, RowLayout
from herd.cluster.transport_connect import connect
from herd.cluster.transport_server import TransportServer

HIDDEN = (512, 5120)
ROWS = (1, 32, 256)
SIZES = [(hidden, rows) for hidden in HIDDEN for rows in ROWS]
MAX_CALLS = 4
FRAME_BYTES = HEADER_BYTES + GROUP_BYTES
NODE = "this"
SECRETS = {"token": "secret", "model": "model"}
Step = Callable[[], object]


def layout(hidden: int) -> RowLayout:
    return RowLayout(hidden, torch.bfloat16, torch.device("cpu"))


def num_bytes(hidden: int, rows: int) -> int:
    return layout(hidden).row_bytes * rows


def answer(waiting: deque[Request]) -> None:
    while waiting:
        waiting.popleft().reply(Kind.RESULT)


def run_shard(core: int, pipe: Connection) -> None:
    """A process with one server for each hidden size."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    limits = {"host": "127.0.0.1", "max_queued_rows": MAX_CALLS * max(ROWS)}
    servers = [
        TransportServer(shard_id="shard", layout=layout(hidden), handler=answer, **SECRETS, **limits)
        for hidden in HIDDEN
    ]
    pipe.send([server.start() for server in servers])
    threading.Event().wait()


def run_echo(core: int, pipe: Connection, doorbells: dict[bool, socket.socket]) -> None:
    """A process that echoes: doorbells, and what comes over a TCP connection for each (size, waits in epoll)."""
    os.sched_setaffinity(0, {core})
    for waits, sock in doorbells.items():
        threading.Thread(target=echo, args=(sock, FRAME_BYTES, waits), daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname())
    with suppress(EOFError):
        while True:
            size, waits = pipe.recv()
            sock, _ = listener.accept()
            tune_data_socket(sock)
            threading.Thread(target=echo, args=(sock, size, waits), daemon=True).start()


def stay_awake(core: int) -> None:
    """A process that runs when nothing else does."""
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while True:
        pass


def echo(sock: socket.socket, size: int, waits: bool) -> None:
    buffer, wait = memoryview(bytearray(size)), waiter(sock, waits)
    while True:
        exactly(sock, buffer, wait)
        sock.sendall(buffer)


def waiter(sock: socket.socket, waits: bool) -> Step | None:
    if not waits:
        return None
    epoll = select.epoll()
    epoll.register(sock.fileno(), select.EPOLLIN)
    return lambda: epoll.poll(-1, 64)


def exactly(sock: socket.socket, buffer: memoryview, wait: Step | None) -> None:
    count = 0
    while count < len(buffer):
        if wait is not None:
            wait()
        more = sock.recv_into(buffer[count:])
        if not more:
            raise SystemExit  # ends this thread
        count += more


def herd_trip(channel: Channel, hidden: int, rows: int) -> Step:
    rows_ND = torch.randn(rows, hidden).bfloat16()
    out_ND = torch.empty_like(rows_ND)
    epoll = select.epoll()
    epoll.register(channel.fileno(), select.EPOLLIN)
    call = Call(1, 1, 0, 1.0, [(0, rows)], rows_ND, [(0, rows)])

    def trip() -> None:
        channel.submit(call)
        if channel.wants_write():
            epoll.modify(channel.fileno(), select.EPOLLIN | select.EPOLLOUT)
            while channel.wants_write():
                epoll.poll(-1, 64)
                channel.flush()
            epoll.modify(channel.fileno(), select.EPOLLIN)
        while True:
            epoll.poll(-1, 64)
            for reply in channel.poll():
                channel.take(reply, out_ND, call.ranges)
                return

    trip()
    assert torch.equal(out_ND, rows_ND)
    return trip


def doorbell_floor(sock: socket.socket, size: int, waits: bool) -> Step:
    anchor = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
    rows, out = bytearray(size), (ctypes.c_char * size)()
    source = (ctypes.c_char * size).from_buffer(rows)
    ring, wait = memoryview(bytearray(FRAME_BYTES)), waiter(sock, waits)

    def trip() -> None:
        ctypes.memmove(anchor, source, size)
        sock.sendall(ring)
        exactly(sock, ring, wait)
        ctypes.memmove(out, anchor, size)

    return trip


def tcp_floor(sock: socket.socket, size: int, waits: bool) -> Step:
    message, received, out = bytearray(size), bytearray(size), (ctypes.c_char * size)()
    source, view = (ctypes.c_char * size).from_buffer(received), memoryview(received)
    wait = waiter(sock, waits)

    def trip() -> None:
        sock.sendall(message)
        exactly(sock, view, wait)
        ctypes.memmove(out, source, size)

    return trip


def in_turns(steps: list[Step], rounds: int, trips: int) -> dict[str, float]:
    """Median microseconds of Herd, floor and blocking echo, and how far Herd is from the floor."""
    times: dict[str, list[float]] = {"herd_us": [], "floor_us": [], "blocking_us": []}
    for number in range(rounds + 1):
        for trip, taken in zip(steps, times.values(), strict=True):
            for _ in range(trips):
                began = time.perf_counter()
                trip()
                if number:  # the first round warms up
                    taken.append(1e6 * (time.perf_counter() - began))
    medians = {name: round(statistics.median(taken), 1) for name, taken in times.items()}
    return medians | {"ratio": round(medians["herd_us"] / medians["floor_us"], 2)}


class Processes:
    """The other process of each kind, and connections to it."""

    def __init__(self, core: int, cores: set[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, echo_end = context.Pipe()
        shard_pipe, shard_end = context.Pipe()
        pairs = {waits: socket.socketpair() for waits in (False, True)}
        self.doorbells = {waits: ours for waits, (ours, _) in pairs.items()}
        theirs = {waits: end for waits, (_, end) in pairs.items()}
        context.Process(target=run_echo, args=(core, echo_end, theirs), daemon=True).start()
        context.Process(target=run_shard, args=(core, shard_end), daemon=True).start()
        for each in cores:
            context.Process(target=stay_awake, args=(each,), daemon=True).start()
        self._echo_address = self._pipe.recv()
        self._addresses: dict[int, tuple[str, int, str]] = dict(zip(HIDDEN, shard_pipe.recv(), strict=True))

    def channel(self, hidden: int, node: str) -> Channel:
        """To the shard: shared memory from its node, TCP from another."""
        endpoint = ShardEndpoint("shard", 0, NODE, *self._addresses[hidden])
        limits = {"max_rows": max(ROWS), "max_calls": MAX_CALLS, "timeout_s": 10.0}
        return connect(endpoint, my_node_id=node, layout=layout(hidden), **SECRETS, **limits)

    def echo_connection(self, size: int, waits: bool) -> socket.socket:
        self._pipe.send((size, waits))
        sock = socket.create_connection(self._echo_address)
        tune_data_socket(sock)
        return sock

    def shared_memory(self, hidden: int, rows: int) -> list[Step]:
        size = num_bytes(hidden, rows)
        floors = [doorbell_floor(self.doorbells[waits], size, waits) for waits in (True, False)]
        return [herd_trip(self.channel(hidden, NODE), hidden, rows), *floors]

    def tcp(self, hidden: int, rows: int) -> list[Step]:
        size = FRAME_BYTES + num_bytes(hidden, rows)
        floors = [tcp_floor(self.echo_connection(size, waits), size, waits) for waits in (True, False)]
        return [herd_trip(self.channel(hidden, "another"), hidden, rows), *floors]


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": platform.machine(),
        "cpu": models[0] if models else "",
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trips", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    processes = Processes(cores[-1], {cores[0], cores[-1]})
    result = machine() | {"dtype": "bfloat16", "trips_each": args.rounds * args.trips}
    for hidden, rows in SIZES:
        row = {
            "shared_memory": in_turns(processes.shared_memory(hidden, rows), args.rounds, args.trips),
            "tcp": in_turns(processes.tcp(hidden, rows), args.rounds, args.trips),
        }
        print(f"{rows:>4} x {hidden:<5}", json.dumps(row), flush=True)
        result[f"{rows} x {hidden}"] = row
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
