"""A closed-loop load test of an OpenAI server: each of N streams sends its next request when its last one has ended.
Measures what a client sees; knows nothing of the server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

_WORDS = ("river", "stone", "light", "paper", "green", "winter", "house", "music", "seven", "field", "bread", "cloud")


@dataclass(frozen=True)
class Load:
    """What to send."""

    url: str
    model: str
    concurrency: int
    requests: int
    max_tokens: int
    prompt_words: int


@dataclass
class LoadResult:
    """What came back. Times in milliseconds; None where nothing was measured."""

    concurrency: int
    requests: int
    errors: int
    duration_s: float
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    reasons: list[str]


@dataclass
class _Tally:
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    tokens: int = 0
    done: int = 0
    reasons: list[str] = field(default_factory=list)


def run_load(load: Load) -> LoadResult:
    """Run one load to its end. A request that fails is counted, never raised."""
    tally = _Tally()
    began = time.perf_counter()
    asyncio.run(_run(load, tally))
    duration = time.perf_counter() - began
    return LoadResult(
        concurrency=load.concurrency,
        requests=load.requests,
        errors=len(tally.reasons),
        duration_s=duration,
        output_tokens=tally.tokens,
        output_tokens_per_s=tally.tokens / duration,
        requests_per_s=tally.done / duration,
        ttft_p50_ms=_percentile_ms(tally.ttft_s, 0.5),
        ttft_p99_ms=_percentile_ms(tally.ttft_s, 0.99),
        itl_p50_ms=_percentile_ms(tally.itl_s, 0.5),
        itl_p99_ms=_percentile_ms(tally.itl_s, 0.99),
        reasons=tally.reasons,
    )


async def _run(load: Load, tally: _Tally) -> None:
    prompts = _prompts(load)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=load.url, timeout=httpx.Timeout(None, connect=10.0), limits=limits) as http:

        async def stream() -> None:
            for prompt in prompts:  # shared: the next one goes to whoever is free
                await _one(http, load, prompt, tally)

        await asyncio.gather(*(stream() for _ in range(load.concurrency)))


def _prompts(load: Load) -> Iterator[str]:
    """Different from the first word on, so that no prefix cache can help."""
    chooser = random.Random(load.requests)
    for number in range(load.requests):
        yield f"{number} " + " ".join(chooser.choices(_WORDS, k=load.prompt_words))


async def _one(http: httpx.AsyncClient, load: Load, prompt: str, tally: _Tally) -> None:
    body: dict[str, Any] = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.perf_counter()
    tokens = None
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                tally.reasons.append(
                    f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                )
                return
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                chunk = json.loads(line[5:])
                now = time.perf_counter()
                if "error" in chunk:
                    raise ValueError(chunk["error"].get("message", "error"))
                if any(choice.get("text") for choice in chunk["choices"]):
                    (tally.ttft_s if last == began else tally.itl_s).append(now - last)
                    last = now
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        tally.reasons.append(f"{type(error).__name__}: {error}")
        return
    if tokens is None:
        tally.reasons.append("the stream ended without usage")
        return
    tally.tokens += tokens
    tally.done += 1


def _percentile_ms(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1e3
