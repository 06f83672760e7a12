"""Prompts to token ids, from a tokenizer.json alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trip_rt.errors import InputError

MAX_CHARACTERS = 10_000  # what lies beyond could never fit the text encoder


class PromptTokenizer:
    """Fixed-length token ids; what does not fit or is not known is said in a warning, once a prompt."""

    def __init__(self, tokenizer_json: str, length: int):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"tokenizer.json: not a tokenizer ({str(error)[:100]}); export the bundle again") from error
        self._length = length
        padding = self._tokenizer.padding
        if padding is None or padding["length"] != length:
            raise InputError(f"tokenizer.json: found padding {padding}, expected padding to {length} tokens; export the bundle again")
        self._unknown = self._tokenizer.token_to_id("<unk>")
        self._tokenizer.no_truncation()
        self._special = self._tokenizer.num_special_tokens_to_add(False)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """int64 [len(prompts), length]."""
        return np.array([self._encode(prompt) for prompt in prompts], np.int64)

    def _encode(self, prompt: str) -> list[int]:
        encoding = self._tokenizer.encode(prompt[:MAX_CHARACTERS])
        ids, words = encoding.ids, sum(encoding.attention_mask) - self._special
        room = self._length - self._special
        if words > room or len(prompt) > MAX_CHARACTERS:
            warnings.warn(f"the prompt is too long: only its first {room} tokens are used", stacklevel=4)
            ids = ids[: self._length - 1] + [ids[words + self._special - 1]]  # its end token stays
        if self._unknown is not None and (strange := [prompt[a:b] for i, (a, b) in zip(ids, encoding.offsets, strict=False) if i == self._unknown]):
            known = ", ".join(sorted(set(strange))[:5])
            warnings.warn(f"this model knows no such words and passes over them: {known}", stacklevel=4)
        return ids
