"""Metrics of one process and the port that shows them: /metrics, /health and /ready.

prometheus-client's registry, and its WSGI app in a thread, so that a busy event loop still answers a probe. Label
values come from us, never from a client's text, and each metric holds a bounded number of label sets. This module
must not know what is counted.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
LENGTH_BUCKETS: Final = tuple(float(2**power) for power in range(18))


class Metrics:
    """The metrics of one process. `ready` and `healthy` are read at each probe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ready: Callable[[], bool] = lambda: False
        self.healthy: Callable[[], bool] = lambda: True

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A number that only grows."""
        return Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A number that goes up and down."""
        return Gauge(name, text, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        """A distribution; the default buckets are seconds."""
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def count(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that only grows and is kept elsewhere: `read` at each scrape."""
        self.registry.register(_Count(name, text, read))

    def collect(self, collector: Collector) -> None:
        """Ask `collector` for its metrics at each scrape."""
        self.registry.register(collector)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve(self, host: str, port: int) -> Endpoint:
        """Answer probes and scrapes on (host, port); port 0 takes a free one."""
        return Endpoint(self, host, port)


class _Count(Collector):
    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class Endpoint:
    """The HTTP port of one process's metrics."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        scrape = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                page: Iterable[bytes] = scrape(environ, start)
                return page
            probe = {"/health": metrics.healthy, "/ready": metrics.ready}.get(path)
            ok = probe is not None and probe()
            status = "200 OK" if ok else "404 Not Found" if probe is None else "503 Unavailable"
            start(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [b"ok\n" if ok else f"{status[4:].lower()}\n".encode()]

        self._server = make_server(host, port, app, _Server, _Quiet)
        self.port: int = self._server.server_port
        self._address = ("127.0.0.1" if host == "0.0.0.0" else host, self.port)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        # Not `serve_forever`, which wakes up several times a second to see whether it should end.
        while not self._closing:
            self._server.handle_request()

    def close(self) -> None:
        """Stop answering and free the port. Blocks for a moment: not for the event loop."""
        self._closing = True
        with contextlib.suppress(OSError):  # wakes the thread
            socket.create_connection(self._address, timeout=1).close()
        self._thread.join(timeout=5)
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not worth a log line."""
