"""Small videos for the tests of training data, each frame one grey that says which it is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def grey(number):
    return 10 + 6 * number


def number(frame):
    """Which frame it was: greys come back within 2 of what they were."""
    return round((float(frame.mean()) - 10) / 6)


def numbers(frames):
    return [number(frame) for frame in frames]


def write_video(
    path: Path,
    frames,
    times=None,
    fps=8,
    codec="libx264",
    gop=4,
    bframes=2,
    start=0,
    rotation=0,
    pixel_aspect=None,
    pixels="yuv420p",
    faststart=False,
):
    """`frames` is a list of numbers, or uint8 [F, H, W, 3]; `times` and `start` are in milliseconds."""
    pictures = [np.full((64, 64, 3), grey(frame), np.uint8) if np.isscalar(frame) else frame for frame in frames]
    options = {"bf": str(bframes), "b_strategy": "0", "sc_threshold": "0"} if codec == "libx264" else {}
    with av.open(str(path), "w", options={"movflags": "+faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = start + round(1000 * i / fps if times is None else times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
