"""How much memory an export will take at most, told before it starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffusers.models.attention_processor import Attention

from trip_engines.tensorrt_build import LIBRARIES
from trip_reference.model import TripModel
from trip_rt.errors import InputError

if TYPE_CHECKING:
    from trip_export.plan import Plan

_PROCESS = 1.0  # GB: torch and the other libraries
_LIVE = 5  # values of an attention's or a picture's size that live at a time
_BUILDER = 3.9  # GB that TensorRT's builder holds for each GB of weights; measured on trip-256 in fp16


def estimate_gb(plan: Plan, outline: TripModel) -> float:
    """The resident memory of the largest stage, in GB. `outline` is the model with the shapes asked for; its weights
    are not looked at.

    The stages are the reference run, which holds the whole model in fp32; the trace of the largest component, which
    holds it beside its graph's file; in half precision the choice, which reads that file; the builder's process; and
    parity, in which the networks' weights are mapped.
    """
    parts = {
        "text_encoder": outline.text_encoder,
        "vae": outline.vae,
        "unet": outline.residual_unet,
        "fusion": outline.fusion,
        **({"control": outline.control} if outline.control else {}),
    }
    weights = {name: 4 * sum(p.numel() for p in part.parameters()) / 1e9 for name, part in parts.items()}
    largest, live = max(weights.values()), _live_gb(plan, outline)
    ratio = 1.0 if plan.options.precision == "fp32" else 0.5
    stages = [
        sum(weights.values()) + live if plan.steps else 0.0,
        2 * largest,
        2 * ratio * sum(weights.values()) + live,
    ]
    if plan.options.precision != "fp32":
        stages.append(1.5 * largest + live)
    if set(plan.options.backends) & set(LIBRARIES):
        stages.append(_BUILDER * ratio * largest + 0.5)
    return max(stages) + _PROCESS


def check_memory(needed_gb: float, machine_gb: float | None) -> str:
    """What to tell of the export's memory before it starts; InputError where the machine cannot hold it."""
    if machine_gb is None:
        return f"memory: about {needed_gb:.1f} GB at most"
    if needed_gb > machine_gb:
        raise InputError(
            f"memory: found {machine_gb:.1f} GB on this machine, expected about {needed_gb:.1f} GB at most; export on a"
            " larger one, or take a smaller --size, fewer --frames or a smaller --batch"
        )
    return f"memory: about {needed_gb:.1f} GB at most, of {machine_gb:.1f} GB on this machine"


def _live_gb(plan: Plan, outline: TripModel) -> float:
    """What the values of a call take: the scores of the UNet's largest attention over places, [2·B·F, heads, h·w, h·w],
    or the VAE's largest picture, [F', C, H, W]."""
    config, clips = plan.config, 2 * plan.options.batch
    frames, places = config.num_frames + 1, math.prod(config.frame_shape[1:])
    unet = outline.residual_unet.unet
    scores = [
        clips * frames * module.heads * (places // 4**level) ** 2
        for level, block in enumerate(unet.down_blocks)
        for attention in getattr(block, "attentions", ())
        for module in attention.modules()
        if isinstance(module, Attention)
    ]
    channels = outline.vae.config.block_out_channels[0]
    picture = plan.decode_frames * channels * config.height * config.width
    return _LIVE * 4 * max([*scores, picture]) / 1e9
