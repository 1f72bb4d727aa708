"""What every engine's end of a connection has in common: one slot per call in flight, replies checked against the calls
that they answer. `slot_channel.py` and `tcp_channel.py` say how rows travel.

Shapes: N rows, D hidden."""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .errors import ProtocolError
from .expert_frames import (
    DTYPES,
    GROUP_BYTES,
    MAX_MESSAGE_BYTES,
    Header,
    Kind,
    decode_message,
    encode_groups,
    encode_header,
)
from .frame_stream import FrameStream
from .row_slots import RowSlots
from .transport import Call, PeerLost, Reply, RowLayout

_MAX_TIMEOUT_US = (1 << 32) - 1


class FrameChannel(FrameStream):
    """See `transport.Channel`."""

    rows_in_stream: bool
    """Whether rows follow the frames, or lie in memory that both ends share."""

    def __init__(self, sock: socket.socket, slots: RowSlots, layout: RowLayout, max_rows: int, max_calls: int) -> None:
        super().__init__(sock, MAX_MESSAGE_BYTES)
        self.max_rows, self.max_calls = max_rows, max_calls
        self._slots = slots
        self._layout = layout
        self._on_host = layout.device.type == "cpu"
        self._hidden = layout.hidden
        self._row_bytes = layout.row_bytes
        self._dtype = DTYPES[layout.dtype]
        self._free = list(range(max_calls - 1, -1, -1))
        """The last one freed is used next: it is in the caches."""
        self._sent_calls: dict[int, tuple[int, int]] = {}
        """Slot -> (call id, rows) of calls without a reply."""
        self._replies: list[Reply] = []

    def submit(self, call: Call) -> None:
        groups = call.groups
        num_rows = 0
        for _, count in groups:
            assert count > 0, "a group is empty"
            num_rows += count
        assert 0 < num_rows <= self.max_rows
        assert self._free, "more calls in flight than the channel takes"
        self._check_ranges(call.rows_ND, call.ranges, num_rows)
        slot = self._free.pop()
        num_bytes = num_rows * self._row_bytes
        num_group_bytes = len(groups) * GROUP_BYTES
        timeout_us = int(call.timeout_s * 1e6)
        if not 0 <= timeout_us <= _MAX_TIMEOUT_US:
            timeout_us = 0 if timeout_us < 0 else _MAX_TIMEOUT_US
        header = encode_header(
            kind=Kind.COMPUTE,
            dtype=self._dtype,
            epoch=call.epoch,
            call_id=call.call_id,
            layer=call.layer,
            rows=num_rows,
            hidden=self._hidden,
            num_groups=len(groups),
            timeout_us=timeout_us,
            load=0,
            payload=num_group_bytes + num_bytes if self.rows_in_stream else num_group_bytes,
            slot=slot,
        )
        self._send_call(slot, header + encode_groups(groups), call, num_bytes)
        self._sent_calls[slot] = (call.call_id, num_rows)

    @abstractmethod
    def _send_call(self, slot: int, head: bytes, call: Call, num_bytes: int) -> None:
        """Send a header with its groups, and see to it that the call's rows get there."""

    def poll(self) -> list[Reply]:
        try:
            self.receive()
        except ProtocolError as error:
            raise PeerLost(f"it broke the protocol: {error}") from error
        replies, self._replies = self._replies, []
        return replies

    def take(self, reply: Reply, out_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        slot = reply.slot
        assert slot >= 0, "nothing to take, or taken already"
        self._check_ranges(out_ND, ranges, reply.num_rows)
        self._slots.read(slot, out_ND, ranges)
        reply.slot = -1
        self._free.append(slot)

    def drop(self, reply: Reply) -> None:
        if reply.slot >= 0:
            self._free.append(reply.slot)
            reply.slot = -1

    def _check_ranges(self, tensor_ND: Tensor, ranges: Sequence[tuple[int, int]], num_rows: int) -> None:
        """Rows are copied by address: a range outside of the tensor would be somebody's memory."""
        count = last = 0
        for start, end in ranges:
            assert 0 <= start < end, "a range is empty"
            count += end - start
            if end > last:
                last = end
        assert count == num_rows, "not as many rows as the call has"
        length, hidden = tensor_ND.shape
        assert last <= length
        assert hidden == self._hidden
        assert tensor_ND.is_contiguous()
        assert tensor_ND.dtype is self._layout.dtype
        assert tensor_ND.is_cpu is self._on_host

    def _inline_bytes(self, header: Header) -> int:
        if self._sent_calls.get(header.slot) != (header.call_id, header.rows):
            raise ProtocolError("a reply to no call in flight")
        kind, payload = header.kind, header.payload
        if kind == Kind.RESULT:
            expected = header.rows * self._row_bytes if self.rows_in_stream else 0
            if payload == expected and header.dtype == self._dtype and header.hidden == self._hidden:
                return 0
        elif kind == Kind.ERROR:
            if payload <= MAX_MESSAGE_BYTES:
                return payload
        elif kind in (Kind.STALE_MAP, Kind.BUSY) and not payload:
            return 0
        raise ProtocolError(f"a reply of kind {kind} with {payload} bytes")

    def _rows_memory(self, header: Header) -> memoryview:
        return self._slots.memory(header.slot, header.payload)

    def _deliver(self, header: Header, inline: memoryview) -> None:
        slot = header.slot
        del self._sent_calls[slot]
        if header.kind == Kind.RESULT:
            reply = Reply(header.call_id, Kind.RESULT, header.rows, header.load, "", slot)
        else:
            reply = Reply(header.call_id, Kind(header.kind), header.rows, header.load, decode_message(inline))
            self._free.append(slot)
        self._replies.append(reply)
