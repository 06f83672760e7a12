"""How far a bundle's engines are from the PyTorch model: each component on the recorded inputs, then the whole loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from trip_engines.recording import Reference, Sample
from trip_rt.accuracy import psnr, relative_errors
from trip_rt.animator import Animator
from trip_rt.backends import Engine
from trip_rt.components import ALL, QUANTISED
from trip_rt.sampling.step import Arithmetic

# bf16 has three bits of mantissa fewer than fp16, so it rounds 8 times as coarsely. The clip must be as good all the
# same.
# int8 and fp8 trade likeness for time: their clip may be another good one.
MAX_COMPONENT_RMS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.2, "fp8": 0.2}
MIN_LOOP_PSNR = {"fp32": 60.0, "fp16": 40.0, "bf16": 40.0, "int8": 30.0, "fp8": 30.0}


@dataclass(frozen=True)
class ComponentParity:
    """The largest errors over a component's samples, relative to the RMS of the reference's output; NOT_A_NUMBER where
    an engine gave NaN."""

    max_error: float
    rms_error: float


@dataclass(frozen=True)
class Parity:
    """`components` by name, PSNR in dB of the whole loop's latents (peak: their range) and frames (peak: 2), and the
    verdict.

    `measured_on` names what ran: an engine library and its device, or an emulation.
    """

    precision: str
    measured_on: str
    components: dict[str, ComponentParity]
    num_inference_steps: int
    latents_psnr: float
    frames_psnr: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Parity:
        return Parity(
            **(
                data
                | {"components": {name: ComponentParity(**figures) for name, figures in data["components"].items()}}
            )
        )

    def table(self) -> str:
        """A table for people."""
        bound, floor = MAX_COMPONENT_RMS[self.precision], MIN_LOOP_PSNR[self.precision]
        return "\n".join(
            [
                f"parity of {self.precision} with PyTorch, measured on {self.measured_on}",
                f"{'component':<22}{'RMS error':>11}{'max error':>11}",
                *(
                    f"{name:<22}{c.rms_error:>11.1e}{c.max_error:>11.1e}"
                    for name, c in sorted(self.components.items(), key=_in_order)
                ),
                (
                    f"whole loop, {self.num_inference_steps} steps: latents {self.latents_psnr:.1f} dB, frames"
                    f" {self.frames_psnr:.1f} dB"
                ),
                (
                    f"parity: {'passed' if self.passed else 'FAILED'} (RMS error ≤ {bound:.0e} and PSNR ≥ {floor:.0f}"
                    " dB expected)"
                ),
            ]
        )


def measure(
    animator: Animator, reference: Reference, precision: str, measured_on: str, arithmetic: Arithmetic = "own"
) -> Parity:
    """Compare `animator`'s engines with the recorded `reference`, to the bounds of `precision`; with another
    `arithmetic` than their own, the UNets alone, and the loop."""
    figures = {
        name: component_parity(engine, used)
        for name, samples in reference.samples.items()
        if arithmetic == "own" or "unet" in (name, ALL[name].variant_of)
        if (used := [sample for sample in samples if _computes_so(animator, arithmetic, sample)])
        if (engine := animator.engine(name, arithmetic))
    }
    steps = reference.num_inference_steps
    with tqdm(total=steps, desc="parity", unit="step", disable=None, leave=False) as bar:
        latents = animator.latents(
            reference.pictures,
            reference.prompts,
            reference.seeds,
            controls=None if reference.control is None else list(reference.control),
            num_inference_steps=steps,
            guidance_scale=reference.guidance_scale,
            arithmetic="fp32" if arithmetic == "own" else arithmetic,
            on_step=lambda done, total: bar.update(),
        )
    frames = np.concatenate(list(animator.decode_pixels(latents[0])))
    latents_psnr = psnr(latents, reference.latents, float(np.ptp(reference.latents)))
    frames_psnr = psnr(frames, reference.frames, 2.0)
    passed = (
        all(c.rms_error <= MAX_COMPONENT_RMS[precision] for c in figures.values())
        and min(latents_psnr, frames_psnr) >= MIN_LOOP_PSNR[precision]
    )
    return Parity(precision, measured_on, figures, steps, round(latents_psnr, 2), round(frames_psnr, 2), passed)


def component_parity(engine: Engine, samples: Sequence[Sample]) -> ComponentParity:
    """The largest errors of one engine over recorded calls."""
    errors = [relative_errors(next(iter(engine.run(sample.inputs).values())), sample.output) for sample in samples]
    return ComponentParity(*(float(np.max(side)) for side in zip(*errors, strict=True)))


def _computes_so(animator: Animator, arithmetic: Arithmetic, sample: Sample) -> bool:
    """Whether a run in that arithmetic takes such a step in it."""
    if arithmetic not in QUANTISED:
        return True
    return int(sample.inputs["timestep"][0]) >= animator.profile.quantised_from.get(arithmetic, 0)


def _in_order(row: tuple[str, ComponentParity]) -> int:
    return list(ALL).index(row[0])
