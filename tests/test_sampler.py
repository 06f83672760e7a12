import numpy as np
import pytest
import torch
from conftest import tiny_model

from trip_reference.sampling import sample
from trip_rt.sampler import ddim_loop, initial_noise
from trip_rt.schedule import ddim_steps


def test_a_seed_gives_the_same_noise_in_any_company():
    alone, together = initial_noise([7], (4, 3, 2, 2)), initial_noise([1, 7], (4, 3, 2, 2))
    np.testing.assert_array_equal(alone[0], together[1])
    assert alone.dtype == np.float32
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5, 7.5])
def test_guidance_goes_from_unconditional_through_conditional(guidance_scale):
    steps = ddim_steps(tiny_model().config.schedule, 1)
    noise = initial_noise([0], (2, 3, 1, 1))
    first = np.zeros((1, 2, 1, 1), np.float32)

    def predict(latents, step):
        return np.concatenate([np.full_like(latents[:1], 1.0), np.full_like(latents[1:], 3.0)])

    found = ddim_loop(predict, first, noise, steps, guidance_scale)
    expected = steps[0].a * noise + steps[0].b * (1 + guidance_scale * 2)
    np.testing.assert_allclose(found[:, :, 1:], expected[:, :, 1:], rtol=1e-5)


def test_frame_1_follows_its_exact_path_and_ends_at_the_given_latent():
    steps = ddim_steps(tiny_model().config.schedule, 6)
    noise, first = initial_noise([0], (2, 3, 2, 2)), np.full((1, 2, 2, 2), 0.7, np.float32)
    seen = []

    def predict(latents, step):
        seen.append((step, latents[0, :, 0].copy()))
        return np.random.default_rng(0).standard_normal(latents.shape, np.float32)

    result = ddim_loop(predict, first, noise, steps, 2.0)
    np.testing.assert_array_equal(result[:, :, 0], first)
    for step, frame in seen:
        np.testing.assert_allclose(frame, step.sqrt_alpha_bar * first[0] + step.sqrt_one_minus_alpha_bar * noise[0, :, 0], rtol=1e-6)


def test_the_loop_equals_the_oracle_on_the_same_networks():
    model = tiny_model()
    config = model.config
    torch.manual_seed(0)
    first = torch.randn(2, config.latent_channels, 4, 6)
    text = torch.randn(4, config.text_length, config.text_width)
    steps = ddim_steps(config.schedule, 5)
    noise = initial_noise([1, 2], (config.latent_channels, config.num_frames, 4, 6))
    expected = sample(model, first, torch.from_numpy(noise), text, steps, 3.0)

    @torch.no_grad()
    def predict(latents, step):
        clean = torch.cat([first, first])
        scalars = torch.tensor([step.sqrt_alpha_bar]), torch.tensor([step.sqrt_one_minus_alpha_bar])
        return model.predict_noise(torch.from_numpy(latents), clean, torch.tensor([step.timestep]), text, *scalars).numpy()

    progress = []
    found = ddim_loop(predict, first.numpy(), noise, steps, 3.0, lambda done, total: progress.append((done, total)))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert progress == [(i, 5) for i in range(1, 6)]
