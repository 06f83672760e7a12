"""Rows of strangers' files: every one whole, or with its error, whatever the file is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_files import PROMPT, json_lines, picture, read, shard

from trip_rt.cluster import rows
from trip_rt.cluster.rows import Piece, Row, dealt, pieces_of, read_rows, together
from trip_rt.errors import InputError
from trip_rt.process_memory import forget_peak, give_back_memory, peak_memory_mb


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
