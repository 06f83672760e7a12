import pytest
import torch

from trip_reference.fusion import noise_prior, normalised_noise_prior
from trip_reference.presets import DEMO, TRIP_256
from trip_rt.sampling.schedule import alpha_bars


def diffuse(timesteps, schedule, dtype=torch.float32):
    """Clean frames, their noise, the noised frames and the schedule's values, one timestep a sample."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(len(timesteps), 4, 5, 3, 2, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    alpha_bar = torch.from_numpy(alpha_bars(schedule))[timesteps]
    signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    wide = (slice(None),) + (None,) * 4
    return clean, noise, (signal[wide] * clean + sigma[wide] * noise).to(dtype), signal, sigma


@pytest.mark.parametrize("schedule", [DEMO.trip.schedule, TRIP_256.trip.schedule], ids=["scaled_linear", "linear"])
@pytest.mark.parametrize("timesteps", [[0], [1], [500], [999], [0, 1, 500, 999]])
def test_prior_is_the_noise_plus_the_scaled_distance_to_frame_1(schedule, timesteps):
    clean, noise, noised, signal, sigma = diffuse(timesteps, schedule)
    wide = (slice(None),) + (None,) * 4
    expected = noise.double() + (signal / sigma).double()[wide] * (clean - clean[:, :, :1]).double()
    prior = noise_prior(noised, clean[:, :, 0], signal, sigma)
    # z_t is rounded to fp32 before the division by σ_t, which reaches 100.
    assert (prior - expected).abs().max() < 1e-5 * (1 + 1 / sigma.min())


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_frame_1_gets_its_exact_noise(timestep):
    clean, noise, noised, signal, sigma = diffuse([timestep], TRIP_256.trip.schedule)
    prior = noise_prior(noised, clean[:, :, 0], signal, sigma)
    assert (prior[:, :, 0] - noise[:, :, 0]).abs().max() < 1e-4


def test_normalised_prior_is_sigma_times_the_raw_one():
    clean, _, noised, signal, sigma = diffuse([3, 700], DEMO.trip.schedule)
    raw = noise_prior(noised, clean[:, :, 0], signal, sigma)
    normalised = normalised_noise_prior(noised, clean[:, :, 0], signal)
    torch.testing.assert_close(normalised, raw * sigma[:, None, None, None, None])


def test_one_timestep_serves_the_whole_batch():
    clean, _, noised, signal, sigma = diffuse([400, 400, 400], DEMO.trip.schedule)
    shared = noise_prior(noised, clean[:, :, 0], signal[:1], sigma[:1])
    torch.testing.assert_close(shared, noise_prior(noised, clean[:, :, 0], signal, sigma))


def test_half_precision_latents_give_an_fp32_prior():
    clean, _, noised, signal, _ = diffuse([0], TRIP_256.trip.schedule, torch.float16)
    prior = normalised_noise_prior(noised, clean[:, :, 0].half(), signal)
    assert prior.dtype == torch.float32
    assert prior.isfinite().all()
