"""What the UNet computes in: what `auto` takes and why, and clips in bf16 beside those in fp32."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from trip_reference.presets import PRESETS
from trip_rt import Animator, EngineOptions, InputError, Settings, Speed, arithmetic
from trip_rt.accuracy import psnr
from trip_rt.arithmetic import LEAST_GFLOP, WORTH, Chooser, parity_name
from trip_rt.backends.openvino import OpenVINOEngine
from trip_rt.settings import SPEEDS

PROMPT = "a red ball rolls to the right"
CLOSE = {parity_name("openvino", "bf16"): {"passed": True}}
ALL_CLOSE = CLOSE | {parity_name("openvino", "int8"): {"passed": True}}


def chooser(bf16=0.5, int8=None, precision="fp32", parity=ALL_CLOSE, lowers=True, gflop=LEAST_GFLOP, int8_from=0):
    """A chooser, whose networks take those shares of the time, and what it was asked to do."""
    told, shares = [], {"own": 1.0, "bf16": bf16, "int8": int8}

    def seconds(kind):
        told.append(kind)
        return shares[kind]

    spec = SimpleNamespace(precision=precision, gflop=gflop)
    engines = {"unet": {"openvino": spec}} | ({"unet_int8": {"openvino": spec}} if int8 else {})
    drop = lambda kind: told.append(f"drop {kind}")  # noqa: E731
    profile = SimpleNamespace(engines=engines, parity=parity, quantised_from={"int8": int8_from})
    library = SimpleNamespace(backend="openvino", lowers=lambda: lowers, probe=lambda spec, options: "cpu")
    return Chooser(library, EngineOptions(), profile, seconds, drop), told


def test_auto_takes_what_is_faster():
    choose, told = chooser(0.6)
    assert choose.said == "not asked for yet" and not told
    assert choose("auto") == "bf16" and choose.said == "bf16: the UNet's share of its time in fp32 is 0.60 in bf16 here"
    assert (choose("fp32"), choose("bf16")) == ("own", "bf16") and told == ["own", "bf16"]


@pytest.mark.parametrize(
    ("bf16", "int8", "best", "freed"),
    [(0.6, 0.5, "int8", ["bf16"]), (0.5, 0.6, "bf16", ["int8"]), (0.9, 0.87, "own", ["bf16", "int8"])],
)
def test_the_fastest_of_several(bf16, int8, best, freed):
    choose, told = chooser(bf16, int8)
    assert choose("auto") == best
    assert told == ["own", "bf16", "int8", *(f"drop {kind}" for kind in freed)]
    shares = f"the UNet's share of its time in fp32 is {bf16:.2f} in bf16 and {int8:.2f} in int8 here"
    assert choose.said == f"{'fp32' if best == 'own' else best}: {shares}"


def test_int8_needs_no_bf16():
    choose, told = chooser(int8=0.5, lowers=False)
    assert choose("auto") == "int8" and told == ["own", "int8"]
    assert chooser(int8=0.5, precision="fp16")[0]("int8") == "int8"
    reasons = "openvino without bf16 on this machine; the bundle does not say how close int8 comes to PyTorch"
    choose, told = chooser(int8=0.5, lowers=False, parity=CLOSE)
    assert choose("auto") == "own" and choose.said == f"fp32: {reasons}" and not told


@pytest.mark.parametrize("share", [WORTH + 0.01, 1.0, 3.0])
def test_what_is_not_worth_it_is_freed(share):
    choose, told = chooser(share)
    assert choose("auto") == "own" and told == ["own", "bf16", "drop bf16"]
    assert choose.said == f"fp32: the UNet's share of its time in fp32 is {share:.2f} in bf16 here"
    assert choose("auto") == "own" and len(told) == 3, "measured once"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"precision": "fp16"}, "fp16: engines of fp16"),
        ({"lowers": False}, "fp32: openvino without bf16 on this machine"),
        ({"parity": {"openvino": {"passed": True}}}, "fp32: the bundle does not say how close bf16 comes to PyTorch"),
        (
            {"parity": {parity_name("openvino", "bf16"): {"passed": False}}},
            "fp32: bf16 was not close enough to PyTorch",
        ),
        ({"gflop": LEAST_GFLOP - 1}, "fp32: the UNet is too small for bf16 to pay"),
        (
            {"gflop": LEAST_GFLOP - 1, "int8": 0.5, "lowers": False},
            "fp32: openvino without bf16 on this machine; the UNet is too small for int8 to pay",
        ),
    ],
)
def test_auto_measures_nothing_where_it_cannot_gain(given, says):
    choose, told = chooser(**given)
    assert choose("auto") == "own" and choose.said.startswith(says) and not told


@pytest.mark.parametrize("int8_from", [0, 500])
def test_late_and_shallow_steps_are_not_int8s(int8_from):
    config = PRESETS["demo"].trip
    steps = Settings(num_inference_steps=6, feature_reuse=2).steps(config)
    choose, _ = chooser(int8=0.5, int8_from=int8_from)
    taken = [step.arithmetic for step in choose.steps("int8", steps)]
    assert taken == ["own" if step.shallow or step.timestep < int8_from else "int8" for step in steps]
    assert taken.count("int8") == (3 if int8_from == 0 else 2)
    assert {step.arithmetic for step in choose.steps("bf16", steps)} == {"bf16"}
    assert choose.steps("fp32", steps) == steps


def test_bf16_by_name():
    for given in {"gflop": 1.0}, {"parity": {}}, {"precision": "bf16"}:
        choose, _ = chooser(**given)
        assert choose("bf16") == ("own" if given == {"precision": "bf16"} else "bf16")
    for given, says in ({"precision": "fp16"}, "engines of fp16"), ({"lowers": False}, "openvino without bf16"):
        with pytest.raises(InputError, match=rf"arithmetic: found {says}.*, expected fp32 engines of OpenVINO"):
            chooser(**given)[0]("bf16")
    with pytest.raises(
        InputError, match=r"found a bundle without int8 engines for openvino, expected one .* exported with --int8"
    ):
        chooser()[0]("int8")


def test_threads_measure_once():
    choose, told = chooser()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(choose, ["auto"] * 32)) == {"bf16"}
    assert told == ["own", "bf16"]


def test_speeds():
    assert {name: speed.arithmetic for name, speed in SPEEDS.items()} == {
        "exact": "fp32",
        "balanced": "auto",
        "fast": "auto",
    }
    for wrong in ("fp16", "", None, 1, ["bf16"]):
        with pytest.raises(InputError, match="arithmetic: found"):
            Settings(speed=Speed(arithmetic=wrong))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)


@pytest.fixture
def animator(both_backends, monkeypatch):
    """On OpenVINO, which emulates bf16 or computes in fp32 where the CPU has none."""
    monkeypatch.setattr(OpenVINOEngine, "lowers", classmethod(lambda cls: True))
    with Animator(both_backends, "openvino", options=EngineOptions(threads=1)) as animator:
        yield animator


def test_clips_in_bf16(animator, picture):
    def frames(**settings):
        return animator(picture, PROMPT, seed=7, guidance_scale=2, **settings).frames

    exact = frames()
    native = "BF16" in animator.engine("unet", "bf16")._library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    lowered = frames(arithmetic="bf16")
    assert psnr(lowered, exact, 255) > 30 and (not native or (lowered != exact).any())
    assert (frames(arithmetic="bf16") == lowered).all() and (frames() == exact).all(), "neither disturbs the other"
    # Steps of every kind, in windows too.
    mixed = Speed(num_inference_steps=5, guidance_interval=(0.4, 1.0), feature_reuse=2, arithmetic="bf16")
    assert psnr(frames(speed=mixed), frames(speed=dataclasses.replace(mixed, arithmetic="fp32")), 255) > 30
    assert frames(arithmetic="bf16", num_frames=8).shape[0] == 8


def test_auto_opens_frees_and_says(animator, picture, monkeypatch):
    assert animator.describe()["auto_arithmetic"] == "not asked for yet"
    exact = animator(picture, PROMPT, seed=7, num_inference_steps=2).frames
    assert (animator(picture, PROMPT, seed=7, num_inference_steps=2, arithmetic="auto").frames == exact).all()
    assert animator.describe()["auto_arithmetic"] == "fp32: the UNet is too small for bf16 to pay"
    for worth, expected in (0.0, "own"), (1e9, "bf16"):
        monkeypatch.setattr(arithmetic, "WORTH", worth)
        monkeypatch.setattr(arithmetic, "LEAST_GFLOP", 0.0)
        profile = dataclasses.replace(animator.profile, parity=ALL_CLOSE)
        monkeypatch.setattr(animator._chooser, "_profile", profile)
        animator._chooser._auto = None
        assert animator.arithmetic("auto")[0] == expected
        assert ("unet in bf16" in animator.engines) == (expected == "bf16")
        clip = animator(picture, PROMPT, seed=7, num_inference_steps=2, arithmetic="auto")
        assert psnr(clip.frames, exact, 255) > 30


def test_no_bf16_here_is_one_line(tiny_animator, picture):
    with pytest.raises(InputError, match="arithmetic: found onnxruntime without bf16 on this machine"):
        tiny_animator(picture, PROMPT, arithmetic="bf16")
    assert tiny_animator.arithmetic("auto") == ("own", "fp32: onnxruntime without bf16 on this machine")
