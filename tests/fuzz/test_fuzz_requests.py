"""What a caller asks for, by the command's files and by Python: an accepted request is whole and can be carried out."""

import dataclasses
import json
import math

import numpy as np
import pytest
from fuzzing import HOSTILE, fuzz_area, mutated_json
from hypothesis import strategies as st
from PIL import Image

from trip_rt import EngineOptions, Settings, Speed, images
from trip_rt.clip_requests import check_jobs, read_batch
from trip_rt.settings import SPEEDS, check_prompt, check_seed
from trip_rt.tokenizer import PromptTokenizer

LINES = [
    {"image": "photo.png", "prompt": "a red ball rolls", "output": "a.mp4", "seed": 7},
    {"image": "ä.png", "prompt": "ein Ball", "output": "frames"},
]


@fuzz_area("batch files", quick=60, full=1500)
def test_batch_files(fuzz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(data):
        (tmp_path / "clips.jsonl").write_bytes(data)
        jobs = read_batch(tmp_path / "clips.jsonl", 0)
        check_jobs(jobs, None)
        for job in jobs:
            assert job.prompt.strip() and job.image.encode() is not None and job.output.encode()
            assert type(job.seed) is int and 0 <= job.seed < 2**64

    fuzz(mutated_json(LINES), read, folder=tmp_path)


@pytest.mark.filterwarnings("ignore")  # of words that the model does not know
@fuzz_area("prompts", quick=60, full=1500)
def test_prompts(fuzz, tiny_animator):
    length, known = tiny_animator.config.text_length, tiny_animator._bundle.manifest.vocabulary
    tokenizer = PromptTokenizer(tiny_animator.tokenizer_json, length, known)
    characters = st.text(st.characters(codec=None, categories=None) | st.sampled_from("\ud800\udcff\0\x1b\n\u202e"))
    long = st.tuples(st.text(max_size=8), st.integers(0, 300_000)).map(lambda pair: pair[0] * pair[1])

    def encode(prompt):
        check_prompt(prompt)
        ids = tokenizer([prompt])
        assert ids.shape == (1, length) and ids.min() >= 0 and ids.max() < known

    fuzz(characters | long, encode)


ANYTHING = st.sampled_from(
    [value for value in HOSTILE if not (isinstance(value, str) and value.startswith("@"))]
    + [b"bytes", (0.2, 0.8), (1, 0), {1, 2}, 1j, 1 << 20000, object(), int, len, np.float32(0.5), np.int64(3)]
    + [np.zeros(3), np.array(2), np.float64("nan"), Speed(), SPEEDS["fast"], "fast", "exact", "crop", "unipc"]
)


@fuzz_area("settings", quick=60, full=1500)
def test_settings(fuzz, tiny_animator):
    fields = [field.name for field in dataclasses.fields(Settings)]
    speeds = st.builds(Speed, ANYTHING, ANYTHING, ANYTHING, ANYTHING)

    def build(drawn):
        changes, threads, device, seed = drawn
        steps = Settings().changed(changes).steps(tiny_animator.config)
        assert 1 <= len(steps) <= 1000 and not steps[0].shallow
        assert all(type(step.guidance_scale) is float and 0 <= step.guidance_scale <= 100 for step in steps)
        assert all(math.isfinite(value) for step in steps for value in (*step.latents, *step.corrected))
        options = EngineOptions(device, threads)
        assert options.device in ("auto", "cpu", "cuda") and (threads is None or 1 <= threads <= 256)
        assert 0 <= check_seed(seed) < 2**64

    changes = st.dictionaries(st.sampled_from([*fields, "steps", "x"]), ANYTHING | speeds, max_size=2)
    usual = st.tuples(st.just(None) | ANYTHING, st.just("cpu") | ANYTHING, st.just(7) | ANYTHING)
    fuzz(st.tuples(changes, usual).map(lambda pair: (pair[0], *pair[1])), build)


@pytest.mark.filterwarnings("ignore")
@fuzz_area("calls", quick=20, full=400)
def test_calls(fuzz, tiny_animator):
    """Whole calls with wrong things in the place of pictures, sentences and seeds."""
    config = tiny_animator.config
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    arrays = [picture, picture / 255, picture.astype(np.float16) / 255, picture[:, :, 0], picture.astype(np.int64)]
    arrays += [picture.transpose(2, 0, 1), picture[None], picture[:0], -picture / 255]
    pictures = ANYTHING | st.sampled_from([Image.fromarray(picture), *arrays])
    prompts = st.just("a red ball") | ANYTHING

    def call(drawn):
        image, prompt, seed, several = drawn
        if several:
            clips = tiny_animator.batch([image, picture], prompt, seeds=[seed, 1], num_inference_steps=1)
        else:
            clips = [tiny_animator(image, prompt, seed=seed, num_inference_steps=1)]
        for clip in clips:
            assert clip.frames.shape == (config.num_frames, config.height, config.width, 3)
            assert clip.prompt.strip() and json.dumps({"prompt": clip.prompt, "seed": clip.seed})
        fitted = images.load_image(image, config.height, config.width)
        assert fitted.shape == (config.height, config.width, 3)

    fuzz(st.tuples(pictures, prompts, st.just(7) | ANYTHING, st.booleans()), call)
