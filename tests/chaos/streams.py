"""Many streams at once over real HTTP, with every token and when it came, so that a run with a kill in its middle can
be compared with one without."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

NUM_STREAMS, NUM_TOKENS = 32, 200
STREAM_S = 300.0
"""Longer than any stream may take, a restart in its middle included."""


@dataclass
class Answer:
    """What one client saw."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each token came."""
    logprobs: list[Any] = field(default_factory=list)
    """Of each token, as they were sent: its own and the most likely ones."""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def longest_gap_s(self) -> float:
        """Between two tokens."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


@dataclass
class Run:
    """All answers, and the disturbance."""

    answers: list[Answer]
    seconds: float

    @property
    def longest_gap_s(self) -> float:
        return max(answer.longest_gap_s for answer in self.answers)


def bodies(model: str, vocab_size: int) -> list[dict[str, Any]]:
    """Requests of `NUM_TOKENS` tokens, greedy and seeded in turn."""
    made = []
    for i in range(NUM_STREAMS):
        draw = random.Random(i)
        sampling = {"temperature": 0} if i % 2 else {"temperature": 1.0, "top_p": 0.95, "seed": i}
        made.append(
            {
                "model": model,
                "prompt": [draw.randrange(3, vocab_size) for _ in range(draw.randrange(4, 40))],
                "max_tokens": NUM_TOKENS,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
                "logprobs": 2,
                **sampling,
            }
        )
    return made


def run_streams(url: str, requests: Sequence[dict[str, Any]], disturb: Callable[[], object] | None = None) -> Run:
    """Send all at once; `disturb` runs in a thread of its own once a quarter of all tokens has come."""
    return asyncio.run(_run(url, requests, disturb))


def assert_same(run: Run, undisturbed: Run) -> None:
    """No request failed; no token is lost, doubled or changed, nor a bit of a log-probability; usage counts once."""
    for number, (seen, wanted) in enumerate(zip(run.answers, undisturbed.answers, strict=True)):
        assert seen.error is None, f"stream {number} failed: {seen.error}"
        assert seen.ids == wanted.ids, f"stream {number}: {first_difference(seen.ids, wanted.ids)}"
        assert len(seen.logprobs) == len(seen.ids)
        changed = [n for n, (a, b) in enumerate(zip(seen.logprobs, wanted.logprobs, strict=True)) if a != b]
        assert not changed, f"stream {number}: log-probabilities of tokens {changed[:5]} changed"
        assert seen.finish == wanted.finish
        assert seen.usage["completion_tokens"] == len(wanted.ids)
        assert seen.usage["prompt_tokens"] == wanted.usage["prompt_tokens"]


def first_difference(seen: Sequence[int], wanted: Sequence[int]) -> str:
    """Where two outputs part."""
    for position, (a, b) in enumerate(zip(seen, wanted, strict=False)):
        if a != b:
            return f"token {position} is {a}, not {b}"
    return f"{len(seen)} tokens, not {len(wanted)}"


async def _run(url: str, requests: Sequence[dict[str, Any]], disturb: Callable[[], object] | None) -> Run:
    answers = [Answer() for _ in requests]
    begun = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=STREAM_S, limits=limits) as client:
        streams = [
            asyncio.create_task(_stream(client, body, answer)) for body, answer in zip(requests, answers, strict=True)
        ]
        if disturb is not None:
            quarter = sum(body["max_tokens"] for body in requests) // 4
            while sum(len(answer.ids) for answer in answers) < quarter and not all(s.done() for s in streams):
                await asyncio.sleep(0.005)
            await asyncio.to_thread(disturb)
        await asyncio.gather(*streams)
    return Run(answers, time.monotonic() - begun)


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer) -> None:
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code} {(await response.aread()).decode()}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(json.loads(line.removeprefix("data: ")), answer)
    except httpx.HTTPError as error:
        answer.error = repr(error)


def _take(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        answer.error = str(event["error"])
        return
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        ids = choice.get("token_ids") or []
        answer.ids += ids
        answer.times += [time.monotonic()] * len(ids)
        given = choice.get("logprobs")
        if given is not None:
            answer.logprobs += zip(given["token_logprobs"], given["top_logprobs"], strict=True)
        answer.finish = choice["finish_reason"] or answer.finish
