"""Caches that others made: what does not hold what its index says is refused."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_cache import INDEX, SENTENCES, save_cache

from trip_reference.data.cache import CachedClips
from trip_rt import InputError


@pytest.fixture
def cache(tmp_path):
    return save_cache(tmp_path)


def test_a_cache_gives_its_clips(cache):
    clips = CachedClips(cache)
    for number, sentences in enumerate(SENTENCES):
        clip = clips.clip(number, np.random.default_rng(0))
        assert clip.text in sentences and clip.latents.shape == (2, 3, 2, 2) and clip.embedding.shape == (4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": 2**40}, "found 1 files of latents, expected 4294967296"),  # an epoch's order would take 8 TB
        ({"clips": -1}, "clips: found -1, expected int >= 1"),
        ({"clips": "3"}, "clips: found '3', expected int"),
        ({"version": 2}, "version"),
        ({"shape": [2, 3]}, "shape"),
        ({"other": 1}, "unknown field other"),
    ],
)
def test_an_index_that_cannot_be_is_refused(cache, changes, message):
    (cache / "cache.json").write_text(json.dumps(INDEX | changes))
    with pytest.raises(InputError, match=message):
        CachedClips(cache)


@pytest.mark.parametrize(
    ("file", "tensors", "texts", "message"),
    [
        ("latents-00000", {"latents": torch.ones(2, 2, 3, 2, 2).half()}, SENTENCES, "latents: found"),
        ("latents-00000", {"latents": torch.ones(3, 2, 3, 2, 2)}, SENTENCES, "latents: found .'F32'"),
        ("latents-00000", {"latents": torch.full((3, 2, 3, 2, 2), torch.nan).half()}, SENTENCES, "not finite"),
        ("latents-00000", {"text": torch.ones(3, 4, 6).half()}, SENTENCES, "text: found"),
        ("latents-00000", {}, SENTENCES[:2], "found no sentences for each of 3 clips"),
        ("latents-00000", {}, [["a"], [], ["b"]], "found no sentences"),
        ("latents-00000", {}, [["a"], [3], ["b"]], "found no sentences"),
        ("latents-00000", {}, [["a"], ["\ud800"], ["b"]], "found no sentences"),
        ("empty", {"text": torch.ones(4).half()}, SENTENCES, "found no embedding"),
    ],
)
def test_files_that_are_not_as_the_index_says_are_refused(cache, file, tensors, texts, message):
    path = cache / f"{file}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | tensors
    path.unlink()
    save_file(tensors, path, metadata={"texts": json.dumps(texts)})
    with pytest.raises(InputError, match=message) as caught:
        CachedClips(cache).clip(0, np.random.default_rng(0))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["cache.json", "latents-00000.safetensors", "empty.safetensors"])
def test_what_is_no_plain_file_is_not_opened(cache, name):
    (cache / name).unlink()
    os.mkfifo(cache / name)
    with pytest.raises(InputError, match="found a named pipe"):
        CachedClips(cache).clip(0, np.random.default_rng(0))
