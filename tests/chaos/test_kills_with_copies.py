"""Two engines, three expert shards, two copies of each expert: process after process is killed under 32 streams."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from .conftest import Cost, Herd, serve, write_model
from .victims import end

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def herd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, costs: list[Cost]) -> Iterator[Herd]:
    model = write_model(tmp_path_factory.mktemp("chaos") / "tiny", request.param)
    yield from serve(model, costs, shards=3, copies=2, engines=2)


def test_a_shard_with_copies(herd: Herd) -> None:
    herd.survive("a shard whose experts have copies", herd.kill("shard"))


def test_two_shards_at_once(herd: Herd) -> None:
    """Some experts lose both copies and are waited for."""
    herd.survive("two of three shards at once", herd.kill("shard", 2))


def test_a_hung_shard_with_copies(herd: Herd) -> None:
    herd.survive("a hung shard whose experts have copies", lambda: end(herd.pids("shard")[:1], signal.SIGSTOP))


def test_the_router(herd: Herd) -> None:
    epoch = herd.status()["epoch"]
    herd.survive("the router", herd.kill("router"))
    herd.settle()
    assert herd.status()["epoch"] >= epoch


def test_one_of_two_engines(herd: Herd) -> None:
    herd.survive("one of two engines", herd.kill("engine"))


def test_the_controller(herd: Herd) -> None:
    herd.survive("Serve's controller", herd.kill("controller"))
