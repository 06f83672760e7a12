"""Prompts to token ids, from a tokenizer.json alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trip_rt.checks import excerpt, text
from trip_rt.errors import InputError
from trip_rt.tokenizer_file import guarded, open_tokenizer

MAX_CHARACTERS = 10_000  # what lies beyond could never fit the text encoder


class PromptTokenizer:
    """Fixed-length token ids; what does not fit or is not known is said in a warning, once a prompt."""

    def __init__(self, tokenizer_json: str, length: int, vocabulary: int):
        """`length` is how many ids a prompt becomes, `vocabulary` how many the text encoder knows; InputError where the
        file does not fit them."""
        self._tokenizer = open_tokenizer(tokenizer_json)
        self._length = length
        padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        for name, found in (("padding", padding.get("length")), ("truncation", truncation.get("max_length"))):
            if found != length:
                raise InputError(
                    f"tokenizer.json: {name}: found {found}, expected {length} tokens; export the bundle again"
                )
        self._unknown = self._tokenizer.token_to_id("<unk>")
        self._tokenizer.no_truncation()
        with guarded():
            self._special = self._tokenizer.num_special_tokens_to_add(False)
            # All ids that a prompt can become: words', the padding's, and what is put around every prompt.
            ids = [*self._tokenizer.get_vocab().values(), padding["pad_id"], *self._tokenizer.encode("").ids]
        if max(ids) >= vocabulary:
            raise InputError(
                f"tokenizer.json: found the token id {max(ids)}, expected less than {vocabulary}, as many as the text"
                " encoder knows; export the bundle again"
            )
        if not self._special < length:
            raise InputError(
                f"tokenizer.json: found {self._special} special tokens, expected fewer than {length}; export the bundle"
                " again"
            )

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """int64 [len(prompts), length]."""
        return np.array([self._encode(prompt) for prompt in prompts], np.int64)

    def _encode(self, prompt: str) -> list[int]:
        text("prompt", prompt)
        with guarded():
            encoding = self._tokenizer.encode(prompt[:MAX_CHARACTERS])
        ids, words = encoding.ids, sum(encoding.attention_mask) - self._special
        room = self._length - self._special
        if words > room or len(prompt) > MAX_CHARACTERS:
            used = f"{room} tokens" if words > room else f"{MAX_CHARACTERS} characters"
            warnings.warn(f"the prompt {excerpt(prompt)!r} is too long: only its first {used} are used", stacklevel=4)
        if words > room:
            ids = ids[: self._length - 1] + ids[-1:]  # its end token stays
        if self._unknown is not None and (
            strange := [prompt[a:b] for i, (a, b) in zip(ids, encoding.offsets, strict=False) if i == self._unknown]
        ):
            known = ", ".join(excerpt(word) for word in sorted(set(strange))[:5])
            warnings.warn(f"this model knows no such words and passes over them: {known}", stacklevel=4)
        return ids
