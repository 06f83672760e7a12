"""The runtime as a library: what it imports, what it makes of seeds, prompts and batches, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from trip_reference.sampling import sample
from trip_rt import Animation, Animator, InputError, backends, images
from trip_rt.backends import EngineOptions
from trip_rt.backends.base import HostEngine
from trip_rt.components import REQUIRED, VARIANTS, signatures
from trip_rt.devices import open_device
from trip_rt.pipeline import Pipeline
from trip_rt.sampling.loop import initial_noise
from trip_rt.settings import SPEEDS, Settings, Speed
from trip_rt.tokenizer import MAX_CHARACTERS, PromptTokenizer

PROMPT = "a red ball rolls to the right"
ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnxruntime", "triton", "diffusers", "transformers", "PIL", "av", "tokenizers", "tqdm")


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tiny_animator, picture):
    return tiny_animator(picture, PROMPT, seed=7)


def python(code, *args):
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ).stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    assert python(f"import sys, trip_rt; print(*[name for name in {HEAVY} if name in sys.modules])") == []


def test_every_module_imports_without_torch():
    code = """
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "diffusers", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import trip_rt
for module in pkgutil.walk_packages(trip_rt.__path__, "trip_rt."):
    importlib.import_module(module.name)
    print(module.name)
"""
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "trip_rt").rglob("*.py")]
    expected = {".".join(path.parts).removesuffix(".__init__") for path in modules} - {"trip_rt"}
    assert set(python(code)) == expected


def test_a_clip(tiny_animator, clip):
    config = tiny_animator.config
    assert clip.frames.shape == (config.num_frames, config.height, config.width, 3) and clip.frames.dtype == np.uint8
    assert (clip.prompt, clip.seed, clip.fps) == (PROMPT, 7, config.fps)
    assert len(np.unique(clip.frames)) > 10


def test_pictures_may_be_paths_or_images(tiny_animator, picture, clip, tmp_path):
    Image.fromarray(picture).save(tmp_path / "photo.png")
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(picture)):
        assert (tiny_animator(source, PROMPT, seed=7).frames == clip.frames).all()


def test_save(clip, tmp_path):
    clip.save(tmp_path / "frames")
    saved = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    assert (np.stack(saved) == clip.frames).all()


def test_seeds(tiny_animator, picture, clip):
    assert (tiny_animator(picture, PROMPT, seed=7).frames == clip.frames).all()
    others = [tiny_animator(picture, PROMPT, seed=seed).frames for seed in (8, 2**64 - 1)]
    assert all((other != clip.frames).mean() > 0.1 for other in others)


def test_a_new_animator_repeats_the_clip(tiny_bundle, picture, clip):
    with Animator(str(tiny_bundle), backend="onnxruntime", options=EngineOptions(threads=1)) as animator:
        difference = animator(picture, PROMPT, seed=7).frames.astype(int) - clip.frames
        assert np.abs(difference).max() <= 1
        assert animator.describe() == {
            "backend": "onnxruntime",
            "version": animator.describe()["version"],
            "device": "cpu",
            "reason": "asked for, on cpu",
            "after_unet": "the engine of tnf",
            "cuda_graph": False,
            "auto_arithmetic": "not asked for yet",
        }


def test_prompts_and_pictures_matter(tiny_animator, picture, clip):
    def differs(*args, **settings):
        return (tiny_animator(*args, seed=7, **settings).frames != clip.frames).any()

    assert differs(picture, "a blue ball rolls to the left")
    assert differs(255 - picture, PROMPT)
    assert differs(picture, PROMPT, negative_prompt="a blue ball")
    square = picture[:, :40]
    assert (
        tiny_animator(square, PROMPT, fit="crop").frames != tiny_animator(square, PROMPT, fit="letterbox").frames
    ).any()
    assert differs(picture, PROMPT, num_inference_steps=3)
    assert differs(picture, PROMPT, guidance_scale=9)


def latents(animator, picture, prompt, **settings):
    fitted = np.asarray(Image.fromarray(picture).resize((animator.config.width, animator.config.height)))
    return animator.latents(fitted[None], [prompt], [3], **settings)[0]


def test_guidance(tiny_animator, picture):
    """z(g) is conditional only at g = 1, unconditional only at g = 0, and one step is linear in g."""
    one, same = (
        latents(tiny_animator, picture, PROMPT, guidance_scale=1, negative_prompt=text) for text in ("", "a blue ball")
    )
    np.testing.assert_allclose(one, same, atol=1e-4)
    zero, same = (latents(tiny_animator, picture, text, guidance_scale=0) for text in (PROMPT, "a blue ball"))
    np.testing.assert_array_equal(zero, same)
    z0, z1, z5 = (latents(tiny_animator, picture, PROMPT, guidance_scale=g, num_inference_steps=1) for g in (0, 1, 5))
    assert np.abs(z1 - z0).max() > 0
    np.testing.assert_allclose(z5, z0 + 5 * (z1 - z0), atol=1e-3 * np.abs(z5).max())


def test_progress_is_told_after_every_step(tiny_animator, picture):
    told = []
    tiny_animator.batch([picture] * 3, [PROMPT] * 3, num_inference_steps=2, on_step=lambda *step: told.append(step))
    assert told == [(done, 6) for done in range(1, 7)]


def test_stream_gives_the_same_frames(tiny_animator, picture, clip):
    assert (np.stack(list(tiny_animator.stream(picture, PROMPT, seed=7))) == clip.frames).all()


class StandIn(HostEngine):
    """An engine made of another one."""

    backend = "stand-in"
    probe = open = describe = close = None

    def __init__(self, engine, spec):
        super().__init__(spec, open_device("cpu"))
        self.engine = engine


StandIn.__abstractmethods__ = frozenset()


class ForBatches(StandIn):
    """An engine for several clips, run one at a time by one for a single clip; `halves` are those of guidance."""

    def __init__(self, engine, spec, batch, halves):
        super().__init__(engine, spec)
        self.batch, self.halves = batch, halves

    def compute(self, inputs):
        outputs = {}
        for clip in range(self.batch):
            rows = [half * self.batch + clip for half in range(self.halves)]
            single = {
                name: array[rows] if len(array) == self.batch * self.halves else array for name, array in inputs.items()
            }
            for name, array in self.engine.run(single).items():
                made = outputs.setdefault(
                    name, np.full((self.batch * self.halves, *array.shape[1:]), np.nan, array.dtype)
                )
                made[rows] = array
        return outputs


def remade(animator, profile, **engines):
    """`animator` with another profile and other engines."""
    other = copy.copy(animator)
    other.profile, other.engines = profile, animator.engines | engines
    other._pipeline = Pipeline(
        open_device("cpu"), animator.config, profile, other.engines.get, Path("unused"), cuda_graph=True
    )
    return other


def with_tensors(animator, name, batch, decode_frames):
    """That engine's spec, for another batch or chunk."""
    profile = animator.profile
    shapes = profile.context_width, profile.features_shape
    inputs, outputs = signatures(animator.config, batch, decode_frames, *shapes)[name]
    return dataclasses.replace(animator.engines[name].spec, inputs=inputs, outputs=outputs)


def batched(animator, batch):
    """`animator` as if its bundle had been exported for `batch` clips at a time."""
    halves = {"text_encoder": 1, "text_projection": 2, "vae_encoder": 1, "unet": 2, "tnf": 2}
    engines = {
        name: ForBatches(animator.engines[name], with_tensors(animator, name, batch, 1), batch, n)
        for name, n in halves.items()
    }
    return remade(animator, dataclasses.replace(animator.profile, batch=batch), **engines)


WAYS = {
    "balanced": SPEEDS["balanced"],
    "half guided": Speed("dpm++", 4, (0.3, 0.8)),
    "reused": Speed(num_inference_steps=5, feature_reuse=2),
    "reused, half guided": Speed("unipc", 6, (0.0, 0.6), 3),
}


@pytest.mark.parametrize("speed", WAYS.values(), ids=WAYS)
def test_every_speed_is_the_oracle_at_that_speed(tiny_animator, picture, speed):
    model, config = tiny_model(), tiny_animator.config
    fitted = images.load_image(picture, config.height, config.width, "crop")[None]
    tokens = PromptTokenizer(tiny_animator.tokenizer_json, config.text_length, model.vocabulary)
    with torch.no_grad():
        text = model.encode_text(torch.from_numpy(tokens(["", PROMPT])))
        first = model.encode_image(torch.from_numpy(images.to_model(fitted)))
    noise = torch.from_numpy(initial_noise([3], config.latent_shape))
    expected = sample(model, first, noise, text, Settings(speed).steps(config)).numpy()
    found = tiny_animator.latents(fitted, [PROMPT], [3], speed=speed)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    exact = tiny_animator.latents(fitted, [PROMPT], [3], num_inference_steps=speed.num_inference_steps)
    assert np.abs(found - exact).max() > 1e-4 * np.abs(expected).max(), "it is another way"


def test_a_bundle_without_the_engines_of_a_speed(tiny_animator, picture):
    lacking = {name: engines for name, engines in tiny_animator.profile.engines.items() if name in REQUIRED}
    lean = remade(tiny_animator, dataclasses.replace(tiny_animator.profile, engines=lacking))
    lean.engines = {name: tiny_animator.engines[name] for name in REQUIRED}

    def open_engine(name, arithmetic="own"):
        return lean.engines.get(name)

    lean._pipeline = Pipeline(
        open_device("cpu"), lean.config, lean.profile, open_engine, Path("unused"), cuda_graph=True
    )
    speed = Speed(num_inference_steps=3, guidance_interval=(0.4, 1.0))
    assert (
        lean(picture, PROMPT, speed=speed).frames == tiny_animator(picture, PROMPT, speed=speed).frames
    ).mean() > 0.99
    with pytest.raises(InputError, match=r"feature reuse: found no engine .* export it again without --no-speedups"):
        lean(picture, PROMPT, speed=Speed(num_inference_steps=3, feature_reuse=2))


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_batch_gives_what_single_runs_give(tiny_animator, picture, batch):
    pictures = [picture, 255 - picture, picture[::-1]]
    prompts, seeds = [PROMPT, "a blue ball", PROMPT], [5, 6, 5]
    settings = {"negative_prompt": "a green ball", "num_inference_steps": 2}
    clips = batched(tiny_animator, batch).batch(pictures, prompts, seeds=seeds, **settings)
    for made, image, prompt, seed in zip(clips, pictures, prompts, seeds, strict=True):
        alone = tiny_animator(image, prompt, seed=seed, **settings)
        assert (made.prompt, made.seed) == (prompt, seed) and (made.frames == alone.frames).all()


def test_batch_seeds_count_up_and_an_empty_batch_is_empty(tiny_animator, picture):
    assert [clip.seed for clip in tiny_animator.batch([picture] * 2, [PROMPT] * 2, num_inference_steps=1)] == [0, 1]
    assert tiny_animator.batch([], []) == []


class InChunks(StandIn):
    """The decoder of fewer frames at a time, run by one of more."""

    def compute(self, inputs):
        (frames,), size = (tensor.shape[0] for tensor in self.engine.spec.inputs), len(inputs["latents"])
        padded = np.concatenate(
            [inputs["latents"], np.zeros((frames - size, *inputs["latents"].shape[1:]), np.float32)]
        )
        return {name: array[:size] for name, array in self.engine.run({"latents": padded}).items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_decoding_in_chunks_changes_nothing(tiny_animator, picture, clip, size):
    decoder = InChunks(tiny_animator.engines["vae_decoder"], with_tensors(tiny_animator, "vae_decoder", 1, size))
    chunked = remade(tiny_animator, dataclasses.replace(tiny_animator.profile, decode_frames=size), vae_decoder=decoder)
    frames = chunked(picture, PROMPT, seed=7).frames
    assert frames.shape == clip.frames.shape and np.abs(frames.astype(int) - clip.frames).max() <= 1


def in_chunks_of_two(animator):
    decoder = InChunks(animator.engines["vae_decoder"], with_tensors(animator, "vae_decoder", 1, 2))
    return remade(animator, dataclasses.replace(animator.profile, decode_frames=2), vae_decoder=decoder)


def test_clips_taken_in_turns_are_not_mixed(tiny_animator, picture):
    chunked = in_chunks_of_two(tiny_animator)
    kinds = [(PROMPT, 1), ("a blue ball", 2), ("a green ball", 3)]
    alone = [chunked(picture, prompt, seed=seed, num_inference_steps=1).frames for prompt, seed in kinds]
    streams = [chunked.stream(picture, prompt, seed=seed, num_inference_steps=1) for prompt, seed in kinds]
    taken = [np.stack(frames) for frames in zip(*zip(*streams, strict=True), strict=True)]
    for frames, expected in zip(taken, alone, strict=True):
        assert (frames == expected).all()


def test_an_abandoned_stream_holds_nobody_up(tiny_animator, picture):
    chunked = in_chunks_of_two(tiny_animator)
    abandoned = chunked.stream(picture, PROMPT, num_inference_steps=1)
    next(abandoned)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(chunked, picture, PROMPT, num_inference_steps=1).result(timeout=60)
    assert len(list(abandoned)) == chunked.config.num_frames - 1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_threads_wait_for_each_other(both_backends, picture, backend):
    """Eight threads call every method that makes clips; each clip is what one thread alone makes."""
    with Animator(both_backends, backend) as animator:
        fitted = images.load_image(picture, animator.config.height, animator.config.width)[None]
        ways = {
            "call": lambda seed: animator(picture, PROMPT, seed=seed, num_inference_steps=2).frames,
            "stream": lambda seed: np.stack(list(animator.stream(picture, PROMPT, seed=seed, num_inference_steps=2))),
            "batch": lambda seed: animator.batch([picture], PROMPT, seeds=[seed], num_inference_steps=2)[0].frames,
            "decode": lambda seed: np.concatenate(
                list(animator.decode(animator.latents(fitted, [PROMPT], [seed], num_inference_steps=2)[0]))
            ),
        }
        alone = {seed: ways["call"](seed) for seed in range(6)}
        with ThreadPoolExecutor(8) as pool:
            jobs = [(seed, pool.submit(way, seed)) for _ in range(2) for seed in alone for way in ways.values()]
            assert all((job.result(timeout=100) == alone[seed]).all() for seed, job in jobs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_five_hundred_clips_of_eight_threads(both_backends, picture, backend):
    with Animator(both_backends, backend) as animator:
        alone = {seed: animator(picture, PROMPT, seed=seed).frames for seed in range(20)}
        with ThreadPoolExecutor(8) as pool:
            jobs = [(i % 20, pool.submit(animator, picture, PROMPT, seed=i % 20)) for i in range(500)]
            assert sum((job.result().frames == alone[seed]).all() for seed, job in jobs) == 500


def test_a_call_within_a_call_is_told_so(tiny_animator, picture):
    with pytest.raises(RuntimeError, match="within another one's on_step"):
        tiny_animator(picture, PROMPT, on_step=lambda done, total: tiny_animator(picture, PROMPT))
    assert tiny_animator(picture, PROMPT, num_inference_steps=1).frames.any(), "and nothing is held by it"


def test_unknown_and_missing_backends(tiny_bundle, tiny_animator):
    with pytest.raises(InputError, match="found 'abacus', expected auto, tensorrt"):
        Animator(tiny_bundle, backend="abacus")
    profile = tiny_animator.profile
    emptied = dataclasses.replace(
        profile, engines={name: {"abacus": spec} for name in profile.engines for spec in ["?"]}
    )
    for backend, says in (("onnxruntime", "not for onnxruntime"), ("auto", "none of a known backend")):
        with pytest.raises(InputError, match=says):
            backends.choose(emptied, backend)


def inputs_of(engine):
    return {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in engine.spec.inputs}


@pytest.mark.parametrize("name", [*REQUIRED, *VARIANTS])
def test_engines_check_their_inputs(tiny_animator, name):
    engine = tiny_animator.engine(name)
    outputs = engine.run(inputs_of(engine))
    assert {(key, str(array.dtype), array.shape) for key, array in outputs.items()} == {
        (t.name, t.dtype, t.shape) for t in engine.spec.outputs
    }
    for key, array in inputs_of(engine).items():
        wrong = {"dtype": array.astype(np.float64), "rank": array[None], "side": np.concatenate([array, array])}
        for value in wrong.values():
            with pytest.raises(ValueError, match=f"input {key}: found {value.dtype}"):
                engine.run(inputs_of(engine) | {key: value})
        with pytest.raises(ValueError, match=f"input {key}: found nothing"):
            engine.run({other: value for other, value in inputs_of(engine).items() if other != key})
    with pytest.raises(ValueError, match="unknown inputs \\['extra'\\]"):
        engine.run(inputs_of(engine) | {"extra": np.zeros(1)})


def test_closing_twice(tiny_bundle, picture):
    animator = Animator(tiny_bundle)
    animator.close()
    animator.close()
    with pytest.raises(RuntimeError, match="closed engine"):
        animator(picture, PROMPT)


def ids_and_warnings(animator, prompt):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ids = animator._tokenizer([prompt])
    assert ids.shape == (1, animator.config.text_length)
    return ids[0].tolist(), [str(warning.message) for warning in said]


def test_long_prompts_are_cut_with_a_warning(tiny_animator):
    known = ids_and_warnings(tiny_animator, PROMPT)
    room = tiny_animator.config.text_length - 2
    assert known[1] == []
    ids, said = ids_and_warnings(tiny_animator, "ball " * 10_000)
    assert len(said) == 1 and "too long" in said[0] and f"first {room} tokens" in said[0] and len(said[0]) < 120
    assert ids == ids_and_warnings(tiny_animator, "ball " * room)[0] and len(set(ids)) == 3
    ids, said = ids_and_warnings(tiny_animator, PROMPT + " " * MAX_CHARACTERS + "ball")
    assert ids == known[0] and len(said) == 1 and f"first {MAX_CHARACTERS} characters" in said[0]


def test_unknown_words_are_named(tiny_animator):
    _, said = ids_and_warnings(tiny_animator, "a zyx ball rolls to the qqq")
    assert said == ["this model knows no such words and passes over them: qqq, zyx"]
    _, said = ids_and_warnings(tiny_animator, "a\x1b[31m " + "z" * 9000)
    assert len(said) == 1 and said[0].isprintable() and len(said[0]) < 200


def test_animations_are_values(clip):
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.seed = 8
    assert isinstance(clip, Animation)


def test_a_negative_prompt_without_guidance_is_warned_of(tiny_animator, picture):
    with pytest.warns(UserWarning, match="negative prompt: it says nothing at guidance scale 1"):
        tiny_animator(picture, "a red ball", negative_prompt="a square", guidance_scale=1)
