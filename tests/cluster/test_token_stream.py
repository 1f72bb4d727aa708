"""The token stream over real sockets and with a real sending thread: one conformance suite for both transports, also
under uvloop where it is installed."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from herd.cluster.errors import GatewayUnreachable

from .token_ends import LOOPS, NODE, NODES, Engine, Gateway, runner, until, update


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest):
    return runner(request.param)


@pytest.fixture(params=NODES.values(), ids=list(NODES))
def node(request: pytest.FixtureRequest) -> str:
    return request.param


def pause(gateway: Gateway, engine: str = "engine", reading: bool = False) -> None:
    transport: Any = gateway.server._engines[engine].transport
    transport.resume_reading() if reading else transport.pause_reading()


def test_updates_arrive_in_order_from_a_thread(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            link = await engine.client.link(gateway.address, node)
            family = socket.AF_UNIX if node == NODE else socket.AF_INET
            assert link._sock.family == family
            sent = [[update(step, step, h) for h in range(8)] for step in range(500)]
            thread = threading.Thread(target=lambda: [link.send_updates(u) for u in sent])
            thread.start()
            await until(lambda: gateway.frames == len(sent))
            thread.join()
            assert gateway.updates == [("engine", u) for frame in sent for u in frame]

    run(scenario())


def test_everything_an_update_holds_comes_through(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            link = await engine.client.link(gateway.address, node)
            end = {"finish_reason": "stop", "num_cached_tokens": 16, "num_output_tokens": 2}
            error = {"error": {"type": "Overloaded", "message": "é", "param": None, "extra": {"retry_after_s": 1.5}}}
            updates = [
                [2**40, [1, 2], [[-0.5, [1, 7], [-0.5, -1.25]], [-0.1, [], []]], end],
                [0, [], None, error],
            ]
            assert link.send_updates(updates)
            assert link.send_stats({"running": 3, "load": 0.5})
            await until(lambda: gateway.stats)
            assert [u for _, u in gateway.updates] == updates
            assert gateway.stats == [("engine", {"running": 3, "load": 0.5})]
            assert gateway.server.engine_ids == {"engine"}

    run(scenario())


def test_nothing_is_lost_or_reordered_when_the_gateway_reads_slowly(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            link = await engine.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids)
            pause(gateway)
            count, filler = 400, list(range(100_000, 105_000))

            def send():
                for step in range(count):
                    assert link.send_updates([update(step, *filler)])

            # The gateway takes nothing meanwhile: that the thread ends at all shows that sending does not block.
            await asyncio.to_thread(send)
            assert link.num_buffered_bytes > 1 << 20
            pause(gateway, reading=True)
            more = threading.Thread(target=lambda: [link.send_updates([update(count + i)]) for i in range(300)])
            more.start()
            await until(lambda: len(gateway.updates) == count + 300)
            more.join()
            assert [u[0] for _, u in gateway.updates] == list(range(count + 300))
            assert all(u[1] == filler for _, u in gateway.updates[:count])
            assert link.num_buffered_bytes == 0
            assert not engine.lost
            assert not gateway.lost

    run(scenario())


def test_a_gateway_that_never_reads_is_given_up(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine(max_buffered_bytes=1 << 20) as engine:
            link = await engine.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids)
            pause(gateway)

            def send_until_refused() -> int:
                for step in range(100_000):
                    if not link.send_updates([update(step, *range(5000))]):
                        return step
                raise AssertionError("the buffer has no bound")

            await asyncio.to_thread(send_until_refused)
            await until(lambda: engine.lost)
            assert engine.lost == [link]
            assert not link.is_open
            assert not link.send_updates([update(1)])
            pause(gateway, reading=True)
            await until(lambda: gateway.lost == ["engine"])
            again = await engine.client.link(gateway.address, node)
            assert again is not link
            assert again.id != link.id
            assert again.send_updates([update(-1)])
            await until(lambda: gateway.updates and gateway.updates[-1] == ("engine", update(-1)))
            assert engine.lost == [link]

    run(scenario())


def test_aborts_reach_the_right_engine(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine("a") as a, Engine("b") as b:
            link_a = await a.client.link(gateway.address, node)
            await b.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids == {"a", "b"})
            assert gateway.server.abort("a", [1, 2])
            assert gateway.server.abort("a", (3,))
            assert not gateway.server.abort("c", [4])
            await until(lambda: len(a.aborts) == 2)
            assert a.aborts == [(link_a.id, [1, 2]), (link_a.id, [3])]
            assert not b.aborts

    run(scenario())


def test_both_sides_learn_of_a_close(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            link = await engine.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids)
            link.close()
            await until(lambda: gateway.lost == ["engine"])
            assert not engine.lost
            assert not gateway.server.engine_ids
        async with Engine() as engine:
            async with Gateway() as gateway:
                link = await engine.client.link(gateway.address, node)
                await until(lambda: gateway.server.engine_ids)
            await until(lambda: engine.lost == [link])
            assert not gateway.lost

    run(scenario())


def test_a_wrong_secret_is_refused(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            with suppress(GatewayUnreachable):  # it may be refused before `link` is back
                link = await engine.client.link({**gateway.address, "secret": "0" * 32}, node)
                link.send_updates([update(1, 2)])
            await until(lambda: len(engine.lost) == 1)
            assert (gateway.updates, gateway.lost, gateway.server.engine_ids) == ([], [], frozenset())

    run(scenario())


def test_many_links(run, node):
    async def scenario():
        gateways = [Gateway() for _ in range(12)]
        engines = [Engine(f"engine-{i}") for i in range(12)]
        for gateway in gateways:
            await gateway.server.start()
        links = [(e, g, await e.client.link(g.address, node)) for e in engines for g in gateways]
        for step in range(20):
            for number, (_, _, link) in enumerate(links):
                assert link.send_updates([update(number, step)])
        await until(lambda: all(len(g.updates) == 20 * len(engines) for g in gateways))
        for number, (e, g, _) in enumerate(links):
            mine = [u for name, u in g.updates if name == e.client.engine_id]
            assert mine == [update(number, step) for step in range(20)]
        for engine in engines:
            assert len(engine.client.links()) == len(gateways)
            engine.client.send_stats({"x": 1})
        await until(lambda: all(len(g.stats) == len(engines) for g in gateways))
        for engine in engines:
            engine.client.close()
        for gateway in gateways:
            await gateway.server.close()

    run(scenario())
