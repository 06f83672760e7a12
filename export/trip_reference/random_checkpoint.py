"""A checkpoint with random weights, of the shapes and cost of a real one: for export and benchmarks without trained
weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from trip_reference import checkpoint
from trip_reference.demo_world.text import build_tokenizer
from trip_reference.model import TripModel, build_model
from trip_reference.presets import PRESETS, Preset
from trip_reference.word_tokenizer import text_overrides
from trip_rt.command_line import CommandParser, main_of
from trip_rt.launch import note


def random_model(preset: Preset, seed: int) -> tuple[TripModel, str]:
    """A model of that architecture with the weights of its seed, and the text of its tokenizer.json: the demo's, as no
    other comes with a preset."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(preset.trip.text_length)
    # A preset's own vocabulary size is kept, because it is part of the model's size; the tokenizer's ids fit in it.
    overrides = {} if "vocab_size" in preset.text_encoder else text_overrides(tokenizer)
    return build_model(preset, overrides), tokenizer.to_str(pretty=True)


def save_random(preset: Preset, folder: Path, seed: int = 0) -> None:
    """Write a checkpoint of that architecture in fp16; parameters that start at zero get small random values too, so
    that no path is dead.

    Its tokenizer is the demo's: it knows the words of the prompts that parity uses.
    """
    model, tokenizer_json = random_model(preset, seed)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    checkpoint.save_pretrained(model.half(), tokenizer_json, folder, torch.float16)
    note(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M random parameters")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m trip_reference.random_checkpoint",
        description="Write a checkpoint with random weights.",
        epilog="example: python -m trip_reference.random_checkpoint trip-256 -o checkpoints/random",
    )
    parser.add_argument("preset", choices=tuple(PRESETS))
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CHECKPOINT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(args: argparse.Namespace) -> int:
    save_random(PRESETS[args.preset], args.output, args.seed)
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
