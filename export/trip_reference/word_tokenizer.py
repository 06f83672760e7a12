"""Tokenizers of one token a word, as a tokenizer.json that `tokenizers` alone reads: the demo world's, and those of
data sets of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

UNKNOWN = "<unk>"
MOST_WORDS = 50_000  # about CLIP's vocabulary; rarer words stay unknown
_SPECIAL = [UNKNOWN, "<start>", "<end>"]


def word_tokenizer(words: Sequence[str], length: int) -> Tokenizer:
    """Lower-cased words between <start> and <end>, cut and padded with <end> to `length` tokens, as CLIP's are."""
    ids = {token: i for i, token in enumerate([*_SPECIAL, *words])}
    tokenizer = _splitting(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, ids[token]) for token in ("<start>", "<end>")]
    )
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=ids["<end>"], pad_token="<end>")
    return tokenizer


def tokenizer_for(sentences: Iterable[str], length: int) -> Tokenizer:
    """A word tokenizer that knows the sentences' words, the MOST_WORDS most frequent; their order does not matter."""
    counting = _splitting(models.WordLevel(unk_token=UNKNOWN))
    counting.train_from_iterator(sentences, trainers.WordLevelTrainer(vocab_size=MOST_WORDS, show_progress=False))
    ids = counting.get_vocab()
    return word_tokenizer(sorted(ids, key=ids.__getitem__), length)


def text_overrides(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a CLIPTextConfig needs to know of the tokenizer."""
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    return {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def _splitting(model: models.Model) -> Tokenizer:
    """Words are runs of letters and digits."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
