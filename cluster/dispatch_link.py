"""What the dispatcher keeps of its work: a layer's rows under way (`Pending`), the share of them that goes to one shard
(`Part`), one sending of it (`Flight`), and the shard's end of all that (`Link`). State only; `dispatch.py` decides.

Shapes: N routed rows, D hidden."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .expert_map import Expert
from .transport import Channel


class Span(NamedTuple):
    """Adjacent rows of one expert: [start, end) of the routed rows."""

    expert: int
    start: int
    end: int


@dataclass(slots=True, eq=False)
class Pending:
    """One dispatched layer."""

    layer: int
    rows_ND: Tensor
    out_ND: Tensor
    rows_left: int
    """Rows without a result."""
    homeless: list[Span] = field(default_factory=list)
    """Spans that no connected shard hosts."""
    failure: Exception | None = None
    """Why `collect` cannot succeed."""
    over: bool = False
    """Collected or abandoned: whatever still comes is dropped."""


@dataclass(slots=True, eq=False)
class Part:
    """Rows of one pending layer that one shard can compute in one call."""

    pending: Pending
    spans: list[Span]
    num_rows: int
    flights: int = 0
    """Copies under way."""
    tried: set[str] = field(default_factory=set)
    """Shards that it was sent to."""
    attempt: int = 0
    """How often its rows were sent again after nobody worked on them any more."""
    failures: int = 0
    """How often a shard failed to compute its rows."""
    done: bool = False

    @property
    def is_over(self) -> bool:
        return self.done or self.pending.over

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(expert, rows), spans of one expert taken together only where they are neighbours."""
        return [(span.expert, span.end - span.start) for span in self.spans]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The same rows as few [start, end) ranges."""
        ranges: list[tuple[int, int]] = []
        for _, start, end in self.spans:
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
        return ranges


@dataclass(slots=True, eq=False)
class Flight:
    """One sending of a part to one shard."""

    part: Part
    link: Link
    ranges: list[tuple[int, int]]
    sent_at: float
    check_at: float
    """When to look after it: it may be late then."""
    hedge: bool = False


@dataclass(slots=True, eq=False)
class Link:
    """One connected shard."""

    shard_id: str
    slot: int
    channel: Channel
    hosted: frozenset[Expert]
    flights: dict[int, Flight] = field(default_factory=dict)
    backlog: deque[tuple[Part, bool]] = field(default_factory=deque)
    """Parts (and whether they are hedges) that wait for a call to come back."""
    refused: set[Expert] = field(default_factory=set)
    """Experts that it said it does not host."""
    rows_out: int = 0
    """Rows of ours that it has or will get: its queue as far as we fill it."""
    load: int = 0
    """Rows of others that waited there when it last replied."""
    suspect: bool = False
    """Late with a call: chosen last until it replies."""
    retired: bool = False
    """No longer in the map: gets no new calls, closed once it has none."""
    writing: bool = False
    """The socket did not take everything: watched for room."""

    def order(self, extra_rows: int) -> tuple[bool, int, int]:
        """Sort key: who should get further rows."""
        return self.suspect, self.rows_out + self.load + extra_rows, self.slot


def split_spans(spans: list[Span], max_rows: int) -> list[list[Span]]:
    """Cut ascending spans into lists of at most `max_rows` rows."""
    lists: list[list[Span]] = []
    room = 0
    for expert, start, end in spans:
        while start < end:
            if room == 0:
                lists.append([])
                room = max_rows
            count = min(room, end - start)
            lists[-1].append(Span(expert, start, start + count))
            start, room = start + count, room - count
    return lists
