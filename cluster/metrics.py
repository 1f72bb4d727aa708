"""Every Prometheus series that Herd exports, in one registry per process. Owns names, labels and buckets; knows nothing
of who reports or how it is scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHORTEST_RATE_S = 0.5
"""Reports come once a second, but may arrive together after a stall: no rate is told from those."""


class GatewayMetrics:
    """What one gateway measures, and the latest figures of each engine that it hears from."""

    def __init__(self, *, stats_ttl_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`stats_ttl_s`: an engine that has not reported for so long is no longer exported."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "herd_gateway_requests_total",
            "Requests answered, by endpoint and HTTP status (499: the client left first)",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.errors = Counter(
            "herd_gateway_errors_total", "Errors sent to clients, by their code", ["code"], registry=self.registry
        )
        self.in_flight = Gauge(
            "herd_gateway_requests_in_flight", "Generation requests admitted and not finished", registry=self.registry
        )
        self.prompt_tokens = Counter(
            "herd_gateway_prompt_tokens_total", "Prompt tokens of admitted requests", registry=self.registry
        )
        self.output_tokens = Counter(
            "herd_gateway_output_tokens_total", "Tokens generated and passed on", registry=self.registry
        )
        self.resumed_requests = Counter(
            "herd_gateway_resumed_requests_total",
            "Times that a request went on after its engine was lost",
            registry=self.registry,
        )
        self.first_token = Histogram(
            "herd_gateway_first_token_seconds",
            "Arrival of a request to its first token",
            registry=self.registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self.token_interval = Histogram(
            "herd_gateway_token_interval_seconds",
            "Mean time between tokens of one request, after its first",
            registry=self.registry,
            buckets=TOKEN_BUCKETS_S,
        )
        self.duration = Histogram(
            "herd_gateway_request_seconds",
            "Arrival of a request to the end of its answer",
            ["endpoint"],
            registry=self.registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self.engines = EngineStats(stats_ttl_s, clock)
        self.registry.register(self.engines)

    def render(self) -> bytes:
        """The exposition text, of media type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


@dataclass(slots=True)
class _Report:
    """The latest of one engine, and the tokens that it had generated at a moment some time before."""

    at: float
    figures: dict[str, float]
    counted_at: float
    counted_tokens: float
    tokens_per_s: float | None = None


class EngineStats(Collector):
    """Latest figures of each engine as gauges named `herd_engine_<figure>`, labelled by engine."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._latest: dict[str, _Report] = {}

    def update(self, engine: str, stats: Mapping[str, object]) -> None:
        """Keep the numbers of `stats`; other values are not for Prometheus."""
        numbers = {name: float(value) for name, value in stats.items() if isinstance(value, (int, float))}
        now, tokens = self._clock(), numbers.get("generated_tokens", 0.0)
        report = self._latest.setdefault(engine, _Report(now, numbers, now, tokens))
        report.at, report.figures = now, numbers
        if (elapsed := now - report.counted_at) >= _SHORTEST_RATE_S:
            report.tokens_per_s = (tokens - report.counted_tokens) / elapsed
            report.counted_at, report.counted_tokens = now, tokens

    def forget(self, engine: str) -> None:
        self._latest.pop(engine, None)

    def latest(self) -> list[dict[str, str | float | None]]:
        """For each engine heard of lately: `engine_id`, `age_s` of its report, `tokens_per_s` (None: too early to tell)
        and its figures."""
        now = self._clock()
        return [
            {"engine_id": engine, "age_s": now - report.at, "tokens_per_s": report.tokens_per_s} | report.figures
            for engine, report in self._fresh()
        ]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for engine, report in self._fresh():
            for name, value in report.figures.items():
                if name not in families:
                    families[name] = GaugeMetricFamily(f"herd_engine_{name}", f"Engine's own {name}", labels=["engine"])
                families[name].add_metric([engine], value)
        yield from families.values()

    def _fresh(self) -> list[tuple[str, _Report]]:
        oldest = self._clock() - self._ttl_s
        self._latest = {engine: report for engine, report in self._latest.items() if report.at >= oldest}
        return sorted(self._latest.items())
