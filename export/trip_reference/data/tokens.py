"""Sentences to token ids, as training needs them: by the batch, and cut without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor


def tokenizer_of(tokenizer_json: str) -> Callable[[Sequence[str]], Tensor]:
    """Sentences to ids, int64 [N, L], cut and padded as the tokenizer itself says."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return lambda sentences: torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(sentences))])
