"""The processes of a running Herd by what they are, and how to end them. Found by the titles that Ray gives them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

from herd.deployments.readiness import is_ready

TITLES = {
    "shard": "ray::ServeReplica:herd:ExpertShard",
    "engine": "ray::ServeReplica:herd:Engine",
    "gateway": "ray::ServeReplica:herd:Gateway",
    "router": "ray::ExpertRouter",
    "controller": "ray::ServeController",
}
SETTLE_S = 180.0


def pids_of(role: str, tree: Iterable[psutil.Process]) -> list[int]:
    """Process ids of a role, oldest first."""
    found = [(process.create_time(), process.pid) for process in tree if title_of(process).startswith(TITLES[role])]
    return [pid for _, pid in sorted(found)]


def title_of(process: psutil.Process) -> str:
    """What a process calls itself; empty once it is gone."""
    try:
        command = process.cmdline()
        return command[0] if command and process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.Error:
        return ""


def end(pids: Iterable[int], how: signal.Signals = signal.SIGKILL) -> None:
    """Send all of them a signal, at once."""
    for pid in pids:
        os.kill(pid, how)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SETTLE_S) -> None:
    """Poll; fail with `what` when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.1)


def wait_ready(url: str) -> None:
    wait_until(lambda: is_ready(url), "the server did not become ready again")
