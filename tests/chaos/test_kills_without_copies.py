"""One engine and two expert shards without copies: what is killed must come back before anybody can go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Cost, Herd, serve
from .victims import end

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def herd(model_folder: Path, costs: list[Cost]) -> Iterator[Herd]:
    yield from serve(model_folder, costs, shards=2, copies=1, engines=1)


def test_a_shard_without_copies(herd: Herd) -> None:
    herd.survive("a shard without copies", herd.kill("shard"))


def test_a_hung_shard_without_copies(herd: Herd) -> None:
    herd.survive("a hung shard without copies", lambda: end(herd.pids("shard")[:1], signal.SIGSTOP))


def test_both_shards(herd: Herd) -> None:
    herd.survive("both shards at once, no copies", herd.kill("shard", 2))


def test_the_only_engine(herd: Herd) -> None:
    herd.survive("the only engine", herd.kill("engine"))


def test_shard_router_and_engine_at_once(herd: Herd) -> None:
    kills = [herd.kill(role) for role in ("shard", "router", "engine")]
    herd.survive("a shard, the router and the only engine at once", lambda: [kill() for kill in kills])
