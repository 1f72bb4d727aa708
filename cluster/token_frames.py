"""What engines and gateways say to each other beside Ray: frames of 4 bytes length (little-endian) and a msgpack list
whose first item names the kind. Owns the bytes; knows nothing of sockets, and trusts no peer.

    engine -> gateway   [0, version, secret, engine id]     hello, always first
                        [1, [update, ...]]                  what a step produced
                        [3, {name: number}]                 figures, now and then
    gateway -> engine   [2, [handle, ...]]                  requests nobody waits for any more

    update = [handle, token ids, logprobs | nil, end | nil]
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from .errors import ProtocolError

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 << 20
MAX_HELLO_BYTES = 4096
_HEADER = struct.Struct("<I")
_HELLO, _UPDATES, _ABORT, _STATS = range(4)

Update = list[Any]
"""[handle: int, token_ids: list[int], logprobs: list | None, end: dict | None], as in this module's docstring."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who connects, and the proof that the gateway invited it."""

    version: int
    secret: str
    engine_id: str


@dataclass(frozen=True, slots=True)
class Updates:
    """Progress of any number of requests, in the order it was made."""

    updates: list[Update]


@dataclass(frozen=True, slots=True)
class Abort:
    """Handles whose requests shall end now."""

    handles: list[int]


@dataclass(frozen=True, slots=True)
class Stats:
    """An engine's figures."""

    figures: dict[str, Any]


Message = Hello | Updates | Abort | Stats


def encode_hello(secret: str, engine_id: str) -> bytes:
    """The frame that opens a connection."""
    return _frame([_HELLO, PROTOCOL_VERSION, secret, engine_id])


def encode_updates(updates: Sequence[Update]) -> bytes:
    """One frame, or several where one would be larger than a frame may be."""
    payload = _pack([_UPDATES, updates])
    if len(payload) > MAX_FRAME_BYTES and len(updates) > 1:
        half = len(updates) // 2
        return encode_updates(updates[:half]) + encode_updates(updates[half:])
    return _framed(payload)


def encode_abort(handles: Sequence[int]) -> bytes:
    """A frame that ends requests."""
    return _frame([_ABORT, list(handles)])


def encode_stats(figures: Mapping[str, Any]) -> bytes:
    """A frame of figures."""
    return _frame([_STATS, dict(figures)])


def _frame(message: list[Any]) -> bytes:
    return _framed(_pack(message))


def _pack(message: list[Any]) -> bytes:
    payload = msgpack.packb(message)
    assert payload is not None
    return payload


def _framed(payload: bytes) -> bytes:
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(payload)) + payload


class FrameReader:
    """Turns a byte stream, cut anywhere, into messages. Holds at most one unfinished frame of `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        """May be changed between messages: it applies to lengths read from then on."""
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that `data` completes. Raises `ProtocolError` at the first bad one, after those before
        it. Exhaust the iterator before the next call."""
        pending = self._pending
        pending += data
        start = 0
        try:
            while len(pending) - start >= _HEADER.size:
                (size,) = _HEADER.unpack_from(pending, start)
                if size > self.max_bytes:
                    raise ProtocolError(f"a frame of {size} bytes is over the limit of {self.max_bytes}")
                end = start + _HEADER.size + size
                if len(pending) < end:
                    break
                payload = bytes(pending[start + _HEADER.size : end])
                start = end
                yield _decode(payload)
        finally:
            del pending[:start]


def _decode(payload: bytes) -> Message:
    try:
        message = msgpack.unpackb(payload)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame is not msgpack: {error}") from error
    match message:
        case [1, list(updates)] if all(map(_is_update, updates)):
            return Updates(updates)
        case [2, list(handles)] if all(type(handle) is int for handle in handles):
            return Abort(handles)
        case [3, dict(figures)] if all(type(name) is str for name in figures):
            return Stats(figures)
        case [0, int(version), str(secret), str(engine_id)]:
            return Hello(version, secret, engine_id)
    raise ProtocolError("a frame holds no known message")


def _is_update(update: Any) -> bool:
    return (
        type(update) is list
        and len(update) == 4
        and type(update[0]) is int
        and type(update[1]) is list
        and (update[2] is None or (type(update[2]) is list and len(update[2]) == len(update[1])))
        and (update[3] is None or type(update[3]) is dict)
        and all(type(token) is int for token in update[1])
    )
