"""How far a bundle's engines are from the PyTorch model: each component on real inputs, then the whole loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trip_reference import demo_world
from trip_reference.demo_data import to_pixels
from trip_reference.model import TripModel
from trip_reference.sampling import sample
from trip_rt.animator import Animator
from trip_rt.sampler import initial_noise
from trip_rt.schedule import DDIMStep, ddim_steps
from trip_rt.tokenizer import PromptTokenizer

MAX_COMPONENT_RMS = {"fp32": 1e-5, "fp16": 5e-3}
MIN_LOOP_PSNR = {"fp32": 60.0, "fp16": 40.0}
STEPS_COMPARED = 6


@dataclass(frozen=True)
class ComponentParity:
    """Errors relative to the RMS of the reference's output, and milliseconds a call, medians of interleaved calls."""

    max_error: float
    rms_error: float
    engine_ms: float
    reference_ms: float


@dataclass(frozen=True)
class Parity:
    """`components` by name, PSNR in dB of the whole loop's latents (peak: their range) and frames (peak: 2), and the verdict."""

    precision: str
    components: dict[str, ComponentParity]
    num_inference_steps: int
    latents_psnr: float
    frames_psnr: float
    loop_seconds: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Parity:
        return Parity(**(data | {"components": {name: ComponentParity(**figures) for name, figures in data["components"].items()}}))

    def table(self) -> str:
        """A table for people."""
        bound, floor = MAX_COMPONENT_RMS[self.precision], MIN_LOOP_PSNR[self.precision]
        lines = [f"{'component':<14}{'RMS error':>11}{'max error':>11}{'engine ms':>11}{'PyTorch ms':>12}"]
        for name, c in self.components.items():
            lines.append(f"{name:<14}{c.rms_error:>11.1e}{c.max_error:>11.1e}{c.engine_ms:>11.2f}{c.reference_ms:>12.2f}")
        lines.append(f"{self.precision}: component RMS error ≤ {bound:.0e} and loop PSNR ≥ {floor:.0f} dB expected")
        lines.append(
            f"whole loop, {self.num_inference_steps} steps: latents {self.latents_psnr:.1f} dB, frames {self.frames_psnr:.1f} dB "
            f"({self.loop_seconds:.1f} s on engines)"
        )
        lines.append("parity: " + ("passed" if self.passed else "FAILED"))
        return "\n".join(lines)


def measure(model: TripModel, animator: Animator, precision: str) -> Parity:
    """Compare `animator`'s engines with `model` on held-out pictures of the demo world.

    The loop's components are fed the reference's own tensors at steps spread over a whole run, so no error is counted twice.
    """
    config, batch = model.config, animator.manifest.batch
    pictures, prompts = _held_out(config.height, config.width, batch)
    steps = ddim_steps(config.schedule, config.num_inference_steps)
    tokenizer = PromptTokenizer(animator.tokenizer_json, config.text_length)
    compare = _Comparison(animator)

    ids = torch.from_numpy(tokenizer(prompts))
    conditional = compare("text_encoder", {"input_ids": ids}, lambda: model.encode_text(ids))
    with torch.no_grad():
        text = torch.cat([model.encode_text(torch.from_numpy(tokenizer([""] * batch))), conditional])
    pixels = to_pixels(pictures)
    first_frame = compare("vae_encoder", {"image": pixels}, lambda: model.encode_image(pixels))
    clean = torch.cat([first_frame, first_frame])
    compared = {steps[i].timestep for i in np.linspace(0, len(steps) - 1, STEPS_COMPARED).round().astype(int)}

    def on_step(step: DDIMStep, latents: torch.Tensor, residual: torch.Tensor, _: torch.Tensor) -> None:
        if step.timestep not in compared:
            return
        signal, sigma, timestep = torch.tensor([step.sqrt_alpha_bar]), torch.tensor([step.sqrt_one_minus_alpha_bar]), torch.tensor([step.timestep])
        shared = {"latents": latents, "first_frame": clean, "timestep": timestep}
        compare("unet", shared | {"text": text}, lambda: model.residual_unet(latents, clean, timestep, text))
        coefficients = {"residual_noise": residual, "sqrt_alpha_bar": signal, "sqrt_one_minus_alpha_bar": sigma}
        compare("tnf", shared | coefficients, lambda: model.fusion(latents, clean, residual, signal, sigma, timestep))

    seeds = list(range(batch))
    noise = torch.from_numpy(initial_noise(seeds, (config.latent_channels, config.num_frames, config.latent_height, config.latent_width)))
    expected = sample(model, first_frame, noise, text, steps, config.guidance_scale, on_step)
    chunk = expected[0].transpose(0, 1)[: animator.manifest.decode_frames].contiguous()
    compare("vae_decoder", {"latents": chunk}, lambda: model.decode(chunk))

    began = time.perf_counter()
    found = animator.latents(pictures, prompts, seeds)
    found_pixels = np.concatenate(list(animator.decode_pixels(found[0])))
    seconds = time.perf_counter() - began
    with torch.no_grad():
        expected_pixels = model.decode(expected[0].transpose(0, 1)).numpy()
    latents_psnr = psnr(found, expected.numpy(), float(np.ptp(expected.numpy())))
    frames_psnr = psnr(found_pixels, expected_pixels, 2.0)
    figures = compare.figures()
    passed = all(c.rms_error <= MAX_COMPONENT_RMS[precision] for c in figures.values()) and min(latents_psnr, frames_psnr) >= MIN_LOOP_PSNR[precision]
    return Parity(precision, figures, len(steps), round(latents_psnr, 2), round(frames_psnr, 2), round(seconds, 2), passed)


def psnr(found: NDArray[Any], expected: NDArray[Any], peak: float) -> float:
    """Peak signal-to-noise ratio in dB; 200 stands for equal arrays, NaN in `found` gives −200."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    if not np.isfinite(error):
        return -200.0
    return 200.0 if error == 0 else float(min(200.0, 10 * np.log10(peak**2 / error)))


class _Comparison:
    """Runs a component on both sides, gives the reference's output, and keeps errors and times."""

    def __init__(self, animator: Animator):
        self._engines = animator.engines
        self._errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._times: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def __call__(self, name: str, inputs: dict[str, torch.Tensor], reference: Callable[[], torch.Tensor]) -> torch.Tensor:
        arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in inputs.items()}
        engine = self._engines[name]
        for attempt in range(3):
            t0 = time.perf_counter()
            (found,) = engine.run(arrays).values()
            t1 = time.perf_counter()
            with torch.no_grad():
                output = reference()
            t2 = time.perf_counter()
            if attempt:  # the first call warms up
                self._times[name].append((t1 - t0, t2 - t1))
        expected = output.numpy().astype(np.float64)
        error, scale = np.abs(found - expected), float(np.sqrt(np.mean(expected**2)))
        self._errors[name].append((float(error.max()) / scale, float(np.sqrt(np.mean(error**2))) / scale))
        return output

    def figures(self) -> dict[str, ComponentParity]:
        result = {}
        for name, errors in self._errors.items():
            worst = np.array(errors).max(axis=0)
            engine_ms, reference_ms = np.median(np.array(self._times[name]), axis=0) * 1000
            result[name] = ComponentParity(float(worst[0]), float(worst[1]), round(float(engine_ms), 3), round(float(reference_ms), 3))
        return result


def _held_out(height: int, width: int, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    pictures, prompts = [], []
    for seed in range(count):
        scene, motion, _ = demo_world.sample(seed, held_out=True)
        square = demo_world.render(scene, motion, num_frames=1, size=max(height, width))[0]
        top, left = (square.shape[0] - height) // 2, (square.shape[1] - width) // 2
        pictures.append(square[top : top + height, left : left + width])
        prompts.append(demo_world.caption(scene, motion))
    return np.stack(pictures), prompts
