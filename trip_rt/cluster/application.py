"""The Ray Serve application: ingress replicas that answer clients, and engine replicas that make their clips.

    clients ──► Ingress (CPU, the routes of trip-serve) ──► database ◄── Engines (a worker each)
                                                    └──► results ◄──┘

Ray starts, scales, places and replaces both. What they tell each other goes through the database, so the loss of any of
them, or of a call between them, loses no job.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import FastAPI
from ray import serve

from trip_rt.cluster.roster import Roster
from trip_rt.cluster.shared_results import SharedResults
from trip_rt.cluster.shared_service import SharedService
from trip_rt.cluster.store_end import SILENT_S, EngineChoice, StoreEnd
from trip_rt.config import from_json
from trip_rt.errors import EngineError
from trip_rt.serving.api_keys import ApiKeys, read_keys
from trip_rt.serving.clip_request import Limits
from trip_rt.serving.logs import Format, log_to_stderr
from trip_rt.serving.metrics import Metrics
from trip_rt.serving.models import read_models
from trip_rt.serving.routes import create_app
from trip_rt.serving.store import JobStore
from trip_rt.serving.worker import Worker, end_with_thread

_OPENER = "trip_rt.serving.worker:open_animator"
_QUEUED, _QUEUED_PER_REPLICA = "queued", 2
_UPSCALE_DELAY = 5.0  # seconds that jobs wait before there are more replicas for them; Ray's own is 30
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # of what Ray says; what the service says is its own log


@dataclass(frozen=True)
class Options:
    """All that the application is given, plain enough for a YAML file.

    `store` is the URL of a Database and `results` of SharedResults, which every node reaches; `bundles` are as
    trip-serve takes them, in the same place on every node. `replicas` are (fewest, most) engine replicas, each of which
    takes `num_gpus` or `num_cpus` and keeps `open_models` bundles open; `scaled` says how many there are.
    """

    bundles: list[str]
    store: str
    results: str
    replicas: tuple[int, int] = (1, 1)
    ingress_replicas: int = 1
    num_gpus: float = 0
    num_cpus: float = 1
    open_models: int = 1
    engines: EngineChoice = field(default_factory=EngineChoice)
    limits: Limits = field(default_factory=Limits)
    api_keys: str | None = None
    hosts: list[str] = field(default_factory=list)
    page: bool = True
    metrics: bool = True
    max_queued: int = 256
    max_disk_gb: float = 10
    keep_hours: float = 24
    grace: float = 30
    log_format: Format = "lines"
    opener: str = _OPENER


class Engines:
    """A replica that makes clips: a Worker, and its end of the database."""

    def __init__(self, options: Options):
        log_to_stderr(options.log_format)
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="trip-drafts-", ignore_cleanup_errors=True)
        drafts = Path(self._folder.name)
        models = read_models(options.bundles, options.replicas[0])
        self._store = store = JobStore(options.store, options.keep_hours * 3600)
        self._end = StoreEnd(
            uuid4().hex,
            models,
            store,
            Roster(store.database, SILENT_S),
            SharedResults(options.results, drafts / "cache"),
            options.engines,
            drafts,
        )
        threading.excepthook = end_with_thread  # Ray replaces this process
        module, _, name = options.opener.partition(":")
        worker = Worker(self._end, getattr(importlib.import_module(module), name), options.open_models)
        self._thread = threading.Thread(target=worker.run, name="worker", daemon=True)
        self._thread.start()
        self._end.start()  # returns once its first bundle is open: before, Ray does not call this replica running

    def check_health(self) -> None:
        """EngineError where this replica must be replaced."""
        if not self._thread.is_alive():
            raise EngineError("the worker has ended")
        if self._end.hangs:
            raise EngineError("the worker does not go on with its clip")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How many jobs wait, for `scaled`."""
        return {_QUEUED: float(self._store.queued())}

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was not whole
            self._end.stop(self._options.grace)
            self._folder.cleanup()


class Ingress:
    """A replica that answers clients. `engines` are given to it so that they are of its application, and not called."""

    def __init__(self, options: Options, engines: Any):
        log_to_stderr(options.log_format)
        store = JobStore(options.store, options.keep_hours * 3600)
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="trip-results-", ignore_cleanup_errors=True)
        self._service = SharedService(
            read_models(options.bundles, options.replicas[0]),
            store,
            Roster(store.database, SILENT_S),
            SharedResults(options.results, Path(self._folder.name)),
            Metrics(),
            options.max_queued,
            int(options.max_disk_gb * 1e9),
        )

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._folder.cleanup()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray in the event loop that the routes run in."""
        options = self._options
        self._service.begin()
        keys = ApiKeys() if options.api_keys is None else read_keys(Path(options.api_keys))
        return create_app(self._service, options.limits, keys, tuple(options.hosts), options.page, options.metrics)


def scaled(context: Any) -> tuple[int, dict[str, Any]]:
    """How many engine replicas there should be, for Ray: as many as now while jobs wait, and one for every
    _QUEUED_PER_REPLICA of those."""
    counts = context.aggregated_metrics.get(_QUEUED, {}) if context.aggregated_metrics else {}
    queued = max(counts.values(), default=0.0)
    wanted = context.current_num_replicas if queued else context.capacity_adjusted_min_replicas
    wanted = max(wanted, math.ceil(queued / _QUEUED_PER_REPLICA))
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}


def build(arguments: dict[str, Any]) -> Any:
    """The application (serve.Application) from the fields of Options: what a Serve config names as its import path."""
    options = from_json(Options, arguments, "trip-serve's options", "see docs/scale.md")
    fewest, most = options.replicas
    resources = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    scaling: dict[str, Any] = {"num_replicas": fewest}
    if most > fewest:
        scaling = {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                "upscale_delay_s": _UPSCALE_DELAY,
                "policy": {"policy_function": "trip_rt.cluster.application:scaled"},
            }
        }
    deployment: Any = partial(serve.deployment, logging_config=QUIET)
    engines = deployment(Engines).options(
        name="engines",
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=options.grace + 5,
        health_check_period_s=2,
        **scaling,
    )
    ingress = deployment(serve.ingress()(Ingress)).options(
        name="ingress",
        num_replicas=options.ingress_replicas,
        ray_actor_options={"num_cpus": 0},  # a share of one would keep as many engines as CPUs from their places
        max_ongoing_requests=1000,
        max_queued_requests=2000,
    )
    return ingress.bind(options, engines.bind(options))


def arguments_of(options: Options) -> dict[str, Any]:
    """The fields, as `build` takes them, without those that are the default."""
    plain = msgspec.to_builtins(asdict(options))
    defaults = msgspec.to_builtins(asdict(Options([], "", "")))
    return {name: value for name, value in plain.items() if value != defaults[name]}
