"""Every Prometheus series that Herd exports, in one registry per process. Owns names, labels and buckets; knows nothing
of who reports or how it is scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = CONTENT_TYPE_LATEST


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


class EngineStats(Collector):
    """Latest figures of each engine as gauges named `herd_engine_<figure>`, labelled by engine."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._latest: dict[str, tuple[float, dict[str, float]]] = {}

    def update(self, engine: str, stats: Mapping[str, object]) -> None:
        """Keep the numbers of `stats`; other values are not for Prometheus."""
        numbers = {name: float(value) for name, value in stats.items() if isinstance(value, (int, float))}
        self._latest[engine] = (self._clock(), numbers)

    def forget(self, engine: str) -> None:
        self._latest.pop(engine, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        oldest = self._clock() - self._ttl_s
        self._latest = {engine: entry for engine, entry in self._latest.items() if entry[0] >= oldest}
        families: dict[str, GaugeMetricFamily] = {}
        for engine, (_, numbers) in sorted(self._latest.items()):
            for name, value in numbers.items():
                if name not in families:
                    families[name] = GaugeMetricFamily(f"herd_engine_{name}", f"Engine's own {name}", labels=["engine"])
                families[name].add_metric([engine], value)
        yield from families.values()
