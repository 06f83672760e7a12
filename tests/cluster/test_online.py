"""Servers and workers that share a database: any server tells of any job, and the loss of any worker loses none."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import yaml
from PIL import Image
from server import PROMPT, picture
from service_parts import Listener
from sleeping import SleepingAnimator

from trip_rt import Animator, EngineError, InputError
from trip_rt.backends import EngineOptions
from trip_rt.cluster import store_end
from trip_rt.cluster.application import Options, arguments_of, build, scaled
from trip_rt.cluster.roster import Roster
from trip_rt.cluster.shared_results import SharedResults
from trip_rt.cluster.shared_service import SharedService
from trip_rt.cluster.store_end import EngineChoice, StoreEnd
from trip_rt.serving import results
from trip_rt.serving.clip_request import ClipFields, Limits, new_job
from trip_rt.serving.command import main
from trip_rt.serving.extension_request import ExtensionJSON, new_extension
from trip_rt.serving.jobs import Failure
from trip_rt.serving.metrics import Metrics
from trip_rt.serving.models import read_models
from trip_rt.serving.store import JobStore
from trip_rt.serving.worker import Worker, open_animator

WAIT = 15.0
GONE = Failure("worker_lost", "it fell silent")


class Place:
    """A database and a folder of results that servers and workers of one test share."""

    def __init__(self, folder, bundles):
        self.folder, self.bundles = folder, bundles
        self.url = f"sqlite:///{folder / 'jobs.db'}"
        self.store = JobStore(self.url)
        self._workers = 0

    @property
    def results(self):
        return SharedResults(str(self.folder / "clips"), self.folder / "cache")

    def worker(self, opener=open_animator, kept=1):
        self._workers += 1
        drafts = self.folder / f"drafts-{self._workers}"
        models, store = read_models(self.bundles, 1), JobStore(self.url)
        name = f"worker-{self._workers}"
        end = StoreEnd(name, models, store, Roster(store.database, 10), self.results, EngineChoice(threads=1), drafts)
        threading.Thread(target=Worker(end, opener, kept).run, daemon=True).start()
        end.start()
        return end

    @contextlib.asynccontextmanager
    async def service(self):
        models, store = read_models(self.bundles, 1), JobStore(self.url)
        roster = Roster(store.database, 10)
        service = SharedService(models, store, roster, self.results, Metrics(), 100, 1 << 30)
        service.begin()
        try:
            yield service
        finally:
            await service.close()

    def job(self, name="tiny", **fields):
        model = read_models(self.bundles, 1)[name]
        return new_job(ClipFields(prompt=PROMPT, **fields), picture(), model, Limits(steps=1000), "", None)


@pytest.fixture
def place(tmp_path, tiny_bundle):
    place = Place(tmp_path, [f"tiny={tiny_bundle}"])
    yield place
    place.store.close()


def until(condition):
    end = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def finished(place, job):
    return until(lambda: (found := place.store.get(job.id)).finished and found)


def run(test):
    return asyncio.run(asyncio.wait_for(test, 2 * WAIT))


def test_a_clip_is_the_animators(place, tiny_bundle, tmp_path):
    worker = place.worker()
    done = finished(place, place.store.add(place.job(seed=7, num_inference_steps=3), 10)[0])
    with Animator(tiny_bundle, options=EngineOptions("auto", 1)) as animator:
        frames = animator(io.BytesIO(picture()), PROMPT, seed=7, num_inference_steps=3).frames
    (tmp_path / "expected").mkdir()
    results.write(tmp_path / "expected", frames, 8)
    for name in (results.VIDEO, results.THUMBNAIL, results.SPRITESHEET):
        found = place.results.path(done.result["name"], name).read_bytes()
        assert found == (tmp_path / "expected" / name).read_bytes()
    assert done.result["engine"]["backend"] == "onnxruntime" and done.result["parity"]["passed"]
    worker.stop(1)


def test_a_clip_goes_on_from_the_shared_one(place, tiny_bundle):
    worker = place.worker()
    done = finished(place, place.store.add(place.job(seed=7, num_inference_steps=2), 10)[0])
    file = place.results.path(done.result["name"], results.VIDEO)
    fields = ExtensionJSON(prompt=PROMPT, video={"id": done.id}, seed=9, num_inference_steps=2, fps=5)
    (model,) = read_models(place.bundles, 1).values()
    asked = new_extension(fields, done, place.store.picture(done.id), file, model, Limits(), "", None)
    more = finished(place, place.store.add(asked, 10)[0])
    first = np.asarray(Image.open(io.BytesIO(place.store.picture(done.id))))
    with Animator(tiny_bundle, options=EngineOptions("auto", 1)) as animator:
        latents = animator.follow(first, results.read_frames(file)[-1], PROMPT, 9, num_inference_steps=2)
        frames = np.concatenate(list(animator.decode(latents)))
    (place.folder / "expected").mkdir()
    results.write(place.folder / "expected", frames, 5)
    found = place.results.path(more.result["name"], results.VIDEO).read_bytes()
    assert found == (place.folder / "expected" / results.VIDEO).read_bytes()
    worker.stop(1)


def test_any_server_tells_of_a_job(place):
    worker = place.worker(SleepingAnimator)

    async def ask():
        async with place.service() as one, place.service() as other:
            job = await one.add(place.job(seed=7, num_inference_steps=40))
            heard = [Listener(service, job) for service in (one, other)]
            for listener in heard:
                names = await listener.end()
                assert names[-1] == "completed" and "in_progress" in names and "step" in names
            steps = [data["steps_done"] for _, name, data in heard[1].events if name == "step"]
            assert steps == sorted(set(steps)) and steps[-1] <= 40
            done = await other.finished(job)
            frames = [frame async for name, frame in other.frames(done) if name == "frame"]
            assert [index for index, _ in frames] == list(range(5))
            assert (await one.file(done, results.VIDEO)).exists()
            assert await other.delete(job.id, None) and await one.get(job.id, None) is None
            assert not one._feeds and not other._feeds

    run(ask())
    assert place.results.names() == []
    worker.stop(1)


def test_a_cancel_through_any_server_stops_the_work(place):
    worker = place.worker(SleepingAnimator)

    async def ask():
        async with place.service() as one, place.service() as other:
            job = await one.add(place.job(num_inference_steps=1000))  # 20 s
            listener = Listener(one, job)
            while place.store.get(job.id).steps_done == 0:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            assert (await other.cancel(job.id, "")).state == "cancelled"
            assert (await listener.end())[-1] == "cancelled"
            next_one = await other.finished(await one.add(place.job(num_inference_steps=1)))
            assert next_one.state == "completed" and time.monotonic() - began < 5
            assert not one._cancelled_early and not other._cancelled_early

    run(ask())
    assert len(place.results.names()) == 1
    worker.stop(1)


def test_a_lost_workers_job_is_made_by_another(place, monkeypatch):
    monkeypatch.setattr(store_end, "HEARD_EVERY", 1000.0)  # none says that it lives
    monkeypatch.setattr(store_end, "_NOTED_EVERY", 1000.0)
    lost = place.worker(SleepingAnimator)
    job = place.store.add(place.job(num_inference_steps=100), 10)[0]
    until(lambda: place.store.get(job.id).state == "in_progress")
    lost._stopping.set()  # it claims no more, but goes on with what it has
    assert [given.losses for given in place.store.give_back_silent(0, GONE)] == [1]
    other = place.worker(SleepingAnimator)
    done = finished(place, job)
    assert (done.state, done.attempt) == ("completed", 2)
    until(lambda: not lost._jobs)  # its own result came first or last: it is nobody's
    assert place.results.names() == [done.result["name"]] == [f"{job.id}-2"]
    other.stop(1)


def test_a_worker_that_stops_gives_its_jobs_back_without_a_loss(place):
    worker = place.worker(SleepingAnimator)
    job = place.store.add(place.job(num_inference_steps=1000), 10)[0]
    until(lambda: place.store.get(job.id).state == "in_progress")
    worker.stop(0.1)
    found = place.store.get(job.id)
    assert (found.state, found.losses) == ("queued", 0) and Roster(place.store.database, 10).entries() == []


@pytest.fixture
def two_models(place, tiny_bundle):
    place.bundles = [f"tiny={tiny_bundle}", f"other={shutil.copytree(tiny_bundle, place.folder / 'other')}"]
    return place


def test_a_worker_that_stops_keeps_what_it_finishes(place, monkeypatch):
    monkeypatch.setattr(store_end, "HEARD_EVERY", 0.1)
    worker = place.worker(SleepingAnimator)
    job = place.store.add(place.job(num_inference_steps=100), 10)[0]  # 2 s
    until(lambda: place.store.get(job.id).state == "in_progress")
    stopping = threading.Thread(target=worker.stop, args=[WAIT])
    stopping.start()
    while stopping.is_alive():
        assert place.store.give_back_silent(1.0, GONE) == []
        time.sleep(0.05)
    done = place.store.get(job.id)
    assert (done.state, done.attempt) == ("completed", 1)


def test_a_worker_that_cannot_open_its_first_bundle_says_why(place):
    def opener(opening):
        raise InputError("engine: found a damaged one")

    with pytest.raises(EngineError, match="engine: found a damaged one"):
        place.worker(opener)


def test_those_who_wait_are_told_of_those_at_work(place):
    worker = place.worker(SleepingAnimator)
    jobs = [place.store.add(place.job(num_inference_steps=100), 10)[0] for _ in range(2)]  # 2 s each
    until(lambda: place.store.get(jobs[0].id).state == "in_progress")

    async def ask():
        async with place.service() as service:
            while not (queue := service.view(await service.get(jobs[1].id, None))["queue"])["expected_wait_s"]:
                await asyncio.sleep(0.05)
            assert queue["position"] == 0 and 0.5 < queue["expected_wait_s"] < 3

    run(ask())
    worker.stop(WAIT)


def test_a_worker_opens_the_model_that_is_asked_for_and_frees_the_other(two_models):
    place, opened = two_models, []

    def opener(opening):
        assert all(animator.closed for animator in opened), "memory for one alone"
        opened.append(SleepingAnimator(opening))
        return opened[-1]

    worker = place.worker(opener)
    names = ["tiny", "other", "tiny", "other"]
    jobs = [place.store.add(place.job(name, num_inference_steps=2), 10)[0] for name in names]
    made = [finished(place, job) for job in jobs]
    assert {job.state for job in made} == {"completed"}
    # Those of the open model go first, while the others have waited for less than two seconds.
    assert len(opened) == 2 and made[2].finished_at < made[1].finished_at
    assert {entry.model for entry in Roster(place.store.database, 10).entries()} == {"tiny", "other"}
    worker.stop(1)


def test_a_bundle_that_cannot_be_opened_fails_its_jobs_alone(two_models):
    place, opened = two_models, []

    def opener(opening):
        opened.append(opening)
        if len(opened) == 2:
            raise InputError("engine: found a damaged one")
        return SleepingAnimator(opening)

    worker = place.worker(opener)
    jobs = [place.store.add(place.job(name, num_inference_steps=2), 10)[0] for name in ("other", "tiny")]
    made, failed = finished(place, jobs[1]), finished(place, jobs[0])
    assert failed.failure.message == "engine: found a damaged one" and made.state == "completed"
    again = finished(place, place.store.add(place.job("tiny", num_inference_steps=2), 10)[0])
    assert again.state == "completed"
    worker.stop(1)


def test_results_in_a_bucket(tmp_path):
    shared = SharedResults("memory://clips", tmp_path / "cache")
    for number in range(70):
        draft = tmp_path / "draft"
        draft.mkdir()
        for name in (results.VIDEO, results.THUMBNAIL, results.SPRITESHEET):
            (draft / name).write_bytes(f"{number} {name}".encode())
        shared.put(draft, f"video-{number}")
        assert not draft.exists()
        assert shared.path(f"video-{number}", results.VIDEO).read_bytes() == f"{number} {results.VIDEO}".encode()
    assert sorted(shared.names()) == sorted(f"video-{number}" for number in range(70))
    assert len(list((tmp_path / "cache").iterdir())) <= 65
    shared.remove("video-3", 10)
    shared.remove("video-3", 10)
    assert not shared.path("video-3", results.VIDEO).exists() and len(shared.names()) == 69


def test_results_nowhere_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    for url in ("nonsense://bucket", str(tmp_path / "file" / "clips")):
        with pytest.raises(InputError, match=r"^results: cannot use .*expected a folder or an address"):
            SharedResults(url, tmp_path)


def test_what_no_job_has_is_swept(place):
    kept = place.store.add(place.job(num_inference_steps=2), 10)[0]
    worker = place.worker(SleepingAnimator)
    finished(place, kept)
    worker.stop(1)
    for name in ("video_gone-1", f"{kept.id}-7"):
        (place.folder / "clips" / name).mkdir()

    async def sweep():
        async with place.service() as service:
            await service._sweep()

    run(sweep())
    assert place.results.names() == [f"{kept.id}-1"]


OPTIONS = Options(["tiny=/bundle"], "postgresql://trip@db/trip", "s3://bucket/clips")
OTHERS = dataclasses.replace(
    OPTIONS, replicas=(1, 8), engines=EngineChoice("onnxruntime", "cuda", 2), limits=Limits(steps=7), hosts=["a"]
)


@pytest.mark.parametrize("options", [OPTIONS, OTHERS])
def test_a_config_has_what_is_not_the_default(options):
    arguments = arguments_of(options)
    assert ("replicas" in arguments) == (options.replicas != (1, 1))
    build(yaml.safe_load(yaml.safe_dump(arguments)))


def test_an_unknown_option_is_one_line():
    with pytest.raises(InputError, match="trip-serve's options: found the unknown field replica;"):
        build(arguments_of(OPTIONS) | {"replica": 3})


def test_the_command_writes_a_config(tiny_bundle, tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    options = ["--store", "postgresql://db/trip", "--results", "s3://b/clips", "--replicas", "2:9", "--port", "8000"]
    assert main([f"tiny={tiny_bundle}", *options, "--write-config", str(file)]) == 0
    (application,) = yaml.safe_load(file.read_text())["applications"]
    assert application["import_path"] == "trip_rt.cluster.application:build"
    assert application["args"]["replicas"] == [2, 9] and application["args"]["bundles"] == [
        f"tiny={tiny_bundle.resolve()}@48x32-5f-b1"
    ]
    build(application["args"])
    assert "serve deploy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "--gpus", "0"], "found --gpus or --hang-after beside --ray"),
        (["--store", "sqlite://"], "found --store without --ray"),
        (["--ray", "127.0.0.1:1"], "--ray: cannot reach 127.0.0.1:1"),
    ],
)
def test_what_does_not_fit_is_one_line(options, said, tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_bundle), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trip-serve:")]
    assert said in line


def test_a_port_that_is_taken_is_one_line(tiny_bundle, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([str(tiny_bundle), "--ray", "--data", str(tmp_path / "data"), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: cannot listen there" in capsys.readouterr().err


@pytest.mark.parametrize(("queued", "now", "wanted"), [(0, 3, 1), (1, 3, 3), (7, 3, 4), (100, 3, 8), (None, 2, 1)])
def test_more_replicas_for_more_jobs(queued, now, wanted):
    context = argparse.Namespace(
        aggregated_metrics={} if queued is None else {"queued": {"a": queued, "b": queued - 0.5}},
        current_num_replicas=now,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
    )
    assert scaled(context)[0] == wanted
