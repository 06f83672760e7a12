"""How much memory this process holds, and how much the machine has. Imports little, because processes that are measured
import it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/maps")
_DONT_NEED = 4  # madvise's MADV_DONTNEED on Linux

Mapped = tuple[int, int]  # where a file is in memory: its first address and its size in bytes


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, or on Linux since `forget_peak`. Not by getrusage there,
    which counts the parent's peak too."""
    if _STATUS.exists():
        return round(_status_kib("VmHWM") * 1024 / 1e6, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)  # macOS counts bytes


def forget_peak() -> None:
    """Have `peak_memory_mb` count from here on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Return to the system what nothing refers to any more: objects in cycles, and what malloc holds on to."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such call
            ctypes.CDLL(None).malloc_trim(0)


def mapping_of(path: Path, address: int) -> Mapped | None:
    """The mapping of a file, for reading, at that address; None where there is none, or the system does not tell."""
    with contextlib.suppress(OSError):
        for line in _MAPS.read_text(errors="surrogateescape").splitlines():
            addresses, rights, *_, name = line.split(maxsplit=5)
            begin, end = (int(number, 16) for number in addresses.split("-"))
            if begin <= address < end and name == str(path.resolve()) and "w" not in rights:
                return begin, end - begin
    return None


def give_back_mapping(mapping: Mapped) -> None:
    """Return a mapping's memory to the system. What is touched again comes back, mostly from the system's own cache of
    files. Whoever calls this keeps the file mapped meanwhile: another's memory at that place would be lost."""
    begin, size = mapping
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _DONT_NEED)


def machine_memory_gb() -> float | None:
    """The memory that processes here can have, swap with it, or what this one's control group allows where that is
    less; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        has = sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:"))) * 1024
        with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
            has = min(has, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except OSError:
        return None
    return has / 1e9


def _status_kib(name: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(name))
