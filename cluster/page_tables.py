"""Page tables of the running requests as arrays, kept from step to step so that each step copies only what is new.

One row per request; one array per (group, page of the block). Knows `KvTables`, not who owns them or why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .kv_layout import KvLayout
from .kv_manager import KvTables

GroupPage = tuple[bool, int]
"""(local group?, which page of its block)"""


@dataclass(slots=True)
class _Row:
    index: int
    epoch: int = 0
    num_global: int = 0
    """Pages copied so far."""
    num_local: int = 0


class PageTables:
    """int32 arrays [rows, blocks] for every page of a block, filled from the KV manager's lists."""

    def __init__(self, layout: KvLayout, max_rows: int) -> None:
        self._layout = layout
        self._rows: dict[str, _Row] = {}
        self._free_rows = list(range(max_rows - 1, -1, -1))
        kinds = [(False, layout.pages_per_global_block), (True, layout.pages_per_local_block)]
        self._arrays: dict[GroupPage, npt.NDArray[np.int32]] = {
            (local, page): np.zeros((max_rows, 16), np.int32) for local, count in kinds for page in range(count)
        }

    @property
    def kinds(self) -> tuple[GroupPage, ...]:
        """Every (group, page of the block) that holds layers."""
        return tuple(self._arrays)

    def sync(self, request_id: str, tables: KvTables) -> int:
        """Copy what is new in a request's tables; returns its row."""
        row = self._rows.get(request_id)
        if row is None:
            row = self._rows[request_id] = _Row(self._free_rows.pop())
        if row.epoch != tables.epoch:
            row.epoch, row.num_global, row.num_local = tables.epoch, 0, 0
        if len(tables.global_pages) > row.num_global:
            self._append(False, row.index, row.num_global, tables.global_pages, self._layout.pages_per_global_block)
            row.num_global = len(tables.global_pages)
        if len(tables.local_pages) > row.num_local:
            self._append(True, row.index, row.num_local, tables.local_pages, self._layout.pages_per_local_block)
            row.num_local = len(tables.local_pages)
        return row.index

    def forget(self, request_id: str) -> None:
        """Give back the row of a request that has ended."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row.index)

    def pages(
        self, kind: GroupPage, rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        """Page of each (row, block) pair."""
        return self._arrays[kind][rows, blocks]

    def tables(self, kind: GroupPage, rows: npt.NDArray[np.int64], num_blocks: int) -> npt.NDArray[np.int32]:
        """[rows, num_blocks] of page ids, contiguous."""
        return np.ascontiguousarray(self._arrays[kind][rows, :num_blocks])

    def _append(self, local: bool, row: int, done: int, pages: list[int], per_block: int) -> None:
        first, last = done // per_block, len(pages) // per_block
        for page in range(per_block):
            array = self._arrays[local, page]
            if last > array.shape[1]:
                wider = np.zeros((array.shape[0], max(last, 2 * array.shape[1])), np.int32)
                wider[:, : array.shape[1]] = array
                array = self._arrays[local, page] = wider
            array[row, first:last] = pages[done + page :: per_block]
