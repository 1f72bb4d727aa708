import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.errors import (
    DeadlineExceeded,
    EngineFault,
    EngineUnavailable,
    ExpertUnavailable,
    GatewayUnreachable,
    HerdError,
    Overloaded,
    RequestError,
)
from herd.deployments.journal import LONGEST_PAUSE_S, MAX_LOST_ENGINES, EngineLost, Journal

PROMPT = [5, 6, 7]
FIELDS = {"id": "a", "prompt_ids": PROMPT, "priority": 3, "cache_salt": "s", "num_resumed_tokens": 0}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def journal(recovery_timeout_s: float = 10.0, timeout_s: float | None = None, **fields) -> tuple[Journal, Clock]:
    clock = Clock()
    return Journal(FIELDS | {"timeout_s": timeout_s} | fields, recovery_timeout_s, clock=clock), clock


def refused() -> EngineUnavailable:
    return EngineUnavailable("draining")


def end(reason: str = "stop", cached: int = 0, tokens: int = 0) -> dict:
    return {"finish_reason": reason, "num_cached_tokens": cached, "num_output_tokens": tokens}


def test_the_first_submission_is_the_request_itself():
    j, _ = journal(timeout_s=5.0)
    assert j.next_request() == FIELDS | {"timeout_s": 5.0}
    assert j.patience_s is None


EVENTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 99), min_size=1, max_size=3),
        st.sampled_from(["refused", "full"]),
        st.floats(0, 2),
    ),
    max_size=40,
)


@given(EVENTS)
def test_whatever_happens_the_next_request_is_the_prompt_and_all_that_came(events):
    j, clock = journal(recovery_timeout_s=10.0, timeout_s=60.0)
    started, came, failed = clock.now, [], False
    for event in events:
        if isinstance(event, list):
            j.extend(event)
            came += event
            assert j.patience_s is None
        elif isinstance(event, float):
            clock.now += event
        elif event == "refused" or failed:
            failure = refused() if event == "refused" else Overloaded("full")
            if j.patience_s == 0:
                with pytest.raises(EngineUnavailable):
                    j.pause_after(failure)
                return
            assert 0 <= j.pause_after(failure) <= LONGEST_PAUSE_S
            failed = True
            asked = j.next_request()
            assert asked["prompt_ids"] == PROMPT + came
            assert asked["num_resumed_tokens"] == len(came)
            assert asked["timeout_s"] == pytest.approx(max(0.0, started + 60.0 - clock.now))
            assert {k: asked[k] for k in ("id", "priority", "cache_salt")} == {
                "id": "a",
                "priority": 3,
                "cache_salt": "s",
            }
    assert FIELDS["prompt_ids"] == [5, 6, 7]


def test_pauses_double_from_none_to_a_second_and_begin_anew_with_a_token():
    j, _ = journal()
    assert [j.pause_after(refused()) for _ in range(8)] == [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    j.extend([1])
    assert [j.pause_after(refused()) for _ in range(2)] == [0, 0.05]


def test_patience_counts_from_the_loss_and_ends_with_503():
    j, clock = journal(recovery_timeout_s=10.0)
    j.pause_after(EngineLost("gone"))
    clock.now += 9
    assert j.patience_s == 1
    j.pause_after(refused())
    assert j.patience_s == 1
    clock.now += 1
    with pytest.raises(EngineUnavailable, match=r"draining.*within 10 s"):
        j.pause_after(refused())
    j.extend([1])
    j.pause_after(refused())
    assert j.patience_s == 10


def test_without_patience_there_is_no_second_attempt():
    j, _ = journal(recovery_timeout_s=0.0)
    with pytest.raises(EngineUnavailable):
        j.pause_after(EngineLost("gone"))


@pytest.mark.parametrize("final", [RequestError, DeadlineExceeded, EngineFault, ExpertUnavailable, Overloaded])
def test_what_another_engine_would_do_no_better_ends_the_choice_as_it_is(final):
    error = final("x")
    with pytest.raises(final) as caught:
        journal()[0].pause_after(error)
    assert caught.value is error


def test_who_was_being_served_waits_for_a_place():
    j, clock = journal()
    j.pause_after(EngineLost("gone"))
    assert j.pause_after(Overloaded("full")) > 0
    clock.now += 10
    with pytest.raises(EngineUnavailable) as caught:
        j.pause_after(Overloaded("full"))
    assert caught.value.status == 503


@pytest.mark.parametrize("loss", [EngineLost, GatewayUnreachable])
def test_a_request_that_costs_engine_after_engine_is_given_up_even_if_it_gets_on(loss):
    j, _ = journal()
    for number in range(1, MAX_LOST_ENGINES):
        j.pause_after(loss("gone"), f"e{number}")
        j.pause_after(refused())  # costs nothing
        j.extend([number])
    assert j.lost_engines == [f"e{number}" for number in range(1, MAX_LOST_ENGINES)]
    with pytest.raises(EngineUnavailable, match="3 engines"):
        j.pause_after(loss("gone"), "e9")


def test_ends_are_told_apart():
    j, _ = journal()
    assert j.failure_of(end()) is None
    for error in (RequestError("x", param="p"), EngineFault("x"), ExpertUnavailable("x", retry_after_s=7)):
        found = j.failure_of({"error": error.to_wire()})
        assert type(found) is type(error)
        assert vars(found) == vars(error)
    assert type(j.failure_of({"error": EngineUnavailable("stopped").to_wire()})) is EngineLost
    assert type(j.failure_of(end("abort"))) is EngineLost


def test_the_end_counts_all_attempts_as_one():
    j, _ = journal()
    j.extend([1, 2])
    assert isinstance(j.failure_of(end("abort", cached=2)), HerdError)
    j.extend([3])
    last = end("length", cached=3, tokens=1)
    assert j.failure_of(last) is None
    assert j.whole(last) == end("length", cached=2, tokens=3)
