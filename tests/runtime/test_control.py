"""A control in the runtime: what a path is as a map, and that engines follow a control as the reference does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sealed import with_openvino
from tiny import TINY
from tiny_control import CONTROL

from trip_export.command import parity_main
from trip_reference import checkpoint
from trip_reference.sampling import sample
from trip_rt import Animator, InputError, Settings, images
from trip_rt.animate import main
from trip_rt.control import path_control
from trip_rt.devices import open_device
from trip_rt.sampling.loop import denoise_on_gpu, initial_noise
from trip_rt.sampling.step import UNetKind
from trip_rt.settings import SPEEDS, Speed
from trip_rt.steering import Steering
from trip_rt.tokenizer import PromptTokenizer

PROMPT = "a red ball moves"
PATH = [(0.3, 0.5), (0.6, 0.5), (0.6, 0.2)]
DRAWN = "0.3,0.5 0.6,0.5 0.6,0.2"


@pytest.fixture(scope="module")
def steered(steered_export) -> Animator:
    return Animator(steered_export.bundle)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_a_path_is_a_map_of_motion_known_near_it():
    config = dataclasses.replace(TINY.trip, num_frames=4, height=64, width=128)
    control = path_control([(0.25, 0.5), (0.25, 0.25), (0.5, 0.25)], config)
    assert control.shape == (3, 4, 8, 16) and control.dtype == np.float32
    # Up by a quarter of the height, then right by a quarter of the width, which is twice as long.
    across, down, known = control
    assert np.unravel_index(known[0].argmax(), (8, 16)) in {(3, 3), (3, 4), (4, 3), (4, 4)}
    assert known[0].max() > 0.6 and known[0, 0, 15] < 1e-6
    for map_, moved in ((across, [0, 0, 0.5, 1]), (down, [0, -1, -1, -1])):
        np.testing.assert_allclose(map_, np.array(moved)[:, None, None] * known, atol=1e-6)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "found 0 points, expected 2 to 1000"),
        ([(0.5, 0.5)], "found 1 points"),
        ([(0.5, 0.5)] * 1001, "found 1001 points"),
        ([(0.5, 0.5), (1.5, 0.5)], "expected \\(x, y\\) in shares"),
        ([(0.5, 0.5), (float("nan"), 0.5)], "expected \\(x, y\\)"),
        ([(0.5, 0.5), (0.5,)], "expected \\(x, y\\)"),
        ([(0.5, 0.5), ("0.5", 0.5)], "expected \\(x, y\\)"),
        ([(0.5, 0.5), 3], "found 3, expected \\(x, y\\)"),
        ("0.5,0.5", "path: found '0.5,0.5'"),
        (None, "path: found None"),
    ],
)
def test_what_is_no_path_is_refused(points, message):
    with pytest.raises(InputError, match=message):
        path_control(points, TINY.trip)


def test_an_export_with_a_control_is_held_to_the_reference(steered_export, steered):
    manifest = steered._bundle.manifest
    assert manifest.control == CONTROL and "control/config.json" in manifest.source
    parity = steered_export.parity["onnxruntime"]
    assert parity.passed and set(parity.components) == set(manifest.profiles[0].engines)
    assert "control_encoder" in parity.components


def test_parity_is_measured_again_with_the_control_named(
    steered_export, tiny_checkpoint, tiny_bundle, tiny_control_folder, capsys
):
    given = [str(steered_export.bundle), str(tiny_checkpoint), "--steps", "2"]
    assert parity_main([*given, "--control", str(tiny_control_folder)]) == 0
    assert "control_encoder" in capsys.readouterr().out
    assert parity_main(given) == 2 and "found no --control, expected the one" in capsys.readouterr().err
    assert parity_main([str(tiny_bundle), *given[1:], "--control", str(tiny_control_folder)]) == 2
    assert "found --control, expected none" in capsys.readouterr().err


def test_openvino_runs_the_same_graphs(steered_export, steered, picture, tmp_path):
    with Animator(with_openvino(steered_export.bundle, tmp_path / "both"), "openvino") as animator:
        other = animator(picture, PROMPT, control=animator.path(PATH)).latents
    ours = steered(picture, PROMPT, control=steered.path(PATH)).latents
    assert np.abs(other - ours).max() < 1e-4 * np.abs(ours).max()


SPEEDS_TRIED = {
    "exact": SPEEDS["exact"],
    "balanced": SPEEDS["balanced"],
    "reused, half guided": Speed("unipc", 6, (0.0, 0.6), 3),
}


@pytest.mark.parametrize("between", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("speed", SPEEDS_TRIED.values(), ids=SPEEDS_TRIED)
def test_a_steered_clip_is_the_oracles(steered, tiny_checkpoint, tiny_control_folder, picture, speed, between):
    model, config = checkpoint.from_pretrained(tiny_checkpoint, control=tiny_control_folder), steered.config
    fitted = images.load_image(picture, config.height, config.width, "crop")[None]
    tokens = PromptTokenizer(steered.tokenizer_json, config.text_length, model.vocabulary)
    control = steered.path(PATH)
    settings = Settings(speed, control_scale=0.7, control_guidance_start=between[0], control_guidance_end=between[1])
    with torch.no_grad():
        text = model.encode_text(torch.from_numpy(tokens(["", PROMPT])))
        first = model.encode_image(torch.from_numpy(images.to_model(fitted)))
        features = 0.7 * model.encode_control(torch.from_numpy(control[None]), first)
    noise = torch.from_numpy(initial_noise([3], config.latent_shape))
    expected = sample(model, first, noise, text, settings.steps(config), control_features=features).numpy()
    found = steered.latents(fitted, [PROMPT], [3], controls=[control], settings=settings)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    plain = steered.latents(fitted, [PROMPT], [3], speed=speed)
    assert np.abs(found - plain).max() > 1e-2 * np.abs(expected).max(), "the control counts"


def test_scale_0_and_no_control_are_the_clip_of_a_bundle_without_one(steered, tiny_animator, picture):
    base = tiny_animator(picture, PROMPT, seed=4).latents
    control = steered.path(PATH)
    for changes in ({}, {"control": control, "control_scale": 0}):
        np.testing.assert_array_equal(steered(picture, PROMPT, seed=4, **changes).latents, base)
    never = {"control_guidance_start": 0.5, "control_guidance_end": 0.5}
    np.testing.assert_array_equal(steered(picture, PROMPT, seed=4, control=control, **never).latents, base)


def test_a_control_is_its_own_clips_alone(steered, picture):
    control = steered.path(PATH)
    one, other = steered.batch([picture] * 2, PROMPT, seeds=[1, 1], controls=[control, None])
    np.testing.assert_array_equal(one.latents, steered(picture, PROMPT, seed=1, control=control).latents)
    np.testing.assert_array_equal(other.latents, steered(picture, PROMPT, seed=1).latents)
    assert np.abs(one.latents - other.latents).max() > 0.01
    # Nor do later runs, windows, or what goes on from it know of it.
    steered(picture, PROMPT, control=control)
    went_on = steered.extend(other, PROMPT, seed=3).latents
    windows = steered(picture, PROMPT, num_frames=9).latents
    steered(picture, PROMPT)
    np.testing.assert_array_equal(went_on, steered.extend(other, PROMPT, seed=3).latents)
    np.testing.assert_array_equal(windows, steered(picture, PROMPT, num_frames=9).latents)
    frames = np.stack(list(steered.stream(picture, PROMPT, seed=1, control=control)))
    np.testing.assert_array_equal(frames, one.frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"control": np.zeros((2, 5, 4, 6), np.float32)},
            r"control: found float32 \[2, 5, 4, 6\], expected float32 \[3",
        ),
        ({"control": np.zeros((3, 5, 4, 6))}, "control: found float64"),
        ({"control": np.full((3, 5, 4, 6), np.nan, np.float32)}, "not finite"),
        ({"control": "left"}, "control: found 'left', expected an array"),
        ({"control": np.zeros((3, 5, 4, 6), np.float32), "num_frames": 9}, "expected 5, which these engines make"),
        ({"control_scale": 11}, "control scale: found 11, expected a number from 0 to 10"),
        ({"control_guidance_start": 0.6, "control_guidance_end": 0.5}, "control guidance end: found 0.5"),
        ({"control_guidance_end": 2}, "control guidance end: found 2"),
    ],
)
def test_a_control_that_does_not_fit_is_refused(steered, picture, changes, message):
    with pytest.raises(InputError, match=message):
        steered(picture, PROMPT, **changes)


def test_as_many_controls_as_pictures(steered, picture):
    with pytest.raises(InputError, match="controls: found 1 for 2 pictures"):
        steered.batch([picture] * 2, PROMPT, controls=[None])


def test_a_bundle_without_a_control_says_how_to_get_one(tiny_animator, picture):
    with pytest.raises(InputError, match=r"path: the UNet of this bundle takes no control.*trip-export --control DIR"):
        tiny_animator.path(PATH)
    with pytest.raises(
        InputError, match=r"control: found one, but the UNet of this bundle takes none; .*--control DIR"
    ):
        tiny_animator(picture, PROMPT, control=np.zeros((3, 5, 4, 6), np.float32))


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture).save("photo.png")
    return tmp_path


def test_the_command_draws_a_path(steered_export, steered, here, capsys):
    given = [str(steered_export.bundle), "photo.png", PROMPT]
    assert main([*given, "-o", "drawn", "--path", DRAWN]) == 0
    assert main([*given, "-o", "strong", "--path", DRAWN, "--control-scale", "3"]) == 0
    assert main([*given, "-o", "plain"]) == 0
    drawn, strong, plain = (sorted(Path(name).glob("*.png")) for name in ("drawn", "strong", "plain"))
    frames = steered("photo.png", PROMPT, control=steered.path(PATH)).frames
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in drawn]), frames)
    assert drawn[-1].read_bytes() != plain[-1].read_bytes() != strong[-1].read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--path", "0.3,0.5"], "found 1 points"),
        (["--path", "0.3,0.5 0.6"], "expected (x, y) in shares"),
        (["--path", "left right"], "found 'left right', expected 'X,Y X,Y …'"),
        (["--path", DRAWN, "--frames", "9"], "found --path beside --frames"),
        (["--path", DRAWN, "--control-scale", "-1"], "control scale: found -1"),
    ],
)
def test_the_command_refuses_other_paths(steered_export, here, capsys, words, message):
    try:
        code = main([str(steered_export.bundle), "photo.png", PROMPT, "-o", "clip.mp4", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err and not Path("clip.mp4").exists()


def test_the_command_refuses_a_path_for_a_bundle_without_control(tiny_bundle, here, capsys):
    assert main([str(tiny_bundle), "photo.png", PROMPT, "-o", "clip.mp4", "--path", DRAWN]) == 2
    assert "takes no control; export it with trip-export --control DIR" in capsys.readouterr().err


def test_the_loop_on_a_gpu_has_the_control_right_before_each_step():
    device = open_device("cpu")
    buffer = device.zeros("float32", (2, 3, 4, 2, 2))
    asked = []

    def encode(controls):
        asked.append(controls.shape)
        return np.full(buffer.shape, 5, np.float32)

    steering = Steering(device, buffer, encode)
    config = dataclasses.replace(TINY.trip, guidance_scale=1.0)
    settings = Settings(num_inference_steps=4, control_guidance_start=0.25, control_guidance_end=0.75)
    steps, seen = settings.steps(config), []
    works = {UNetKind(guided=False): lambda: seen.append([float(clip.max()) for clip in device.read(buffer)])}
    control = np.ones((3, 5, 2, 2), np.float32)
    steering.give([control, None], 0.5)
    denoise_on_gpu(device, works, steps, steer=steering)
    assert seen == [[0, 0], [2.5, 0], [2.5, 0], [0, 0]] and asked == [(2, 3, 5, 2, 2)]
    seen.clear()
    steering.give([None, None], 1.0)
    denoise_on_gpu(device, works, steps, steer=steering)
    assert seen == [[0, 0]] * 4 and len(asked) == 1
