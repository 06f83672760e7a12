"""A real `trip-serve` in a process of its own, for tests that speak to it over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# What a server may run on, as options: alone, and as a Ray Serve application.
HOSTS = [pytest.param((), id="alone"), pytest.param(("--ray",), id="ray", marks=pytest.mark.slow)]
PROMPT = "a red ball rolls to the right"
_COMMAND = [sys.executable, "-c", "import sys; from trip_rt.launch import trip_serve; sys.exit(trip_serve())"]


def picture(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A small PNG."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return file.getvalue()


def clip(**fields: Any) -> dict[str, Any]:
    """The JSON that asks for a clip."""
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    return {"prompt": PROMPT, "input_reference": {"image_url": url}, **fields}


class Server:
    """A running server; `url` is its address, `data` its folder. It is started again on the same port by `start`."""

    def __init__(self, bundles: list[str], data: Path, options: tuple[str, ...] = ()):
        self._bundles, self.data, self._options, self._port = bundles, data, options, 0
        self._log = data.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def start(self, ready: bool = True) -> None:
        """Start it, and wait until it listens or, unless told otherwise, until it is ready."""
        before = len(self.log) if self._log.exists() else 0
        self.spawn()
        assert self.process is not None
        awaited = "trip-serve: ready after" if ready else "trip-serve: listening at"
        until = time.monotonic() + 180
        while awaited not in (said := self.log[before:]):
            assert time.monotonic() < until and self.process.poll() is None, said
            time.sleep(0.02)
        self._port = int(re.findall(r"listening at http://\S+:(\d+)", said)[-1])

    def spawn(self) -> None:
        """Start its process alone."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_COMMAND, *self._bundles, "--data", str(self.data), "--port", str(self._port), *self._options],
                stderr=log,
                stdout=log,
                cwd=self.data.parent,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill(self) -> None:
        """kill -9."""
        self.stop(signal.SIGKILL)

    def workers(self) -> list[psutil.Process]:
        """Its workers' processes."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON (or bytes) of the answer."""
        status, given, content = self.exchange(method, path, body, headers)
        return status, json.loads(content) if given["content-type"] == "application/json" else content

    def exchange(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Message, bytes]:
        """Status, headers and body of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **(headers or {})})
        request.method = method
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def create(self, **fields: Any) -> dict[str, Any]:
        """The job of a new clip."""
        status, job = self.ask("POST", "/v1/videos", clip(**fields))
        assert status == 200, job
        return job

    def wait(self, id: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        """The job once it is in one of these states, or else finished."""
        until = time.monotonic() + seconds
        while True:
            status, job = self.ask("GET", f"/v1/videos/{id}")
            assert status == 200, job
            if job["status"] in (states or ("completed", "failed", "cancelled")):
                return job
            assert time.monotonic() < until and job["status"] not in ("completed", "failed", "cancelled"), job
            time.sleep(0.01)


@contextlib.contextmanager
def running(bundle: Path | str, data: Path, *options: str, ready: bool = True) -> Iterator[Server]:
    """A server of this bundle, as the model `tiny` unless a name is given."""
    name = str(bundle)
    server = Server([name if "=" in name else f"tiny={name}"], data, options)
    server.start(ready)
    try:
        yield server
    finally:
        assert server.process is not None
        if server.process.poll() is None:
            server.kill()
