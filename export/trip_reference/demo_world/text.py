"""The demo world's tokenizer."""

from __future__ import annotations

from tokenizers import Tokenizer

from trip_reference.demo_world.world import vocabulary
from trip_reference.word_tokenizer import word_tokenizer


def build_tokenizer(length: int) -> Tokenizer:
    """A tokenizer that knows the demo world's words, of `length` tokens a sentence."""
    return word_tokenizer(vocabulary(), length)
