"""Clips that some model made earlier: a folder of .mp4, .gif or .webp files, or of folders of PNG frames."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trip_rt.config import TripConfig
from trip_rt.errors import InputError, printable
from trip_rt.images import load_image

ENDINGS = (".mp4", ".gif", ".webp")


def read_clips(folder: Path, config: TripConfig, count: int) -> list[NDArray[np.uint8]]:
    """The first `count` clips in order of their names, uint8 [F, H, W, 3]: the n-th is of the n-th picture.

    InputError for a clip whose frames or size are not `config`'s: scaled or cut, it would be measured as another clip.
    """
    if not folder.is_dir():
        raise InputError(f"{_name(folder)}: found no such folder, expected one of clips")
    paths = [path for path in sorted(folder.iterdir()) if path.is_dir() or path.suffix.lower() in ENDINGS]
    if not paths:
        raise InputError(
            f"{_name(folder)}: found no clips, expected files ending in {', '.join(ENDINGS)} or folders of PNG frames"
        )
    clips, expected = [], (config.num_frames, config.height, config.width, 3)
    for path in paths[:count]:
        # One frame more than expected, to see that there are too many.
        pictures = _pngs(path) if path.is_dir() else _video(path, config.num_frames + 1)
        shapes = {picture.shape for picture in pictures}
        if len(pictures) != config.num_frames or shapes != {expected[1:]}:
            sizes = ", ".join(f"{width} × {height}" for height, width, _ in sorted(shapes)) or "no size"
            wanted = f"{config.num_frames} of {config.width} × {config.height}"
            remedy = "folders of PNG frames keep every one, where animations merge equal ones"
            raise InputError(
                f"{_name(path)}: found {len(pictures)} frames of {sizes}, expected {wanted}, as the model's; {remedy}"
            )
        clips.append(np.stack(pictures))
    return clips


def _pngs(folder: Path) -> list[NDArray[np.uint8]]:
    from PIL import Image

    pictures = []
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path, formats=("PNG",)) as header:
                width, height = header.size
        except Exception as error:  # a hostile file can raise nearly anything from inside a decoder
            raise InputError(
                f"{_name(path)}: found a file that cannot be read as PNG, expected a frame; save it again"
            ) from error
        pictures.append(load_image(path, height, width))
    return pictures


def _video(path: Path, most: int) -> list[NDArray[np.uint8]]:
    """The first `most` pictures of an animation by Pillow, of a video by PyAV."""
    import av
    from PIL import Image, ImageSequence

    try:
        if path.suffix.lower() == ".mp4":
            # As a file, and by these formats alone: FFmpeg takes names for addresses, and playlists open other files.
            options = {"format_whitelist": "mov,mp4", "protocol_whitelist": "file"}
            with path.open("rb") as file, av.open(file, container_options=options) as container:
                return [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), most)]
        with Image.open(path, formats=("GIF", "WEBP")) as animation:
            return [np.array(frame.convert("RGB")) for frame in islice(ImageSequence.Iterator(animation), most)]
    except Exception as error:  # as above
        reason = printable(str(error) or type(error).__name__)[:120]
        raise InputError(
            f"{_name(path)}: found a damaged or unsupported clip ({reason}), expected mp4, gif or webp; make it again"
        ) from error


def _name(path: Path) -> str:
    return printable(str(path))
