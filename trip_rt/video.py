"""Writing a clip: mp4 (H.264), gif, animated webp or a folder of PNGs, whole or not at all."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trip_rt.checks import real_number, shown
from trip_rt.errors import InputError, printable
from trip_rt.files import whole_file, whole_folder

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".mp4": "mp4", ".gif": "gif", ".webp": "webp", "": "png"}
_ACCEPTED = "expected a name ending in .mp4, .gif or .webp, or a folder (no ending) for PNG frames"
_FRAME_NAME = re.compile(r"frame_\d{4,}\.png")
MIN_FPS, MAX_FPS = 0.1, 240.0
_MB_TREE_WIDTH = 128  # pixels, 8 macroblocks: what x264's MB-tree takes at a time
_PALETTE_SAMPLE = 2**15  # pixels; k-means takes about 0.4 s for these and 6 to 9 s for 2**18

Frames = NDArray[np.uint8]


def output_format(path: str | os.PathLike[str]) -> str:
    """`mp4`, `gif`, `webp` or `png` (a folder of frames): how `save` would write `path`. Writes nothing.

    Call it before the work whose result is to be saved: it raises InputError for a name that `save` would refuse, a
    missing or read-only parent folder, and a folder that holds anything but the frames of an earlier run.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"output: found {shown(path)}, {_ACCEPTED}")
    given = os.fsdecode(path)
    name = printable(given)
    if not given or "\0" in given:
        raise InputError(f"output: found {name!r}, {_ACCEPTED}")
    target = os.path.realpath(given)
    parent, base = os.path.split(target)
    # Not os.path.splitext: it takes a file called ".mp4" for one without an ending.
    suffix = "." + base.rpartition(".")[2].lower() if "." in base else ""
    is_folder = os.path.isdir(target)
    if is_folder:
        if suffix in FORMATS and suffix:
            raise InputError(f"{name}: found a folder, expected a file or a free name; choose another name")
        _refuse_foreign(target, name)
    elif suffix not in FORMATS:
        raise InputError(f"{name}: found the ending {printable(suffix)!r}, {_ACCEPTED}")
    elif not os.path.isdir(parent):
        raise InputError(f"{name}: found no folder {printable(parent)}, expected it to exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{name}: found no permission to write in {printable(parent)}, expected it; choose another place"
        )
    try:
        if not is_folder and os.path.lexists(target) and not (suffix and os.path.isfile(target)):
            raise InputError(f"{name}: found a file or device of that name, {_ACCEPTED}; choose another name")
        os.stat(target)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _cannot_write(name, error) from error
    if FORMATS.get(suffix) == "mp4" and importlib.util.find_spec("av") is None:
        raise InputError(f"{name}: found no PyAV, expected it for mp4; run `pip install av`, or write .webp or .gif")
    return "png" if is_folder else FORMATS[suffix]


def check_fps(fps: float) -> None:
    """InputError for frames a second that no player would show."""
    real_number("fps", fps, MIN_FPS, MAX_FPS)


def save(frames: Frames, path: str | os.PathLike[str], fps: float) -> None:
    """Writes uint8 [F, H, W, 3] at `fps` frames a second to `path`, in the format `output_format` gives it.

    An existing clip is replaced only once the new one is complete; a failure or interrupt leaves nothing behind. mp4
    pads odd sides by repeating the last row or column; a gif's frame times are rounded to 1/100 s without drift, and it
    plays at most 50 a second. gif and webp store frames that do not change once, for longer. Raises InputError where
    `output_format` would, for a useless fps, and where the disk refuses.
    """
    kind, target, name = output_format(path), Path(os.path.realpath(os.fsdecode(path))), printable(os.fsdecode(path))
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: found {frames.dtype} {list(frames.shape)}, expected uint8 [F, H, W, 3]")
    check_fps(fps)
    frames = np.ascontiguousarray(frames)
    encoders: dict[str, Callable[[Frames, float], bytes]] = {"mp4": _mp4, "gif": _gif, "webp": _webp}
    # Everything is encoded in memory, so the only thing left to fail on disk is writing bytes.
    encoded = [_png(frame) for frame in frames] if kind == "png" else [encoders[kind](frames, fps)]
    try:
        if kind == "png":
            with whole_folder(target, replace=True) as part:
                for number, data in enumerate(encoded, 1):
                    (part / f"frame_{number:04d}.png").write_bytes(data)
                if target.is_dir():
                    _refuse_foreign(target, name)  # once more: encoding took a while
        else:
            with whole_file(target) as part:
                part.write_bytes(encoded[0])
    except OSError as error:
        raise _cannot_write(name, error) from error


def _mp4(frames: Frames, fps: float) -> bytes:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()

    def reopen(*_: object) -> io.BytesIO:
        # To move the index to the front, FFmpeg reads back what it has written, through a second handle.
        return io.BytesIO(buffer.getvalue())

    with av.open(buffer, "w", format="mp4", options={"movflags": "+faststart"}, io_open=reopen) as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16", "preset": "slow"}
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # x264 makes a slice a thread, so the file would depend on the number of cores
        if frames.shape[2] % _MB_TREE_WIDTH:
            # With B-frames x264's vectorised MB-tree reads memory beyond such rows that nothing has written, so that
            # equal frames gave different files.
            context.max_b_frames = 0
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def _gif(frames: Frames, fps: float) -> bytes:
    from PIL import Image

    # One palette for the clip and no dithering: colours and grain would otherwise flicker from frame to frame.
    pixels = frames.reshape(-1, 3)
    if len(pixels) > _PALETTE_SAMPLE:
        pixels = pixels[np.random.default_rng(0).integers(len(pixels), size=_PALETTE_SAMPLE)]
    # 255: one index stays free for unchanged pixels. k-means is worth 2 to 4 dB over median cut alone.
    palette = Image.fromarray(pixels[:, None]).quantize(255, Image.Quantize.MEDIANCUT, kmeans=1)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [max(2, ticks) * 10 for ticks in _durations(len(frames), fps, 100)]
    return _animation(pictures, "GIF", durations)


def _webp(frames: Frames, fps: float) -> bytes:
    from PIL import Image

    return _animation(
        [Image.fromarray(frame) for frame in frames], "WEBP", _durations(len(frames), fps, 1000), quality=90
    )


def _png(frame: Frames) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def _animation(pictures: list[Image.Image], kind: str, durations: list[int], **options: object) -> bytes:
    buffer = io.BytesIO()
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options)
    return buffer.getvalue()


def _durations(count: int, fps: float, ticks_per_second: int) -> list[int]:
    """Whole ticks each frame is shown, such that frame i starts within half a tick of i / fps."""
    return [int(ticks) for ticks in np.diff(np.rint(np.arange(count + 1) * ticks_per_second / fps))]


def _refuse_foreign(folder: str | Path, name: str) -> None:
    try:
        foreign = sorted(entry for entry in os.listdir(folder) if not _FRAME_NAME.fullmatch(entry))
    except OSError as error:
        raise _cannot_write(name, error) from error
    if foreign:
        found, remedy = f"a folder that holds {printable(foreign[0])!r}", "name a new folder, or a file ending in .mp4"
        raise InputError(f"{name}: found {found}, expected an empty one or only earlier frames; {remedy}")


def _cannot_write(name: str, error: OSError) -> InputError:
    reason = (error.strerror or type(error).__name__).lower()
    return InputError(f"cannot write {name}: {printable(reason)}; choose another place")
