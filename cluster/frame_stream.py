"""A stream socket that carries frames: cuts what arrives into them, and keeps what the socket does not take. Base of
both ends of a connection, which say what a good header is and what to do with a frame. Never blocks."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from .expert_frames import HEADER_BYTES, Header, decode_header
from .transport import PeerLost

_READ_BYTES = 64 << 10
"""What is received at once before the rows' own memory is known. More saves calls for small frames, less saves copies
for large ones, so that after a larger frame it is `_READ_LESS_BYTES`."""
_READ_LESS_BYTES = 4 << 10


class FrameStream(ABC):
    """Frames are a header, `_inline_bytes(header)` bytes of groups or message, and the payload's rest: rows, which are
    received straight into `_rows_memory(header)`."""

    def __init__(self, sock: socket.socket, max_inline_bytes: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = memoryview(bytearray(max(_READ_BYTES, HEADER_BYTES + max_inline_bytes)))
        self._less = max(_READ_LESS_BYTES, HEADER_BYTES + max_inline_bytes)
        self._limit = len(self._buffer)
        """How far the buffer is filled at once."""
        self._end = 0
        """Bytes of `_buffer` that wait for the rest of their header or inline bytes."""
        self._header: Header | None = None
        """Of the frame whose rows are being received, into the rest of `_rows`."""
        self._inline = memoryview(b"")
        self._rows = memoryview(b"")
        self._unsent: deque[tuple[memoryview, int]] = deque()

    @abstractmethod
    def _inline_bytes(self, header: Header) -> int:
        """Check a header (perhaps again), and say how much follows it before the rows. Raises `ProtocolError`."""

    @abstractmethod
    def _rows_memory(self, header: Header) -> memoryview:
        """Where the rows go, at their exact size."""

    @abstractmethod
    def _deliver(self, header: Header, inline: memoryview) -> None:
        """A frame is whole. `inline` is valid during the call. Raises `ProtocolError`."""

    def _sent(self, slot: int) -> None:  # noqa: B027 - a hook, and most have nothing to do
        """The socket has taken the rest of the frame that was queued for `slot`."""

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def wants_write(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> None:
        """Raises `PeerLost`, like everything that uses the socket."""
        while self._unsent:
            piece, slot = self._unsent[0]
            sent = self._send(piece)
            if sent < len(piece):
                self._unsent[0] = (piece[sent:], slot)
                return
            self._unsent.popleft()
            if slot >= 0:
                self._sent(slot)

    def _send(self, head: bytes | memoryview, bodies: Sequence[memoryview] = ()) -> int:
        """How many bytes the socket took. Not while others are queued, which must not be overtaken."""
        try:
            return self._sock.sendmsg((head, *bodies)) if bodies else self._sock.send(head)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerLost(str(error)) from error

    def _queue(self, head: bytes, body: memoryview | None, sent: int, slot: int) -> None:
        """Keep what is left of a frame after `sent` bytes. `body` must stay as it is until `_sent(slot)`."""
        left = [memoryview(head)[sent:]] if sent < len(head) else []
        if body is not None:
            left.append(body[max(0, sent - len(head)) :])
        for piece in left[:-1]:
            self._unsent.append((piece, -1))
        self._unsent.append((left[-1], slot))

    def receive(self) -> None:
        """Take in what has arrived. Raises `PeerLost` or `ProtocolError`; the connection is of no use then."""
        while True:
            header = self._header
            target = self._rows if header else self._buffer[self._end : self._limit]
            try:
                count = self._sock.recv_into(target)
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerLost(str(error)) from error
            if count == 0:
                raise PeerLost("it closed the connection")
            if header is None:
                self._cut(self._end + count)
            elif count < len(target):
                self._rows = target[count:]
            else:
                self._header = None
                self._deliver(header, self._inline)
            if count < len(target):
                return  # the socket is empty: asking again would only raise

    def _cut(self, end: int) -> None:
        """Deliver the whole frames in the buffer's first `end` bytes; keep the rest at its front."""
        buffer, start = self._buffer, 0
        while end - start >= HEADER_BYTES:
            header = decode_header(buffer, start)
            num_inline = self._inline_bytes(header)
            body = start + HEADER_BYTES
            if end - body < num_inline:
                break
            start = body + num_inline
            inline = buffer[body:start]
            num_rows = header.payload - num_inline
            if num_rows:
                self._limit = self._less if num_rows > _READ_BYTES else len(buffer)
                rows = self._rows_memory(header)
                have = min(end - start, num_rows)
                rows[:have] = buffer[start : start + have]
                start += have
                if have < num_rows:
                    self._header, self._inline, self._rows = header, memoryview(bytes(inline)), rows[have:]
                    break
            self._deliver(header, inline)
        if 0 < start < end:
            buffer[: end - start] = buffer[start:end]
        self._end = end - start
