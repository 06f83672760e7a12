"""Words that a tokenizer does not know are counted and named, and tokenizers can be made that know them."""

import json
import random
import warnings

import pytest
from tiny import TINY, save_published
from tokenizers import Tokenizer, models, pre_tokenizers

from trip_reference import checkpoint
from trip_reference.data.cache import CachedClips
from trip_reference.data.command import main
from trip_reference.data.folder import VideoFolder
from trip_reference.data.sample import ClipFormat
from trip_reference.data.shards import ShardSource
from trip_reference.data.words import sentences_of, words_of
from trip_reference.demo_world.clips import write_demo_folder
from trip_reference.demo_world.text import build_tokenizer
from trip_reference.word_tokenizer import tokenizer_for
from trip_rt import InputError
from trip_rt.tokenizer import PromptTokenizer

STRANGE = ["The dog runs on a beach.", "a DOG barks", "a red ball rolls to the right", "a red ball " * 10]
CLIP = ClipFormat(3, 32, 32, crop="centre", start="first")


def test_unknown_words_are_counted_and_the_commonest_come_first():
    words = words_of(build_tokenizer(16).to_str(), STRANGE)
    assert (words.sentences, words.words, words.unknown) == (4, 6 + 3 + 7 + 30, 6)
    assert words.commonest == ("dog", "barks", "beach", "on", "runs")
    assert words.cut == 1
    assert words.share == pytest.approx(6 / 46)
    assert str(words) == (
        "6 of 46 are unknown (13 %): dog, barks, beach, on, runs; 1 of 4 sentences are cut after 16 tokens"
    )
    words.check(0.14, "")
    with pytest.raises(InputError, match=r"words: 6 of 46 are unknown \(13 %\): dog, .*; expected at most 12 %; do so"):
        words.check(0.12, "do so")


def test_a_tokenizer_of_bytes_knows_all_words():
    alphabet = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    words = words_of(tokenizer.to_str(), [*STRANGE, "日本語"])
    assert (words.unknown, words.share, words.cut, words.commonest) == (0, 0, 0, ())
    assert words.words > 50


def test_a_tokenizer_for_sentences_knows_their_words_in_any_order():
    text = tokenizer_for(STRANGE, 12).to_str()
    assert words_of(text, STRANGE).unknown == 0
    shuffled = random.Random(0).sample(STRANGE, len(STRANGE))
    assert tokenizer_for(shuffled, 12).to_str() == text
    tokenize = PromptTokenizer(text, 12, 100)  # as the runtime reads it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = tokenize(["the dog, on a red ball"])
        assert known.shape == (1, 12)
        assert len(set(known[0].tolist())) == 6 + 2
    with pytest.warns(UserWarning, match="knows no such words and passes over them: cat"):
        tokenize(["a cat"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "clips"
    write_demo_folder(folder, 4, 2, 32, 3)
    entries = json.loads((folder / "annotations.json").read_text())
    for entry, text in zip(entries, STRANGE, strict=True):
        entry["text"] = text.strip()
    (folder / "annotations.json").write_text(json.dumps(entries))
    return folder


def test_sentences_of_folders_and_shards(folder, tmp_path):
    assert main(["pack", str(folder), "-o", str(tmp_path / "shards"), "--per-shard", "3"]) == 0
    expected = [text.strip() for text in STRANGE]
    shards = ShardSource(str(tmp_path / "shards"), CLIP)
    assert sentences_of(VideoFolder(folder, CLIP)) == sentences_of(shards) == expected
    assert sentences_of(shards, 2) == expected[:2]
    assert sentences_of(VideoFolder(folder, CLIP), 2) == [expected[0], expected[-1]]


def test_check_says_which_words_a_checkpoint_does_not_know(folder, trained, capsys):
    assert main(["check", str(folder), "--checkpoint", str(trained), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "  vocabulary   6 of 46 are unknown (13 %): dog, barks, beach, on, runs; 1 of 4 sentences are cut" in out
    assert "are known" in out  # the sentences of val
    assert main(["check", str(folder), "--checkpoint", str(trained), "--workers", "0", "--json"]) == 0
    vocabulary = json.loads(capsys.readouterr().out)["train"]["vocabulary"]
    assert (vocabulary["unknown"], vocabulary["share"], vocabulary["cut_sentences"]) == (6, 0.1304, 1)


def test_cache_refuses_too_many_unknown_words_and_says_how_many_there_are(folder, trained, tmp_path, capsys):
    cache = ["cache", str(folder), str(trained), "-o", str(tmp_path / "cache")]
    assert main([*cache, "--unknown-words", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "trip-data: words: 6 of 46 are unknown (13 %): dog" in error
    assert "expected at most 10 %" in error
    assert "--unknown-words 1" in error
    assert not any(tmp_path.iterdir())
    assert main(cache) == 0
    assert "words: 6 of 46 are unknown" in capsys.readouterr().err
    assert sorted(sentences_of(CachedClips(tmp_path / "cache"))) == sorted(text.strip() for text in STRANGE)


def test_a_cache_of_another_length_and_size(folder, trained, tmp_path, capsys):
    cache = ["cache", str(folder), str(trained), "-o", str(tmp_path / "cache")]
    assert main([*cache, "--frames", "4", "--size", "48x16"]) == 0
    assert CachedClips(tmp_path / "cache").index["shape"] == [8, 4, 2, 6]
    for words, message in (
        (["--frames", "1"], "frames: found 1, expected at least 2"),
        (["--size", "40x32"], "size: found 40x32, expected multiples of 16"),
        (["--size", "65536x65536"], "size: found 3 frames of 65536x65536, 36.0 GiB of pixels, expected at most 1"),
    ):
        capsys.readouterr()
        assert main([*cache[:-1], str(tmp_path / "other"), *words]) == 2
        assert f"trip-data: {message}" in capsys.readouterr().err


def test_text_of_a_folder_in_transformers_layout_is_cut_to_its_encoder(tmp_path):
    _, stable_diffusion = save_published(tmp_path)
    text_encoder, tokenizer_json = checkpoint.load_text(stable_diffusion)
    assert text_encoder.config.hidden_size == TINY.trip.text_width
    assert len(Tokenizer.from_str(tokenizer_json).encode("ab " * 40).ids) == TINY.trip.text_length
    assert words_of(tokenizer_json, ["ab", "dog"]).unknown == 0
