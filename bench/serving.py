"""What serving costs: clips a minute through a real `trip-serve` beside the bare runtime, while many clients wait; how
soon it answers them, how soon a cancelled job stops, how long a start takes, and whether memory grows.

    python bench/serving.py BUNDLE [--clients 200] [--clips 30] [--rounds 3] [--cancels 100] [--starts 5]
    [--small-bundle BUNDLE --small-clips 1000] [--json bench/results/NAME.json]

The bare runtime and the server take turns, so that whatever else the machine does falls on both. The bare one makes the
same clips and encodes none; the server's worker is idle meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from timing import machine, percentiles

from trip_rt.bundle import Bundle, open_bundle
from trip_rt.command_line import CommandParser, main_of
from trip_rt.errors import EngineError, InputError
from trip_rt.launch import note
from trip_rt.settings import SPEEDS

_SERVE = [sys.executable, "-c", "from trip_rt.launch import trip_serve; raise SystemExit(trip_serve())"]
_PAIRS = 8  # pictures and sentences, taken in turn
_ENDS = ("completed", "failed", "cancelled", "deleted", "stopping")  # of a job's events
_START_S, _STOP_S, _IDLE_S = 600.0, 30.0, 60.0  # that these may take
_TRIED_EVERY = 0.01  # seconds between two looks at a server that starts, or at a job that is being cancelled
_SIDE_BY_SIDE = 4  # small clips asked for at a time
_SEEN_EVERY = 50  # small clips between two looks at the memory


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/serving.py",
        description=(
            "Time trip-serve on this machine: clips a minute beside the bare runtime, answers while many clients wait,"
            " cancels, cold starts, memory."
        ),
        epilog=(
            "example: python bench/serving.py out/demo-bundle --clients 200 --small-bundle out/tiny-bundle --json"
            " bench/results/serving_demo.json"
        ),
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--clients", type=int, default=200, help="that wait: half poll, half listen to events (%(default)s)"
    )
    parser.add_argument("--speed", choices=tuple(SPEEDS), default="exact", help="of all clips (%(default)s)")
    parser.add_argument("--clips", type=int, default=30, help="timed in a round, on either side (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides in turn; 0 for none (%(default)s)")
    parser.add_argument("--cancels", type=int, default=100, help="of running jobs; 0 for none (%(default)s)")
    parser.add_argument("--starts", type=int, default=5, help="of fresh servers; 0 for none (%(default)s)")
    parser.add_argument("--small-bundle", type=Path, metavar="BUNDLE", help="whose many clips the memory is watched by")
    parser.add_argument("--small-clips", type=int, default=1000, metavar="N", help="of that bundle (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the figures there too")
    return parser


def run(args: argparse.Namespace) -> int:
    for name, least in (
        ("clients", 2),
        ("clips", 1),
        ("rounds", 0),
        ("cancels", 0),
        ("starts", 0),
        ("small_clips", 10),
    ):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: found {getattr(args, name)}, expected at least {least}")
    if args.json and not args.json.absolute().parent.is_dir():
        raise InputError(f"{args.json}: found no such folder, expected one to write to")
    bundle = open_bundle(args.bundle)
    small = open_bundle(args.small_bundle) if args.small_bundle else None
    figures: dict[str, Any] = {"profile": bundle.manifest.profile(None).name, "speed": args.speed}
    figures |= {"clients": args.clients, "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="trip-bench-") as folder:
        place = Path(folder)
        if args.rounds or args.cancels:
            requests = _write_requests(bundle, args.speed, place / "requests.json")
            with _server(args.bundle, place / "data", "--max-queued", str(2 * args.clients + 56)) as server:
                figures["engine"] = asyncio.run(_model(server))["data"][0]["engine"]
                if args.rounds:
                    figures |= _throughput(args, server, requests)
                if args.cancels:
                    figures["cancel"] = asyncio.run(_cancels(server, requests, bundle, args.cancels))
        if args.starts:
            figures["cold_start"] = _cold_starts(args, place)
        if small is not None:
            requests = _write_requests(small, args.speed, place / "small-requests.json")
            with _server(args.small_bundle, place / "small-data") as server:
                figures["memory"] = asyncio.run(_memory(server, requests, args.small_clips))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(_table(figures))
    return 0


class Connection:
    """HTTP/1.1 to a server of this machine: one request after another, over one connection that is kept."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[dict[str, str], bytes]:
        """Headers and content of the answer; EngineError where it is none of success."""
        status, headers, reader = await self._begin(method, path, body)
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        if status != 200:
            raise EngineError(f"{method} {path}: the server answered {status}: {content.decode()}")
        return headers, content

    async def json(self, method: str, path: str, body: bytes = b"") -> Any:
        return json.loads((await self.ask(method, path, body))[1])

    async def events(self, id: str) -> AsyncIterator[tuple[str, bytes]]:
        """Name and data of each of a job's events, to the last one."""
        status, _, reader = await self._begin("GET", f"/v1/videos/{id}/events")
        if status != 200:
            raise EngineError(f"events of {id}: the server answered {status}")
        text = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            text += (await reader.readexactly(size + 2))[:-2]
            *whole, text = text.split(b"\n\n")
            for event in whole:
                fields = dict(line.partition(b": ")[::2] for line in event.split(b"\n"))
                if b"event" in fields:  # else it is a comment, to keep the connection open
                    yield fields[b"event"].decode(), fields[b"data"]
        await reader.readexactly(2)

    async def _begin(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
        """Status and headers of the answer, and where to read on. A kept connection that the server has closed, as it
        may, is made anew."""
        request = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
        request += "content-type: application/json\r\n\r\n"
        while True:
            is_kept = self._streams is not None
            reader, writer = self._streams = self._streams or await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(request.encode() + body)
                await writer.drain()
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
                break
            except (ConnectionError, asyncio.IncompleteReadError):
                self.close()
                if not is_kept:
                    raise
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers, reader

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    async def figure(self, name: str) -> float:
        """One of /metrics, the sum over all whose name and labels begin so."""
        _, text = await self.ask("GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(name))


class Server:
    """A `trip-serve` in a process of its own."""

    def __init__(self, bundle: Path, data: Path, options: tuple[str, ...]):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = data.with_suffix(".log")
        command = [*_SERVE, str(bundle), "--data", str(data), "--port", str(self.port), *options]
        self.began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pids(self) -> dict[str, int]:
        """Of the server and of its worker."""
        (worker,) = psutil.Process(self._process.pid).children()
        return {"server": self._process.pid, "worker": worker.pid}

    def wait(self) -> float:
        """Seconds from the start until /readyz said so."""
        while time.perf_counter() - self.began < _START_S:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as asked:
                asked.sendall(b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
                if asked.recv(1 << 16).startswith(b"HTTP/1.1 200 "):
                    return time.perf_counter() - self.began
            time.sleep(_TRIED_EVERY)
        said = self._log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        raise EngineError(f"trip-serve was not ready, and said: {said[-1]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _server(bundle: Path, data: Path, *options: str) -> Iterator[Server]:
    """One that is ready."""
    server = Server(bundle, data, ("--grace", "1", *options))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def _connected(server: Server) -> AsyncIterator[Connection]:
    connection = Connection(server.port)
    try:
        yield connection
    finally:
        connection.close()


async def _model(server: Server) -> Any:
    async with _connected(server) as connection:
        return await connection.json("GET", "/v1/models")


def _write_requests(bundle: Bundle, speed: str, path: Path) -> Path:
    """A file of requests for clips, of pictures in the bundle's own size."""
    from trip_export.record import held_out

    profile, requests = bundle.manifest.profile(None), []
    for seed, (picture, prompt) in enumerate(zip(*held_out(profile.height, profile.width, _PAIRS), strict=True)):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        requests.append({"prompt": prompt, "seed": seed, "speed": speed, "input_reference": {"image_url": url}})
    path.write_text(json.dumps(requests))
    return path


def _read_requests(path: str | Path) -> list[dict[str, Any]]:
    return list(json.loads(Path(path).read_text()))


# Clips a minute, bare and served.


def _throughput(args: argparse.Namespace, server: Server, requests: Path) -> dict[str, Any]:
    """Of both sides, in turn; and what the clients saw meanwhile."""
    bare: list[float] = []
    served: list[dict[str, Any]] = []
    for index in range(args.rounds):
        note(f"round {index + 1} of {args.rounds}: {args.clips} clips, bare")
        asyncio.run(_until_idle(server))
        bare.append(_child("bare", args.bundle, requests, args.speed, args.clips)["clips_per_minute"])
        note(f"round {index + 1} of {args.rounds}: {args.clips} clips, served to {args.clients} clients")
        pids = server.pids
        plan = (server.port, requests, args.clients, args.clips, pids["server"], pids["worker"])
        served.append(_child("clients", *plan))
        asyncio.run(_emptied(server))
    rates = [row["clips_per_minute"] for row in served]
    answers = [seconds for row in served for seconds in row["status_seconds"]]
    seconds = sum(row["seconds"] for row in served)
    cpu = {name: round(sum(row["cpu_seconds"][name] for row in served), 2) for name in served[0]["cpu_seconds"]}
    medians = {"bare": float(np.median(bare)), "served": float(np.median(rates))}
    return {
        "clips_per_minute": {
            "bare": round(medians["bare"], 3),
            "served": round(medians["served"], 3),
            "served_of_bare": round(medians["served"] / medians["bare"], 4),
            "rounds": [
                {"bare": round(one, 3), "served": round(other, 3), "served_of_bare": round(other / one, 4)}
                for one, other in zip(bare, rates, strict=True)
            ],
        },
        "served": {"clips": sum(row["clips"] for row in served), "seconds": round(seconds, 2), "cpu_seconds": cpu},
        "status_ms": {**_spread(answers), "requests": len(answers)},
    }


def _child(what: str, *arguments: object) -> dict[str, Any]:
    """What this file prints in a process of its own."""
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ran.returncode:
        raise EngineError(f"{what}: {(ran.stderr.strip().splitlines() or ['died'])[-1]}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _bare(bundle: str, requests: str, speed: str, clips: str) -> dict[str, Any]:
    """The runtime alone, as a server's worker calls it."""
    from trip_rt.animator import Animator
    from trip_rt.settings import Settings

    asked = _read_requests(requests)
    pictures = []
    for request in asked:
        _, _, encoded = request["input_reference"]["image_url"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    with Animator(bundle) as animator:
        batch = animator.profile.batch

        def make(first: int) -> None:
            chosen = [index % len(asked) for index in range(first, first + batch)]
            latents = animator.latents(
                np.stack([pictures[index] for index in chosen]),
                [asked[index]["prompt"] for index in chosen],
                [asked[index]["seed"] for index in chosen],
                settings=Settings(speed=speed),
            )
            for clean in latents:
                np.concatenate(list(animator.decode(clean)))

        make(0)  # warms up
        count = -(-int(clips) // batch) * batch
        began = time.perf_counter()
        for first in range(0, count, batch):
            make(first)
        return {"clips_per_minute": 60 * count / (time.perf_counter() - began)}


def _clients(port: str, requests: str, clients: str, clips: str, server: str, worker: str) -> dict[str, Any]:
    """All clients of a round."""
    bodies = [json.dumps(request).encode() for request in _read_requests(requests)]
    processes = {
        "server": psutil.Process(int(server)),
        "worker": psutil.Process(int(worker)),
        "clients": psutil.Process(),
    }
    return asyncio.run(_Load(int(port), bodies, int(clients), int(clips), processes).run())


class _Load:
    """Clients that each have a job in the queue, and another once that is done. Half of them poll theirs as the server
    tells them to, half listen to its events.

    Time is taken from one completion to another that a listener was told of, so many clips later, once all clients are
    there."""

    def __init__(self, port: int, bodies: list[bytes], clients: int, clips: int, processes: dict[str, psutil.Process]):
        self._port, self._bodies, self._count, self._clips = port, bodies, clients, clips
        self._processes = processes
        self._counting = asyncio.Lock()
        self._metrics = Connection(port)
        self._there = 0
        self._all_there = asyncio.Event()
        self._enough = asyncio.Event()
        self._points: list[tuple[float, float, dict[str, float]]] = []  # when, clips completed, CPU seconds so far
        self._seconds: list[float] = []  # that status requests took

    async def run(self) -> dict[str, Any]:
        clients = [asyncio.create_task(self._client(index)) for index in range(self._count)]
        enough = asyncio.create_task(self._enough.wait())
        done, _ = await asyncio.wait({enough, *clients}, return_when=asyncio.FIRST_COMPLETED)
        for task in clients:
            task.cancel()
        for task in done:
            task.result()
        await asyncio.gather(*clients, return_exceptions=True)
        (began, before, cpu_before), (ended, after, cpu_after) = self._points[0], self._points[-1]
        return {
            "clips": int(after - before),
            "seconds": ended - began,
            "clips_per_minute": 60 * (after - before) / (ended - began),
            "cpu_seconds": {name: cpu_after[name] - cpu_before[name] for name in cpu_after},
            "status_seconds": self._seconds,
        }

    async def _client(self, index: int) -> None:
        connection, body = Connection(self._port), self._bodies[index % len(self._bodies)]
        is_new = True
        while True:
            headers, content = await connection.ask("POST", "/v1/videos", body)
            id = json.loads(content)["id"]
            if is_new:
                self._there += 1
                if self._there == self._count:
                    self._all_there.set()
                await self._all_there.wait()
            if index % 2:
                await self._poll(connection, id, headers, is_new)
            else:
                await self._listen(connection, id)
            is_new = False

    async def _poll(self, connection: Connection, id: str, headers: dict[str, str], is_new: bool) -> None:
        status = "queued"
        while status not in _ENDS:
            pause = float(headers["openai-poll-after-ms"]) / 1000
            await asyncio.sleep(random.uniform(0, pause) if is_new else pause)  # as they did not come all at once
            is_new = False
            began = time.perf_counter()
            headers, content = await connection.ask("GET", f"/v1/videos/{id}")
            self._seconds.append(time.perf_counter() - began)
            status = json.loads(content)["status"]
        _check_completed(id, status)

    async def _listen(self, connection: Connection, id: str) -> None:
        name = before = ""
        async for name, _ in connection.events(id):
            if name == "completed" and before in ("step", "decoding"):  # else it was before anybody listened
                await self._completed(time.perf_counter())
            before = name
        _check_completed(id, name)

    async def _completed(self, moment: float) -> None:
        async with self._counting:
            count = await self._metrics.figure("trip_jobs_finished_total{") if not self._enough.is_set() else 0
            if self._enough.is_set():
                return
            cpu = {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}
            self._points.append((moment, count, cpu))
            has_clips = count - self._points[0][1] >= self._clips
            if has_clips and len(self._seconds) >= self._count // 2:
                self._enough.set()


def _check_completed(id: str, status: str) -> None:
    if status != "completed":
        raise EngineError(f"{id}: found it {status}, expected it completed")


async def _emptied(server: Server) -> None:
    """Delete all jobs, the newest first, so that none is begun."""
    async with _connected(server) as connection:
        while jobs := (await connection.json("GET", "/v1/videos?limit=100"))["data"]:
            for job in jobs:
                await connection.ask("DELETE", f"/v1/videos/{job['id']}")


async def _until_idle(server: Server) -> None:
    """Wait until the worker does nothing."""
    worker = psutil.Process(server.pids["worker"])
    until = time.monotonic() + _IDLE_S
    while time.monotonic() < until:
        before = sum(worker.cpu_times()[:2])
        await asyncio.sleep(0.5)
        if sum(worker.cpu_times()[:2]) - before < 0.05:
            return
    raise EngineError(f"found the worker at work after {_IDLE_S:g} s without a job, expected it idle")


# The other figures.


async def _cancels(server: Server, requests: Path, bundle: Bundle, count: int) -> dict[str, Any]:
    """From a cancel until work has stopped, by the server's clock, at random moments of a step."""
    limits = (await _model(server))["limits"]
    steps = min(limits["steps"], bundle.manifest.config.schedule.num_train_timesteps)
    body = json.dumps(_read_requests(requests)[0] | {"num_inference_steps": steps}).encode()
    stopped: list[float] = []
    stepped: list[float] = []
    tried = 0
    await _until_idle(server)
    async with _connected(server) as connection, _connected(server) as listener:
        while len(stopped) < count and tried < 2 * count:
            if tried % 20 == 0:
                note(f"cancels: {len(stopped)} of {count}")
            tried += 1
            measured = await _cancel(connection, listener, body, stepped)
            if measured is not None:
                stopped.append(measured)
    if len(stopped) < count:
        raise EngineError(
            f"found {len(stopped)} of {2 * count} cancelled jobs stopped before their end, expected {count}"
        )
    step = float(np.median(stepped))
    return {
        "stopped_ms": _spread(stopped),
        "step_ms": _spread(stepped),
        "within_a_step_and_100_ms": sum(seconds <= step + 0.1 for seconds in stopped),
        "cancels": count,
        "done_before": tried - count,
        "steps": steps,
    }


async def _cancel(connection: Connection, listener: Connection, body: bytes, stepped: list[float]) -> float | None:
    """Of one job; None where it was done before, and so never stopped. `stepped` is given the time of its steps."""
    before = await connection.figure("trip_cancel_seconds_sum")
    number = await connection.figure("trip_cancel_seconds_count")
    id = (await connection.json("POST", "/v1/videos", body))["id"]
    moments: list[float] = []
    enough = random.randint(3, 6)
    async for name, _ in listener.events(id):
        if name == "step":
            moments.append(time.perf_counter())
        if name in _ENDS or len(moments) == enough:
            break
    listener.close()  # what comes now is nobody's
    gaps = list(np.diff(moments))
    stepped += gaps
    if gaps:
        await asyncio.sleep(random.uniform(0, float(np.median(gaps))))
    await connection.ask("DELETE", f"/v1/videos/{id}")
    until = time.monotonic() + 2 + 20 * max(gaps, default=0.0)
    while time.monotonic() < until:
        await asyncio.sleep(_TRIED_EVERY)
        if await connection.figure("trip_cancel_seconds_count") > number:
            return await connection.figure("trip_cancel_seconds_sum") - before
    return None


def _cold_starts(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Seconds from starting the process until it says that it is ready."""
    seconds = []
    for index in range(args.starts):
        note(f"cold start {index + 1} of {args.starts}")
        server = Server(args.bundle, place / f"start-{index}", ())
        try:
            seconds.append(round(server.wait(), 3))
        finally:
            server.stop()
    return {"median_s": float(np.median(seconds)), "seconds": seconds}


async def _memory(server: Server, requests: Path, count: int) -> dict[str, Any]:
    """Of server and worker while many clips are made and deleted: MB at first and at last, and how many kB they grow by
    with a clip over the last four fifths."""
    bodies = [json.dumps(request).encode() for request in _read_requests(requests)]
    processes = {name: psutil.Process(pid) for name, pid in server.pids.items()}
    every = min(_SEEN_EVERY, count // 10)
    asked, made = iter(range(count)), 0
    seen: list[int] = []
    memory: dict[str, list[float]] = {name: [] for name in processes}

    async def client() -> None:
        nonlocal made
        async with _connected(server) as connection:
            for index in asked:
                id = (await connection.json("POST", "/v1/videos", bodies[index % len(bodies)]))["id"]
                names = [name async for name, _ in connection.events(id)]
                _check_completed(id, names[-1] if names else "")
                await connection.ask("DELETE", f"/v1/videos/{id}")
                made += 1
                if made % every == 0:
                    seen.append(made)
                    for name, process in processes.items():
                        memory[name].append(process.memory_info().rss / 1e6)
                    if len(seen) % 4 == 1:
                        note(f"memory: {made} of {count} clips")

    async with asyncio.TaskGroup() as group:
        for _ in range(_SIDE_BY_SIDE):
            group.create_task(client())
    late = np.array(seen) >= count / 5
    return {
        "clips": count,
        "every": every,
        **{
            name: {
                "first_mb": round(values[0], 1),
                "last_mb": round(values[-1], 1),
                "kb_per_clip": round(1000 * float(np.polyfit(np.array(seen)[late], np.array(values)[late], 1)[0]), 2),
                "mb": [round(value, 1) for value in values],
            }
            for name, values in memory.items()
        },
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: p50, p95, p99 and the most."""
    return {**percentiles(seconds), "max": round(max(seconds) * 1000, 3)}


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['profile']}, {figures['speed']}, {figures['machine']['cpu']}"]
    if "clips_per_minute" in figures:
        rates, served = figures["clips_per_minute"], figures["served"]
        lines += ["", f"{'clips a minute':<24}{'bare':>10}{'served':>10}{'served/bare':>13}"]
        for name, row in (("median", rates), *((str(i), row) for i, row in enumerate(rates["rounds"], 1))):
            lines.append(f"{name:<24}{row['bare']:>10.2f}{row['served']:>10.2f}{row['served_of_bare']:>13.3f}")
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in served["cpu_seconds"].items())
        lines.append(f"CPU s in {served['seconds']:.1f} s of {figures['clients']} clients: {spent}")
    lines += ["", f"{'ms':<24}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}"]
    rows = {"status request": figures.get("status_ms")}
    if "cancel" in figures:
        rows |= {"cancel": figures["cancel"]["stopped_ms"], "a step": figures["cancel"]["step_ms"]}
    spreads = [(name, row) for name, row in rows.items() if row]
    lines += [
        f"{name:<24}" + "".join(f"{row[q]:>10.2f}" for q in ("p50", "p95", "p99", "max")) for name, row in spreads
    ]
    if not spreads:
        del lines[-2:]
    if "status_ms" in figures:
        lines.append(f"{figures['status_ms']['requests']} status requests")
    if "cancel" in figures:
        cancel = figures["cancel"]
        lines.append(f"{cancel['within_a_step_and_100_ms']} of {cancel['cancels']} cancels within a step and 100 ms")
    if "cold_start" in figures:
        start = figures["cold_start"]
        values = ", ".join(f"{value:.2f}" for value in start["seconds"])
        lines += ["", f"ready after {start['median_s']:.2f} s (each of {len(start['seconds'])}: {values})"]
    if "memory" in figures:
        memory = figures["memory"]
        lines += [
            "",
            f"{'memory, ' + str(memory['clips']) + ' clips':<24}{'first MB':>10}{'last MB':>10}{'kB a clip':>11}",
        ]
        for name in ("server", "worker"):
            row = memory[name]
            lines.append(f"{name:<24}{row['first_mb']:>10.1f}{row['last_mb']:>10.1f}{row['kb_per_clip']:>11.2f}")
    return "\n".join(lines)


_CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"bare": _bare, "clients": _clients}

main = main_of(build_parser, run)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        raise SystemExit(main())
