"""The demo world's tokenizer: one token a word, as a tokenizer.json that `tokenizers` alone reads."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from trip_reference.demo_world.world import vocabulary

_SPECIAL = ["<unk>", "<start>", "<end>"]


def build_tokenizer(length: int) -> Tokenizer:
    """Lower-cased words between <start> and <end>, cut and padded with <end> to `length` tokens, as CLIP's are."""
    ids = {token: i for i, token in enumerate(_SPECIAL + vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, ids[token]) for token in ("<start>", "<end>")]
    )
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=ids["<end>"], pad_token="<end>")
    return tokenizer


def text_overrides(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a CLIPTextConfig needs to know of the tokenizer."""
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    return {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
