"""Ownership of KV pages: which are free, which a request uses, which are kept as cache and in what order they go.
Knows nothing of requests, tokens or tensors; a hash is an opaque name for a block's content."""

from __future__ import annotations

from collections import Counter, OrderedDict
from enum import IntEnum


class Group(IntEnum):
    """Which layers a block serves."""

    GLOBAL = 0
    LOCAL = 1


class Block:
    """The pages of `block_size` consecutive tokens in one group's layers; `hash` names its content once published."""

    __slots__ = ("group", "hash", "pages", "ref_count")

    def __init__(self, group: Group, pages: tuple[int, ...]) -> None:
        self.group = group
        self.pages = pages
        self.ref_count = 1
        self.hash: bytes | None = None

    def __repr__(self) -> str:
        name = self.hash.hex()[:8] if self.hash else None
        return f"Block({self.group.name}, pages={self.pages}, ref_count={self.ref_count}, hash={name})"


class BlockPool:
    """Uniform pages, given out as blocks. A page is in exactly one place: free, in a used block (ref_count > 0), or in
    a cached block (ref_count 0, published, evictable). Cached blocks of both groups share one LRU order."""

    def __init__(self, num_pages: int, pages_per_global_block: int, pages_per_local_block: int) -> None:
        self.num_pages = num_pages
        self._pages_per_block = (pages_per_global_block, pages_per_local_block)
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[Block] = set()
        self._cached: OrderedDict[Block, None] = OrderedDict()
        self._num_cached_pages = 0
        self._published: tuple[dict[bytes, Block], dict[bytes, Block]] = ({}, {})

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages of cached blocks that nobody uses."""
        return self._num_cached_pages

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free) - self._num_cached_pages

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free ones and those of cached blocks."""
        return len(self._free) + self._num_cached_pages

    def allocate(self, group: Group) -> Block:
        """A new block with one reference. Evicts the least recently used cached blocks when free pages are short; the
        caller has made sure of `num_available`."""
        count = self._pages_per_block[group]
        free = self._free
        while len(free) < count:
            self._evict()
        pages = tuple(free[-count:])
        del free[-count:]
        block = Block(group, pages)
        self._used.add(block)
        return block

    def share(self, block: Block) -> None:
        """Add a reference; a cached block comes back into use."""
        if block.ref_count == 0:
            del self._cached[block]
            self._num_cached_pages -= len(block.pages)
            self._used.add(block)
        block.ref_count += 1

    def release(self, block: Block) -> None:
        """Drop a reference. An unused block becomes the most recently used cached one when it is published, and free
        pages otherwise. Release a chain from its tail, so that the tail is evicted before the head."""
        assert block.ref_count > 0, f"{block} is not in use"
        block.ref_count -= 1
        if block.ref_count:
            return
        self._used.remove(block)
        if block.hash is None:
            self._free.extend(block.pages)
        else:
            self._cached[block] = None
            self._num_cached_pages += len(block.pages)

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Make a full, computed block findable. When an equal block is published already, this one stays private."""
        published = self._published[block.group]
        if block_hash not in published:
            published[block_hash] = block
            block.hash = block_hash

    def find_run(self, group: Group, hashes: list[bytes], start: int, stop: int) -> list[Block]:
        """Published blocks for hashes[start:stop], up to the first that is missing."""
        published = self._published[group]
        run = []
        for index in range(start, stop):
            block = published.get(hashes[index])
            if block is None:
                break
            run.append(block)
        return run

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is in exactly one place and the published blocks are findable."""
        used = [page for block in self._used for page in block.pages]
        cached = [page for block in self._cached for page in block.pages]
        places = Counter([*self._free, *used, *cached])
        assert len(places) == self.num_pages, f"{self.num_pages - len(places)} of {self.num_pages} pages are lost"
        doubled = [page for page, count in places.items() if count > 1]
        assert not doubled, f"pages in several places: {doubled}"
        assert len(cached) == self._num_cached_pages, f"{len(cached)} pages cached, {self._num_cached_pages} counted"
        assert all(block.ref_count > 0 for block in self._used), "a used block without reference"
        assert all(block.ref_count == 0 and block.hash for block in self._cached), "a cached block in use or nameless"
        for block in (*self._used, *self._cached):
            assert len(block.pages) == self._pages_per_block[block.group], f"{block} has another group's size"
            if block.hash is not None:
                assert self._published[block.group].get(block.hash) is block, f"{block} cannot be found"
        num_named = sum(block.hash is not None for block in (*self._used, *self._cached))
        assert num_named == sum(map(len, self._published)), "the hash map names a block that is gone"

    def _evict(self) -> None:
        assert self._cached, "allocation beyond num_available"
        block, _ = self._cached.popitem(last=False)
        assert block.hash is not None
        del self._published[block.group][block.hash]
        block.hash = None
        self._free.extend(block.pages)
        self._num_cached_pages -= len(block.pages)
