"""How an engine connects to a shard: through memory that both share where they are on one node (a GPU's where both
compute on one), else by TCP. Blocks: for a background thread. Owns no connection."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from .cuda_slots import CudaSlots
from .expert_map import ShardEndpoint
from .frame_channel import FrameChannel
from .handshake import (
    MAX_CALLS,
    PREFIX,
    Message,
    check_agreed,
    decode_body,
    decode_prefix,
    encode_message,
    engine_part,
    terms_message,
)
from .host_slots import HostSlots, create_memfd
from .row_slots import MAX_SLOT_BYTES, slot_bytes
from .slot_channel import SlotChannel
from .tcp_channel import TcpChannel
from .token_sockets import tune_data_socket
from .transport import HandshakeRefused, PeerLost, RowLayout

_MAX_REMEMBERED = 1024
_without_cuda: set[str] = set()
"""Shards that memory of a GPU could not be shared with: it is not tried again, see `_Greeting.settle`."""


def connect(
    endpoint: ShardEndpoint,
    *,
    my_node_id: str,
    token: str,
    model: str,
    layout: RowLayout,
    max_rows: int,
    max_calls: int,
    timeout_s: float,
) -> FrameChannel:
    """A channel to the shard at `endpoint`. Raises `PeerLost`, of which `HandshakeRefused` says why one end does not
    want the other."""
    assert 1 <= max_calls <= MAX_CALLS
    assert slot_bytes(layout, max_rows) <= MAX_SLOT_BYTES
    deadline = time.monotonic() + timeout_s
    ways = ["stream"]
    if endpoint.node_id == my_node_id and endpoint.uds and os.path.exists(endpoint.uds):
        ways = ["host", "stream"]
        if layout.device.type == "cuda" and endpoint.shard_id not in _without_cuda:
            ways.insert(0, "cuda")
    while True:
        way = ways.pop(0)
        greeting = _Greeting(endpoint, way != "stream", deadline)
        try:
            device = greeting.prove(token, endpoint.shard_id, model)
            channel = greeting.settle("host" if way == "cuda" != device else way, layout, max_rows, max_calls)
        except HandshakeRefused as error:
            greeting.close()
            if error.reason != "slots" or not ways:
                raise
        except BaseException:
            greeting.close()
            raise
        else:
            return channel


class _Greeting:
    """A connection that is no channel yet. Everything raises `PeerLost`."""

    def __init__(self, endpoint: ShardEndpoint, on_node: bool, deadline: float) -> None:
        self._shard_id = endpoint.shard_id
        self._deadline = deadline
        try:
            if on_node:
                self._sock = socket.socket(socket.AF_UNIX)
                self._sock.settimeout(self._time_left())
                self._sock.connect(endpoint.uds)
            else:
                self._sock = socket.create_connection((endpoint.host, endpoint.port), self._time_left())
                tune_data_socket(self._sock)
        except OSError as error:
            where = endpoint.uds if on_node else f"{endpoint.host}:{endpoint.port}"
            raise PeerLost(f"no connection to {where}: {error}") from error

    def close(self) -> None:
        self._sock.close()

    def prove(self, token: str, shard_id: str, model: str) -> str:
        """Prove ourselves and have the shard do so; the type of its device."""
        part = engine_part(token, shard_id, model)
        message = next(part)
        while True:
            self._send(message)
            try:
                message = part.send(self._receive())
            except StopIteration as end:
                return end.value

    def settle(self, rows: str, layout: RowLayout, max_rows: int, max_calls: int) -> FrameChannel:
        """Agree on where rows travel, and hand the socket over to a channel."""
        size = (layout, max_rows, max_calls)
        memfd = -1
        try:
            if rows == "cuda":
                return self._settle_on_cuda(*size)
            if rows == "stream":
                slots = HostSlots(*size)
                self._agree(terms_message(*size, rows, None))
                return TcpChannel(self._sock, slots, *size)
            memfd = create_memfd(*size)
            slots = HostSlots(*size, memfd)
            self._agree(terms_message(*size, rows, None), [memfd])
            return SlotChannel(self._sock, slots, *size)
        except (OSError, AttributeError, RuntimeError) as error:  # no memfd (macOS); CUDA, also out of memory
            raise HandshakeRefused(f"no memory for rows on this node: {error}", "slots") from error
        finally:
            if memfd >= 0:
                os.close(memfd)

    def _settle_on_cuda(self, layout: RowLayout, max_rows: int, max_calls: int) -> SlotChannel:
        """CUDA keeps memory that was shared until the other process lets go of it, for as long as this process lives
        if that never does: a shard that does not map the slots, or is killed, costs this GPU their bytes. So whoever
        did not map them once is not offered more; what a killed shard had mapped is lost."""
        if len(_without_cuda) >= _MAX_REMEMBERED:
            _without_cuda.clear()
        _without_cuda.add(self._shard_id)  # until it worked
        cuda = CudaSlots.create(layout, max_rows, max_calls)
        self._agree(terms_message(layout, max_rows, max_calls, "cuda", cuda.handle()))
        _without_cuda.discard(self._shard_id)
        return SlotChannel(self._sock, cuda, layout, max_rows, max_calls)

    def _agree(self, terms: Message, fds: Sequence[int] = ()) -> None:
        self._send(terms, fds)
        check_agreed(self._receive())

    def _time_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise PeerLost("the shard did not answer in time")
        return left

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        data = encode_message(message)
        try:
            self._sock.settimeout(self._time_left())
            if fds:
                socket.send_fds(self._sock, [data[:1]], list(fds))
                data = data[1:]
            self._sock.sendall(data)
        except OSError as error:
            raise PeerLost(f"the shard ended the handshake: {error}") from error

    def _receive(self) -> Message:
        return decode_body(self._exactly(decode_prefix(self._exactly(PREFIX.size))))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                self._sock.settimeout(self._time_left())
                part = self._sock.recv(size - len(data))
            except OSError as error:
                raise PeerLost(f"the shard ended the handshake: {error}") from error
            if not part:
                raise PeerLost("the shard ended the handshake")
            data += part
        return bytes(data)
