"""Sentences to token ids for training: in batches, and truncated without a warning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trip_rt.tokenizer_file import open_tokenizer


def tokenizer_of(tokenizer_json: str) -> Callable[[Sequence[str]], Tensor]:
    """A function from sentences to ids, int64 [N, L], truncated and padded as tokenizer.json says."""
    tokenizer = open_tokenizer(tokenizer_json)
    return lambda sentences: torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(sentences))])
