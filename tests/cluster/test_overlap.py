from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.overlap import OverlapTuner, even_cut

tokens_of_sequences = st.lists(st.integers(1, 300), max_size=40)
PAIR = [16, 16]


class Machine:
    """A clock that steps advance: so many seconds a token, by whether the step was split."""

    def __init__(self, whole: float, split: float, noise: Callable[[], float] = lambda: 1.0) -> None:
        self.cost = {False: whole, True: split}
        self.noise = noise
        self.now = 0.0
        self.taken: list[bool] = []

    def run(self, tuner: OverlapTuner, tokens: Sequence[int], count: int = 1) -> list[bool]:
        """Whether each of `count` steps was split."""
        for _ in range(count):
            with tuner.step(tokens) as cut:
                self.now += self.cost[bool(cut)] * sum(tokens) * self.noise()
            self.taken.append(bool(cut))
        return self.taken[-count:]

    def tuner(self) -> OverlapTuner:
        return OverlapTuner("auto", lambda: self.now)


@given(tokens_of_sequences)
def test_a_cut_is_the_most_even_one(tokens: list[int]) -> None:
    total = sum(tokens)
    larger = {n: max(end, total - end) for n, end in enumerate(accumulate(tokens), 1) if n < len(tokens)}
    cut = even_cut(tokens)
    if cut:
        assert larger[cut] == min(larger.values())
        assert 3 * larger[cut] <= 2 * total
    else:
        assert all(3 * size > 2 * total for size in larger.values())


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [([], 0), ([9], 0), ([1, 1], 1), ([1, 1, 1], 1), ([7, 7, 7, 7], 2), ([2, 1], 1), ([200, 1, 1], 0), ([5, 1, 9], 2)],
)
def test_cuts(tokens: list[int], cut: int) -> None:
    assert even_cut(tokens) == cut


@given(st.lists(tokens_of_sequences, max_size=30), st.sampled_from(["on", "off", "auto"]))
def test_a_step_is_split_evenly_or_not_at_all(steps: list[list[int]], mode) -> None:
    tuner = OverlapTuner(mode, lambda: 0.0)
    for tokens in steps:
        with tuner.step(tokens) as cut:
            assert cut in (0, even_cut(tokens))
            if mode != "auto":
                assert cut == (even_cut(tokens) if mode == "on" else 0)


@given(whole=st.floats(0.1, 10), split=st.floats(0.1, 10), count=st.integers(10, 700))
def test_the_slower_way_is_taken_a_few_times_and_then_once_in_a_while(whole: float, split: float, count: int) -> None:
    machine = Machine(whole, split)
    taken = machine.run(machine.tuner(), PAIR, count)
    if abs(whole - split) > 1e-6 * whole:
        slower = taken.count(whole < split)
        assert slower <= 5 + 0.02 * count
        assert slower >= 5 + (count - 10) // 64, "it might have become the faster one"


@pytest.mark.parametrize("split_was_faster", [False, True])
def test_what_becomes_faster_is_found(split_was_faster: bool) -> None:
    machine = Machine(2.0, 1.0) if split_was_faster else Machine(1.0, 2.0)
    tuner = machine.tuner()
    assert machine.run(tuner, PAIR, 100).count(split_was_faster) > 90
    machine.cost = {way: 3.0 - cost for way, cost in machine.cost.items()}
    machine.run(tuner, PAIR, 64 * 5)
    assert machine.run(tuner, PAIR, 100).count(split_was_faster) <= 2


def test_sizes_are_measured_apart() -> None:
    """Small steps gain nothing here, large ones do."""
    machine = Machine(1.0, 1.0)
    tuner = machine.tuner()
    for _ in range(100):
        machine.cost[True] = 1.5
        machine.run(tuner, [1, 1])
        machine.cost[True] = 0.7
        machine.run(tuner, [64, 64])
    assert sum(machine.taken[0::2]) <= 5 + 2
    assert sum(machine.taken[1::2]) >= 100 - 5 - 2


def test_two_steps_that_wait_for_a_lost_shard_change_nothing() -> None:
    machine = Machine(1.1, 1.0)
    tuner = machine.tuner()
    machine.run(tuner, PAIR, 20)
    machine.cost[True] = 1000.0
    machine.run(tuner, PAIR, 2)
    machine.cost[True] = 1.0
    assert machine.run(tuner, PAIR, 30) == [True] * 30


@given(st.integers(0, 10**6))
def test_noise_and_outliers_do_not_hide_what_is_clearly_faster(seed: int) -> None:
    """Now and then a step waits for a lost shard; sizes within a power of two vary."""
    rng = random.Random(seed)
    machine = Machine(1.5, 1.0, noise=lambda: rng.uniform(0.9, 1.1) * (500 if rng.random() < 0.005 else 1))
    tuner = machine.tuner()
    for _ in range(600):
        machine.run(tuner, [rng.randint(16, 31), rng.randint(17, 32)])
    assert sum(machine.taken) > 300


def test_a_step_that_raises_is_not_measured() -> None:
    machine = Machine(1.0, 2.0)
    tuner = machine.tuner()
    for _ in range(50):
        with pytest.raises(ZeroDivisionError), tuner.step(PAIR):
            machine.now += 1 / 0
    assert machine.run(tuner, PAIR, 10) == [False, True] * 5
