"""What a process holds in memory, and gives back."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from trip_rt.process_memory import give_back_mapping, mapping_of

BYTES = 64_000_000


def _of_files():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_file_is_given_back(tmp_path):
    path, other = tmp_path / "the weights", tmp_path / "others"
    path.write_bytes(bytes(range(250)) * (BYTES // 250))
    other.write_bytes(b"1" * BYTES)
    with path.open("rb") as file, other.open("rb") as beside:
        mapped, kept = (mmap.mmap(each.fileno(), 0, access=mmap.ACCESS_READ) for each in (file, beside))
    touched = sum(mapped[::4096]) + sum(kept[::4096])
    addresses = [np.frombuffer(each, np.uint8).ctypes.data for each in (mapped, kept)]
    assert mapping_of(path, addresses[1]) is None and mapping_of(path, id(path)) is None
    mapping = mapping_of(path, addresses[0] + 70_000)
    assert mapping == (addresses[0], -(-BYTES // 4096) * 4096)
    before = _of_files()
    give_back_mapping(mapping)
    assert 0.9 * BYTES < before - _of_files() < 1.1 * BYTES
    assert sum(mapped[::4096]) + sum(kept[::4096]) == touched
