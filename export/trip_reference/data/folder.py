"""A folder of videos with annotations.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trip_reference.data.annotations import ANNOTATIONS, read_annotations
from trip_reference.data.sample import ClipFormat, Sample
from trip_reference.data.videos import decode_clip


class VideoFolder:
    """The clips that `folder/annotations` lists; a ClipDataset. InputError for annotations that cannot be used."""

    def __init__(self, folder: Path, clip: ClipFormat, annotations: str = ANNOTATIONS):
        self._annotations = read_annotations(Path(folder), annotations)
        self._clip = clip

    def __len__(self) -> int:
        return len(self._annotations)

    def clip(self, index: int, rng: np.random.Generator) -> Sample:
        entry = self._annotations[index]
        return Sample(decode_clip(entry.video, str(entry.video), self._clip, rng), entry.text, str(entry.video))

    def text(self, index: int, rng: np.random.Generator) -> str:
        return self._annotations[index].text
