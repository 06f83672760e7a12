"""`trip-train`: from a recipe to a checkpoint folder."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from trip_rt.command_line import CommandParser, add_json_flag, main_of, report, size_of
from trip_rt.config import to_json
from trip_rt.launch import note
from trip_rt.signals import held

RECIPES = ("demo", "trip-256", "control")
EPILOG = """examples:
  trip-train --demo -o checkpoints/mine                            the demo model from nothing (run it again to resume)
  trip-train --demo -o mine --checkpoint checkpoints/demo --steps 4000 --lr 4e-4 --set vae.steps=0      train it on
  trip-train --recipe trip-256 --data webvid --checkpoint start -o run     videos of your own
  trip-train --recipe control -o control      a network by which a drawn path steers the demo's clips
  trip-train --data mine -o run --frames 8 --size 96x64 --set model.text=own     … with a small model from nothing
  trip-train recipe.toml -o run --set lora.rank=16 --set run.batch=32
  torchrun --nproc-per-node 8 -m trip_reference.training.command recipe.toml -o run
                                              (or accelerate launch, with DDP or FSDP by its config)

--print-config shows every setting of a recipe; recipes/demo.toml in the package explains them."""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-train",
        description=(
            "Train a TRIP model. A run that was stopped, or killed, goes on from its last state when the same command"
            " is given again."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings that differ from the recipe's"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--recipe", choices=RECIPES, default="demo", help="settings to begin with (%(default)s)")
    kind.add_argument(
        "--demo", action="store_const", dest="recipe", const="demo", help="the demo model on its own world"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="checkpoint folder to write; its training/ keeps the state of the run",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="a folder with annotations.json, shards, or a cache (data.source)"
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="take shards from addresses and commands that data.source names (https://, gs://, pipe:); a recipe of"
        " somebody else's could fetch or run anything by them",
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="weights to start from (model.checkpoint)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of a clip (model.num_frames)")
    parser.add_argument("--size", type=size_of, metavar="WxH", help="size in pixels (model.width, model.height)")
    parser.add_argument("--seed", type=int, help="(run.seed)")
    parser.add_argument("--steps", type=int, help="of the last stage")
    parser.add_argument("--lr", type=float, help="the last stage's rates, at their highest")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="one setting; may be repeated"
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML and do nothing")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from trip_reference.training.config import load_config

    settings = list(args.set)
    height, width = args.size or (None, None)
    for name, value in (
        ("data.source", args.data),
        ("model.checkpoint", args.checkpoint),
        ("model.num_frames", args.frames),
        ("model.height", height),
        ("model.width", width),
        ("run.seed", args.seed),
    ):
        if value is not None:
            settings.append(f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}")
    for name, value in (("steps", args.steps), ("unet_lr", args.lr), ("tnf_lr", args.lr)):
        if value is not None:
            settings.append(f"stages.-1.{name}={value}")
    config = load_config(args.recipe, args.config, settings)
    if args.print_config:
        import tomli_w

        print(tomli_w.dumps(to_json(config)), end="")
        return 0
    with held():
        from trip_reference.training.loop import Stopped
        from trip_reference.training.run import train_run

    try:
        result: dict[str, Any] = train_run(config, args.output, args.allow_remote)
    except Stopped as stopped:
        note(f"trip-train: {stopped}, its state is in {args.output / 'training'}; the same command goes on from there")
        return 128 + stopped.signal if stopped.signal != signal.SIGINT else 130
    if result["process"] == 0:
        report(args, result, f"{result['checkpoint']}: {result['steps']} steps in {result['seconds']} s")
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
