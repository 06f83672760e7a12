"""Records the PyTorch model's inputs and outputs on held-out pictures. Every engine is compared with them, and half
precision is chosen by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from trip_engines.recording import Reference, Sample, guided_scale
from trip_export.denoising_unet import TextProjection
from trip_reference.demo_world import world
from trip_reference.feature_reuse import FeatureReuse
from trip_reference.model import TripModel, to_pixels
from trip_reference.sampling import sample
from trip_rt.control import path_control
from trip_rt.sampling.loop import initial_noise
from trip_rt.sampling.step import Step
from trip_rt.settings import Settings
from trip_rt.tokenizer import PromptTokenizer

STEPS_RECORDED = 6
PATH = (0.5, 0.5), (0.6, 0.35), (0.75, 0.4)  # of the control that is recorded


def record(
    model: TripModel, tokenizer_json: str, batch: int, decode_frames: int, num_inference_steps: int
) -> Reference:
    """Run `model` on pictures of the demo world, at the shapes of its config, for `num_inference_steps` steps.

    The loop's components are recorded at up to STEPS_RECORDED steps spread over the whole run, each with the
    reference's own tensors, so that an engine's error is not counted twice.
    """
    config = model.config
    pictures, prompts = held_out(config.height, config.width, batch)
    scale = guided_scale(config)
    steps = Settings(num_inference_steps=num_inference_steps, guidance_scale=scale).steps(config)
    tokenizer = PromptTokenizer(tokenizer_json, config.text_length, model.vocabulary)
    samples: dict[str, list[Sample]] = defaultdict(list)

    def keep(name: str, inputs: dict[str, Tensor], output: Tensor) -> None:
        samples[name].append(
            Sample({key: value.numpy().copy() for key, value in inputs.items()}, output.numpy().copy())
        )

    with torch.no_grad():
        ids = torch.from_numpy(tokenizer(prompts))
        pixels = to_pixels(pictures).contiguous()  # GroupNorm of channels-last is less exact
        conditional, first_frame = model.encode_text(ids), _one_by_one(model.encode_image, pixels)
        keep("text_encoder", {"input_ids": ids}, conditional)
        keep("vae_encoder", {"image": pixels}, first_frame)
        text = torch.cat([model.encode_text(torch.from_numpy(tokenizer([""] * batch))), conditional])
        clean = torch.cat([first_frame, first_frame])
        context = TextProjection(model.residual_unet.unet)(text)
        keep("text_projection", {"text": text}, context)
        control = steered = None
        if model.control:
            control = np.stack([path_control(PATH, config)] * batch)
            given_control = {"control": torch.from_numpy(control), "first_frame": first_frame}
            steered = model.encode_control(**given_control)
            keep("control_encoder", given_control, steered)
        recorded = {steps[i].timestep for i in np.linspace(0, len(steps) - 1, STEPS_RECORDED).round().astype(int)}
        kept: list[tuple[dict[str, Tensor], Tensor]] = []  # the UNet's inputs at those, and the features it had

        def on_step(step: Step, latents: Tensor, residual: Tensor, noise: Tensor, features: Tensor) -> None:
            bar.update()
            if step.timestep not in recorded:
                return
            shared = {"latents": latents, "first_frame": clean, "timestep": torch.tensor([step.timestep])}
            coefficients = {
                "residual_noise": residual,
                "sqrt_alpha_bar": torch.tensor([step.sqrt_alpha_bar]),
                "sqrt_one_minus_alpha_bar": torch.tensor([step.sqrt_one_minus_alpha_bar]),
            }
            given = shared | {"context": context} | ({} if steered is None else {"control_features": steered})
            keep("unet", given, residual)
            keep("tnf", shared | coefficients, noise)
            kept.append((given, features))
            if len(kept) == 1 + len(recorded) // 2:  # one call of each of their variants, in the middle
                keep("unet_unguided", _conditional(given, batch), residual[batch:])
                keep("tnf_unguided", _conditional(shared | coefficients, batch), noise[batch:])

        seeds = list(range(batch))
        noise = torch.from_numpy(initial_noise(seeds, config.latent_shape))
        with tqdm(total=len(steps), desc="reference run", unit="step", disable=None, leave=False) as bar:
            latents = sample(model, first_frame, noise, text, steps, on_step, steered)
        middle = len(recorded) // 2
        with FeatureReuse(model.residual_unet) as reusing:
            (given, _), (_, reusing.features) = kept[middle], kept[max(0, middle - 1)]
            inputs = given | {"features": reusing.features}
            twice = None if steered is None else torch.cat([steered, steered])
            residual = reusing(given["latents"], clean, given["timestep"], text, True, twice)
        keep("unet_shallow", inputs, residual)
        keep("unet_unguided_shallow", _conditional(inputs, batch), residual[batch:])
        frames = []
        for chunk in latents[0].transpose(0, 1).split(decode_frames):
            frames.append(_one_by_one(model.decode, chunk))
            if len(chunk) == decode_frames and not samples["vae_decoder"]:
                keep("vae_decoder", {"latents": chunk}, frames[0])
    whole = latents.numpy(), torch.cat(frames).numpy()
    return Reference(dict(samples), pictures, prompts, seeds, len(steps), scale, *whole, control)


def _one_by_one(function: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Of several pictures at a time PyTorch's GroupNorm was off by 2e-5 of a decoder's result in fp64, of one by 7e-7;
    the engines are off by 1e-6 either way."""
    return torch.cat([function(picture[None]) for picture in pictures])


def _conditional(inputs: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The conditional half, which is all that a step without guidance gets; a control has one half."""
    return {
        name: tensor if tensor.ndim == 1 or len(tensor) == batch else tensor[batch:] for name, tensor in inputs.items()
    }


def held_out(height: int, width: int, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures uint8 [count, height, width, 3] of the demo world that no training saw, and their sentences."""
    pictures, prompts = [], []
    for seed in range(count):
        scene, motion, _ = world.sample(seed, held_out=True)
        square = world.render(scene, motion, num_frames=1, size=max(height, width))[0]
        top, left = (square.shape[0] - height) // 2, (square.shape[1] - width) // 2
        pictures.append(square[top : top + height, left : left + width])
        prompts.append(world.caption(scene, motion))
    return np.stack(pictures), prompts
