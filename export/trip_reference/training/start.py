"""The model that a run starts from, and what of it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from trip_reference import checkpoint
from trip_reference.fusion import fusion_for
from trip_reference.gradient_checkpointing import checkpoint_gradients
from trip_reference.model import TripModel
from trip_reference.presets import PRESETS
from trip_reference.random_checkpoint import random_model
from trip_reference.shape import reshaped
from trip_reference.training.config import OWN_TEXT, ModelConfig, TrainConfig
from trip_reference.training.denoiser import Denoiser
from trip_reference.training.lora import add_adapters
from trip_reference.word_tokenizer import text_overrides, tokenizer_for
from trip_rt.config import ControlConfig, TripConfig
from trip_rt.errors import InputError


def start_config(config: ModelConfig) -> TripConfig:
    """The shape of the model that a run starts from, without its weights: a checkpoint's or a preset's, but for the
    settings that say otherwise. InputError for settings that do not fit it."""
    if config.checkpoint:
        trip, multiple = checkpoint.load_config(config.checkpoint), checkpoint.latent_multiple(config.checkpoint)
        for name in ("fusion", "first_frame"):
            found, expected = getattr(trip, name), getattr(config, name)
            if found != expected:
                raise InputError(
                    f"{config.checkpoint}: {name}: found {found}, expected {expected}; --set model.{name}={found} takes"
                    " it as it is"
                )
    else:
        preset = PRESETS[config.preset]
        trip = dataclasses.replace(preset.trip, fusion=config.fusion, first_frame=config.first_frame)
        multiple = 2 ** (len(preset.unet["block_out_channels"]) - 1)
    if config.vae:
        trip = dataclasses.replace(trip, scaling_factor=checkpoint.load_config(config.vae).scaling_factor)
    if config.text_length:
        trip = dataclasses.replace(trip, text_length=config.text_length)
    return reshaped(trip, multiple, config.num_frames, config.height, config.width)


def start_model(config: ModelConfig, seed: int, sentences: Sequence[str] = ()) -> tuple[TripModel, str]:
    """A TripModel and the text of its tokenizer.json: a checkpoint's, published parts', or a preset's at random weights
    drawn from `seed`. `sentences` are the data set's, whose words a text encoder of its own has to know."""
    trip = start_config(config)
    if config.checkpoint:
        model = checkpoint.from_pretrained(config.checkpoint)
        tokenizer_json = checkpoint.load_tokenizer_json(config.checkpoint)
    elif config.modelscope:
        torch.manual_seed(seed)  # for the fusion, which no published part has
        model, tokenizer_json = checkpoint.assemble(trip, config.modelscope, config.stable_diffusion)
    else:
        model, tokenizer_json = random_model(dataclasses.replace(PRESETS[config.preset], trip=trip), seed)
    if model.config.num_frames != trip.num_frames:
        model.fusion = fusion_for(trip, model.fusion)
    model.config = trip
    if config.vae:
        model.vae = checkpoint.load_vae(Path(config.vae))
        if (found := model.vae.config["latent_channels"]) != trip.latent_channels:
            raise InputError(
                f"{config.vae}: found a VAE of {found} latent channels, expected {trip.latent_channels}; take one that"
                " fits"
            )
    if config.text:
        tokenizer_json = _take_text(model, config.text, seed, sentences)
    if config.control:
        torch.manual_seed(seed)
        model.add_control(ControlConfig(config.control, config.control_size, config.control_layers))
    return model, tokenizer_json


def _take_text(model: TripModel, text: str, seed: int, sentences: Sequence[str]) -> str:
    """Give the model another text encoder, in place, and return its tokenizer.json: a fresh one of the same sizes that
    knows the words of `sentences`, or that of the folder `text`."""
    if text == OWN_TEXT:
        tokenizer = tokenizer_for(sentences, model.config.text_length)
        sizes = model.text_encoder.config.to_dict() | {"max_position_embeddings": model.config.text_length}
        torch.manual_seed(seed)
        model.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(sizes | text_overrides(tokenizer)))
        return tokenizer.to_str(pretty=True)
    model.text_encoder, tokenizer_json = checkpoint.load_text(text)
    if (found := model.text_encoder.config.hidden_size) != model.config.text_width:
        raise InputError(
            f"{text}: found a text encoder of width {found}, expected {model.config.text_width}, as the UNet's"
            " attention has; take one that fits"
        )
    length = model.text_encoder.config.max_position_embeddings
    model.config = dataclasses.replace(model.config, text_length=length)
    return tokenizer_json


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
