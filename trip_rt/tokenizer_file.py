"""What a tokenizer.json may hold. The library runs what the file says, regular expressions and replacements without
bound, so a stranger's could hang it or fill the memory. So only what CLIP's tokenizers and ours are made of is let
through."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from trip_rt.checks import excerpt
from trip_rt.errors import InputError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_MEGABYTES = 32
Id = Annotated[int, Meta(ge=0, lt=1 << 31)]
Short = Annotated[str, Meta(max_length=64)]
# Both are linear in the length of the text. The last is CLIP's division into words.
KnownExpression = Literal[
    r"\s+",
    r"[^\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
]


class _Expression(Struct, rename={"regex": "Regex"}):
    regex: KnownExpression


class _Tagged(Struct, tag_field="type"):
    """A part that its `type` names."""


class _NFC(_Tagged, tag="NFC"): ...


class _Lowercase(_Tagged, tag="Lowercase"): ...


class _Replace(_Tagged, tag="Replace"):
    pattern: _Expression
    content: Annotated[str, Meta(max_length=1)]


_Normalizer = _NFC | _Lowercase | _Replace


class _Normalizers(_Tagged, tag="Sequence"):
    normalizers: Annotated[list[_Normalizer], Meta(max_length=8)]


class _WhitespaceSplit(_Tagged, tag="WhitespaceSplit"): ...


class _Whitespace(_Tagged, tag="Whitespace"): ...


class _ByteLevel(_Tagged, tag="ByteLevel"): ...


class _Split(_Tagged, tag="Split"):
    pattern: _Expression


_PreTokenizer = _WhitespaceSplit | _Whitespace | _ByteLevel | _Split


class _PreTokenizers(_Tagged, tag="Sequence"):
    pretokenizers: Annotated[list[_PreTokenizer], Meta(max_length=8)]


class _Special(Struct):
    ids: Annotated[list[Id], Meta(max_length=8)]


class _Name(Struct):
    id: Short


class _Piece(Struct, rename={"special": "SpecialToken", "sequence": "Sequence"}):
    special: _Name | None = None
    sequence: _Name | None = None


class _Template(_Tagged, tag="TemplateProcessing"):
    single: Annotated[list[_Piece], Meta(max_length=8)]
    special_tokens: Annotated[dict[Short, _Special], Meta(max_length=8)]


class _Roberta(_Tagged, tag="RobertaProcessing"):
    sep: tuple[Short, Id]
    cls: tuple[Short, Id]


class _WordLevel(_Tagged, tag="WordLevel"):
    vocab: Annotated[dict[str, Id], Meta(min_length=1)]
    unk_token: str


class _BPE(_Tagged, tag="BPE"):
    vocab: Annotated[dict[str, Id], Meta(min_length=1)]
    merges: list[str | tuple[str, str]]
    dropout: None = None  # it would draw lots
    unk_token: str | None = None
    continuing_subword_prefix: Short | None = None
    end_of_word_suffix: Short | None = None


class _Added(Struct):
    id: Id
    content: Annotated[str, Meta(min_length=1, max_length=64)]


class _Truncation(Struct):
    max_length: Annotated[int, Meta(ge=1, lt=1 << 31)]
    strategy: Literal["LongestFirst", "OnlyFirst"]
    stride: Literal[0]
    direction: Literal["Right"] = "Right"


class _Padding(Struct):
    pad_id: Id
    strategy: Any
    direction: Literal["Right"]
    pad_to_multiple_of: None = None


class _File(Struct):
    model: _WordLevel | _BPE
    normalizer: _NFC | _Lowercase | _Replace | _Normalizers | None
    pre_tokenizer: _WhitespaceSplit | _Whitespace | _ByteLevel | _Split | _PreTokenizers | None
    post_processor: _Template | _Roberta | _ByteLevel | None
    added_tokens: Annotated[list[_Added], Meta(max_length=1 << 16)]
    padding: _Padding | None
    truncation: _Truncation | None


def open_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The library's tokenizer of that file; InputError where it holds what it may not, or is none."""
    from tokenizers import Tokenizer

    if len(tokenizer_json) > MAX_MEGABYTES << 20:
        raise _refused(f"found {len(tokenizer_json) >> 20} MB, expected at most {MAX_MEGABYTES}")
    with guarded():
        data = json.loads(tokenizer_json)
        file = msgspec.convert(data, _File)
        unknown = file.model.unk_token
        if unknown is not None and unknown not in file.model.vocab:
            raise _refused(f"found that the unknown token {excerpt(unknown)!r} is no entry of its vocabulary")
        # Nothing asks for the decoder, which holds expressions too.
        return Tokenizer.from_str(json.dumps(data | {"decoder": None}))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Whatever the library makes of a strange file, in one line: it raises bare Exception, and BaseException where its
    Rust code panics."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _refused(f"not a tokenizer such as CLIP's ({one_line(error, 100)})") from error


def _refused(what: str) -> InputError:
    return InputError(f"tokenizer.json: {what}; restore it, or export the bundle again")
