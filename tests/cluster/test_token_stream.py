"""The token stream over real sockets and with a real sending thread: the same conformance tests for both transports,
and under uvloop where it is installed."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from herd.cluster.token_frames import (
    FrameReader,
    Hello,
    encode_abort,
    encode_hello,
    encode_stats,
    encode_updates,
)
from herd.cluster.token_stream import GatewayLink, GatewayUnreachable, TokenStreamClient, TokenStreamServer

DEADLINE_S = 20.0
NODE = "node-a"


def loop_factory(kind: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if kind == "uvloop":
        return pytest.importorskip("uvloop").new_event_loop
    return asyncio.new_event_loop


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Runs a scenario on a fresh loop of each kind."""

    def runner(scenario):
        with asyncio.Runner(loop_factory=loop_factory(request.param)) as loop:
            loop.run(asyncio.wait_for(scenario, DEADLINE_S))

    return runner


@pytest.fixture(params=["unix", "tcp"])
def node(request) -> str:
    """The engine's node: the gateway's own, or another."""
    return NODE if request.param == "unix" else "node-b"


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.001)


class Gateway:
    """A server that remembers what it was told."""

    def __init__(self, **options: Any) -> None:
        self.updates: list[tuple[str, list[Any]]] = []
        self.frames = 0
        self.lost: list[str] = []
        self.stats: list[tuple[str, dict]] = []
        self.server = TokenStreamServer(
            host="127.0.0.1",
            on_updates=self._on_updates,
            on_lost=self.lost.append,
            on_stats=lambda engine, figures: self.stats.append((engine, figures)),
            **options,
        )

    def _on_updates(self, engine: str, updates: list[list[Any]]) -> None:
        self.frames += 1
        self.updates += [(engine, update) for update in updates]

    async def __aenter__(self) -> Gateway:
        await self.server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.close()

    @property
    def address(self) -> dict[str, Any]:
        return self.server.address(NODE)


class Engine:
    """A client that remembers what it was told."""

    def __init__(self, name: str = "engine", **options: Any) -> None:
        self.aborts: list[tuple[int, list[int]]] = []
        self.lost: list[GatewayLink] = []
        self.client = TokenStreamClient(
            name,
            on_abort=lambda link, handles: self.aborts.append((link.id, handles)),
            on_lost=self.lost.append,
            **options,
        )

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.client.close()


def update(handle: int, *tokens: int) -> list[Any]:
    return [handle, list(tokens), None, None]


def pause(gateway: Gateway, engine: str = "engine", reading: bool = False) -> None:
    transport: Any = gateway.server._engines[engine].transport
    transport.resume_reading() if reading else transport.pause_reading()


# ---- conformance: both transports, both loops ------------------------------------------------------------------------


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
            link = await engine.client.link({**gateway.address, "secret": "0" * 32}, node)
            link.send_updates([update(1, 2)])
            await until(lambda: engine.lost == [link])
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


# ---- one end is not ours: strangers, garbage, sudden death -----------------------------------------------------------


async def raw_engine(gateway: Gateway, node: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = gateway.address
    if node == NODE:
        return await asyncio.open_unix_connection(address["uds"])
    return await asyncio.open_connection(address["host"], address["port"])


def test_an_engine_killed_in_the_middle_of_a_frame(run, node):
    async def scenario():
        async with Gateway() as gateway:
            _, writer = await raw_engine(gateway, node)
            whole, half = encode_updates([update(1, 5)]), encode_updates([update(2, 6)])[:-3]
            writer.write(encode_hello(gateway.address["secret"], "doomed") + whole + half)
            await until(lambda: gateway.updates)
            assert not gateway.lost
            writer.transport.abort()
            await until(lambda: gateway.lost == ["doomed"])
            assert gateway.updates == [("doomed", update(1, 5))]

    run(scenario())


@pytest.mark.parametrize(
    ("sent", "engine_is_known"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (encode_updates([update(1, 2)]), False),
        (struct.pack("<I", 5000), False),
        ("hello", True),
        ("hello again", True),
        ("abort", True),
        ("garbage", True),
        ("oversize", True),
        ("other version", False),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_dropped(run, node, sent, engine_is_known):
    async def scenario():
        async with Gateway() as gateway, Engine("good") as engine:
            secret = gateway.address["secret"]
            hello = encode_hello(secret, "bad")
            after = {
                "hello": b"\x01\x00\x00\x00\xc1",
                "hello again": hello,
                "abort": encode_abort([1]),
                "garbage": b"\xff" * 1000,
                "oversize": struct.pack("<I", (16 << 20) + 1),
            }
            if sent == "other version":
                data = hello.replace(b"\x94\x00\x01", b"\x94\x00\x02")
            else:
                data = sent if isinstance(sent, bytes) else hello + after[sent]
            reader, writer = await raw_engine(gateway, node)
            writer.write(data)
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
            writer.close()
            await until(lambda: gateway.lost == (["bad"] if engine_is_known else []))
            assert gateway.updates == []
            link = await engine.client.link(gateway.address, node)
            assert link.send_updates([update(1)])
            await until(lambda: gateway.updates)

    run(scenario())


def test_a_silent_stranger_is_dropped(run, node):
    async def scenario():
        async with Gateway(hello_timeout_s=0.02) as gateway, Engine() as engine:
            reader, writer = await raw_engine(gateway, node)
            assert await reader.read() == b""
            writer.close()
            link = await engine.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids)
            await asyncio.sleep(0.05)
            assert link.is_open
            assert not gateway.lost

    run(scenario())


@pytest.mark.parametrize("answer", [b"", encode_abort([7])[:-1], b"\xff" * 64, encode_stats({"a": 1})])
def test_a_gateway_that_dies_or_breaks_the_protocol(run, node, answer, tmp_path):
    async def scenario():
        greeted = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeted.extend(FrameReader().feed(await reader.read(1000)))
            writer.write(encode_abort([1]) + answer)
            await writer.drain()
            writer.close()

        unix = await asyncio.start_unix_server(serve, tmp_path / "s")
        tcp = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = tcp.sockets[0].getsockname()[1]
        address = {"node_id": NODE, "uds": str(tmp_path / "s"), "host": "127.0.0.1", "port": port, "secret": "s"}
        async with Engine() as engine:
            link = await engine.client.link(address, node)
            await until(lambda: engine.lost == [link])
            assert engine.aborts == [(link.id, [1])]
            assert greeted == [Hello(1, "s", "engine")]
            assert not link.send_updates([update(1)])
            assert engine.client.links() == []
        unix.close()
        tcp.close()

    run(scenario())


def test_an_engine_that_does_not_read_aborts_is_given_up(run, node):
    async def scenario():
        async with Gateway() as gateway:
            _, writer = await raw_engine(gateway, node)
            reader_side: Any = writer.transport
            reader_side.pause_reading()
            writer.write(encode_hello(gateway.address["secret"], "deaf"))
            await until(lambda: gateway.server.engine_ids)
            handles = list(range(100_000))
            for _ in range(1000):
                if not gateway.server.abort("deaf", handles):
                    break
            assert gateway.lost == ["deaf"]
            writer.transport.abort()

    run(scenario())


# ---- connecting ------------------------------------------------------------------------------------------------------


def test_links_are_shared_and_survive_a_cancelled_caller(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            callers = [asyncio.create_task(engine.client.link(gateway.address, node)) for _ in range(5)]
            await asyncio.sleep(0)
            callers[0].cancel()
            links = await asyncio.gather(*callers[1:])
            assert len({link.id for link in links}) == 1
            assert await engine.client.link(gateway.address, node) is links[0]
            await until(lambda: gateway.server.engine_ids)
            assert len(gateway.server._peers) == 1

    run(scenario())


def test_the_same_engine_connecting_anew_replaces_its_old_connection(run, node):
    async def scenario():
        async with Gateway() as gateway, Engine() as old, Engine() as new:
            first = await old.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids)
            second = await new.client.link(gateway.address, node)
            await until(lambda: old.lost == [first])
            assert gateway.lost == ["engine"]
            assert gateway.server.abort("engine", [9])
            await until(lambda: new.aborts)
            assert second.is_open

    run(scenario())


def test_an_unreachable_gateway_is_a_typed_error_and_forgotten(run):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            with socket.socket() as held:
                held.bind(("127.0.0.1", 0))
                address = {**gateway.address, "uds": "", "port": held.getsockname()[1]}
                with pytest.raises(GatewayUnreachable, match="127.0.0.1"):
                    await engine.client.link(address, NODE)
            assert (await engine.client.link(gateway.address, NODE)).is_open
            assert not engine.lost

    run(scenario())


def test_a_connection_that_never_completes_times_out(run):
    async def scenario():
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            address = {"node_id": NODE, "uds": "", "host": "127.0.0.1", "port": port, "secret": "s"}
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            async with Engine(connect_timeout_s=0.05) as engine:
                with pytest.raises(GatewayUnreachable):
                    await engine.client.link(address, NODE)
            for filler in fillers:
                filler.close()

    run(scenario())


def test_a_missing_unix_socket_means_tcp(run):
    async def scenario():
        async with Gateway() as gateway, Engine() as engine:
            link = await engine.client.link({**gateway.address, "uds": "/nonexistent/s"}, NODE)
            assert link._sock.family == socket.AF_INET
            assert link._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(scenario())


def test_the_unix_socket_is_private_short_and_removed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60) / ("y" * 60)))
    os.makedirs(tempfile.tempdir or "")

    async def scenario():
        async with Gateway() as gateway:
            path = gateway.address["uds"]
            assert len(path) < 108
            assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert not os.path.exists(os.path.dirname(path))
        assert len(gateway.address["secret"]) == 32
        assert Gateway().server.address(NODE)["secret"] != gateway.address["secret"]

    run(scenario())


def test_a_host_that_is_not_ours_is_an_error_that_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scenario():
        gateway = Gateway()
        gateway.server._host = "192.0.2.1"
        with pytest.raises(OSError):
            await gateway.server.start()
        assert not list(tmp_path.iterdir())

    run(scenario())


def test_sending_after_the_loop_has_gone_is_harmless():
    runner = asyncio.Runner()
    gateway, engine = Gateway(), Engine()
    runner.run(gateway.server.start())
    link = runner.run(engine.client.link(gateway.address, NODE))
    runner.run(gateway.server.close())
    runner.close()
    while link.send_updates([update(1, *range(1000))]):
        pass
    link._sock.close()
