"""What server and worker tell each other."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec
import pytest
from service_parts import FRAMES, SECONDS, decoded, framed, run

from trip_rt.serving import protocol
from trip_rt.serving.protocol import (
    Clip,
    Decoded,
    Denoised,
    Drop,
    Dropped,
    Failed,
    Made,
    Make,
    Open,
    Ready,
    Refused,
    ServerEnd,
    Stepped,
    WorkerEnd,
)

CLIP = Clip("video_1", 2, b"\x89PNG", "a red ball rolls", 2**64 - 1, 8.0, "video_1-2")
TO_WORKER = [
    Open("bundle", "48x32-5f-b1", "auto", "cpu", None, "clips"),
    Make((CLIP, CLIP), {"speed": "fast", "guidance_interval": [0.1, 0.9]}),
    Drop("video_1"),
]
TO_SERVER = [
    Ready({"backend": "onnxruntime"}, {"components": {}}, 0.5, 0.1),
    Refused("found no bundle"),
    Stepped(("video_1", "video_2"), 3),
    Denoised(("video_1",)),
    Decoded("video_1", (5, 32, 48, 3), FRAMES.tobytes()),
    Made("video_1", 2, SECONDS, ("a word is not known",), 10_000, 123.4),
    Dropped("video_1", 2),
    Failed("video_1", 2, "engine_error", "it does not run"),
]


def test_messages_arrive_as_they_were_sent():
    async def test():
        ours, theirs = socket.socketpair()
        server, worker = await ServerEnd.of(ours), WorkerEnd(theirs)
        for message in TO_WORKER:
            await server.send(message)
            assert await asyncio.to_thread(worker.receive) == message
        for message in TO_SERVER:
            await asyncio.to_thread(worker.send, message)
            assert await server.receive() == message
        server.close()
        assert await asyncio.to_thread(worker.receive) is None
        theirs.close()

    run(test())


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\0",
        b"\0\0\0\x10short",
        framed(b"no MessagePack"),
        framed(msgspec.msgpack.encode({"type": "Unknown"})),
        framed(msgspec.msgpack.encode(TO_WORKER[2])),
        framed(msgspec.msgpack.encode({"type": "Made", "job": 1})),
        framed(decoded((5, 32, 48, 3), b"too little")),
        struct.pack(">I", protocol.MOST_BYTES + 1),
    ],
    ids=[
        "nothing",
        "half a length",
        "half a body",
        "garbage",
        "unknown",
        "the wrong way",
        "a wrong type",
        "too few",
        "too large",
    ],
)
def test_who_says_what_it_never_should_is_gone(sent):
    async def test():
        ours, theirs = socket.socketpair()
        server = await ServerEnd.of(ours)
        theirs.sendall(sent)
        if len(sent) != 4:  # what is too large is refused before it is read
            theirs.close()
        assert await server.receive() is None
        server.close()
        theirs.close()

    run(test())


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x10short"])
def test_a_server_that_is_gone(sent):
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(sent)
        ours.close()
        assert WorkerEnd(theirs).receive() is None


def test_a_server_that_was_killed_before_it_had_read_all():
    ours, theirs = socket.socketpair()
    with theirs:
        worker = WorkerEnd(theirs)
        worker.send(TO_SERVER[0])
        ours.close()  # which the other side sees as a connection that was reset
        assert worker.receive() is None
        with pytest.raises(OSError):
            worker.send(TO_SERVER[0])
