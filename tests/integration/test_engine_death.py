"""Engines that are killed while they serve: every stream goes on and says what it would have said."""

from __future__ import annotations

import asyncio
import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from .live_app import LiveApp, deploy_app, write_tiny

STREAMS = 32
NEWCOMERS = 4
"""Requests made just after the kill."""
TOKENS = 200
KILL_AFTER = STREAMS * TOKENS // 3
LIMIT_S = 240.0

pytestmark = pytest.mark.chaos


@dataclass
class Answer:
    """What one client got, and when."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def longest_gap_s(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


@pytest.fixture(scope="module", params=[2, 1], ids=["of two", "of one"])
def app(
    request: pytest.FixtureRequest, ray_session: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApp]:
    name = f"mortal{request.param}"
    folder = tmp_path_factory.mktemp(name) / "tiny"
    tokenizer = write_tiny(folder)
    config = {
        "model": {"path": str(folder), "load_format": "dummy", "dtype": "float32"},
        "engine": {"kv_memory": "32MiB", "threads": 1, "replicas": request.param},
        "gateway": {"max_inflight": 2 * STREAMS},
        "http": {"drain_timeout_s": 0},
    }
    yield deploy_app(ray_session, name, "tiny", tokenizer, config)
    importlib.import_module("ray.serve").delete(name)


def engines(app: LiveApp) -> list[psutil.Process]:
    """The processes of its engine replicas, among those that this test run has started."""
    title = f"ray::ServeReplica:{app.name}:Engine"
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end meanwhile
            if "".join(process.cmdline()[:1]).startswith(title):
                found.append(process)
    return found


async def stream(http: httpx.AsyncClient, app: LiveApp, number: int, on_update: Callable[[], None]) -> Answer:
    body = {
        "prompt": f"{number} sheep on a hill",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **({"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}),
    }
    answer = Answer()
    async with http.stream("POST", f"{app.url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            answer.usage = event.get("usage") or answer.usage
            for choice in event["choices"]:
                ids = choice.get("token_ids", [])
                answer.token_ids += ids
                answer.reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                if ids:
                    answer.times.append(time.monotonic())
                    on_update()
    return answer


async def run_all(app: LiveApp, kill: Callable[[], None] = lambda: None) -> list[Answer]:
    """All streams at once, and in the middle of them `kill` and the newcomers."""
    updates, middle = 0, asyncio.Event()

    def on_update() -> None:
        nonlocal updates
        updates += 1
        if updates == KILL_AFTER:
            kill()
            middle.set()

    async def newcomer(number: int) -> Answer:
        await middle.wait()
        return await stream(http, app, number, on_update)

    limits = httpx.Limits(max_connections=None)
    async with asyncio.timeout(LIMIT_S), httpx.AsyncClient(timeout=LIMIT_S, limits=limits) as http:
        first = [stream(http, app, number, on_update) for number in range(STREAMS)]
        return await asyncio.gather(*first, *(newcomer(STREAMS + number) for number in range(NEWCOMERS)))


def resumed(app: LiveApp) -> float:
    (line,) = [x for x in app.get("/metrics").text.splitlines() if x.startswith("herd_gateway_resumed_requests_total")]
    return float(line.split()[1])


def test_killing_an_engine_changes_nothing_but_the_clock(app: LiveApp, capsys: pytest.CaptureFixture[str]) -> None:
    calm = asyncio.run(run_all(app))
    victims = engines(app)
    assert resumed(app) == 0
    disturbed = asyncio.run(run_all(app, victims[0].kill))
    assert [a.token_ids for a in disturbed] == [a.token_ids for a in calm]
    assert len({tuple(a.token_ids) for a in calm}) == STREAMS + NEWCOMERS
    for answer, same in zip(disturbed, calm, strict=True):
        assert len(answer.token_ids) == answer.usage["completion_tokens"] == TOKENS
        assert answer.usage["prompt_tokens"] == same.usage["prompt_tokens"]
        assert answer.reasons == ["length"]
    hit = resumed(app)
    assert STREAMS / len(victims) / 2 <= hit <= STREAMS + NEWCOMERS
    gap_s, calm_gap_s = (max(a.longest_gap_s for a in answers) for answers in (disturbed, calm))
    with capsys.disabled():
        print(f"\nkilled 1 of {len(victims)} engines: {hit:.0f} of {STREAMS} streams resumed,", end=" ")
        print(f"longest gap {gap_s:.2f} s ({calm_gap_s:.2f} s undisturbed)")
