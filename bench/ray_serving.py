"""trip-serve's Ray application on a cluster of four nodes of this machine, with engines that sleep.

    python bench/ray_serving.py BUNDLE --output bench/results/ray_serving.json

scaling: jobs a second with 1, 2, 4 and 8 engine replicas, against as many times the one's. overhead: what a job takes
beyond a bare call of the same engine, one job at a time and in a full queue. losses: a node is killed again and again,
and an ingress replica while clients listen; every job must be completed once. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from sleeping import open_sleeping

from trip_rt.cluster.application import QUIET, Options, arguments_of, build
from trip_rt.cluster.command import NAME
from trip_rt.cluster.roster import Roster
from trip_rt.files import whole_file
from trip_rt.serving import results
from trip_rt.serving.clip_request import ClipFields, Limits, new_job
from trip_rt.serving.jobs import FINISHED, Job
from trip_rt.serving.models import read_models
from trip_rt.serving.protocol import Open
from trip_rt.serving.store import JobStore

HERE = Path(__file__).resolve().parent
REPLICAS = (1, 2, 4, 8)
STEPS = 50  # a second's sleep
OPENER = "sleeping:open_sleeping"


class Served:
    """The application on a cluster: `nodes` are those beside the head, which has the ingress."""

    def __init__(self, bundle: Path, folder: Path, port: int, store: str | None = None):
        self.bundle, self.folder, self.port = bundle, folder, port
        os.environ |= {
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # the replicas'
        self.url = store or f"sqlite:///{folder / 'jobs.db'}"
        self.store = JobStore(self.url)
        self.model = read_models([f"tiny={bundle}"], 1)["tiny"]
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
        self.nodes = [self._add_node() for _ in range(3)]
        self.cluster.wait_for_nodes()
        ray.init(address=self.cluster.address, logging_level="WARNING", log_to_driver=False)
        serve.start(http_options={"port": port}, proxy_location="HeadOnly", logging_config=QUIET)

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=6, object_store_memory=100 << 20)

    def deploy(self, replicas: int, ingress: int = 1) -> None:
        """So many engine replicas, warm."""
        options = Options(
            [f"tiny={self.bundle}"],
            self.url,
            str(self.folder / "clips"),
            (replicas, replicas),
            ingress,
            opener=OPENER,
            max_queued=100_000,
            grace=1,
        )
        serve.run(build(arguments_of(options)), name=NAME, route_prefix="/")
        roster, until = Roster(self.store.database, 10), time.monotonic() + 180
        while len(roster.entries()) != replicas:
            assert time.monotonic() < until, f"{len(roster.entries())} of {replicas} replicas"
            time.sleep(0.1)

    def add(self, count: int, steps: int = STEPS) -> list[Job]:
        """Jobs, put straight into the queue."""
        return [self.store.add(self._new(seed, steps), 1 << 30)[0] for seed in range(count)]

    def _new(self, seed: int, steps: int) -> Any:
        fields = ClipFields(prompt="a red ball rolls", seed=seed, num_inference_steps=steps)
        return new_job(fields, small_picture(), self.model, Limits(steps=1000), "", None)

    def finished(self, jobs: list[Job], seconds: float) -> list[Job]:
        """The jobs, once all are."""
        until = time.monotonic() + seconds
        while sum(count for (_, state), count in self.store.counts().items() if state not in FINISHED):
            assert time.monotonic() < until, self.store.counts()
            time.sleep(0.1)
        return self.store.several([job.id for job in jobs])

    def kill_node(self) -> None:
        """One that has engines, at once, and a new one in its place."""
        node = self.nodes.pop(random.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._add_node())

    def kill_ingress(self) -> None:
        """A replica of those that answer clients, at once."""
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
        pids = [actor.pid for actor in actors if "ingress" in (actor.name or "") and actor.pid]
        os.kill(random.choice(pids), 9)

    def close(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()
        self.store.close()


@contextlib.contextmanager
def served(bundle: Path, port: int, store: str | None = None) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="ray-serving-", ignore_cleanup_errors=True) as folder:
        application = Served(bundle, Path(folder), port, store)
        try:
            yield application
        finally:
            application.close()


def scaling(application: Served, jobs_each: int) -> list[dict[str, Any]]:
    """Jobs a second for each number of replicas."""
    rows: list[dict[str, Any]] = []
    for replicas in REPLICAS:
        application.deploy(replicas)
        jobs = application.add(replicas * jobs_each)
        done = application.finished(jobs, 60 + 10 * jobs_each)
        took = max(job.finished_at for job in done) - min(job.started_at for job in done)
        rows.append({"replicas": replicas, "jobs": len(jobs), "jobs_a_second": len(jobs) / took})
        rows[-1]["efficiency"] = rows[-1]["jobs_a_second"] / (replicas * rows[0]["jobs_a_second"])
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def overhead(application: Served, count: int, steps: int = 10) -> dict[str, Any]:
    """Seconds of a job, bare and served, in turn."""
    application.deploy(1)
    model = application.model
    opening = Open(str(model.bundle), model.profile.name, "auto", "auto", 1, str(application.folder))
    engine = open_sleeping(opening)
    body = json.dumps(
        {"prompt": "a red ball rolls", "input_reference": {"image_url": _data_url()}, "num_inference_steps": steps}
    ).encode()
    bare, alone = [], []
    for number in range(count):
        began = time.perf_counter()
        latents = engine.latents(None, ["."], [number], num_inference_steps=steps)
        frames = np.concatenate(list(engine.decode(latents[0])))
        with results.draft(application.folder, f"bare-{number}") as draft:
            results.write(draft, frames, 8)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        url = f"http://127.0.0.1:{application.port}/v1/videos/sync"
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
        alone.append(time.perf_counter() - began)
    jobs = application.finished(application.add(count, steps), 120)
    each = (max(job.finished_at for job in jobs) - min(job.started_at for job in jobs)) / count
    differences = [served - plain for served, plain in zip(alone, bare, strict=True)]
    return {
        "steps": steps,
        "bare_ms": 1e3 * statistics.median(bare),
        "alone_ms": 1e3 * statistics.median(alone),
        "overhead_alone_p50_ms": 1e3 * statistics.median(differences),
        "in_a_full_queue_ms": 1e3 * each,
        "overhead_in_a_full_queue_ms": 1e3 * (each - statistics.median(bare)),
    }


def losses(application: Served, count: int, kills: int, replicas: int = 4) -> dict[str, Any]:
    """Jobs while nodes are killed at random moments, and an ingress replica under those who listen."""
    application.deploy(replicas, ingress=2)
    began = time.monotonic()
    jobs = application.add(count)
    heard = [_Listener(application.port, job.id) for job in random.sample(jobs, 8)]
    time.sleep(2)
    application.kill_ingress()
    for _ in range(kills):
        time.sleep(random.uniform(2, 6))
        application.kill_node()
    done = application.finished(jobs, 900)
    took = time.monotonic() - began
    for listener in heard:
        listener.thread.join(120)
    names = {job.result["name"] for job in done if job.result}
    ids = {job.id for job in done}
    there = {name for name in os.listdir(application.folder / "clips") if name.rpartition("-")[0] in ids}
    return {
        "jobs": count,
        "kills": kills,
        "seconds": took,
        "completed": sum(job.state == "completed" for job in done),
        "begun_again": sum(job.attempt > 1 for job in done),
        "results_in_place": names <= there and len(names) == len(done),
        "results_that_no_job_has_yet": len(there - names),  # of workers lost between two lines; they are swept
        "listeners": len(heard),
        "listeners_that_heard_the_end": sum(listener.end == "completed" for listener in heard),
        "reconnections": sum(listener.connections - 1 for listener in heard),
    }


class _Listener:
    """A client that listens to a job's events, again and again until it has heard the end."""

    def __init__(self, port: int, id: str):
        self._url = f"http://127.0.0.1:{port}/v1/videos/{id}/events"
        self.end, self.connections = "", 0
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while not self.end:
            self.connections += 1
            with contextlib.suppress(OSError), urllib.request.urlopen(self._url, timeout=600) as stream:
                for line in stream:
                    name = line.decode().removeprefix("event: ").strip()
                    if name in ("completed", "failed", "cancelled", "deleted"):
                        self.end = name
            time.sleep(0.2)


def small_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def _data_url() -> str:
    return "data:image/png;base64," + base64.b64encode(small_picture()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--only", nargs="+", choices=("scaling", "overhead", "losses"), help="some parts alone")
    parser.add_argument("--jobs-each", type=int, default=20, help="jobs for each replica (%(default)s)")
    parser.add_argument("--jobs", type=int, default=300, help="of losses (%(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="of nodes (%(default)s)")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--store", metavar="URL", help="such as postgresql://user@host/name (SQLite)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    parts = args.only or ("overhead", "scaling", "losses")
    report: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "ray": ray.__version__,
        "store": (args.store or "sqlite").split(":")[0],
    }
    if args.output and args.output.exists():
        report = json.loads(args.output.read_text()) | report
    with served(args.bundle.resolve(), args.port, args.store) as application:
        if "overhead" in parts:
            report["overhead"] = overhead(application, 40)
        if "scaling" in parts:
            report["scaling"] = scaling(application, args.jobs_each)
        if "losses" in parts:
            report["losses"] = losses(application, args.jobs, args.kills)
    if args.output:
        with whole_file(args.output) as draft:
            draft.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
