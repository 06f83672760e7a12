"""trip-data and the demo world as data: what is written is read back, what is broken is reported."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from small_videos import write_video

from trip_reference.data.check import NAMED, check_folder
from trip_reference.data.command import main
from trip_reference.data.folder import VideoFolder
from trip_reference.data.sample import ClipFormat
from trip_reference.data.shards import ShardSource
from trip_reference.demo_world import world
from trip_reference.demo_world.clips import DemoWorldClips, write_demo_folder
from trip_reference.presets import DEMO
from trip_rt.errors import EngineError, InputError

CLIP = ClipFormat(4, 32, 32, start="first", crop="centre")


def write_annotations(folder, entries, name="annotations.json"):
    (folder / name).write_text(json.dumps([{"video_path": path, "text": text} for path, text in entries]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "clips"
    assert main(["demo", str(folder), "--clips", "3", "--val-clips", "2", "--size", "32", "--frames", "4"]) == 0
    return folder


@pytest.fixture
def copied(demo, tmp_path):
    return shutil.copytree(demo, tmp_path / "data")


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """Two good videos, one of them under two sentences, two broken ones, and one that is listed nowhere."""
    folder = tmp_path_factory.mktemp("flawed")
    (folder / "videos").mkdir()
    write_video(folder / "videos/a.mp4", range(9))
    write_video(folder / "videos/b.mp4", range(5), fps=4)
    write_video(folder / "videos/spare.webm", range(3), codec="libvpx")
    (folder / "videos/empty.mp4").touch()
    entries = [
        ("videos/a.mp4", "it gets brighter"),
        ("videos/b.mp4", "a b c d e"),
        ("./videos/a.mp4", "a b c d e"),
        ("videos/empty.mp4", "x"),
        ("no.mp4", "y"),
    ]
    write_annotations(folder, entries)
    write_annotations(folder, [("videos/b.mp4", "b")], "val_annotations.json")
    return folder


def test_demo_world_clips():
    config = dataclasses.replace(DEMO.trip, num_frames=3, height=32, width=32)
    clips = DemoWorldClips(config, 5, first_seed=7, held_out=True)
    scene, motion, _ = world.sample(9, held_out=True)
    samples = [clips.clip(2, np.random.default_rng(seed)) for seed in range(12)]
    assert len(clips) == 5 and all((sample.frames == world.render(scene, motion, 3, 32)).all() for sample in samples)
    assert len({sample.text for sample in samples}) > 1 and all(scene.colour in sample.text for sample in samples)
    assert clips.clip(2, np.random.default_rng(3)).text == samples[3].text
    with pytest.raises(IndexError):
        clips.clip(5, np.random.default_rng(0))
    with pytest.raises(InputError, match="expected a square"):
        DemoWorldClips(dataclasses.replace(config, width=64), 5)


def test_demo_folder(demo):
    for name, count, held_out in (("annotations.json", 3, False), ("val_annotations.json", 2, True)):
        clips = VideoFolder(demo, CLIP, name)
        assert len(clips) == count
        for seed in range(count):
            scene, motion, text = world.sample(seed, held_out)
            sample = clips.clip(seed, np.random.default_rng(0))
            assert sample.text == text
            assert np.abs(sample.frames.astype(float) - world.render(scene, motion, 4, 32)).mean() < 4
    assert (
        len(list((demo / "videos").iterdir())) == 5
        and len(list(demo.iterdir())) == 3
        and len(list(demo.parent.iterdir())) == 1
    )


def test_demo_folder_is_whole_or_not_at_all(tmp_path, monkeypatch):
    from trip_reference.demo_world import clips

    calls = []

    def interrupted(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clips, "save", interrupted)
        write_demo_folder(tmp_path / "x", 4, 0, 32, 2)
    assert not any(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(clips, "save", interrupted)
        assert main(["demo", str(tmp_path / "x"), "--shards"]) == 130
    assert not any(tmp_path.iterdir())
    write_demo_folder(tmp_path / "x", 1, 0, 32, 2)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["annotations.json", "videos"]
    with pytest.raises(InputError, match="new or an empty folder"):
        write_demo_folder(tmp_path / "x", 1, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_report_on_a_folder(flawed, workers):
    figures = check_folder(flawed, CLIP, workers)
    train, val = figures["train"], figures["val"]
    assert (train["videos"], train["captions"], train["duplicate_captions"], train["broken"]["count"]) == (4, 5, 1, 2)
    assert re.search(r"empty\.mp4: found an empty file", train["broken"]["first"][0])
    assert re.search(r"no\.mp4: found no such file", train["broken"]["first"][1])
    assert train["bytes"] == sum((flawed / "videos" / name).stat().st_size for name in ("a.mp4", "b.mp4"))
    assert train["seconds"] == {"min": 1.0, "median": 1.0, "p95": 1.0, "max": 1.0, "total": 2.0}
    assert (train["short"], val["short"], train["vocabulary"]) == (0, 0, None)
    assert train["resolutions"] == {"64x64": 2} and train["fps"] == {"8": 1, "4": 1}
    assert train["caption_words"] == {"min": 1.0, "median": 3.0, "p95": 5.0, "max": 5.0}
    assert (val["videos"], val["broken"]["count"]) == (1, 0)
    assert figures["unused_videos"] == {"count": 1, "first": ["videos/spare.webm"]}


def test_videos_shorter_than_a_clip_are_counted(flawed, capsys):
    """Both have a second, which is the five frames at four a second from first to last, and not six."""
    shape = ["--size", "32x32", "--workers", "0"]
    for frames, short in ((5, 0), (6, 2)):
        assert check_folder(flawed, ClipFormat(frames, 32, 32), 0)["train"]["short"] == short
        assert main(["check", str(flawed), "--frames", str(frames), *shape]) == 1
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        assert [rest for name, rest in (line for line in lines if len(line) == 2) if name == "short"] == [
            "2, padded with their last frame" if short else "none",
            "1, padded with their last frame" if short else "none",
        ]


def test_long_lists_are_cut(tmp_path):
    write_annotations(tmp_path, [(f"{k}.mp4", "a") for k in range(NAMED + 3)])
    broken = check_folder(tmp_path, CLIP, 0)["train"]["broken"]
    assert broken["count"] == NAMED + 3 and len(broken["first"]) == NAMED


def _die(path, clip):
    os._exit(1)


def test_a_decoder_that_dies_is_reported(demo, monkeypatch):
    from trip_reference.data import check

    monkeypatch.setattr(check, "_find_in_video", _die)
    with pytest.raises(EngineError, match="was killed"):
        check_folder(demo, CLIP, 1)


def test_check_command(demo, flawed, capsys):
    shape = ["--frames", "4", "--size", "32x32", "--workers", "0"]
    assert main(["check", str(demo), *shape]) == 0
    assert "nothing broken" in capsys.readouterr().out
    assert main(["check", str(flawed), *shape]) == 1
    text = capsys.readouterr().out
    assert "2 broken" in text and "spare.webm" in text and "empty.mp4" in text
    assert main(["check", str(flawed), *shape, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == check_folder(
        flawed, dataclasses.replace(CLIP, start="random", crop="random"), 0
    )


def test_pack_and_check_shards(copied, tmp_path, capsys):
    assert main(["pack", str(copied), "-o", str(tmp_path / "shards"), "--per-shard", "2"]) == 0
    assert "2 shards" in capsys.readouterr().out
    assert main(["pack", str(copied), "-o", str(tmp_path / "shards/val"), "--annotations", "val_annotations.json"]) == 0
    folder = VideoFolder(copied, CLIP)
    stream = ShardSource(str(tmp_path / "shards"), CLIP).stream(0, 1, 0)
    found = sorted((sample.text, sample.frames.tobytes()) for _, (_, sample) in zip(range(3), stream, strict=False))
    clips = [folder.clip(k, np.random.default_rng(0)) for k in range(3)]
    assert found == sorted((clip.text, clip.frames.tobytes()) for clip in clips)

    of_shards, of_folder = check_folder(tmp_path / "shards", CLIP, 0), check_folder(copied, CLIP, 0)
    assert (
        of_shards["train"] == of_folder["train"]
        and of_shards["val"] == of_folder["val"]
        and of_shards["kind"] == "shards"
    )
    shard = tmp_path / "shards/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    assert main(["check", str(tmp_path / "shards"), "--workers", "1"]) == 1
    assert "shard-000000.tar: found a damaged tar" in capsys.readouterr().out


def test_demo_as_shards(tmp_path, demo):
    assert (
        main(
            [
                "demo",
                str(tmp_path / "x"),
                "--clips",
                "3",
                "--val-clips",
                "2",
                "--size",
                "32",
                "--frames",
                "4",
                "--shards",
            ]
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["shard-000000.tar", "val"]
    assert check_folder(tmp_path / "x", CLIP, 0)["val"] == check_folder(demo, CLIP, 0)["val"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["check", "."], "found no such file"),
        (["check", "DEMO", "--frames", "0"], "num_frames: found 0"),
        (["check", "DEMO", "--frames", "100000000"], "num_frames: found 100000000, expected 1 to 4096"),
        (["check", "DEMO", "--fps", "-1"], "fps: found -1"),
        (["demo", "DEMO"], "found something there"),
        (["demo", "new", "--clips", "0"], "found 0 clips"),
        (["demo", "new", "--fps", "0"], "fps: found 0"),
        (["pack", "DEMO", "-o", "DEMO"], "found something there"),
        (["check", "DEMO", "--checkpoint", "nowhere"], "nowhere/model_index.json: found no such file"),
        (["pack", ".", "-o", "new"], "found no such file"),
        (["pack", "LOSS", "-o", "new"], "found no such file, which annotations.json names on line 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, words, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss").mkdir()
    write_annotations(tmp_path / "loss", [("gone.mp4", "a")])
    assert main([{"DEMO": str(demo), "LOSS": "loss"}.get(word, word) for word in argv]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trip-data")]
    assert len(error) == 1 and words in error[0] and "expected" in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["loss"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "COMMAND"),
        (["sing"], "sing"),
        (["check"], "DIR"),
        (["check", ".", "--size", "64"], "expected WIDTHxHEIGHT"),
        (["check", ".", "--workers", "-2"], "expected a number from 0 on"),
        (["pack", "."], "--output"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "demo", "pack"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and f"example: trip-data {command}" in " ".join(capsys.readouterr().out.split())
