"""A denoising step: its numbers, and the arithmetic that follows the networks. Arrays may be numpy's or torch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

# Of the five tensors that a step is linear in: latents z, noise ε̃, and the history's three in their order.
Coefficients = tuple[float, float, float, float, float]
# Of a network: its engine's own precision, or less (trip_rt.arithmetic).
Arithmetic = Literal["own", "bf16", "int8", "fp8"]


class UNetKind(NamedTuple):
    """Which UNet a step needs: for both of guidance's halves or one, whole or its outermost layer, and what it computes
    in."""

    guided: bool = True
    shallow: bool = False
    arithmetic: Arithmetic = "own"


@dataclass(frozen=True)
class Step:
    """One step of a solver, starting at `timestep`.

    `latents` are the coefficients of the next latents, `corrected` those of this step's corrected latents z̄ (UniPC).
    A `shallow` step runs the UNet's outermost layer alone, on deep features that an earlier step left. In a
    `controlled` one a clip's control counts, where it has one.
    """

    timestep: int
    sqrt_alpha_bar: float
    sqrt_one_minus_alpha_bar: float
    latents: Coefficients
    corrected: Coefficients
    guidance_scale: float = 1.0
    shallow: bool = False
    controlled: bool = True
    arithmetic: Arithmetic = "own"

    @property
    def unet(self) -> UNetKind:
        return UNetKind(self.guided, self.shallow, self.arithmetic)

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is needed."""
        return self.guidance_scale != 1


class History(NamedTuple):
    """What earlier steps left, None where none did: z̄ of the last step, and the clean latents x̂_0 that the last step
    and the one before it predicted."""

    corrected: Any = None
    clean_1: Any = None
    clean_2: Any = None


def hold_first_frame(step: Step, latents: Any, first_frame: Any, first_noise: Any) -> None:
    """Put frame 1 of `latents` [B, C, F, h, w] where the given picture is at this step, in place.

    That is its exact path z_t = sqrt(ᾱ_t)·z_0 + sqrt(1−ᾱ_t)·ε, on which its image noise prior is its exact noise.
    """
    latents[:, :, 0] = step.sqrt_alpha_bar * first_frame + step.sqrt_one_minus_alpha_bar * first_noise


def guide(step: Step, noise: Any, batch: int) -> Any:
    """Classifier-free guidance (Ho & Salimans 2022): ε = ε_uncond + g·(ε_cond − ε_uncond), [B, C, F, h, w].

    `noise` holds the unconditional half first, then the conditional one; an unguided step needs the latter alone.
    """
    if not step.guided:
        return noise[-batch:]
    unconditional, conditional = noise[:batch], noise[batch:]
    return unconditional + step.guidance_scale * (conditional - unconditional)


def predicted_clean(step: Step, latents: Any, noise: Any) -> Any:
    """x̂_0 = (z_t − sqrt(1−ᾱ_t)·ε̃) / sqrt(ᾱ_t), the clean latents that `noise` says are in `latents`."""
    return (latents - step.sqrt_one_minus_alpha_bar * noise) / step.sqrt_alpha_bar


def advance(step: Step, latents: Any, noise: Any, history: History) -> tuple[Any, History]:
    """The solver's update: the next latents and the next history, from latents and guided noise [B, C, F, h, w]."""
    terms = (latents, noise, *history)
    clean = predicted_clean(step, latents, noise)
    return _combine(step.latents, terms), History(_combine(step.corrected, terms), clean, history.clean_1)


def _combine(coefficients: Coefficients, terms: Sequence[Any]) -> Any:
    """Σ c·x over the terms whose coefficient is not 0; None where all are."""
    total = None
    for coefficient, term in zip(coefficients, terms, strict=True):
        if coefficient == 0:
            continue
        if total is None:
            total = coefficient * term
        else:
            total += coefficient * term
    return total
