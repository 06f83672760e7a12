"""What makes a batch's clips: the bundle, opened once a process, and the rule that a clip that is there is done.

A clip is named by the hash of all that it is made of. It appears whole, and whoever makes it holds a lock of that name,
which the system takes back from a process that dies. So no clip is made twice, by equal rows, by two processes or by a
run that begins where a killed one ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trip_rt import video
from trip_rt.animator import Animator
from trip_rt.backends import EngineOptions
from trip_rt.bundle import MANIFEST, MAX_MANIFEST_BYTES
from trip_rt.cluster.rows import MOST_PICTURE, Row
from trip_rt.errors import EngineError, InputError, one_line, printable
from trip_rt.images import load_image
from trip_rt.plain_files import read_plain
from trip_rt.settings import Settings

OPENER = "trip_rt.cluster.clip_maker:open_bundle_of"
CLIPS, NAMED, RESULTS, LOCK = "clips", "named", "results", ".lock"
MOST_TRIES = 3  # processes that a clip may take down
MOST_ERROR = 1000  # characters


@dataclass(frozen=True)
class Work:
    """What a run's processes are told: where the bundle is and its identity, where clips go, how they are made.

    Paths of rows are relative to `here`. `opener` is the import path `module:function` of what gives the animator for a
    Work.
    """

    bundle: str
    identity: str
    folder: str
    here: str
    profile: str
    backend: str
    options: EngineOptions
    settings: Settings
    fps: float
    opener: str = OPENER


@dataclass(frozen=True)
class Result:
    """A row of the results' table. `seconds` is what making the clip took, None where it was there already."""

    key: str
    image: str
    prompt: str
    seed: int
    output: str
    status: Literal["completed", "failed"]
    error: str = ""
    frames: int = 0
    fps: float = 0.0
    seconds: float | None = None


def identity_of(bundle: Path) -> str:
    """Hex SHA-256 of the manifest, which has the hash of every other file of the bundle."""
    return hashlib.sha256(read_plain(bundle / MANIFEST, "a bundle's manifest", MAX_MANIFEST_BYTES)).hexdigest()


def key_of(work: Work, picture: bytes, prompt: str, seed: int) -> str:
    """The name of a clip, 32 hex digits. The backend is no part of it."""
    settings = dataclasses.asdict(work.settings)
    made_of = [work.identity, work.profile, hashlib.sha256(picture).hexdigest(), prompt, seed, settings, work.fps]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def open_bundle_of(work: Work) -> Animator:
    """The animator of a Work; InputError where the bundle here is another than where the run was started."""
    if identity_of(Path(work.bundle)) != work.identity:
        raise InputError(f"{work.bundle}: found another bundle than on the first machine, expected the same on all")
    return Animator(work.bundle, work.backend, work.profile, work.options)


class ClipMaker:
    """One process's engines. Not for threads: the system's locks are a process's."""

    def __init__(self, work: Work):
        self._work = work
        module, _, function = work.opener.partition(":")
        self._animator = getattr(importlib.import_module(module), function)(work)
        self._clips = Path(work.folder) / CLIPS
        self._lock = (Path(work.folder) / LOCK).open("r+b")  # closing any other handle would drop the locks
        self._fitting = (*work.settings.picture_size(self._animator.config), work.settings.fit)
        self._frames = work.settings.frames(self._animator.config)

    def close(self) -> None:
        """Free the engines."""
        self._lock.close()
        self._animator.close()

    def made(self, rows: Sequence[Row]) -> list[Result]:
        """A result a row, in their order, whatever becomes of the rows."""
        keys: list[str] = []
        errors: dict[int, str] = {}
        wanted: dict[str, tuple[Row, bytes]] = {}
        for i, row in enumerate(rows):
            try:
                if row.error:
                    raise InputError(row.error)
                picture = self._picture(row)
                keys.append(key_of(self._work, picture, row.prompt, row.seed))
                if not self._path(keys[i]).exists():
                    wanted.setdefault(keys[i], (row, picture))
            except Exception as error:
                keys.append("")
                errors[i] = _said(row, error)
        made = self._make(wanted)
        told: set[str] = set()
        results = []
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            outcome = made.get(key)
            wrong = errors.get(i) or (_said(row, outcome) if isinstance(outcome, Exception) else "")
            if not wrong and row.output:
                wrong = self._named(row, key)
            seconds = outcome if isinstance(outcome, float) and key not in told else None
            told.add(key)
            about = row.image, row.prompt, row.seed, row.output
            if wrong:
                results.append(Result(key, *about, "failed", wrong[:MOST_ERROR]))
            else:
                results.append(Result(key, *about, "completed", "", self._frames, self._work.fps, seconds))
        return results

    def _picture(self, row: Row) -> bytes:
        if row.picture is not None:
            return row.picture
        return read_plain(os.path.join(self._work.here, row.image), "a picture file", MOST_PICTURE)

    def _path(self, key: str) -> Path:
        return self._clips / f"{key}.mp4"

    def _make(self, wanted: dict[str, tuple[Row, bytes]]) -> dict[str, float | Exception | None]:
        """Make what is not there, a group of the engines' size at a time: seconds, None for what another process made
        meanwhile, or what went wrong."""
        made: dict[str, float | Exception | None] = {}
        batch = self._animator.profile.batch
        keys = list(wanted)
        for start in range(0, len(keys), batch):
            group = keys[start : start + batch]
            with self._locked(group):
                for some in self._groups(group, made):
                    for key in some:
                        with self._tries(key).open("ab") as file:
                            file.write(b".")
                    self._make_group(some, wanted, made)
                    for key in some:
                        self._tries(key).unlink(missing_ok=True)
        return made

    @contextlib.contextmanager
    def _locked(self, keys: Sequence[str]) -> Iterator[None]:
        """The keys' own bytes of the lock's file, lowest first, so that no two processes wait for each other. Byte 0 is
        the run's own."""
        bytes_of_keys = sorted({1 + int(key[:15], 16) for key in keys})
        try:
            for byte in bytes_of_keys:
                fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, byte)
            yield
        finally:
            for byte in bytes_of_keys:
                fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, byte)

    def _groups(self, keys: Sequence[str], made: dict[str, float | Exception | None]) -> list[list[str]]:
        """The keys that are to be made, in groups: those that a process died of each by itself, those that several died
        of not at all."""
        fresh, again = [], []
        for key in keys:
            if self._path(key).exists():
                made[key] = None
                continue
            tries = self._tries(key)
            before = tries.stat().st_size if tries.exists() else 0
            if before >= MOST_TRIES:
                tries.unlink()
                made[key] = EngineError(
                    f"found that {before} processes ended while they made it, expected a clip; look at the machines'"
                    " memory and at the picture"
                )
            elif before:
                again.append([key])
            else:
                fresh.append(key)
        return [fresh, *again] if fresh else again

    def _tries(self, key: str) -> Path:
        """As many bytes as processes began to make the clip; whoever lives to see it made or failed removes it."""
        return self._clips / f".{key}.tries"

    def _make_group(
        self, keys: Sequence[str], wanted: dict[str, tuple[Row, bytes]], made: dict[str, float | Exception | None]
    ) -> None:
        fitted: dict[str, NDArray[np.uint8]] = {}
        for key in keys:
            try:
                fitted[key] = load_image(io.BytesIO(wanted[key][1]), *self._fitting)
            except Exception as error:
                made[key] = error
        if not fitted:
            return
        began = time.perf_counter()
        rows = [wanted[key][0] for key in fitted]
        try:
            latents = self._animator.latents(
                np.stack(list(fitted.values())),
                [row.prompt for row in rows],
                [row.seed for row in rows],
                settings=self._work.settings,
            )
        except Exception as error:
            made |= dict.fromkeys(fitted, error)
            return
        shared = (time.perf_counter() - began) / len(fitted)
        for (key, picture), clip in zip(fitted.items(), latents, strict=True):
            began = time.perf_counter()
            try:
                frames = np.concatenate(list(self._animator.decode(clip, picture)))
                video.save(frames, self._path(key), self._work.fps)
                made[key] = shared + time.perf_counter() - began
            except Exception as error:
                made[key] = error

    def _named(self, row: Row, key: str) -> str:
        """Give the clip the name that its row asks for; the error where that is another clip's."""
        target = Path(self._work.folder) / NAMED / row.output
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._path(key), target)
            except FileExistsError:
                if not target.samefile(self._path(key)):
                    raise InputError(
                        f"{printable(row.output)}: found that name taken by another clip, expected a free one"
                    ) from None
        except Exception as error:
            return _said(row, error)
        return ""


def _said(row: Row, error: Exception) -> str:
    """An error as one line that begins with the row's place."""
    words = one_line(error, MOST_ERROR)
    if not isinstance(error, (InputError, EngineError)):
        words = f"{type(error).__name__}: {words}"
    return words if words.startswith(row.where) else f"{row.where}: {words}"


def swept(clips: Path, tries: bool = False) -> None:
    """Remove what processes that were killed left half written, and with `tries` what is known of their number."""
    with os.scandir(clips) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith((".part", ".tries") if tries else ".part"):
                Path(entry.path).unlink(missing_ok=True)
