"""Whole answers while engines die, through the HTTP application and the real engine client: nothing of it shows."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from herd.cluster.metrics import GatewayMetrics
from herd.cluster.token_link import TokenStreamClient
from herd.deployments.engine_client import EngineClient

from .fake_gateway import byte_ids, gateway, text_of

LETTERS = [byte_ids(letter)[0] for letter in "abcdefghij"]
LENGTH = 24


class MortalEngine:
    """Dies after so many tokens. What it says at a position depends on seed and position only."""

    def __init__(self, number: int, lifetime: int | None) -> None:
        self.tokens_left = lifetime
        self.streams = TokenStreamClient(f"e{number}", on_abort=self._on_abort, on_lost=lambda link: None)
        self.aborted: set[int] = set()

    async def generate(self, wire: dict[str, Any]) -> None:
        link = await self.streams.link(wire["reply_to"], "node")
        request = wire["request"]
        sampling, sequence = request["sampling"], list(request["prompt_ids"])
        start = len(sequence) - request["num_resumed_tokens"]
        while wire["handle"] not in self.aborted:
            await asyncio.sleep(0)
            if self.tokens_left == 0:
                raise ActorDiedError
            done = len(sequence) - start
            end = None
            if done >= sampling["max_tokens"]:
                end = {"finish_reason": "length", "num_cached_tokens": 2, "num_output_tokens": 0}
                link.send_updates([[wire["handle"], [], None, end]])
                return
            token = LETTERS[hash((sampling["seed"], len(sequence))) % len(LETTERS)]
            score = [-0.125 * (len(sequence) % 8), [token, 7], [-0.5, -2.0]]
            sequence.append(token)
            link.send_updates([[wire["handle"], [token], [score], None]])
            if self.tokens_left is not None:
                self.tokens_left -= 1
                if self.tokens_left == 0:
                    self.streams.close()

    def _on_abort(self, link: object, handles: list[int]) -> None:
        self.aborted.update(handles)


class Engines:
    """The Serve handle of a deployment of one mortal engine, replaced at once when it dies."""

    def __init__(self, lifetimes: list[int]) -> None:
        self._lifetimes = list(lifetimes)
        self.engines: list[MortalEngine] = []
        self.generate = self
        self.calls = 0

    def remote(self, wire: dict[str, Any]) -> asyncio.Task[None]:
        self.calls += 1
        if not self.engines or self.engines[-1].tokens_left == 0:
            lifetime = self._lifetimes.pop(0) if self._lifetimes else None
            self.engines.append(MortalEngine(len(self.engines), lifetime))
        return asyncio.get_running_loop().create_task(self.engines[-1].generate(wire))


async def answer(lifetimes: list[int], body: dict[str, Any]) -> tuple[Any, int]:
    """The body's answer, without what differs between any two answers, and how many choices were resumed."""
    async with gateway() as g:
        engines, metrics = Engines(lifetimes), GatewayMetrics()
        client = EngineClient(
            engines,  # pyright: ignore[reportArgumentType]
            metrics,
            host="127.0.0.1",
            node_id="node",
            recovery_timeout_s=30,
        )
        await client.start()
        g.service.engines = client
        async with asyncio.timeout(30):
            reply = await g.complete(**body)
        for engine in engines.engines:
            engine.streams.close()
        await client.close()
    assert reply.status == 200, reply.body
    resumed = metrics.registry.get_sample_value("herd_gateway_resumed_requests_total")
    assert resumed is not None
    if body.get("stream"):
        return gathered(reply.events()), int(resumed)
    return {key: value for key, value in reply.json().items() if key not in ("id", "created")}, int(resumed)


def gathered(events: list[Any]) -> Any:
    """A stream's choices put together, however it was cut."""
    chunks = [choice for event in events[:-1] for choice in event["choices"]]
    whole = []
    for index in sorted({choice["index"] for choice in chunks}):
        own = [choice for choice in chunks if choice["index"] == index]
        scores = [choice["logprobs"] for choice in own if choice["logprobs"]]
        whole.append(
            (
                text_of(events, index),
                [token for choice in own for token in choice.get("token_ids", ())],
                {key: [value for score in scores for value in score[key]] for key in scores[0]} if scores else None,
                [choice["finish_reason"] for choice in own if choice["finish_reason"]],
            )
        )
    return whole, [event["usage"] for event in events[:-1] if event.get("usage")]


BODIES: dict[str, dict[str, Any]] = {
    "whole": {"n": 2, "logprobs": 2},
    "stream": {"n": 2, "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}},
    "echo": {"echo": True, "prompt": ["sheep", "goats"]},
    "stop": {"n": 3, "stop": ["ab", "ca", "ef"], "logprobs": 1},
    "ids": {"stream": True, "return_token_ids": True, "n": 2},
}


@pytest.mark.parametrize("kind", BODIES)
@settings(max_examples=10, deadline=None)
@given(lifetimes=st.lists(st.integers(1, 2 * LENGTH), min_size=1, max_size=2))
def test_an_answer_is_the_same_when_engines_die(kind, lifetimes):
    body = {"prompt": "sheep", "max_tokens": LENGTH, "seed": 5} | BODIES[kind]
    calm, none = asyncio.run(answer([], body))
    assert none == 0
    disturbed, resumed = asyncio.run(answer(lifetimes, body))
    assert disturbed == calm
    assert kind == "stop" or min(lifetimes) >= LENGTH or resumed >= 1
