"""A real PostgreSQL server on a free port, for tests; skipped where there is none."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))  # where Debian has it, and not on the path


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a new, empty database."""
    found = shutil.which("initdb") or next(map(str, reversed(_PLACES)), None)
    as_other = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
    if found is None or (as_other and subprocess.run([*as_other, "true"], capture_output=True).returncode):
        pytest.skip("no PostgreSQL")
    programs = Path(found).parent
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        if as_other:
            shutil.chown(folder, "postgres")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        data = Path(folder, "data")

        def run(program: str, *arguments: str) -> None:
            command = [*as_other, str(programs / program), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
            assert done.returncode == 0, done.stderr or done.stdout

        run("initdb", "-D", str(data), "-U", "trip", "--auth=trust", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        run("pg_ctl", "-D", str(data), "-l", f"{folder}/log", "-o", options, "-w", "start")
        try:
            yield f"postgresql://trip@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
