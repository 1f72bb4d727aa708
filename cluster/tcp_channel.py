"""An engine's end of a connection to a shard on another node: rows follow the frames, sent from where they are and
received into slots of this process."""

from __future__ import annotations

import ctypes

from .frame_channel import FrameChannel
from .transport import Call

_MAX_PIECES = 64
"""More ranges than this cost more to gather than to copy."""
_READ_ONLY = 0x100
_view_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_memory.restype = ctypes.py_object


class TcpChannel(FrameChannel):
    """See `transport.Channel`."""

    rows_in_stream = True

    def _send_call(self, slot: int, head: bytes, call: Call, num_bytes: int) -> None:
        copied = not self._on_host or len(call.ranges) > _MAX_PIECES
        if copied:
            self._slots.write(slot, call.rows_ND, call.ranges)
            views = [self._slots.memory(slot, num_bytes)]
        else:
            address, row = call.rows_ND.data_ptr(), self._row_bytes
            views = [_view_memory(address + s * row, (e - s) * row, _READ_ONLY) for s, e in call.ranges]
        sent = 0 if self._unsent else self._send(head, views)
        if sent < len(head) + num_bytes:
            if not copied:
                self._slots.write(slot, call.rows_ND, call.ranges)
            self._queue(head, self._slots.memory(slot, num_bytes), sent, slot)
