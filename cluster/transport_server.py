"""A shard's end of the data plane: one thread that accepts engines, collects their requests and hands them to a handler
that computes. Requests that come while it computes are seen together by its next call. A bad peer costs its own
connection only. Knows nothing of experts."""

from __future__ import annotations

import logging
import os
import select
import shutil
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .cuda_slots import CudaSlots
from .errors import ProtocolError
from .expert_frames import DTYPES, Kind
from .frame_peer import FramePeer
from .greeting_peer import GreetingPeer
from .handshake import Terms
from .host_slots import HostSlots, open_memfd
from .row_slots import MAX_TOTAL_BYTES, RowSlots, slot_bytes
from .token_sockets import private_directory, tune_data_socket
from .transport import HandshakeRefused, PeerLost, Request, RowLayout

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 5.0
MAX_GREETINGS = 128
"""Connections in their handshake; the oldest gives way."""
_MAX_EVENTS = 64

Handler = Callable[[deque[Request]], None]
"""Takes at least one request out of the queue and replies to it."""


@dataclass(slots=True)
class TransportCounters:
    """Totals since the start, written by the server's thread."""

    accepted: int = 0
    """Peers that finished the handshake."""
    refused: Counter[str] = field(default_factory=Counter)
    """Peers that did not, by reason."""
    protocol_errors: int = 0
    """Peers closed because of a frame."""
    peer_failures: int = 0
    """Peers closed because this end failed at what they sent, as for lack of memory."""
    requests: int = 0
    rows: int = 0
    busy: int = 0
    """Requests refused because too many rows waited."""
    abandoned: int = 0
    """Requests whose peer went before the handler took them."""
    handler_errors: int = 0


class TransportServer:
    """Serves from `start` to `stop`. `handler` runs on the server's thread."""

    def __init__(
        self,
        *,
        shard_id: str,
        token: str,
        model: str,
        layout: RowLayout,
        host: str,
        handler: Handler,
        max_queued_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert layout.dtype in DTYPES
        self.counters = TransportCounters()
        self.layout = layout
        self._shard_id, self._token, self._model = shard_id, token, model
        self._host = host
        self._handler = handler
        self._max_queued_rows = max_queued_rows
        self._clock = clock
        self._waiting: deque[Request] = deque()
        self._queued_rows = 0
        """Of all requests without an answer."""
        self._busy_since: float | None = None
        self._greetings: dict[int, GreetingPeer] = {}
        self._peers: dict[int, FramePeer] = {}
        self._broken: list[tuple[FramePeer, str]] = []
        """Peers that could not be sent an answer, to be closed when the handler is done."""
        self._handed: deque[tuple[socket.socket, RowSlots, Terms]] = deque()
        self._stopping = False
        self._directory: Path | None = None
        self._listeners: dict[int, socket.socket] = {}
        self._address = ("", 0, "")

    def start(self) -> tuple[str, int, str]:
        """Bind and serve; returns `address`. Raises OSError."""
        self._directory = private_directory()
        path = str(self._directory / "s")
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        tcp = socket.create_server((self._host, 0), family=family, backlog=128)
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(path)
        unix.listen(128)
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        for listener in (tcp, unix):
            listener.setblocking(False)
            self._listeners[listener.fileno()] = listener
            self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._address = (self._host, tcp.getsockname()[1], path)
        self._thread = threading.Thread(target=self._run, name="transport", daemon=True)
        self._thread.start()
        return self._address

    def stop(self) -> None:
        """End every connection, once the handler's present call is over. May be called twice."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    @property
    def address(self) -> tuple[str, int, str]:
        """Host, TCP port, path of the Unix socket."""
        return self._address

    @property
    def alive(self) -> bool:
        """Whether the thread runs. For health checks, any thread."""
        return self._thread.is_alive()

    @property
    def num_peers(self) -> int:
        """Peers connected now."""
        return len(self._peers)

    @property
    def stuck_for_s(self) -> float:
        """How long the handler has been in its present call; 0.0 between calls. For any thread."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    def adopt(self, sock: socket.socket, slots: RowSlots, terms: Terms) -> None:
        """Serve a peer of this process, which needs no handshake. From any thread."""
        self._handed.append((sock, slots, terms))
        os.eventfd_write(self._wake, 1)

    # What `frame_peer.PeerOwner` asks for.

    def accept(self, request: Request) -> None:
        num_rows = request.num_rows
        self.counters.requests += 1
        self.counters.rows += num_rows
        is_busy = self._queued_rows + num_rows > self._max_queued_rows
        self._queued_rows += num_rows
        request.peer.waiting_rows += num_rows
        if is_busy:
            self.counters.busy += 1
            request.reply(Kind.BUSY)
        else:
            self._waiting.append(request)

    def release(self, request: Request) -> int:
        num_rows = request.num_rows
        self._queued_rows -= num_rows
        request.peer.waiting_rows -= num_rows
        return self._queued_rows - request.peer.waiting_rows

    def lost(self, peer: FramePeer, reason: str) -> None:
        self._broken.append((peer, reason))

    def watch(self, peer: FramePeer) -> None:
        writing = peer.wants_write()
        if writing != peer.writing:
            peer.writing = writing
            self._epoll.modify(peer.fileno(), select.EPOLLIN | (select.EPOLLOUT if writing else 0))

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                for fd, events in self._epoll.poll(0.0 if self._waiting else self._patience(), _MAX_EVENTS):
                    peer = self._peers.get(fd)
                    if peer is not None:
                        self._serve(peer, events)
                    else:
                        self._welcome(fd)
                if self._greetings:
                    self._end_silent()
                while self._broken:
                    self._close(*self._broken.pop())
                if self._waiting:
                    self._handle()
        finally:
            self._close_all()

    def _patience(self) -> float:
        if self._broken:
            return 0.0
        if not self._greetings:
            return -1.0
        first = min(greeting.deadline_s for greeting in self._greetings.values())
        return max(0.0, first - time.monotonic())

    def _serve(self, peer: FramePeer, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                peer.flush()
                self.watch(peer)
            if events & ~select.EPOLLOUT:
                peer.receive()
        except ProtocolError as error:
            self.counters.protocol_errors += 1
            self._close(peer, f"it broke the protocol: {error}")
        except PeerLost as error:
            self._close(peer, str(error))
        except Exception as error:  # the edge of the thread: the other engines still need this shard
            self.counters.peer_failures += 1
            logger.exception("data plane: the shard failed at what a peer sent")
            self._close(peer, f"the shard failed: {error}")

    def _handle(self) -> None:
        waiting = self._waiting
        offered = tuple(waiting)
        self._busy_since = self._clock()
        try:
            self._handler(waiting)
        except Exception as error:  # the edge of the thread: a defect must not end the shard
            self.counters.handler_errors += 1
            logger.exception("the handler failed")
            waiting.clear()
            for request in offered:
                if not request.is_replied:
                    request.reply(Kind.ERROR, f"the shard failed: {error}")
        self._busy_since = None
        assert len(waiting) < len(offered), "the handler took no request"

    def _welcome(self, fd: int) -> None:
        """Something that is no peer yet: a listener, a handshake, or a call from another thread."""
        if fd in self._listeners:
            self._accept_connection(self._listeners[fd])
        elif fd in self._greetings:
            self._greet(self._greetings[fd])
        elif fd == self._wake:
            os.eventfd_read(self._wake)
            while self._handed:
                self._add(*self._handed.popleft())

    def _accept_connection(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # gone before it was accepted
            return
        if sock.family != socket.AF_UNIX:
            with suppress(OSError):  # gone as well: the handshake will see it
                tune_data_socket(sock)
        if len(self._greetings) >= MAX_GREETINGS:
            self._refuse(min(self._greetings.values(), key=lambda greeting: greeting.deadline_s), "full")
        deadline_s = time.monotonic() + GREETING_TIMEOUT_S
        greeting = GreetingPeer(sock, self._token, self._shard_id, self._model, self.layout, deadline_s)
        self._greetings[sock.fileno()] = greeting
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _greet(self, greeting: GreetingPeer) -> None:
        try:
            greeting.receive()
            if greeting.terms is not None:
                slots = self._open_slots(greeting, greeting.terms)
                self._forget(greeting)
                self._add(greeting.agree(), slots, greeting.terms)
        except HandshakeRefused as error:
            logger.info("data plane: %s", error)  # a port scanner shall not fill the log
            self._refuse(greeting, error.reason)
        except PeerLost:
            self._refuse(greeting, "left")
        except Exception:  # the edge of the thread, as in `_serve`
            logger.exception("data plane: the shard failed at a handshake")
            self._refuse(greeting, "failed")

    def _open_slots(self, greeting: GreetingPeer, terms: Terms) -> RowSlots:
        layout, rows, calls = self.layout, terms.max_rows, terms.max_calls
        if rows > self._max_queued_rows:
            raise HandshakeRefused(f"an engine wants calls of {rows} rows", "limits")
        in_use = sum(peer.slot_bytes for peer in self._peers.values())
        if in_use + slot_bytes(layout, rows) * calls > MAX_TOTAL_BYTES:
            raise HandshakeRefused(f"there is no memory for {calls} calls of {rows} rows", "full")
        if terms.rows == "cuda":
            return CudaSlots.open(terms.cuda or [], layout, rows, calls)
        if terms.rows == "host":
            return open_memfd(greeting.memfd, layout, rows, calls)
        try:
            return HostSlots(layout, rows, calls)
        except OSError as error:
            raise HandshakeRefused(f"there is no memory: {error}", "full") from error

    def _add(self, sock: socket.socket, slots: RowSlots, terms: Terms) -> None:
        peer = FramePeer(self, sock, slots, self.layout, terms, self._clock)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._peers[sock.fileno()] = peer
        self.counters.accepted += 1

    def _end_silent(self) -> None:
        now = time.monotonic()
        for greeting in [g for g in self._greetings.values() if g.deadline_s <= now]:
            self._refuse(greeting, "silent")

    def _refuse(self, greeting: GreetingPeer, reason: str) -> None:
        self.counters.refused[reason] += 1
        self._forget(greeting)
        greeting.refuse(reason)

    def _forget(self, greeting: GreetingPeer) -> None:
        if self._greetings.pop(greeting.fileno(), None) is not None:
            self._epoll.unregister(greeting.fileno())

    def _close(self, peer: FramePeer, reason: str) -> None:
        if self._peers.pop(peer.fileno(), None) is not peer:
            return  # seen twice: it could be sent nothing, and then had nothing to say
        logger.info("data plane: a peer is gone: %s", reason)
        self._epoll.unregister(peer.fileno())
        peer.close()
        kept = [request for request in self._waiting if request.peer is not peer]
        self.counters.abandoned += len(self._waiting) - len(kept)
        self._waiting.clear()
        self._waiting.extend(kept)
        self._queued_rows -= peer.waiting_rows
        peer.waiting_rows = 0

    def _close_all(self) -> None:
        for greeting in list(self._greetings.values()):
            self._refuse(greeting, "left")
        for peer in list(self._peers.values()):
            self._close(peer, "the server stops")
        for listener in self._listeners.values():
            listener.close()
        self._epoll.close()
        assert self._directory is not None
        shutil.rmtree(self._directory, ignore_errors=True)
