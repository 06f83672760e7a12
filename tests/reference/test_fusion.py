import dataclasses

import pytest
import torch
from tiny import TINY, tiny_model

from trip_reference.fusion import NoiseFusion, noise_prior
from trip_reference.tnf import TemporalNoiseFusion
from trip_rt.errors import InputError


def inputs(config, batch=2):
    generator = torch.Generator().manual_seed(1)
    latents, residual = torch.randn(2, batch, config.latent_channels, config.num_frames, 3, 2, generator=generator)
    first = torch.randn(batch, config.latent_channels, 3, 2, generator=generator)
    signal = torch.linspace(0.3, 0.9, batch)
    return latents, first, residual, signal, (1 - signal**2).sqrt(), torch.arange(batch) * 300 + 10


def fusion(**changes):
    torch.manual_seed(0)
    return NoiseFusion(dataclasses.replace(TINY.trip, **changes)).eval()


@pytest.mark.parametrize(("normalize", "gate"), [(True, "frame"), (False, "frame"), (True, "matched")])
def test_untrained_tnf_is_the_linear_fusion(normalize, gate):
    args, changes = inputs(TINY.trip), {"normalize_prior": normalize, "gate": gate}
    tnf, linear = fusion(**changes), fusion(fusion="linear", **changes)
    torch.testing.assert_close(tnf(*args), linear(*args), rtol=0, atol=0)


def test_none_is_the_residual_noise():
    args = inputs(TINY.trip)
    assert fusion(fusion="none")(*args) is args[2]


def test_raw_linear_fusion_is_the_papers():
    latents, first, residual, signal, sigma, _ = args = inputs(TINY.trip)
    frames = TINY.trip.num_frames
    decay = (1 - (torch.arange(frames) + 0.5) / frames)[:, None, None]
    prior = noise_prior(latents, first, signal, sigma)
    torch.testing.assert_close(
        fusion(fusion="linear", normalize_prior=False, gate="frame")(*args), decay * prior + (1 - decay) * residual
    )


def test_gated_linear_fusion_scales_the_gate_by_sigma():
    latents, first, residual, signal, sigma, _ = args = inputs(TINY.trip)
    frames = TINY.trip.num_frames
    gate = (1 - (torch.arange(frames) + 0.5) / frames)[:, None, None] * sigma[:, None, None, None, None]
    prior = noise_prior(latents, first, signal, sigma)
    torch.testing.assert_close(
        fusion(fusion="linear", gate="frame")(*args), gate * prior + (1 - gate) * residual, rtol=1e-5, atol=1e-5
    )


def test_matched_gate_is_the_best_linear_estimate_of_the_noise():
    """Over many latents whose frames differ from frame 1 by the variance that the gate stands for, what the prior's
    share leaves of ε has the variance that the residual's weight says, at every timestep."""
    count, generator = 20_000, torch.Generator().manual_seed(2)
    module = fusion(fusion="linear", gate="matched")
    share = module.gate.sigmoid().detach()
    difference = (
        torch.randn(count, 1, len(share), 1, 1, generator=generator) * ((1 - share) / share).sqrt()[:, None, None]
    )
    first, noise = torch.randn(2, *difference.shape, generator=generator)
    for signal in (0.02, 0.5, 0.99):
        sigma = (1 - signal**2) ** 0.5
        latents = signal * (first[:, :, :1] + difference) + sigma * noise
        values = torch.tensor([signal]), torch.tensor([sigma]), torch.tensor([0])
        estimate = module(latents, first[:, :, 0], torch.zeros_like(latents), *values)
        weight = module(latents, first[:, :, 0], torch.ones_like(latents), *values) - estimate
        left = (noise - estimate).std(dim=0) / weight.mean(dim=0)
        torch.testing.assert_close(left, torch.ones_like(left), rtol=0.03, atol=0)


def test_matched_gate_needs_the_normalised_prior():
    with pytest.raises(InputError, match="gate: found matched with normalize_prior off, expected it on"):
        fusion(gate="matched", normalize_prior=False)


def test_every_parameter_of_a_trained_tnf_gets_a_gradient():
    module = tiny_model().fusion
    module(*inputs(TINY.trip)).square().mean().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_tnf_is_the_same_for_one_timestep_and_for_a_batch_of_it():
    torch.manual_seed(0)
    module = TemporalNoiseFusion(TINY.trip.tnf, TINY.trip.latent_channels, TINY.trip.num_frames)
    torch.nn.init.normal_(module.out_proj.weight)
    latents, _, residual, *_ = inputs(TINY.trip, batch=3)
    one = module(latents, residual, torch.tensor([7]))
    torch.testing.assert_close(one, module(latents, residual, torch.tensor([7, 7, 7])))
    assert one.abs().max() > 0.1


def test_tnf_mixes_frames_but_never_pixels():
    torch.manual_seed(0)
    module = TemporalNoiseFusion(TINY.trip.tnf, TINY.trip.latent_channels, TINY.trip.num_frames)
    torch.nn.init.normal_(module.out_proj.weight)
    latents, _, residual, *_ = inputs(TINY.trip, batch=1)
    changed = residual.clone()
    changed[:, :, 2, 1, 0] += 1
    moved = (
        (module(latents, changed, torch.tensor([5])) - module(latents, residual, torch.tensor([5])))
        .abs()
        .amax(dim=(0, 1))
    )
    assert moved[:, 1, 0].min() > 1e-6  # every frame of that pixel
    moved[:, 1, 0] = 0
    assert moved.max() == 0
