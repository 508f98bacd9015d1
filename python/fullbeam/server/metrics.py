# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` tells Prometheus: HTTP requests as they end, the engine as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

if TYPE_CHECKING:
    from fullbeam.server.record import Record
    from fullbeam.server.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fullbeam_requests",
            "HTTP requests that have ended; 499: the client went away.",
            ["route", "status"],
            registry=registry,
        )
        self._duration = Histogram(
            "fullbeam_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "fullbeam_time_to_first_token_seconds",
            "From the head of a request to its first token, whether streamed or not.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._per_token = Histogram(
            "fullbeam_time_per_output_token_seconds",
            "Mean time from one token of a prompt's choices to the next.",
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        registry.register(_EngineCollector(service))
        ProcessCollector(registry=registry)

    def count(self, record: Record) -> None:
        """Take in a request that has ended."""
        route = record.route or "none"
        self._requests.labels(route, str(record.status)).inc()
        self._duration.labels(route).observe(record.duration_s)
        if record.first_token_s is not None:
            self._first_token.observe(record.first_token_s)
        for request in record.requests:
            if request.token_interval_s is not None:
                self._per_token.observe(request.token_interval_s)

    def response(self) -> Response:
        """Return all metrics, in the text format of Prometheus."""
        text = generate_latest(self._registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


class _EngineCollector(Collector):
    """Reads the engine's own counts when it is asked for them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        yield GaugeMetricFamily(
            "fullbeam_requests_in_progress",
            "Completion requests being answered, waiting ones included.",
            service.num_requests,
        )
        if service.model is None:
            return
        engine = service.model.engine
        stats = engine.stats()
        gauges = {
            "queue_length": ("Sequences that wait for rows or pages.", stats.num_waiting),
            "sequences_running": ("Sequences that have them.", stats.num_running),
            "rows": ("Rows being decoded.", stats.num_rows),
            "rows_limit": ("Rows that can be decoded at once.", engine.max_rows),
            "pages": ("Pages of the KV cache.", stats.num_pages),
            "pages_used": ("Pages held by running sequences.", stats.num_used_pages),
            "pages_cached": ("Pages kept for prefix reuse.", stats.num_cached_pages),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.num_prompt_tokens),
            "generated_tokens": ("Tokens generated.", stats.num_generated_tokens),
            "drafted_tokens": ("Tokens guessed and computed ahead.", stats.num_drafted_tokens),
            "accepted_tokens": ("Of those, the ones that held.", stats.num_accepted_tokens),
            "computed_tokens": ("Tokens sent through the model.", stats.num_computed_tokens),
            "reused_tokens": ("Tokens spared by prefix reuse.", stats.num_reused_tokens),
            "cancelled_prompts": ("Prompts cancelled before their end.", stats.num_cancelled),
            "preemptions": ("Sequences sent back for want of pages.", stats.num_preemptions),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(f"fullbeam_{name}", meaning, value)
        for name, (meaning, value) in counters.items():
            yield CounterMetricFamily(f"fullbeam_{name}", meaning, value)
