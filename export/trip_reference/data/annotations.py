"""annotations.json: which sentence goes with which video."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trip_rt.checks import is_text
from trip_rt.errors import InputError, printable

ANNOTATIONS, VALIDATION = "annotations.json", "val_annotations.json"
MAX_BYTES = 2**31
_EXPECTED = 'expected a JSON list of {"video_path": "videos/video_001.mp4", "text": "a dog runs"}'
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Annotation:
    """`line` is where the file speaks of it, counted from 1."""

    video: Path
    text: str
    line: int


def read_annotations(folder: Path, name: str = ANNOTATIONS) -> list[Annotation]:
    """The entries of `folder/name`. Videos are not looked at, but every path stays inside the folder, symbolic links
    included.

    Raises InputError that names file and line.
    """
    file = Path(folder) / name
    where = printable(str(file))
    text = _read_text(file, where)
    root = os.path.realpath(folder)
    homes: dict[str, str] = {}
    annotations = []
    for line, entry in _entries(text, where):
        try:
            path, caption = _text_field(entry, "video_path"), _text_field(entry, "text").strip()
            _check_inside(root, path, homes)
        except ValueError as error:
            raise InputError(f"{where}: line {line}: {error}") from error
        annotations.append(Annotation(Path(root, path), caption, line))
    if not annotations:
        raise InputError(f"{where}: line 1: found an empty list, {_EXPECTED}")
    return annotations


def held_out(folder: Path) -> str:
    """The file of the annotations to validate on: val_annotations.json, or annotations.json where there is
    none."""
    return VALIDATION if (Path(folder) / VALIDATION).is_file() else ANNOTATIONS


def _read_text(file: Path, where: str) -> str:
    try:
        if not file.is_file():
            raise InputError(f"{where}: found no such file, {_EXPECTED}")
        if (size := file.stat().st_size) > MAX_BYTES:
            raise InputError(
                f"{where}: found {size / 2**30:.1f} GiB, expected at most {MAX_BYTES / 2**30:.0f} GiB; split the"
                " data set"
            )
        data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{where}: found a file that cannot be read ({error.strerror}), {_EXPECTED}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{where}: line {line}: found bytes that are not UTF-8, expected UTF-8; save the file as such"
        ) from error


def _entries(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element, decoded one at a time: `json.loads` would forget the lines and hold everything
    twice."""
    decode = json.JSONDecoder().raw_decode
    place, line, counted = _skip_space(text, 0), 1, 0

    def wrong(found: str) -> InputError:
        return InputError(f"{where}: line {text.count(chr(10), 0, place) + 1}: found {found}, {_EXPECTED}")

    if text[place : place + 1] != "[":
        raise wrong(_shown(text, place))
    place = _skip_space(text, place + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decode(text, place)
        except json.JSONDecodeError as error:
            place = error.pos
            raise wrong(f"{_shown(text, place)} ({error.msg.lower()})") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
            raise wrong("a value that no entry needs") from error
        yield line, value
        place = _skip_space(text, place)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
            if text[place : place + 1] == "]":
                raise wrong("a comma before the closing bracket")
        elif text[place : place + 1] != "]":
            raise wrong(f"{_shown(text, place)} after an entry")
    place = _skip_space(text, place + 1)
    if place < len(text):
        raise wrong(f"{_shown(text, place)} after the list")


def _skip_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _shown(text: str, place: int) -> str:
    return repr(printable(text[place : place + 20])) if place < len(text) else "the end of the file"


def _text_field(entry: Any, field: str) -> str:
    if not isinstance(entry, dict):
        raise ValueError(f"found {type(entry).__name__}, {_EXPECTED}")
    if field not in entry:
        raise ValueError(f"found no {field!r}, {_EXPECTED}")
    value = entry[field]
    if not isinstance(value, str):
        raise ValueError(f"{field}: found {type(value).__name__}, expected a string")
    if not value.strip():
        raise ValueError(f"{field}: found an empty string, expected some text")
    if not is_text(value):
        raise ValueError(f"{field}: found half of a surrogate pair, expected whole characters")
    return value


def _check_inside(root: str, path: str, homes: dict[str, str]) -> None:
    """`homes` caches the real path of each folder, so that a large data set costs one lstat a video."""
    if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"video_path: found {printable(path)!r}, expected a path inside the folder, without '..'")
    full = os.path.join(root, path)
    parent = os.path.dirname(full)
    if parent not in homes:
        homes[parent] = os.path.realpath(parent)
    target = os.path.realpath(full) if os.path.islink(full) else homes[parent]
    if not (target == root or target.startswith(os.path.join(root, ""))):
        raise ValueError(
            f"video_path: found {printable(path)!r}, a link that leaves the folder, expected one that stays in it; copy"
            " the video"
        )
