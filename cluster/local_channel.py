"""A connection to a server in the same process, for shards that run as threads and for tests: the slots of shared
memory without the sharing and without a handshake, over a pair of sockets as the doorbell."""

from __future__ import annotations

import socket

from .expert_frames import DTYPES
from .handshake import Terms
from .host_slots import HostSlots
from .slot_channel import SlotChannel
from .transport_server import TransportServer


def connect_local(server: TransportServer, *, max_rows: int, max_calls: int) -> SlotChannel:
    """A channel to a started server of this process."""
    layout = server.layout
    ours, theirs = socket.socketpair()
    slots = HostSlots(layout, max_rows, max_calls)
    server.adopt(theirs, slots, Terms(layout.hidden, DTYPES[layout.dtype], max_rows, max_calls, "host"))
    return SlotChannel(ours, slots, layout, max_rows, max_calls)
