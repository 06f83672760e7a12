"""Shards: everything once an epoch, resumed anywhere, and what damage costs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import time
from itertools import islice

import numpy as np
import pytest
from small_videos import numbers, write_video

from trip_reference.data.sample import BrokenClip, ClipFormat, Sample
from trip_reference.data.shard_files import read_shard
from trip_reference.data.shards import ShardSource, list_shards, write_shards
from trip_reference.training.command import main as train_main
from trip_rt.errors import InputError

CLIP = ClipFormat(2, 16, 16, fps=8, crop="centre", start="first")
PER_SHARD, SHARDS = 5, 4
TOTAL = PER_SHARD * SHARDS - 2


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Video k shows frames k, k + 1 … k + 5."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{k}.mp4", range(k, k + 6)).read_bytes() for k in range(TOTAL)]


@pytest.fixture(scope="module")
def folder(videos, tmp_path_factory):
    target = tmp_path_factory.mktemp("shards") / "train"
    assert (
        write_shards(((f"{k:04d}", video, f"clip {k}") for k, video in enumerate(videos)), target, PER_SHARD) == SHARDS
    )
    return target


@pytest.fixture
def copied(folder, tmp_path):
    for shard in folder.iterdir():
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    return tmp_path


def said(found):
    """Which clip, and the frame it starts at."""
    return str(found) if isinstance(found, BrokenClip) else (int(found.text.split()[1]), numbers(found.frames)[0])


def take(source, count, part=0, parts=1, seed=0, start=0):
    return [(position, said(found)) for position, found in islice(source.stream(part, parts, seed, start), count)]


def test_round_trip(folder):
    assert sorted(path.name for path in folder.iterdir()) == [f"shard-{k:06d}.tar" for k in range(SHARDS)]
    found = [sample for _, sample in islice(ShardSource(str(folder), CLIP, shuffle=100).stream(0, 1, 0), TOTAL)]
    assert all(isinstance(sample, Sample) for sample in found)
    assert sorted(map(said, found)) == [(k, k) for k in range(TOTAL)]
    assert all(numbers(sample.frames) == [said(sample)[1], said(sample)[1] + 1] for sample in found)
    assert all(sample.name.startswith("shard-00000") for sample in found)


def test_shards_of_other_making(tmp_path, videos):
    """Sentences in json, other endings, folders, members of no interest."""
    members = {
        "a/one.json": b'{"text": " clip 1 ", "size": 3}',
        "a/one.MP4": videos[1],
        "a/one.pyd": pickle.dumps(1),
        "notes": b"?",
        "a/two.txt": b"clip 2",
        "a/two.mov": videos[2],
    }
    write_tar(tmp_path / "x.tar", members)
    assert [text for _, text in sorted(take(ShardSource(str(tmp_path), CLIP), 2))] in (
        [(1, 1), (2, 2)],
        [(2, 2), (1, 1)],
    )


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.mark.parametrize("shuffle", [0, 3, 100])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_every_sample_once_an_epoch_over_all_parts(folder, shuffle, parts):
    source = ShardSource(str(folder), CLIP, shuffle)
    epochs = []
    for epoch in range(2):
        order = np.random.default_rng([5, epoch]).permutation(SHARDS)
        lengths = [
            sum(PER_SHARD if shard < SHARDS - 1 else PER_SHARD - 2 for shard in order[part::parts])
            for part in range(parts)
        ]
        epochs.append(lengths)
    for epoch in range(2):
        seen = []
        for part in range(parts):
            start = epochs[0][part] if epoch else 0
            found = take(source, epochs[epoch][part], part, parts, 5, start)
            assert [position for position, _ in found] == list(range(start + 1, start + 1 + len(found)))
            seen += [which for _, which in found]
        assert sorted(seen) == [(k, k) for k in range(TOTAL)]


def test_order_differs_between_epochs_seeds_and_parts(folder):
    source = ShardSource(str(folder), CLIP, shuffle=4)
    two = [which for _, which in take(source, 2 * TOTAL)]
    assert two[:TOTAL] != two[TOTAL:] and sorted(two[:TOTAL]) == sorted(two[TOTAL:])
    assert two[:TOTAL] != [which for _, which in take(source, TOTAL, seed=1)]
    assert two == [which for _, which in take(ShardSource(str(folder), CLIP, shuffle=4), 2 * TOTAL)]


@pytest.mark.parametrize("shuffle, parts", [(0, 1), (4, 1), (7, 2), (100, 3)])
def test_resuming_anywhere_changes_nothing(copied, shuffle, parts):
    """Also across broken samples and a broken shard; random starts and crops included."""
    damaged = copied / "shard-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-9000])
    clip = ClipFormat(2, 8, 12, fps=8)

    def exact(start, count):
        stream = ShardSource(str(copied), clip, shuffle).stream(parts - 1, parts, 3, start)
        return [
            (at, str(found) if isinstance(found, BrokenClip) else (found.text, found.frames.tobytes()))
            for at, found in islice(stream, count)
        ]

    count = 2 * TOTAL // parts + 7
    whole = exact(0, count)
    assert any(isinstance(found, str) for _, found in whole)
    for start in range(0, count, 1 if parts > 1 else 5):
        assert exact(start, count - start) == whole[start:]


def test_skipping_epochs_reads_headers_alone(folder, monkeypatch):
    from trip_reference.data import shards

    source, reads = ShardSource(str(folder), CLIP), []
    monkeypatch.setattr(
        shards,
        "read_shard",
        lambda shard, clip, contents=True: reads.append(contents) or read_shard(shard, clip, contents),
    )
    take(source, 1, start=5 * TOTAL)
    assert reads.count(False) == SHARDS and reads.count(True) == SHARDS


def test_random_starts_follow_from_the_place(folder):
    source = ShardSource(str(folder), ClipFormat(2, 16, 16, fps=8), shuffle=0)
    starts = {first - k for _, (k, first) in take(source, 3 * TOTAL)}
    assert starts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "damage", ["cut in a member", "cut after a member", "garbled header", "empty", "words", "gzip", "nothing in it"]
)
def test_damaged_tars_cost_their_remainder(copied, damage):
    shard = copied / "shard-000002.tar"
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4]  # the third sample's video
    match damage:
        case "cut in a member":
            shard.write_bytes(data[: third.offset_data + 100])
        case "cut after a member":
            shard.write_bytes(data[: third.offset])
        case "garbled header":
            shard.write_bytes(data[: third.offset] + b"x" * 512 + data[third.offset + 512 :])
        case "empty":
            shard.write_bytes(b"")
        case "words":
            shard.write_bytes(b"not a tar " * 200)
        case "gzip":
            shard.write_bytes(gzip.compress(data))
        case "nothing in it":
            write_tar(shard, {})
    # A sample is whole when the next one begins, so damage between two of them costs both.
    left = {"cut in a member": 2, "cut after a member": 1, "garbled header": 1}.get(damage, 0)
    count = TOTAL - PER_SHARD + left + 1
    found = [which for _, which in take(ShardSource(str(copied), CLIP, shuffle=0), count)]
    broken = [which for which in found if isinstance(which, str)]
    assert (
        len(broken) == 1
        and broken[0].startswith("shard-000002.tar: found")
        and "expected" in broken[0]
        and broken[0].isprintable()
    )
    lost = set(range(10 + left, 15))
    assert sorted(which for which in found if not isinstance(which, str)) == [
        (k, k) for k in range(TOTAL) if k not in lost
    ]
    lengths = [sum(1 for _ in read_shard(str(shard), CLIP, contents)) for contents in (True, False)]
    assert lengths == [left + 1, left + 1]


@pytest.mark.parametrize(
    "members, words",
    [
        ({"a.txt": b"clip 1"}, "found no video"),
        ({"a.mp4": b"?"}, "found no sentence"),
        ({"a.mp4": b"?", "a.txt": b"\xff"}, "found no sentence"),
        ({"a.mp4": b"?", "a.txt": b" "}, "empty sentence"),
        ({"a.mp4": b"?", "a.json": b"{"}, "found no sentence"),
        ({"a.mp4": b"?", "a.json": b"[]"}, "found no sentence"),
        ({"a.mp4": b"?", "a.json": b'{"text": 3}'}, "empty sentence"),
        ({"a.mp4": b"?", "a.json": b"[" * 100_000}, "found no sentence"),
        ({"a.mp4": b"?", "a.json": b'{"text": "\\ud800"}'}, "half of a surrogate pair"),
        ({"a.mp4": b"?", "a.txt": b"clip 1"}, "damaged or unsupported"),
        ({"a.mp4": b"", "a.txt": b"clip 1"}, "empty file"),
        ({"a.mp4": bytes(3 * 2**20), "a.txt": b"clip 1"}, "3.0 MiB, expected at most 2.0 MiB"),
        ({"a.mp4": b"?", "a.txt": bytes(3 * 2**20)}, "3.0 MiB, expected at most 1.0 MiB"),
    ],
)
def test_broken_samples_cost_themselves(tmp_path, videos, members, words):
    write_tar(tmp_path / "x.tar", members | {"b.mp4": videos[3], "b.txt": b"clip 3"})
    clip = ClipFormat(2, 16, 16, fps=8, start="first", max_bytes=2**21)
    found = dict(take(ShardSource(str(tmp_path), clip, shuffle=0), 2))
    assert words in found[1] and found[1].startswith("x.tar: a: found") and found[2] == (3, 3)


def test_patterns(folder):
    whole = [str(folder / f"shard-{k:06d}.tar") for k in range(SHARDS)]
    assert (
        list_shards(str(folder))
        == list_shards(f"{folder}/shard-{{000000..000003}}.tar")
        == list_shards(f"{folder}/*.tar")
        == whole
    )
    assert list_shards(f"{folder}/shard-00000{{1,3}}.tar") == [whole[1], whole[3]]
    for pattern, words in [
        (f"{folder}/none.tar", "found no file"),
        (f"{folder}/{{1..2.tar", "brace"),
        (str(folder.parent), r"found no \*\.tar"),
    ]:
        with pytest.raises(InputError, match=words):
            list_shards(pattern)


def test_shards_out_of_a_pipe(folder):
    piped = f"pipe:cat {folder}/shard-{{000000..000003}}.tar"
    assert take(ShardSource(piped, CLIP, remote=True), TOTAL + 3) == take(ShardSource(str(folder), CLIP), TOTAL + 3)
    assert take(ShardSource(piped, CLIP, remote=True), 3, start=TOTAL + 5) == take(
        ShardSource(str(folder), CLIP), 3, start=TOTAL + 5
    )
    (failed,) = (found for _, found in take(ShardSource("pipe:false", CLIP, remote=True), 1))
    assert "damaged tar" in failed


@pytest.mark.parametrize(
    "source", ["pipe:touch {mark}; cat /dev/null #.tar", "https://example.invalid/a.tar", "gs://a/b.tar"]
)
def test_no_recipe_fetches_or_runs_anything_by_itself(source, tmp_path, capsys):
    """The commands that webdataset would run are not even started."""
    mark = tmp_path / "ran"
    (tmp_path / "evil.toml").write_text(
        f"data.source = {json.dumps(source.format(mark=mark))}\ndata.cache = false\nvae.steps = 0\n"
    )
    assert train_main([str(tmp_path / "evil.toml"), "-o", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected local shards; pass --allow-remote if you trust it" in error
    assert not mark.exists()


def test_too_many_parts(folder):
    with pytest.raises(InputError, match="found 4, expected at least one for each of 5"):
        ShardSource(str(folder), CLIP).stream(0, 5, 0)


def test_writing_is_whole_or_not_at_all(tmp_path, videos):
    def interrupted():
        yield from [("a", videos[0], "clip 0"), ("b", videos[1], "clip 1")]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "x", 1)
    with pytest.raises(InputError, match="no samples"):
        write_shards([], tmp_path / "x")
    with pytest.raises(InputError, match="per-shard"):
        write_shards([("a", videos[0], "clip 0")], tmp_path / "x", 0)
    with pytest.raises(ValueError, match="without a dot"):
        write_shards([("a.b", videos[0], "clip 0")], tmp_path / "x")
    assert not any(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    assert write_shards([("a", videos[0], "clip 0")], tmp_path / "x") == 1
    before = (tmp_path / "x/shard-000000.tar").read_bytes()
    with pytest.raises(InputError, match="new or an empty folder"):
        write_shards([("a", videos[1], "clip 1")], tmp_path / "x")
    assert (tmp_path / "x/shard-000000.tar").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999}.tar",
        "{0..999}{0..999}.tar",
        "{a..z}{a..z}{a..z}{a..z}.tar",
        "{{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b},x}{0..9}{0..9}{0..9}.tar",
        "{0..9}" * 200,
    ],
)
def test_a_pattern_of_endless_names_is_refused_before_they_are_made(tmp_path, pattern):
    began = time.monotonic()
    with pytest.raises(InputError, match="found a pattern of too many names"):
        list_shards(f"{tmp_path}/{pattern}")
    assert time.monotonic() - began < 1


def test_a_pattern_cannot_have_the_whole_disk_searched(tmp_path):
    with pytest.raises(InputError, match="found wildcards in more than 2 parts of the path"):
        list_shards("/*/*/*/*/*.tar")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.tar").touch()
    assert list_shards(f"{tmp_path}/*/b/*.tar") == [str(tmp_path / "a" / "b" / "c.tar")]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/pipe.tar"])
def test_a_shard_that_is_no_plain_file_is_not_opened(tmp_path, pattern):
    os.mkfifo(tmp_path / "pipe.tar")  # to open it would wait for somebody to write to it
    with pytest.raises(InputError, match=r"found no file .*pipe.tar, or no plain one"):
        list_shards(f"{tmp_path}{pattern}")


@pytest.mark.parametrize("name", ["\0/*.tar", "\ud800/*.tar"])
def test_a_pattern_that_is_no_name_is_refused(name):
    with pytest.raises(InputError, match=r"found (a null byte|half of a surrogate pair)"):
        list_shards(name)


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text):
    data = text.encode()
    return header("pax", len(data), tarfile.XHDTYPE) + data.ljust(512, b"\0")


END = bytes(1024)


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (header("long", 2**33, tarfile.GNUTYPE_LONGNAME), "an extended header of 8589934592 bytes"),
        (header("pax", 2**40, tarfile.XHDTYPE), "an extended header of 1099511627776 bytes"),
        (header("a.mp4", -512), "damaged tar"),
        (pax("17 size=-100000\n") + header("a.mp4", 0), "damaged tar"),  # would lead back to the beginning, for ever
        (b"".join(header("x", 0, tarfile.GNUTYPE_LONGNAME) for _ in range(3000)), "damaged tar"),
    ],
)
def test_headers_that_would_take_memory_or_never_end_are_damage(tmp_path, tar, message):
    path = tmp_path / "a.tar"
    path.write_bytes(tar + END)
    *_, broken = islice(read_shard(str(path), CLIP), 10)
    assert isinstance(broken, BrokenClip) and message in str(broken)


def test_sparse_members_are_not_unfolded(tmp_path):
    """A few bytes may stand for gigabytes of zeros."""
    fields = {"major": "1", "minor": "0", "name": "a.mp4", "realsize": "999"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.mp4")
        info.size, info.pax_headers = 512, {f"GNU.sparse.{name}": value for name, value in fields.items()}
        archive.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))
    (sample,) = read_shard(str(tmp_path / "a.tar"), CLIP)
    with pytest.raises(BrokenClip, match=r"found a sparse \.mp4, expected a plain one"):
        _ = sample.video


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 100_000_000}, "num_frames: found 100000000, expected 1 to 4096"),
        ({"height": 2**31}, "height: found 2147483648, expected 1 to 8192"),
        ({"num_frames": 4096, "height": 4096, "width": 4096}, "clips of 4096 frames of 4096x4096, 192.0 GiB, expected"),
        ({"stride": 2**40}, "stride: found 1099511627776"),
        ({"fps": float("nan")}, "fps: found nan"),
    ],
)
def test_a_clip_that_memory_cannot_hold_is_not_asked_of_videos(fields, message):
    with pytest.raises(InputError, match=message):
        ClipFormat(**({"num_frames": 2, "height": 16, "width": 16} | fields))
