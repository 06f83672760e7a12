"""Batches for many machines: whatever is in a file, its rows are whole or say what is wrong with them.

Arrow reads Parquet in this process, as it does in Ray's: a file that crashed it would end the run of the tests. Pages
that are small and decompress to gigabytes are not tried, for nothing bounds them (trip_rt/cluster/rows.py).
"""

import io
import json
import os
import tarfile

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import HOSTILE, damaged, fuzz_area, mutated_json
from hypothesis import strategies as st

from trip_rt import InputError
from trip_rt.cluster import rows
from trip_rt.cluster.rows import MOST_PICTURE, Row, check_output, pieces_of, read_rows, together
from trip_rt.errors import printable

AREA = "batches on Ray"  # a third of its inputs are of each kind
PROMPT = "a red ball rolls"
ENTRIES = [
    {"image": "photo.png", "prompt": PROMPT, "output": "x/a.mp4", "seed": 7},
    {"image": "ä.png", "prompt": "ein Ball"},
]


class Boom:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def read(tmp_path):
    """Reads a file of that name and content. It accepts one with a whole row, and has checked all rows then."""
    decoder = msgspec.msgpack.Decoder(list[Row])

    def read(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        here = set(os.listdir(tmp_path))
        pieces = pieces_of(path)
        found = []
        for piece in pieces:
            for some in together(read_rows(piece, 3), 16):
                assert decoder.decode(msgspec.msgpack.encode(some)) == some  # as they are handed on
                for row in some:
                    check(row, path)
                    found.append(bool(row.error))
        assert set(os.listdir(tmp_path)) == here
        if all(found):
            raise InputError("no row can be made")
        return pieces, len(found)

    return read


def check(row, path):
    assert row.where.isprintable() and row.where.startswith((path.name, printable(str(path))))
    if row.error:
        assert row.error.isprintable() and row.error.startswith(row.where) and len(row.error) < 2000
        return
    assert row.image.encode() and row.prompt.strip() and row.prompt.encode()
    assert type(row.seed) is int and 0 <= row.seed < 2**64
    check_output(row.output)
    assert row.picture is None or (type(row.picture) is bytes and len(row.picture) <= MOST_PICTURE)


@fuzz_area(AREA, quick=40, full=1000)
def test_lines(fuzz, read, tmp_path, monkeypatch):
    """Small files, cut at sizes that they have many pieces of. No line is lost, and none is read twice."""
    monkeypatch.setattr(rows, "_SCAN", 200)
    monkeypatch.setattr(rows, "MOST_LINE", 4000)
    between = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n \n", b"", b"\r", b"\xef\xbb\xbf"])
    valid = st.sampled_from([json.dumps(entry).encode() for entry in ENTRIES])
    line = st.tuples(valid | mutated_json(ENTRIES), between).map(b"".join)

    def lines(data):
        pieces, count = read("a.jsonl", data)
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == len(data)
        told = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert sum(piece.rows for piece in pieces) == len(told) - (not told[-1] and data.endswith(b"\n"))
        assert count == sum(bool(one.strip()) or len(one) >= 4000 for one in told)

    fuzz(st.lists(line, max_size=8).map(b"".join), lines, folder=tmp_path)


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    return tmp_path_factory.mktemp("unpickled") / "mark"


def parquet(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def valid_parquet(mark):
    """Tables in most encodings and compressions, and with Ray's objects in a column that is not read."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    words = {"image": ["a.png", "ä.png", None] * 3, "prompt": [PROMPT, "x", None] * 3, "seed": [1, None, 2**40] * 3}
    table = pa.table(words | {"output": ["a.mp4", None, ""] * 3})
    pictures = pa.table({"image": [b"x" * 100, b"y" * 50, None], "prompt": pa.array([PROMPT] * 3, pa.large_string())})
    objects = pa.table(words | {"more": ArrowPythonObjectArray.from_objects([Boom(mark)] * 9)})
    as_index = table.set_column(1, "prompt", table["prompt"].dictionary_encode())
    deltas = {"prompt": "DELTA_BYTE_ARRAY", "image": "DELTA_LENGTH_BYTE_ARRAY", "seed": "DELTA_BINARY_PACKED"}
    return [
        parquet(table),
        parquet(table, compression="none", use_dictionary=False, store_schema=False),
        parquet(table, compression="gzip", use_dictionary=False, column_encoding=deltas),
        parquet(table, compression="lz4", row_group_size=4, data_page_version="2.0"),
        parquet(table, compression="brotli", write_page_index=True, write_page_checksum=True),
        parquet(pictures, compression="zstd"),
        parquet(as_index),
        parquet(objects),
    ]


def columns(mark):
    """Two rows of what a column may be, right for some name of a batch or for none."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    words = [value for value in HOSTILE if isinstance(value, str) and "\ud800" not in value]
    damaged_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array(["ab", "cd"]).buffers()[1], pa.py_buffer(b"ab\xff\xfe")]
    )
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]
    texts = st.tuples(st.sampled_from([PROMPT, "a.mp4", *words]), st.sampled_from([PROMPT, *words, None]))
    numbers = st.tuples(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9), st.integers(0, 2**31) | st.none())
    return (
        st.builds(pa.array, texts, st.sampled_from(kinds))
        | st.builds(pa.array, texts).map(lambda array: array.dictionary_encode())
        | st.builds(pa.array, numbers, st.just(pa.int64()))
        | st.sampled_from(
            [
                damaged_text,
                pa.nulls(2),
                pa.nulls(2, pa.string()),
                pa.array([2**64 - 1, 0], pa.uint64()),
                pa.array([1, 2], pa.timestamp("ns")),
                pa.array([0.5, 1.0]),
                pa.array([True, None]),
                pa.array([b"abcd", b"efgh"], pa.binary(4)),
                pa.array([["a"], []]),
                pa.array([{"x": b"a"}, None]),
                ArrowPythonObjectArray.from_objects([Boom(mark)] * 2),
            ]
        )
    )


@fuzz_area(AREA, quick=40, full=1000)
def test_parquet(fuzz, read, mark, tmp_path):
    names = st.sampled_from(["image", "prompt", "seed", "output", "image.x", "x\n", ""])
    usual = {"image": ["a.png", "b.png"], "prompt": [PROMPT, "x"]}
    extra = st.lists(st.tuples(names, columns(mark)), min_size=1, max_size=3)

    def table(drawn):
        keep, more = drawn
        kept = [(name, pa.array(usual[name])) for name in keep]
        return parquet(pa.Table.from_arrays([array for _, array in kept + more], [name for name, _ in kept + more]))

    odd = st.tuples(st.sampled_from([[], ["image"], ["prompt"], ["image", "prompt"]]), extra).map(table)

    def one(data):
        try:
            read("a.parquet", data)
        finally:
            assert not mark.exists(), "a stranger's object was unpickled"

    fuzz(damaged(valid_parquet(mark)) | odd, one, folder=tmp_path)


def header(name, size, kind=tarfile.REGTYPE, changed=b""):
    """A header whose sum is right, whatever it says. `changed` stands in the place of its bytes."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(changed[:512] if changed else info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
    block += bytes(512 - len(block))
    if not changed:
        block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, content, size=None, kind=tarfile.REGTYPE, changed=b""):
    size = len(content) if size is None else size
    return header(name, size, kind, changed) + content + bytes(-len(content) % 512)


ROW = member("1.png", b"picture") + member("1.json", json.dumps({"prompt": PROMPT, "seed": 3}).encode())
TEXT = member("é/2.JPG", b"picture") + member("é/2.txt", PROMPT.encode())


def record(key, value):
    """A record of extended headers, which begins with its own length."""
    rest = b" %s=%s\n" % (key, value)
    return next(b"%d" % size + rest for size in range(2000) if len(b"%d" % size + rest) == size)


PAX = [
    record(b"path", b"1.json"),
    record(b"path", b"\xff/1.png"),
    record(b"size", b"-1024"),
    record(b"size", b"9" * 20),
    record(b"size", b"x"),
    record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"),
    record(b"GNU.sparse.map", b"0,1,x,9999"),
    record(b"GNU.sparse.size", b"9"),
    record(b"hdrcharset", b"BINARY") + record(b"path", b"\xff.png"),
    record(b"hdrcharset", b"\xff"),
    b"".join(record(b"x%d" % i, b"y" * 90) for i in range(100)),
    b"0 x=\n",
    b"2 " * 3000 + b"=",  # of which each record's name is all that follows
    b"2 " * 60000 + b"=",
    b"%d path=%s\n" % (10**6, b"x" * 10**6),
    b"9" * 5000 + b" path=a\n",
]
SIZES = [-1, -512, -1024, -1536, -2048, 0, 1, 511, 513, 2**20, 2**31, 2**40, 2**63, 2**70]
KINDS = [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE]


@fuzz_area(AREA, quick=40, full=1000)
def test_shards(fuzz, read, tmp_path):
    names = [
        "1.png",
        "1.json",
        "1.txt",
        "../../1.png",
        "/etc/1.png",
        "a\n.png",
        "\udcff.png",
        ".png",
        "x" * 90,
        "..",
        "",
    ]
    kinds = [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"?", *KINDS]
    contents = mutated_json([{"prompt": PROMPT, "seed": 3, "output": "a.mp4"}]) | st.sampled_from(
        [b"", b"1\n" * 900, *PAX]
    )
    name, kind = st.sampled_from(names), st.sampled_from(kinds)
    sizes = st.none() | st.none() | st.sampled_from(SIZES)
    lying = st.builds(member, name, contents, sizes, kind)
    extended = st.builds(member, st.just("x"), st.sampled_from(PAX), st.none(), st.sampled_from(KINDS))
    changed = st.builds(member, st.just(""), contents, st.just(0), st.just(b"0"), damaged([header("1.png", 7)]))
    texts = st.builds(member, st.sampled_from(["1.json", "1.txt"]), contents)
    some = st.lists(st.sampled_from([ROW, TEXT]) | lying | extended | changed | texts, min_size=1, max_size=5)
    many = extended.map(lambda one: one * 40 + ROW)
    tars = (some.map(b"".join) | many).map(lambda data: data + bytes(1024))
    whole = [
        ROW + TEXT + bytes(1024),
        member("x", record(b"path", b"long.png"), kind=tarfile.XHDTYPE) + ROW + bytes(1024),
    ]

    fuzz(damaged(whole) | tars | tars, lambda data: read("a.tar", data), folder=tmp_path)
