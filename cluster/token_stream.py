"""How tokens travel from engines to a gateway beside Ray: engines connect and send what each of their steps produced.
Owns the gateway's listening sockets and one connection per engine; knows nothing of requests, text or Ray. The engine's
end is `token_link.py`."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from .token_frames import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    PROTOCOL_VERSION,
    FrameReader,
    Hello,
    Message,
    ProtocolError,
    Stats,
    Update,
    Updates,
    encode_abort,
)
from .token_sockets import private_directory, tune_socket

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
MAX_ABORT_BYTES = 4 << 20
"""Unread aborts after which an engine counts as lost."""


class TokenStreamServer:
    """The gateway's end. All methods and callbacks run on the loop that `start` was called on.

    `on_updates(engine_id, updates)` gets every frame in order; `on_stats(engine_id, figures)` an engine's reports;
    `on_lost(engine_id)` comes once per connection that ends otherwise than by `close`, also when an engine connects
    anew before its old connection was seen to end.
    """

    def __init__(
        self,
        *,
        host: str,
        on_updates: Callable[[str, list[Update]], None],
        on_lost: Callable[[str], None],
        on_stats: Callable[[str, dict[str, Any]], None],
        hello_timeout_s: float = HELLO_TIMEOUT_S,
    ) -> None:
        """`host`: the address of this node that engines on other nodes can reach; it is also the one listened on."""
        self._host = host
        self._on_updates = on_updates
        self._on_lost = on_lost
        self._on_stats = on_stats
        self._hello_timeout_s = hello_timeout_s
        self._secret = secrets.token_hex(16)
        self._directory: Path | None = None
        self._servers: list[asyncio.Server] = []
        self._port = 0
        self._peers: set[_EnginePeer] = set()
        self._engines: dict[str, _EnginePeer] = {}

    async def start(self) -> None:
        """Listen. Raises OSError when `host` is not an address of this machine."""
        loop = asyncio.get_running_loop()
        # One address: a name may stand for several, each of which would get a port of its own.
        infos = await loop.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)
        self._directory = private_directory()
        try:
            self._servers.append(await loop.create_unix_server(lambda: _EnginePeer(self), self._unix_path))
            tcp = await loop.create_server(lambda: _EnginePeer(self), str(infos[0][4][0]), 0)
        except OSError:
            await self.close()
            raise
        self._servers.append(tcp)
        self._host, self._port = tcp.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        """Stop listening, end every connection without further callbacks, remove the socket's directory."""
        for server in self._servers:
            server.close()
        for peer in list(self._peers):
            peer.drop(silently=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def address(self, node_id: str) -> dict[str, Any]:
        """What an engine needs to connect (`reply_to` of a request); `node_id` is this process's node."""
        return {
            "node_id": node_id,
            "uds": self._unix_path,
            "host": self._host,
            "port": self._port,
            "secret": self._secret,
        }

    def abort(self, engine_id: str, handles: Sequence[int]) -> bool:
        """Tell an engine that nobody waits for these requests. False when it is not connected: then they have ended."""
        peer = self._engines.get(engine_id)
        if peer is None or peer.transport is None:
            return False
        peer.transport.write(encode_abort(handles))
        if peer.transport.get_write_buffer_size() > MAX_ABORT_BYTES:
            peer.drop(f"engine {engine_id} does not read its aborts")
            return False
        return True

    @property
    def engine_ids(self) -> frozenset[str]:
        """Engines connected now."""
        return frozenset(self._engines)

    @property
    def _unix_path(self) -> str:
        return str(self._directory / "s") if self._directory is not None else ""


class _EnginePeer(asyncio.Protocol):
    """One accepted connection: a stranger until its hello, then an engine."""

    def __init__(self, server: TokenStreamServer) -> None:
        self._server = server
        self._reader = FrameReader(MAX_HELLO_BYTES)
        self._engine_id: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._server._peers.add(self)
        tune_socket(transport.get_extra_info("socket"))
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._server._hello_timeout_s, self.drop, "a peer did not say hello in time")

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
                if self.transport is None:
                    return
        except ProtocolError as error:
            self.drop(f"{self._engine_id or 'a stranger'} broke the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop()

    def drop(self, reason: str = "", *, silently: bool = False) -> None:
        """End the connection now; the first call reports the engine as lost unless told otherwise."""
        transport, self.transport = self.transport, None
        if transport is None:
            return
        if reason:
            logger.warning("token stream: %s", reason)
        if self._timer is not None:
            self._timer.cancel()
        self._server._peers.discard(self)
        transport.abort()
        engine_id = self._engine_id
        if engine_id is not None:
            if self._server._engines.get(engine_id) is self:
                del self._server._engines[engine_id]
            if not silently:
                self._server._on_lost(engine_id)

    def _take(self, message: Message) -> None:
        if self._engine_id is None:
            self._greet(message)
        elif isinstance(message, Updates):
            self._server._on_updates(self._engine_id, message.updates)
        elif isinstance(message, Stats):
            self._server._on_stats(self._engine_id, message.figures)
        else:
            raise ProtocolError("an engine may send updates and stats only")

    def _greet(self, message: Message) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError("the first message must be hello")
        if not hmac.compare_digest(message.secret.encode(), self._server._secret.encode()):
            raise ProtocolError("wrong secret")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol version {message.version}, expected {PROTOCOL_VERSION}")
        assert self._timer is not None
        self._timer.cancel()
        self._reader.max_bytes = MAX_FRAME_BYTES
        before = self._server._engines.get(message.engine_id)
        if before is not None:
            before.drop(f"engine {message.engine_id} connected anew")
        self._engine_id = message.engine_id
        self._server._engines[message.engine_id] = self
