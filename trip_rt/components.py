"""The components of a TRIP model: their names, how they belong together, and the tensors of their graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from msgspec import Meta

from trip_rt.config import ControlConfig, Count, TripConfig

Part = Literal["text_encoder", "unet", "fusion", "vae", "control"]  # of a checkpoint
Quantised = Literal["int8", "fp8"]  # what weights and activations of products are stored in
QUANTISED: tuple[Quantised, ...] = get_args(Quantised)


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and static shape of a graph's input or output."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    dtype: Literal["float16", "float32", "int32", "int64"]
    shape: Annotated[tuple[Count, ...], Meta(max_length=8)]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype[-2:]) // 8


@dataclass(frozen=True)
class Component:
    """One graph of the model. `part` holds its weights; a `variant_of` another component shares that one's weights and
    choice of precision. The denoising graphs are `guided`, for both of guidance's halves, or for the conditional half
    alone; a `shallow` UNet is its outermost layer on the deep features of an earlier step. A `quantised` one is made
    from the graph whose name it has besides that word. An `optional` component is there where the model has its part.
    """

    name: str
    part: Part
    variant_of: str | None = None
    guided: bool = True
    shallow: bool = False
    optional: bool = False
    quantised: Quantised | None = None


ALL = {
    component.name: component
    for component in (
        Component("text_encoder", "text_encoder"),
        Component("text_projection", "unet"),
        Component("vae_encoder", "vae"),
        Component("unet", "unet"),
        Component("tnf", "fusion"),
        Component("vae_decoder", "vae"),
        Component("control_encoder", "control", optional=True),
        Component("unet_shallow", "unet", "unet", shallow=True),
        Component("unet_unguided", "unet", "unet", guided=False),
        Component("unet_unguided_shallow", "unet", "unet", guided=False, shallow=True),
        Component("tnf_unguided", "fusion", "tnf", guided=False),
        Component("unet_int8", "unet", "unet", quantised="int8"),
        Component("unet_unguided_int8", "unet", "unet", guided=False, quantised="int8"),
        Component("unet_fp8", "unet", "unet", quantised="fp8"),
        Component("unet_unguided_fp8", "unet", "unet", guided=False, quantised="fp8"),
    )
}
REQUIRED = tuple(name for name, component in ALL.items() if component.variant_of is None and not component.optional)
# A bundle may hold these besides, for steps without guidance and steps that reuse deep features (settings.py).
VARIANTS = tuple(name for name, component in ALL.items() if component.variant_of and not component.quantised)


def variant(of: str, guided: bool, shallow: bool = False) -> str:
    """The name of the `unet` or `tnf` for that kind of step."""
    family = (component for component in ALL.values() if of in (component.name, component.variant_of))  # quantised last
    return next(component.name for component in family if (component.guided, component.shallow) == (guided, shallow))


def quantised_name(name: str, quantised: Quantised) -> str:
    """The name of a component's quantised engine, whether there is one or not."""
    return f"{name}_{quantised}"


Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def signatures(
    config: TripConfig,
    batch: int,
    decode_frames: int,
    context_width: int,
    features_shape: Sequence[int],
    control: ControlConfig | None = None,
) -> dict[str, Signature]:
    """Inputs and outputs of every component's graph, for a config of the profile's shapes.

    The denoising graphs hold 2·batch clips, the unconditional half first; unguided ones hold the conditional half. A
    clip's control is the same for both.
    """

    def f32(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def denoising(component: Component) -> Signature:
        clips = 2 * batch if component.guided else batch
        latents = f32("latents", clips, *config.latent_shape)
        first_frame = f32("first_frame", clips, *config.frame_shape)
        residual_noise = f32("residual_noise", clips, *config.latent_shape)
        timestep = TensorSpec("timestep", "int64", (1,))
        if component.part == "fusion":
            coefficients = f32("sqrt_alpha_bar", 1), f32("sqrt_one_minus_alpha_bar", 1)
            return (latents, first_frame, residual_noise, *coefficients, timestep), (
                f32("noise", clips, *config.latent_shape),
            )
        context = f32("context", clips, config.text_length, context_width)
        features = f32("features", clips, *features_shape)
        inputs = (latents, first_frame, timestep, context, *controlled)
        return ((*inputs, features), (residual_noise,)) if component.shallow else (inputs, (residual_noise, features))

    input_ids = TensorSpec("input_ids", "int64", (batch, config.text_length))
    text_shape = (config.text_length, config.text_width)
    picture = (3, config.height, config.width)
    controlled = (f32("control_features", batch, *features_shape),) if control else ()
    fixed: dict[str, Signature] = {
        "text_encoder": ((input_ids,), (f32("text", batch, *text_shape),)),
        "text_projection": (
            (f32("text", 2 * batch, *text_shape),),
            (f32("context", 2 * batch, config.text_length, context_width),),
        ),
        "vae_encoder": ((f32("image", batch, *picture),), (f32("latent", batch, *config.frame_shape),)),
        "vae_decoder": (
            (f32("latents", decode_frames, *config.frame_shape),),
            (f32("image", decode_frames, *picture),),
        ),
    }
    if control:
        _, frames, height, width = config.latent_shape
        control_map = f32("control", batch, control.channels, frames, height, width)
        fixed["control_encoder"] = (control_map, f32("first_frame", batch, *config.frame_shape)), controlled
    names = [name for name, component in ALL.items() if control or not component.optional]
    return {name: fixed.get(name) or denoising(ALL[name]) for name in names}
