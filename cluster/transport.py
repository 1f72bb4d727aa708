"""The data plane as its users see it: an engine's `Channel` to one shard, the calls and replies that travel over it,
how it ends, and the `Request` that a call is on the shard. Interfaces and values only: sockets, memory and the
protocol are in the modules that implement them.

Shapes: N rows, D hidden. A channel belongs to one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .expert_frames import Kind


class PeerLost(Exception):
    """The other end is gone or broke the protocol; the message says which."""


class HandshakeRefused(PeerLost):
    """One end does not accept the other: another token, model, shard, protocol version or layout of rows."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """One word, for counters."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """What the rows of every call over a connection look like. `device` is where this end keeps its tensors; the
    other end may differ in it."""

    hidden: int
    dtype: torch.dtype
    device: torch.device

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize


@dataclass(slots=True)
class Call:
    """One COMPUTE: `groups` says which experts work on how many rows, in row order."""

    call_id: int
    """Unique among the calls in flight on a channel."""
    epoch: int
    layer: int
    timeout_s: float
    """How long the caller waits; the shard need not start afterwards."""
    groups: Sequence[tuple[int, int]]
    """(expert, rows)"""
    rows_ND: Tensor
    """Contiguous. The call's rows are the concatenation of `ranges` of it."""
    ranges: Sequence[tuple[int, int]]
    """[start, end) rows"""


@dataclass(slots=True)
class Reply:
    """The end of one call. A RESULT holds memory of its channel until it is taken or dropped."""

    call_id: int
    kind: Kind
    """RESULT, STALE_MAP, BUSY or ERROR"""
    num_rows: int
    load: int
    """Rows of other engines that the shard had still to compute when it replied."""
    message: str = ""
    """Of an ERROR."""
    slot: int = -1
    """Where the channel keeps a RESULT's rows."""


class Caller(Protocol):
    """The connection that a request came over."""

    waiting_rows: int
    """Rows of its requests without an answer; the server's to keep."""

    def publish(self, request: Request) -> None:
        """What `rows_ND` holds is the result. Raises what the device ran into while it computed."""
        ...

    def reply(self, request: Request, kind: Kind, message: str) -> None: ...


@dataclass(slots=True, eq=False)
class Request:
    """One COMPUTE as a shard's handler gets it."""

    peer: Caller
    call_id: int
    epoch: int
    layer: int
    deadline_s: float
    """On the server's clock: nobody waits for the result afterwards."""
    groups: list[tuple[int, int]]
    """(expert, rows), in row order, every one with rows."""
    rows_ND: Tensor
    """The result goes into it, in place."""
    num_rows: int
    slot: int
    is_replied: bool = False

    def reply(self, kind: Kind, message: str = "") -> None:
        """End the request, once. A RESULT sends what `rows_ND` holds now; an ERROR, `message`. A RESULT that raises has
        not ended it: a GPU's errors show only when its work is waited for."""
        assert not self.is_replied
        if kind == Kind.RESULT:
            self.peer.publish(self)
        self.is_replied = True
        self.peer.reply(self, kind, message)


class Channel(Protocol):
    """An engine's connection to one shard. Nothing in it blocks; whatever finds the shard gone raises `PeerLost`, after
    which only `take`, `drop` and `close` are of use."""

    max_rows: int
    """Most rows of one call."""
    max_calls: int
    """Most calls in flight: submitted, and not yet answered or with a RESULT neither taken nor dropped."""

    def fileno(self) -> int:
        """Readable when `poll` has something to say."""
        ...

    def submit(self, call: Call) -> None:
        """Send a call. Its rows have been copied when this returns."""
        ...

    def poll(self) -> list[Reply]:
        """Every reply that has arrived whole, in order of arrival."""
        ...

    def take(self, reply: Reply, out_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        """Copy a RESULT's rows into those ranges of contiguous `out_ND`, and free what held them."""
        ...

    def drop(self, reply: Reply) -> None:
        """Free what holds a reply that nobody wants, of any kind."""
        ...

    def wants_write(self) -> bool:
        """Whether bytes are left that the socket did not take: call `flush` once it is writable."""
        ...

    def flush(self) -> None:
        """Send what is left, as far as the socket takes it."""
        ...

    def close(self) -> None:
        """End the connection; may be called twice."""
        ...
