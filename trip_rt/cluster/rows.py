"""The rows of a batch: JSON Lines, Parquet and WebDataset shards, read a few rows at a time wherever Ray has room.

Rows are strangers': every one is checked by itself, and what is wrong with it becomes its `error`. Names in a file are
never opened as addresses, and a shard's members are never written to disk.
"""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from trip_rt.checks import shown, text
from trip_rt.clip_requests import json_object
from trip_rt.errors import InputError, one_line, printable
from trip_rt.images import MAX_FILE_MEGABYTES
from trip_rt.plain_files import check_plain
from trip_rt.settings import check_prompt, check_seed

MOST_PICTURE = MAX_FILE_MEGABYTES << 20
MOST_LINE = 1 << 20  # bytes of a row's words
MOST_HEADER = 16 << 10  # bytes of a tar member's headers; Python's reader takes up to a square of them in memory
MOST_ROWS = 1 << 40  # of a Parquet file
MOST_OUTPUT = 255  # bytes of each part of a name
MOST_PARTS = 8
MOST_TOGETHER = 32 << 20  # bytes of rows that are handed on together
_PIECES = 256  # of a batch; Ray reads one in one go
_SCAN = 4 << 20  # bytes
_PICTURES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"})
_FIELDS = ("image", "prompt", "seed", "output")

Kind = Literal["jsonl", "parquet", "tar"]


@dataclass(frozen=True)
class Row:
    """One clip that is asked for; `where` names its place in the file. `picture` are the bytes of a picture file, or
    None where `image` is the path of one. `error` says why there can be no clip."""

    where: str
    image: str = ""
    prompt: str = ""
    seed: int = 0
    output: str = ""
    picture: bytes | None = None
    error: str = ""


@dataclass(frozen=True)
class Piece:
    """Part of a batch: bytes `start` to `stop` of JSON Lines, row groups of Parquet, or all of a shard. `first` is the
    number of its first row, `rows` how many it has (0: nobody counted)."""

    kind: Kind
    path: str
    start: int
    stop: int
    first: int
    rows: int


def pieces_of(path: Path) -> list[Piece]:
    """What a batch is read by: a file of JSON Lines, a .parquet or .tar file, or a folder of either. InputError for
    what is none, and for a Parquet file without the columns of a batch."""
    if path.is_dir():
        found = {kind: sorted(path.glob(f"*.{kind}")) for kind in ("parquet", "tar")}
        if bool(found["parquet"]) == bool(found["tar"]):
            count = f"{len(found['parquet'])} .parquet and {len(found['tar'])} .tar files"
            where = printable(str(path))
            raise InputError(f"{where}: found {count}, expected some of one kind; name a file, or another folder")
        files = found["parquet"] or found["tar"]
    else:
        files = [path]
    pieces: list[Piece] = []
    for file in files:
        size = check_plain(file, "a file of JSON Lines, .parquet or .tar; check the path")
        try:
            if file.suffix.lower() == ".tar":
                pieces.append(Piece("tar", os.path.abspath(file), 0, size, 1, 0))
            elif file.suffix.lower() == ".parquet":
                pieces += _parquet_pieces(file)
            else:
                pieces += _line_pieces(file, size)
        except InputError:
            raise
        except Exception as error:  # a hostile file can raise nearly anything from inside a reader
            raise InputError(
                f"{_what_was_found(str(file), error)}, expected JSON Lines or Parquet; write it again"
            ) from error
    return pieces


def dealt(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in at most _PIECES lists of neighbours."""
    count = min(len(pieces), _PIECES)
    ends = [len(pieces) * i // count for i in range(count + 1)] if count else [0]
    return [list(pieces[a:b]) for a, b in itertools.pairwise(ends)]


def read_rows(piece: Piece, seed: int) -> Iterator[Row]:
    """A piece's rows, `seed` where one has none. A damaged file, and one that is not on this
    machine, ends in a row that says so."""
    readers = {"jsonl": _line_rows, "parquet": _parquet_rows, "tar": _tar_rows}
    try:
        yield from readers[piece.kind](piece, seed)
    except Exception as error:  # a hostile file can raise nearly anything from inside a reader
        expected = "it at this path on all machines" if _of_the_system(error) else f"a {piece.kind} file"
        yield Row(printable(piece.path), error=f"{_what_was_found(piece.path, error)}, expected {expected}")


def _of_the_system(error: Exception) -> bool:
    """Whether the system, not the file's content, kept it from being read: Arrow raises OSError for both."""
    return isinstance(error, OSError) and error.errno is not None


def _what_was_found(path: str, error: Exception) -> str:
    """The first half of a message."""
    if _of_the_system(error):
        return f"{printable(path)}: cannot be read ({one_line(error)})"
    return f"{printable(path)}: found a damaged file ({one_line(error) or type(error).__name__})"


def together(rows: Iterator[Row], most: int) -> Iterator[list[Row]]:
    """Rows in lists of `most`, or fewer where they are large."""
    some: list[Row] = []
    size = 0
    for row in rows:
        some.append(row)
        size += len(row.picture or b"") + len(row.image) + len(row.prompt)
        if len(some) == most or size > MOST_TOGETHER:
            yield some
            some, size = [], 0
    if some:
        yield some


def _row(where: str, entry: dict[str, Any], seed: int, picture: bytes | None = None) -> Row:
    """The checked row of a file's values; what is wrong becomes its error."""
    given = {name: entry[name] for name in _FIELDS if entry.get(name) is not None}
    known = {name: value for name, value in given.items() if isinstance(value, str) and name != "seed"}
    try:
        for name in ("image", "prompt"):
            if name not in given:
                raise InputError(f"found no {name}, expected one")
        for name in ("image", "prompt", "output"):
            text(name, given.get(name, ""))
        if not given["image"]:
            raise InputError("image: found an empty one, expected a picture's path")
        seed = check_seed(given.get("seed", seed))
        check_prompt(given["prompt"])
        check_output(given.get("output", ""))
        if picture is not None and len(picture) > MOST_PICTURE:
            raise InputError(f"image: found {len(picture)} bytes, expected at most {MAX_FILE_MEGABYTES} MB")
    except InputError as error:
        image, prompt, output = (printable(known.get(name, "")[:1000]) for name in ("image", "prompt", "output"))
        return Row(where, image, prompt, 0, output, error=f"{where}: {error}")
    return Row(where, given["image"], given["prompt"], seed, given.get("output", ""), picture)


def check_output(name: str) -> None:
    """InputError for a name that is not that of a .mp4 file in the folder of named clips."""
    if not name:
        return
    parts = name.split("/")
    fits = len(parts) <= MOST_PARTS and all(len(part.encode()) <= MOST_OUTPUT for part in parts)
    if (
        not fits
        or any(part.startswith(".") or not part for part in parts)
        or not (name.isprintable() and name.endswith(".mp4"))
        or "\\" in name
    ):
        raise InputError(
            f"output: found {shown(name)}, expected a relative name that ends in .mp4, without parts that begin with"
            " a dot; leave it out, or name it otherwise"
        )


def _line_pieces(path: Path, size: int) -> list[Piece]:
    """Cut at line ends, which takes one pass over the file."""
    share = max(_SCAN, size // _PIECES)
    pieces: list[Piece] = []
    start, line, lines, at = 0, 1, 0, 0
    with path.open("rb") as file:
        while data := file.read(_SCAN):
            if at + len(data) - start >= share and (cut := data.rfind(b"\n") + 1):
                lines += data.count(b"\n", 0, cut)
                pieces.append(Piece("jsonl", os.path.abspath(path), start, at + cut, line, lines))
                start, line, lines = at + cut, line + lines, data.count(b"\n", cut)
            else:
                lines += data.count(b"\n")
            at += len(data)
    if at > start:
        pieces.append(Piece("jsonl", os.path.abspath(path), start, at, line, lines + (not _ends_line(path, at))))
    return pieces


def _ends_line(path: Path, size: int) -> bool:
    """Whether the file's last byte of `size` ends a line."""
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _line_rows(piece: Piece, seed: int) -> Iterator[Row]:
    name = printable(Path(piece.path).name)
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        number = piece.first
        while (at := file.tell()) < piece.stop:
            line = file.readline(MOST_LINE + 1)
            where = f"{name}, line {number}"
            number += 1
            if len(line) > MOST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MOST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Row(where, error=f"{where}: found more than {MOST_LINE} bytes, expected one object a line")
                continue
            if at == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _json_row(line, where, seed)


def _json_row(line: bytes, where: str, seed: int) -> Row:
    try:
        entry = json_object(line)
        if unknown := sorted(entry.keys() - set(_FIELDS)):
            raise InputError(f"found the unknown key {shown(unknown[0])}, expected {', '.join(_FIELDS)}")
    except InputError as error:
        return Row(where, error=f"{where}: {error}")
    return _row(where, entry, seed)


def _parquet_pieces(path: Path) -> list[Piece]:
    """Row groups in at most _PIECES pieces, because each piece reads the file's footer. Here nothing else is read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) > MOST_ROWS:
        raise InputError(f"{printable(str(path))}: found impossible numbers of rows, expected Parquet; write it again")
    firsts = list(itertools.accumulate(counts, initial=1))
    pieces_at = sorted({len(counts) * i // _PIECES for i in range(_PIECES + 1)})
    return [
        Piece("parquet", os.path.abspath(path), start, stop, firsts[start], firsts[stop] - firsts[start])
        for start, stop in itertools.pairwise(pieces_at)
    ]


def _check_columns(path: Path, schema: Any) -> None:
    """InputError unless the columns that a batch reads are there, each once, and plain. Ray's own types, whose values
    would be unpickled, are not plain."""
    from pyarrow import types

    where = printable(str(path))
    words = (types.is_string, types.is_large_string)
    wanted = {
        "image": ("text (a path) or binary (a picture file)", (*words, types.is_binary, types.is_large_binary)),
        "prompt": ("text", words),
        "seed": ("whole numbers", (types.is_integer,)),
        "output": ("text", words),
    }
    for name, (expected, kinds) in wanted.items():
        count = schema.names.count(name)
        if not count and name not in ("image", "prompt"):
            continue
        if count != 1:
            found = f"{count} columns" if count else "no column"
            raise InputError(f"{where}: found {found} {name}, expected one of {expected}; rename or add it")
        found = schema.field(name).type
        plain = found.value_type if types.is_dictionary(found) else found
        if not any(kind(plain) for kind in kinds):
            raise InputError(f"{where}: {name}: found {one_line(found, 100)}, expected {expected}; convert the column")


def _parquet_rows(piece: Piece, seed: int) -> Iterator[Row]:
    """A row at a time, because one value in the file may stand for the pictures of many rows. Nothing bounds a page,
    which Arrow holds whole, with copies: the format lets it be 2 GiB, and common writers put 1024 pictures in one."""
    import pyarrow.parquet as pq

    name, number = printable(Path(piece.path).name), piece.first
    with pq.ParquetFile(piece.path, buffer_size=1 << 20) as file:
        _check_columns(Path(piece.path), file.schema_arrow)  # once more: it may have changed
        columns = [column for column in _FIELDS if column in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1, row_groups=range(piece.start, piece.stop), columns=columns):
            yield _parquet_row(f"{name}, row {number}", {column: batch.column(column)[0] for column in columns}, seed)
            number += 1
    if number != piece.first + piece.rows:
        raise ValueError(f"{number - piece.first} rows where there should be {piece.rows}")


def _parquet_row(where: str, scalars: dict[str, Any], seed: int) -> Row:
    try:
        entry = {name: _parquet_value(name, scalar) for name, scalar in scalars.items()}
    except InputError as error:
        return Row(where, error=f"{where}: {error}")
    picture = entry.get("image")
    if isinstance(picture, bytes):
        return _row(where, {**entry, "image": where}, seed, picture)
    return _row(where, entry, seed)


def _parquet_value(name: str, scalar: Any) -> Any:
    """A value of a column. InputError for more bytes than are read, and for text that is not UTF-8: Arrow does not look
    at it, and would raise what ends the file."""
    import pyarrow as pa

    if isinstance(scalar, pa.DictionaryScalar) and scalar.is_valid:
        scalar = scalar.value
    if not scalar.is_valid or not isinstance(scalar, pa.BinaryScalar):
        return scalar.as_py()
    data = scalar.as_buffer()
    binary = pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type)
    if data.size > (most := MOST_PICTURE if binary else MOST_LINE):
        raise InputError(f"{name}: found {data.size} bytes, expected at most {most}")
    try:
        return data.to_pybytes() if binary else data.to_pybytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: found bytes that are not UTF-8, expected text") from error


class _Bounded(io.FileIO):
    """A file of which at most `left` bytes are read: a header may claim any length."""

    left = MOST_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError("a header of more bytes than are read")
        data = super().read(size) or b""
        self.left -= len(data)
        return data


def _members(file: _Bounded, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """A shard's members. Python's reader takes a damaged header for the end, which would lose rows without a word, and
    goes back by a negative size, which would not end."""
    size, at = os.fstat(file.fileno()).st_size, 0
    while member := tar.next():
        tar.members = []  # type: ignore[attr-defined]  # or it keeps all of them
        if member.size < 0 or not at < tar.offset <= size:
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if sum(len(name) + len(str(value)) for name, value in tar.pax_headers.items()) > MOST_HEADER:
            raise tarfile.ReadError("global headers of more bytes than are read")
        at = tar.offset
        yield member
        file.left = MOST_HEADER
    file.left = tarfile.BLOCKSIZE
    file.seek(tar.offset)
    if any(file.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError("a damaged header")


def _tar_rows(piece: Piece, seed: int) -> Iterator[Row]:
    """Members of one name up to its first dot, one after the other, are a row, as WebDataset has it."""
    shard = printable(Path(piece.path).name)
    with _Bounded(piece.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        key, parts = "", {}  # type: tuple[str, dict[str, tuple[str, bytes | None]]]
        for member in _members(file, tar):
            path = PurePosixPath(member.name)
            stem, dot, ending = path.name.partition(".")
            kind = "picture" if ending.lower() in _PICTURES else ending.lower()
            if not (dot and stem and member.isreg()) or kind not in ("picture", "json", "txt"):
                continue
            this = str(path.with_name(stem))
            if this != key and parts:
                yield _member_row(f"{shard}, {printable(key)[:500]}", parts, seed)
                parts = {}
            key = this
            most = MOST_PICTURE if kind == "picture" else MOST_LINE
            content = tar.extractfile(member) if member.size <= most and not member.issparse() else None
            file.left = most
            parts[kind] = member.name, content.read() if content else None
        if parts:
            yield _member_row(f"{shard}, {printable(key)[:500]}", parts, seed)


def _member_row(where: str, parts: dict[str, tuple[str, bytes | None]], seed: int) -> Row:
    try:
        for name, content in parts.values():
            if content is None:
                raise InputError(f"{printable(name)[:500]}: found more bytes than are read, expected a smaller file")
        entry = json_object(parts["json"][1] or b"") if "json" in parts else {}
        if "prompt" not in entry and "txt" in parts:
            entry["prompt"] = (parts["txt"][1] or b"").decode("utf-8", "replace").strip()
    except InputError as error:
        return Row(where, error=f"{where}: {error}")
    image, picture = parts.get("picture", (None, None))
    return _row(where, {**entry, "image": image}, seed, picture)
