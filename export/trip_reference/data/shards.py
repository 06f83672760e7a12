"""Data sets too large for single files: reading tar shards as an endless, shuffled, resumable stream, and writing
them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path

import numpy as np

from trip_reference.data.new_folder import new_folder
from trip_reference.data.patterns import expand, matching
from trip_reference.data.sample import BrokenClip, ClipFormat, Sample
from trip_reference.data.shard_files import RawSample, decode_sample, is_remote, read_shard
from trip_rt.errors import InputError, printable

_MOST_HELD = 2**28  # bytes of a shuffle buffer, of which there is one for every worker


class ShardSource:
    """Clips from the *.tar of a folder, or of a pattern such as data/shard-{000000..000099}.tar. Samples are shuffled
    in a buffer of `shuffle`. `remote` is as for `list_shards`."""

    def __init__(self, pattern_or_folder: str, clip: ClipFormat, shuffle: int = 1000, remote: bool = False):
        self.shards = list_shards(pattern_or_folder, remote)
        self.clip, self.shuffle = clip, shuffle
        self._lengths: dict[str, int] = {}

    def stream(self, part: int, parts: int, seed: int, start: int = 0) -> Iterator[tuple[int, Sample | BrokenClip]]:
        """(position, sample) without end: every epoch permutes all shards and deals them out to `parts` readers; this
        reader is number `part`.

        `position` counts this reader's samples over all epochs, broken ones included. A stream with `start=position`
        continues after that sample: of whole epochs before it only the shards' headers are read, of the epoch it lies
        in the samples before it are read but not decoded. Raises InputError where there are more readers than shards.
        """
        if parts > len(self.shards):
            expected = f"at least one for each of {parts} loading processes"
            raise InputError(
                f"shards: found {len(self.shards)}, expected {expected}; use fewer workers, or write smaller shards"
            )
        return self._stream(part, parts, seed, start)

    def _stream(self, part: int, parts: int, seed: int, start: int) -> Iterator[tuple[int, Sample | BrokenClip]]:
        position = 0
        for epoch in count():
            order = np.random.default_rng([seed, epoch]).permutation(len(self.shards))[part::parts]
            shards = [self.shards[i] for i in order]
            if position < start and position + (length := sum(map(self._length, shards))) <= start:
                position += length
                continue
            for raw in self._shuffled(shards, np.random.default_rng([seed, epoch, part])):
                position += 1
                if position > start:
                    yield position, self._decoded(raw, np.random.default_rng([seed, part, position]))

    def _length(self, shard: str) -> int:
        if shard not in self._lengths:
            self._lengths[shard] = sum(1 for _ in read_shard(shard, self.clip, contents=False))
        return self._lengths[shard]

    def _shuffled(self, shards: list[str], rng: np.random.Generator) -> Iterator[RawSample | BrokenClip]:
        buffer: list[RawSample | BrokenClip] = []
        size = 0
        for raw in chain.from_iterable(read_shard(shard, self.clip) for shard in shards):
            buffer.append(raw)
            size += _size(raw)
            while len(buffer) > self.shuffle or size > _MOST_HELD:
                size -= _size(drawn := _draw(buffer, rng))
                yield drawn
        while buffer:
            yield _draw(buffer, rng)

    def _decoded(self, raw: RawSample | BrokenClip, rng: np.random.Generator) -> Sample | BrokenClip:
        if isinstance(raw, BrokenClip):
            return raw
        try:
            return decode_sample(raw, self.clip, rng)
        except BrokenClip as error:
            return error


def list_shards(pattern_or_folder: str, remote: bool = False) -> list[str]:
    """Paths in order and, where `remote` allows them, addresses (https://, gs://, hf://, pipe:). webdataset opens
    these: it fetches what they name, some by a command of the shell, and runs what follows pipe: as one. So they are
    for a person to allow, and not for a recipe. Raises InputError where there are none, or where one is not allowed."""
    where = printable(str(pattern_or_folder))
    if os.path.isdir(pattern_or_folder):
        shards = sorted(glob.glob(os.path.join(glob.escape(str(pattern_or_folder)), "*.tar")))
    else:
        shards = [
            shard
            for name in expand(str(pattern_or_folder))
            for shard in ([name] if is_remote(name) else matching(name))
        ]
        if not remote and (address := next(filter(is_remote, shards), None)):
            raise InputError(
                f"{where}: found {printable(address)[:100]}, which is fetched or run as a command, expected local"
                " shards; pass --allow-remote if you trust it"
            )
    if missing := next((shard for shard in shards if not is_remote(shard) and not os.path.isfile(shard)), None):
        raise InputError(
            f"{where}: found no file {printable(missing)}, or no plain one, expected a folder of shards, or a pattern"
            " of shards that exist"
        )
    if not shards:
        raise InputError(f"{where}: found no *.tar, expected shards; `trip-data pack` makes them")
    return shards


def write_shards(samples: Iterable[tuple[str, bytes, str]], folder: Path, per_shard: int = 1000) -> int:
    """Writes (key, video, sentence) to folder/shard-000000.tar and on; returns how many shards. The folder appears
    whole.

    Videos are stored as key.mp4 whatever they are: readers go by what is inside. Raises InputError where `folder` holds
    anything.
    """
    from webdataset import TarWriter

    if per_shard < 1:
        raise InputError(f"per-shard: found {per_shard}, expected at least 1")
    rest = iter(samples)
    with new_folder(folder) as draft:
        for number in count():
            first = next(rest, None)
            if first is None:
                break
            with TarWriter(str(draft / f"shard-{number:06d}.tar"), encoder=False, mtime=0) as shard:
                for key, video, text in chain([first], islice(rest, per_shard - 1)):
                    if "." in key:  # endings begin at the first dot
                        raise ValueError(f"key: found {key!r}, expected one without a dot")
                    shard.write({"__key__": key, "mp4": video, "txt": text.encode()})
        if number == 0:
            raise InputError(f"{printable(str(folder))}: found no samples to write, expected at least one")
    return number


def _size(raw: RawSample | BrokenClip) -> int:
    return 0 if isinstance(raw, BrokenClip) else raw.size


def _draw(buffer: list[RawSample | BrokenClip], rng: np.random.Generator) -> RawSample | BrokenClip:
    """Remove a random sample from the buffer and return it."""
    i = int(rng.integers(len(buffer)))
    buffer[i], buffer[-1] = buffer[-1], buffer[i]
    return buffer.pop()
