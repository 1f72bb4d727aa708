"""An engine's end of a connection to a shard that shares memory with it: rows lie in a slot, and only doorbells
(headers and groups) travel over the socket, whose end tells at once that the shard died."""

from __future__ import annotations

from .frame_channel import FrameChannel
from .transport import Call


class SlotChannel(FrameChannel):
    """See `transport.Channel`."""

    rows_in_stream = False

    def _send_call(self, slot: int, head: bytes, call: Call, num_bytes: int) -> None:
        self._slots.write(slot, call.rows_ND, call.ranges)
        sent = 0 if self._unsent else self._send(head)
        if sent < len(head):
            self._queue(head, None, sent, slot)
