"""What the server and its workers tell each other: MessagePack over a socket pair, each message behind its length.

Engines parse strangers' bundles, so what a worker says is data of known types and never unpickled.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
from typing import Any, Protocol

import msgspec

_LENGTH = struct.Struct(">I")
MOST_BYTES = 1 << 30  # of a message; a picture or a chunk of frames is far below


# To the worker.


class Open(msgspec.Struct, frozen=True, tag=True):
    """The first message: which bundle to open, and how. Another one says that the next clips are of another bundle.
    Each is answered by Ready or Refused."""

    bundle: str
    profile: str
    backend: str
    device: str
    threads: int | None
    results: str  # the folder to write drafts of results in


class Clip(msgspec.Struct, frozen=True):
    """A clip to make: attempt `attempt` of job `job`. `picture` is a PNG of the clip's size, `draft` the folder's name
    to write to, `path` the points that its object goes along. One with an `origin`, a PNG too, has the frames that
    follow it in a clip that began with `picture`, and is made alone."""

    job: str
    attempt: int
    picture: bytes
    prompt: str
    seed: int
    fps: float
    draft: str
    path: tuple[tuple[float, float], ...] | None = None
    origin: bytes | None = None


class Make(msgspec.Struct, frozen=True, tag=True):
    """Clips to make together, with the fields of Settings that are not the default."""

    clips: tuple[Clip, ...]
    settings: dict[str, Any]


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Stop making this job's clip, at the next step."""

    job: str


# To the server.


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The bundle is open and has made a clip: `engine` describes the engines, `parity` is what was measured of them at
    export, a guided step takes `step_s` and all besides the steps `other_s` seconds."""

    engine: dict[str, Any]
    parity: dict[str, Any]
    step_s: float
    other_s: float


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The bundle cannot be opened; the message is one line for people."""

    message: str


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """So many steps of these jobs are done."""

    jobs: tuple[str, ...]
    done: int


class Denoised(msgspec.Struct, frozen=True, tag=True):
    """These jobs' steps are all done: the next ones may come."""

    jobs: tuple[str, ...]


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """The next frames of a job, uint8 `shape` [n, H, W, 3]."""

    job: str
    shape: tuple[int, int, int, int]
    pixels: bytes

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or math.prod(self.shape) != len(self.pixels):
            raise ValueError(f"found {len(self.pixels)} bytes of pixels, expected {self.shape}")  # as a DecodeError


class Made(msgspec.Struct, frozen=True, tag=True):
    """The job's draft is written: the video, its thumbnail and its spritesheet, `bytes` in all."""

    job: str
    attempt: int
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    bytes: int
    peak_memory_mb: float


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """The job's work has stopped, as was asked."""

    job: str
    attempt: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The job cannot be done, and no other attempt would do it."""

    job: str
    attempt: int
    code: str
    message: str


ToWorker = Open | Make | Drop
ToServer = Ready | Refused | Stepped | Denoised | Decoded | Made | Dropped | Failed

_encode = msgspec.msgpack.Encoder().encode
_for_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_for_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


class Server(Protocol):
    """The server, as a worker sees it."""

    def send(self, message: ToServer) -> None:
        """OSError where the server is gone."""

    def receive(self) -> ToWorker | None:
        """The next message, once there is one; None where the server is gone."""


class WorkerEnd:
    """The worker's end of the socket pair; it may be written to by several threads."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._file = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: ToServer) -> None:
        """Returns once the message is on its way; OSError where the server is gone."""
        body = _encode(message)
        with self._lock:
            self._connection.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> ToWorker | None:
        """The next message; None where the server is gone."""
        try:
            head = self._file.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            body = self._file.read(length)
        except OSError:  # it was killed before it had read all
            return None
        return _for_worker.decode(body) if len(body) == length else None


class ServerEnd:
    """The server's end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, connection: socket.socket) -> ServerEnd:
        return cls(*await asyncio.open_connection(sock=connection))

    async def send(self, message: ToWorker) -> None:
        """OSError where the worker is gone."""
        body = _encode(message)
        self._writer.write(_LENGTH.pack(len(body)) + body)
        await self._writer.drain()

    async def receive(self) -> ToServer | None:
        """The next message; None where the worker is gone, or says what it never should."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MOST_BYTES:
                return None
            return _for_server.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError):
            return None

    def close(self) -> None:
        self._writer.close()
