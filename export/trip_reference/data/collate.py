"""From clips to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trip_reference.data.cache import CachedSample
from trip_reference.data.sample import Sample
from trip_reference.data.tokens import tokenizer_of


class Collate:
    """Clips to `frames` uint8 [b, F, H, W, 3] or cached `latents` [b, C, F, h, w], to `ids` [b, L] or cached `text`
    [b, L, D] and, where clips have one, to `control` [b, K, F, h, w]."""

    def __init__(self, tokenizer_json: str):
        self.tokenizer_json = tokenizer_json  # the tokenizer itself is made in the worker process that uses it
        self._tokenize: Callable[[Sequence[str]], Tensor] | None = None

    def __call__(self, samples: Sequence[Sample | CachedSample]) -> dict[str, Any]:
        self._tokenize = self._tokenize or tokenizer_of(self.tokenizer_json)
        batch: dict[str, Any] = {"ids": self._tokenize([sample.text for sample in samples])}
        if isinstance(samples[0], CachedSample):
            batch["latents"] = torch.stack([sample.latents for sample in samples])
            if samples[0].embedding is not None:
                batch["text"] = torch.stack([sample.embedding for sample in samples])
        else:
            batch["frames"] = torch.from_numpy(np.stack([sample.frames for sample in samples]))
        controls = [torch.as_tensor(sample.control) for sample in samples if sample.control is not None]
        if controls:
            batch["control"] = torch.stack(controls)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer_json": self.tokenizer_json, "_tokenize": None}
