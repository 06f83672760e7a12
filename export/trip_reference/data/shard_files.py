"""One shard: a tar of videos and sentences in WebDataset's manner, `key.mp4` beside `key.txt` or a `key.json` with
"text"."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from trip_reference.data.sample import BrokenClip, ClipFormat, Sample
from trip_reference.data.videos import SUFFIXES, decode_clip
from trip_rt.checks import is_text
from trip_rt.errors import printable

_TEXTS = (".txt", ".json")
_MOST_TEXT = 2**20  # bytes
# Types of members that hold names and the like of the next one, and that tarfile reads as a whole.
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass
class RawSample:
    """What a shard holds under one key, by ending. `problem` says why nothing can come of it."""

    name: str
    fields: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""

    @property
    def size(self) -> int:
        return sum(map(len, self.fields.values()))

    @property
    def video(self) -> bytes:
        """Raises BrokenClip where there is none, or more than one may take into memory."""
        video = next((data for suffix, data in self.fields.items() if suffix in SUFFIXES), None)
        if self.problem or video is None:
            missing = f"found no video, expected a member ending in {', '.join(SUFFIXES)}"
            raise BrokenClip(f"{self.name}: {self.problem or missing}")
        return video

    @property
    def text(self) -> str:
        """Raises BrokenClip where there is none."""
        try:
            txt = self.fields.get(".txt")
            text = json.loads(self.fields[".json"])["text"] if txt is None else txt.decode("utf-8-sig")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BrokenClip(f'{self.name}: found no sentence, expected UTF-8 in .txt, or .json with "text"') from error
        if not isinstance(text, str) or not text.strip():
            raise BrokenClip(f"{self.name}: found an empty sentence or none, expected some text")
        if not is_text(text):
            raise BrokenClip(f"{self.name}: found half of a surrogate pair in the sentence, expected whole characters")
        return text.strip()


def decode_sample(raw: RawSample, clip: ClipFormat, rng: np.random.Generator) -> Sample:
    """Raises BrokenClip."""
    video, text = raw.video, raw.text
    return Sample(decode_clip(io.BytesIO(video), raw.name, clip, rng), text, raw.name)


def read_shard(shard: str, clip: ClipFormat, contents: bool = True) -> Iterator[RawSample | BrokenClip]:
    """The shard's samples in order. Where the tar is damaged, one BrokenClip that names the shard stands for all
    samples after the damage; it also stands for a shard without samples.

    Without `contents` the samples' fields are empty, and of a local shard only the headers are read: enough to count.
    """
    from webdataset.tariterators import base_plus_ext

    name = printable(os.path.basename(shard))
    key, sample, any_sample = None, None, False
    try:
        with (
            closing(_open(shard)) as file,
            tarfile.open(fileobj=file, mode="r:" if file.seekable() else "r|", tarinfo=_StrictHeader) as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep all headers in memory
                prefix, suffix = base_plus_ext(member.name)
                suffix = f".{(suffix or '').lower()}"
                if not member.isreg() or suffix not in SUFFIXES + _TEXTS:
                    continue
                if prefix != key:
                    if sample:
                        yield sample
                    key, sample, any_sample = prefix, RawSample(f"{name}: {printable(prefix)}"), True
                if member.issparse():  # a few bytes may stand for gigabytes
                    sample.problem = f"found a sparse {suffix}, expected a plain one"
                    continue
                most = clip.max_bytes if suffix in SUFFIXES else _MOST_TEXT
                if member.size > most:
                    sample.problem = (
                        f"found a {suffix} of {member.size / 2**20:.1f} MiB, expected at most {most / 2**20:.1f} MiB"
                    )
                elif contents:
                    sample.fields[suffix] = archive.extractfile(member).read()
            if sample:
                yield sample
            if not any_sample:
                yield BrokenClip(f"{name}: found no samples, expected members such as 000.mp4 and 000.txt")
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        reason = printable(getattr(error, "strerror", None) or str(error))[:120]
        yield BrokenClip(
            f"{name}: found a damaged tar ({reason}), expected a whole one; the samples after the damage are left out"
        )


class _StrictHeader(tarfile.TarInfo):
    """Reports as damage what tarfile takes for the end of the tar (a garbled header, a file without its end mark), and
    headers that would take much memory or lead back in the file."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > _MOST_TEXT:
            raise tarfile.InvalidHeaderError(f"found an extended header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        before = archive.offset
        try:
            header = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0 or archive.offset <= before:  # or the same members would be read for ever
            raise tarfile.ReadError("found a negative size")
        return header


def _open(shard: str) -> BinaryIO:
    if not is_remote(shard):
        return open(shard, "rb")
    from webdataset.gopen import gopen

    return _Piped(gopen(shard))


def is_remote(shard: str) -> bool:
    """Whether webdataset is to open it, as a download or a command."""
    return "://" in shard or shard.startswith("pipe:")


class _Piped(io.RawIOBase):
    """webdataset's stream as tarfile wants it."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()
