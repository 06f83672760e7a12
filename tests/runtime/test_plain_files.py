"""Files of strangers: what would block, never end or fill memory is refused before it is opened."""

import os
import socket
from pathlib import Path

import pytest

from trip_rt import InputError
from trip_rt.plain_files import check_plain, read_json, read_text


def make(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("read", [read_text, read_json, check_plain])
@pytest.mark.parametrize("kind", ["folder", "named pipe", "socket", "device"])
def test_what_is_no_plain_file_is_not_opened(tmp_path, monkeypatch, kind, read):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    make(Path("x"), kind)
    with pytest.raises(InputError, match=f"found a {kind}, expected "):
        read(tmp_path / "x", "a file")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[NaN]", "found NaN"),
        (b"[-Infinity]", "found -Infinity"),
        (b"[" * 100_000, "found no JSON"),
        (b"9" * 5000, "found no JSON"),
        (b"\xff", "not UTF-8"),
        (b"", "found no JSON"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_json(tmp_path / "x.json", "a config")
    assert str(caught.value).isprintable()


def test_a_file_larger_than_what_it_is_for_is_refused(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(InputError, match="found 1099511627776 bytes, at most 16777216 are read"):
        read_json(tmp_path / "x.json", "a config")


def test_names_that_no_file_can_have_are_refused():
    for name in ("a\0b", "x" * 10_000):
        with pytest.raises(InputError, match="cannot be read"):
            check_plain(name, "a file")
