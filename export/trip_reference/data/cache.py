"""Clips encoded once: latents and, where the text encoder is frozen, text embeddings, in safetensors files beside an
index.

    cache.json  latents-00000.safetensors  latents-00001.safetensors  …

Reading one clip reads that clip's bytes alone, so a cache may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from msgspec import Meta
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trip_reference.data.new_folder import new_folder
from trip_reference.data.sample import BrokenClip, ClipDataset
from trip_reference.data.tokens import tokenizer_of
from trip_reference.model import TripModel
from trip_reference.progress import shown_progress
from trip_rt.checks import is_text
from trip_rt.config import Count, from_json, to_json
from trip_rt.errors import InputError, one_line, printable
from trip_rt.launch import note
from trip_rt.plain_files import check_plain, read_json

INDEX = "cache.json"
VERSION = 1
PER_FILE = 256
_REMEDY = "make the cache anew with trip-data cache"
MOST_THREADS = 8
TEXTS = 8  # sentences drawn for a clip whose data set words it differently each time


@dataclass(frozen=True)
class CachedSample:
    """latents: [C, F, h, w], scaled; embedding: [L, D] of `text`, or None where the text is encoded in training;
    control: [K, F, h, w] of a clip that has one."""

    latents: Tensor
    text: str
    name: str
    embedding: Tensor | None
    control: Tensor | None = None


@dataclass(frozen=True)
class Index:
    """cache.json: how many clips, the shape of their latents [C, F, h, w], which encoders made them, and the shape of
    their controls [K, F, h, w], where they have some."""

    version: Literal[1]
    clips: Annotated[int, Meta(ge=1, le=1 << 40)]
    shape: Annotated[list[Count], Meta(min_length=4, max_length=4)]
    vae: Annotated[str, Meta(max_length=200)]
    text_encoder: Annotated[str, Meta(max_length=200)] | None
    control: Annotated[list[Count], Meta(min_length=4, max_length=4)] | None = None


class _Encoded(NamedTuple):
    """A clip as it is written: its latents, its sentences, and its control, where it has one."""

    latents: Tensor
    sentences: list[str]
    control: Tensor | None


class CachedClips:
    """The clips of a cache folder; a clip with several sentences gets one of them at random."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / INDEX
        index = from_json(Index, read_json(path, f"the index of a cache; {_REMEDY}"), printable(str(path)), _REMEDY)
        self.index, self.clips = to_json(index), index.clips
        files = sum(1 for _ in self.folder.glob("latents-*.safetensors"))
        if files != (expected := -(-self.clips // PER_FILE)):
            raise InputError(
                f"{printable(str(self.folder))}: found {files} files of latents, expected {expected} for {self.clips}"
                f" clips; {_REMEDY}"
            )

    def __len__(self) -> int:
        return self.clips

    def clip(self, index: int, rng: np.random.Generator) -> CachedSample:
        path, row, tensors, texts = self._file_of(index)
        read = {name: tensors.get_slice(name)[row].float() for name in self._shapes}
        if not all(tensor.isfinite().all() for tensor in read.values()):
            raise InputError(f"{path}: clip {row}: found a number that is not finite; {_REMEDY}")
        name = f"{self.folder}, clip {index}"
        return CachedSample(read["latents"], str(rng.choice(texts[row])), name, read.get("text"), read.get("control"))

    def text(self, index: int, rng: np.random.Generator) -> str:
        """One of the clip's sentences."""
        _, row, _, texts = self._file_of(index)
        return str(rng.choice(texts[row]))

    def _file_of(self, index: int) -> tuple[Path, int, Any, list[list[str]]]:
        """The file of a clip, its place there, the file's tensors, and the sentences of all its clips."""
        file, row = divmod(index, PER_FILE)
        path = self.folder / _file_name(file)
        return path, row, *_opened(path, min(PER_FILE, self.clips - file * PER_FILE), json.dumps(self._shapes))

    @property
    def _shapes(self) -> dict[str, list[int]]:
        """Those of a clip's tensors by name."""
        embedding = {"text": [*self._empty.shape]} if self.index["text_encoder"] else {}
        control = {"control": self.index["control"]} if self.index["control"] else {}
        return {"latents": self.index["shape"], **embedding, **control}

    def empty_text(self) -> Tensor:
        """The embedding [L, D] of the empty sentence."""
        return self._empty

    @cached_property
    def _empty(self) -> Tensor:
        path = self.folder / "empty.safetensors"
        with _readable(path), safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor("text")
        if tensor.dtype != torch.float16 or tensor.ndim != 2 or not tensor.isfinite().all():
            raise InputError(f"{path}: found no embedding [L, D] in fp16; {_REMEDY}")
        return tensor.float()

    def check(self, model: TripModel) -> None:
        """Raise InputError unless the cache was made with this model's encoders."""
        shape = list(model.config.latent_shape)
        text = [model.config.text_length, model.config.text_width]
        for what, found, expected in (
            ("latents of shape", self.index["shape"], shape),
            ("latents of the VAE", self.index["vae"], encoder_digest(model)),
            ("embeddings of shape", list(self._empty.shape) if self.index["text_encoder"] else None, text),
            ("embeddings of the text encoder", self.index["text_encoder"], digest(model.text_encoder)),
        ):
            if found not in (None, expected):
                raise InputError(
                    f"{self.folder}: found {what} {found}, expected {expected}; make the cache anew with trip-data"
                    " cache and this checkpoint"
                )


@torch.no_grad()
def write_cache(
    clips: ClipDataset, model: TripModel, tokenizer_json: str, folder: Path, seed: int = 0, texts: bool = False
) -> int:
    """Encode every clip that is not broken, one crop and start each, into `folder`, whole or not at all; returns how
    many were broken.

    With `texts`, each clip's sentence is encoded too, and each clip has only one.
    """
    tokenize = tokenizer_of(tokenizer_json)
    device = next(model.vae.parameters()).device

    def embedded(sentences: list[str]) -> Tensor:
        return model.encode_text(tokenize(sentences).to(device)).half().cpu()

    @torch.no_grad()
    def encode(number: int) -> _Encoded | BrokenClip:
        rng = np.random.default_rng([seed, number])
        try:
            sample = clips.clip(number, rng)
        except BrokenClip as error:
            return error
        latents = model.encode_clip(torch.tensor(sample.frames, device=device))
        more = [clips.text(number, rng) for _ in range(0 if texts else TEXTS - 1)]
        control = None if sample.control is None else torch.from_numpy(sample.control).half()
        return _Encoded(latents.half().cpu(), list(dict.fromkeys([sample.text, *more])), control)

    broken = written = 0
    control: list[int] | None = None
    pending: list[_Encoded] = []

    with new_folder(folder) as draft:

        def flush() -> None:
            nonlocal written
            tensors = {"latents": torch.stack([clip.latents for clip in pending])}
            if texts:
                tensors["text"] = embedded([clip.sentences[0] for clip in pending])
            if controls := [clip.control for clip in pending if clip.control is not None]:
                tensors["control"] = torch.stack(controls)
            metadata = {"texts": json.dumps([clip.sentences for clip in pending])}
            save_file(tensors, draft / _file_name(written // PER_FILE), metadata=metadata)
            written += len(pending)
            pending.clear()

        with ThreadPoolExecutor(_threads(device), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # A file's clips at a time: what is asked of the pool stays small, however many clips there are.
            starts = range(0, len(clips), PER_FILE)
            parts = (range(start, min(start + PER_FILE, len(clips))) for start in starts)
            encoded = chain.from_iterable(pool.map(encode, part) for part in parts)
            try:
                for found in shown_progress(encoded, len(clips), "encode clips", "clip"):
                    if isinstance(found, BrokenClip):
                        broken += 1
                        note(f"warning: left out: {found}")
                        continue
                    pending.append(found)
                    control = None if found.control is None else list(found.control.shape)
                    if len(pending) == PER_FILE:
                        flush()
            finally:
                pool.shutdown(cancel_futures=True)
        if pending:
            flush()
        if not written:
            raise InputError("data: found no clip that could be read; `trip-data check` reports on a data set")
        if texts:
            save_file({"text": embedded([""])[0]}, draft / "empty.safetensors")
        index = {
            "version": VERSION,
            "clips": written,
            "shape": list(model.config.latent_shape),
            "vae": encoder_digest(model),
            "text_encoder": digest(model.text_encoder) if texts else None,
            "control": control,
        }
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return broken


def _threads(device: torch.device) -> int:
    """How many clips are encoded side by side: one on a GPU, which one clip keeps busy; on a CPU, where one clip's
    tensors may be too small for several cores, one a core, and no more than MOST_THREADS, as each holds a clip's
    activations."""
    return 1 if device.type != "cpu" else min(os.cpu_count() or 1, MOST_THREADS)


def encoder_digest(model: TripModel) -> str:
    """What latents depend on: the VAE's weights and the scale."""
    return f"{digest(model.vae)} scaled {model.config.scaling_factor:g}"


def digest(module: nn.Module) -> str:
    """A short hash of all weights, taken in fp16: a checkpoint stores them in fp16, and the hash must not change by
    it."""
    sha256 = hashlib.sha256()
    for tensor in module.state_dict().values():
        sha256.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()[:16]


def _file_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


@lru_cache(maxsize=256)
def _opened(path: Path, clips: int, shapes: str) -> tuple[Any, list[list[str]]]:
    """The file, and the sentences of each of its clips; `shapes`, as JSON, are those of a clip's tensors by name."""
    with _readable(path):
        file = safe_open(path, "pt")
        for name, shape in json.loads(shapes).items():
            entry = file.get_slice(name)
            if (found := [entry.get_dtype(), *entry.get_shape()]) != (expected := ["F16", clips, *shape]):
                raise InputError(f"{path}: {name}: found {found}, expected {expected}; {_REMEDY}")
        texts = json.loads((file.metadata() or {}).get("texts", ""))
        whole = isinstance(texts, list) and len(texts) == clips
        if not (whole and all(isinstance(entry, list) and entry and all(map(is_text, entry)) for entry in texts)):
            raise InputError(f"{path}: found no sentences for each of {clips} clips; {_REMEDY}")
        return file, texts


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line."""
    check_plain(path, f"a file of a cache; {_REMEDY}")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors' own errors are of several kinds
        raise InputError(f"{path}: cannot be read ({one_line(error)}); {_REMEDY}") from error
