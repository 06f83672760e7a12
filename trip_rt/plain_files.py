"""Files that others made, opened only where that does no harm: plain files, no larger than what they are for."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from trip_rt.errors import InputError, printable

MOST_JSON = 16 << 20  # bytes of a config or an index
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_plain(path: str | os.PathLike[str], expected: str, most_bytes: int | None = None) -> int:
    """The size in bytes of a plain file, links followed; InputError for anything else, which to open might block, never
    end or have effects. `expected` says what the file should be and what to do."""
    where = printable(str(path))
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise InputError(f"{where}: found no such file, expected {expected}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where}: cannot be read ({reason}), expected {expected}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something that is no file")
        raise InputError(f"{where}: found {kind}, expected {expected}")
    if most_bytes is not None and status.st_size > most_bytes:
        raise InputError(f"{where}: found {status.st_size} bytes, at most {most_bytes} are read, expected {expected}")
    return status.st_size


def read_plain(path: str | os.PathLike[str], expected: str, most_bytes: int = MOST_JSON) -> bytes:
    """The bytes of a plain file; InputError as of `check_plain`, and where it cannot be read."""
    check_plain(path, expected, most_bytes)
    try:
        with open(path, "rb") as file:
            return file.read(most_bytes)
    except OSError as error:
        raise InputError(f"{printable(str(path))}: cannot be read ({error.strerror}), expected {expected}") from error


def read_text(path: str | os.PathLike[str], expected: str, most_bytes: int = MOST_JSON) -> str:
    """The UTF-8 text of a plain file."""
    try:
        return read_plain(path, expected, most_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(str(path))}: found bytes that are not UTF-8, expected {expected}") from error


def read_json(path: str | os.PathLike[str], expected: str, most_bytes: int = MOST_JSON) -> Any:
    """The value in a plain file of JSON; NaN and Infinity, which Python's reader takes for JSON, are refused."""
    text = read_text(path, expected, most_bytes)
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        reason = printable(str(error))[:100] if isinstance(error, ValueError) else "lists in lists without end"
        raise InputError(f"{printable(str(path))}: found no JSON ({reason}), expected {expected}") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"found {constant}")
