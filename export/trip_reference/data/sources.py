"""Opens what a recipe names as its data: the demo world, a folder of videos, shards, or a cache."""

from __future__ import annotations

from pathlib import Path

from trip_reference.data.annotations import ANNOTATIONS, held_out
from trip_reference.data.cache import INDEX, CachedClips
from trip_reference.data.folder import VideoFolder
from trip_reference.data.sample import ClipDataset, ClipFormat
from trip_reference.data.shards import ShardSource
from trip_reference.demo_world.clips import DemoWorldClips
from trip_reference.training.config import DataConfig
from trip_rt.config import TripConfig
from trip_rt.errors import InputError

DEMO = "demo"


def open_source(
    source: str,
    config: TripConfig,
    clip: ClipFormat,
    clips: int,
    shuffle: int,
    validation: bool = False,
    remote: bool = False,
) -> ClipDataset | ShardSource:
    """The clips that `source` names: `demo`, a cache, a folder with annotations, or shards (a folder or a pattern such
    as part-{000..099}.tar).

    `validation` takes the held-out clips of the demo world, and a folder's val_annotations.json where there is one.
    `remote` allows shards that are fetched, or that a command gives (shards.list_shards).
    """
    if source == DEMO:
        return DemoWorldClips(config, clips, held_out=validation)
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


def clip_format(data: DataConfig, trip: TripConfig, steady: bool = False) -> ClipFormat:
    """How clips are cut out of videos for this model; `steady`: always the same cut."""
    crop, start = ("centre", "first") if steady else (data.crop, data.start)
    return ClipFormat(trip.num_frames, trip.height, trip.width, data.fps, data.stride, crop, start)
