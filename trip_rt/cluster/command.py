"""`trip-serve --ray`: the application on a Ray cluster, or its config for `serve deploy`."""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trip_rt.cluster.session import LOCAL, connected
from trip_rt.command_line import check_installed
from trip_rt.errors import EngineError, InputError, one_line, printable
from trip_rt.files import whole_file
from trip_rt.launch import note
from trip_rt.serving.command import listening

if TYPE_CHECKING:
    from trip_rt.cluster.application import Options
    from trip_rt.serving.clip_request import Limits
    from trip_rt.serving.models import Model

NAME = "trip-rt"
IMPORT_PATH = "trip_rt.cluster.application:build"
_NEEDS = ("ray", "fsspec", "psycopg", "yaml")
_SEEN_EVERY = 0.2  # seconds


def serve_on_ray(
    args: argparse.Namespace, models: dict[str, Model], limits: Limits, hosts: tuple[str, ...], began: float
) -> int:
    """Serve until stopped, or write the config. InputError where the options do not fit, EngineError where the
    application does not start."""
    check_installed(_NEEDS, "ray")
    options = _options(args, models, limits, hosts)
    port = args.port
    if args.ray == LOCAL:
        with listening(args.host, args.port) as free:  # Ray itself would end in a trace
            port = free.getsockname()[1]
    if args.write_config is not None:
        _write_config(args.write_config, options, args.host, port)
        return 0
    if not port:
        raise InputError("--port: found 0 for a cluster of several machines, expected the port that they all serve at")
    with connected(args.ray):
        _serve(options, args.host, port, args.ray == LOCAL, began)
    return 0


def _options(args: argparse.Namespace, models: dict[str, Model], limits: Limits, hosts: tuple[str, ...]) -> Options:
    from trip_rt.cluster.application import Options
    from trip_rt.cluster.store_end import EngineChoice

    if args.gpus or args.hang_after is not None:
        raise InputError("found --gpus or --hang-after beside --ray, expected neither: Ray hands out the GPUs")
    data = args.data.resolve()
    if args.store is None or args.results is None:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    on_gpu = args.device == "cuda"
    return Options(
        bundles=[f"{model.name}={model.bundle}@{model.profile.name}" for model in models.values()],
        store=args.store or f"sqlite:///{data / 'jobs.db'}",
        results=args.results or str(data / "clips"),
        replicas=args.replicas,
        ingress_replicas=args.ingress,
        num_gpus=1 if on_gpu else 0,
        num_cpus=float(args.threads or 1),
        open_models=args.open_models,
        engines=EngineChoice(args.backend, args.device, args.threads),
        limits=limits,
        api_keys=None if args.api_keys is None else str(args.api_keys.resolve()),
        hosts=list(hosts),
        page=args.ui,
        metrics=args.metrics,
        max_queued=args.max_queued,
        max_disk_gb=args.max_disk_gb,
        keep_hours=args.keep_hours,
        grace=args.grace,
        log_format=args.log_format,
    )


def _serve(options: Options, host: str, port: int, alone: bool, began: float) -> None:
    """Until an exception ends it. `alone`: this machine is all of the cluster, and can ask what it serves."""
    from ray import serve

    from trip_rt.cluster.application import QUIET, arguments_of, build

    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    serve.start(http_options={"host": host, "port": port}, proxy_location="EveryNode", logging_config=QUIET)
    try:
        try:
            serve.run(build(arguments_of(options)), name=NAME, route_prefix="/")  # returns once all replicas run
        except RuntimeError as error:
            raise EngineError(f"the application did not start: {_reason(error)}") from error
        note(f"trip-serve: listening at {address}")
        while alone and not _is_ready(address):  # the ingress looks for workers every second
            time.sleep(_SEEN_EVERY)
        note(f"trip-serve: ready after {time.perf_counter() - began:.2f} s: on Ray, {options.replicas[0]} replicas")
        while True:
            time.sleep(3600)
    finally:
        note("trip-serve: stopping")
        serve.delete(NAME)


def _reason(error: RuntimeError) -> str:
    """Why a replica did not start, in its own words where Ray has kept them."""
    from ray import serve

    said = "".join(found.message for found in serve.status().applications[NAME].deployments.values())
    _, raised, words = said.rpartition(f"{EngineError.__name__}: ")
    return one_line(words.partition("\n")[0] if raised else error, 1000)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=5) as response:
            return bool(json.load(response)["status"] == "ready")
    except (OSError, ValueError):
        return False


def _write_config(path: Path, options: Options, host: str, port: int) -> None:
    import yaml

    from trip_rt.cluster.application import arguments_of

    config: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {"name": NAME, "route_prefix": "/", "import_path": IMPORT_PATH, "args": arguments_of(options)}
        ],
    }
    with whole_file(path) as draft:
        draft.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    note(f"trip-serve: {printable(str(path))} is written; deploy it with serve deploy {printable(str(path))}")
