"""What trip-animate is asked to make: read, and checked as far as that is cheap, before any slow work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt import video
from trip_rt.checks import text
from trip_rt.errors import InputError, printable
from trip_rt.images import Fit, check_png, load_image
from trip_rt.settings import check_prompt, check_seed

MAX_BATCH_FILE_MEGABYTES = 16
MAX_HELD_MEGABYTES = 64  # of fitted pictures
MAX_SHEET_CLIPS = 200  # a row of the contact sheet takes about 4 MB
_FIELDS = {"image": str, "prompt": str, "output": str, "seed": int}


@dataclass(frozen=True)
class Job:
    """One clip to make; `where` names the line that asks for it, to begin an error with."""

    image: str
    prompt: str
    output: str
    seed: int
    where: str = ""


def read_batch(path: Path, seed: int) -> list[Job]:
    """The jobs of a JSON Lines file, `seed` where a line has none; InputError names the first line that is wrong. The
    file may be a pipe: whoever runs the command names it."""
    try:
        with path.open("rb") as file:
            data = file.read((MAX_BATCH_FILE_MEGABYTES << 20) + 1)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), expected a file of JSON Lines; check the path"
        ) from error
    if len(data) > MAX_BATCH_FILE_MEGABYTES << 20:
        raise InputError(
            f"{path}: found more than {MAX_BATCH_FILE_MEGABYTES} MB, expected a file of JSON Lines; split it"
        )
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    jobs = [_job(line, seed, f"{path}, line {number}: ") for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise InputError(
            f'{path}: found no clips, expected a line like {{"image": "a.png", "prompt": "a ball rolls", "output":'
            ' "a.mp4"}'
        )
    return jobs


def _job(line: bytes, seed: int, where: str) -> Job:
    try:
        entry = json_object(line)
    except InputError as error:
        raise InputError(f"{where}{error} a line") from error
    if unknown := sorted(entry.keys() - _FIELDS.keys()):
        raise InputError(f"{where}found the unknown key {unknown[0][:100]!r}, expected {', '.join(_FIELDS)}")
    entry.setdefault("seed", seed)
    for field, kind in _FIELDS.items():
        if field not in entry:
            raise InputError(f"{where}found no {field}, expected {', '.join(_FIELDS)} (the seed is optional)")
        if type(entry[field]) is not kind:
            raise InputError(
                f"{where}{field}: found a {type(entry[field]).__name__}, expected a"
                f" {'whole number' if kind is int else 'string'}"
            )
        if kind is str:
            text(f"{where}{field}", entry[field])
    return Job(entry["image"], entry["prompt"], entry["output"], entry["seed"], where)


def json_object(data: bytes) -> dict[str, Any]:
    """The object that a row of a batch is in JSON; InputError for what is none."""
    try:
        entry = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)[:100]
        )
        raise InputError(f"found no JSON ({reason}), expected an object") from error
    if not isinstance(entry, dict):
        raise InputError(f"found a JSON {type(entry).__name__}, expected an object")
    return entry


def check_jobs(jobs: Sequence[Job], contact_sheet: Path | None) -> None:
    """InputError unless every clip is asked for properly and can be written where it should go, without harm to another
    or to a picture."""
    taken: dict[str, str] = {}  # by real path; a folder that something is in ends with a separator
    for picture in {os.path.realpath(job.image) for job in jobs if "\0" not in job.image}:
        taken[picture] = taken[os.path.join(os.path.dirname(picture), "")] = "the picture of a clip"
    for job in jobs:
        with _located(job):
            check_prompt(job.prompt)
            check_seed(job.seed)
            video.output_format(job.output)
            _claim(job.output, "another clip", taken)
    if contact_sheet:
        check_png(contact_sheet, "the contact sheet")
        if len(jobs) > MAX_SHEET_CLIPS:
            raise InputError(
                f"contact sheet: found {len(jobs)} clips, expected at most {MAX_SHEET_CLIPS}; leave --contact-sheet out"
            )
        _claim(contact_sheet, "the contact sheet", taken)


def _claim(path: str | Path, what: str, taken: dict[str, str]) -> None:
    """InputError where `path` is taken, or is in or around a path that is: a folder of frames is replaced as a
    whole."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    for place in (target, folder, os.path.join(target, "")):
        if place in taken:
            raise InputError(
                f"{printable(str(path))}: found that it would replace or disturb {taken[place]}; choose another name"
            )
    taken[target] = taken[os.path.join(folder, "")] = what


class Pictures:
    """The jobs' pictures at the model's size, uint8 [H, W, 3] each: `check` loads every one before the slow work, and
    as many stay in memory as fit a bound."""

    def __init__(self, height: int, width: int, fit: Fit):
        self._fitting = height, width, fit
        self._kept: dict[str, NDArray[np.uint8]] = {}
        self._bytes = 0

    def check(self, jobs: Sequence[Job]) -> None:
        """InputError for a picture that cannot be used."""
        checked: set[str] = set()
        for job in jobs:
            if job.image not in checked:
                checked.add(job.image)
                picture = self.of(job)
                if self._bytes + picture.nbytes <= MAX_HELD_MEGABYTES << 20:
                    self._bytes += picture.nbytes
                    self._kept[job.image] = picture

    def of(self, job: Job) -> NDArray[np.uint8]:
        """A job's picture; InputError where it cannot be used."""
        if job.image in self._kept:
            return self._kept[job.image]
        with _located(job):
            return load_image(job.image, *self._fitting)


@contextmanager
def _located(job: Job) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{job.where}{error}") from error
