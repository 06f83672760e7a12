"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trip_rt.serving.jobs import Job
from trip_rt.serving.protocol import Made

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Metrics:
    """Counters, gauges and histograms of one service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.created = Counter("trip_jobs_created", "Jobs that were queued", ["model"], registry=registry)
        self.finished = Counter("trip_jobs_finished", "Jobs that ended", ["model", "state"], registry=registry)
        self.jobs = Gauge("trip_jobs", "Jobs now", ["model", "state"], registry=registry)
        self.ready_workers = Gauge("trip_workers_ready", "Workers that can make clips", ["model"], registry=registry)
        self.lost_workers = Counter("trip_workers_lost", "Workers that died or hung", ["model"], registry=registry)
        self.result_bytes = Gauge("trip_result_bytes", "Disk that results take", registry=registry)
        self.cancel_seconds = Histogram(
            "trip_cancel_seconds", "From a cancel until work has stopped", buckets=_SECONDS, registry=registry
        )
        self._stages = Histogram(
            "trip_stage_seconds",
            "Denoising, decoding, encoding",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._step = Histogram(
            "trip_step_seconds", "A denoising step", ["model"], buckets=(0.003, *_SECONDS), registry=registry
        )
        self._waited = Histogram(
            "trip_queue_seconds", "From creation to the first step", ["model"], buckets=_SECONDS, registry=registry
        )
        self._peak = Gauge("trip_worker_peak_memory_bytes", "Peak memory of a worker", ["model"], registry=registry)

    def made(self, job: Job, made: Made) -> None:
        """A clip is made."""
        for stage, seconds in made.seconds.items():
            self._stages.labels(job.model, stage).observe(seconds)
        self._step.labels(job.model).observe(made.seconds["denoise"] / job.steps)
        self._waited.labels(job.model).observe((job.started_at or job.created_at) - job.created_at)
        self._peak.labels(job.model).set(made.peak_memory_mb * 1e6)

    def text(self) -> bytes:
        """All of them, in Prometheus's own format."""
        return generate_latest(self._registry)
