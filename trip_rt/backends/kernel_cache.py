"""Kernels that a GPU's library compiled while it opened a plan, kept for the next time in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from trip_rt.files import whole_file

MAX_BYTES = 1 << 30  # of all plans together; the least recently used go first


class KernelCache:
    """What was compiled for one plan on one kind of GPU by one version of the library.

    It lies in $XDG_CACHE_HOME/trip-rt/kernels (~/.cache by default), named after the plan's own bytes, so that no
    other plan can claim it. What lies there runs on the GPU as it is: a folder that others may write to is not used,
    nor is one that cannot be made, and then nothing is kept.
    """

    def __init__(self, plan: bytes, *environment: str):
        digest = hashlib.sha256(plan)
        digest.update("\0".join(environment).encode())
        self.path = Path(_cache_home(), "trip-rt", "kernels", digest.hexdigest())

    def load(self) -> bytes:
        """What was kept, or nothing."""
        try:
            if not (_is_ours(self.path.parent, stat.S_ISDIR) and _is_ours(self.path, stat.S_ISREG)):
                return b""
            if self.path.stat().st_size > MAX_BYTES:
                return b""
            os.utime(self.path)
            return self.path.read_bytes()
        except OSError:
            return b""

    def save(self, compiled: bytes) -> None:
        """Keep it, where that is something new, and forget the oldest of all plans' beyond `MAX_BYTES`."""
        if not self.path.is_absolute() or not 0 < len(compiled) <= MAX_BYTES or compiled == self.load():
            return
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(folder, stat.S_ISDIR):
                return
            with whole_file(self.path) as part:
                part.write_bytes(compiled)
            total = 0
            for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
                total += path.stat().st_size
                if total > MAX_BYTES:
                    path.unlink(missing_ok=True)
        except OSError:
            return  # a full disk, or another process at the same work: this run has its kernels


def _cache_home() -> str:
    """An absolute path, but for a user who has no home."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    return asked if os.path.isabs(asked) else os.path.expanduser("~/.cache")


def _is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether nobody but its owner, who is this process's user, may write to it; a link is not followed."""
    found = path.lstat()
    return is_kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
