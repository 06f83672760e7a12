"""`trip-train`: from nothing to a checkpoint folder."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trip_reference import checkpoint
from trip_reference.demo_data import DemoClips, encode_clips, render_clips
from trip_reference.demo_text import build_tokenizer, text_overrides
from trip_reference.model import TripModel, build_model
from trip_reference.presets import DEMO
from trip_reference.train_denoiser import latent_scale, train_denoiser
from trip_reference.train_vae import reconstruction_psnr, train_vae
from trip_reference.training import StageConfig
from trip_rt.command import CommandParser, add_json_flag, main_of, note, report
from trip_rt.config import FirstFrame, Fusion
from trip_rt.errors import InputError

VAE_STAGE = StageConfig(steps=4000, batch=8, lr=2e-3, ema_decay=0.995)
DENOISER_STAGE = StageConfig(steps=3600, batch=8, lr=1e-3)
CLIPS = 3000


def train_demo(
    folder: Path,
    seed: int,
    clip_count: int,
    vae_stage: StageConfig,
    denoiser_stage: StageConfig,
    fusion: Fusion,
    first_frame: FirstFrame,
    vae_from: Path | None,
    start_from: Path | None = None,
) -> dict[str, object]:
    """Train the demo model into `folder` and return what a report should say; resumes what it finds in `folder/training`."""
    began = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(DEMO.trip.text_length)
    preset = dataclasses.replace(DEMO, trip=dataclasses.replace(DEMO.trip, fusion=fusion, first_frame=first_frame))
    model = build_model(preset, text_overrides(tokenizer))
    settings = json.dumps([seed, clip_count, dataclasses.asdict(preset)], sort_keys=True)
    if start_from:
        _take_weights(model, start_from)
    elif vae_from:
        model.vae = checkpoint.load_vae(vae_from)

    work = folder / "training"
    work.mkdir(parents=True, exist_ok=True)
    clips = render_clips(preset.trip, clip_count)
    if not (start_from or vae_from):
        model.vae = train_vae(model.vae, clips, vae_stage, seed, work, settings)
    model.vae.half().float()  # the checkpoint's precision: the denoiser learns the latents that it will meet
    model.vae.eval().requires_grad_(False)
    held_out = render_clips(preset.trip, 32, held_out=True)
    psnr = reconstruction_psnr(model.vae, held_out.frames[:, ::5].reshape(-1, *held_out.frames.shape[2:]))
    note(f"VAE gives held-out frames back at {psnr:.2f} dB")

    latents = _cached_latents(work / "latents.safetensors", model, clips)
    scale = latent_scale(latents)
    model.config = dataclasses.replace(preset.trip, scaling_factor=scale)
    train_denoiser(model, tokenizer, clips, latents * scale, denoiser_stage, seed, work, settings + _digest(model))
    checkpoint.save_pretrained(model, tokenizer.to_str(pretty=True), folder, torch.float16)
    return {
        "checkpoint": str(folder),
        "seed": seed,
        "fusion": fusion,
        "first_frame": first_frame,
        "vae_psnr_db": round(psnr, 2),
        "scaling_factor": scale,
        "seconds": round(time.monotonic() - began),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _take_weights(model: TripModel, source: Path) -> None:
    """Load the weights of checkpoint `source`, which must be of the same networks, into `model`."""
    start = checkpoint.from_pretrained(source)
    for name in ("fusion", "first_frame", "num_frames", "latent_channels", "text_width", "tnf"):
        found, expected = getattr(start.config, name), getattr(model.config, name)
        if found != expected:
            raise InputError(f"{source}: {name}: found {found}, expected {expected}; start from a checkpoint of the same model")
    model.load_state_dict(start.state_dict())


def _digest(module: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cached_latents(path: Path, model: TripModel, clips: DemoClips) -> Tensor:
    """The clips' unscaled latents, encoded once for a VAE and a number of clips."""
    origin = {"origin": f"{_digest(model.vae)} {len(clips)}"}
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata() == origin:
                return file.get_tensor("latents")
    latents = encode_clips(model, clips.frames)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"latents": latents}, draft, metadata=origin)
    os.replace(draft, path)
    return latents


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-train",
        description="Train a TRIP model. --demo trains the small demo model from nothing on seeded, procedural clips.",
        epilog="example: trip-train --demo -o checkpoints/demo      (run it again to resume)",
    )
    parser.add_argument("--demo", action="store_true", required=True, help="train on the demo world")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint folder to write; its training/ keeps the state of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=CLIPS, help="how many clips to train on (%(default)s)")
    parser.add_argument("--vae-steps", type=int, default=VAE_STAGE.steps, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=DENOISER_STAGE.steps, help="of the denoiser (%(default)s)")
    parser.add_argument("--lr", type=float, default=DENOISER_STAGE.lr, help="of the denoiser, at its highest (%(default)s)")
    parser.add_argument("--fusion", choices=("tnf", "linear", "none"), default="tnf")
    parser.add_argument("--first-frame", choices=("start", "end", "channel"), default="start")
    parser.add_argument("--vae-from", type=Path, metavar="CHECKPOINT", help="take the VAE of this checkpoint and train only the rest")
    parser.add_argument("--start-from", type=Path, metavar="CHECKPOINT", help="keep this checkpoint's VAE and train the rest on from its weights")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    for name, least in (("seed", 0), ("clips", 1), ("vae_steps", 1), ("steps", 1)):
        if (value := getattr(args, name)) < least:
            raise InputError(f"{name.replace('_', '-')}: found {value}, expected at least {least}")
    if not 0 < args.lr < 1:
        raise InputError(f"lr: found {args.lr:g}, expected more than 0 and less than 1")
    result = train_demo(
        args.output,
        args.seed,
        args.clips,
        dataclasses.replace(VAE_STAGE, steps=args.vae_steps),
        dataclasses.replace(DENOISER_STAGE, steps=args.steps, lr=args.lr),
        args.fusion,
        args.first_frame,
        args.vae_from,
        args.start_from,
    )
    report(args, result, f"{result['checkpoint']}: trained in {result['seconds']} s")
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
