"""Which computed blocks a request can reuse: the hash chain over its tokens, and the longest prefix found in the pool.
Owns no blocks; reading the pool changes nothing."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b

from .block_pool import Block, BlockPool, Group
from .kv_layout import KvLayout
from .request import Request

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """`num_tokens` leading positions that need no computing, and the blocks that hold what later positions see of
    them: global blocks from 0, local blocks from the start of the chunk that position `num_tokens` is in."""

    num_tokens: int
    global_blocks: list[Block]
    local_blocks: list[Block]


def extend_hashes(request: Request, block_size: int, num_blocks: int) -> None:
    """Bring `request.block_hashes` to `num_blocks` entries. Each names its block's tokens and all before them, within
    the request's salt; 128 bits of a cryptographic hash, since a collision would serve another request's text."""
    hashes, token_ids = request.block_hashes, request.token_ids
    if len(hashes) >= num_blocks:
        return
    parent = hashes[-1] if hashes else _root(request.spec.cache_salt)
    for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
        tokens = array("I", token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)


def longest_hit(pool: BlockPool, layout: KvLayout, request: Request) -> PrefixHit:
    """The longest reusable prefix of whole blocks that leaves at least one token to compute.

    A prefix of n tokens needs global blocks for [0, n) and local blocks for [chunk start of n, n). So the run of global
    blocks bounds n, and within the chunk where that run ends the run of local blocks bounds it again; the chunk's start
    itself needs no local block and is always reached.
    """
    block_size = layout.block_size
    num_blocks = (request.num_tokens - 1) // block_size
    extend_hashes(request, block_size, num_blocks)
    hashes = request.block_hashes
    global_blocks: list[Block] = []
    if layout.pages_per_global_block:
        global_blocks = pool.find_run(Group.GLOBAL, hashes, 0, num_blocks)
        num_blocks = len(global_blocks)
    local_blocks: list[Block] = []
    if layout.pages_per_local_block:
        first = layout.chunk_start(num_blocks * block_size) // block_size
        local_blocks = pool.find_run(Group.LOCAL, hashes, first, num_blocks)
        num_blocks = first + len(local_blocks)
        del global_blocks[num_blocks:]
    return PrefixHit(num_blocks * block_size, global_blocks, local_blocks)


def _root(salt: str) -> bytes:
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES, person=b"herd kv root").digest()
