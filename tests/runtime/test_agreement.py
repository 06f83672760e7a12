"""The same call with the same seed gives the same clip, whatever engine library runs it. Slow: it compiles the demo
model natively."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from trip_export.export import export_bundle
from trip_export.plan import ExportOptions
from trip_rt import Animator
from trip_rt.accuracy import psnr
from trip_rt.bundle import open_bundle
from trip_rt.images import to_frames

ROOT = Path(__file__).parents[2]
BACKENDS = ("onnxruntime", "openvino", "inductor")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="native code needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement") / "bundle"
    result = export_bundle(
        ROOT / "checkpoints" / "demo", folder, ExportOptions(backends=BACKENDS, parity_steps=4, speedups=False)
    )
    assert set(result.parity) == set(BACKENDS) and all(parity.passed for parity in result.parity.values())
    return folder


def test_three_libraries_give_one_clip(bundle):
    clips = {}
    for backend in BACKENDS:
        with Animator(bundle, backend) as animator:
            pixels = np.concatenate(
                list(animator.decode_pixels(animator.latents(_picture(), ["a red ball rolls to the right"], [7])[0]))
            )
            assert (
                animator(ROOT / "examples" / "ball.png", "a red ball rolls to the right", seed=7).frames
                == to_frames(pixels)
            ).all()
            clips[backend] = pixels
    for one, other in combinations(BACKENDS, 2):
        agreement = psnr(clips[one], clips[other], 2.0), psnr(to_frames(clips[one]), to_frames(clips[other]), 255.0)
        print(f"{one} and {other} agree at {agreement[0]:.1f} dB, as 8-bit frames at {agreement[1]:.1f} dB")
        assert min(agreement) >= 60


def test_native_code_is_never_taken_unasked(bundle):
    manifest = open_bundle(bundle).manifest
    assert "inductor" in manifest.profile().backends
    with Animator(bundle) as animator:
        assert animator.backend == "openvino"
        assert "inductor: its engines are native code" in animator.backend_reason


def _picture():
    from trip_rt.images import load_image

    return load_image(ROOT / "examples" / "ball.png", 128, 128)[None]
