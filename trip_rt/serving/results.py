"""The files of finished clips: a folder each, drafted beside the others and moved to its place whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trip_rt import video
from trip_rt.files import disk_full

VIDEO, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.jpg"
_DRAFTS = ".drafts"
_LONGEST_SIDE = 4096  # pixels of a spritesheet


def draft_path(folder: Path, name: str) -> Path:
    """Where a draft of that name is."""
    return folder / _DRAFTS / name


def warm_up_name(pid: int) -> str:
    """Of the draft that a worker, the process of that number, writes while it warms up."""
    return f"warm-up-{pid}"


def remove_draft(folder: Path, name: str) -> None:
    shutil.rmtree(draft_path(folder, name), ignore_errors=True)


@contextlib.contextmanager
def draft(folder: Path, name: str, keep: bool = False) -> Iterator[Path]:
    """A new folder among the drafts of `folder` to write to. An error leaves nothing of it; `keep` what was written
    otherwise."""
    path = draft_path(folder, name)
    try:
        with disk_full(path):
            path.mkdir(parents=True)
            yield path
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            remove_draft(folder, name)


def write(folder: Path, frames: NDArray[np.uint8], fps: float) -> int:
    """The files of a clip, uint8 [F, H, W, 3]; returns how many bytes they take. The spritesheet has all frames, row by
    row, scaled down where they would be too large."""
    video.save(frames, folder / VIDEO, fps)
    Image.fromarray(frames[0]).save(folder / THUMBNAIL, "WEBP", quality=85)
    spritesheet(frames).save(folder / SPRITESHEET, "JPEG", quality=85)
    return sum(path.stat().st_size for path in folder.iterdir())


def spritesheet(frames: NDArray[np.uint8]) -> Image.Image:
    """All frames in as many columns as rows, or one more."""
    count, height, width, _ = frames.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[:count] = frames
    tiled = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    sheet = Image.fromarray(tiled)
    sheet.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return sheet


def read_frames(path: Path) -> list[NDArray[np.uint8]]:
    """The frames of a video that `write` wrote, uint8 [H, W, 3] each."""
    import av

    with av.open(str(path)) as container:
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)]


def read_frame(path: Path, index: int) -> NDArray[np.uint8]:
    """One of them, counted from 0."""
    import av

    with av.open(str(path)) as container:
        frame = next(itertools.islice(container.decode(video=0), index, None))
        return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


class Results:
    """The folder of all results. What clients call a job never touches a path: a result's folder is named by the
    server."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / _DRAFTS).mkdir(parents=True, exist_ok=True)
        self.bytes = 0

    def sweep(self, known: dict[str, int]) -> None:
        """Remove all that is not in `known`, the names and sizes of finished results: drafts, and results whose job
        nobody completed."""
        for path in self.folder.iterdir():
            if path.name == _DRAFTS:
                for left in path.iterdir():
                    shutil.rmtree(left, ignore_errors=True)
            elif path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        self.bytes = sum(known.values())

    def take(self, name: str, size: int) -> None:
        """Move a finished draft to its place; OSError where it is not there."""
        os.rename(draft_path(self.folder, name), self.folder / name)
        self.bytes += size

    def remove(self, name: str, size: int) -> None:
        """Remove a result."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self.bytes -= size

    def path(self, name: str, file: str) -> Path:
        return self.folder / name / file
