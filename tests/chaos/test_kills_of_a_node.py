"""A Ray cluster of several nodes: the head has the gateway and the engine, the others the expert shards. One of those
is killed whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from .conftest import Cost, Herd, serve
from .victims import pids_of, wait_until

pytestmark = pytest.mark.chaos

SHARD_CPUS = 3
"""More than the head has: two of them fill another node."""


class Nodes:
    """The running `ray_nodes.py`."""

    def __init__(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HERD_")}
        command = [sys.executable, str(Path(__file__).with_name("ray_nodes.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.address = self._pipe(self.process.stdout).readline().strip()

    def tell(self, line: str) -> None:
        """Send a command and wait for its answer."""
        self._pipe(self.process.stdin).write(f"{line}\n")
        self._pipe(self.process.stdin).flush()
        assert self._pipe(self.process.stdout).readline()

    def stop(self) -> None:
        self._pipe(self.process.stdin).close()
        self.process.wait(60)
        self._pipe(self.process.stdout).close()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.stop()


def start(nodes: Nodes, model: Path, costs: list[Cost], *, shards: int, copies: int, workers: int) -> Generator[Herd]:
    """The nodes for the shards come once gateway and engine have their places on the head."""
    driver = psutil.Process(nodes.process.pid)

    def tree() -> list[psutil.Process]:
        return driver.children(recursive=True)

    def add_workers() -> None:
        wait_until(lambda: all(len(pids_of(role, tree())) == 1 for role in ("gateway", "engine")), "the start")
        for _ in range(workers):
            nodes.tell(f"add {2 * SHARD_CPUS}")

    options = ("--ray-address", nodes.address, "--set", f"experts.cpus_per_shard={SHARD_CPUS}")
    env = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
    more: dict[str, Any] = {"options": options, "env": env, "tree": tree, "meanwhile": add_workers}
    return serve(model, costs, shards=shards, copies=copies, engines=1, **more)


def nodes_of(herd: Herd) -> set[str]:
    return {shard["node_id"] for shard in herd.status()["shards"]}


def test_the_node_with_all_shards_of_a_cluster_of_two(nodes: Nodes, model_folder: Path, costs: list[Cost]) -> None:
    """Another node comes in its place, as an autoscaler would bring it."""

    def replace() -> None:
        nodes.tell("remove")
        nodes.tell(f"add {2 * SHARD_CPUS}")

    with closing(start(nodes, model_folder, costs, shards=2, copies=1, workers=1)) as starting:
        herd = next(starting)
        before = nodes_of(herd)
        assert len(before) == 1
        herd.survive("the node with all shards, replaced", replace)
        herd.settle()
        assert len(nodes_of(herd)) == 1
        assert not before & nodes_of(herd)


def test_one_of_two_nodes_with_shards(nodes: Nodes, model_folder: Path, costs: list[Cost]) -> None:
    """Copies are on different nodes, so that every expert is still there."""
    with closing(start(nodes, model_folder, costs, shards=4, copies=2, workers=2)) as starting:
        herd = next(starting)
        herd.settle()
        shards = herd.status()["shards"]
        assert sorted(Counter(shard["node_id"] for shard in shards).values()) == [2, 2]
        herd.survive("a node whose experts have copies on another", lambda: nodes.tell("remove"))
        nodes.tell(f"add {2 * SHARD_CPUS}")
        herd.settle()
        assert len(nodes_of(herd) & {shard["node_id"] for shard in shards}) == 1
