import asyncio

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from herd.cluster.errors import (
    DeadlineExceeded,
    EngineFault,
    EngineUnavailable,
    ExpertUnavailable,
    GatewayUnreachable,
    Overloaded,
    RequestError,
)
from herd.cluster.token_link import TokenStreamClient
from herd.deployments import engine_client

from .client_setup import ASKED, END, collect, setup, until


async def test_a_lost_engine_s_request_goes_on_at_another_and_the_stream_shows_nothing():
    async with setup() as s:
        stream = s.client.submit([ASKED])
        (first,) = await s.called()
        (await s.link()).send_updates([[first["handle"], [1, 2], None, None]])
        assert [u.token_ids for u in await stream.updates()] == [[1, 2]]
        s.engine.links()[0].close()
        _, second = await s.called(2)
        resumed = {"prompt_ids": [50, 51, 1, 2], "num_resumed_tokens": 2, "timeout_s": None}
        assert second["request"] == ASKED | resumed
        assert second["handle"] != first["handle"]
        assert second["avoid"] == ["e1"]
        e2 = TokenStreamClient(engine_id="e2", on_abort=lambda *_: None, on_lost=lambda _: None)
        end = END | {"num_cached_tokens": 1, "num_output_tokens": 1}
        (await e2.link(second["reply_to"], "node")).send_updates([[second["handle"], [3], None, end]])
        assert await collect(stream, 1) == [(0, [3], None, end | {"num_output_tokens": 3})]
        assert s.resumed() == 1
        e2.close()


async def test_nothing_of_an_earlier_attempt_reaches_the_stream():
    async with setup() as s:
        stream = s.client.submit([ASKED])
        (first,) = await s.called()
        link = await s.link()
        link.send_updates([[first["handle"], [1], None, None]])
        await stream.updates()
        s.handle.calls[0][1].result.set_exception(ActorUnavailableError("network", b"x" * 16))
        _, second = await s.called(2)
        link.send_updates([[first["handle"], [2], None, None]])
        link.send_updates([[first["handle"], [3], None, END]])
        await until(lambda: s.aborted == [first["handle"]])
        link.send_updates([[second["handle"], [2], None, None], [second["handle"], [3], None, END]])
        assert [u[1] for u in await collect(stream, 1)] == [[2], [3]]


FAILING_CALLS = [
    ActorDiedError(),
    RequestCancelledError("x"),
    asyncio.CancelledError(),
    EngineUnavailable("draining"),
    RayTaskError("f", "trace", GatewayUnreachable("no way")).as_instanceof_cause(),
]


@pytest.mark.parametrize("raised", FAILING_CALLS, ids=lambda error: type(error).__name__)
async def test_a_call_that_fails_is_made_again(raised):
    async with setup() as s:
        stream = s.client.submit([ASKED])
        await s.called()
        s.handle.calls[0][1].result.set_exception(raised)
        _, second = await s.called(2)
        assert second["request"]["prompt_ids"] == [50, 51]
        (await s.link()).send_updates([[second["handle"], [1], None, END]])
        assert [u[1] for u in await collect(stream, 1)] == [[1]]


BROKEN_ENDS = [{"error": EngineUnavailable("stopped").to_wire()}, END | {"finish_reason": "abort"}]


@pytest.mark.parametrize("end", BROKEN_ENDS, ids=["stopped", "aborted"])
async def test_an_end_that_is_none_of_the_request_s_own_is_not_passed_on(end):
    async with setup() as s:
        stream = s.client.submit([ASKED])
        (first,) = await s.called()
        link = await s.link()
        link.send_updates([[first["handle"], [1], None, end]])
        _, second = await s.called(2)
        assert second["request"]["prompt_ids"] == [50, 51, 1]
        assert second["avoid"] == ["e1"], "its thread has ended, which Serve cannot know yet"
        link.send_updates([[second["handle"], [2], None, END]])
        assert [u[1] for u in await collect(stream, 1)] == [[1], [2]]


async def test_last_tokens_that_never_arrive_are_asked_for_again(monkeypatch):
    monkeypatch.setattr(engine_client, "END_GRACE_S", 0.01)
    async with setup() as s:
        stream = s.client.submit([ASKED])
        (first,) = await s.called()
        link = await s.link()
        link.send_updates([[first["handle"], [1], None, None]])
        await stream.updates()
        s.handle.calls[0][1].result.set_result(END)
        _, second = await s.called(2)
        assert second["request"]["prompt_ids"] == [50, 51, 1]
        finished = {"finish_reason": "length", "num_cached_tokens": 0, "num_output_tokens": 0}
        link.send_updates([[second["handle"], [], None, finished]])
        assert await collect(stream, 1) == [(0, [], None, finished | {"num_output_tokens": 1})]


@pytest.mark.parametrize("error", [RequestError("x"), DeadlineExceeded("x"), EngineFault("x"), ExpertUnavailable("x")])
async def test_what_no_other_engine_would_do_better_ends_the_stream(error):
    async with setup() as s:
        called, ended = s.client.submit([ASKED]), s.client.submit([ASKED])
        _, second = await s.called(2)
        s.handle.calls[0][1].result.set_exception(error)
        (await s.link()).send_updates([[second["handle"], [1], None, {"error": error.to_wire()}]])
        assert [u.token_ids for u in await ended.updates()] == [[1]]
        for stream in (called, ended):
            with pytest.raises(type(error)):
                await stream.updates()
        assert len(s.handle.calls) == 2


async def test_full_engines_refuse_a_new_request_but_not_one_that_was_being_served():
    async with setup() as s:
        stream = s.client.submit([ASKED])
        (first,) = await s.called()
        (await s.link()).send_updates([[first["handle"], [1], None, None]])
        await stream.updates()
        s.handle.calls[0][1].result.set_exception(ActorDiedError())
        await s.called(2)
        s.handle.calls[1][1].result.set_exception(Overloaded("full"))
        await s.called(3)
        s.handle.calls[2][1].result.set_exception(BackPressureError(5, 5))
        *_, last = await s.called(4)
        assert last["request"]["prompt_ids"] == [50, 51, 1]
        (await s.link()).send_updates([[last["handle"], [2], None, END]])
        assert [u[1] for u in await collect(stream, 1)] == [[2]]


async def test_a_call_that_serve_holds_for_want_of_engines_is_given_up_in_time():
    async with setup(recovery_timeout_s=0.02) as s:
        stream = s.client.submit([ASKED])
        await s.called()
        s.handle.calls[0][1].result.set_exception(ActorDiedError())
        with pytest.raises(EngineUnavailable, match=r"died.*within 0.02 s"):
            await stream.updates()
        assert isinstance(s.handle.calls[1][1].result.exception(), RequestCancelledError)
        assert s.resumed() == 0


async def test_an_engine_that_is_slow_after_a_token_has_all_the_time_of_the_request():
    async with setup() as s:
        stream = s.client.submit([ASKED])
        await s.called()
        s.handle.calls[0][1].result.set_exception(ActorDiedError())
        _, second = await s.called(2)
        (choice,) = s.client._choices
        assert choice.timer is not None
        (await s.link()).send_updates([[second["handle"], [1], None, None]])
        await stream.updates()
        assert choice.timer is None


async def test_a_client_that_leaves_between_two_attempts_is_forgotten():
    async with setup() as s:
        stream = s.client.submit([ASKED])
        for number in range(2):
            await s.called(number + 1)
            s.handle.calls[number][1].result.set_exception(EngineUnavailable("draining"))
        await until(lambda: not s.client._attempts)
        (choice,) = s.client._choices
        assert choice.timer is not None, "the third attempt waits a little"
        stream.close()
        assert choice.timer is None
        assert not s.client._choices


async def test_closing_ends_every_stream():
    async with setup() as s:
        running, between = s.client.submit([ASKED]), s.client.submit([ASKED])
        for number in (1, 2):
            await s.called(number + 1)
            s.handle.calls[number][1].result.set_exception(EngineUnavailable("draining"))
        await until(lambda: len(s.client._attempts) == 1)
        await s.client.close()
        for stream in (running, between):
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await stream.updates()
