"""The peak memory of this process. Imports little, because the process that is measured imports it."""

from __future__ import annotations

from pathlib import Path


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far. Not by getrusage on Linux, which counts the parent's
    peak too."""
    status = Path("/proc/self/status")
    if status.exists():
        return round(
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            * 1024
            / 1e6,
            1,
        )
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)  # macOS counts bytes
