"""trip-animate --ray: clips by their content, and a pool that outlives its processes."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from batch_files import PROMPT, json_lines, picture
from ray_batch import sleeping_work, write_batch

from trip_rt.animate import main
from trip_rt.backends import EngineOptions
from trip_rt.cluster import batch, clip_maker
from trip_rt.cluster.clip_maker import ClipMaker, Work, identity_of, key_of, swept
from trip_rt.cluster.rows import Piece, Row, pieces_of
from trip_rt.command_line import fewest_and_most
from trip_rt.errors import InputError
from trip_rt.settings import Settings
from trip_rt.signals import stoppable

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from trip_rt.animate import main; sys.exit(main())"]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("bench", "tests/support"))


def out_folder(folder: Path) -> Path:
    for part in (clip_maker.CLIPS, clip_maker.NAMED, clip_maker.RESULTS):
        (folder / part).mkdir(parents=True)
    (folder / clip_maker.LOCK).touch()
    return folder


def work_of(bundle: Path, folder: Path, **changes) -> Work:
    work = Work(
        bundle=str(bundle),
        identity=identity_of(bundle),
        folder=str(folder),
        here=str(folder),
        profile="48x32-5f-b1",
        backend="onnxruntime",
        options=EngineOptions("cpu", 1),
        settings=Settings(num_inference_steps=2),
        fps=8.0,
    )
    return dataclasses.replace(work, **changes)


def results_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / clip_maker.RESULTS).to_pylist()


def engine_log(folder: Path) -> Counter:
    return Counter((folder / "engine.log").read_text().split())


# Clips


@pytest.mark.parametrize(("count", "size"), [(1, 1), (20, 1), (64, 4), (1000, 16), (100_000, 16), (1_000_000, 100)])
def test_groups(count, size):
    pool = batch.Pool(1, 2, cpus=1, gpu=False)
    assert batch.group_size([Piece("jsonl", "a", 0, 9, 1, count)], pool) == size
    assert batch.group_size([Piece("tar", "a", 0, count * 100_000, 1, 0)], pool) == size


def test_a_key_is_all_that_a_clip_is_made_of():
    work = Work("b", "id", "f", "h", "p", "auto", EngineOptions("cpu"), Settings(), 8.0)
    others = [
        dataclasses.replace(work, identity="other"),
        dataclasses.replace(work, profile="other"),
        dataclasses.replace(work, settings=Settings(guidance_scale=2.0)),
        dataclasses.replace(work, settings=Settings(size="96x64")),
        dataclasses.replace(work, fps=9.0),
    ]
    keys = [key_of(one, b"picture", PROMPT, 0) for one in (work, *others)]
    keys += [key_of(work, b"other", PROMPT, 0), key_of(work, b"picture", "b", 0), key_of(work, b"picture", PROMPT, 1)]
    assert len(set(keys)) == 9 and all(len(key) == 32 and int(key, 16) >= 0 for key in keys)
    elsewhere = dataclasses.replace(work, folder="g", here="i", bundle="c", options=EngineOptions("cpu", 2))
    assert key_of(elsewhere, b"picture", PROMPT, 0) == keys[0]


def test_clips_are_those_of_the_animator(tiny_bundle, tiny_animator, tmp_path):
    folder = out_folder(tmp_path / "out")
    (folder / "photo.png").write_bytes(picture())
    maker = ClipMaker(work_of(tiny_bundle, folder))
    asked = [
        Row("line 1", "photo.png", PROMPT, 5),
        Row("line 2", "photo.png", PROMPT, 5, "same.mp4", picture()),
        Row("line 3", "none.png", PROMPT, 5),
        Row("line 4", "photo.png", PROMPT, 5, error="line 4: wrong"),
        Row("line 5", "", PROMPT, 5, picture=b"no picture"),
    ]
    first, same, *failed = maker.made(asked)
    assert first.status == same.status == "completed" and first.key == same.key
    assert (first.frames, first.fps) == (5, 8.0) and first.seconds > 0 and same.seconds is None
    assert [one.status for one in failed] == ["failed"] * 3
    for one, place, words in zip(failed, (3, 4, 5), ("no such file", "wrong", "another kind of file"), strict=True):
        assert one.error.startswith(f"line {place}: ") and words in one.error
    tiny_animator(io.BytesIO(picture()), PROMPT, seed=5, num_inference_steps=2).save(tmp_path / "own.mp4")
    clip = folder / "clips" / f"{first.key}.mp4"
    assert clip.read_bytes() == (tmp_path / "own.mp4").read_bytes()
    assert (folder / "named" / "same.mp4").samefile(clip)
    assert os.listdir(folder / "clips") == [clip.name]
    maker.close()


@pytest.fixture
def sleeping(tmp_path):
    """A folder and a maker whose engine only sleeps."""
    write_batch(tmp_path, 1)
    out_folder(tmp_path)
    maker = ClipMaker(sleeping_work(tmp_path, 0))
    yield tmp_path, maker
    maker.close()


def test_what_is_there_is_not_made_again(sleeping):
    folder, maker = sleeping
    asked = [Row(f"line {i}", "photo.png", PROMPT, seed) for i, seed in enumerate([1, 2, 1])]
    assert [one.seconds is None for one in maker.made(asked)] == [False, False, True]
    assert [one.seconds for one in maker.made(asked)] == [None] * 3
    assert engine_log(folder) == {"1": 1, "2": 1}


def test_a_name_belongs_to_one_clip(sleeping):
    folder, maker = sleeping
    one, other = (Row(f"line {seed}", "photo.png", PROMPT, seed, "x/a.mp4") for seed in (1, 2))
    assert [result.status for result in maker.made([one, other, one])] == ["completed", "failed", "completed"]
    failed = maker.made([other])[0]
    assert failed.error == "line 2: x/a.mp4: found that name taken by another clip, expected a free one"
    assert len(os.listdir(folder / "clips")) == 2


def test_a_clip_that_took_processes_down_is_given_up(sleeping):
    folder, maker = sleeping
    row = Row("line 1", "photo.png", PROMPT, 1)
    key = key_of(maker._work, (folder / "photo.png").read_bytes(), PROMPT, 1)
    tries = folder / "clips" / f".{key}.tries"
    tries.write_bytes(b"...")
    (failed,) = maker.made([row])
    assert failed.error.startswith("line 1: found that 3 processes ended while they made it")
    assert not tries.exists() and maker.made([row])[0].status == "completed"
    tries.write_bytes(b".")
    (folder / "clips" / ".trip-1.part").touch()
    swept(folder / "clips")
    assert tries.exists()
    swept(folder / "clips", tries=True)
    assert os.listdir(folder / "clips") == [f"{key}.mp4"]


def test_two_processes_make_a_clip_once(sleeping):
    """The other process holds the clip's lock while it makes it; ours waits and finds it made."""
    folder, maker = sleeping
    row = Row("line 1", "photo.png", PROMPT, 1)
    other = (
        "import os, sys, time; from pathlib import Path; from ray_batch import sleeping_work;"
        "from trip_rt.cluster.clip_maker import ClipMaker; from trip_rt.cluster.rows import Row;"
        "maker = ClipMaker(sleeping_work(Path(sys.argv[1]), 1.5)); print(flush=True);"
        f"print(maker.made([Row('line 1', 'photo.png', {PROMPT!r}, 1)])[0].status)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", other, folder],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
    ) as process:
        process.stdout.readline()
        while not list((folder / "clips").glob(".*.tries")):
            time.sleep(0.01)
        assert maker.made([row])[0].seconds is None
        assert process.stdout.read() == "completed\n"
    assert engine_log(folder) == {"1": 1}


def test_another_bundle_on_another_machine(tiny_bundle, tmp_path):
    with pytest.raises(InputError, match="found another bundle than on the first machine"):
        ClipMaker(work_of(tiny_bundle, out_folder(tmp_path / "out"), identity="0" * 64))


# The command, without Ray


@pytest.fixture
def refused(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    json_lines(tmp_path / "a.jsonl", {"image": "a.png", "prompt": PROMPT})

    def run(*args) -> str:
        code = main([str(tiny_bundle), *args])
        out, err = capsys.readouterr()
        assert code == 2 and out == "" and err.count("\n") == 1
        return err

    return run


BATCH = ("--batch", "a.jsonl", "-o", "out", "--ray")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("--batch", "a.jsonl", "--ray"), "expected --batch FILE and -o DIR"),
        (("a.png", "words", *BATCH), "expected --batch FILE and -o DIR"),
        (("-o", "out", "--ray"), "expected --batch FILE and -o DIR"),
        ((*BATCH, "--live"), "found --live beside --ray"),
        ((*BATCH, "--then", "a"), "found --then beside --ray"),
        ((*BATCH, "--path", "0,0 1,1"), "found --path beside --ray"),
        ((*BATCH, "--contact-sheet", "a.png"), "found --contact-sheet beside --ray"),
        ((*BATCH, "--seconds", "3"), "found --seconds beside --ray"),
        ((*BATCH, "--seed", "-1"), "seed: found -1"),
        ((*BATCH, "--fps", "0"), "fps: found 0"),
        ((*BATCH, "--steps", "100000"), "found 100000"),
        ((*BATCH, "--frames", "2"), "num_frames: found 2"),
        ((*BATCH, "--size", "50x50"), "size: found 50x50"),
        ((*BATCH, "--profile", "none"), "profile: found 'none'"),
        ((*BATCH, "--backend", "tensorrt"), "backend: the bundle has engines for"),
        (("--batch", "none.jsonl", "-o", "out", "--ray"), "found no such file"),
        (("--batch", "a.jsonl", "-o", "a.jsonl", "--ray"), "expected a folder, or a free name in one"),
        (("--batch", "a.jsonl", "-o", "x/y", "--ray"), "expected a folder, or a free name in one"),
        (("--batch", "a.jsonl", "--ray-workers", "2"), "found --ray-workers without --ray"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(refused, tmp_path, monkeypatch, args, error):
    monkeypatch.setattr(batch, "connected", None)
    assert error in refused(*args)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_without_ray(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "found no ray, pyarrow, expected what trip-rt[ray] brings; run pip install 'trip-rt[ray]'" in refused(*BATCH)


def test_two_runs_in_one_folder(refused, tmp_path):
    folder = out_folder(tmp_path / "out")
    hold = "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, 2, 1, 0); print(flush=True); input()"
    arguments = [sys.executable, "-c", hold, folder / clip_maker.LOCK]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert "found that another run writes there" in refused(*BATCH)
        process.communicate(b"\n")
    assert fcntl.LOCK_EX == 2


@pytest.mark.parametrize(("text", "workers"), [("3", (3, 3)), ("1:8", (1, 8))])
def test_workers(text, workers):
    assert fewest_and_most(text) == workers


@pytest.mark.parametrize("text", ["0", "", ":", "1:", "3:2", "-1", "a", "1:2:3", "999999"])
def test_workers_that_are_none(text):
    with pytest.raises(Exception, match="expected N or MIN:MAX"):
        fewest_and_most(text)


# On Ray


@pytest.fixture(scope="module")
def ray_address():
    """One Ray of this machine for the whole module, which this process has joined."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with stoppable():
            ray.init(
                num_cpus=2,
                object_store_memory=100 << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


def run_rows(file: Path, work: Work, workers: tuple[int, int] = (1, 2)) -> Counter:
    """The counts of a run on the Ray that is joined, in the folder of `work`."""
    folder = Path(work.folder)
    with batch.output_folder(folder), batch.quiet():
        parts = batch.ResultParts(folder / clip_maker.RESULTS)
        counts = batch.make_clips(pieces_of(file), work, batch.Pool(*workers, cpus=1, gpu=False), 0, parts)
        swept(folder / clip_maker.CLIPS)
    return counts


def test_the_command_on_ray(ray_address, tiny_bundle, tiny_animator, tmp_path):
    (tmp_path / "photo.png").write_bytes(picture())
    asked = [{"image": "photo.png", "prompt": PROMPT, "seed": seed} for seed in (1, 1, 2)]
    json_lines(tmp_path / "a.jsonl", *asked, {"image": "none.png", "prompt": PROMPT}, "{")
    arguments = [tiny_bundle, "--batch", "a.jsonl", "-o", "out", "--steps", "2", "--json", "--ray", ray_address]
    ran = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    figures = json.loads(ran.stdout)
    assert [figures[name] for name in ("rows", "made", "there", "failed")] == [5, 2, 1, 2]
    assert "Traceback" not in ran.stderr
    results = results_of(tmp_path / "out")
    assert sorted(one["seed"] for one in results if one["status"] == "completed") == [1, 1, 2]
    columns = ("key", "image", "prompt", "seed", "output", "status", "error", "frames", "fps", "seconds")
    assert tuple(results[0]) == columns
    errors = sorted(one["error"] for one in results if one["status"] == "failed")
    assert [error[:15] for error in errors] == ["a.jsonl, line 4", "a.jsonl, line 5"]
    keys = {one["seed"]: one["key"] for one in results if one["status"] == "completed"}
    assert sorted(os.listdir(tmp_path / "out" / "clips")) == sorted(f"{key}.mp4" for key in keys.values())
    for seed, key in keys.items():
        tiny_animator(tmp_path / "photo.png", PROMPT, seed=seed, num_inference_steps=2).save(tmp_path / "own.mp4")
        assert (tmp_path / "out" / "clips" / f"{key}.mp4").read_bytes() == (tmp_path / "own.mp4").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_driver_that_ends_early(ray_address, tmp_path, number, code):
    """After kill -9 and after Ctrl-C a second run makes what the first did not, and nothing else."""
    count, script = 60, [sys.executable, ROOT / "bench" / "ray_batch.py", tmp_path]
    options = ["--rows", str(count), "--sleep", "0.15", "--ray", ray_address]
    with subprocess.Popen([*script, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while len(list((tmp_path / "clips").glob("*.mp4"))) < 10:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode == code
    done = {path.name for path in (tmp_path / "clips").glob("*.mp4")}
    assert 10 <= len(done) < count
    counts = run_rows(tmp_path / "rows.jsonl", sleeping_work(tmp_path, 0.0))
    assert counts["failed"] == 0 and counts["made"] + counts["there"] == count and counts["there"] >= len(done)
    log = engine_log(tmp_path)
    # The two processes may have been killed between their engine's work and the clip's file.
    assert len(log) == count and sum(log.values()) <= count + 2
    assert len(os.listdir(tmp_path / "clips")) == count == len(results_of(tmp_path))


def test_a_row_that_kills_its_process_is_a_failed_row(ray_address, tmp_path):
    write_batch(tmp_path, 1)
    asked = [{"image": "photo.png", "prompt": "die" if seed == 2 else PROMPT, "seed": seed} for seed in range(4)]
    counts = run_rows(json_lines(tmp_path / "a.jsonl", *asked), sleeping_work(tmp_path, 0.0), (1, 1))
    assert counts == dict(made=3, there=0, failed=1)
    (failed,) = (one for one in results_of(tmp_path) if one["status"] == "failed")
    assert failed["error"].startswith("a.jsonl, line 3: found that 3 processes ended while they made it")


@pytest.mark.slow
def test_ten_thousand_rows_take_no_memory(tmp_path):
    script = [sys.executable, ROOT / "bench" / "ray_batch.py", tmp_path, "--rows", "10000"]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    assert figures["made"] == figures["clips"] == len(engine_log(tmp_path)) == 10_000
    print(figures)
    memory = figures["driver_rss_mb_by_tenth"]
    assert memory[-1] - memory[4] < 10  # MB in 5 000 rows; the first part of the results loads libraries


@pytest.mark.slow
def test_machines_that_are_lost_cost_no_rows(tmp_path):
    """A process of its own, for it holds several nodes of a cluster."""
    script = [sys.executable, ROOT / "tests" / "support" / "lost_nodes.py", tmp_path, "500"]
    ran = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS})
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    print(figures)
    assert figures["killed"] == 10 and figures["counts"]["failed"] == 0
    results, log = results_of(tmp_path), engine_log(tmp_path)
    assert sorted(one["seed"] for one in results) == list(range(500)) and len(log) == 500
    assert len(os.listdir(tmp_path / "clips")) == 500
    # A machine may end between its engine's work and the clip's file: one clip of each of its processes.
    assert sum(log.values()) <= 500 + 2 * figures["killed"]
