import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from herd.deployments.engine_router import EngineRouter

ENGINE = DeploymentID(name="Engine", app_name="herd")
PROMPT = list(range(200))


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=ReplicaID(name, ENGINE))


def pending(
    number: int, prompt_ids: list[int] | None = None, salt: str = "", avoid: Sequence[str] = ()
) -> PendingRequest:
    request = {"prompt_ids": prompt_ids, "cache_salt": salt}
    wire = {"handle": number, "request": request, "reply_to": {}, "avoid": avoid}
    args = [] if prompt_ids is None else [wire]
    metadata = RequestMetadata(request_id=str(number), internal_request_id=str(number))
    return PendingRequest(args=args, kwargs={}, metadata=metadata)


@pytest.fixture
def router() -> EngineRouter:
    router = EngineRouter(deployment_id=ENGINE, handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state(spill=2)
    return router


async def choose(router: EngineRouter, request: PendingRequest, names: str = "abc") -> list[str]:
    groups = await router.choose_replicas([replica(name) for name in names], request)
    assert all(len(group) == 1 for group in groups)
    return [group[0].replica_id.unique_id for group in groups]


async def test_every_replica_is_offered_and_a_prefix_stays_where_it_was(router):
    first = await choose(router, pending(1, PROMPT))
    assert sorted(first) == ["a", "b", "c"]
    router.on_request_completed(ReplicaID(first[0], ENGINE), "1")
    for number in range(2, 5):
        request = pending(number, [*PROMPT[:150], number])
        assert (await choose(router, request))[0] == first[0]
        assert request.routing_context.should_backoff, "or Serve would try again without a pause"
        router.on_request_completed(ReplicaID(first[0], ENGINE), str(number))


async def test_simultaneous_requests_spread_although_none_has_been_sent(router):
    picks = [(await choose(router, pending(number, PROMPT)))[0] for number in range(24)]
    counts = [picks.count(name) for name in "abc"]
    assert max(counts) - min(counts) <= 3, "spill and the one that goes over it"


async def test_who_lost_an_engine_is_sent_there_only_for_want_of_another(router):
    first, second, third = await choose(router, pending(1, PROMPT))
    again = pending(2, PROMPT, avoid=[first, third])
    ranked = await choose(router, again)
    assert ranked[0] == second
    assert sorted(ranked[1:]) == sorted([first, third])
    assert router._affinity.replica_of("2") == second
    assert await choose(router, pending(3, PROMPT, avoid=["a"]), "a") == ["a"]


async def test_calls_without_a_prompt_go_to_the_least_loaded(router):
    first = (await choose(router, pending(1, PROMPT)))[0]
    assert (await choose(router, pending(2)))[0] != first
    assert (await router.choose_replicas([], None)) == []


async def test_a_request_given_up_before_it_was_sent_no_longer_counts(router):
    request = pending(1, PROMPT)
    first = (await choose(router, request))[0]
    request.future.cancel()
    await asyncio.sleep(0)
    assert router._affinity.in_flight(first) == 0


async def test_where_serve_sent_it_counts_when_that_is_elsewhere(router):
    request = pending(1, PROMPT)
    first, second, _ = await choose(router, request)
    router.on_request_routed(request, ReplicaID(second, ENGINE), None)  # pyright: ignore[reportArgumentType]
    assert (router._affinity.in_flight(first), router._affinity.in_flight(second)) == (0, 1)
    router.on_request_completed(ReplicaID(second, ENGINE), "1")
    assert (await choose(router, pending(2, PROMPT)))[0] == second


async def test_a_dead_replica_is_forgotten(router):
    first = (await choose(router, pending(1, PROMPT)))[0]
    router.on_replica_actor_died(ReplicaID(first, ENGINE))
    assert router._affinity.in_flight(first) == 0
