"""Opens what a recipe names as its data: the demo world, a folder of videos, shards, or a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from trip_reference.data.annotations import ANNOTATIONS, VALIDATION, held_out
from trip_reference.data.cache import INDEX, CachedClips
from trip_reference.data.folder import VideoFolder
from trip_reference.data.sample import BrokenClip, ClipDataset, ClipFormat, Sample, evenly
from trip_reference.data.shard_files import RawSample, decode_sample, read_shard
from trip_reference.data.shards import ShardSource
from trip_reference.demo_world.clips import DemoWorldClips
from trip_reference.demo_world.paths import DemoPathClips
from trip_reference.training.config import DataConfig
from trip_rt.config import TripConfig
from trip_rt.errors import InputError, printable
from trip_rt.launch import note

DEMO, DEMO_PATHS = "demo", "demo-paths"
AUTO = "auto"  # data.validation: what the source itself holds out


def open_source(
    source: str,
    config: TripConfig,
    clip: ClipFormat,
    clips: int,
    shuffle: int,
    validation: bool = False,
    remote: bool = False,
) -> ClipDataset | ShardSource:
    """The clips that `source` names: `demo`, `demo-paths` (which have a control), a cache, a folder with annotations,
    or shards (a folder or a pattern such as part-{000..099}.tar).

    `validation` takes the held-out clips of the demo world, and a folder's val_annotations.json where there is one.
    `remote` allows shards that are fetched, or that a command gives (shards.list_shards).
    """
    if source == DEMO:
        return DemoWorldClips(config, clips, held_out=validation)
    if source == DEMO_PATHS:
        return DemoPathClips(config, clips, held_out=validation)
    folder = Path(source)
    if (folder / INDEX).is_file():
        return CachedClips(folder)
    name = held_out(folder) if validation else ANNOTATIONS
    if (folder / name).is_file():
        return VideoFolder(folder, clip, name)
    if source.endswith(".tar") or any(folder.glob("*.tar")):
        return ShardSource(source, clip, shuffle, remote)
    raise InputError(
        f"data: found neither {ANNOTATIONS}, shards nor {INDEX} in {source}, expected a data set; `trip-data demo`"
        " writes one to try"
    )


def open_held_out(data: DataConfig, trip: TripConfig, clips: int) -> tuple[ClipDataset | ShardSource | None, str]:
    """The clips that a run validates on, always cut the same way, and in words which they are; None for none.

    `auto` takes what the source itself holds out, and never another data set. `clips` are those of the demo world.
    """
    source = data.validation
    if source == AUTO:
        source = _held_out_by(data.source)
        if not source:
            return None, f"none, as {printable(data.source)} holds no clips out"
    if not source:
        return None, "none"
    opened = open_source(source, trip, clip_format(data, trip, steady=True), clips, 1, validation=True)
    name = str(Path(source) / held_out(Path(source))) if isinstance(opened, VideoFolder) else source
    return opened, printable(name)


def _held_out_by(source: str) -> str:
    """Where a source has held-out clips; empty where it has none."""
    folder = Path(source)
    if source in (DEMO, DEMO_PATHS) or ((folder / ANNOTATIONS).is_file() and (folder / VALIDATION).is_file()):
        return source
    val = folder / "val"
    return str(val) if not (folder / ANNOTATIONS).is_file() and any(val.glob("*.tar")) else ""


def read_some(source: ClipDataset | ShardSource, most: int) -> list[Sample]:
    """At most `most` clips, each cut as its number says: the first of shards, evenly spread ones of other sources.
    Warns of those that cannot be read; InputError where none can."""
    samples: list[Sample] = []
    for number, read in enumerate(_readers(source, most)):
        try:
            samples.append(read(np.random.default_rng(number)))
        except BrokenClip as error:
            note(f"warning: left out: {error}")
        if len(samples) == most:
            break
    if not samples:
        raise InputError("data: found no clip that could be read; `trip-data check` reports on a data set")
    return samples


def _readers(source: ClipDataset | ShardSource, most: int) -> Iterator[Callable[[np.random.Generator], Sample]]:
    if isinstance(source, ShardSource):
        for raw in chain.from_iterable(read_shard(shard, source.clip) for shard in source.shards):
            if isinstance(raw, RawSample):
                yield partial(decode_sample, raw, source.clip)
    else:
        for index in evenly(len(source), most):
            yield partial(source.clip, index)


def clip_format(data: DataConfig, trip: TripConfig, steady: bool = False) -> ClipFormat:
    """How clips are cut out of videos for this model; `steady`: always the same cut."""
    crop, start = ("centre", "first") if steady else (data.crop, data.start)
    return ClipFormat(trip.num_frames, trip.height, trip.width, data.fps, data.stride, crop, start)
