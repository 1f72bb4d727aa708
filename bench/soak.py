"""Random traffic against a running Herd for a long time: is anything answered wrongly, does memory grow, are all KV
pages given back?

    python bench/soak.py --url http://127.0.0.1:8000 --minutes 30 --concurrency 24 [--pid PID] [--out FILE]

So many clients send seeded random requests (`soak_traffic.py`) one after another: chat and completions, streamed or
not, prompts of 1 to 1,500 tokens with shared prefixes, clients that leave at any moment, wrong requests, deadlines,
and a few fixed ones whose answers must never change; beside them /ready and /metrics are polled. `--pid` is the
server's process: with it the resident memory of its tree is noted. Ends by itself with a report in JSON, and with
status 1 if anything was unexpected. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiohttp
import psutil
from process_cpu import OTHER, ROLES
from prometheus_client.parser import text_string_to_metric_families
from soak_answers import Unexpected, check_error, check_stream, check_whole
from soak_traffic import WORDS, Ask, Traffic

MAX_REQUESTS = 200_000
IDLE_S = 60.0
RSS_PERIOD_S = 10.0
PROBE_PERIOD_S = 1.0
KEPT_ERRORS = 20
GROWTH_LIMIT = 0.10
"""Of the tree's memory, from a fifth of the time to the end."""


class Soak:
    """One run and what it found."""

    def __init__(self, session: aiohttp.ClientSession, args: argparse.Namespace) -> None:
        self._session = session
        self._args = args
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.unexpected: list[str] = []
        self.num_unexpected = 0
        self.output_tokens = 0
        self.seconds: list[float] = []
        self.rss: list[tuple[float, dict[str, float]]] = []
        self.peaks: Counter[str] = Counter()
        self._references: dict[int, list[str]] = {}

    async def traffic(self) -> Traffic:
        """Learn what is served."""
        async with self._session.get(f"{self._args.url}/v1/models") as response:
            model = (await response.json())["data"][0]
        body = {"prompt": " ".join(WORDS * 60), "add_special_tokens": False}
        async with self._session.post(f"{self._args.url}/tokenize", json=body) as response:
            ids = (await response.json())["tokens"]
        return Traffic(self._args.seed, model["id"], model["max_model_len"], ids)

    async def run(self, asks: Iterator[Ask]) -> None:
        """All clients, until the time is over."""
        began = time.monotonic()
        until = began + 60 * self._args.minutes
        beside = [asyncio.create_task(self._probe()), asyncio.create_task(self._watch_memory(began))]
        left = self._args.max_requests

        async def client() -> None:
            nonlocal left
            while time.monotonic() < until and left > 0:
                left -= 1
                await self._one(next(asks))

        await asyncio.gather(*(client() for _ in range(self._args.concurrency)))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        self._note_memory(began)

    async def _one(self, ask: Ask) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._args.limit_s):
                outcome = await (self._leave(ask) if ask.leave else self._answer(ask))
        except TimeoutError:
            outcome = self._fault(ask, f"no end within {self._args.limit_s:g} s")
        except Unexpected as error:
            outcome = self._fault(ask, str(error))
        except (aiohttp.ClientError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            outcome = self._fault(ask, f"{type(error).__name__}: {error}")
        self.outcomes[ask.label][outcome] += 1
        if ask.leave is None and ask.status == 200:
            self.seconds.append(time.monotonic() - began)

    async def _answer(self, ask: Ask) -> str:
        """Read the answer to its end and check it."""
        async with self._session.post(f"{self._args.url}{ask.path}", **_sent(ask)) as response:
            raw = await response.read()
            status, kind = response.status, response.content_type
        if status != 200 or ask.status != 200:
            check_error(ask, status, raw)
            return str(status)
        if ask.path == "/tokenize":
            return await self._detokenize(ask, json.loads(raw)["tokens"])
        if ask.streams != (kind == "text/event-stream"):
            raise Unexpected(f"content type {kind}")
        tokens, texts = check_stream(ask, _events(raw)) if ask.streams else check_whole(ask, raw)
        self.output_tokens += tokens
        if ask.reference is not None and self._references.setdefault(ask.reference, texts) != texts:
            raise Unexpected(f"another answer to the same request: {texts} before {self._references[ask.reference]}")
        return "200" if texts else "deadline in stream"

    async def _detokenize(self, ask: Ask, ids: list[int]) -> str:
        assert isinstance(ask.body, dict)
        async with self._session.post(f"{self._args.url}/detokenize", json={"tokens": ids}) as response:
            text = (await response.json())["prompt"]
        if text != ask.body["prompt"]:
            raise Unexpected(f"{ask.body['prompt'][:100]!r} came back as {text[:100]!r}")
        return "200"

    async def _leave(self, ask: Ask) -> str:
        """Go away in the middle; an answer that comes before that must be right as far as it goes."""
        assert ask.leave is not None
        if ask.leave.pieces == 0:
            return await self._cut(ask)
        answer = None
        try:
            async with asyncio.timeout(ask.leave.seconds):
                answer = await self._session.post(f"{self._args.url}{ask.path}", **_sent(ask))
                if answer.status != 200:
                    check_error(ask, answer.status, await answer.read())
                for _ in range(ask.leave.pieces):
                    if not await answer.content.readany():
                        return "ended before"
        except TimeoutError:
            return "left before the answer" if answer is None else "left in the answer"
        finally:
            if answer is not None:
                answer.close()  # the connection, not only this answer
        return "left in the answer"

    async def _cut(self, ask: Ask) -> str:
        url = urlparse(self._args.url)
        body = json.dumps(ask.body).encode()
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(f"POST {ask.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body[: len(body) // 2])
        await writer.drain()
        writer.close()
        return "cut"

    async def _probe(self) -> None:
        """/ready and /metrics, as load balancers and Prometheus poll them."""
        while True:
            for path in ("/ready", "/metrics"):
                ask = Ask(path, path, {})
                try:
                    async with asyncio.timeout(self._args.limit_s), self._session.get(self._args.url + path) as reply:
                        text = await reply.text()
                    if reply.status != 200:
                        raise Unexpected(f"status {reply.status}: {text[:200]}")
                    for name, value in (engine_figures(text) if path == "/metrics" else {}).items():
                        self.peaks[name] = max(self.peaks[name], int(value))
                    outcome = "200"
                except (Unexpected, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    outcome = self._fault(ask, f"{type(error).__name__}: {error}")
                self.outcomes[path][outcome] += 1
            await asyncio.sleep(PROBE_PERIOD_S)

    async def _watch_memory(self, began: float) -> None:
        while True:
            self._note_memory(began)
            await asyncio.sleep(RSS_PERIOD_S)

    def _note_memory(self, began: float) -> None:
        if self._args.pid is not None:
            self.rss.append((time.monotonic() - began, rss_by_role(self._args.pid)))

    async def wait_until_idle(self) -> dict[str, float]:
        """The engines' last figures; polls until nothing is held, or a minute long."""
        deadline = time.monotonic() + IDLE_S
        while True:
            async with self._session.get(f"{self._args.url}/metrics") as response:
                figures = engine_figures(await response.text())
            if (figures and held(figures) == 0) or time.monotonic() > deadline:
                return figures
            await asyncio.sleep(1.5)  # engines report once a second

    def _fault(self, ask: Ask, reason: str) -> str:
        self.num_unexpected += 1
        if len(self.unexpected) < KEPT_ERRORS:
            self.unexpected.append(f"{ask.label}: {reason} <- {str(ask.body)[:300]}")
        return "unexpected"


def _sent(ask: Ask) -> dict[str, Any]:
    body = {"data": ask.body} if isinstance(ask.body, bytes) else {"json": ask.body}
    return body | {"headers": ask.headers}


def _events(raw: bytes) -> list[bytes]:
    return [line.removeprefix(b"data: ") for line in raw.split(b"\n") if line.startswith(b"data: ")]


def engine_figures(text: str) -> dict[str, float]:
    """Figures of all engines added up, and the gateway's requests in flight, from an exposition text."""
    figures: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("herd_engine_") or sample.name == "herd_gateway_requests_in_flight":
                figures[sample.name.removeprefix("herd_engine_").removeprefix("herd_gateway_")] += sample.value
    return dict(figures)


def held(figures: dict[str, float]) -> float:
    """What an idle server must not have; also the pages that are neither free nor cached."""
    lost = figures["pages_total"] - figures["pages_free"] - figures["pages_cached"]
    return figures["running"] + figures["waiting"] + figures["pages_used"] + figures["requests_in_flight"] + lost


def rss_by_role(root: int) -> dict[str, float]:
    """Resident MiB of the process `root` and everything below it."""
    sizes: dict[str, float] = defaultdict(float)
    parent = psutil.Process(root)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline()) or process.name()
            size = process.memory_info().rss / 2**20
        except psutil.Error:
            continue
        sizes[next((role for word, role in ROLES.items() if word in title), OTHER)] += size
        sizes["total"] += size
    return dict(sizes)


def memory_report(samples: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
    """For each role: MiB at a fifth of the time (once caches are warm), at the end, and the slope between."""
    if len(samples) < 4:
        return {}
    late = [sample for sample in samples if sample[0] >= samples[-1][0] / 5]
    minutes = [at / 60 for at, _ in late]
    report = {}
    for role in ("engine", "gateway", "ingress", OTHER, "total"):
        sizes = [by_role.get(role, 0.0) for _, by_role in late]
        slope = statistics.linear_regression(minutes, sizes).slope
        first, last = statistics.median(sizes[:3]), statistics.median(sizes[-3:])
        names = ("at_20_percent_mib", "end_mib", "max_mib", "slope_mib_per_min")
        report[role] = dict(zip(names, (round(v, 2) for v in (first, last, max(sizes), slope)), strict=True))
    return report


def summary(soak: Soak, figures: dict[str, float], seconds: float) -> dict[str, Any]:
    """The report; `ok` says whether all is as it should be."""
    memory = memory_report(soak.rss)
    total = memory.get("total")
    growth = None if total is None else total["end_mib"] / total["at_20_percent_mib"] - 1
    took = sorted(soak.seconds) or [0.0]
    idle = bool(figures) and held(figures) == 0
    return {
        "ok": soak.num_unexpected == 0 and idle and (growth is None or growth < GROWTH_LIMIT),
        "seconds": round(seconds, 1),
        "requests": {label: dict(counts) for label, counts in sorted(soak.outcomes.items())},
        "total_requests": sum(sum(counts.values()) for counts in soak.outcomes.values()),
        "unexpected": soak.num_unexpected,
        "first_unexpected": soak.unexpected,
        "output_tokens": soak.output_tokens,
        "answer_s": {
            "p50": round(took[len(took) // 2], 2),
            "p99": round(took[int(len(took) * 0.99)], 2),
            "max": round(took[-1], 2),
        },
        "peaks": {name: soak.peaks[name] for name in ("running", "waiting", "pages_used")},
        "memory": memory,
        "memory_series_mib": [
            [round(at), *(round(sizes.get(role, 0)) for role in ("engine", "gateway", "total"))]
            for at, sizes in soak.rss
        ],
        "memory_growth": None if growth is None else round(growth, 4),
        "idle_at_the_end": idle,
        "engines_at_the_end": figures,
    }


async def soak_once(args: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        soak = Soak(session, args)
        asks = iter(await soak.traffic())
        began = time.monotonic()
        await soak.run(asks)
        seconds = time.monotonic() - began
        return summary(soak, await soak.wait_until_idle(), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--max-requests", type=int, default=MAX_REQUESTS)
    parser.add_argument("--limit-s", type=float, default=300.0, help="nothing may take longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, to watch its memory")
    parser.add_argument("--out", type=Path, help="write the report here too")
    args = parser.parse_args()
    args.url = args.url.rstrip("/")
    if urlparse(args.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error(f"{args.url} is not a loopback address")
    report = json.dumps(asyncio.run(soak_once(args)), indent=1)
    report = re.sub(r"\[\s+([\d.]+(?:,\s+[\d.]+)*)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", report)
    print(report)
    if args.out is not None:
        args.out.write_text(report + "\n")
    sys.exit(0 if json.loads(report)["ok"] else 1)


if __name__ == "__main__":
    main()
