from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from herd.cluster.errors import EngineUnavailable
from herd.deployments import service as service_module
from herd.deployments.service import Service

from .cluster_statuses import sharded
from .fake_gateway import FakeGateway, gateway


def report(service: Service, engine: str, **figures: float) -> None:
    service.metrics.engines.update(engine, figures)


async def status_of(g: FakeGateway) -> dict[str, Any]:
    reply = await g.call("GET", "/herd/status")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    return reply.json()


async def test_local_mode_answers_with_the_engines_figures() -> None:
    async with gateway() as g:
        assert await status_of(g) == {"mode": "local", "name": "tiny", "engine_stats": []}
        report(g.service, "e1", running=3, generated_tokens=70)
        (figures,) = (await status_of(g))["engine_stats"]
    assert figures.pop("age_s") >= 0
    assert figures == {"engine_id": "e1", "tokens_per_s": None, "running": 3, "generated_tokens": 70}


async def test_what_the_router_says_is_passed_on_with_the_engines_figures() -> None:
    said = {key: value for key, value in sharded().items() if key not in ("mode", "engine_stats")}

    async def router() -> Mapping[str, Any]:
        return said

    async with gateway(cluster_status=router) as g:
        report(g.service, "e1", running=3)
        status = await status_of(g)
    assert [e["engine_id"] for e in status.pop("engine_stats")] == ["e1"]
    assert status == said | {"mode": "shards"}


async def test_the_name_is_the_served_one_where_the_router_knows_none() -> None:
    async def router() -> Mapping[str, Any]:
        return {"epoch": 4}

    async with gateway(cluster_status=router) as g:
        status = await status_of(g)
    assert (status["name"], status["epoch"]) == ("tiny", 4)


async def test_a_router_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "STATUS_TIMEOUT_S", 0.01)
    calls: list[asyncio.Future[Mapping[str, Any]]] = []

    async def router() -> Mapping[str, Any]:
        calls.append(asyncio.get_running_loop().create_future())
        return await calls[-1]

    async with gateway(cluster_status=router) as g:
        report(g.service, "e1", running=3)
        for status in (await status_of(g), *await asyncio.gather(status_of(g), status_of(g))):
            assert status["mode"] == "shards"
            assert status["router"] is None
            assert "no answer within" in status["router_error"]
            assert [e["engine_id"] for e in status["engine_stats"]] == ["e1"]
        assert len(calls) == 1, "calls that hang do not pile up"
        calls[0].set_result({"epoch": 4})
        assert (await status_of(g))["epoch"] == 4
        assert "router_error" in await status_of(g)
        assert len(calls) == 2


async def test_a_router_that_is_away_is_null() -> None:
    async def router() -> Mapping[str, Any]:
        raise EngineUnavailable("the router restarts")

    async with gateway(cluster_status=router) as g:
        status = await status_of(g)
    assert (status["router"], status["router_error"]) == (None, "the router restarts")
