"""The router actor: in this process for what it stores and whom it wakes, on Ray for what a SIGKILL does to it."""

from __future__ import annotations

import asyncio
import importlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayError, RaySystemError, RayTaskError

from herd.cluster.errors import DigestMismatch, ExpertUnavailable, PlacementError
from herd.cluster.expert_map import ExpertMap, unpack_experts
from herd.cluster.router_spec import RouterSpec
from herd.deployments.expert_router import ExpertRouter
from herd.deployments.router_client import RouterAway, RouterClient, router_name

SPEC = RouterSpec(model="f00d", layers=(0, 2), num_experts=4, expert_bytes=100, shards=2, replicas=1)


class FakeStore:
    def __init__(self) -> None:
        self.checkpoint: bytes | None = None
        self.broken = False
        self.writes = 0

    def read(self) -> bytes | None:
        return self.checkpoint

    def write(self, checkpoint: bytes) -> None:
        if self.broken:
            raise ConnectionError("no GCS")
        self.writes += 1
        self.checkpoint = checkpoint

    def delete(self) -> None:
        self.checkpoint = None


async def new_router(store: FakeStore, spec: RouterSpec = SPEC) -> ExpertRouter:
    router = object.__new__(ExpertRouter)
    await ExpertRouter.__init__(router, "router-test", spec.to_wire(), store)  # pyright: ignore
    return router


async def lease(router: ExpertRouter, shard: str) -> dict[str, Any] | None:
    return await router.request_lease(shard, "node", "", None, [], 1)


async def both_ready(router: ExpertRouter) -> int | None:
    assert await lease(router, "a") is None
    assert await lease(router, "b") is not None
    assert await lease(router, "a") is not None
    await router.ready("a", "127.0.0.1", 1, "")
    return await router.ready("b", "127.0.0.1", 2, "/b")


async def test_a_map_is_stored_before_anybody_sees_it() -> None:
    store = FakeStore()
    router = await new_router(store)
    seen = asyncio.create_task(router.watch("engine", 0, 5.0))
    assert await lease(router, "a") is None
    assert await lease(router, "b") is not None
    assert await lease(router, "a") is not None
    store.broken = True
    with pytest.raises(ExpertUnavailable, match="cannot be stored: no GCS"):
        await router.ready("a", "127.0.0.1", 1, "")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await asyncio.shield(seen)
    store.broken = False
    async with asyncio.timeout(5):
        assert (await seen or {})["epoch"] == 1  # the tick tries again


async def test_what_cannot_be_stored_is_kept_and_told_to_those_who_ask_again() -> None:
    store = FakeStore()
    router = await new_router(store)
    router._ticker.cancel()  # else it stores what is asked for here
    calls = (
        lambda: lease(router, "b"),
        lambda: router.check_digests("b", [(0, 1, "aa")]),
        lambda: router.ready("b", "127.0.0.1", 2, ""),
        lambda: router.leave("b"),
    )
    assert await lease(router, "a") is None
    for call in calls:
        store.broken = True
        for _ in range(2):
            with pytest.raises(ExpertUnavailable):
                await call()
        store.broken = False
        await call()
        assert store.checkpoint == router._state.checkpoint()
    with pytest.raises(DigestMismatch):
        await router.check_digests("a", [(0, 1, "bb")])


async def test_a_router_that_starts_again_goes_on() -> None:
    store = FakeStore()
    first = await new_router(store)
    epoch = await both_ready(first)
    second = await new_router(store)
    wire = await second.watch("engine", -1, 0)
    assert wire == await first.watch("engine", -1, 0)
    assert wire is not None
    assert wire["epoch"] == epoch
    assert await second.beat("a", {})
    assert not await second.beat("c", {})
    assert second._state.status()["router"]["restarts"] == 1


async def test_watchers_learn_of_each_new_map_and_only_of_those() -> None:
    router = await new_router(FakeStore())
    assert await router.watch("engine", 0, 0.01) is None
    epoch = await both_ready(router)
    assert epoch is not None
    assert (await router.watch("engine", 0, 5) or {})["epoch"] == epoch
    waiting = [asyncio.create_task(router.watch(f"engine {i}", epoch, 5)) for i in range(2)]
    await router.leave("b")
    async with asyncio.timeout(5):
        maps = [ExpertMap.from_wire(wire or {}) for wire in await asyncio.gather(*waiting)]
    assert [map_.epoch for map_ in maps] == [epoch + 1] * 2
    assert [list(map_.shards) for map_ in maps] == [["a"]] * 2


async def test_a_shard_whose_experts_have_no_other_copy_is_asked_to_stay() -> None:
    router = await new_router(FakeStore())
    await both_ready(router)
    assert not await router.leave("a", True)
    assert await router.leave("a")
    spare = await new_router(FakeStore(), RouterSpec("f00d", (0,), 4, 100, shards=2, replicas=2))
    await both_ready(spare)
    assert await spare.leave("a", True)
    assert not await spare.leave("b", True)


async def test_wrong_bytes_are_refused() -> None:
    router = await new_router(FakeStore())
    await router.check_digests("a", [(0, 1, "aa"), (2, 3, "bb")])
    with pytest.raises(DigestMismatch, match="layer 2, expert 3"):
        await router.check_digests("b", [(0, 1, "aa"), (2, 3, "cc")])


def test_what_is_hosted_differently_has_another_router() -> None:
    names = {router_name("app", SPEC), router_name("app2", SPEC)}
    for spec in (RouterSpec("beef", (0, 2), 4, 100, 2), RouterSpec("f00d", (0, 2), 4, 100, 3)):
        names.add(router_name("app", spec))
    assert len(names) == 4
    assert router_name("app", RouterSpec(**SPEC.__dict__)) == router_name("app", SPEC)


class FailingActor:
    """Every call of it fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self) -> Any:
        return self

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(self._error)
        return future


@pytest.mark.parametrize("error", [RaySystemError("no GCS"), ActorUnavailableError("restarting", None), TimeoutError()])
async def test_whatever_ray_says_the_router_is_away(error: Exception) -> None:
    client = RouterClient("app", SPEC)
    for _ in range(2):
        client._actor = FailingActor(error)
        with pytest.raises(RouterAway):
            await client.status()
        client._actor = FailingActor(error)
        with pytest.raises(RouterAway):
            client.call("beat")
    assert (client._actor is None) is isinstance(error, RayError)  # it is looked up anew


async def test_what_the_router_says_is_passed_on() -> None:
    client = RouterClient("app", SPEC)
    for cause, seen in ((PlacementError("too large"), PlacementError), (KeyError("a defect"), RayTaskError)):
        client._actor = FailingActor(RayTaskError("call", "", cause))
        with pytest.raises(seen):
            client.call("beat")
        with pytest.raises(seen):
            await client.status()


# On Ray


@pytest.fixture
def client(ray_session: str) -> Iterator[RouterClient]:
    client = RouterClient(secrets.token_hex(4), SPEC)
    yield client
    call(client, "status")
    importlib.import_module("ray").kill(client._actor)


def call(client: RouterClient, method: str, *args: Any) -> Any:
    """As everybody does: again, while the router is away."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.call(method, *args)
        except RouterAway:
            assert time.monotonic() < deadline, "the router does not come back"
            time.sleep(0.05)


def test_a_killed_router_comes_back_with_its_map(client: RouterClient) -> None:
    assert call(client, "request_lease", "a", "n", "", None, [], 1) is None
    granted = call(client, "request_lease", "b", "n", "", None, [], 1)
    assert call(client, "request_lease", "a", "n", "", None, [], 1)["token"] == granted["token"]
    experts = set(unpack_experts(granted["experts"]))
    assert experts < set(SPEC.experts)
    call(client, "ready", "a", "127.0.0.1", 1, "")
    epoch = call(client, "ready", "b", "127.0.0.1", 2, "")
    before = call(client, "watch", "engine", 0, 0.0)
    os.kill(call(client, "status")["router"]["pid"], signal.SIGKILL)
    assert call(client, "beat", "a", {})  # before their leases end anew
    assert call(client, "beat", "b", {})
    after = call(client, "watch", "engine", 0, 0.0)
    assert after == before
    assert after["epoch"] == epoch
    assert call(client, "status")["router"]["restarts"] == 1


def test_a_refusal_is_told_from_an_absence(client: RouterClient) -> None:
    room_for_one = 100
    assert call(client, "request_lease", "a", "n", "", room_for_one, [], 1) is None
    with pytest.raises(PlacementError):
        client.call("request_lease", "b", "n", "", room_for_one, [], 1)


async def test_status_from_an_event_loop(client: RouterClient) -> None:
    status = await client.status()
    assert status["experts"]["missing"] == 8
    assert status["router"]["name"] == client.name
