"""Jobs: every transition of the state machine, in any order, and by several at once."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from postgres import postgres
from sqlalchemy import create_engine, text

from trip_rt.errors import InputError
from trip_rt.serving.jobs import FINISHED, MOST_LOSSES, Failure, NewJob
from trip_rt.serving.store import JobStore, OtherRequest, QueueFull

ROOT = Path(__file__).resolve().parents[2]
LOST = Failure("worker_lost", "the worker died")
REQUEST = {"prompt": "a red ball rolls", "seed": 7}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="module")
def server():
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """Of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    server = request.getfixturevalue("server")
    with create_engine(server.replace(":", "+psycopg:", 1)).connect() as connection:
        connection.execute(text("drop table if exists jobs_2"))
        connection.commit()
    return server


@pytest.fixture
def store(url, clock):
    made = JobStore(url, lifetime=60, clock=clock)
    yield made
    made.close()


def new(model="demo", owner="", key=None, request=REQUEST, batch_key="exact"):
    return NewJob(owner, model, request, b"a picture", 50, batch_key, str(request), key)


def add(store, most=100, **given):
    return store.add(new(**given), most)[0]


def claim(store, model="demo", most=1):
    return [job for job, _ in store.claim(model, most)]


def test_a_job_goes_its_way(store, clock):
    job = add(store)
    assert (job.state, job.attempt, job.request, job.created_at) == ("queued", 0, REQUEST, 1000.0)
    clock.now += 1
    (begun,) = claim(store)
    assert (begun.id, begun.state, begun.attempt, begun.started_at) == (job.id, "in_progress", 1, 1001.0)
    assert store.step(begun, 12) and store.get(job.id).steps_done == 12
    clock.now += 1
    assert store.complete(begun, {"file": "a.mp4"})
    done = store.get(job.id)
    assert (done.state, done.result, done.steps_done, done.finished_at) == ("completed", {"file": "a.mp4"}, 50, 1002.0)
    assert store.expired() == []
    clock.now += 60
    assert [job.id for job in store.expired()] == [done.id] and store.delete(done.id) and store.get(done.id) is None


def test_a_job_is_handed_over_with_its_pictures(store):
    plain = add(store)
    going_on = store.add(dataclasses.replace(new(batch_key="alone"), origin=b"a frame"), 100)[0]
    found = {job.id: pictures for _ in range(2) for job, pictures in store.claim("demo")}
    assert found == {plain.id: (b"a picture", None), going_on.id: (b"a picture", b"a frame")}
    assert store.picture(going_on.id) == b"a picture" and store.picture("video_0") is None


def test_what_comes_late_changes_nothing(store):
    add(store)
    (begun,) = claim(store)
    assert [job.state for job in store.cancel(begun.id, "")] == ["in_progress", "cancelled"] and not store.cancel(
        begun.id, ""
    )
    for change in (
        lambda: store.step(begun, 3),
        lambda: store.complete(begun, {}),
        lambda: store.fail(begun, LOST),
        lambda: store.give_back(begun, LOST),
    ):
        assert not change() and store.get(begun.id).state == "cancelled"


def test_an_attempt_that_was_given_up_cannot_finish_the_next_one(store):
    add(store)
    (first,) = claim(store)
    assert store.give_back(first, LOST)
    (second,) = claim(store)
    assert second.attempt == 2 and not store.complete(first, {"file": "old"})
    assert store.complete(second, {"file": "new"}) and store.get(first.id).result == {"file": "new"}


def test_a_job_is_tried_so_many_times(store):
    job = add(store)
    for attempt in range(1, MOST_LOSSES + 1):
        (begun,) = claim(store)
        assert begun.attempt == attempt and store.give_back(begun, LOST)
    assert claim(store) == [] and store.get(job.id).failure == LOST and store.get(job.id).state == "failed"


def test_a_job_that_is_given_back_keeps_its_place(store):
    jobs = [add(store) for _ in range(3)]
    (first,) = claim(store)
    assert store.waiting("demo") == [(job.id, 50) for job in jobs[1:]]
    assert store.give_back(first) and store.waiting("demo") == [(job.id, 50) for job in jobs]
    assert [job.id for job in claim(store, most=2)] == [job.id for job in jobs[:2]]


def test_what_is_handed_back_is_no_loss(store):
    add(store)
    for attempt in range(1, 3 * MOST_LOSSES):
        (begun,) = claim(store)
        assert begun.attempt == attempt and store.give_back(begun).losses == 0


def test_jobs_that_can_be_made_together_are_claimed_together(store):
    same = [add(store, batch_key=key) for key in ("fast", "exact", "fast", "fast")]
    assert [job.id for job in claim(store, most=2)] == [same[0].id, same[2].id]
    (first,) = claim(store, most=2)
    assert first.id == same[1].id
    store.give_back(first, LOST)
    add(store, batch_key="exact")
    assert [job.id for job in claim(store, most=2)] == [first.id]  # alone: it may cost its neighbours their worker


def test_after_a_start_nothing_is_in_progress(store):
    running, waiting = add(store), add(store)
    claim(store)
    assert [job.id for job in store.give_back_all(LOST)] == [running.id]
    assert {store.get(job.id).state for job in (running, waiting)} == {"queued"}


def test_models_have_queues_of_their_own(store):
    add(store, model="one")
    other = add(store, model="other")
    assert [job.id for job in claim(store, "other", 9)] == [other.id]
    assert store.counts() == {("one", "queued"): 1, ("other", "in_progress"): 1}


def test_the_queue_is_bounded(store):
    for _ in range(2):
        add(store, most=2)
    with pytest.raises(QueueFull):
        add(store, most=2)
    claim(store)
    add(store, most=2)


def test_the_same_key_is_the_same_job(store):
    job = add(store, key="k", owner="a")
    assert add(store, key="k", owner="a").id == job.id and add(store, key="k", owner="b").id != job.id
    with pytest.raises(OtherRequest):
        add(store, key="k", owner="a", request=REQUEST | {"seed": 8})
    assert add(store, owner="a").id != add(store, owner="a").id


def test_owners_see_their_own(store):
    job = add(store, owner="a")
    assert store.cancel(job.id, "b") is None
    assert store.get(job.id, "a") and store.get(job.id, "b") is None and store.page("b", None, 10) == ([], False)


def test_pages(store):
    ids = [add(store).id for _ in range(5)]
    jobs, more = store.page("", None, 2)
    assert [job.id for job in jobs] == ids[:2:-1] and more
    jobs, more = store.page("", jobs[-1].id, 3)
    assert [job.id for job in jobs] == ids[2::-1] and not more
    jobs, more = store.page("", ids[1], 2, ascending=True)
    assert [job.id for job in jobs] == ids[2:4] and more
    assert store.page("", "video_none", 2) is None


def test_a_job_is_deleted_in_any_state(store):
    job = add(store)
    assert store.delete(job.id, "another") is None and store.delete(job.id, "").state == "queued"
    add(store)
    (begun,) = claim(store)
    assert store.delete(begun.id).state == "in_progress" and store.delete(begun.id) is None
    assert store.complete(begun, {}) is None and store.get(begun.id) is None


@pytest.mark.parametrize("most", [1, 3])
def test_many_claim_at_once_and_each_job_is_claimed_once(url, most):
    store = JobStore(url)
    ids = {add(store).id for _ in range(60)}
    claimed: list[str] = []
    start = threading.Barrier(6)

    def work(_: int) -> list[str]:
        own = JobStore(url)
        start.wait()
        mine = []
        while jobs := claim(own, most=most):
            mine += [job.id for job in jobs]
            assert all(own.complete(job, {}) for job in jobs)
        own.close()
        return mine

    with ThreadPoolExecutor(6) as pool:
        for mine in pool.map(work, range(6)):
            claimed += mine
    assert len(claimed) == 60 and set(claimed) == ids and store.counts() == {("demo", "completed"): 60}
    store.close()


def test_many_ask_at_once_with_one_key_and_there_is_one_job(url):
    stores = [JobStore(url) for _ in range(4)]
    start = threading.Barrier(4)

    def ask(store: JobStore) -> tuple[str, bool]:
        start.wait()
        job, is_new = store.add(new(key="k"), 100)
        return job.id, is_new

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, stores))
    assert len({id for id, _ in answers}) == 1 and [is_new for _, is_new in answers].count(True) == 1
    for store in stores:
        store.close()


def test_a_worker_that_falls_silent_loses_its_jobs(store, clock):
    for _ in range(3):
        add(store)
    spoke, stepped, silent = claim(store, most=3)
    clock.now += 8
    assert store.renew([spoke]) == {spoke.id} and store.step(stepped, 3)
    assert store.give_back_silent(10, LOST) == []
    clock.now += 3
    assert [job.id for job in store.give_back_silent(10, LOST)] == [silent.id]
    assert store.renew([spoke, silent]) == {spoke.id} and store.renew([]) == set()
    assert {job.id for job in store.several([spoke.id, silent.id, "none"])} == {spoke.id, silent.id}
    (again,) = claim(store)
    assert again.id == silent.id and store.renew([silent, again]) == {again.id} and not store.complete(silent, {})


def test_what_all_results_take(store):
    for size in (1, 20, 300):
        add(store)
        (job,) = claim(store)
        assert store.complete(job, {"bytes": size})
    store.delete(job.id)
    assert store.result_bytes() == 21


def test_since_when_models_have_jobs_waiting(store, clock):
    add(store, model="one")
    clock.now += 1
    add(store, model="two")
    add(store, model="one")
    assert store.waiting_since() == {"one": 1000.0, "two": 1001.0}


def test_a_process_that_is_killed_loses_no_job_that_was_promised(tmp_path):
    code = """
import os, signal, sys
from trip_rt.serving.jobs import NewJob
from trip_rt.serving.store import JobStore
store = JobStore(sys.argv[1])
for i in range(5):
    print(store.add(NewJob("", "demo", {"i": i}, b"", 5, "", ""), 100)[0].id, flush=True)
store.claim("demo")
os.kill(os.getpid(), signal.SIGKILL)
"""
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    ran = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    store = JobStore(url)
    assert len(store.give_back_all(LOST)) == 1
    assert [id for id, _ in store.waiting("demo")] == ran.stdout.split()
    store.close()


def test_readers_do_not_wait_for_a_writer(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    job = add(store)
    writer = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert store.get(job.id).state == "queued" and store.page("", None, 5)[0][0].id == job.id
    writer.close()
    store.close()


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/jobs.db", "mystery://host/jobs"])
def test_no_database_is_one_line(url):
    with pytest.raises(InputError, match=r"^jobs: cannot open the database") as caught:
        JobStore(url)
    assert str(caught.value).isprintable()


class Machine(RuleBasedStateMachine):
    """Any order of calls by clients and workers: a finished job stays as it is, an attempt finishes at most once."""

    jobs = Bundle("jobs")
    attempts = Bundle("attempts")

    def __init__(self):
        super().__init__()
        self.store = JobStore("sqlite://")  # in memory
        self.finished: dict[str, tuple[str, object]] = {}

    @rule(target=jobs)
    def add(self):
        return add(self.store).id

    @rule(target=attempts)
    def claim(self):
        return tuple(claim(self.store))

    @rule(attempt=attempts, how=st.sampled_from(["step", "complete", "fail", "give_back"]))
    def change(self, attempt, how):
        for job in attempt:
            before = self.store.get(job.id)
            arguments = {"step": (3,), "complete": ({"of": job.attempt},)}.get(how, (LOST,))
            changed = getattr(self.store, how)(job, *arguments)
            assert bool(changed) == (before.state == "in_progress" and before.attempt == job.attempt)

    @rule(job=jobs)
    def cancel(self, job):
        before = self.store.get(job)
        assert bool(self.store.cancel(job, "")) == (not before.finished)

    @rule()
    def restart(self):
        self.store.give_back_all(LOST)
        assert "in_progress" not in {state for _, state in self.store.counts()}

    @invariant()
    def finished_jobs_stay_as_they_are(self):
        for job in self.store.page("", None, 1000)[0]:
            assert job.losses <= MOST_LOSSES and job.finished == (job.state in FINISHED)
            if job.finished:
                now = (job.state, job.result or job.failure)
                assert self.finished.setdefault(job.id, now) == now

    def teardown(self):
        self.store.close()


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
test_any_order_of_calls = Machine.TestCase
