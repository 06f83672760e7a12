"""The loop on the host's buffers: against the arithmetic written out, and against the oracle."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import tiny_model

from trip_reference.feature_reuse import FeatureReuse
from trip_reference.sampling import sample
from trip_rt.backends.base import HostEngine
from trip_rt.components import ALL, signatures
from trip_rt.devices import open_device
from trip_rt.manifest import EngineSpec
from trip_rt.networks import BoundUNet, EngineNetworks, step_buffers
from trip_rt.sampling.loop import denoise, initial_noise
from trip_rt.settings import Settings, Speed


def test_a_seed_gives_the_same_noise_in_any_company():
    alone, together = initial_noise([7], (4, 3, 2, 2)), initial_noise([1, 7], (4, 3, 2, 2))
    np.testing.assert_array_equal(alone[0], together[1])
    assert alone.dtype == np.float32
    assert not np.array_equal(together[0], together[1])


class Function(HostEngine):
    """An engine that is a function of named arrays."""

    backend = "function"
    probe = open = describe = close = None

    def __init__(self, name, config, batch, function, device):
        shapes = config.text_width, (config.num_frames + 1, 2, *config.frame_shape[1:])
        spec = EngineSpec((name,), "", "fp32", {}, 0.0, {}, *signatures(config, batch, 1, *shapes)[name])
        super().__init__(spec, device)
        self.function = function

    def compute(self, inputs):
        outputs = self.function(**inputs)
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))


Function.__abstractmethods__ = frozenset()


def looped(config, unet, tnf, first, noise, steps, on_step=None, runs=1):
    """The latents that the loop makes, on fresh buffers; every one of several `runs` must give the same. `unet` serves
    every kind of step, by its engine's name as well."""
    device, batch = open_device("cpu"), len(noise)
    config = dataclasses.replace(
        config,
        latent_channels=noise.shape[1],
        num_frames=noise.shape[2],
        height=8 * noise.shape[3],
        width=8 * noise.shape[4],
    )

    @functools.cache
    def open_engine(name, arithmetic="own"):
        function = functools.partial(unet, name) if ALL[name].part == "unet" else tnf
        return Function(name, config, batch, function, device)

    features_shape = open_engine("unet").spec.outputs[1].shape[1:]
    buffers = step_buffers(device, config, batch, config.text_width, features_shape)
    device.write(buffers.first_frame, np.concatenate([first, first]))
    networks = EngineNetworks(device, buffers, BoundUNet(buffers, open_engine), open_engine)
    results = []
    for _ in range(runs):
        results.append(denoise(networks, first, noise, steps, on_step))
        for buffer in buffers.residual_noise, buffers.features:  # what a failed run might leave
            device.write(buffer, np.full(buffer.shape, np.nan, np.float32))
    assert all(np.array_equal(result, results[0]) for result in results)
    return results[0]


def written_out(predict, first, noise, steps):
    """DDIM's arithmetic as its formulas say it, without buffers."""
    latents = noise.copy()
    for step in steps:
        a, b, *_ = step.latents
        latents[:, :, 0] = step.sqrt_alpha_bar * first + step.sqrt_one_minus_alpha_bar * noise[:, :, 0]
        if step.guided:
            unconditional, conditional = np.split(predict(np.concatenate([latents, latents]), step), 2)
            guided = unconditional + step.guidance_scale * (conditional - unconditional)
        else:
            guided = predict(latents, step)
        latents = (a * latents + b * guided).astype(np.float32)
    latents[:, :, 0] = first
    return latents


def unconcerned(name, latents, **_):
    return latents * np.float32(0.3)


def steps_of(config, count, guidance_scale, **speed):
    return Settings(num_inference_steps=count, guidance_scale=guidance_scale, **speed).steps(config)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(("batch", "count", "guidance_scale"), [(1, 1, 7.5), (1, 7, 1.5), (2, 4, 0.0), (3, 1000, 1.0)])
def test_the_loop_is_its_formulas_bit_for_bit(batch, count, guidance_scale, spacing):
    config = tiny_model().config
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, timestep_spacing=spacing))
    steps = steps_of(config, count, guidance_scale, guidance_interval=(0.1, 0.9))
    noise, first = initial_noise(range(batch), (2, 3, 2, 1)), initial_noise(range(9, 9 + batch), (2, 2, 1))
    seen = []

    def tnf(latents, first_frame, residual_noise, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, timestep):
        seen.append((int(timestep[0]), sqrt_alpha_bar[0], sqrt_one_minus_alpha_bar[0]))
        assert np.array_equal(first_frame, np.concatenate([first, first])[: len(latents)])
        assert np.array_equal(residual_noise, unconcerned("unet", latents))
        return (
            np.tanh(residual_noise) * np.linspace(0.5, 1, len(latents), dtype=np.float32)[:, None, None, None, None]
            + sqrt_alpha_bar
        )

    def predict(latents, step):
        values = np.array([step.sqrt_alpha_bar], np.float32), np.array([step.sqrt_one_minus_alpha_bar], np.float32)
        clean = np.concatenate([first, first])[: len(latents)]
        return tnf(latents, clean, unconcerned("unet", latents), *values, np.array([step.timestep]))

    expected = written_out(predict, first, noise, steps)
    said, seen[:] = seen[:], []
    found = looped(config, unconcerned, tnf, first, noise, steps)
    assert np.array_equal(found, expected) and seen == said


def test_one_set_of_buffers_serves_runs_of_any_length():
    config, noise, first = tiny_model().config, initial_noise([0], (2, 3, 2, 2)), np.full((1, 2, 2, 2), 0.7, np.float32)
    looped(
        config, unconcerned, lambda residual_noise, **_: residual_noise, first, noise, steps_of(config, 3, 2.0), runs=3
    )


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5, 7.5])
def test_guidance_goes_from_unconditional_through_conditional(guidance_scale):
    config = tiny_model().config
    steps = steps_of(config, 1, guidance_scale)
    noise, first = initial_noise([0], (2, 3, 1, 1)), np.zeros((1, 2, 1, 1), np.float32)

    def tnf(latents, **_):
        return np.concatenate([np.full_like(latents[:-1], 1.0), np.full_like(latents[-1:], 3.0)])

    found = looped(config, unconcerned, tnf, first, noise, steps)
    a, b, *_ = steps[0].latents
    expected = a * noise + b * (1 + guidance_scale * 2)
    np.testing.assert_allclose(found[:, :, 1:], expected[:, :, 1:], rtol=1e-5)


def test_frame_1_follows_its_exact_path_and_ends_at_the_given_latent():
    config = tiny_model().config
    steps = steps_of(config, 6, 2.0)
    noise, first = initial_noise([0], (2, 3, 2, 2)), np.full((1, 2, 2, 2), 0.7, np.float32)
    seen = []

    def unet(name, latents, timestep, **_):
        seen.append((int(timestep[0]), latents[0, :, 0].copy()))
        return np.random.default_rng(0).standard_normal(latents.shape, np.float32)

    result = looped(config, unet, lambda residual_noise, **_: residual_noise, first, noise, steps)
    np.testing.assert_array_equal(result[:, :, 0], first)
    assert [timestep for timestep, _ in seen] == [step.timestep for step in steps]
    for step, (_, frame) in zip(steps, seen, strict=True):
        np.testing.assert_allclose(
            frame, step.sqrt_alpha_bar * first[0] + step.sqrt_one_minus_alpha_bar * noise[0, :, 0], rtol=1e-6
        )


@pytest.mark.parametrize(
    "changes",
    [{}, {"normalize_prior": False, "gate": "frame"}, {"gate": "frame"}, {"fusion": "linear"}, {"fusion": "none"}],
    ids=str,
)
@pytest.mark.parametrize(
    "speed", [Speed(), Speed("unipc", guidance_interval=(0.3, 1.0)), Speed("dpm++", feature_reuse=2)], ids=str
)
def test_the_loop_equals_the_oracle_on_the_same_networks(changes, speed):
    model = tiny_model(**changes)
    config = model.config
    torch.manual_seed(0)
    first, text = torch.randn(2, config.latent_channels, 4, 6), torch.zeros(4, config.text_length, config.text_width)
    steps = Settings(speed, num_inference_steps=5, guidance_scale=3.0).steps(config)
    assert len({(step.guided, step.shallow) for step in steps}) == (1 if speed == Speed() else 2)
    noise = initial_noise([1, 2], (config.latent_channels, config.num_frames, 4, 6))
    expected = sample(model, first, torch.from_numpy(noise), text, steps)

    def on_arrays(module, **arrays):
        with torch.no_grad():
            return module(*map(torch.from_numpy, arrays.values())).numpy()

    progress = []
    with FeatureReuse(model.residual_unet) as network:

        def unet(name, latents, first_frame, timestep, context, features=None):
            given = latents, first_frame, timestep, context
            return on_arrays(
                lambda *tensors: network(*tensors, shallow="shallow" in name), **dict(zip("abcd", given, strict=True))
            )

        found = looped(
            config, unet, lambda **arrays: on_arrays(model.fusion, **arrays),
            first.numpy(), noise, steps, lambda done, total: progress.append((done, total)),
        )  # fmt: skip
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert progress == [(i, 5) for i in range(1, 6)]


def test_threads_may_share_the_oracles_network():
    """Each has its own features, however their steps fall together."""
    model = tiny_model()
    config = model.config
    text = torch.zeros(2, config.text_length, config.text_width)
    steps = Settings(num_inference_steps=6, feature_reuse=2, guidance_scale=1.5).steps(config)

    def clip(seed):
        first = torch.randn(1, config.latent_channels, 4, 6, generator=torch.Generator().manual_seed(seed))
        noise = torch.from_numpy(initial_noise([seed], (config.latent_channels, config.num_frames, 4, 6)))
        return sample(model, first, noise, text, steps)

    alone = [clip(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(clip, range(6)))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
