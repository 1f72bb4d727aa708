"""The engine's end of the token stream: one link per gateway, written to straight from the thread that computes steps.
Owns the connections; knows nothing of requests, steps or Ray. The other end is `token_stream.py`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .errors import GatewayUnreachable, ProtocolError
from .token_frames import Abort, FrameReader, Update, encode_hello, encode_stats, encode_updates
from .token_sockets import connected_socket

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
MAX_BUFFERED_BYTES = 64 << 20
"""Unread updates after which a gateway counts as lost."""
_READ_BYTES = 1 << 16
_WRITE_BYTES = 1 << 18


class TokenStreamClient:
    """The engine's end: one link per gateway, kept until it breaks.

    Callbacks run on the loop that `link` is awaited on. `on_abort(link, handles)`: end these requests.
    `on_lost(link)`: comes once per link that ends otherwise than by `close`; nobody reads its answers any more.
    """

    def __init__(
        self,
        engine_id: str,
        *,
        on_abort: Callable[[GatewayLink, list[int]], None],
        on_lost: Callable[[GatewayLink], None],
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.engine_id = engine_id
        self._on_abort = on_abort
        self._on_lost = on_lost
        self._max_buffered_bytes = max_buffered_bytes
        self._connect_timeout_s = connect_timeout_s
        self._links: dict[str, asyncio.Task[GatewayLink]] = {}
        self._ids = itertools.count()

    async def link(self, reply_to: Mapping[str, Any], my_node_id: str) -> GatewayLink:
        """The link to the gateway that `TokenStreamServer.address` describes, connected at need.

        Raises `GatewayUnreachable`.
        """
        secret = reply_to["secret"]
        task = self._links.get(secret)
        if task is None:
            task = asyncio.ensure_future(self._connect(reply_to, my_node_id))
            self._links[secret] = task
            task.add_done_callback(lambda done: self._forget_failed(secret, done))
        # Others may be waiting for the same link, so a caller's cancellation must not reach it.
        link = await asyncio.shield(task)
        if not link.is_open:
            raise GatewayUnreachable(f"the gateway at {reply_to['host']} closed the connection at once")
        return link

    def links(self) -> list[GatewayLink]:
        """Every link that is open now."""
        return [task.result() for task in self._links.values() if _succeeded(task)]

    def send_stats(self, figures: dict[str, Any]) -> None:
        """Report this engine's figures to every connected gateway."""
        for link in self.links():
            link.send_stats(figures)

    def close(self) -> None:
        """Close every link, without callbacks."""
        tasks = list(self._links.values())
        self._links.clear()
        for task in tasks:
            if _succeeded(task):
                task.result().close()
            else:
                task.cancel()

    def _forget_failed(self, secret: str, task: asyncio.Task[GatewayLink]) -> None:
        if not _succeeded(task) and self._links.get(secret) is task:
            del self._links[secret]

    def _lost(self, link: GatewayLink) -> None:
        del self._links[link.secret]
        self._on_lost(link)

    async def _connect(self, reply_to: Mapping[str, Any], my_node_id: str) -> GatewayLink:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                sock = await connected_socket(reply_to, my_node_id)
        except OSError as error:  # TimeoutError is one
            raise GatewayUnreachable(f"no connection to the gateway at {reply_to['host']}: {error}") from error
        link = GatewayLink(
            next(self._ids), sock, reply_to["secret"], self._max_buffered_bytes, self._on_abort, self._lost
        )
        link._send(encode_hello(reply_to["secret"], self.engine_id))
        return link


class GatewayLink:
    """One open connection to a gateway. Made by `TokenStreamClient.link`."""

    def __init__(
        self,
        id: int,
        sock: socket.socket,
        secret: str,
        max_buffered_bytes: int,
        on_abort: Callable[[GatewayLink, list[int]], None],
        on_lost: Callable[[GatewayLink], None],
    ) -> None:
        self.id = id
        """Never used twice by one client: a gateway that connects anew gets a new one."""
        self.secret = secret
        """Names the gateway."""
        self._sock = sock
        self._max_buffered_bytes = max_buffered_bytes
        self._on_abort = on_abort
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._broken = False
        """Nothing can be sent any more; the loop closes the link or has done so."""
        self._open = True
        self._reader = FrameReader()
        self._loop.add_reader(sock.fileno(), self._readable)

    def send_updates(self, updates: Sequence[Update]) -> bool:
        """Send updates in order, from any thread, without blocking: what the socket does not take now is kept and
        sent by the loop. False when the link is lost (`on_lost` tells, too)."""
        return self._send(encode_updates(updates))

    def send_stats(self, figures: dict[str, Any]) -> bool:
        """Send an engine's figures, like `send_updates`."""
        return self._send(encode_stats(figures))

    @property
    def is_open(self) -> bool:
        """False once the link was lost or closed."""
        return self._open

    @property
    def num_buffered_bytes(self) -> int:
        """Bytes that the gateway has not taken yet."""
        return len(self._pending)

    def close(self) -> None:
        """End the connection, without callbacks; unsent updates are dropped. On the loop."""
        with self._lock:
            if not self._open:
                return
            self._open, self._broken = False, True
            self._pending.clear()
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()

    def _send(self, frame: bytes) -> bool:
        with self._lock:
            if self._broken:
                return False
            waiting = bool(self._pending)
            sent = 0 if waiting else self._try_send(frame)
            if sent < len(frame) and not self._broken:
                self._pending += memoryview(frame)[sent:]
                if len(self._pending) > self._max_buffered_bytes:
                    self._broken = True
            if self._broken:
                self._on_loop(self._lose)
            elif self._pending and not waiting:
                self._on_loop(self._watch_writable)
            return not self._broken

    def _try_send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._broken = True
            return 0

    def _on_loop(self, callback: Callable[[], None]) -> None:
        # The engine's thread may outlive the loop by a step, at the end of the process.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _watch_writable(self) -> None:
        if self._open:
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def _writable(self) -> None:
        with self._lock:
            if self._pending and not self._broken:
                with memoryview(self._pending) as view:
                    sent = self._try_send(view[:_WRITE_BYTES])
                del self._pending[:sent]
            if not self._pending and self._open:
                self._loop.remove_writer(self._sock.fileno())
        if self._broken:
            self._lose()

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        try:
            for message in self._reader.feed(data):
                if not isinstance(message, Abort):
                    raise ProtocolError("a gateway may send aborts only")
                self._on_abort(self, message.handles)
                if not self._open:
                    return
        except ProtocolError as error:
            logger.warning("token stream: a gateway broke the protocol: %s", error)
            self._lose()

    def _lose(self) -> None:
        if self._open:
            self.close()
            self._on_lost(self)


def _succeeded(task: asyncio.Task[GatewayLink]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
