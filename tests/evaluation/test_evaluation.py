"""What is measured of clips: against closed forms, other implementations, and clips whose figures are known."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from trip_engines.emulation import EmulatedEngine
from trip_reference.data.command import main as data_main
from trip_reference.demo_world import world
from trip_reference.demo_world.networks import SIZE, train_networks
from trip_reference.demo_world.verdicts import interval, judge_clips
from trip_reference.evaluation import command
from trip_reference.evaluation.clips import Case, clips_of_bundle, config_of, demo_cases, make_clips
from trip_reference.evaluation.consistency import ClipEncoder, consistency
from trip_reference.evaluation.frechet import Moments, distance_of, extrapolated, frechet_distance
from trip_reference.evaluation.made_clips import read_clips
from trip_reference.evaluation.moving_sheet import moving_sheet
from trip_reference.evaluation.networks import Network, fid, fvd
from trip_reference.model import to_pixels
from trip_rt import InputError
from trip_rt.settings import Settings
from trip_rt.video import save as save_clip


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "demo"
    train_networks(folder, steps=2, clips=8, seed=0)
    return folder


def clips_of(count, frames=5, size=(64, 64), seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, frames, *size, 3), np.uint8))


# The Fréchet distance


def test_equal_covariances_leave_the_means_distance():
    covariance = np.cov(np.random.default_rng(0).normal(size=(5, 50)))
    assert frechet_distance(np.zeros(5), covariance, np.full(5, 2.0), covariance) == pytest.approx(20, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_diagonal_covariances_in_any_orientation(width, seed):
    """|μ|² + Σ(√a − √b)²: it commutes, and a rotation of both changes nothing."""
    rng = np.random.default_rng(seed)
    a, b, mean = rng.uniform(0, 3, width), rng.uniform(0, 3, width), rng.normal(size=width)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    expected = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(rotation @ mean, rotation * a @ rotation.T, np.zeros(width), rotation * b @ rotation.T)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_singular_covariances_are_no_trouble():
    few = np.random.default_rng(0).normal(size=(4, 30))
    assert distance_of(few, few) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(distance_of(few, few[:2]))


def test_it_is_symmetric():
    one, other = (np.random.default_rng(seed).normal(size=(40, 6)) * (seed + 1) for seed in range(2))
    assert distance_of(one, other) == pytest.approx(distance_of(other, one))


def test_moments_by_the_batch_are_those_of_the_whole():
    features = np.random.default_rng(0).normal(size=(101, 7)) + 1e6
    moments = Moments(7)
    for part in np.array_split(features, [3, 3, 50, 90]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-7)
    with pytest.raises(ValueError, match=r"found shape \[2, 3\], expected \[N, 7\]"):
        moments.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="not finite"):
        moments.update(np.full((2, 7), np.nan))


def test_extrapolation_takes_the_bias_away():
    """Of Gaussians of the same law the distance is 0; the plain estimate says c/N."""
    plain, limit = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        one, other = rng.normal(size=(2, 200, 24))
        plain.append(distance_of(one, other))
        limit.append(extrapolated(one, other, seed))
    assert np.mean(plain) > 1
    assert abs(np.mean(limit)) < 0.3 * np.mean(plain)
    assert extrapolated(one[:48], other[:48]) is None  # halves as small as the width
    assert extrapolated(one[:14, :2], other[:14, :2]) is None


# F-Consistency


def test_consistency_by_hand():
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 90.0, 90.0]))
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    cos30, cos60 = np.cos(np.pi / 6), 0.5
    assert consistency(embeddings) == pytest.approx(100 * (cos60 + cos30 + 1) / 3, rel=1e-5)
    assert consistency(embeddings, pairs="first") == pytest.approx(100 * cos60 / 3, rel=1e-5)
    assert consistency(embeddings, 2) == pytest.approx(50, rel=1e-5)
    with pytest.raises(ValueError, match="found 1 frames"):
        consistency(embeddings[:1])


def test_a_still_clip_is_wholly_consistent(networks):
    encoder = ClipEncoder(networks / "clip-encoder")
    still = np.repeat(clips_of(1)[0][:1], 6, axis=0)
    assert consistency(encoder.embed(still)) == pytest.approx(100, abs=1e-3)
    assert consistency(encoder.embed(clips_of(1)[0])) < 99.999


@pytest.mark.parametrize("size", [(150, 100), (151, 100), (100, 101), (64, 64), (48, 32), (427, 240), (97, 333)])
def test_pictures_are_prepared_as_transformers_does(networks, size):
    from transformers import CLIPImageProcessorPil

    encoder = ClipEncoder(networks / "clip-encoder")
    scene, motion, _ = world.sample(3)
    # Levels from 64 to 191: Pillow cuts off what overshoots 0 and 255 after its first pass.
    picture = np.asarray(Image.fromarray(64 + world.render(scene, motion, 1, 128)[0] // 2).resize(size))
    processor = CLIPImageProcessorPil.from_pretrained(
        networks / "clip-encoder", size={"shortest_edge": SIZE}, crop_size=SIZE
    )
    theirs = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    ours = encoder.pixels(picture[None])
    assert ours.shape == theirs.shape == (1, 3, SIZE, SIZE)
    levels = (ours - theirs).abs() * 127.5  # Pillow rounds after each of its two passes, torch once
    assert levels.mean() < 0.5
    assert levels.max() < 2.5


def test_a_folder_that_is_no_encoder_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a CLIP image encoder"):
        ClipEncoder(tmp_path)


def test_an_encoder_that_lacks_weights_is_refused(networks, tmp_path):
    """transformers would draw them at random, and the figure would be worth nothing."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(networks / "clip-encoder", tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"found no weights visual_projection\.weight"):
        ClipEncoder(folder)


# FVD and FID


def test_fvd_is_the_distance_of_the_networks_features(networks):
    network = Network(networks / "clips.pt")
    made, real = clips_of(20, 4), clips_of(20, 4, seed=1)
    found = fvd(network, made, real, SIZE)
    features = [network(to_pixels(np.stack(clips)).transpose(1, 2)).numpy() for clips in (made, real)]
    assert found["value"] == pytest.approx(distance_of(*features), abs=1e-4)
    assert found | {"value": 0, "extrapolated": 0} == dict(
        value=0, extrapolated=0, clips=20, feature_width=32, biased=True, frames=4, size=SIZE
    )
    assert fvd(network, real, real, SIZE)["value"] == pytest.approx(0, abs=1e-4)


def test_an_i3d_is_told_what_it_is_given(tmp_path):
    class I3D(torch.nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
            if rescale or resize or not return_features:
                return x.mean()
            return x.mean([2, 3, 4])

    torch.jit.save(torch.jit.script(I3D()), str(tmp_path / "i3d.pt"))
    assert Network(tmp_path / "i3d.pt")(torch.zeros(2, 3, 4, 8, 8)).shape == (2, 3)


def test_a_network_without_features_is_one_line(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return x.mean()

    torch.jit.save(torch.jit.script(Mean()), str(tmp_path / "mean.pt"))
    with pytest.raises(InputError, match=r"found no features \[B, D\]"):
        Network(tmp_path / "mean.pt")(torch.zeros(2, 3, 4, 8, 8))
    with pytest.raises(InputError, match="found a folder, expected a TorchScript network"):
        Network(tmp_path)


def test_fid_agrees_with_torchmetrics_and_with_our_own_distance(networks):
    network = Network(networks / "frames.pt")
    made, real = clips_of(12, 4), clips_of(12, 4, seed=1)
    found = fid(network, made, real, SIZE)
    stacked = [torch.from_numpy(np.concatenate(clips)).movedim(-1, 1) for clips in (made, real)]
    assert found["value"] == pytest.approx(
        distance_of(*(network(frames).numpy() for frames in stacked)), rel=1e-3, abs=1e-4
    )

    class Features(torch.nn.Module):
        num_features = 32

        def forward(self, frames):
            return network(frames)

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, SIZE, SIZE))
    for frames, real_ones in zip(stacked, (False, True), strict=True):
        metric.update(frames, real=real_ones)
    assert found["value"] == pytest.approx(float(metric.compute()), rel=1e-3, abs=1e-4)
    assert (found["frames"], found["feature_width"]) == (48, 32)


# Clips, judgement and the command


def test_true_clips_pass_every_demand(trained):
    from trip_reference.checkpoint import load_config

    cases = demo_cases(load_config(trained), 4)
    shown = [Case(world.render(case.scene, case.motion), case.prompt, case.scene, case.motion) for case in cases]
    figures = judge_clips([case.clip for case in shown], shown)
    assert figures["all"]["every demand"] == 100
    assert figures["all"]["intervals"]["every demand"] == interval(4, 4)
    assert sum(row["clips"] for row in figures["by_motion"].values()) == figures["all"]["clips"] == 4
    still = judge_clips([np.repeat(case.clip[:1], 16, axis=0) for case in shown], shown)
    assert still["all"]["motion"] == 100 * np.mean([case.motion == "still" for case in cases])


def test_clips_side_by_side():
    clips = clips_of(5, 3, size=(20, 30))
    sheet = moving_sheet(clips, ["a star", "a red ball moves left", "x", "y", "z"], columns=3, width=60)
    label, gap, height, width = 22, 8, 40, 60
    assert sheet.shape == (3, 2 * (height + label + gap) + gap, 3 * (width + gap) + gap, 3)
    for number, clip in enumerate(clips):
        top = gap + number // 3 * (height + label + gap) + label
        left = gap + number % 3 * (width + gap)
        assert np.array_equal(sheet[:, top : top + height : 2, left : left + width : 2], clip)
        assert (sheet[0, top - label : top, left : left + width] < 200).any()
    assert (sheet[:, top:, left + width :] == 255).all()


@pytest.mark.parametrize(
    ("met", "count", "expected"),
    [(0, 10, (0.0, 27.8)), (10, 10, (72.2, 100.0)), (81, 263, (25.5, 36.6)), (380, 400, (92.4, 96.7))],
)
def test_confidence_intervals_are_wilsons(met, count, expected):
    """81 of 263 is Newcombe's example (Statistics in Medicine 17, 1998, table I: 0.2553 to 0.3662)."""
    assert interval(met, count) == expected


def test_a_clip_depends_on_its_seed_and_not_on_its_batch(trained):
    from trip_reference.checkpoint import load_config

    cases = demo_cases(load_config(trained), 10)
    made = make_clips(trained, cases, Settings(), seed=5)
    alone = make_clips(trained, cases[9:], Settings(), seed=14)
    assert np.abs(made[9].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(made[9], make_clips(trained, cases[9:], Settings(), seed=5)[0])


def test_the_command_measures_what_it_has_networks_for(trained, networks, tmp_path, capsys):
    options = ["--clip-encoder", networks / "clip-encoder", "--i3d", networks / "clips.pt", "--i3d-size", SIZE]
    files = ["-o", tmp_path / "figures.json", "--markdown", tmp_path / "table.md", "--sheet", tmp_path / "sheet.png"]
    assert command.main([str(word) for word in (trained, "--clips", 3, "--steps", 2, *options, *files)]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["left_out"] == {"FID": "--fid-net"}
    assert 0 < figures["F-Consistency-all"] <= 100
    assert figures["FVD"]["clips"] == figures["clips"] == figures["demo"]["all"]["clips"] == 3
    assert figures["steps"] == 2
    table = (tmp_path / "table.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "| FID | not measured |" in table
    assert "95.36" in table
    assert "biased upwards" in table
    assert "/" not in json.dumps([figures["source"], figures["data"]])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100 and len(sheet.convert("RGB").getcolors(1 << 24)) > 100


def test_it_measures_a_data_set_and_leaves_broken_clips_out(trained, tmp_path, capsys):
    assert (
        data_main(["demo", str(tmp_path / "set"), "--clips", "2", "--val-clips", "3", "--size", "32", "--frames", "4"])
        == 0
    )
    (tmp_path / "set" / "videos" / "val_000001.mp4").write_bytes(b"no video")
    capsys.readouterr()
    assert command.main([str(trained), "--data", str(tmp_path / "set"), "--json"]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["clips"] == 2
    assert "demo" not in figures
    assert "val_000001.mp4" in captured.err


def test_a_bundle_makes_the_clips_that_its_checkpoint_makes(tiny_checkpoint, tiny_bundle):
    rng = np.random.default_rng(0)
    cases = [
        Case(rng.integers(0, 256, (5, 32, 48, 3), np.uint8), prompt)
        for prompt in ("a red ball rises", "the blue star spins")
    ]
    by_model = make_clips(tiny_checkpoint, cases, Settings())
    for backend in ("auto", "onnxruntime", EmulatedEngine):
        clips, engines = clips_of_bundle(tiny_bundle, cases, Settings(), backend=backend)
        assert all(np.abs(one.astype(int) - other).max() <= 1 for one, other in zip(by_model, clips, strict=True))
        assert engines["backend"] == ("emulation" if backend is EmulatedEngine else "onnxruntime")


def test_it_measures_clips_that_were_made_earlier(trained, networks, tmp_path, capsys):
    from trip_reference.checkpoint import load_config

    config = load_config(trained)
    folder = tmp_path / "made"
    folder.mkdir()
    for case, ending in zip(demo_cases(config, 2), (".mp4", ""), strict=True):
        save_clip(case.clip, folder / f"{ending[1:] or 'png'}{ending}", config.fps)
    options = ["--fid-net", networks / "frames.pt", "--fid-size", SIZE, "--json"]
    assert command.main([str(word) for word in (trained, "--generated", folder, *options)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["clips"], figures["source"]) == (2, "made")
    assert "steps" not in figures
    assert figures["frame 1, dB"] > 35
    assert figures["networks"]["fid_net"]["name"] == "frames.pt"
    assert len(figures["networks"]["fid_net"]["sha256"]) == 64

    made = read_clips(folder, config, 9)
    assert np.array_equal(made[1], demo_cases(config, 2)[1].clip)
    save_clip(np.concatenate([made[0]] * 2), folder / "a.mp4", config.fps)
    with pytest.raises(InputError, match=r"a\.mp4: found 4 frames of 32 × 32, expected 3 of 32 × 32"):
        read_clips(folder, config, 9)
    (folder / "a.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"a\.mp4: found a damaged or unsupported clip"):
        read_clips(folder, config, 9)


def test_a_bundle_and_a_model_that_is_not_square(tiny_checkpoint, tiny_bundle, tmp_path, capsys):
    assert config_of(tiny_bundle) == config_of(tiny_checkpoint)
    assert command.main([str(tiny_checkpoint), "--clips", "1"]) == 2
    assert "demo world: found a model of 48 × 32 pixels, expected a square one" in capsys.readouterr().err
    assert (
        data_main(["demo", str(tmp_path / "set"), "--clips", "1", "--val-clips", "2", "--size", "64", "--frames", "4"])
        == 0
    )
    capsys.readouterr()
    assert command.main([str(tiny_bundle), "--data", str(tmp_path / "set"), "--speed", "balanced", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["clips"], figures["height"], figures["width"], figures["speed"]) == (2, 32, 48, "balanced")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{trained}", "-o", "no/folder/figures.json"],
            "no/folder/figures.json: expected a file name, in a folder to write in",
        ),
        (
            ["{trained}", "--sheet", "sheet.foo"],
            "sheet.foo: expected a file name ending in .png or .gif or .webp or .mp4",
        ),
        (["{trained}", "--generated", "nowhere"], "nowhere: found no such folder, expected one of clips"),
        (
            ["{trained}", "--seed", str(2**64 - 1), "--clips", "2"],
            "seed: found 18446744073709551616, expected a whole number from 0 to 2^64",
        ),
        (["{trained}", "--backend", "openvino"], "{trained}: --backend: found no bundle, expected one"),
        (["{trained}", "--first-scene", "-1"], "first-scene: found -1, expected at least 0"),
        (["nowhere"], "nowhere: found no such folder, expected a checkpoint or a bundle"),
        (["{trained}", "--clips", "0"], "clips: found 0, expected at least 1"),
        (["{trained}", "--i3d", "nowhere.pt"], "nowhere.pt: found no such file, expected a TorchScript network"),
        (["{trained}", "--clip-encoder", "nowhere"], "nowhere: cannot be read as a CLIP image encoder"),
        (["{trained}", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, arguments, message):
    assert command.main([word.format(trained=trained) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trip-evaluate: {message.format(trained=trained)}")
    assert error.count("\n") == 1
