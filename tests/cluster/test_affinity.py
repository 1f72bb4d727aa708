from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.affinity import PrefixAffinity, prefix_hashes

PROMPT = list(range(1000))


def test_equal_prefixes_share_exactly_their_whole_chunks():
    one = prefix_hashes(PROMPT, chunk=64, limit=8)
    other = prefix_hashes([*PROMPT[:200], *range(5000, 5400)], chunk=64, limit=8)
    assert len(one) == 8
    assert one[:3] == other[:3]
    assert set(one[3:]).isdisjoint(other[3:])


def test_a_chunk_counts_only_with_everything_before_it():
    moved = prefix_hashes([1, *PROMPT[1:]], chunk=64, limit=8)
    assert set(moved).isdisjoint(prefix_hashes(PROMPT, chunk=64, limit=8))


def test_salt_separates_and_short_prompts_have_no_hash():
    assert prefix_hashes(PROMPT[:63]) == []
    assert set(prefix_hashes(PROMPT, "a")).isdisjoint(prefix_hashes(PROMPT, "b"))
    assert len(prefix_hashes(list(range(100_000)))) == 64


def test_longest_known_prefix_wins_over_equal_load():
    affinity = PrefixAffinity(spill=4)
    hashes = prefix_hashes(PROMPT)
    affinity.assign("r1", "a", hashes[:2])
    affinity.assign("r2", "b", hashes)
    affinity.assign("r3", "a", hashes[:2])
    assert affinity.rank(hashes, ["a", "b", "c"]) == ["b", "c", "a"]
    assert affinity.rank(hashes[:2], ["a", "b", "c"])[0] == "a"


def test_unknown_prefix_goes_to_the_least_loaded():
    affinity = PrefixAffinity()
    affinity.assign("r1", "a", [])
    affinity.assign("r2", "a", [])
    affinity.assign("r3", "b", [])
    assert affinity.rank([], ["a", "b", "c"]) == ["c", "b", "a"]
    assert affinity.rank(prefix_hashes(PROMPT), ["a", "b"]) == ["b", "a"]


def test_overloaded_owner_spills_to_the_least_loaded_and_comes_back():
    affinity = PrefixAffinity(spill=2)
    hashes = prefix_hashes(PROMPT)
    picks = []
    for i in range(8):
        best = affinity.rank(hashes, ["a", "b"])[0]
        affinity.assign(f"r{i}", best, hashes)
        picks.append(best)
    assert picks[:3] == ["a", "a", "a"]
    assert "b" in picks
    assert abs(affinity.in_flight("a") - affinity.in_flight("b")) <= 3


def test_new_prefixes_take_turns_among_idle_replicas():
    affinity = PrefixAffinity()
    picks = []
    for i in range(6):
        hashes = prefix_hashes([i] * 64)
        picks.append(affinity.rank(hashes, ["a", "b", "c"])[0])
        affinity.assign(f"r{i}", picks[-1], hashes)
        affinity.release(f"r{i}")
    assert picks == ["a", "b", "c"] * 2


def test_simultaneous_requests_without_a_common_prefix_spread_evenly():
    affinity = PrefixAffinity(spill=8)
    for i in range(24):
        affinity.assign(f"r{i}", affinity.rank([], ["a", "b", "c"])[0], [])
    assert [affinity.in_flight(r) for r in "abc"] == [8, 8, 8]


def test_vanished_replicas_are_forgotten():
    affinity = PrefixAffinity()
    hashes = prefix_hashes(PROMPT)
    affinity.assign("r1", "a", hashes)
    affinity.retain(["b"])
    assert affinity.in_flight("a") == 0
    assert affinity.rank(hashes, ["b", "a"]) == ["b", "a"]
    affinity.release("r1")
    assert affinity.in_flight("a") == 0


def test_an_owner_that_is_no_candidate_is_not_ranked():
    affinity = PrefixAffinity()
    hashes = prefix_hashes(PROMPT)
    affinity.assign("r1", "a", hashes)
    assert affinity.rank(hashes, ["b"]) == ["b"]
    assert affinity.rank(hashes, []) == []


def test_assigning_again_moves_and_a_stale_release_is_ignored():
    affinity = PrefixAffinity()
    affinity.assign("r1", "a", [])
    affinity.assign("r1", "b", [])
    affinity.release("r1", "a")
    assert (affinity.in_flight("a"), affinity.in_flight("b")) == (0, 1)
    affinity.release("r1", "b")
    assert affinity.in_flight("b") == 0


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    affinity = PrefixAffinity(capacity=4)
    for i in range(4):
        affinity.assign(f"r{i}", "a", [bytes([i])])
    affinity.assign("r0", "a", [bytes([0])])
    affinity.assign("r9", "b", [bytes([9])])
    affinity.assign("x1", "b", [])
    assert affinity.rank([bytes([0])], ["b", "a"])[0] == "a"
    for i in range(9):
        affinity.release(f"r{i}")
    assert affinity.rank([bytes([1])], ["b", "a"])[0] == "a", "forgotten, so by load"
    affinity.assign("x2", "a", [])
    affinity.assign("x3", "a", [])
    affinity.assign("x4", "a", [])
    assert affinity.rank([bytes([1])], ["a", "b"])[0] == "b"


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"), st.booleans()), max_size=200))
def test_counts_equal_the_assignments_left(steps):
    affinity = PrefixAffinity(capacity=8)
    model: dict[str, str] = {}
    for number, replica, start in steps:
        if start:
            affinity.assign(str(number), replica, [bytes([number])])
            model[str(number)] = replica
        else:
            affinity.release(str(number))
            model.pop(str(number), None)
        assert [affinity.in_flight(r) for r in "abc"] == [list(model.values()).count(r) for r in "abc"]
