"""The scheduler's rules one by one: order, budget, pieces, seats, pages, preemption, prefixes."""

from __future__ import annotations

import pytest

from herd.cluster.request import FinishReason, RequestState

from .scheduler_clients import ANY, Clients, finish, make, shape, step

# Order, budget and pieces


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = make()
    plan = scheduler.schedule()
    assert (plan.entries, plan.total_tokens, scheduler.has_work) == ((), 0, False)
    assert scheduler.update(plan, []) == []


def test_a_prompt_is_computed_and_then_one_token_a_step() -> None:
    scheduler = make()
    request = Clients(scheduler).add("a", 4, max_tokens=3)
    assert step(scheduler) == [("a", 4, True)]
    assert step(scheduler) == [("a", 1, True)]
    plan = scheduler.schedule()
    assert request.num_computed_tokens == 5, "a plan says where it starts until it is done"
    (output,) = finish(scheduler, plan)
    assert (output.token_ids, output.finish_reason) == ((ANY,), FinishReason.LENGTH)
    assert request.state is RequestState.FINISHED
    assert not scheduler.has_work


def test_pieces_are_cut_at_the_budget_and_at_chunk_borders() -> None:
    scheduler = make(budget=10)
    Clients(scheduler).add("a", 30)
    assert [step(scheduler)[0] for _ in range(6)] == [
        ("a", 10, False),
        ("a", 2, False),
        ("a", 10, False),
        ("a", 2, False),
        ("a", 6, True),
        ("a", 1, True),
    ]


def test_without_chunks_only_the_budget_cuts() -> None:
    scheduler = make(budget=20, chunk=None)
    Clients(scheduler).add("a", 30)
    assert [step(scheduler)[0] for _ in range(2)] == [("a", 20, False), ("a", 10, True)]


def test_decodes_are_never_starved_by_prompts() -> None:
    scheduler = make(budget=8, seqs=4)
    clients = Clients(scheduler)
    clients.add("a", 4)
    clients.add("b", 4)
    step(scheduler)
    clients.add("urgent", 20, priority=-1)
    assert step(scheduler) == [("a", 1, True), ("b", 1, True), ("urgent", 6, False)]
    assert step(scheduler) == [("a", 1, True), ("b", 1, True), ("urgent", 6, False)]


def test_a_budget_below_the_seats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(4\).*max_num_seqs \(8\)"):
        make(budget=4, seqs=8)


def test_requests_run_by_priority_and_then_by_arrival() -> None:
    scheduler = make(budget=12, seqs=2)
    clients = Clients(scheduler)
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        clients.add(name, 4, max_tokens=1, priority=priority)
    assert step(scheduler) == [("urgent", 4, True), ("first", 4, True)]
    assert step(scheduler) == [("second", 4, True), ("late", 4, True)]


def test_a_better_priority_prompt_goes_before_a_half_computed_one() -> None:
    scheduler = make(budget=8)
    clients = Clients(scheduler)
    clients.add("long", 40)
    assert step(scheduler) == [("long", 8, False)]
    clients.add("equal", 4)
    clients.add("urgent", 6, priority=-1)
    assert step(scheduler) == [("urgent", 6, True), ("long", 2, False)]


def test_several_prompts_fill_one_step() -> None:
    scheduler = make(budget=16)
    clients = Clients(scheduler)
    for name in "abc":
        clients.add(name, 6)
    assert step(scheduler) == [("a", 6, True), ("b", 6, True), ("c", 4, False)]


# Seats and pages


def test_seats_bound_what_runs() -> None:
    scheduler = make(seqs=2)
    clients = Clients(scheduler)
    for name in "abc":
        clients.add(name, 4, max_tokens=2)
    assert [name for name, *_ in step(scheduler)] == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    step(scheduler)
    assert [name for name, *_ in step(scheduler)] == ["c"]


@pytest.mark.parametrize(("num_pages", "admitted"), [(18, False), (19, True)])
def test_a_prompt_gets_in_when_pages_last_for_it_and_for_those_before_it(num_pages, admitted) -> None:
    scheduler = make(num_pages=num_pages)
    clients = Clients(scheduler)
    # After its first chunk, long holds 3 * 4 pages; at the end of its second one it will hold 6 + 3 * 3.
    clients.add("long", 28)
    clients.add("short", 4)
    assert step(scheduler) == [("long", 12, False)] + admitted * [("short", 4, True)]


def test_admission_leaves_a_little_for_decoding() -> None:
    scheduler = make(num_pages=200, chunk=None, budget=1000, model_len=1000)  # a block is a page
    clients = Clients(scheduler)
    clients.add("a", 4 * 100)
    clients.add("b", 4 * 99)
    assert step(scheduler) == [("a", 400, True)], "1 % of 200 pages are kept, and b would leave one"
    scheduler.abort("b")
    clients.add("c", 4 * 96)
    assert step(scheduler) == [("a", 1, True), ("c", 384, True)]


def test_short_of_pages_the_last_in_order_is_preempted_and_comes_back() -> None:
    scheduler = make(num_pages=16, caching=False)
    clients = Clients(scheduler)
    first = clients.add("first", 7, max_tokens=6)
    last = clients.add("last", 7, max_tokens=6)
    step(scheduler)
    step(scheduler)
    assert (first.num_tokens, last.num_tokens) == (9, 9)
    plan = scheduler.schedule()
    assert shape(plan) == [("first", 1, True)]
    assert plan.preempted == (last,)
    assert (last.state, last.num_computed_tokens) == (RequestState.PREEMPTED, 0)
    finish(scheduler, plan)
    assert scheduler.counters.preemptions == 1
    while first.state is RequestState.RUNNING:
        step(scheduler)
    assert step(scheduler) == [("last", 9, True)], "its output is computed again, not drawn again"
    assert last.num_output_tokens == 3


def test_the_last_in_order_stalls_and_keeps_what_it_has() -> None:
    scheduler = make(num_pages=24, budget=8, chunk=120)  # 6 blocks of 4 pages
    clients = Clients(scheduler)
    clients.add("first", 12, max_tokens=3)
    last = clients.add("last", 12)
    assert step(scheduler) == [("first", 8, False)]
    assert step(scheduler) == [("first", 4, True), ("last", 4, False)]
    assert step(scheduler) == [("first", 1, True)], "its fourth block leaves one, and last wants two"
    assert (last.state, last.num_computed_tokens) == (RequestState.RUNNING, 4)
    assert step(scheduler) == [("first", 1, True)]
    assert step(scheduler) == [("last", 8, True)]
    assert scheduler.counters.preemptions == 0


def test_a_planned_decode_gives_way_to_a_prompt_before_it() -> None:
    scheduler = make(num_pages=20, caching=False, seqs=2, budget=5, chunk=120)  # 5 blocks of 4 pages
    clients = Clients(scheduler)
    low = clients.add("low", 3, priority=1)
    step(scheduler)
    clients.add("long", 16)
    for _ in range(3):
        assert step(scheduler) == [("low", 1, True), ("long", 4, False)]
    plan = scheduler.schedule()
    assert (shape(plan), plan.total_tokens) == ([("long", 4, True)], 4)
    assert plan.preempted == (low,)
    finish(scheduler, plan)


def test_preempted_requests_come_before_later_equals() -> None:
    scheduler = make(seqs=1)
    clients = Clients(scheduler)
    early = clients.add("early", 4, priority=1)
    step(scheduler)
    clients.add("late", 4, priority=1)
    clients.add("urgent", 4, priority=0, max_tokens=1)
    plan = scheduler.schedule()
    assert shape(plan) == [("urgent", 4, True)], "seats are taken from worse priorities"
    assert plan.preempted == (early,)
    finish(scheduler, plan)
    assert [name for name, *_ in step(scheduler)] == ["early"]


def test_equal_priority_preempts_nobody_to_get_in() -> None:
    scheduler = make(seqs=1)
    clients = Clients(scheduler)
    clients.add("early", 4)
    step(scheduler)
    clients.add("late", 4)
    assert step(scheduler) == [("early", 1, True)]
    assert scheduler.counters.preemptions == 0


def test_nobody_is_preempted_for_a_request_that_would_not_fit_anyway() -> None:
    scheduler = make(num_pages=24, caching=False, chunk=120)  # 6 blocks of 4 pages
    clients = Clients(scheduler)
    clients.add("peer", 12)
    clients.add("low", 4, priority=1)
    step(scheduler)
    clients.add("big", 20, priority=0)
    assert scheduler.schedule().preempted == ()


def test_pages_are_taken_from_worse_priorities() -> None:
    scheduler = make(num_pages=24, caching=False, budget=24, chunk=120)  # 6 blocks of 4 pages
    clients = Clients(scheduler)
    low = [clients.add(f"low{i}", 8, priority=1) for i in range(2)]
    step(scheduler)
    urgent = clients.add("urgent", 16)
    plan = scheduler.schedule()
    assert plan.preempted == (low[1], low[0])
    assert [entry.request for entry in plan.entries] == [urgent]
    finish(scheduler, plan)


def test_pages_that_a_worse_priority_prompt_still_needs_are_not_kept_for_it() -> None:
    scheduler = make(num_pages=24, budget=8, chunk=120)  # 6 blocks of 4 pages
    clients = Clients(scheduler)
    clients.add("low", 20, priority=1)
    assert step(scheduler) == [("low", 8, False)]
    clients.add("urgent", 16)
    assert step(scheduler) == [("urgent", 8, False)]
    assert scheduler.counters.preemptions == 0


# The prefix cache


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make()
    clients = Clients(scheduler)
    clients.add("a", list(range(10, 20)), max_tokens=1)
    step(scheduler)
    request = clients.add("b", list(range(10, 21)), max_tokens=1)
    assert step(scheduler) == [("b", 3, True)]
    assert request.num_cached_tokens == 8
    assert (scheduler.counters.prefix_query_tokens, scheduler.counters.prefix_hit_tokens) == (21, 8)


def test_cached_tokens_are_those_of_the_first_scheduling() -> None:
    scheduler = make(seqs=1)
    clients = Clients(scheduler)
    request = clients.add("a", 10, priority=1)
    step(scheduler)
    clients.add("urgent", 4, max_tokens=1)
    step(scheduler)
    assert step(scheduler) == [("a", 3, True)], "preempted, it finds its own blocks"
    assert request.num_cached_tokens == 0
    assert scheduler.counters.prefix_query_tokens == 14
