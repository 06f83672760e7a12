"""The PyTorch model's own inputs and outputs on held-out pictures: what every engine is held to, and what half precision is chosen by."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trip_engines.reference import Reference, Sample
from trip_reference import demo_world
from trip_reference.demo_data import to_pixels
from trip_reference.model import TripModel
from trip_reference.sampling import sample
from trip_rt.sampler import initial_noise
from trip_rt.schedule import DDIMStep, ddim_steps
from trip_rt.tokenizer import PromptTokenizer

STEPS_RECORDED = 6


def record(model: TripModel, tokenizer_json: str, batch: int, decode_frames: int, num_inference_steps: int) -> Reference:
    """Run `model` on pictures of the demo world, at the shapes of its config, for `num_inference_steps` steps.

    The loop's components are recorded at up to STEPS_RECORDED steps spread over the whole run, each with the reference's own tensors, so that an
    engine's error is not counted twice.
    """
    config = model.config
    pictures, prompts = _held_out(config.height, config.width, batch)
    steps = ddim_steps(config.schedule, num_inference_steps)
    tokenizer = PromptTokenizer(tokenizer_json, config.text_length)
    samples: dict[str, list[Sample]] = defaultdict(list)

    def keep(name: str, inputs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
        samples[name].append(Sample({key: value.numpy().copy() for key, value in inputs.items()}, output.numpy().copy()))

    with torch.no_grad():
        ids, pixels = torch.from_numpy(tokenizer(prompts)), to_pixels(pictures).contiguous()  # GroupNorm of channels-last is less exact
        conditional, first_frame = model.encode_text(ids), model.encode_image(pixels)
        keep("text_encoder", {"input_ids": ids}, conditional)
        keep("vae_encoder", {"image": pixels}, first_frame)
        text = torch.cat([model.encode_text(torch.from_numpy(tokenizer([""] * batch))), conditional])
        clean = torch.cat([first_frame, first_frame])
        recorded = {steps[i].timestep for i in np.linspace(0, len(steps) - 1, STEPS_RECORDED).round().astype(int)}

        def on_step(step: DDIMStep, latents: torch.Tensor, residual: torch.Tensor, noise: torch.Tensor) -> None:
            bar.update()
            if step.timestep not in recorded:
                return
            shared = {"latents": latents, "first_frame": clean, "timestep": torch.tensor([step.timestep])}
            coefficients = {
                "residual_noise": residual,
                "sqrt_alpha_bar": torch.tensor([step.sqrt_alpha_bar]),
                "sqrt_one_minus_alpha_bar": torch.tensor([step.sqrt_one_minus_alpha_bar]),
            }
            keep("unet", shared | {"text": text}, residual)
            keep("tnf", shared | coefficients, noise)

        seeds = list(range(batch))
        noise = torch.from_numpy(initial_noise(seeds, (config.latent_channels, config.num_frames, config.latent_height, config.latent_width)))
        with tqdm(total=len(steps), desc="reference run", unit="step", disable=None, leave=False) as bar:
            latents = sample(model, first_frame, noise, text, steps, config.guidance_scale, on_step)
        frames = []
        for chunk in latents[0].transpose(0, 1).split(decode_frames):
            frames.append(model.decode(chunk))
            if len(chunk) == decode_frames and not samples["vae_decoder"]:
                keep("vae_decoder", {"latents": chunk}, frames[0])
    return Reference(dict(samples), pictures, prompts, seeds, len(steps), latents.numpy(), torch.cat(frames).numpy())


def _held_out(height: int, width: int, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    pictures, prompts = [], []
    for seed in range(count):
        scene, motion, _ = demo_world.sample(seed, held_out=True)
        square = demo_world.render(scene, motion, num_frames=1, size=max(height, width))[0]
        top, left = (square.shape[0] - height) // 2, (square.shape[1] - width) // 2
        pictures.append(square[top : top + height, left : left + width])
        prompts.append(demo_world.caption(scene, motion))
    return np.stack(pictures), prompts
