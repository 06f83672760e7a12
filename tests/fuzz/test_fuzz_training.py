"""What a run takes up: recipes, single settings, the state of a run, caches."""

import json

import numpy as np
import pytest
from fuzzing import HOSTILE, damaged, fuzz_area, hostile_json, json_text, mutated_json
from hypothesis import strategies as st
from small_cache import SENTENCES, save_cache
from small_run import SmallRun, saved_state

from trip_reference.data.cache import CachedClips, _opened
from trip_reference.training.config import RECIPES, load_config
from trip_reference.training.state import read_place
from trip_rt.config import from_json, to_json


def check_config(config):
    """It is one that could have been written out and given again."""
    assert from_json(type(config), json.loads(json.dumps(to_json(config))), "again") == config


@fuzz_area("recipes", quick=60, full=1500)
def test_recipes(fuzz, tmp_path):
    path = tmp_path / "recipe.toml"
    valid = [recipe.read_bytes() for recipe in RECIPES.glob("*.toml")]
    deep = [b"[run]\nseed = " + b"[" * 20000, b"[run]\nseed = " + b"9" * 5000, b"stages = [{}]", b"run = 3", b"\xff"]

    def load(data):
        path.write_bytes(data)
        check_config(load_config("demo", path))

    fuzz(damaged(valid) | st.sampled_from(deep), load, folder=tmp_path)


@fuzz_area("recipes", quick=60, full=1000)
def test_settings(fuzz):
    data = to_json(load_config("demo"))
    names = [f"{section}.{name}" for section, values in data.items() if section != "stages" for name in values]
    names += [f"stages.{place}.{name}" for place in (0, -1, 9) for name in data["stages"][0]]
    names += ["stages", "run", "", ".", "run.", "stages.x.steps", "stages.0"]
    values = st.sampled_from(HOSTILE).map(json_text) | st.text(max_size=20)
    words = st.builds("{}={}".format, st.sampled_from(names), values) | st.text(max_size=20)

    fuzz(st.lists(words, min_size=1, max_size=3), lambda words: check_config(load_config("demo", None, words)))


@pytest.fixture
def state(tmp_path):
    return saved_state(tmp_path)


@fuzz_area("states", quick=60, full=1500)
def test_states(fuzz, state):
    valid = state.read_bytes()
    length = int.from_bytes(valid[:8], "little")
    header, numbers = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    place = json.loads(header["__metadata__"]["place"])

    def load(data):
        state.write_bytes(data)
        place, run = read_place(state, "run"), SmallRun()
        run.load(state)
        assert place.step >= 0 and 0 <= place.seconds < float("inf")
        fresh = SmallRun()
        for name, tensor in run.tensors.items():
            assert tensor.isfinite().all() and run.average.tensors[name].isfinite().all()
            assert tensor.shape == fresh.tensors[name].shape
        run.step()  # the optimiser works on what it was given

    def with_header(text):
        return len(text).to_bytes(8, "little") + text + numbers

    def with_place(text):
        entry = {"run": "run", "place": text.decode(errors="surrogateescape")}
        return with_header(json.dumps(header | {"__metadata__": entry}).encode())

    places, headers = hostile_json([place]).map(with_place), hostile_json([header]).map(with_header)
    fuzz(places | headers | damaged([valid]), load, folder=state.parent)


@pytest.fixture
def cache(tmp_path):
    return save_cache(tmp_path)


@fuzz_area("caches", quick=60, full=1500)
@pytest.mark.parametrize("name", ["cache.json", "latents-00000.safetensors", "empty.safetensors"])
def test_caches(fuzz, cache, name):
    path = cache / name
    valid = path.read_bytes()
    if name == "cache.json":
        inputs = mutated_json([json.loads(valid)])
    else:
        length = int.from_bytes(valid[:8], "little")
        header, numbers = json.loads(valid[8 : 8 + length]), valid[8 + length :]
        texts = hostile_json([SENTENCES]).map(lambda text: {"texts": text.decode()})
        headers = hostile_json([header]) | texts.map(lambda one: json.dumps(header | {"__metadata__": one}).encode())
        inputs = headers.map(lambda text: len(text).to_bytes(8, "little") + text + numbers) | damaged([valid])

    def load(data):
        path.unlink()  # the file before may be mapped
        path.write_bytes(data)
        _opened.cache_clear()
        clips = CachedClips(cache)
        for number in range(len(clips)):
            clip = clips.clip(number, np.random.default_rng(0))
            assert list(clip.latents.shape) == [2, 3, 2, 2] and clip.latents.isfinite().all()
            assert clip.text.encode() is not None
            if clips.index["text_encoder"]:
                assert clip.embedding.shape == clips.empty_text().shape and clip.embedding.isfinite().all()

    fuzz(inputs, load, folder=cache, share=1 / 3)
