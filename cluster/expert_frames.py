"""What engines and shards say to each other once the handshake is done: a header of 64 bytes (little-endian), followed
by `payload` bytes. Owns the bytes of headers and groups; knows nothing of sockets, slots or who may say what.

    COMPUTE     groups (u32 expert, u32 rows)*, then the rows unless they lie in a slot of memory that both ends share
    RESULT      the rows, likewise; as many as the COMPUTE had
    ERROR       a message in UTF-8
    STALE_MAP, BUSY     nothing

There is no pickle, and a connection ends at the first header whose checksum is wrong."""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .errors import ProtocolError

PROTOCOL_VERSION = 1
HEADER_BYTES = 64
GROUP_BYTES = 8
MAX_MESSAGE_BYTES = 1024
DTYPES = {torch.float32: 1, torch.bfloat16: 2}
"""The dtypes of rows, and their codes in headers."""


_new: Any = tuple.__new__  # a named tuple's own ways cost more than decoding it


class Kind(enum.IntEnum):
    """What a frame is."""

    COMPUTE = 1
    RESULT = 2
    STALE_MAP = 3
    """The shard does not host an expert that the call names."""
    BUSY = 4
    """The shard has too many rows waiting."""
    ERROR = 5


MAGIC = 0x44524548  # "HERD"
_HEADER = struct.Struct("<IBBBxQQIIIIIIQII")
_UNCHECKED = struct.Struct("<IBBBxQQIIIIIIQI")
_CHECKSUM = struct.Struct("<I")
_GROUP = struct.Struct("<II")
assert _HEADER.size == _UNCHECKED.size + _CHECKSUM.size == HEADER_BYTES


class Header(NamedTuple):
    """A frame's first 64 bytes."""

    magic: int
    version: int
    kind: int
    dtype: int
    epoch: int
    call_id: int
    layer: int
    rows: int
    hidden: int
    num_groups: int
    timeout_us: int
    load: int
    payload: int
    """Bytes that follow on the stream."""
    slot: int
    """The engine numbers its calls in flight by it, and rows in shared memory lie there."""
    checksum: int
    """CRC-32 of everything before it."""


def encode_header(
    *,
    kind: int,
    dtype: int,
    epoch: int,
    call_id: int,
    layer: int,
    rows: int,
    hidden: int,
    num_groups: int,
    timeout_us: int,
    load: int,
    payload: int,
    slot: int,
    magic: int = MAGIC,
    version: int = PROTOCOL_VERSION,
) -> bytes:
    """The 64 bytes that open a frame, fields as in `Header`."""
    head = _UNCHECKED.pack(
        magic, version, kind, dtype, epoch, call_id, layer, rows, hidden, num_groups, timeout_us, load, payload, slot
    )
    return head + _CHECKSUM.pack(zlib.crc32(head))


def decode_header(buffer: memoryview, offset: int = 0) -> Header:
    """The header at `offset`. Raises `ProtocolError` unless magic, version and checksum are right."""
    header: Header = _new(Header, _HEADER.unpack_from(buffer, offset))
    if zlib.crc32(buffer[offset : offset + _UNCHECKED.size]) != header.checksum:
        raise ProtocolError("a header's checksum is wrong")
    if header.magic != MAGIC or header.version != PROTOCOL_VERSION:
        raise ProtocolError(f"a header of magic {header.magic:#x}, version {header.version}")
    return header


def encode_groups(groups: Sequence[tuple[int, int]]) -> bytes:
    """(expert, rows) pairs as they follow a COMPUTE's header."""
    return b"".join([_GROUP.pack(expert, rows) for expert, rows in groups])


def decode_groups(buffer: memoryview, rows: int) -> list[tuple[int, int]]:
    """The inverse of `encode_groups`. Raises `ProtocolError` unless every group has rows, `rows` of them in all."""
    groups = list(_GROUP.iter_unpack(buffer))
    left = rows
    for _, count in groups:
        if count == 0:
            raise ProtocolError("a group without rows")
        left -= count
    if left:
        raise ProtocolError(f"groups of {rows - left} rows in a call of {rows}")
    return groups


def encode_message(message: str) -> bytes:
    """An ERROR's payload; a long message loses its end."""
    return message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]


def decode_message(buffer: memoryview) -> str:
    """The inverse of `encode_message`; never fails."""
    return str(buffer, "utf-8", "replace")
