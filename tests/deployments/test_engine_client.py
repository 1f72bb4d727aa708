import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from herd.cluster.errors import EngineFault, EngineUnavailable, HerdError, Overloaded
from herd.cluster.token_link import TokenStreamClient
from herd.deployments import engine_client
from herd.deployments.engine_client import herd_error
from herd.deployments.journal import EngineLost

from .client_setup import END, collect, setup, until


async def test_tokens_come_over_the_token_stream_and_the_call_just_ends():
    async with setup() as s:
        stream = s.client.submit([{"id": "a"}, {"id": "b"}])
        first, second = await s.called(2)
        assert [first["request"]["id"], second["request"]["id"]] == ["a", "b"]
        link = await s.link()
        link.send_updates([[first["handle"], [1], None, None], [second["handle"], [7], None, None]])
        link.send_updates([[second["handle"], [8, 9], [[-0.1, [], []], [-0.2, [], []]], END]])
        link.send_updates([[first["handle"], [2], None, END]])
        got = await collect(stream, 2)
        assert [u for u in got if u[0] == 0] == [(0, [1], None, None), (0, [2], None, END)]
        assert [u[1] for u in got if u[0] == 1] == [[7], [8, 9]]
        for _, response in s.handle.calls:
            response.result.set_result(END)
        stream.close()
        assert s.aborted == []


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Overloaded("full", retry_after_s=3), Overloaded),
        (BackPressureError(5, 5), Overloaded),
        (ActorDiedError(), EngineUnavailable),
        (RequestCancelledError("x"), EngineUnavailable),
        (ValueError("?"), EngineFault),
    ],
)
async def test_a_call_that_fails_without_time_to_recover_fails_the_stream(raised, expected):
    async with setup(recovery_timeout_s=0) as s:
        stream = s.client.submit([{"id": "a"}])
        await s.called()
        s.handle.calls[0][1].result.set_exception(raised)
        with pytest.raises(expected):
            await stream.updates()


async def test_a_call_that_cannot_be_made_fails_the_stream():
    async with setup() as s:
        s.handle.fail = BackPressureError(5, 5)
        with pytest.raises(Overloaded):
            await s.client.submit([{"id": "a"}]).updates()


def test_errors_of_ours_are_found_inside_rays():
    error = Overloaded("full", retry_after_s=3)
    wrapped = RayTaskError("f", "trace", error).as_instanceof_cause()
    found = herd_error(wrapped)
    assert type(found) is Overloaded
    assert found.retry_after_s == 3
    assert type(herd_error(RayTaskError("f", "trace", ActorDiedError()))) is EngineLost


async def test_a_stream_whose_end_never_comes_fails_after_a_grace(monkeypatch):
    monkeypatch.setattr(engine_client, "END_GRACE_S", 0.01)
    async with setup(recovery_timeout_s=0) as s:
        stream = s.client.submit([{"id": "a"}])
        await s.called()
        s.handle.calls[0][1].result.set_result(END)
        with pytest.raises(EngineUnavailable, match="never arrived"):
            await stream.updates()


async def test_an_end_that_comes_before_the_call_returns_is_enough():
    async with setup() as s:
        stream = s.client.submit([{"id": "a"}])
        (wire,) = await s.called()
        (await s.link()).send_updates([[wire["handle"], [1], None, END]])
        assert await collect(stream, 1) == [(0, [1], None, END | {"num_output_tokens": 1})]
        s.handle.calls[0][1].result.set_exception(ActorDiedError())
        await asyncio.sleep(0)
        stream.close()


async def test_what_had_arrived_is_handed_out_before_the_error():
    async with setup(recovery_timeout_s=0) as s:
        stream = s.client.submit([{"id": "a"}])
        (wire,) = await s.called()
        (await s.link()).send_updates([[wire["handle"], [1], None, None]])
        assert [u.token_ids for u in await stream.updates()] == [[1]]
        s.engine.links()[0].close()
        with pytest.raises(EngineUnavailable, match="lost"):
            await stream.updates()


async def test_a_lost_engine_fails_its_own_streams_only():
    async with setup(recovery_timeout_s=0) as s:
        mine, other = s.client.submit([{"id": "a"}]), s.client.submit([{"id": "b"}])
        first, second = await s.called(2)
        (await s.link()).send_updates([[first["handle"], [1], None, None]])
        await mine.updates()
        e2 = TokenStreamClient(engine_id="e2", on_abort=lambda *_: None, on_lost=lambda _: None)
        link = await e2.link(second["reply_to"], "elsewhere")
        link.send_updates([[second["handle"], [5], None, None]])
        await other.updates()
        s.engine.links()[0].close()
        with pytest.raises(EngineUnavailable):
            await mine.updates()
        link.send_updates([[second["handle"], [6], None, END]])
        assert [u[1] for u in await collect(other, 1)] == [[6]]
        e2.close()


async def test_giving_up_tells_the_engine_or_else_serve():
    async with setup() as s:
        known, unknown = s.client.submit([{"id": "a"}]), s.client.submit([{"id": "b"}])
        first, second = await s.called(2)
        link = await s.link()
        link.send_updates([[first["handle"], [1], None, None]])
        await known.updates()
        known.close()
        unknown.close()
        await until(lambda: s.aborted == [first["handle"]])
        assert not s.handle.calls[0][1].result.done()
        assert isinstance(s.handle.calls[1][1].result.exception(), HerdError | RequestCancelledError)
        link.send_updates([[second["handle"], [1], None, None]])
        await until(lambda: s.aborted == [first["handle"], second["handle"]])


async def test_giving_up_at_once_makes_no_call():
    async with setup() as s:
        s.client.submit([{"id": "a"}]).close()
        await asyncio.sleep(0)
        assert s.handle.calls == []


async def test_figures_reach_the_metrics_and_leave_with_the_engine():
    async with setup() as s:
        s.client.submit([{"id": "a"}])
        link = await s.link()
        link.send_stats({"running": 3})
        await until(lambda: b'herd_engine_running{engine="e1"} 3.0' in s.metrics.render())
        link.close()
        await until(lambda: b"herd_engine_running" not in s.metrics.render())


async def test_info_is_asked_of_any_engine():
    async with setup() as s:
        asking = asyncio.create_task(s.client.info())  # pyright: ignore[reportArgumentType]
        await s.called()
        s.handle.calls[0][1].result.set_result({"max_model_len": 5})
        assert await asking == {"max_model_len": 5}
        s.handle.fail = BackPressureError(5, 5)
        with pytest.raises(HerdError):
            await s.client.info()
