"""The control of the reference: what it adds, its checkpoint, its clips and its training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, tiny_model
from tiny_control import CONTROL, save_tiny_control
from training_runs import losses, start, train_tiny

from trip_reference import checkpoint
from trip_reference.control import CONFIG, WEIGHTS, carried, load_control, load_control_config
from trip_reference.data.cache import CachedClips, write_cache
from trip_reference.demo_world import world
from trip_reference.demo_world.paths import DemoPathClips, away_from_path, render_places, sentence
from trip_reference.demo_world.text import build_tokenizer
from trip_rt.control import MOTION_UNIT
from trip_rt.errors import InputError

RNG = np.random.default_rng


@pytest.mark.parametrize("first_frame", ["start", "end", "channel"])
def test_a_fresh_control_changes_nothing_and_a_trained_one_all_but_the_clean_frame(first_frame):
    model = tiny_model(first_frame=first_frame)
    model.add_control(CONTROL)
    config = model.config
    channels, frames, height, width = config.latent_shape
    torch.manual_seed(1)
    latents, text = (
        torch.randn(2, channels, frames, height, width),
        torch.randn(2, config.text_length, config.text_width),
    )
    given = latents, latents[:, :, 0], torch.tensor([400]), text
    control = torch.randn(2, CONTROL.channels, frames, height, width)
    with torch.no_grad():
        plain = model.residual_unet(*given)
        assert torch.equal(model.residual_unet(*given, model.encode_control(control, given[1])), plain)
        model.control.conv_out.weight.normal_()
        features = model.encode_control(control, given[1])
        assert features.shape == (2, frames + (first_frame != "channel"), 8, height, width)
        if first_frame != "channel":
            clean = 0 if first_frame == "start" else -1
            assert not features[:, clean].any() and features.any()
        assert not torch.equal(model.residual_unet(*given, features), plain)
        assert torch.equal(model.residual_unet(*given), plain)  # the hook is gone


def test_a_map_carries_what_is_seen():
    pictures = torch.zeros(2, 1, 8, 12)
    pictures[:, 0, 2, 3], pictures[:, 0, 6, 10] = 1.0, 0.5
    maps = torch.zeros(2, 3, 8, 12)
    maps[1, 2] = 0.2  # known a little, which says how far all the same
    maps[1, 0], maps[1, 1] = 0.2 * 3 / 12 / MOTION_UNIT, 0.2 * 2 / 8 / MOTION_UNIT  # three places right, two down
    still, moved = carried(pictures, maps)
    torch.testing.assert_close(still, pictures[0])
    torch.testing.assert_close(moved[0, 4, 6], torch.tensor(1.0), atol=1e-5, rtol=0)
    assert moved[0, 2, 3].abs() < 1e-5 and moved.sum() == pytest.approx(1.0, abs=1e-4)  # the other went out


def test_a_control_is_stored_beside_the_unet_that_it_belongs_to(tiny_checkpoint, tmp_path):
    folder = save_tiny_control(tiny_checkpoint, tmp_path / "control")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert load_control_config(folder, tiny_checkpoint) == CONTROL
    model = checkpoint.from_pretrained(tiny_checkpoint, control=folder)
    assert model.control and model.control.conv_out.weight.any()
    other = tmp_path / "other"
    checkpoint.save_pretrained(tiny_model(seed=1), checkpoint.load_tokenizer_json(tiny_checkpoint), other)
    with pytest.raises(InputError, match=r"found a control for a UNet of SHA-256 .*trip-train --recipe control"):
        checkpoint.from_pretrained(other, control=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": {"kind": "depth", "hidden_size": 8, "num_layers": 2}}, "control.kind: found 'depth'"),
        ({"control": {"kind": "motion", "hidden_size": 10**9, "num_layers": 2}}, "hidden_size"),
        ({"unet_sha256": "../../x"}, "unet_sha256"),
        ({"pickle": "me"}, "unknown field pickle"),
        ({"control": {"kind": "motion", "hidden_size": 16, "num_layers": 2}}, "found"),
    ],
)
def test_a_strangers_control_is_refused_in_one_line(tiny_checkpoint, tmp_path, change, message):
    folder = save_tiny_control(tiny_checkpoint, tmp_path / "control")
    stored = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(stored | change))
    with pytest.raises(InputError, match=message) as refused:
        load_control(folder, tiny_checkpoint, 4, 8, "start")
    assert "\n" not in str(refused.value)


def test_a_missing_control_is_named(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"nowhere.config.json: found no such file.*--recipe control"):
        load_control_config(tmp_path / "nowhere", tiny_checkpoint)


def test_clips_with_paths_are_where_their_control_says():
    config = dataclasses.replace(TINY.trip, num_frames=16, height=64, width=64)
    clips = DemoPathClips(config, 20)
    walked = []
    for index in range(20):
        sample = clips.clip(index, RNG(index))
        scene, points = clips.case(index)
        assert sample.control is not None and sample.control.shape == (3, 16, 8, 8)
        assert away_from_path(sample.frames, scene, points).max() == 0
        resting = render_places(scene, np.repeat(points[:1], 16, axis=0), 64)
        displacement = np.linalg.norm(points - points[0], axis=1).max()
        assert (away_from_path(resting, scene, points).max() > 1) == (displacement > 0.03)
        known = sample.control[2]
        at = np.unravel_index(known[-1].argmax(), known[-1].shape)
        assert np.hypot(*((np.array(at) + 0.5) / 8 - points[-1][::-1])) < 0.25
        walked.append(displacement)
        assert set(sample.text.split()) <= set(world.vocabulary())
    assert max(walked) > 0.3


def test_a_sentence_says_where_a_straight_path_goes_or_that_something_moves():
    scene, _, _ = world.sample(3)
    begin = np.array([scene.x, scene.y])
    right, aslant = (np.stack([begin, begin + np.array(by)]) for by in ([0.3, 0.01], [0.2, 0.2]))
    told = {sentence(scene, right, RNG(n)).split(" ", 3)[3] for n in range(40)}
    assert "moves" in told and len(told) > 3
    assert all("right" in words or words == "moves" for words in told)
    assert {sentence(scene, aslant, RNG(n)).split()[-1] for n in range(9)} == {"moves"}


def test_a_cache_keeps_controls(tmp_path):
    model = tiny_model(width=32)
    config = model.config
    tokenizer_json = build_tokenizer(config.text_length).to_str(pretty=True)
    clips = DemoPathClips(config, 3)
    write_cache(clips, model, tokenizer_json, tmp_path / "cache")
    cached = CachedClips(tmp_path / "cache")
    assert cached.index["control"] == [3, *config.latent_shape[1:]]
    control = clips.clip(1, RNG([0, 1])).control
    assert control is not None
    kept = cached.clip(1, RNG(0)).control
    assert kept is not None and np.abs(kept.numpy() - control).max() < 1e-3


@pytest.fixture(scope="module")
def controlled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a control for the checkpoint `trained`."""
    folder = tmp_path_factory.mktemp("controlled") / "run"
    train_tiny(folder, *settings(trained))
    return folder


def settings(base: Path) -> list[str]:
    return [
        f"model.checkpoint={str(base)!r}",
        "model.control=motion",
        "model.control_size=8",
        "model.control_layers=1",
        "data.source=demo-paths",
        'stages=[{name="control", steps=6, trains=["control.*"], unet_lr=1e-2, warmup=1}]',
        "data.validation=demo-paths",
        "run.validate_every=6",
        "run.validation_clips=2",
    ]


def test_training_leaves_the_control_alone_and_nothing_else(trained, controlled):
    assert sorted(path.name for path in controlled.iterdir() if path.is_file()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    model = checkpoint.from_pretrained(trained, control=controlled)
    assert model.control and model.control.conv_out.weight.any()
    assert len(losses(controlled)) == 6 and losses(controlled, "validation_loss")


def test_the_training_of_a_control_resumes_bit_for_bit(trained, controlled, tmp_path):
    killed = start(tmp_path / "run", *settings(trained), kill_at=4)
    killed.join(120)
    assert killed.exitcode == -9 and not (tmp_path / "run" / WEIGHTS).exists()
    train_tiny(tmp_path / "run", *settings(trained))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (controlled / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.source=demo", "found demo, whose clips have no control"),
        (
            'stages=[{name="x", steps=1, trains=["control.*", "residual_unet.*"], unet_lr=1e-3, warmup=1}]',
            "residual_unet",
        ),
        ("lora.rank=2", "lora.rank above 0"),
        ("model.text=own", "model.text"),
        ("model.checkpoint=", "found no checkpoint"),
    ],
)
def test_a_run_of_a_control_that_trains_anything_else_is_refused(trained, tmp_path, setting, message):
    with pytest.raises(InputError, match=message):
        train_tiny(tmp_path / "run", *settings(trained), setting)
