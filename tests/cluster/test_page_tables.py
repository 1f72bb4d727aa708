from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from herd.cluster.kv_layout import KvLayout
from herd.cluster.kv_manager import KvTables
from herd.cluster.page_tables import PageTables

LAYOUT = KvLayout(
    block_size=4, chunk=8, layers_per_page=1, pages_per_global_block=2, pages_per_local_block=3, num_pages=999
)
ROWS = 3


class PageTablesMachine(RuleBasedStateMachine):
    """Whatever the KV manager does to a request's lists, the arrays agree with them after `sync`."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = PageTables(LAYOUT, ROWS)
        self.live: dict[str, KvTables] = {}
        self.rows: dict[str, int] = {}
        self.epoch = 0
        self.page = 0

    def pages(self, num_blocks: int, per_block: int) -> list[int]:
        count = num_blocks * per_block
        self.page += count
        return list(range(self.page - count, self.page))

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    @precondition(lambda self: len(self.live) < ROWS)
    @rule(num_global=st.integers(0, 20), num_local=st.integers(0, 2))
    def start(self, num_global: int, num_local: int) -> None:
        self.live[f"r{self.epoch}"] = KvTables(
            self.next_epoch(), self.pages(num_global, 2), self.pages(num_local, 3), 0
        )

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_blocks=st.integers(1, 40))
    def grow(self, data: st.DataObject, num_blocks: int) -> None:
        tables = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        tables.global_pages += self.pages(num_blocks, 2)
        tables.local_pages += self.pages(data.draw(st.integers(0, 2)), 3)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop_chunk(self, data: st.DataObject) -> None:
        tables = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        tables.local_pages, tables.epoch = [], self.next_epoch()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[name]
        self.rows.pop(name, None)
        self.tables.forget(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def sync_one(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.rows[name] = self.tables.sync(name, self.live[name])

    @invariant()
    def arrays_agree(self) -> None:
        for name, tables in self.live.items():
            self.rows[name] = self.tables.sync(name, tables)
        assert len(set(self.rows.values())) == len(self.rows)
        assert set(self.rows.values()) <= set(range(ROWS))
        for name, tables in self.live.items():
            row = np.array([self.rows[name]])
            for local, pages, per_block in ((False, tables.global_pages, 2), (True, tables.local_pages, 3)):
                blocks = np.arange(len(pages) // per_block)
                for page in range(per_block):
                    expected = pages[page::per_block]
                    assert self.tables.tables((local, page), row, len(blocks))[0].tolist() == expected
                    assert self.tables.pages((local, page), row.repeat(len(blocks)), blocks).tolist() == expected


TestPageTables = PageTablesMachine.TestCase
TestPageTables.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_kinds_are_the_pages_that_hold_layers() -> None:
    assert set(PageTables(LAYOUT, 1).kinds) == {(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)}
    only_global = KvLayout.build(num_global_layers=4, num_local_layers=0, chunk=None, block_size=4)
    assert PageTables(only_global, 1).kinds == ((False, 0),)


def test_tables_are_contiguous_for_the_kernel() -> None:
    tables = PageTables(LAYOUT, 4)
    rows = [tables.sync(str(i), KvTables(i + 1, list(range(i, i + 40)), [], 0)) for i in range(3)]
    out = tables.tables((False, 1), np.array(rows[::-1]), 7)
    assert out.flags.c_contiguous
    assert out.dtype == np.int32
    assert out[:, 0].tolist() == [3, 2, 1]


def test_forgetting_twice_is_no_matter() -> None:
    tables = PageTables(LAYOUT, 1)
    tables.sync("a", KvTables(1, [], [], 0))
    tables.forget("a")
    tables.forget("a")
    tables.sync("b", KvTables(2, [], [], 0))
    with pytest.raises(IndexError):
        tables.sync("c", KvTables(3, [], [], 0))
