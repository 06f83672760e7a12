"""`trip-export` and `trip-parity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trip_export.export import PRECISION, export_bundle
from trip_export.parity import measure
from trip_reference import checkpoint
from trip_rt.animator import Animator
from trip_rt.command import CommandParser, add_json_flag, main_of, note, report
from trip_rt.errors import InputError


def build_export_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-export",
        description="Export a checkpoint to a bundle of engines, and measure that they agree with PyTorch. What is unchanged is reused.",
        epilog="example: trip-export checkpoints/demo -o bundle",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, as trip-train writes it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="bundle folder to write")
    parser.add_argument("--batch", type=int, default=1, help="clips animated at a time (%(default)s)")
    parser.add_argument("--frames", type=int, help="frames of a clip (the checkpoint's)")
    parser.add_argument("--size", type=_size, metavar="WxH", help="picture size in pixels (the checkpoint's)")
    add_json_flag(parser)
    return parser


def run_export(args: argparse.Namespace) -> int:
    result = export_bundle(args.checkpoint, args.output, batch=args.batch, frames=args.frames, size=args.size, note=note)
    figures = {"bundle": str(result.bundle), "seconds": result.seconds, "reused": result.reused, "parity": result.parity.to_json()}
    report(args, figures, f"{result.parity.table()}\n{result.bundle}: {'ready' if result.parity.passed else 'do not ship'}")
    return 0 if result.parity.passed else 1


def build_parity_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-parity",
        description="Compare a bundle with the checkpoint it was made from: every component on real inputs, then the whole loop.",
        epilog="example: trip-parity bundle checkpoints/demo",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    add_json_flag(parser)
    return parser


def run_parity(args: argparse.Namespace) -> int:
    model = checkpoint.from_pretrained(args.checkpoint)
    with Animator(args.bundle) as animator:
        if animator.config.schedule != model.config.schedule or animator.config.latent_channels != model.config.latent_channels:
            raise InputError(f"{args.bundle}: was not made from {args.checkpoint}, their configs differ; compare it with its own checkpoint")
        model.config = animator.config  # the bundle's shapes
        parity = measure(model, animator, PRECISION)
    report(args, parity.to_json(), parity.table())
    return 0 if parity.passed else 1


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected WIDTHxHEIGHT such as 256x256")
    return int(height), int(width)


export_main = main_of(build_export_parser, run_export)
parity_main = main_of(build_parity_parser, run_parity)
