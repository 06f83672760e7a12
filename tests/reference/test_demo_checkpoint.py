"""The shipped demo model: small enough, whole, and able to do what the README says."""

from pathlib import Path

import pytest

from trip_reference import checkpoint
from trip_reference.demo_world.verdicts import judge_clips
from trip_reference.evaluation.clips import demo_cases, make_clips
from trip_rt.settings import Settings

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


def test_it_is_at_most_16_mb_of_safetensors_and_text():
    files = [path for path in DEMO.rglob("*") if path.is_file() and not path.match("training/*.safetensors")]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md", ".png"}


@pytest.fixture(scope="module")
def model():
    return checkpoint.from_pretrained(DEMO)


def test_it_is_the_demo_preset(model):
    assert model.config.fusion == "tnf"
    assert model.config.first_frame == "start"
    assert (model.config.num_frames, model.config.height, model.config.width) == (16, 128, 128)


def test_it_animates_held_out_pictures(model):
    cases = demo_cases(model.config, 8)
    clips = make_clips(DEMO, cases, Settings(num_inference_steps=12))
    figures = judge_clips(clips, cases)
    everything = figures["all"]
    assert everything["frame 1"] == 100
    assert everything["background_psnr"] >= 28
    assert everything["motion"] >= 75
    assert len(clips) == 8
    assert sum(row["clips"] for row in figures["by_motion"].values()) == 8
