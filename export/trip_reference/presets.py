"""The named models: `demo`, which is trained and shipped here, `demo-small` for trials, `bench` for benchmarks,
`trip-256`, the paper's size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trip_rt.config import ScheduleConfig, TNFConfig, TripConfig


@dataclass(frozen=True)
class Preset:
    """A TripConfig and the architecture of its networks, in the words of their own libraries."""

    trip: TripConfig
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]


# The demo keeps the full model's layout at about a seventh of its width. Its VAE halves pictures once more, so that the
# UNet has 8×8 latents, which two cores can train on; 16 channels hold the shape's edge in a patch of 16×16 pixels.
DEMO = Preset(
    trip=TripConfig(
        fusion="tnf",
        first_frame="start",
        normalize_prior=True,
        num_frames=16,
        height=128,
        width=128,
        fps=8,
        latent_channels=16,
        vae_scale_factor=16,
        scaling_factor=1.0,  # measured after the VAE's training
        text_length=16,
        text_width=64,
        guidance_scale=1.0,
        num_inference_steps=50,
        tnf=TNFConfig(hidden_size=64, num_heads=4, num_layers=2),
        schedule=ScheduleConfig(
            # Stable Diffusion ends at 0.012, where sqrt(ᾱ) = 0.068 of the clip still shows through: the model reads its
            # motion there and not in the sentence, and goes astray from the pure noise that sampling starts with.
            # 0.022 leaves 0.010.
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.022,
            num_train_timesteps=1000,
            timestep_spacing="trailing",
            steps_offset=0,
        ),
        gate="matched",
    ),
    unet=dict(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    ),
    vae=dict(
        block_out_channels=(16, 32, 64, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    ),
    text_encoder=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
    ),
)

# ModelScopeT2V's UNet, Stable Diffusion's VAE, and OpenCLIP-H as Stable Diffusion 2.1 cuts it (23 of its 24 layers).
TRIP_256 = Preset(
    trip=TripConfig(
        fusion="tnf",
        first_frame="start",
        normalize_prior=True,
        num_frames=16,
        height=256,
        width=256,
        fps=4,
        latent_channels=4,
        vae_scale_factor=8,
        scaling_factor=0.18215,
        text_length=77,
        text_width=1024,
        guidance_scale=7.5,
        num_inference_steps=50,
        tnf=TNFConfig(hidden_size=128, num_heads=4, num_layers=2),
        schedule=ScheduleConfig(
            beta_schedule="linear",
            beta_start=1e-4,
            beta_end=2e-2,
            num_train_timesteps=1000,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    ),
    unet=dict(
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=64,
        norm_num_groups=32,
    ),
    vae=dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        mid_block_add_attention=True,
        force_upcast=True,
    ),
    text_encoder=dict(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        projection_dim=512,
        hidden_act="gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    ),
)

# Between the two, for benchmarks on CPUs: the full model's layout at a fifth of its width, 40 M parameters in the UNet.
BENCH = Preset(
    trip=dataclasses.replace(
        TRIP_256.trip,
        height=128,
        width=128,
        text_width=768,
        tnf=TNFConfig(hidden_size=64, num_heads=4, num_layers=2),
    ),
    unet=dict(
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(128, 256, 256),
        layers_per_block=1,
        attention_head_dim=64,
        norm_num_groups=32,
    ),
    vae=TRIP_256.vae | dict(block_out_channels=(32, 64, 128, 128), layers_per_block=1),
    text_encoder=TRIP_256.text_encoder
    | dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12),
)

# The demo at half its width and frames: what a comparison of recipes can afford to train many times. Its VAE is the
# demo's.
DEMO_SMALL = dataclasses.replace(
    DEMO,
    trip=dataclasses.replace(DEMO.trip, num_frames=8),
    unet=DEMO.unet | dict(block_out_channels=(32, 64)),
)

PRESETS = {"demo": DEMO, "demo-small": DEMO_SMALL, "bench": BENCH, "trip-256": TRIP_256}
