"""A TRIP model of a few thousand random weights, with everything in it that a real one has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from trip_reference import checkpoint
from trip_reference.demo_world.text import build_tokenizer
from trip_reference.model import TripModel, build_model, build_text_encoder, build_unet, build_vae
from trip_reference.presets import DEMO, Preset
from trip_reference.word_tokenizer import text_overrides

TINY = Preset(
    trip=dataclasses.replace(
        DEMO.trip,
        num_frames=5,
        height=32,
        width=48,
        latent_channels=8,
        vae_scale_factor=8,
        text_width=16,
        guidance_scale=1.5,
        num_inference_steps=4,
        tnf=dataclasses.replace(DEMO.trip.tnf, hidden_size=16),
    ),
    unet=DEMO.unet | dict(block_out_channels=(8, 16), norm_num_groups=4),
    vae=DEMO.vae | dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    text_encoder=DEMO.text_encoder | dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1),
)


def tiny_model(seed: int = 0, **changes: object) -> TripModel:
    """A tiny model whose every parameter is random, zero-initialised ones too, so that no path is dead."""
    torch.manual_seed(seed)
    preset = dataclasses.replace(TINY, trip=dataclasses.replace(TINY.trip, **changes))
    model = build_model(preset, text_overrides(build_tokenizer(preset.trip.text_length)))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval()


def save_tiny(folder: Path) -> Path:
    """A tiny model and its tokenizer as a checkpoint."""
    checkpoint.save_pretrained(tiny_model(), build_tokenizer(TINY.trip.text_length).to_str(pretty=True), folder)
    return folder


def save_published(root: Path) -> tuple[Path, Path]:
    """Small folders in the layout of the published ModelScope and Stable Diffusion ones."""
    torch.manual_seed(3)
    text = dict(vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    build_unet(TINY.trip, TINY.unet).save_pretrained(root / "modelscope" / "unet")
    build_vae(TINY.trip, TINY.vae).save_pretrained(root / "sd" / "vae")
    build_text_encoder(TINY.trip, TINY.text_encoder | text).save_pretrained(root / "sd" / "text_encoder")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(
        root / "sd" / "tokenizer"
    )
    return root / "modelscope", root / "sd"
