"""A shard's end of a connection that has not proven itself yet: runs `handshake.shard_part` over a non-blocking socket,
holds little memory, trusts nothing, and closes what it does not hand over."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from .handshake import (
    MAX_MESSAGE_BYTES,
    PREFIX,
    Terms,
    agreed,
    decode_body,
    decode_prefix,
    encode_message,
    refusal,
    shard_part,
)
from .transport import HandshakeRefused, PeerLost, RowLayout

_MAX_FDS = 1


class GreetingPeer:
    """`receive` whenever the socket is readable, until `terms` is there; then `agree` or `refuse`."""

    def __init__(
        self, sock: socket.socket, token: str, shard_id: str, model: str, layout: RowLayout, deadline_s: float
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.deadline_s = deadline_s
        """When it counts as silent."""
        self.terms: Terms | None = None
        self.memfd = -1
        """What came beside the last message."""
        self._is_unix = sock.family == socket.AF_UNIX
        self._part = shard_part(token, shard_id, model, layout)
        next(self._part)
        self._pending = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> None:
        """Take in what has arrived, and answer. Raises `HandshakeRefused`, or `PeerLost` when it is gone."""
        try:
            data = self._read()
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerLost(str(error)) from error
        if not data:
            raise PeerLost("it closed the connection")
        self._pending += data
        while len(self._pending) >= PREFIX.size:
            end = PREFIX.size + decode_prefix(bytes(self._pending[: PREFIX.size]))
            if len(self._pending) < end:
                return
            message = decode_body(bytes(self._pending[PREFIX.size : end]))
            del self._pending[:end]
            try:
                self._send(encode_message(self._part.send(message)))
            except StopIteration as finished:
                self.terms = finished.value
                if self._pending:
                    raise HandshakeRefused("an engine does not wait for the end of the handshake", "garbage") from None
                return

    def agree(self) -> socket.socket:
        """Hand over the socket of a peer that is accepted. Raises `PeerLost`."""
        self._send(encode_message(agreed()))
        self._drop_memfd()
        return self.sock

    def refuse(self, reason: str) -> None:
        """Tell the peer why, and close."""
        with suppress(PeerLost):
            self._send(refusal(reason))
        self.close()

    def close(self) -> None:
        self._drop_memfd()
        self.sock.close()

    def _read(self) -> bytes:
        room = PREFIX.size + MAX_MESSAGE_BYTES
        if not self._is_unix:
            return self.sock.recv(room)
        data, fds, _, _ = socket.recv_fds(self.sock, room, _MAX_FDS)
        for fd in fds:
            self._drop_memfd()
            self.memfd = fd
        return data

    def _drop_memfd(self) -> None:
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1

    def _send(self, data: bytes) -> None:
        try:
            sent = self.sock.send(data)
        except OSError as error:  # also when its buffer is full: nobody needs that in a handshake
            raise PeerLost(str(error)) from error
        if sent < len(data):
            raise PeerLost("it does not read")
