"""trip-animate --ray: rows of strangers' files, clips by their content, and a pool that outlives its processes."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray_batch import sleeping_work, write_batch

from trip_rt.animate import main
from trip_rt.backends import EngineOptions
from trip_rt.cluster import batch, clip_maker, rows
from trip_rt.cluster.clip_maker import ClipMaker, Work, identity_of, key_of, swept
from trip_rt.cluster.rows import Piece, Row, dealt, pieces_of, read_rows, together
from trip_rt.command_line import fewest_and_most
from trip_rt.errors import InputError
from trip_rt.process_memory import forget_peak, give_back_memory, peak_memory_mb
from trip_rt.settings import Settings
from trip_rt.signals import stoppable

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red ball rolls to the right"
COMMAND = [sys.executable, "-c", "import sys; from trip_rt.animate import main; sys.exit(main())"]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("bench", "tests/support"))


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def read(path: Path, seed: int = 7) -> list[Row]:
    return [row for piece in pieces_of(path) for row in read_rows(piece, seed)]


def json_lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries), encoding="utf-8")
    return path


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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


# Rows


def test_json_lines(tmp_path):
    path = json_lines(
        tmp_path / "a.jsonl",
        {"image": "a.png", "prompt": PROMPT},
        "",
        {"image": "b.png", "prompt": PROMPT, "seed": 2**64 - 1, "output": "x/b.mp4"},
    )
    assert read(path) == [
        Row("a.jsonl, line 1", "a.png", PROMPT, 7),
        Row("a.jsonl, line 3", "b.png", PROMPT, 2**64 - 1, "x/b.mp4"),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "found no JSON"),
        ("[" * 100_000, "found no JSON"),
        ("[1]", "found a JSON list, expected an object"),
        ('{"image": "a", "prompt": "b", "sead": 1}', "found the unknown key 'sead'"),
        ('{"image": "a"}', "found no prompt"),
        ('{"prompt": "a"}', "found no image"),
        ('{"image": 1, "prompt": "a"}', "image: found 1, expected text"),
        ('{"image": "", "prompt": "a"}', "image: found an empty one"),
        ('{"image": "a", "prompt": " "}', "prompt: found an empty one"),
        ('{"image": "a", "prompt": "\\ud800"}', "undecodable"),
        ('{"image": "a", "prompt": "b", "seed": -1}', "seed: found -1"),
        ('{"image": "a", "prompt": "b", "seed": 1.5}', "seed: found 1.5"),
        ('{"image": "a", "prompt": "b", "seed": NaN}', "seed: found nan"),
        ('{"image": "a", "prompt": "b", "seed": true}', "seed: found True"),
        (f'{{"image": "a", "prompt": "{"b" * (1 << 20)}"}}', "bytes, expected one object a line"),
    ],
)
def test_a_wrong_line_is_a_failed_row(tmp_path, line, error):
    first, second = read(json_lines(tmp_path / "a.jsonl", line, {"image": "a.png", "prompt": PROMPT}))
    assert first.error.startswith("a.jsonl, line 1: ") and error in first.error and len(first.error) < 1000
    assert second == Row("a.jsonl, line 2", "a.png", PROMPT, 7)


@pytest.mark.parametrize("name", ["a.mp4", "x/y/a b.mp4", "ä.mp4"])
def test_outputs(name):
    rows.check_output(name)


@pytest.mark.parametrize(
    "name",
    [
        *("../a.mp4", "/a.mp4", "x/../../a.mp4", "./a.mp4", "x//a.mp4", "/", "x\\a.mp4", "a\0.mp4", "a\n.mp4"),
        *(".a.mp4", ".mp4", "a.gif", "a", "a" * 252 + ".mp4", "x/" * 8 + "a.mp4"),
    ],
)
def test_outputs_that_leave_the_folder_or_are_no_names(name):
    with pytest.raises(InputError, match=r"output: found .*, expected a relative name"):
        rows.check_output(name)


def test_pieces_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_SCAN", 100)
    lines = [{"image": "a" * (i % 50), "prompt": PROMPT, "seed": i} for i in range(1, 200)]
    path = json_lines(tmp_path / "a.jsonl", *lines)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    pieces = pieces_of(path)
    assert len(pieces) > 20 and sum(piece.rows for piece in pieces) == 199
    found = [row for piece in pieces for row in read_rows(piece, 0)]
    assert [row.where for row in found] == [f"a.jsonl, line {i}" for i in range(1, 200)]
    assert [row.seed or 50 * (i // 50) for i, row in enumerate(found, 1)] == list(range(1, 200))
    shares = dealt(pieces * 30)
    assert len(shares) == 256 and [piece for share in shares for piece in share] == pieces * 30
    assert dealt([]) == [] and pieces_of(json_lines(tmp_path / "empty.jsonl")) == []


def test_rows_are_handed_on_by_number_and_size(monkeypatch):
    monkeypatch.setattr(rows, "MOST_TOGETHER", 10)
    plain, large = Row("a"), Row("b", picture=b"x" * 11)
    assert list(together(iter([plain] * 5 + [large] * 2), 3)) == [[plain] * 3, [plain, plain, large], [large]]
    words = Row("c", "x" * 6, "x" * 5)
    assert list(together(iter([words] * 2), 3)) == [[words], [words]]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (20, 1), (64, 4), (1000, 16), (100_000, 16), (1_000_000, 100)])
def test_groups(count, size):
    pool = batch.Pool(1, 2, cpus=1, gpu=False)
    assert batch.group_size([Piece("jsonl", "a", 0, 9, 1, count)], pool) == size
    assert batch.group_size([Piece("tar", "a", 0, count * 100_000, 1, 0)], pool) == size


def test_parquet(tmp_path):
    table = {"image": ["a.png", None, "c.png"], "prompt": [PROMPT, PROMPT, None], "seed": [1, 2, None], "more": [0] * 3}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=2)
    assert len(pieces_of(tmp_path / "a.parquet")) == 2
    first, second, third = read(tmp_path / "a.parquet")
    assert first == Row("a.parquet, row 1", "a.png", PROMPT, 1)
    assert second.error == "a.parquet, row 2: found no image, expected one"
    assert third.error == "a.parquet, row 3: found no prompt, expected one"


def test_parquet_with_pictures_in_a_folder(tmp_path):
    for name in "ab":
        pq.write_table(pa.table({"image": [picture()], "prompt": [PROMPT]}), tmp_path / f"{name}.parquet")
    where = [f"{name}.parquet, row 1" for name in "ab"]
    assert read(tmp_path) == [Row(place, place, PROMPT, 7, picture=picture()) for place in where]


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"prompt": ["a"]}, "found no column image"),
        ({"image": ["a"]}, "found no column prompt"),
        ({"image": [{"bytes": b""}], "prompt": ["a"]}, r"image: found struct<.*>, expected text"),
        ({"image": ["a"], "prompt": [1]}, "prompt: found int64, expected text"),
        ({"image": ["a"], "prompt": ["a"], "seed": [1.0]}, "seed: found double, expected whole numbers"),
    ],
)
def test_parquet_of_other_columns(tmp_path, columns, error):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=error):
        pieces_of(tmp_path / "a.parquet")


def test_parquet_of_rays_objects_is_not_unpickled(tmp_path):
    """Ray registers a type whose values are pickles."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    table = pa.table({"image": ArrowPythonObjectArray.from_objects([Boom()]), "prompt": ["a"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"image: found .*, expected text"):
        pieces_of(tmp_path / "a.parquet")
    (row,) = read_rows(Piece("parquet", str(tmp_path / "a.parquet"), 0, 1, 1, 1), 0)
    assert row.error and not (tmp_path / "boom").exists()


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_damaged_parquet(tmp_path, keep):
    pq.write_table(pa.table({"image": ["a"], "prompt": ["a"]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:keep])
    with pytest.raises(InputError, match="found a damaged file"):
        pieces_of(tmp_path / "a.parquet")
    (row,) = read_rows(Piece("parquet", str(tmp_path / "a.parquet"), 0, 1, 1, 1), 0)
    assert "found a damaged file" in row.error


def test_parquet_whose_pages_are_damaged(tmp_path):
    """Arrow raises OSError for it, and yet the file is there."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["a" * 500], "prompt": ["a"]}), path, compression="zstd", use_dictionary=False)
    data = path.read_bytes()
    at = data.index(b"\x28\xb5\x2f\xfd")
    path.write_bytes(data[:at] + bytes(4) + data[at + 4 :])
    (row,) = read(path)
    assert "found a damaged file" in row.error and row.error.endswith("expected a parquet file")


def test_parquet_of_two_columns_of_one_name(tmp_path):
    columns = [pa.array(["a"])] * 3
    pq.write_table(pa.Table.from_arrays(columns, ["image", "image", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="found 2 columns image, expected one of text"):
        pieces_of(tmp_path / "a.parquet")


def test_parquet_values_that_are_none_cost_their_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_PICTURE", 9)
    monkeypatch.setattr(rows, "MOST_LINE", 30)
    words = [PROMPT.encode(), b"\xff", b"x" * 31, PROMPT.encode(), PROMPT.encode()]
    offsets = np.cumsum([0, *map(len, words)], dtype=np.int32)
    prompts = pa.Array.from_buffers(pa.string(), 5, [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(words))])
    images = [b"x", b"x", b"x", b"x" * 10, b"y"]
    for index in (False, True):
        table = pa.table({"image": images, "prompt": prompts, "seed": pa.array([1] * 5).dictionary_encode()})
        if index:
            table = table.set_column(0, "image", table["image"].dictionary_encode())
        pq.write_table(table, tmp_path / "a.parquet")
        found = read(tmp_path / "a.parquet")
        assert [row.picture for row in found if not row.error] == [b"x", b"y"]
        assert [row.error for row in found if row.error] == [
            "a.parquet, row 2: prompt: found bytes that are not UTF-8, expected text",
            "a.parquet, row 3: prompt: found 31 bytes, expected at most 30",
            "a.parquet, row 4: image: found 10 bytes, expected at most 9",
        ]


def test_a_picture_of_many_parquet_rows_is_not_read_for_all_at_once(tmp_path):
    """3 KB, whose sixteen rows Arrow makes half a gigabyte of."""
    table = pa.table({"image": pa.array([bytes(32 << 20)] * 16), "prompt": [PROMPT] * 16})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
    del table
    give_back_memory()
    pa.default_memory_pool().release_unused()
    forget_peak()
    held = peak_memory_mb()
    (piece,) = pieces_of(tmp_path / "a.parquet")
    assert sum(len(row.picture) for row in read_rows(piece, 0)) == 16 * (32 << 20)
    assert peak_memory_mb() - held < 300


def test_row_groups_are_read_by_few_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_PIECES", 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["a"] * 13, "prompt": [PROMPT] * 13}), path, row_group_size=2)
    pieces = pieces_of(path)
    assert [(piece.start, piece.stop, piece.first, piece.rows) for piece in pieces] == [
        (0, 2, 1, 4),
        (2, 4, 5, 4),
        (4, 7, 9, 5),
    ]
    assert [row.where for row in read(path)] == [f"a.parquet, row {i}" for i in range(1, 14)]
    *_, last = read_rows(dataclasses.replace(pieces[0], rows=5), 0)
    assert "found a damaged file (4 rows where there should be 5)" in last.error
    monkeypatch.setattr(rows, "MOST_ROWS", 12)
    with pytest.raises(InputError, match="found impossible numbers of rows"):
        pieces_of(path)


def test_a_message_is_one_line_whatever_the_file_is_called(tmp_path):
    path = tmp_path / "a\nb.parquet"
    path.write_bytes(b"PAR1" * 5)
    with pytest.raises(InputError, match="found a damaged file") as caught:
        pieces_of(path)
    assert str(caught.value).isprintable()
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    with pytest.raises(InputError, match="found no column image") as caught:
        pieces_of(path)
    assert str(caught.value).isprintable()


def test_a_file_that_another_machine_lacks():
    for kind in ("jsonl", "parquet", "tar"):
        (row,) = read_rows(Piece(kind, "/none/a", 0, 100, 1, 0), 0)
        assert row.error.startswith("/none/a: cannot be read (")


def test_shards(tmp_path):
    members = {
        "folder/1.png": picture(),
        "folder/1.json": json.dumps({"prompt": PROMPT, "seed": 3, "output": "a.mp4", "width": 5}).encode(),
        "2.txt": f"{PROMPT}\n".encode(),
        "2.jpg": b"x",
        "3.txt": b"no picture",
        "4.png": b"x",
        "5.json": b"[]",
        "6.cls": b"1",
        "../../7.png": b"x",
        "../../7.txt": b"words",
    }
    found = read(shard(tmp_path / "s.tar", members))
    assert found[:2] == [
        Row("s.tar, folder/1", "folder/1.png", PROMPT, 3, "a.mp4", picture()),
        Row("s.tar, 2", "2.jpg", PROMPT, 7, "", b"x"),
    ]
    assert [row.error.split(": ", 1)[1].split(",")[0] for row in found[2:5]] == [
        "found no image",
        "found no prompt",
        "found a JSON list",
    ]
    assert found[5] == Row("s.tar, ../../7", "../../7.png", "words", 7, "", b"x") and len(found) == 6


def test_damaged_and_hostile_shards(tmp_path):
    path = shard(tmp_path / "s.tar", {"1.png": b"x" * 2000, "1.txt": b"a", "2.png": b"x" * 2000})
    data = path.read_bytes()
    path.write_bytes(data[:5000])
    assert "found a damaged file" in read(path)[-1].error
    path.write_bytes(b"x" * 2000)
    assert "found a damaged file" in read(path)[-1].error
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40  # a header that claims to be a terabyte
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "found a damaged file" in read(path)[-1].error
    large = tarfile.TarInfo("1.png")
    large.size = rows.MOST_PICTURE + 1
    with path.open("wb") as file:
        file.write(large.tobuf())
        file.seek(large.size + 2 * 512, os.SEEK_CUR)
        file.write(bytes(1024))
    (row,) = read(path)
    assert row.error.startswith("s.tar, 1: 1.png: found more bytes than are read")


def header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The block of a member that says it has `size` bytes."""
    info = tarfile.TarInfo("x.png")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [-512, -1, -2048, -2560, 1 << 62])
def test_a_member_of_no_possible_size_ends_a_shard(tmp_path, size):
    """Python's reader goes back by a negative one, and so reads the same headers for ever."""
    path = shard(tmp_path / "s.tar", {"1.png": b"x", "1.txt": b"a"})
    path.write_bytes(path.read_bytes()[:2048] + header(size) + bytes(1024))
    (piece,) = pieces_of(path)
    *_, last = itertools.islice(read_rows(piece, 7), 9)
    assert f"found a damaged file (a member of {size} bytes)" in last.error


@pytest.mark.parametrize("rest", [b"x" * 512, b"x"])
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, rest):
    path = shard(tmp_path / "s.tar", {"1.png": b"x", "1.txt": b"a"})
    data = path.read_bytes()
    path.write_bytes(data[:2048] + rest)
    assert "found a damaged file (a damaged header)" in read(path)[-1].error
    path.write_bytes(data[:2048])  # a writer that was killed leaves no mark of the end
    assert read(path) == [Row("s.tar, 1", "1.png", "a", 7, picture=b"x")]


def test_a_shards_headers_take_little_memory(tmp_path):
    """Of 80 KB of records, each of which is named by all that follows, Python's reader would make 2 GB."""
    path = shard(tmp_path / "s.tar", {"1.png": b"x", "1.txt": b"a"})
    data = path.read_bytes()
    path.write_bytes(header(80 * 1024, tarfile.XHDTYPE) + b"2 " * (40 * 1024 - 1) + b"x=" + data)
    (row,) = read(path)
    assert "found a damaged file (a header of more bytes than are read)" in row.error
    common = b"".join(header(1024, tarfile.XGLTYPE) + f"1024 {i:03}=".encode().ljust(1024, b"y") for i in range(20))
    path.write_bytes(common + data)
    assert "found a damaged file (a header of more bytes than are read)" in read(path)[-1].error
    each = [header(1024, tarfile.XGLTYPE) + f"1024 {i:03}=".encode().ljust(1024, b"y") + data[:2048] for i in range(20)]
    path.write_bytes(b"".join(each) + bytes(1024))
    assert "found a damaged file (global headers of more bytes than are read)" in read(path)[-1].error


def test_folders_of_neither_or_both(tmp_path):
    with pytest.raises(InputError, match=r"found 0 \.parquet and 0 \.tar files"):
        pieces_of(tmp_path)
    with pytest.raises(InputError, match="found no such file"):
        pieces_of(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="found a named pipe"):
        pieces_of(tmp_path / "pipe.jsonl")


# Clips


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
    monkeypatch.setattr(batch.importlib.util, "find_spec", lambda name: None)
    assert "--ray: found no ray, pyarrow, expected Ray; run pip install 'trip-rt[ray]'" in refused(*BATCH)


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
    assert figures["killed"] >= 3 and figures["counts"]["failed"] == 0
    results, log = results_of(tmp_path), engine_log(tmp_path)
    assert sorted(one["seed"] for one in results) == list(range(500)) and len(log) == 500
    assert len(os.listdir(tmp_path / "clips")) == 500
    # A machine may end between its engine's work and the clip's file: one clip of each of its processes.
    assert sum(log.values()) <= 500 + 2 * figures["killed"]
