"""Whether a tokenizer knows the words of a data set: those that it does not know are all one to the model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from trip_reference.data.sample import BrokenClip, ClipDataset, evenly
from trip_reference.data.shard_files import RawSample, is_remote, read_shard
from trip_reference.data.shards import ShardSource
from trip_reference.word_tokenizer import UNKNOWN
from trip_rt.errors import InputError, printable
from trip_rt.tokenizer_file import open_tokenizer

MOST_UNKNOWN = 0.2  # of the words: beyond it, one sentence in a few lacks what it is about
MOST_READ = 100_000  # sentences that are looked at
_SHOWN = 8
_CHUNK = 10_000  # sentences tokenized at a time


@dataclass(frozen=True)
class Words:
    """`sentences` have `words` tokens, `unknown` of them unknown, the `commonest` of these first; `cut` sentences lose
    their end, as they have more than `length` tokens."""

    sentences: int
    words: int
    unknown: int
    commonest: tuple[str, ...]
    cut: int
    length: int

    @property
    def share(self) -> float:
        """Of the words that are unknown, 0 to 1."""
        return self.unknown / max(self.words, 1)

    @property
    def known(self) -> str:
        """As `12 of 60 are unknown (20 %): dog, runs`."""
        if not self.unknown:
            return f"all {self.words} are known"
        more = ", …" if len(self.commonest) == _SHOWN else ""
        return (
            f"{self.unknown} of {self.words} are unknown ({100 * self.share:.3g} %): {', '.join(self.commonest)}{more}"
        )

    def __str__(self) -> str:
        cut = f"; {self.cut} of {self.sentences} sentences are cut after {self.length} tokens" if self.cut else ""
        return self.known + cut

    def figures(self) -> dict[str, Any]:
        """For a report in JSON."""
        return {
            "words": self.words,
            "unknown": self.unknown,
            "share": round(self.share, 4),
            "commonest": list(self.commonest),
            "cut_sentences": self.cut,
            "in_words": str(self),
        }

    def check(self, most: float, remedy: str) -> None:
        """Raise InputError where a larger share than `most` is unknown."""
        if self.share > most:
            raise InputError(f"words: {self.known}; expected at most {100 * most:g} %; {remedy}")


def words_of(tokenizer_json: str, sentences: Sequence[str]) -> Words:
    """What a tokenizer.json makes of the sentences. Those without <unk>, such as CLIP's of bytes, know all words."""
    tokenizer = open_tokenizer(tokenizer_json)
    special = tokenizer.num_special_tokens_to_add(False)
    length = tokenizer.truncation["max_length"] if tokenizer.truncation else 0
    tokenizer.no_truncation()
    tokenizer.no_padding()
    unknown, strange = tokenizer.token_to_id(UNKNOWN), Counter[str]()
    words = cut = 0
    for first in range(0, len(sentences), _CHUNK):
        chunk = list(sentences[first : first + _CHUNK])
        for sentence, encoding in zip(chunk, tokenizer.encode_batch(chunk, add_special_tokens=False), strict=True):
            words += len(encoding.ids)
            cut += len(encoding.ids) + special > length > 0
            if unknown in encoding.ids:
                strange.update(
                    sentence[a:b].lower()
                    for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
                    if i == unknown
                )
    commonest = sorted(strange, key=lambda word: (-strange[word], word))[:_SHOWN]
    return Words(len(sentences), words, strange.total(), tuple(printable(word[:32]) for word in commonest), cut, length)


def sentences_of(source: ClipDataset | ShardSource, most: int = MOST_READ) -> list[str]:
    """One sentence for each clip: of shards the first `most`, of other data as many, evenly spread. Of shards that are
    fetched only the first is read."""
    if isinstance(source, ShardSource):
        return list(islice(_sentences_in_shards(source), most))
    rng = np.random.default_rng(0)
    return [source.text(i, rng) for i in evenly(len(source), most)]


def _sentences_in_shards(source: ShardSource) -> Iterator[str]:
    small = dataclasses.replace(source.clip, max_bytes=0)  # so that the videos are passed over, not read
    for shard in source.shards:
        for raw in read_shard(shard, small):
            if isinstance(raw, RawSample):
                with suppress(BrokenClip):  # training warns of it
                    yield raw.text
        if is_remote(shard):
            return
