"""Checks a data set before training spends hours on it: what is there, and what is broken."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from trip_reference.data.annotations import ANNOTATIONS, VALIDATION, read_annotations
from trip_reference.data.sample import BrokenClip, ClipFormat
from trip_reference.data.shard_files import read_shard
from trip_reference.data.shards import list_shards
from trip_reference.data.videos import SUFFIXES, open_video, read_clip
from trip_reference.data.words import words_of
from trip_reference.data.workers import follow_the_parent
from trip_rt.errors import EngineError, printable

NAMED = 20  # files that a list names; it counts the rest


@dataclass(frozen=True)
class Finding:
    """What one clip is. A broken one has its `reason` and nothing else but its `text`, which only clips of shards
    have."""

    reason: str = ""
    bytes: int = 0
    seconds: float = 0.0
    fps: float | None = None
    size: str = ""
    short: bool = False
    text: str | None = None


def check_folder(
    folder: Path, clip: ClipFormat, workers: int | None = None, tokenizer_json: str | None = None
) -> dict[str, Any]:
    """A report on a folder of videos with annotations.json, or of shards: `train`, `val` (None without one) and
    `unused_videos`.

    One clip of every video is decoded, in `workers` processes (as many as cores; 0 for none but this). With a
    tokenizer.json's text, the report says which words that does not know. InputError for a folder that is neither.
    """
    folder = Path(folder)
    if (folder / ANNOTATIONS).exists() or not any(folder.glob("*.tar")):
        return _check_videos(folder, clip, workers, tokenizer_json)
    val = folder / "val"
    return {
        "kind": "shards",
        "train": _check_shards(folder, clip, workers, tokenizer_json),
        "val": _check_shards(val, clip, workers, tokenizer_json) if any(val.glob("*.tar")) else None,
        "unused_videos": _named([]),
    }


def broken_count(figures: dict[str, Any]) -> int:
    """The number of broken clips in a report."""
    return sum(figures[split]["broken"]["count"] for split in ("train", "val") if figures[split])


def _check_videos(folder: Path, clip: ClipFormat, workers: int | None, tokenizer_json: str | None) -> dict[str, Any]:
    files = {"train": ANNOTATIONS, "val": VALIDATION}
    splits = {
        split: read_annotations(folder, file)
        for split, file in files.items()
        if split == "train" or (folder / file).exists()
    }
    used: set[str] = set()
    report: dict[str, Any] = {"kind": "folder", "val": None}
    for split, entries in splits.items():
        videos = list(dict.fromkeys(str(entry.video) for entry in entries))
        used.update(map(os.path.normpath, videos))
        findings = [
            finding
            for findings_of_video in _in_processes(
                partial(_find_in_video, clip=clip), videos, workers, f"check {split}"
            )
            for finding in findings_of_video
        ]
        report[split] = _summary(findings, [entry.text for entry in entries], tokenizer_json)
    unused = [os.path.relpath(path, folder) for path in _videos_in(os.path.realpath(folder)) if path not in used]
    return report | {"unused_videos": _named(sorted(unused))}


def _check_shards(folder: Path, clip: ClipFormat, workers: int | None, tokenizer_json: str | None) -> dict[str, Any]:
    per_shard = _in_processes(
        partial(_find_in_shard, clip=clip), list_shards(str(folder)), workers, f"check {folder.name}"
    )
    findings = [finding for findings_of_shard in per_shard for finding in findings_of_shard]
    return _summary(findings, [finding.text for finding in findings if finding.text is not None], tokenizer_json)


def _find_in_video(path: str, clip: ClipFormat) -> list[Finding]:
    return [_find(Path(path), path, clip, None)]


def _find_in_shard(shard: str, clip: ClipFormat) -> list[Finding]:
    findings = []
    for raw in read_shard(shard, clip):
        try:
            if isinstance(raw, BrokenClip):
                raise raw
            findings.append(_find(io.BytesIO(raw.video), raw.name, clip, raw.text))
        except BrokenClip as error:
            findings.append(Finding(str(error)))
    return findings


def _find(source: Path | BinaryIO, name: str, clip: ClipFormat, text: str | None) -> Finding:
    try:
        with open_video(source, name, clip) as video:
            read_clip(video, clip, np.random.default_rng(0))
            size = f"{video.width}x{video.height}"
            return Finding("", video.bytes, video.seconds, video.fps, size, not video.covers(clip), text)
    except BrokenClip as error:
        return Finding(str(error), text=text)


def _in_processes(
    find: Callable[[str], list[Finding]], names: Sequence[str], workers: int | None, label: str
) -> Iterable[list[Finding]]:
    """`find` of every name, in order."""
    with tqdm(total=len(names), desc=label, unit="file", disable=None) as progress:
        if workers == 0:
            return [_counted(find(name), progress) for name in names]
        workers = min(workers or os.cpu_count() or 1, len(names))
        # Spawned, not forked: torch and FFmpeg may have threads here already.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_the_parent)
        try:
            futures = [pool.submit(find, name) for name in names]
            for future in as_completed(futures):
                _counted(future.result(), progress)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise EngineError(
                f"{label}: a decoding process was killed, by lack of memory or a fault of the decoder; try again with"
                " --workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _counted(findings: list[Finding], progress: Any) -> list[Finding]:
    progress.update()
    return findings


def _videos_in(folder: str) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        yield from (os.path.join(parent, file) for file in files if file.lower().endswith(SUFFIXES))


def _summary(findings: list[Finding], captions: list[str], tokenizer_json: str | None) -> dict[str, Any]:
    readable = [finding for finding in findings if not finding.reason]
    seconds = [finding.seconds for finding in readable]
    return {
        "captions": len(captions),
        "videos": len(findings),
        "bytes": sum(finding.bytes for finding in readable),
        "short": sum(finding.short for finding in readable),
        "seconds": _spread(seconds) | {"total": round(sum(seconds), 2)},
        "resolutions": dict(Counter(finding.size for finding in readable).most_common(NAMED)),
        "fps": dict(
            Counter(f"{finding.fps:.4g}" if finding.fps else "single frame" for finding in readable).most_common(NAMED)
        ),
        "broken": _named([finding.reason for finding in findings if finding.reason]),
        "caption_words": _spread([len(caption.split()) for caption in captions]),
        "vocabulary": words_of(tokenizer_json, captions).figures() if tokenizer_json else None,
        "duplicate_captions": len(captions) - len(set(captions)),
    }


def _spread(values: list[float] | list[int]) -> dict[str, float | None]:
    """min, median, p95 and max; each None where there are no values."""
    return {name: round(float(np.percentile(values, share)), 2) if values else None for name, share in _SHARES.items()}


_SHARES = {"min": 0, "median": 50, "p95": 95, "max": 100}


def _named(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "first": [printable(name) for name in names[:NAMED]]}
