"""A shard's end of a connection to an engine: checks what arrives, makes requests of it, sends the answers. Whatever
the engine sends, at most this connection ends. Knows nothing of other peers, nor of what is computed.

Shapes: N rows, D hidden."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

from .errors import ProtocolError
from .expert_frames import DTYPES, GROUP_BYTES, HEADER_BYTES, Header, Kind, decode_groups, encode_header, encode_message
from .frame_stream import FrameStream
from .handshake import Terms
from .row_slots import RowSlots, slot_bytes
from .transport import PeerLost, Request, RowLayout


class PeerOwner(Protocol):
    """What a peer needs of the server."""

    def accept(self, request: Request) -> None:
        """A request is whole."""
        ...

    def release(self, request: Request) -> int:
        """A request is answered; returns the rows of others that wait."""
        ...

    def lost(self, peer: FramePeer, reason: str) -> None:
        """A peer can be sent nothing any more; close it once nobody works on its requests."""
        ...

    def watch(self, peer: FramePeer) -> None:
        """`wants_write` may have changed."""
        ...


class FramePeer(FrameStream):
    """One engine, whose rows lie in `slots`: slot s belongs to the engine's call number s until the reply is sent."""

    def __init__(
        self,
        owner: PeerOwner,
        sock: socket.socket,
        slots: RowSlots,
        layout: RowLayout,
        terms: Terms,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(sock, terms.max_rows * GROUP_BYTES)
        self.slot_bytes = slot_bytes(layout, terms.max_rows) * terms.max_calls
        """Memory of all its slots."""
        self.waiting_rows = 0
        """See `transport.Caller`."""
        self.writing = False
        """Whether the server watches for room in the socket."""
        self._owner = owner
        self._slots = slots
        self._rows_in_stream = terms.rows == "stream"
        self._max_rows = terms.max_rows
        self._hidden = layout.hidden
        self._row_bytes = layout.row_bytes
        self._dtype = DTYPES[layout.dtype]
        self._clock = clock
        self._is_free = [True] * terms.max_calls

    def publish(self, request: Request) -> None:
        """See `transport.Caller`."""
        self._slots.publish(request.slot, request.rows_ND)

    def reply(self, request: Request, kind: Kind, message: str) -> None:
        """See `Request.reply`, which calls it."""
        if self.fileno() < 0:
            return  # it went while the handler kept the request
        slot, num_rows = request.slot, request.num_rows
        load = self._owner.release(request)
        payload, inline, body = 0, b"", None
        if kind == Kind.RESULT and self._rows_in_stream:
            payload = num_rows * self._row_bytes
            body = self._slots.memory(slot, payload)
        elif kind == Kind.ERROR:
            inline = encode_message(message)
            payload = len(inline)
        head = encode_header(
            kind=kind,
            dtype=self._dtype,
            epoch=request.epoch,
            call_id=request.call_id,
            layer=request.layer,
            rows=num_rows,
            hidden=self._hidden,
            num_groups=0,
            timeout_us=0,
            load=load,
            payload=payload,
            slot=slot,
        )
        try:
            if self._unsent:
                sent = 0
            else:
                sent = self._send(head + inline) if body is None else self._send(head, (body,))
        except PeerLost as error:
            self._owner.lost(self, str(error))
            return
        if sent == HEADER_BYTES + payload:
            self._is_free[slot] = True
        else:
            self._queue(head + inline, body, sent, slot)
            self._owner.watch(self)

    def _sent(self, slot: int) -> None:
        self._is_free[slot] = True

    def _inline_bytes(self, header: Header) -> int:
        num_rows, slot, num_inline = header.rows, header.slot, header.num_groups * GROUP_BYTES
        if header.kind != Kind.COMPUTE or header.dtype != self._dtype or header.hidden != self._hidden:
            raise ProtocolError(f"a call of kind {header.kind}, dtype {header.dtype}, hidden {header.hidden}")
        if not 1 <= header.num_groups <= num_rows <= self._max_rows:
            raise ProtocolError(f"a call of {num_rows} rows in {header.num_groups} groups")
        if header.payload != num_inline + (num_rows * self._row_bytes if self._rows_in_stream else 0):
            raise ProtocolError(f"a call of {num_rows} rows with {header.payload} bytes")
        if not (slot < len(self._is_free) and self._is_free[slot]):
            raise ProtocolError("a call in a slot that is taken, or that there is not")
        return num_inline

    def _rows_memory(self, header: Header) -> memoryview:
        return self._slots.memory(header.slot, header.rows * self._row_bytes)

    def _deliver(self, header: Header, inline: memoryview) -> None:
        slot, num_rows = header.slot, header.rows
        groups = decode_groups(inline, num_rows)
        self._is_free[slot] = False
        deadline_s = self._clock() + header.timeout_us * 1e-6
        rows_ND = self._slots.rows(slot, num_rows)
        request = Request(self, header.call_id, header.epoch, header.layer, deadline_s, groups, rows_ND, num_rows, slot)
        self._owner.accept(request)
