"""What the database does for a job, and for how many workers one suffices.

    python bench/store_load.py BUNDLE --store postgresql://trip@127.0.0.1/postgres --output FILE.json

So many workers as --workers names, each a thread with the StoreEnd of a Ray replica and an engine that sleeps --seconds
a clip, claim and finish jobs of a queue that is never empty. Results are not written. The database's CPU time is that
of the processes named postgres; SQLite has none, and its figures are of throughput alone. The last line of stdout is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from ray_serving import small_picture

from trip_rt.cluster.roster import Roster
from trip_rt.cluster.store_end import EngineChoice, StoreEnd
from trip_rt.files import whole_file
from trip_rt.serving.clip_request import ClipFields, Limits, new_job
from trip_rt.serving.models import Model, read_models
from trip_rt.serving.protocol import Denoised, Made, Make, Open, Ready, Stepped
from trip_rt.serving.store import JobStore

STEPS = 20


class NoResults:
    """Results that go nowhere."""

    def put(self, draft: Path, name: str) -> None:
        pass

    def remove(self, name: str, size: int) -> None:
        pass


def work(end: StoreEnd, seconds: float) -> None:
    """What a Worker says to its server, with sleep in the place of engines."""
    while True:
        match end.receive():
            case Open():
                end.send(Ready({"backend": "sleeping"}, {}, seconds / STEPS, 0.0))
            case Make(clips):
                jobs = tuple(clip.job for clip in clips)
                for done in range(1, STEPS + 1):
                    time.sleep(seconds / STEPS)
                    end.send(Stepped(jobs, done))
                end.send(Denoised(jobs))
                for clip in clips:
                    end.send(Made(clip.job, clip.attempt, {"denoise": seconds}, (), 1000, 0.0))


def measured(url: str, model: Model, workers: int, seconds: float, duration: float) -> dict[str, Any]:
    """Jobs a second that so many workers make, of those they could at most; the database's CPU seconds a job."""
    store = JobStore(url)
    fields = ClipFields(prompt="a red ball rolls", num_inference_steps=STEPS)
    new = new_job(fields, small_picture(), model, Limits(), "", None)
    adding = []
    for _ in range(int(1.5 * workers * duration / seconds) + workers):
        began = time.perf_counter()
        store.add(new, 1 << 30)
        adding.append(time.perf_counter() - began)
    ends = []
    for number in range(workers):
        results: Any = NoResults()
        own = JobStore(url)
        models, roster = {model.name: model}, Roster(own.database, 10)
        end = StoreEnd(f"{number}", models, own, roster, results, EngineChoice(), Path("drafts"))
        threading.Thread(target=work, args=[end, seconds], daemon=True).start()
        ends.append(end)
    for end in ends:
        end.start()
    time.sleep(2 * seconds)
    before, cpu_before, own_before, began = _done(store), _cpu(), time.process_time(), time.perf_counter()
    time.sleep(duration)
    took, done = time.perf_counter() - began, _done(store) - before
    cpu, own_cpu = _cpu() - cpu_before, time.process_time() - own_before
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda end: end.stop(5 * seconds), ends))
    for job_id, _ in store.waiting(model.name):
        store.delete(job_id)
    store.close()
    return {
        "workers": workers,
        "seconds_a_clip": seconds,
        "jobs_a_second": done / took,
        "of_what_the_engines_could": done / took * seconds / workers,
        "database_cpu_ms_a_job": 1e3 * cpu / max(done, 1),
        "workers_cpu_ms_a_job": 1e3 * own_cpu / max(done, 1),
        "add_ms_p50": 1e3 * statistics.median(adding),
    }


def _done(store: JobStore) -> int:
    return store.counts().get(("tiny", "completed"), 0)


def _cpu() -> float:
    times = [process.cpu_times() for process in psutil.process_iter(["name"]) if process.info["name"] == "postgres"]
    return sum(found.user + found.system for found in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--store", metavar="URL", help="an empty database (SQLite)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 40])
    parser.add_argument("--seconds", type=float, default=5.0, help="a clip takes (%(default)s)")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of each measurement (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    model = read_models([f"tiny={args.bundle}"], 1)["tiny"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        url = args.store or f"sqlite:///{folder}/jobs.db"
        report = {"store": url.split(":")[0], "cpus": psutil.cpu_count()}
        report["rows"] = [measured(url, model, count, args.seconds, args.duration) for count in args.workers]
    if args.output:
        with whole_file(args.output) as draft:
            draft.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
