"""The server's metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from theodora.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "theodora_requests", "Answered requests.", ["endpoint", "model", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("theodora_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.generated_tokens = Counter(
            "theodora_generated_tokens", "Tokens of answers.", ["model"], registry=self.registry
        )
        self.first_token = Histogram(
            "theodora_first_token_seconds", "Until the first token.", buckets=_SECONDS, registry=self.registry
        )
        self.duration = Histogram(
            "theodora_request_seconds", "Until the whole answer.", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_EngineState(engine))  # pyright: ignore[reportArgumentType]

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _EngineState:
    """The engine's numbers, read when Prometheus asks for them, so that nothing need be kept up to date."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Any]:
        """Gauges and counters of the engine."""
        engine = self.engine
        adapters = engine.adapters.adapters()
        running, under_way = engine.running(), engine.under_way()
        for name, help, value in (
            ("running_requests", "Requests in the batch.", running),
            ("waiting_requests", "Requests that wait for the batch.", max(0, under_way - running)),
            ("adapters", "Adapters that can be asked for.", len(adapters)),
            ("adapter_host_bytes", "Host memory of adapters.", sum(adapter.bytes for adapter in adapters)),
            ("adapters_in_slots", "Adapters that are in a slot.", len(engine.slots)),
            ("adapters_in_host_memory", "Adapters that are in host memory.", len(engine.host)),
            ("slots", "Slots for adapters.", engine.config.slots),
        ):
            yield GaugeMetricFamily("theodora_" + name, help, value=value)
        yield CounterMetricFamily("theodora_adapter_swaps", "Adapters put into a slot.", value=engine.slots.swaps)
        yield CounterMetricFamily("theodora_adapter_reads", "Adapters read again from disk.", value=engine.host.reads)
        yield CounterMetricFamily("theodora_worker_restarts", "Workers that failed.", value=engine.worker.restarts)
