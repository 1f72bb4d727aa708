"""How requests end, and which never begin: stop ids, lengths, deadlines, aborts, failed steps, refusals, resumption."""

from __future__ import annotations

import pytest

from herd.cluster.errors import ContextLengthExceeded, DeadlineExceeded, EngineFault, Overloaded, RequestError
from herd.cluster.request import FinishReason, RequestState, TokenLogprob

from .scheduler_clients import ANY, EOS, Clients, finish, make, step


@pytest.mark.parametrize(
    ("sampling", "token", "reason"),
    [
        ({}, EOS, FinishReason.STOP),
        ({"ignore_eos": True}, EOS, None),
        ({"stop_token_ids": (5,)}, 5, FinishReason.STOP),
        ({"stop_token_ids": (5,), "ignore_eos": True}, 5, FinishReason.STOP),
        ({"min_tokens": 1}, EOS, None),
        ({"min_tokens": 1, "stop_token_ids": (5,)}, 5, None),
        ({"max_tokens": 1}, ANY, FinishReason.LENGTH),
        ({"max_tokens": 1}, EOS, FinishReason.STOP),
        ({"max_tokens": 1, "min_tokens": 1}, EOS, FinishReason.LENGTH),
    ],
)
def test_what_a_first_token_means(sampling, token, reason) -> None:
    scheduler = make()
    Clients(scheduler).add("a", 4, **sampling)
    (output,) = finish(scheduler, scheduler.schedule(), token)
    assert (output.token_ids, output.finish_reason, output.error) == ((token,), reason, None)
    assert scheduler.has_work == (reason is None)


def test_stop_ids_count_after_min_tokens() -> None:
    scheduler = make()
    Clients(scheduler).add("a", 4, min_tokens=2)
    reasons = [finish(scheduler, scheduler.schedule(), EOS)[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP]


def test_the_models_context_ends_an_output() -> None:
    scheduler = make(model_len=6)
    request = Clients(scheduler).add("a", 4)
    step(scheduler)
    (output,) = finish(scheduler, scheduler.schedule())
    assert output.finish_reason is FinishReason.LENGTH
    assert request.num_tokens == 6


def test_a_full_pool_ends_the_output_of_a_lone_request() -> None:
    scheduler = make(num_pages=8)  # 8 positions; a ninth token needs no position
    request = Clients(scheduler).add("a", 6)
    while scheduler.has_work:
        step(scheduler)
    assert (request.finish_reason, request.num_tokens) == (FinishReason.LENGTH, 9)


def test_logprobs_travel_with_their_token() -> None:
    scheduler = make()
    Clients(scheduler).add("a", 4)
    plan = scheduler.schedule()
    logprob = TokenLogprob(-0.5, (ANY,), (-0.5,))
    (output,) = scheduler.update(plan, [(ANY, logprob)])
    assert output.logprobs == (logprob,)


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    scheduler = make(seqs=1)
    clients = Clients(scheduler)
    clients.add("running", 4, deadline_s=10.0)
    clients.add("waiting", 4, deadline_s=9.0)
    clients.add("patient", 4)
    step(scheduler)
    assert scheduler.expire(8.9) == []
    (output,) = scheduler.expire(9.5)
    assert output.request_id == "waiting"
    assert isinstance(output.error, DeadlineExceeded)
    assert output.finish_reason is None
    (output,) = scheduler.expire(10.0)
    assert output.request_id == "running"
    scheduler.check_integrity()
    assert [name for name, *_ in step(scheduler)] == ["patient"]


# Abort


def test_an_abort_frees_blocks_at_once() -> None:
    scheduler = make(seqs=1, caching=False)
    clients = Clients(scheduler)
    clients.add("a", 8)
    clients.add("b", 8)
    step(scheduler)
    for name in ("a", "b"):
        output = scheduler.abort(name)
        assert output is not None
        assert (output.finish_reason, output.token_ids) == (FinishReason.ABORT, ())
        scheduler.check_integrity()
    assert scheduler.abort("a") is None
    assert scheduler.abort("never") is None
    assert scheduler.kv.usage.used == 0


def test_an_abort_in_flight_leaves_the_step_its_tables() -> None:
    scheduler = make(caching=False)
    clients = Clients(scheduler)
    clients.add("a", 8)
    clients.add("b", 8)
    plan = scheduler.schedule()
    assert scheduler.abort("a") is not None
    assert scheduler.kv.tables("a").global_pages
    again = clients.add("a", 4)
    outputs = finish(scheduler, plan)
    assert [output.request_id for output in outputs] == ["b"]
    with pytest.raises(KeyError):
        scheduler.kv.tables("a")
    assert step(scheduler) == [("b", 1, True), ("a", 4, True)]
    assert again.state is RequestState.RUNNING


def test_one_request_can_end_with_an_error() -> None:
    scheduler = make()
    clients = Clients(scheduler)
    clients.add("a", 4)
    clients.add("b", 4)
    plan = scheduler.schedule()
    error = EngineFault("its row went wrong")
    output = scheduler.fail("a", error)
    assert output is not None
    assert (output.error, output.finish_reason) == (error, None)
    assert scheduler.fail("a", error) is None
    assert [output.request_id for output in finish(scheduler, plan)] == ["b"]


def test_a_failed_step_ends_its_requests_and_no_others() -> None:
    scheduler = make(seqs=2)
    clients = Clients(scheduler)
    for name in "abc":
        clients.add(name, 4)
    plan = scheduler.schedule()
    scheduler.abort("b")
    (output,) = scheduler.fail_step(plan, EngineFault("out of memory"))
    assert output.request_id == "a"
    assert isinstance(output.error, EngineFault)
    assert scheduler.kv.usage.used == 0
    assert scheduler.kv.usage.cached == 0, "nothing of a failed step is ever reused"
    assert step(scheduler) == [("c", 4, True)]


def test_one_step_at_a_time() -> None:
    scheduler = make()
    Clients(scheduler).add("a")
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="in flight"):
        scheduler.schedule()
    finish(scheduler, plan)
    with pytest.raises(AssertionError, match="not in flight"):
        finish(scheduler, plan)


# What is refused


def test_a_full_queue_is_told_so() -> None:
    scheduler = make(seqs=2, queued=1)
    clients = Clients(scheduler)
    for name in "abc":
        clients.add(name)
    with pytest.raises(Overloaded, match="0 requests run and 3 wait"):
        clients.add("d")
    step(scheduler)
    with pytest.raises(Overloaded, match="2 requests run and 1 wait"):
        clients.add("d")
    scheduler.abort("c")
    clients.add("d")


def test_without_a_queue_free_seats_still_take_requests() -> None:
    scheduler = make(seqs=1, queued=0)
    clients = Clients(scheduler)
    clients.add("a")
    with pytest.raises(Overloaded):
        clients.add("b")


@pytest.mark.parametrize(
    ("settings", "longest"), [({"model_len": 20}, 19), ({"num_pages": 8}, 8), ({"num_pages": 0}, 0)]
)
def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers(settings, longest) -> None:
    scheduler = make(**settings)
    clients = Clients(scheduler)
    if longest:
        clients.add("fits", longest)
    with pytest.raises(ContextLengthExceeded, match=f"maximum context length is {longest + 1} tokens") as caught:
        clients.add("beyond", longest + 1)
    assert f"has {longest + 1}" in caught.value.message
    assert (caught.value.limit, caught.value.requested) == (longest + 1, longest + 1)


def test_empty_prompts_and_ids_in_use_are_refused() -> None:
    scheduler = make()
    clients = Clients(scheduler)
    with pytest.raises(RequestError, match="at least one token"):
        clients.add("a", [])
    clients.add("a")
    with pytest.raises(RequestError, match="'a' is in use"):
        clients.add("a")


# Resumption


def test_resumed_tokens_count_as_output_and_are_not_sent_again() -> None:
    scheduler = make()
    request = Clients(scheduler).add("a", [50, 51, 52, ANY, ANY], max_tokens=4, num_resumed_tokens=2)
    (output,) = finish(scheduler, scheduler.schedule())
    assert (output.token_ids, output.finish_reason) == ((ANY,), None)
    (output,) = finish(scheduler, scheduler.schedule())
    assert (output.token_ids, output.finish_reason) == ((ANY,), FinishReason.LENGTH)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("tail", "sampling", "reason"),
    [([ANY, EOS], {}, FinishReason.STOP), ([ANY, ANY], {"max_tokens": 2}, FinishReason.LENGTH)],
)
def test_a_resumed_request_that_had_ended_comes_back_finished(tail, sampling, reason) -> None:
    scheduler = make()
    request = Clients(scheduler).add("a", [50, 51, *tail], num_resumed_tokens=2, **sampling)
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, reason)
    assert not scheduler.has_work


def test_resumed_output_is_no_cached_prompt() -> None:
    scheduler = make()
    clients = Clients(scheduler)
    clients.add("a", list(range(50, 62)), max_tokens=1)
    step(scheduler)
    request = clients.add("b", list(range(50, 62)), num_resumed_tokens=6)
    assert step(scheduler) == [("b", 4, True)]
    assert request.num_cached_tokens == 6
