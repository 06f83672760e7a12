"""Image models of diffusers' real classes, of a few thousand random weights each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 8  # of the text
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def tiny_pipeline(kind: str, folder: Path) -> Path:
    """A pipeline's folder: sd, sdxl, edit or controlnet, the last a network for sd."""
    torch.manual_seed(0)
    if kind == "controlnet":
        ControlNetModel.from_unet(_unet()).save_pretrained(folder)
    elif kind == "sdxl":
        second = CLIPTextModelWithProjection(_text_config(projection_dim=WIDTH))
        StableDiffusionXLPipeline(
            **_parts(),
            text_encoder_2=second,
            tokenizer_2=_tokenizer(),
            unet=_unet(cross_attention_dim=2 * WIDTH, **_XL),
        ).save_pretrained(folder)
    else:
        cls = StableDiffusionInstructPix2PixPipeline if kind == "edit" else StableDiffusionPipeline
        channels = {"in_channels": 8} if kind == "edit" else {}
        cls(
            **_parts(),
            unet=_unet(**channels),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


_XL: dict[str, Any] = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    transformer_layers_per_block=1,
    use_linear_projection=True,
)


def _unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        | changes
    )


def _text_config(**changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **changes,
    )


def _tokenizer() -> CLIPTokenizer:
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def _parts() -> dict[str, Any]:
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    return dict(vae=vae, text_encoder=CLIPTextModel(_text_config()), tokenizer=_tokenizer(), scheduler=DDIMScheduler())
