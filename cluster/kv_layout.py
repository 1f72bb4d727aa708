"""The shape of the KV cache: how tokens, layers and blocks become uniform pages, and how many pages a context takes.

Two groups of layers keep different spans. *Global* layers (NoPE) keep every position. *Local* layers (RoPE) keep the
attention chunk that is being computed: position p reads keys [C * floor(p / C), p]. Both draw from one pool of pages,
so that no ratio between them is ever configured. Knows nothing of requests or tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import gcd


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Page j of a block holds layers [j * layers_per_page, (j + 1) * layers_per_page) of its group, in layer order,
    for block_size tokens. Build it with `KvLayout.build`."""

    block_size: int
    """Tokens per block; divides `chunk`."""
    chunk: int | None
    """Attention chunk of the local layers in tokens; None when no layer is local."""
    layers_per_page: int
    pages_per_global_block: int
    """0 when no layer is global."""
    pages_per_local_block: int
    """0 when no layer is local."""
    num_pages: int

    @classmethod
    def build(
        cls, *, num_global_layers: int, num_local_layers: int, chunk: int | None, block_size: int, num_pages: int = 0
    ) -> KvLayout:
        """Layout of a model. Without a chunk, local layers see everything and so count as global ones. `block_size`
        is lowered to the largest divisor of the chunk. Raises ValueError for sizes that make no cache."""
        if chunk is None:
            num_global_layers, num_local_layers = num_global_layers + num_local_layers, 0
        if num_local_layers == 0:
            chunk = None
        if min(num_global_layers, num_local_layers, num_pages) < 0 or num_global_layers + num_local_layers == 0:
            raise ValueError(f"no KV cache for {num_global_layers} global and {num_local_layers} local layers")
        if block_size < 1 or (chunk is not None and chunk < 1):
            raise ValueError(f"block size {block_size} and attention chunk {chunk} must be positive")
        if chunk is not None:
            block_size = next(size for size in range(min(block_size, chunk), 0, -1) if chunk % size == 0)
        layers = gcd(num_global_layers, num_local_layers)
        return cls(
            block_size=block_size,
            chunk=chunk,
            layers_per_page=layers,
            pages_per_global_block=num_global_layers // layers,
            pages_per_local_block=num_local_layers // layers,
            num_pages=num_pages,
        )

    def with_pages(self, num_pages: int) -> KvLayout:
        """The same shape with another pool size."""
        return replace(self, num_pages=num_pages)

    @property
    def short_tokens(self) -> int:
        """Tokens that the pool holds in sequences of at most one chunk; longer ones take less per token."""
        return self.num_pages // (self.pages_per_global_block + self.pages_per_local_block) * self.block_size

    def page_bytes(self, bytes_per_token_and_layer: int) -> int:
        """Bytes of one page, when keys and values of one token take `bytes_per_token_and_layer` in one layer."""
        return self.layers_per_page * self.block_size * bytes_per_token_and_layer

    def chunk_start(self, position: int) -> int:
        """First position that a local layer keeps when `position` is the next to compute."""
        return 0 if self.chunk is None else position - position % self.chunk

    def pages_at(self, num_tokens: int) -> int:
        """Pages that a request holds when it has room for exactly `num_tokens` positions and computes the last one."""
        if num_tokens == 0:
            return 0
        num_blocks = -(-num_tokens // self.block_size)
        num_local_blocks = num_blocks - self.chunk_start(num_tokens - 1) // self.block_size
        return num_blocks * self.pages_per_global_block + num_local_blocks * self.pages_per_local_block

    def pages_for(self, num_tokens: int) -> int:
        """Most pages that a request of `num_tokens` positions ever holds at once: the peak is at its end or at the end
        of its last whole chunk, where the local group is fullest."""
        return max(self.pages_at(num_tokens), self.pages_at(self.chunk_start(num_tokens)))

    def max_tokens(self, at_most: int) -> int:
        """Most positions, up to `at_most`, that a request can have when it owns the whole pool."""
        return bisect_right(range(at_most + 1), self.num_pages, key=self.pages_for) - 1
