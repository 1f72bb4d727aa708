"""The memory that rows lie in on their way: `max_calls` slots of `max_rows` rows each, one slot per call in flight.
Owns the interface and the bounds; `host_slots.py` and `cuda_slots.py` are the memory.

Shapes: N rows, D hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .transport import RowLayout

MAX_SLOT_BYTES = 64 << 20
MAX_TOTAL_BYTES = 1 << 30
"""Of all slots of all peers of a server."""


class RowSlots(Protocol):
    """One end's hold of the slots. Ranges are [start, end) rows of contiguous tensors on the layout's device."""

    def write(self, slot: int, rows_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        """Copy the rows of `ranges`, one after the other, into the slot; done when this returns."""
        ...

    def read(self, slot: int, out_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        """Copy the slot's rows into `ranges` of `out_ND`."""
        ...

    def rows(self, slot: int, num_rows: int) -> Tensor:
        """The slot's first rows as a tensor on the layout's device, to be computed on in place."""
        ...

    def publish(self, slot: int, rows_ND: Tensor) -> None:
        """What was computed in place in `rows(slot, ...)` shall be in the slot when this returns."""
        ...

    def memory(self, slot: int, num_bytes: int) -> memoryview:
        """The slot's first bytes, for a socket. Host memory only."""
        ...


def slot_bytes(layout: RowLayout, max_rows: int) -> int:
    """Bytes of one slot."""
    return layout.row_bytes * max_rows
