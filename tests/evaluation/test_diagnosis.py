"""Where a checkpoint's clean latents are wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trip_reference.demo_world import diagnosis, world
from trip_reference.presets import DEMO


def test_true_noise_gives_back_the_true_latents():
    latents, noise = torch.randn(2, 2, 8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(
        config=DEMO.trip, residual_unet=lambda *_: None, fusion=lambda noised, first, residual, signal, sigma, t: noise
    )
    for timestep in (50, 999):
        found = diagnosis.clean_latents(model, latents, noise, timestep, torch.zeros(2, 16, 64))
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-3)


def test_every_latent_of_a_made_frame_has_one_place_one_motion_and_one_quarter():
    scenes = [world.sample(seed, held_out=True)[:2] for seed in range(6)]
    regions = diagnosis._regions(scenes, DEMO.trip)
    made = regions["all"]
    assert not made[:, 0].any() and made[:, 1:].all()
    for names in (("object", "edge", "background"), world.MOTIONS, [f"quarter {i}" for i in (1, 2, 3, 4)]):
        assert np.array_equal(sum(regions[name].astype(int) for name in names), made)
    # A shape of about a sixth of the side across covers a few of 8×8 latents, and more of them in part than whole.
    assert 0 < regions["object"].sum() < regions["edge"].sum() < regions["background"].sum()


def test_a_diagnosis_by_the_command(trained, capsys):
    assert diagnosis.main([str(trained), "--clips", "3", "--first-seed", "7", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["clips"], figures["first_seed"]) == (3, 7)
    assert list(figures["rows"]) == [*map(str, diagnosis.TIMESTEPS), "sampled"]
    motions = {world.sample(seed, held_out=True)[1] for seed in (7, 8, 9)}
    for row in figures["rows"].values():
        assert row["all"] > 0 and {motion for motion in world.MOTIONS if row[motion] is not None} == motions
    assert diagnosis.main([str(trained), "--clips", "3", "--first-seed", "7", "--no-sampling"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(diagnosis.TIMESTEPS) and lines[2].startswith("| 999 | ")


@pytest.mark.parametrize("arguments", [["--clips", "0"], ["--first-seed", "-1"]], ids=str)
def test_a_diagnosis_of_nothing_is_refused(trained, arguments, capsys):
    assert diagnosis.main([str(trained), *arguments]) == 2
    assert "expected at least 1 from 0 or more" in capsys.readouterr().err
