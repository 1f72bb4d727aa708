"""What the dispatcher keeps of its work: a layer's rows under way (`Pending`), the share of them that goes to one shard
(`Part`), its call (`Flight`), and the shard's end of all that (`Link`). State only; `dispatch.py` decides.

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

    @property
    def num_rows(self) -> int:
        return self.end - self.start


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
    _results: bytearray | None = None
    """1 for each row that has its result. Kept from the first time on that rows are under way twice; until then each
    row without a result is in one part only."""

    def has(self, span: Span) -> bool:
        """Whether all rows of a span that was sent twice have their results."""
        return self._results is not None and self._results.count(0, span.start, span.end) == 0

    def repeat(self) -> None:
        """From now on a row may be in several parts."""
        if self._results is None:
            self._results = bytearray(self.rows_ND.shape[0])

    def complete(self, part: Part) -> None:
        """The results of a part are in `out_ND`; each row counts once."""
        part.done = True
        if self._results is None:
            self.rows_left -= part.num_rows
            return
        for _, start, end in part.spans:
            self.rows_left -= self._results.count(0, start, end)
            self._results[start:end] = b"\1" * (end - start)


@dataclass(slots=True, eq=False)
class Part:
    """Rows of one pending layer that one shard can compute in one call. When it is late, its rows may be sent elsewhere
    a second time, as parts of their own; whoever answers first counts."""

    pending: Pending
    spans: list[Span]
    num_rows: int
    tried: frozenset[str] = frozenset()
    """Shards that its rows were sent to."""
    repeated: frozenset[Span] = frozenset()
    """Spans that other parts compute as well."""
    attempt: int = 0
    """How often its rows were sent before."""
    failures: int = 0
    """How often a shard failed to compute its rows."""
    is_hedge: bool = False
    done: bool = False
    """Its results are there, or other parts have taken its place."""

    @property
    def is_over(self) -> bool:
        return self.done or self.pending.over

    @property
    def spans_left(self) -> list[Span]:
        """Spans without a result that nobody else was asked for."""
        return [span for span in self.spans if span not in self.repeated and not self.pending.has(span)]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(expert, rows), spans of one expert taken together only where they are neighbours."""
        return [(span.expert, span.num_rows) for span in self.spans]

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
    """One call under way."""

    part: Part
    ranges: list[tuple[int, int]]
    epoch: int
    sent_at: float
    check_at: float
    """When to look after it: it may be late then."""


@dataclass(slots=True, eq=False)
class Link:
    """One connected shard."""

    shard_id: str
    slot: int
    channel: Channel
    hosted: frozenset[Expert]
    flights: dict[int, Flight] = field(default_factory=dict)
    backlog: deque[Part] = field(default_factory=deque)
    """Parts that wait for a call to come back."""
    refused: set[Expert] = field(default_factory=set)
    """Experts that it said it does not host."""
    rows_out: int = 0
    """Rows of ours that it has or will get: its queue as far as we fill it."""
    load: int = 0
    """Rows of others that waited there when it last replied."""
    errors: int = 0
    """Calls that it failed to compute since it last computed one."""
    suspect: bool = False
    """Late with a call, or failing: chosen last until it computes again."""
    retired: bool = False
    """No longer in the map: gets no new calls, closed once it has none."""
    writing: bool = False
    """The socket did not take everything: watched for room."""

    def order(self, extra_rows: int) -> tuple[bool, int, int]:
        """Sort key: who should get further rows."""
        return self.suspect, self.rows_out + self.load + extra_rows, self.slot
