"""What goes wrong around a real server: kills, hangs, a locked database, a full disk, clients that go away, signals.

TRIP_KILLS sets how many kills the long test of them has, TRIP_SIGNALS how often each signal comes at a random moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.error
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image
from server import Server, clip, picture, running

from trip_rt.serving.jobs import MOST_LOSSES

FRAMES = 5
GONE = (urllib.error.URLError, http.client.HTTPException, OSError)  # what a client sees of a server that is killed
LONG = {"num_inference_steps": 900}


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    data = tmp_path_factory.mktemp("served") / "data"
    with running(tiny_bundle, data, "--max-steps", "1000", "--max-queued", "100") as server:
        yield server


def until(happened, seconds=30.0):
    """What `happened()` gives, once it is something."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def rows(server, columns="id, state, attempt, losses"):
    """The jobs as they are in the database, whether or not the server runs."""
    with contextlib.closing(sqlite3.connect(server.data / "jobs.db", timeout=10)) as database:
        return database.execute(f"select {columns} from jobs_2 order by number").fetchall()


def all_jobs(server):
    jobs, after = [], ""
    while True:
        _, page = server.ask("GET", f"/v1/videos?limit=100&order=asc{after}")
        jobs += page["data"]
        if not page["has_more"]:
            return jobs
        after = f"&after={page['last_id']}"


def check_files(server):
    """The folder has the clips of completed jobs, each once and whole, and nothing else; how many they are."""
    completed = [f"{id}-{attempt}" for id, state, attempt, _ in rows(server) if state == "completed"]
    folder = server.data / "clips"
    until(lambda: not os.listdir(folder / ".drafts"))
    assert sorted(os.listdir(folder)) == sorted([".drafts", *completed])
    for name in completed:
        assert sorted(os.listdir(folder / name)) == ["spritesheet.jpg", "thumbnail.webp", "video.mp4"]
        with av.open(str(folder / name / "video.mp4")) as container:
            assert len(list(container.decode(video=0))) == FRAMES
    return len(completed)


def check_nobody_left(server):
    """No process has the folder's lock, which a server and its workers hold as long as they live."""

    def is_free():
        with (server.data / "lock").open("a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True

    until(is_free, 10)


def in_progress(server, **fields):
    """A new job that is being made."""
    id = server.create(**fields)["id"]
    server.wait(id, "in_progress")
    return id


def metric(server, name):
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", server.ask("GET", "/metrics")[1].decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


# Kills.


def moments(rng):
    """Whom to kill, how long after what; each kind comes as often as the others."""
    kinds = [
        ("server", "started", 0.1),
        ("server", "ready", 0.6),
        ("worker", "ready", 0.6),
        ("server", "encoding", 0.01),
        ("worker", "encoding", 0.01),
        ("server", "started", 1.2),
    ]
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            yield kind[0], kind[1], rng.uniform(0, kind[2])


def post_all(server, count, given_up):
    """Ask for `count` jobs until each has been promised, however often the server is gone meanwhile."""
    for seed in range(count):
        body, headers = clip(seed=seed, num_inference_steps=12), {"idempotency-key": f"job-{seed}"}
        while not given_up.is_set():
            with contextlib.suppress(*GONE):
                status, _ = server.ask("POST", "/v1/videos", body, headers)
                if status == 200:
                    break
                assert status == 503, status
            time.sleep(0.05)


def can_lose(server, deaths):
    """No job fails by so many more deaths and by the last one, which the table may not show yet."""
    return all(losses + 1 + deaths < MOST_LOSSES for _, state, _, losses in rows(server) if state != "completed")


def kill_at_random(bundle, data, kills, jobs, seed):
    """How many deaths there were of each kind. No job is made to lose more workers than it may, after which it would
    rightly fail."""
    rng = random.Random(seed)
    server = Server([f"tiny={bundle}"], data, ("--max-queued", "300"))
    drafts, counts, given_up = data / "clips" / ".drafts", {}, threading.Event()
    server.start()
    client = threading.Thread(target=post_all, args=(server, jobs, given_up))
    client.start()
    chosen, done = moments(rng), 0
    try:
        while done < kills:
            victim, after, moment = next(chosen)
            deaths = 2 if after == "started" else 1  # the server that runs dies, too
            if not can_lose(server, deaths):
                if server.process.poll() is not None:
                    server.start()
                until(lambda deaths=deaths: can_lose(server, deaths))
            if after == "started":
                if server.process.poll() is None:
                    server.kill()
                    counts["server running"] = counts.get("server running", 0) + 1
                    done += 1
                server.spawn()
                time.sleep(moment)
            else:
                if server.process.poll() is not None:
                    server.start()
                until(lambda: metric(server, "trip_workers_ready"))
                if after == "encoding" and any(state != "completed" for _, state, _, _ in rows(server)):
                    with contextlib.suppress(AssertionError):  # where the queue has just run empty
                        until(lambda: os.listdir(drafts), 2)
                time.sleep(moment)
            if victim == "server":
                server.kill()
            else:
                for worker in server.workers():
                    worker.kill()
            name = f"{victim} {after}"
            counts[name] = counts.get(name, 0) + 1
            done += 1
        if server.process.poll() is not None:
            server.start()
        client.join(120)
        assert not client.is_alive()
        until(lambda: all(state not in ("queued", "in_progress") for _, state, _, _ in rows(server)), 120)
        found = all_jobs(server)
        assert [(job["seed"], job["status"], job["steps"]) for job in found] == [
            (seed, "completed", 12) for seed in range(jobs)
        ]
        assert server.stop() == 143
    finally:
        given_up.set()
        client.join()
        if server.process.poll() is None:
            server.kill()
    assert check_files(server) == jobs
    for job in found:  # over all of the server's lives
        assert len(re.findall(rf"completed job={job['id']} ", server.log)) <= 1
    assert "Traceback" not in server.log
    check_nobody_left(server)
    again = sum(attempt > 1 for _, _, attempt, _ in rows(server))
    return counts | {"kills": done, "jobs": jobs, "jobs begun again": again}


def test_kills_lose_and_double_nothing(tiny_bundle, tmp_path, record_property):
    counts = kill_at_random(tiny_bundle, tmp_path / "data", kills=4, jobs=40, seed=1)
    record_property("kills", counts)
    print(counts)


@pytest.mark.slow
def test_many_kills_lose_and_double_nothing(tiny_bundle, tmp_path, record_property):
    kills = int(os.environ.get("TRIP_KILLS", "30"))
    counts = kill_at_random(tiny_bundle, tmp_path / "data", kills, jobs=max(200, 7 * kills), seed=2)
    record_property("kills", counts)
    print(counts)


def test_a_worker_that_hangs_is_replaced(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--max-steps", "1000", "--hang-after", "1.5") as server:
        id = in_progress(server, num_inference_steps=150)
        (worker,) = server.workers()
        worker.suspend()
        job = server.wait(id)
        assert (job["status"], job["attempt"]) == ("completed", 2) and not worker.is_running()
        assert [losses for *_, losses in rows(server)] == [1] and metric(server, "trip_workers_lost_total") == 1
        assert server.stop() == 143
        check_files(server)
        check_nobody_left(server)


def test_a_job_that_kills_every_worker_fails_and_the_others_are_made(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--max-steps", "1000") as server:
        before = server.create()["id"]
        fatal = server.create(**LONG)["id"]
        others = [before, *(server.create(seed=seed)["id"] for seed in range(5))]
        for attempt in range(1, MOST_LOSSES + 1):
            until(lambda attempt=attempt: rows(server, "state, attempt")[1] == ("in_progress", attempt))
            for worker in server.workers():
                worker.kill()
        job = server.wait(fatal)
        assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", MOST_LOSSES, "worker_lost")
        assert job["error"]["message"] == "the worker process died while it made this clip"
        assert all(server.wait(id)["status"] == "completed" for id in others)
        assert sum(losses for id, _, _, losses in rows(server) if id in others) <= 1  # that of the first time
        assert check_files(server) == len(others)


# The database and the disk.


def test_a_locked_database(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--max-steps", "1000") as server:
        begun, waiting = in_progress(server, num_inference_steps=300), server.create(seed=2)["id"]
        other = sqlite3.connect(server.data / "jobs.db", isolation_level=None)
        other.execute("begin immediate")
        answers = []
        post = threading.Thread(target=lambda: answers.append(server.exchange("POST", "/v1/videos", clip(seed=3))))
        post.start()
        while post.is_alive():
            assert server.ask("GET", f"/v1/videos/{begun}")[0] == server.ask("GET", "/v1/videos")[0] == 200
            assert server.ask("GET", "/healthz")[0] == server.ask("GET", "/metrics")[0] == 200
            time.sleep(0.1)
        ((status, headers, body),) = answers
        assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (503, "2", "store_busy")
        assert [state for _, state, _, _ in rows(server)] == ["in_progress", "queued"]
        other.execute("rollback")
        other.close()
        assert server.wait(begun)["attempt"] == server.wait(waiting)["attempt"] == 1
        assert server.wait(server.create()["id"])["status"] == "completed"
        assert check_files(server) == 3 and "Traceback" not in server.log


def test_a_worker_without_room(server):
    """EFBIG in place of ENOSPC: a limit on the size of its files, which can be lifted again."""
    if not hasattr(psutil, "RLIMIT_FSIZE"):
        pytest.skip("no limits of another process here")
    (worker,) = server.workers()
    before, most = check_files(server), worker.rlimit(psutil.RLIMIT_FSIZE)
    for size in (0, 1000, 5000):  # for nothing, for a part of the video, for a part of all
        worker.rlimit(psutil.RLIMIT_FSIZE, (size, most[1]))
        job = server.wait(server.create()["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "storage") and job["error"]["message"]
        assert check_files(server) == before
    worker.rlimit(psutil.RLIMIT_FSIZE, most)
    assert server.wait(server.create()["id"])["status"] == "completed"
    assert check_files(server) == before + 1 and server.workers() == [worker]


def test_a_server_without_room(server):
    if not hasattr(psutil, "RLIMIT_FSIZE"):
        pytest.skip("no limits of another process here")
    process = psutil.Process(server.process.pid)
    kept, most = server.create()["id"], process.rlimit(psutil.RLIMIT_FSIZE)
    server.wait(kept)
    size = (server.data.parent / "data.log").stat().st_size + (64 << 10)  # its log goes on
    assert (server.data / "jobs.db-wal").stat().st_size > size
    process.rlimit(psutil.RLIMIT_FSIZE, (size, most[1]))
    status, _, body = server.exchange("POST", "/v1/videos", clip())
    assert status in (503, 507) and json.loads(body)["error"]["code"] in ("store_busy", "storage_full")
    status, body = upload(server, noise())  # kept in a file while it arrives
    assert (status, body["error"]["code"]) == (507, "storage_full")
    assert server.ask("GET", f"/v1/videos/{kept}")[1]["status"] == "completed"
    process.rlimit(psutil.RLIMIT_FSIZE, most)
    assert server.wait(server.create()["id"])["status"] == "completed"
    status, job = upload(server, noise())
    assert status == 200 and server.wait(job["id"])["status"] == "completed"
    check_files(server)


def test_a_full_disk(tiny_bundle, tmp_path):
    """A small file system of its own, for those who may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with running(tiny_bundle, disk / "data") as server:
            first = server.wait(server.create()["id"])
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            status, _, body = server.exchange("POST", "/v1/videos", clip())
            assert status in (503, 507), body
            assert server.ask("GET", f"/v1/videos/{first['id']}/content")[0] == 200
            # Room for jobs, and none for clips.
            filler.unlink()
            ids = [server.create(seed=seed)["id"] for seed in range(3)]
            for id in ids:
                server.wait(id)
            with contextlib.suppress(OSError), filler.open("wb", 0) as file:
                os.posix_fallocate(file.fileno(), 0, max(0, psutil.disk_usage(str(disk)).free - 8192))
            told = server.exchange("POST", "/v1/videos", clip(seed=9))
            filler.unlink()
            if told[0] == 200:
                job = server.wait(json.loads(told[2])["id"])
                assert job["status"] == "completed" or job["error"]["code"] == "storage", job
            assert server.wait(server.create()["id"])["status"] == "completed"
            check_files(server)
            assert server.stop() == 143
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_quota(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--max-disk-gb", "0.000001") as server:
        id = server.create()["id"]
        server.wait(id)
        status, answer = server.ask("POST", "/v1/videos", clip())
        assert (status, answer["error"]["code"]) == (507, "storage_full")
        assert server.ask("DELETE", f"/v1/videos/{id}")[0] == 200
        assert server.wait(server.create()["id"])["status"] == "completed"
        check_files(server)


# Clients that go away.


def noise():
    """A picture of some megabytes."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def form(image):
    """A request's body and the type of it."""
    parts = [
        b'--b0undary\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red ball rolls\r\n',
        b'--b0undary\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + image + b"\r\n--b0undary--\r\n",
    ]
    return b"".join(parts), "multipart/form-data; boundary=b0undary"


def upload(server, image):
    body, kind = form(image)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/videos", body, {"content-type": kind})
        with connection.getresponse() as response:
            return response.status, json.loads(response.read())


def hang_up(server, head, body=b"", reads=0):
    """Send that much, read that many bytes of the answer, go away."""
    with socket.create_connection(server.url.removeprefix("http://").split(":"), 30) as connection:
        connection.sendall(head.encode() + b"Host: localhost\r\n\r\n" + body)
        read = 0
        while read < reads:
            received = connection.recv(1 << 16)
            assert received, "the server hung up first"
            read += len(received)


def held(server):
    """What the server holds open, each by its name without the number that the system gives it: files, connections to
    clients and workers, pipes and all the rest.

    The database's own files are left out: each thread that asked it something keeps its connection."""
    names = []
    for name in os.listdir(f"/proc/{server.process.pid}/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/{server.process.pid}/fd/{name}"))
    return sorted(name.split(":[")[0] for name in names if not Path(name).name.startswith("jobs.db"))


def settled(server):
    """The same, once it has not changed for a second."""
    since, found = time.monotonic(), held(server)
    while time.monotonic() - since < 1:
        if (now := held(server)) != found:
            since, found = time.monotonic(), now
        time.sleep(0.05)
    return found


def streaming(kind):
    def go_away(server):
        id = in_progress(server, **LONG)
        hang_up(server, f"GET /v1/videos/{id}/{kind} HTTP/1.1\r\n", reads=200 if kind == "events" else 100)
        assert server.ask("DELETE", f"/v1/videos/{id}")[0] == 200

    return go_away


def uploading(image, chunked):
    body, kind = form(image)
    half = body[: len(body) // 2]
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    sent = f"{len(half):x}\r\n".encode() + half + b"\r\n" if chunked else half

    def go_away(server):
        hang_up(server, f"POST /v1/videos HTTP/1.1\r\nContent-Type: {kind}\r\n{length}\r\n", sent)

    return go_away


def waiting(server):
    known = {job["id"] for job in all_jobs(server)}
    body = json.dumps(clip(**LONG)).encode()
    head = f"POST /v1/videos/sync HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":"), 30) as connection:
        connection.sendall(head.encode() + b"Host: localhost\r\n\r\n" + body)
        (id,) = until(lambda: {job["id"] for job in all_jobs(server)} - known)
        server.wait(id, "in_progress")
    assert server.wait(id)["status"] == "cancelled"


AWAY = {
    "half a form": uploading(picture(), False),
    "half a large form": uploading(noise(), False),
    "half a chunked form": uploading(noise(), True),
    "events": streaming("events"),
    "frames": streaming("frames"),
    "sync": waiting,
}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
@pytest.mark.parametrize("how", AWAY)
def test_a_client_that_goes_away_leaves_nothing(server, how):
    AWAY[how](server)
    before, jobs = settled(server), len(all_jobs(server))
    for _ in range(10):
        AWAY[how](server)
    until(lambda: held(server) == before, 15)
    assert jobs <= len(all_jobs(server)) <= jobs + 10 and server.ask("GET", "/healthz")[0] == 200
    assert server.wait(server.create()["id"])["status"] == "completed"
    check_files(server)
    assert "Traceback" not in server.log


# Signals.


def last_line(server):
    return server.log.splitlines()[-1]


def events_of(server, id):
    """A list that the names of a job's events are added to, until there are no more."""
    names, begun = [], threading.Event()

    def listen():
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", f"/v1/videos/{id}/events")
            with connection.getresponse() as response:
                for line in response:
                    begun.set()
                    if line.startswith(b"event: "):
                        names.append(line.split()[1].decode())

    listener = threading.Thread(target=listen)
    listener.start()
    assert begun.wait(30)
    return names, listener


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_lets_the_running_clip_be_finished(tiny_bundle, tmp_path, number, code, word):
    with running(tiny_bundle, tmp_path / "data", "--max-steps", "1000") as server:
        begun, queued = in_progress(server, num_inference_steps=300), server.create(**LONG)["id"]
        mine, its_listener = events_of(server, begun)
        others, other_listener = events_of(server, queued)
        server.process.send_signal(number)
        until(lambda: server.ask("GET", "/readyz")[1].get("status") == "stopping")
        status, headers, body = server.exchange("POST", "/v1/videos", clip())
        assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (503, "10", "stopping")
        assert server.process.wait(60) == code and last_line(server) == f"trip-serve: {word}"
        its_listener.join(10)
        other_listener.join(10)
        assert mine[-1] == "completed" and others[-1] == "stopping" and len(set(mine + others) & set(ENDS)) == 2
        assert [row[1:] for row in rows(server)] == [("completed", 1, 0), ("queued", 0, 0)]
        assert check_files(server) == 1 and "Traceback" not in server.log
        check_nobody_left(server)


ENDS = ("completed", "failed", "cancelled", "deleted", "stopping")


def test_without_grace_clips_are_given_back(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--max-steps", "1000", "--grace", "0") as server:
        id = in_progress(server, num_inference_steps=250)
        names, listener = events_of(server, id)
        assert server.stop() == 143 and last_line(server) == "trip-serve: terminated"
        listener.join(10)
        assert names[-1] == "stopping" and [row[1:] for row in rows(server)] == [("queued", 1, 0)]
        assert check_files(server) == 0
        check_nobody_left(server)
        server.start()
        job = server.wait(id)
        assert (job["status"], job["attempt"]) == ("completed", 2) and check_files(server) == 1
        assert "Traceback" not in server.log


def test_a_second_signal_ends_it_at_once(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--max-steps", "100000", "--grace", "600") as server:
        in_progress(server, num_inference_steps=1000, speed="exact")
        server.create(**LONG)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "trip-serve: stopping" in server.log)
        assert server.stop() == 143 and last_line(server) == "trip-serve: terminated"
        assert [row[1:] for row in rows(server)] == [("queued", 1, 0), ("queued", 0, 0)]
        assert check_files(server) == 0 and "Traceback" not in server.log
        check_nobody_left(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_at_random_moments(tiny_bundle, tmp_path, number, code, word):
    rng = random.Random(int(number))
    server = Server([f"tiny={tiny_bundle}"], tmp_path / "data", ("--grace", "1"))
    server.start()
    for seed in range(60):
        server.create(seed=seed)
    assert server.stop() == 143
    for _ in range(int(os.environ.get("TRIP_SIGNALS", "10"))):
        before = len(server.log)
        server.spawn()
        time.sleep(moment := rng.uniform(0.2, 2.5))
        assert server.stop(number) == code, (moment, server.log[before:])
        assert last_line(server) == f"trip-serve: {word}" and "Traceback" not in server.log[before:], moment
        check_nobody_left(server)
    server.start()
    until(lambda: all(state == "completed" for _, state, _, _ in rows(server)))
    assert all(losses == 0 for *_, losses in rows(server))
    assert server.stop() == 143 and check_files(server) == 60


# Cancels.


@pytest.mark.parametrize(("method", "path"), [("DELETE", ""), ("POST", "/cancel")])
def test_a_cancel_stops_the_work(server, method, path):
    queued_behind = [in_progress(server, **LONG), server.create(**LONG)["id"], server.create(**LONG)["id"]]
    stopped, took = metric(server, "trip_cancel_seconds_count"), metric(server, "trip_cancel_seconds_sum")
    begun, *queued = queued_behind
    for id in queued:
        assert server.ask(method, f"/v1/videos/{id}{path}")[0] == 200
    assert metric(server, "trip_cancel_seconds_count") == stopped  # nobody worked on those
    before = server.ask("GET", f"/v1/videos/{begun}")[1]
    assert before["status"] == "in_progress" and server.ask(method, f"/v1/videos/{begun}{path}")[0] == 200
    until(lambda: metric(server, "trip_cancel_seconds_count") == stopped + 1)
    assert metric(server, "trip_cancel_seconds_sum") - took < 1  # all 900 steps take some seconds
    for id in queued_behind:
        status, job = server.ask("GET", f"/v1/videos/{id}")
        assert status == 404 if method == "DELETE" else job["status"] == "cancelled"
    assert server.wait(server.create()["id"])["status"] == "completed"
    check_files(server)


def test_cancels_at_random_moments(server, record_property):
    rng, counts = random.Random(3), {"completed": 0, "cancelled": 0, "deleted": 0}
    for number in range(50):
        id = server.create(num_inference_steps=rng.choice((4, 20, 40)))["id"]
        time.sleep(rng.uniform(0, 0.15))
        if number % 2:
            status, answer = server.ask("POST", f"/v1/videos/{id}/cancel")
            assert (status == 200 and answer["status"] == "cancelled") or answer["error"]["code"] == "finished"
            found = server.ask("GET", f"/v1/videos/{id}")[1]["status"]
            assert found == ("cancelled" if status == 200 else "completed")
            content = server.ask("GET", f"/v1/videos/{id}/content")[0]
            assert content == (409 if status == 200 else 200)
        else:
            assert server.ask("DELETE", f"/v1/videos/{id}")[0] == 200
            found = "deleted"
            assert server.ask("GET", f"/v1/videos/{id}")[0] == 404
        counts[found] += 1
    until(lambda: not any(state == "in_progress" for _, state, _, _ in rows(server)))
    assert server.wait(server.create()["id"])["status"] == "completed"  # whatever was cancelled late is through
    check_files(server)
    assert sum(losses for *_, losses in rows(server)) == 0 and "Traceback" not in server.log
    record_property("cancels", counts)
    print(counts)


# Time, and what outlives a start.


def test_expiry_and_keys_over_a_start(tiny_bundle, tmp_path):
    options = ("--keep-hours", str(1.5 / 3600), "--max-steps", "1000", "--max-queued", "2")
    with running(tiny_bundle, tmp_path / "data", *options) as server:
        done = server.create()["id"]
        server.wait(done)
        assert check_files(server) == 1
        begun = in_progress(server, **LONG)
        key = {"idempotency-key": "one"}
        queued = [server.ask("POST", "/v1/videos", clip(seed=1), key)[1]["id"], server.create(seed=2)["id"]]
        status, headers, body = server.exchange("POST", "/v1/videos", clip())
        assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) >= 1
        server.kill()
        time.sleep(1.5)
        server.start(ready=False)
        until(lambda: server.ask("GET", f"/v1/videos/{done}")[0] == 404)
        assert server.ask("POST", "/v1/videos", clip(seed=1), key)[1]["id"] == queued[0]
        assert server.ask("POST", "/v1/videos", clip(seed=9), key)[0] == 409
        assert server.ask("DELETE", f"/v1/videos/{begun}")[0] == 200
        assert all(server.wait(id)["status"] == "completed" for id in queued)
        assert check_files(server) == 2


@pytest.mark.slow
def test_two_servers_in_one_folder(server, tiny_bundle):
    """The second gives up, and the first goes on."""
    other = Server([f"tiny={tiny_bundle}"], server.data)
    other.spawn()
    assert other.process.wait(60) == 2
    assert "found another trip-serve at work in it" in other.log
    assert server.wait(server.create()["id"])["status"] == "completed"
