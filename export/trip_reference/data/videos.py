"""Clips from video files: frames are chosen by presentation time, and cropped to the wanted shape without
distortion."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trip_reference.data.cut import check_pixels, cut_picture
from trip_reference.data.sample import BrokenClip, ClipFormat, Frames
from trip_rt.errors import printable

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
# Playlists and the like are left out: they would have FFmpeg open other files.
_CONTAINERS = "mov,mp4,matroska,webm,avi"
_EXPECTED = "expected a video file (mp4, mov, webm, mkv, avi)"
_LATE = 1.5e-3  # seconds; webm and mkv round times to milliseconds, and the first frame's time is rounded too
_MOST_FPS = 1000


@dataclass(frozen=True)
class Video:
    """A video file and what its packets say: `ticks` are the presentation times of its frames, ascending, in units of
    `tick` seconds.

    `keys` are those of its keyframes. `pixel_aspect` is the width of a pixel over its height. `cut_off`: the header
    promises more than there is.
    """

    file: BinaryIO
    bytes: int
    width: int
    height: int
    tick: float
    pixel_aspect: float
    ticks: NDArray[np.int64]
    keys: NDArray[np.int64]
    cut_off: bool

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return float(self.ticks[-1] - self.ticks[0]) * self.tick

    def covers(self, clip: ClipFormat) -> bool:
        """Whether it is long enough for a whole clip."""
        return self.seconds + _LATE >= (clip.num_frames - 1) * (clip.stride / clip.fps)

    @property
    def fps(self) -> float | None:
        """None for a single frame."""
        return (len(self.ticks) - 1) / self.seconds if self.seconds > 0 else None


def decode_clip(source: Path | BinaryIO, name: str, clip: ClipFormat, rng: np.random.Generator) -> Frames:
    """One clip, uint8 [F, H, W, 3], of the video `source`, which messages call `name`. Where the video is too short,
    its last frame is repeated.

    Raises BrokenClip. Memory holds one decoded picture beside the result.
    """
    with open_video(source, name, clip) as video:
        return read_clip(video, clip, rng)


@contextmanager
def open_video(source: Path | BinaryIO, name: str, clip: ClipFormat) -> Iterator[Video]:
    """The video within the format's limits; whatever goes wrong with it until it is closed raises BrokenClip."""
    try:
        with _plain_file(source) if isinstance(source, Path) else nullcontext(source) as file:
            yield _examine(file, clip)
    except BrokenClip as error:
        raise BrokenClip(f"{printable(name)}: {error}") from error
    except Exception as error:  # a hostile file can raise nearly anything from inside a decoder
        reason = printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:120]
        raise BrokenClip(f"{printable(name)}: found a damaged or unsupported video ({reason}), {_EXPECTED}") from error


def read_clip(video: Video, clip: ClipFormat, rng: np.random.Generator) -> Frames:
    """One clip of the opened video, uint8 [F, H, W, 3]."""
    times = (video.ticks - video.ticks[0]) * video.tick
    grid = np.arange(clip.num_frames) * (clip.stride / clip.fps)
    # The number of frames at which a whole clip can begin; a video shorter than a clip begins at its first frame.
    starts = int(np.searchsorted(times, times[-1] - grid[-1] + _LATE, "right"))
    if video.cut_off and not video.covers(clip):
        raise BrokenClip(
            f"found a cut-off file with {video.seconds:.2f} s left, expected a whole one or at least {grid[-1]:.2f} s"
        )
    first = int(rng.integers(max(1, starts))) if clip.start == "random" else 0
    shown = np.searchsorted(times, times[first] + grid + _LATE, "right") - 1
    place = (rng.random(), rng.random()) if clip.crop == "random" else (0.5, 0.5)

    frames = np.empty((clip.num_frames, clip.height, clip.width, 3), np.uint8)
    last = None
    for i, picture in enumerate(_pictures(video, clip, video.ticks[shown].tolist())):
        frames[i] = frames[i - 1] if picture is last else cut_picture(picture, video.pixel_aspect, clip, place)
        last = picture
    return frames


def _plain_file(path: Path) -> BinaryIO:
    if not path.exists():
        raise BrokenClip(f"found no such file, {_EXPECTED}")
    if not path.is_file():
        raise BrokenClip(f"found something that is not a plain file, {_EXPECTED}")
    return path.open("rb")


def _examine(file: BinaryIO, clip: ClipFormat) -> Video:
    """Reads all packets and decodes none: headers may lie about lengths, and a cut-off file has only so many."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise BrokenClip(f"found an empty file (0 bytes), {_EXPECTED}")
    if size > clip.max_bytes:
        raise BrokenClip(f"found {size / 2**20:.1f} MiB, expected at most {clip.max_bytes / 2**20:.1f} MiB")
    ticks, keys, end = array("q"), array("q"), 0
    with _opened(file, clip) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        check_pixels(width, height, clip)
        tick, pixel_aspect = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
        # Where streams have no length, the container has that of the longest, which may be the sound's: allow 1 s.
        promised = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6 - 1
        for packet in _packets(container, stream):
            if packet.pts is not None and not packet.is_discard:
                ticks.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
                if packet.is_keyframe:
                    keys.append(packet.pts)
            if len(ticks) > clip.max_seconds * _MOST_FPS:
                raise BrokenClip(
                    f"found more than {len(ticks) - 1} frames, expected at most {clip.max_seconds:g} s of at most"
                    f" {_MOST_FPS} a second"
                )
    if not ticks:
        raise BrokenClip(f"found no frame with a presentation time, {_EXPECTED}")
    cut_off = (end - min(ticks)) * tick + 0.1 < promised
    video = Video(file, size, width, height, tick, pixel_aspect, np.unique(ticks), np.unique(keys), cut_off)
    if video.seconds > clip.max_seconds:
        raise BrokenClip(f"found {video.seconds:.1f} s, expected at most {clip.max_seconds:g} s")
    if not 0.1 <= pixel_aspect <= 10:
        raise BrokenClip(f"found pixels {pixel_aspect:g} times as wide as high, expected 0.1 to 10")
    return video


@contextmanager
def _opened(file: BinaryIO, clip: ClipFormat) -> Iterator[tuple[Any, Any]]:
    """Container and video stream, at their beginning."""
    import av

    file.seek(0)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    with av.open(file, container_options=options, metadata_errors="replace", buffer_size=2**18) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:  # None: of a codec that FFmpeg does not know
            raise BrokenClip(f"found no video stream that can be decoded, {_EXPECTED}")
        stream.codec_context.options = {"max_pixels": str(clip.max_pixels)}
        stream.codec_context.thread_count = 1  # loaders have a process for every core already
        yield container, stream


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets up to the end of the file or the first damaged one."""
    import av

    with suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                return
            if packet.size:  # the last is empty
                yield packet


def _pictures(video: Video, clip: ClipFormat, ticks: list[int]) -> Iterator[Any]:
    """The decoded picture shown at each of the ascending `ticks`; where pictures are lost to damage, the one before."""
    done, before = 0, None
    for picture in _decoded(video, clip, ticks[0]):
        while done < len(ticks) and picture.pts >= ticks[done]:
            yield picture if picture.pts == ticks[done] else _fresh(before, ticks[done], video, clip)
            done += 1
        if done == len(ticks):
            return
        if before is not None and picture.pts < before.pts:  # H.264 in avi, which has no place for them
            raise BrokenClip("found presentation times out of order, expected them to ascend; rewrite it as mp4")
        before = picture
    for tick in ticks[done:]:
        yield _fresh(before, tick, video, clip)


def _fresh(picture: Any, tick: int, video: Video, clip: ClipFormat) -> Any:
    if picture is None or (tick - picture.pts) * video.tick > clip.stride / clip.fps:
        raise BrokenClip(
            f"found no picture that can be decoded at {(tick - video.ticks[0]) * video.tick:.2f} s, {_EXPECTED}"
        )
    return picture


def _decoded(video: Video, clip: ClipFormat, tick: int) -> Iterator[Any]:
    """The pictures in order of presentation, beginning at or before `tick`: at its keyframe where seeking finds it,
    else at the first picture."""
    import av

    earlier = video.keys[video.keys <= tick]
    for key in (*earlier[-1:].tolist(), None):
        with _opened(video.file, clip) as (container, stream):
            if key is not None and key > video.ticks[0]:
                with suppress(av.FFmpegError):
                    container.seek(key, stream=stream)
            pictures = _decode_packets(container, stream)
            first = next(pictures, None)
            if first is not None and (first.pts <= tick or key is None):
                yield first
                yield from pictures
                return


def _decode_packets(container: Any, stream: Any) -> Iterator[Any]:
    """The decoded pictures; a packet that the decoder refuses is skipped."""
    import av

    for packet in chain(_packets(container, stream), [None]):  # None: the pictures that the decoder still holds back
        with suppress(av.error.InvalidDataError):
            yield from (
                picture for picture in stream.decode(packet) if picture.pts is not None and not picture.is_corrupt
            )
