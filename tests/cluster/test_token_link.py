"""Connecting, and peers that are strangers, liars or dead: each side ends the connection, says so once, serves on."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
import tempfile
from contextlib import suppress
from typing import Any

import pytest

from herd.cluster.errors import GatewayUnreachable
from herd.cluster.token_frames import FrameReader, Hello, encode_abort, encode_hello, encode_stats, encode_updates

from .token_ends import LOOPS, NODE, NODES, Engine, Gateway, runner, until, update


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest):
    return runner(request.param)


@pytest.fixture(params=NODES.values(), ids=list(NODES))
def node(request: pytest.FixtureRequest) -> str:
    return request.param


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
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
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
            link = await engine.client.link(gateway.address, node)
            await until(lambda: gateway.server.engine_ids)
            reader, writer = await raw_engine(gateway, node)
            assert await reader.read() == b""
            writer.close()
            # The engine has been silent for longer than the stranger, but has said hello.
            assert link.is_open
            assert not gateway.lost

    run(scenario())


@pytest.mark.parametrize("answer", [b"", encode_abort([7])[:-1], b"\xff" * 64, encode_stats({"a": 1})])
def test_a_gateway_that_dies_or_breaks_the_protocol(run, node, answer, tmp_path):
    async def scenario():
        greeted, linked = [], asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeted.extend(FrameReader().feed(await reader.read(1000)))
            await linked.wait()
            writer.write(encode_abort([1]) + answer)
            await writer.drain()
            writer.close()

        unix = await asyncio.start_unix_server(serve, tmp_path / "s")
        tcp = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = tcp.sockets[0].getsockname()[1]
        address = {"node_id": NODE, "uds": str(tmp_path / "s"), "host": "127.0.0.1", "port": port, "secret": "s"}
        async with Engine() as engine:
            link = await engine.client.link(address, node)
            linked.set()
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
                with pytest.raises(GatewayUnreachable, match="no connection"):
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
