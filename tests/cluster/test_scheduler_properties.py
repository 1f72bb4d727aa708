"""The scheduler and its KV blocks under random traffic: whatever the simulated runner reads is the request's own text,
every output is the one that the request has when it is alone, and nothing leaks (see `scheduler_world.py`)."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from herd.model.sampling_params import SamplingParams

from .scheduler_world import Shape, World

SHARED_TEXTS = ((2, 3, 4, 5) * 30, (2, 3, 4, 5, 5, 4, 3) * 18)
SHAPES = [
    Shape(1, 3, 12, 4),
    Shape(12, 36, 12, 5),  # lowered to 4
    Shape(2, 3, 12, 3),  # a gcd of 1, so several pages for both kinds of block
    Shape(0, 2, 12, 4),
    Shape(4, 0, None, 4),
    Shape(1, 1, None, 1),
    Shape(1, 2, 12, 12),
]

samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 60),
    min_tokens=st.integers(0, 10),
    stop_token_ids=st.sampled_from([(), (4,)]),
    ignore_eos=st.booleans(),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        shape=st.sampled_from(SHAPES),
        num_pages=st.integers(4, 90),
        max_num_seqs=st.integers(1, 5),
        extra_budget=st.integers(0, 30),
        prefix_caching=st.booleans(),
    )
    def start(self, shape, num_pages, max_num_seqs, extra_budget, prefix_caching) -> None:
        self.world = World(shape, num_pages, max_num_seqs, max_num_seqs + extra_budget, prefix_caching)

    @rule(
        text=st.sampled_from(SHARED_TEXTS),
        length=st.integers(0, 70),
        tail=st.lists(st.integers(2, 6), min_size=1, max_size=8),
        sampling=samplings,
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "other"]),
        lifetime_s=st.none() | st.integers(1, 30),
        resume=st.sampled_from([0, 0, 1, 7, 60]),
    )
    def add(self, text, length, tail, sampling, priority, salt, lifetime_s, resume) -> None:
        self.world.add(
            [*text[:length], *tail], sampling, priority=priority, salt=salt, lifetime_s=lifetime_s, resume=resume
        )

    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick) -> None:
        self.world.abort(f"r{pick % (self.world.num_added + 1)}")

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds) -> None:
        self.world.advance_clock(seconds)

    @precondition(lambda self: self.world.plan is None)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.plan is not None)
    @rule(end=st.sampled_from([*["done"] * 8, "failed", "abandoned", "abandoned"]), num_lost=st.integers(0, 3))
    def finish_step(self, end, num_lost) -> None:
        self.world.finish_step(end, num_lost)

    @precondition(lambda self: self.world.plan is None)
    @rule(count=st.integers(1, 20))
    def steps(self, count) -> None:
        for _ in range(count):
            self.world.schedule()
            self.world.finish_step()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def random_steps(world: World, rng: random.Random, num_steps: int) -> None:
    """Traffic at about the rate that the pool can take, in bursts, with integrity checked after every step."""
    for _ in range(num_steps):
        while len(world.live) < 12 and rng.random() < 0.3:
            text = rng.choice(SHARED_TEXTS)
            world.add(
                [*text[: rng.randrange(70)], *rng.choices(range(2, 7), k=rng.randrange(1, 6))],
                SamplingParams(max_tokens=rng.randrange(1, 40), ignore_eos=rng.random() < 0.3),
                priority=rng.choice((0, 0, 0, 1, 2)),
                lifetime_s=rng.choice((None, None, 40)),
                resume=rng.choice((0, 0, 0, 3)),
            )
        world.advance_clock(0.5)
        world.schedule()
        if world.live and rng.random() < 0.05:
            world.abort(rng.choice(list(world.live)))
        end = rng.choices(("done", "failed", "abandoned"), (0.968, 0.002, 0.03))[0]
        world.finish_step(end, num_lost=rng.choice((0, 1, 2)))
        if world.live and rng.random() < 0.05:
            world.abort(rng.choice(list(world.live)))
        world.check()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_random_traffic(shape: Shape, prefix_caching: bool) -> None:
    world = World(shape, num_pages=70, max_num_seqs=5, budget=16, prefix_caching=prefix_caching)
    random_steps(world, random.Random(7), 400)
    world.drain()
    counters = world.scheduler.counters
    assert world.num_ended > 30
    assert (counters.prefix_hit_tokens > 0) == prefix_caching
    if shape.num_global_layers:
        assert counters.preemptions > 0, "the pool was meant to be tight"


def test_ten_thousand_steps() -> None:
    world = World(SHAPES[0], num_pages=60, max_num_seqs=6, budget=20, prefix_caching=True)
    random_steps(world, random.Random(11), 10_000)
    world.drain()
    assert world.num_ended > 1000
    assert world.scheduler.counters.preemptions > 100
