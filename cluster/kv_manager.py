"""Which KV blocks each running request holds: attaches cached prefixes, grows with the tokens to compute, publishes
full blocks, drops local blocks behind the attention chunk, gives everything back. Decides nothing about who may run.

A request holds, for the positions it has room for, one global block per block_size tokens, and one local block per
block_size tokens of the chunk being computed. A piece of work never crosses a chunk border, so both groups always end
at the same position.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import count, zip_longest

from .block_pool import Block, BlockPool, Group
from .kv_layout import KvLayout
from .prefix_cache import PrefixHit, extend_hashes, longest_hit
from .request import Request


@dataclass(slots=True)
class KvTables:
    """Where a request's keys and values are, block by block, each block's pages in a row. The lists only grow at their
    end while `epoch` stays the same; read them, never change them."""

    epoch: int
    """New whenever the lists start afresh; never repeated by one manager, whatever the request."""
    global_pages: list[int]
    """From position 0; pages_per_global_block entries a block."""
    local_pages: list[int]
    """From position `local_start`; pages_per_local_block entries a block."""
    local_start: int
    """First position of the chunk that is computed next (0 without local layers)."""


@dataclass(slots=True)
class _Held:
    """What one request holds."""

    tables: KvTables
    global_blocks: list[Block]
    local_blocks: list[Block]
    num_room: int
    """Positions that have blocks; a multiple of the block size."""
    num_filled: int
    """Positions in blocks that are full and computed, so dealt with by `commit`; a multiple of the block size."""


@dataclass(frozen=True, slots=True)
class KvUsage:
    """Pages by what they are in; they sum up to `total`."""

    total: int
    free: int
    cached: int
    used: int


class KvManager:
    """The KV blocks of one engine's requests."""

    def __init__(self, layout: KvLayout, prefix_caching: bool) -> None:
        self.layout = layout
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(layout.num_pages, layout.pages_per_global_block, layout.pages_per_local_block)
        self._pages_per_step = layout.pages_per_global_block + layout.pages_per_local_block
        self._held: dict[str, _Held] = {}
        self._epochs = count(1)

    @property
    def usage(self) -> KvUsage:
        pool = self.pool
        return KvUsage(pool.num_pages, pool.num_free, pool.num_cached, pool.num_used)

    @property
    def num_available(self) -> int:
        """Pages that can still be had, by evicting cached blocks if need be."""
        return self.pool.num_available

    def tables(self, request_id: str) -> KvTables:
        """The live tables of an attached request. Valid until it is freed; KeyError for others."""
        return self._held[request_id].tables

    def match(self, request: Request) -> PrefixHit:
        """The longest cached prefix. Takes no reference, so it holds until the next `grow`."""
        if not self.prefix_caching:
            return PrefixHit(0, [], [])
        return longest_hit(self.pool, self.layout, request)

    def pages_to_admit(self, request: Request, hit: PrefixHit) -> int:
        """Available pages that all of the request's present tokens would take, given what it could share."""
        shared = sum(len(b.pages) for blocks in (hit.global_blocks, hit.local_blocks) for b in blocks if b.ref_count)
        return self.layout.pages_for(request.num_tokens) - shared

    def pages_held(self, request: Request) -> int:
        """Pages of an attached request, those it shares included."""
        tables = self._held[request.id].tables
        return len(tables.global_pages) + len(tables.local_pages)

    def pages_missing(self, request: Request) -> int:
        """Further pages that an attached request needs at most until all of its present tokens are computed."""
        return max(0, self.layout.pages_for(request.num_tokens) - self.pages_held(request))

    def attach(self, request: Request, hit: PrefixHit) -> None:
        """Start to hold blocks for a request: those of the prefix, `hit.num_tokens` positions, are computed."""
        assert request.id not in self._held, f"request {request.id} is attached already"
        for block in (*hit.global_blocks, *hit.local_blocks):
            self.pool.share(block)
        tables = KvTables(
            epoch=next(self._epochs),
            global_pages=[page for block in hit.global_blocks for page in block.pages],
            local_pages=[page for block in hit.local_blocks for page in block.pages],
            local_start=self.layout.chunk_start(hit.num_tokens),
        )
        self._held[request.id] = _Held(tables, hit.global_blocks, hit.local_blocks, hit.num_tokens, hit.num_tokens)

    def grow(self, request: Request, num_new_tokens: int) -> bool:
        """Make sure that the next `num_new_tokens` positions, all in one chunk, have blocks in both groups. False, and
        nothing changed, when pages are short."""
        held = self._held[request.id]
        end = request.num_computed_tokens + num_new_tokens
        if end <= held.num_room:
            return True
        layout = self.layout
        assert layout.chunk is None or end <= held.tables.local_start + layout.chunk, "a piece crosses a chunk border"
        num_blocks = -(-(end - held.num_room) // layout.block_size)
        if num_blocks * self._pages_per_step > self.pool.num_available:
            return False
        tables = held.tables
        for _ in range(num_blocks):
            if layout.pages_per_global_block:
                block = self.pool.allocate(Group.GLOBAL)
                held.global_blocks.append(block)
                tables.global_pages += block.pages
            if layout.pages_per_local_block:
                block = self.pool.allocate(Group.LOCAL)
                held.local_blocks.append(block)
                tables.local_pages += block.pages
        held.num_room += num_blocks * layout.block_size
        return True

    def commit(self, request: Request) -> None:
        """Take note that positions up to `num_computed_tokens` are computed: publish the blocks that became full, and
        drop the local blocks once the next position is in another chunk."""
        held = self._held[request.id]
        layout = self.layout
        if request.num_computed_tokens < held.num_filled + layout.block_size:
            return
        num_filled = request.num_computed_tokens - request.num_computed_tokens % layout.block_size
        if self.prefix_caching:
            self._publish(request, held, num_filled)
        held.num_filled = num_filled
        local_start = layout.chunk_start(num_filled)
        tables = held.tables
        if local_start != tables.local_start:
            for block in reversed(held.local_blocks):
                self.pool.release(block)
            held.local_blocks = []
            tables.local_pages = []
            tables.local_start = local_start
            tables.epoch = next(self._epochs)

    def free(self, request: Request) -> None:
        """Give back all blocks, last position first, so that a cached chain is evicted from its tail."""
        held = self._held.pop(request.id)
        for local_block, global_block in zip_longest(reversed(held.local_blocks), reversed(held.global_blocks)):
            if local_block is not None:
                self.pool.release(local_block)
            if global_block is not None:
                self.pool.release(global_block)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pool, references and tables agree."""
        self.pool.check_integrity()
        references = Counter[Block]()
        for request_id, held in self._held.items():
            references.update(held.global_blocks)
            references.update(held.local_blocks)
            tables = held.tables
            assert tables.global_pages == [page for block in held.global_blocks for page in block.pages], request_id
            assert tables.local_pages == [page for block in held.local_blocks for page in block.pages], request_id
            num_blocks = held.num_room // self.layout.block_size
            num_local = num_blocks - tables.local_start // self.layout.block_size
            assert len(held.global_blocks) == (num_blocks if self.layout.pages_per_global_block else 0), request_id
            assert len(held.local_blocks) == (num_local if self.layout.pages_per_local_block else 0), request_id
        assert all(block.ref_count == num_holders for block, num_holders in references.items()), "wrong ref_count"
        held_pages = sum(len(block.pages) for block in references)
        assert held_pages == self.pool.num_used, f"{self.pool.num_used} pages used, but {held_pages} held"

    def _publish(self, request: Request, held: _Held, num_filled: int) -> None:
        block_size = self.layout.block_size
        first, last = held.num_filled // block_size, num_filled // block_size
        first_local = held.tables.local_start // block_size
        extend_hashes(request, block_size, last)
        for index in range(first, last):
            block_hash = request.block_hashes[index]
            if held.global_blocks:
                self.pool.publish(held.global_blocks[index], block_hash)
            if held.local_blocks:
                self.pool.publish(held.local_blocks[index - first_local], block_hash)
