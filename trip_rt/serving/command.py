"""`trip-serve`: bundles as a service over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trip_rt import backends
from trip_rt.command_line import CommandParser, check_installed, fewest_and_most, main_of
from trip_rt.errors import InputError, printable
from trip_rt.launch import note
from trip_rt.signals import Terminated

if TYPE_CHECKING:  # imported where they are used: workers come first, and little is needed to refuse an option
    import uvicorn

    from trip_rt.serving.api_keys import ApiKeys
    from trip_rt.serving.clip_request import Limits
    from trip_rt.serving.models import Model
    from trip_rt.serving.service import Service
    from trip_rt.serving.workers import Workers

_NEEDS = ("fastapi", "fastapi_offline", "prometheus_client", "python_multipart", "sqlalchemy", "uvicorn")
_LOCK_S = 10.0  # that the workers of a server that was killed may take to end


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-serve",
        usage="%(prog)s BUNDLE [NAME=BUNDLE …] [options]",
        description=(
            "Serve bundles over HTTP: the /v1/videos API, a page to try it at /, its description at /docs. Jobs and"
            " clips are kept in a folder and outlive the server."
        ),
        epilog=(
            "examples: trip-serve bundle; trip-serve demo=out/demo-bundle wide=bundle@256x144-16f-b1 --port 8080"
            " --data /var/lib/trip --api-keys keys.txt --host 0.0.0.0. Ctrl-C and SIGTERM finish the clips that are"
            " being made, as far as --grace allows, and give the others back to the queue; a second one stops at once."
        ),
    )
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="BUNDLE",
        help="BUNDLE, NAME=BUNDLE or NAME=BUNDLE@PROFILE; the first is the default",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that a proxy is reached by, may be given again (all, where --host is not this machine)",
    )
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one (%(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("trip-serve-data"),
        metavar="DIR",
        help="folder of jobs and clips (%(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes for each bundle (%(default)s)")
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help="lines of NAME KEY; who has none may do nothing")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--ui", action=flag, default=True, help="the page at / (%(default)s)")
    parser.add_argument("--metrics", action=flag, default=True, help="figures for Prometheus at /metrics (%(default)s)")
    parser.add_argument(
        "--backend", choices=("auto", *backends.NAMES), default="auto", help="engine library (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run it (%(default)s)"
    )
    parser.add_argument(
        "--gpus", default="", metavar="LIST", help="such as 0,1: the workers take these in turn; see also --workers"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a worker (its share of the cores)")
    parser.add_argument("--max-queued", type=int, default=256, metavar="N", help="jobs that may wait (%(default)s)")
    parser.add_argument("--max-upload-mb", type=int, default=16, metavar="N", help="of a picture (%(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=25, metavar="N", help="of a picture (%(default)s)")
    parser.add_argument(
        "--max-prompt", type=int, default=2000, metavar="N", help="characters of a sentence (%(default)s)"
    )
    parser.add_argument("--max-steps", type=int, default=200, metavar="N", help="denoising steps (%(default)s)")
    parser.add_argument("--max-frames", type=int, default=256, metavar="N", help="frames of a clip (%(default)s)")
    parser.add_argument("--max-disk-gb", type=float, default=10, metavar="N", help="that clips may take (%(default)s)")
    parser.add_argument(
        "--keep-hours", type=float, default=24, metavar="N", help="a finished job is kept (%(default)s)"
    )
    parser.add_argument(
        "--grace", type=float, default=30, metavar="S", help="seconds to finish clips in when stopped (%(default)s)"
    )
    parser.add_argument(
        "--hang-after",
        type=float,
        metavar="S",
        help="seconds until a silent worker is replaced (by its measured speed)",
    )
    cluster = parser.add_argument_group("many machines (docs/scale.md)")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="serve on the Ray cluster at that address, or on one of this machine alone",
    )
    cluster.add_argument(
        "--store",
        metavar="URL",
        help="database of the jobs, such as postgresql://user@host/name (one in --data, for a single machine)",
    )
    cluster.add_argument(
        "--results", metavar="URL", help="where clips are kept: a folder, or s3://bucket/clips (a folder in --data)"
    )
    cluster.add_argument(
        "--replicas",
        type=fewest_and_most,
        default=(1, 1),
        metavar="N|MIN:MAX",
        help="engine replicas, by the queue (1)",
    )
    cluster.add_argument("--ingress", type=int, default=1, metavar="N", help="replicas for clients (%(default)s)")
    cluster.add_argument(
        "--open-models", type=int, default=1, metavar="N", help="bundles that a replica keeps open (%(default)s)"
    )
    cluster.add_argument(
        "--write-config", type=Path, metavar="FILE", help="write a config for `serve deploy`, and do nothing else"
    )
    parser.add_argument("--log-format", choices=("lines", "json"), default="lines", help="of stderr (%(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    began = time.perf_counter()
    for name in ("workers", "max_queued", "max_upload_mb", "max_prompt", "max_steps", "max_frames"):
        _check(f"--{name.replace('_', '-')}", getattr(args, name), 1, 1 << 30)
    for name in ("max_megapixels", "max_disk_gb", "keep_hours", "grace", *(["hang_after"] if args.hang_after else [])):
        _check(f"--{name.replace('_', '-')}", getattr(args, name), 0, 1e9)
    _check("--port", args.port, 0, 65535)
    check_installed(_NEEDS, "serve")
    from trip_rt.serving.models import read_models

    models = read_models(args.bundles, args.workers)
    keys = _keys(args)
    if args.ray is not None or args.write_config is not None:
        from trip_rt.cluster.command import serve_on_ray

        return serve_on_ray(args, models, _limits(args), _hosts(args), began)
    for option in ("store", "results"):
        if getattr(args, option) is not None:
            raise InputError(f"found --{option} without --ray, expected both or neither; without Ray --data has both")
    with _data_folder(args.data) as lock, listening(args.host, args.port) as listener:
        workers = _workers(args, models, lock)
        try:
            workers.spawn()  # before the server's own libraries are imported, which takes as long
            return _serve(args, models, keys, workers, listener, began)
        finally:
            workers.kill()


def _serve(
    args: argparse.Namespace,
    models: dict[str, Model],
    keys: ApiKeys,
    workers: Workers,
    listener: socket.socket,
    began: float,
) -> int:
    import uvicorn

    from trip_rt.serving.logs import log_to_stderr
    from trip_rt.serving.metrics import Metrics
    from trip_rt.serving.results import Results
    from trip_rt.serving.routes import create_app
    from trip_rt.serving.service import Service
    from trip_rt.serving.store import JobStore

    class Server(uvicorn.Server):
        """uvicorn without its handling of signals, which is ours."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    log_to_stderr(args.log_format)
    store = JobStore(f"sqlite:///{args.data.resolve() / 'jobs.db'}", args.keep_hours * 3600)
    service = Service(
        models, store, Results(args.data / "clips"), Metrics(), args.max_queued, int(args.max_disk_gb * 1e9)
    )
    app = create_app(service, _limits(args), keys, _hosts(args), args.ui, args.metrics)
    # Who obeys openai-poll-after-ms asks every 5 s at the latest, and finds the connection open.
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5, timeout_keep_alive=30
    )
    server = Server(config)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        number = runner.run(_until_stopped(args, service, workers, server, listener, began))
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


async def _until_stopped(
    args: argparse.Namespace,
    service: Service,
    workers: Workers,
    server: uvicorn.Server,
    listener: socket.socket,
    began: float,
) -> int:
    """The number of the signal that stopped the service; a second one stops it at once. InputError where a worker
    cannot open its bundle."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    await service.start()
    serving = asyncio.create_task(server.serve([listener]))
    working = asyncio.create_task(workers.run(service))
    warming = asyncio.create_task(_note_ready(service, began))
    stopped = asyncio.create_task(signals.get())
    host, port = listener.getsockname()[:2]
    note(f"trip-serve: listening at http://{f'[{host}]' if ':' in host else host}:{port}")
    await asyncio.wait({serving, working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    warming.cancel()
    service.closing = True
    if stopped.done():
        note(f"trip-serve: stopping; clips that are being made have {args.grace:g} s")
        finishing = asyncio.create_task(workers.finish(args.grace))
        again = asyncio.create_task(signals.get())
        await asyncio.wait({finishing, again}, return_when=asyncio.FIRST_COMPLETED)
        finishing.cancel()
        again.cancel()
    await workers.stop()
    await service.close()
    server.should_exit = True
    await asyncio.wait({serving})
    stopped.cancel()
    await asyncio.gather(working, return_exceptions=stopped.done() and not stopped.cancelled())
    return stopped.result()


async def _note_ready(service: Service, began: float) -> None:
    """Say when every model can be asked for."""
    while not all(model.ready_workers for model in service.models.values()):
        await asyncio.sleep(0.02)
    names = ", ".join(f"{model.name} on {model.engine['backend']}" for model in service.models.values())
    note(f"trip-serve: ready after {time.perf_counter() - began:.2f} s: {names}")


def _workers(args: argparse.Namespace, models: dict[str, Model], lock: int) -> Workers:
    from trip_rt.serving.workers import WorkerOptions, Workers

    count, threads = args.workers * len(models), args.threads
    if threads is None and count > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
    gpus = tuple(args.gpus.split(",")) if args.gpus else ()
    options = WorkerOptions(args.backend, args.device, threads, gpus, args.hang_after)
    return Workers(models, options, str((args.data / "clips").resolve()), lock)


def _limits(args: argparse.Namespace) -> Limits:
    from trip_rt.serving.clip_request import Limits

    return Limits(args.max_upload_mb << 20, args.max_megapixels, args.max_prompt, args.max_steps, args.max_frames)


def _hosts(args: argparse.Namespace) -> tuple[str, ...]:
    from trip_rt.serving.guard import LOOPBACK

    return (*LOOPBACK, *args.allow_host) if _is_loopback(args.host) else tuple(args.allow_host)


def _keys(args: argparse.Namespace) -> ApiKeys:
    from trip_rt.serving.api_keys import ApiKeys, read_keys

    if args.api_keys is not None:
        return read_keys(args.api_keys)
    if not _is_loopback(args.host):
        note(f"trip-serve: warning: whoever reaches {printable(args.host)} can use this server; see --api-keys")
    return ApiKeys()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


@contextlib.contextmanager
def _data_folder(folder: Path) -> Iterator[int]:
    """The folder, made where it is missing and locked for this server and its workers; the lock's descriptor."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be used ({error.strerror}), expected a folder for jobs and clips"
        ) from error
    with lock:
        until = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise InputError(
                        f"{folder}: found another trip-serve at work in it, expected one alone; choose another --data"
                    ) from None
                time.sleep(0.05)
        yield lock.fileno()


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there, at a free port for 0; InputError where none can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{printable(host)}:{port}: cannot listen there ({reason}), expected a free port of this machine; choose"
            " another --port or --host"
        ) from error
    with listener:
        yield listener


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name}: found {value:g}, expected {low:g} to {high:g}")


main = main_of(build_parser, run)
