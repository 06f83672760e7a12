"""The model that a run starts from, and what of it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from trip_reference import checkpoint
from trip_reference.gradient_checkpointing import checkpoint_gradients
from trip_reference.model import TripModel
from trip_reference.presets import PRESETS
from trip_reference.random_checkpoint import random_model
from trip_reference.training.config import ModelConfig, TrainConfig
from trip_reference.training.denoiser import Denoiser
from trip_reference.training.lora import add_adapters
from trip_rt.errors import InputError


def start_model(config: ModelConfig, seed: int) -> tuple[TripModel, str]:
    """A TripModel and the text of its tokenizer.json: a checkpoint's, published parts', or a preset's at random weights
    drawn from `seed`."""
    if config.checkpoint:
        model, tokenizer_json = (
            checkpoint.from_pretrained(config.checkpoint),
            checkpoint.load_tokenizer_json(config.checkpoint),
        )
        for name in ("fusion", "first_frame"):
            found, expected = getattr(model.config, name), getattr(config, name)
            if found != expected:
                raise InputError(
                    f"{config.checkpoint}: {name}: found {found}, expected {expected}; --set model.{name}={found} takes"
                    " it as it is"
                )
    else:
        preset = PRESETS[config.preset]
        trip = dataclasses.replace(preset.trip, fusion=config.fusion, first_frame=config.first_frame)
        if config.modelscope:
            torch.manual_seed(seed)  # for the fusion, which no published part has
            model, tokenizer_json = checkpoint.assemble(trip, config.modelscope, config.stable_diffusion)
        else:
            model, tokenizer_json = random_model(dataclasses.replace(preset, trip=trip), seed)
    if config.vae:
        model.vae = checkpoint.load_vae(Path(config.vae))
        model.config = dataclasses.replace(
            model.config, scaling_factor=checkpoint.load_config(config.vae).scaling_factor
        )
    return model, tokenizer_json


def trainable(model: TripModel, config: TrainConfig) -> Denoiser:
    """The denoiser of `model` as a recipe trains it: with adapters, without dropout, with checkpointed gradients."""
    if config.lora.rank:
        add_adapters(model.residual_unet.unet, config.lora)
    if not config.run.dropout:
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    if config.run.gradient_checkpointing:
        checkpoint_gradients(model.residual_unet.unet)
    return Denoiser(model, config.loss, config.run.fused_kernel)


def learns(name: str, patterns: Sequence[str], adapters: bool) -> bool:
    """Whether a Denoiser's parameter matches one of the patterns; with adapters, the UNet's other parameters never
    do."""
    frozen = adapters and name.startswith("residual_unet.") and ".lora_" not in name
    return not frozen and any(fnmatchcase(name, pattern) for pattern in patterns)


def train_only(module: nn.Module, patterns: Sequence[str], adapters: bool = False) -> None:
    """Freeze all parameters but those that `learns` names; InputError for a pattern that fits none."""
    names = [name for name, _ in module.named_parameters()]
    parts = {name.split(".")[0] for name in names}
    for pattern in patterns:
        # A pattern may name a part without parameters, such as the fusion of `none`.
        absent = pattern.split(".")[0] in dict(module.named_children()).keys() - parts
        if not absent and not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"trains: found no parameter like {pattern!r}, expected names as {names[0]!r} or patterns as 'fusion.*'"
            )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns(name, patterns, adapters))
