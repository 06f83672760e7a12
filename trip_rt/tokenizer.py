"""Prompts to token ids, from a tokenizer.json alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trip_rt.errors import InputError, printable

MAX_CHARACTERS = 10_000  # what lies beyond could never fit the text encoder


class PromptTokenizer:
    """Fixed-length token ids; what does not fit or is not known is said in a warning, once a prompt."""

    def __init__(self, tokenizer_json: str, length: int):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(
                f"tokenizer.json: not a tokenizer ({str(error)[:100]}); export the bundle again"
            ) from error
        self._length = length
        padding = self._tokenizer.padding
        if padding is None or padding["length"] != length:
            raise InputError(
                f"tokenizer.json: found padding {padding}, expected padding to {length} tokens; export the bundle again"
            )
        self._unknown = self._tokenizer.token_to_id("<unk>")
        self._tokenizer.no_truncation()
        self._special = self._tokenizer.num_special_tokens_to_add(False)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """int64 [len(prompts), length]."""
        return np.array([self._encode(prompt) for prompt in prompts], np.int64)

    def _encode(self, prompt: str) -> list[int]:
        check_text(prompt)
        encoding = self._tokenizer.encode(prompt[:MAX_CHARACTERS])
        ids, words = encoding.ids, sum(encoding.attention_mask) - self._special
        room = self._length - self._special
        if words > room or len(prompt) > MAX_CHARACTERS:
            used = f"{room} tokens" if words > room else f"{MAX_CHARACTERS} characters"
            warnings.warn(f"the prompt {_excerpt(prompt)!r} is too long: only its first {used} are used", stacklevel=4)
        if words > room:
            ids = ids[: self._length - 1] + ids[-1:]  # its end token stays
        if self._unknown is not None and (
            strange := [prompt[a:b] for i, (a, b) in zip(ids, encoding.offsets, strict=False) if i == self._unknown]
        ):
            known = ", ".join(_excerpt(word) for word in sorted(set(strange))[:5])
            warnings.warn(f"this model knows no such words and passes over them: {known}", stacklevel=4)
        return ids


def check_text(prompt: str) -> None:
    """InputError where a prompt holds what is no character: bytes of a command line that are no text, half a pair of
    `\\u` escapes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"prompt: found undecodable characters in {_excerpt(prompt)!r}, expected Unicode text; write it as UTF-8"
        ) from error


def _excerpt(text: str) -> str:
    return printable(text[:32] + "…" if len(text) > 32 else text)
