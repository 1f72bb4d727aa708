"""Pages are conserved, cached blocks stay findable until they are evicted, and eviction follows use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.block_pool import Block, BlockPool, Group


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def cached_block(pool: BlockPool, number: int, group: Group = Group.GLOBAL) -> Block:
    block = pool.allocate(group)
    pool.publish(block, name(number))
    pool.release(block)
    return block


def is_found(pool: BlockPool, number: int, group: Group = Group.GLOBAL) -> bool:
    return bool(pool.find_run(group, [name(number)], 0, 1))


def test_blocks_take_the_pages_of_their_group() -> None:
    pool = BlockPool(num_pages=10, pages_per_global_block=1, pages_per_local_block=3)
    blocks = [pool.allocate(Group.GLOBAL), pool.allocate(Group.LOCAL)]
    assert [len(block.pages) for block in blocks] == [1, 3]
    assert (pool.num_free, pool.num_used, pool.num_cached) == (6, 4, 0)
    pool.check_integrity()
    for block in blocks:
        pool.release(block)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (10, 0, 0)
    pool.check_integrity()


def test_a_published_block_is_kept_and_comes_back_into_use() -> None:
    pool = BlockPool(4, 1, 1)
    block = cached_block(pool, 1)
    assert (pool.num_cached, pool.num_available) == (1, 4)
    assert pool.find_run(Group.GLOBAL, [name(1)], 0, 1) == [block]
    assert not is_found(pool, 1, Group.LOCAL)
    pool.share(block)
    pool.share(block)
    assert (pool.num_used, pool.num_available) == (1, 3)
    pool.release(block)
    assert pool.num_used == 1
    pool.release(block)
    assert pool.num_cached == 1
    pool.check_integrity()


def test_eviction_is_least_recently_used_over_both_groups() -> None:
    pool = BlockPool(6, 1, 2)
    cached_block(pool, 1)
    cached_block(pool, 2, Group.LOCAL)
    third = cached_block(pool, 3)
    fourth = cached_block(pool, 4)
    pool.share(third)
    pool.release(third)
    # One page is free; a local block needs a second one, which the oldest cached block has.
    pool.allocate(Group.LOCAL)
    assert not is_found(pool, 1)
    assert is_found(pool, 2, Group.LOCAL)
    # The evicted local block has a page to spare for the next allocation.
    pool.allocate(Group.GLOBAL)
    pool.allocate(Group.GLOBAL)
    assert not is_found(pool, 2, Group.LOCAL)
    assert is_found(pool, 4)
    pool.allocate(Group.GLOBAL)
    assert not is_found(pool, 4)
    assert fourth.hash is None
    assert is_found(pool, 3)
    pool.check_integrity()


def test_a_chain_released_from_its_tail_loses_its_tail_first() -> None:
    pool = BlockPool(4, 1, 1)
    chain = [pool.allocate(Group.GLOBAL) for _ in range(4)]
    for number, block in enumerate(chain):
        pool.publish(block, name(number))
    for block in reversed(chain):
        pool.release(block)
    for left in (3, 2, 1, 0):
        pool.allocate(Group.GLOBAL)
        assert len(pool.find_run(Group.GLOBAL, [name(number) for number in range(4)], 0, 4)) == left


def test_an_equal_block_stays_private() -> None:
    pool = BlockPool(4, 1, 1)
    first, second = pool.allocate(Group.GLOBAL), pool.allocate(Group.GLOBAL)
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    assert pool.find_run(Group.GLOBAL, [name(1)], 0, 1) == [first]
    pool.release(second)
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.release(first)
    assert (pool.num_free, pool.num_cached) == (3, 1)
    pool.check_integrity()


def test_a_run_ends_at_the_first_missing_block() -> None:
    pool = BlockPool(4, 1, 1)
    blocks = [cached_block(pool, number) for number in (0, 1, 3)]
    hashes = [name(number) for number in range(4)]
    assert pool.find_run(Group.GLOBAL, hashes, 0, 4) == blocks[:2]
    assert pool.find_run(Group.GLOBAL, hashes, 1, 2) == blocks[1:2]
    assert pool.find_run(Group.GLOBAL, hashes, 2, 4) == []


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    num_pages=st.integers(0, 30),
    moves=st.lists(st.tuples(st.sampled_from(["allocate", "release", "share", "publish"]), st.integers(0, 50))),
)
def test_pages_are_conserved(sizes, num_pages, moves) -> None:
    pool = BlockPool(num_pages, *sizes)
    references: list[Block] = []
    for move, number in moves:
        group = Group(number % 2)
        pick = references[number % len(references)] if references else None
        if move == "allocate" and pool.num_available >= sizes[group]:
            references.append(pool.allocate(group))
        elif move == "release" and pick is not None:
            references.remove(pick)
            pool.release(pick)
        elif move == "publish" and pick is not None and pick.hash is None:
            pool.publish(pick, name(number % 5))
        elif move == "share" and (found := pool.find_run(group, [name(number % 5)], 0, 1)):
            pool.share(found[0])
            references += found
        pool.check_integrity()
        assert pool.num_used == sum(len(block.pages) for block in set(references))
        assert all(block.ref_count == references.count(block) for block in references)
    for block in references:
        pool.release(block)
    pool.check_integrity()
    assert pool.num_used == 0
