"""A look into an ONNX file before an engine library opens it: that it is ONNX, and which other files it names.

A graph may keep its weights in other files. The libraries read whatever it names, but the manifest's hashes vouch only
for what the manifest lists. onnx itself is no dependency of the runtime, and this much of its format is small: the
fields of protobuf messages (onnx.proto), of which only those that can hold a reference are followed.
"""

from __future__ import annotations

import mmap
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from trip_rt.errors import InputError, printable

_KEY = b"location"  # of the entry of a tensor's external data that names its file
_GRAPH_FIELD = 7
_DEEPEST = 100  # as protobuf's own parsers have it
_MOST_KEYS = 1 << 20


@dataclass
class _Message:
    """A message's fields by number: those that hold messages, and those of `plain` text or bytes."""

    messages: dict[int, _Message] = field(default_factory=dict)
    plain: frozenset[int] = frozenset()


_ENTRY = _Message(plain=frozenset({1, 2}))  # key, value
_TENSOR = _Message({13: _ENTRY}, frozenset({4, 6, 8, 9, 12}))
_SPARSE = _Message({1: _TENSOR, 2: _TENSOR})
_ATTRIBUTE = _Message({5: _TENSOR, 10: _TENSOR, 22: _SPARSE, 23: _SPARSE}, frozenset({1, 4, 9, 13, 14, 21}))
_NODE = _Message({5: _ATTRIBUTE}, frozenset({1, 2, 3, 4, 6, 7, 8, 9}))
_GRAPH = _Message({1: _NODE, 5: _TENSOR, 15: _SPARSE}, frozenset({2, 10, 11, 12, 13, 14, 16}))
_ATTRIBUTE.messages |= {6: _GRAPH, 11: _GRAPH}
_FUNCTION = _Message({7: _NODE, 11: _ATTRIBUTE}, frozenset({1, 4, 5, 6, 8, 9, 10, 12, 13, 14}))
_MODEL = _Message({_GRAPH_FIELD: _GRAPH, 25: _FUNCTION}, frozenset({2, 3, 4, 6, 8, 14}))


def check_onnx_file(path: Path, listed: Collection[str]) -> None:
    """InputError unless the file is an ONNX model that keeps tensors in none but the `listed` files beside it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = set(_File(data).locations())
    except (OSError, ValueError, _Strange) as error:  # mmap raises ValueError for an empty file
        raise InputError(f"{path}: found no ONNX graph ({error}), expected one; export the bundle again") from error
    if strange := sorted(found - set(listed)):
        raise InputError(
            f"{path}: found that it keeps weights in {printable(strange[0])[:100]!r}, which the manifest does not list"
            " for it; do not use this bundle, export it again"
        )


class _Strange(Exception):
    """Bytes that are not what ONNX writes."""


class _File:
    """A mapped file. `keys` are all places where the name of another file could follow: a part of the file without any
    is passed over, which makes this fast."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.keys = [match.start() for match in islice(re.finditer(_KEY, data), _MOST_KEYS + 1)]
        if len(self.keys) > _MOST_KEYS:
            raise _Strange(f"more than {_MOST_KEYS} references")

    def locations(self) -> Iterator[str]:
        """The names of the files that the model's tensors are kept in."""
        if not any(number == _GRAPH_FIELD for number, _, _ in self._fields(0, len(self.data))):
            raise _Strange("no graph")
        return self._in_message(0, len(self.data), _MODEL, 0)

    def _in_message(self, start: int, end: int, kind: _Message, depth: int) -> Iterator[str]:
        if depth > _DEEPEST:
            raise _Strange(f"more than {_DEEPEST} messages within each other")
        if kind is _ENTRY:
            fields = [(number, self.data[a:b]) for number, a, b in self._fields(start, end)]
            if (1, _KEY) in fields:  # of several values a parser takes one, so all of them count
                values = [value for number, value in fields if number == 2] or [b""]  # none is the empty name
                yield from (value.decode(errors="backslashreplace") for value in values)
            return
        for number, a, b in self._fields(start, end):
            if bisect_left(self.keys, a) == bisect_left(self.keys, b):
                continue
            if number in kind.messages:
                yield from self._in_message(a, b, kind.messages[number], depth + 1)
            elif number not in kind.plain:
                raise _Strange(f"a field {number} that no graph of ours has")

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, beginning and end of each field with a length of its own; others are passed over."""
        while start < end:
            tag, start = self._varint(start, end)
            if tag >= 1 << 32:
                raise _Strange("a field of too large a number")
            match tag & 7:
                case 0:
                    _, start = self._varint(start, end)
                    continue
                case 1 | 5 as kind:
                    length = 8 if kind == 1 else 4
                case 2:
                    length, start = self._varint(start, end)
                case kind:
                    raise _Strange(f"a field of kind {kind}")
            if length > end - start:
                raise _Strange("a field that is cut off")
            if tag & 7 == 2:
                yield tag >> 3, start, start + length
            start += length

    def _varint(self, start: int, end: int) -> tuple[int, int]:
        """A number in base 128, and where it ends."""
        value = 0
        for place, shift in zip(range(start, end), range(0, 70, 7), strict=False):
            value |= (self.data[place] & 127) << shift
            if self.data[place] < 128:
                return value, place + 1
        raise _Strange("a number that is cut off")
