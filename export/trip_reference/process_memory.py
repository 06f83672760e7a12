"""How much memory this process has had; light to import, as it is measured with."""

from __future__ import annotations

from pathlib import Path


def peak_memory_mb() -> float:
    """The most memory that this process has had resident. On Linux getrusage would say its parent's, if that
    had more."""
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
