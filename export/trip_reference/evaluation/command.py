"""`trip-evaluate`: how good are the clips of a checkpoint or a bundle?"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trip_rt.accuracy import psnr
from trip_rt.backends import NAMES, Engine
from trip_rt.bundle import file_sha256
from trip_rt.command_line import CommandParser, add_json_flag, add_settings, main_of, report, settings_of
from trip_rt.config import TripConfig
from trip_rt.errors import InputError, printable
from trip_rt.files import whole_file
from trip_rt.signals import held

EMULATION = "emulation"  # a backend to measure on
SHEETS = (".png", ".gif", ".webp", ".mp4")
EPILOG = """examples:
  trip-evaluate checkpoints/demo --clips 200                       the demo world, by the PyTorch model
  trip-evaluate bundle --clips 200 --speed balanced -o figures.json     by a bundle's engines
  trip-evaluate bundle --clips 400 --first-scene 10000 --backend onnxruntime     on scenes not seen before
  trip-evaluate bundle --generated clips -o figures.json           clips made earlier, in order of their names
  trip-evaluate checkpoint --data webvid --clip-encoder clip-vit-large-patch14 --i3d i3d_torchscript.pt

What has no network named for it is left out, and said so. TorchScript files are code that runs with
your rights: open files you trust."""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-evaluate",
        description=(
            "Animate pictures that training has not seen and measure the clips: F-Consistency, FVD, FID, frame 1, on"
            " the demo world whether everything moved as it was told."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_OR_BUNDLE")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--demo", action="store_true", help="held-out scenes of the demo world (the default)")
    data.add_argument("--data", type=Path, metavar="DIR", help="a folder of videos with annotations")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="of --data (val_annotations.json where there is one, else annotations.json)",
    )
    parser.add_argument(
        "--fps", type=float, default=4.0, help="frames a second that are taken from the videos of --data (%(default)s)"
    )
    parser.add_argument("--clips", type=int, default=200, help="(%(default)s)")
    parser.add_argument(
        "--first-scene", type=int, default=0, metavar="N", help="seed of the demo world's first scene (%(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *NAMES, EMULATION),
        default="auto",
        help="of a bundle (%(default)s); emulation: ONNX Runtime's graphs with every half-precision value rounded as a"
        " GPU rounds it",
    )
    generated_help = (
        "measure the clips in there, .mp4, .gif, .webp or folders of PNGs, the n-th by name as the n-th picture's, and"
        " make none"
    )
    parser.add_argument("--generated", type=Path, metavar="DIR", help=generated_help)
    add_settings(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next has the next (%(default)s)")
    parser.add_argument("--clip-encoder", type=Path, metavar="DIR", help="a CLIP image encoder, for F-Consistency")
    parser.add_argument(
        "--pairs",
        choices=("consecutive", "first"),
        default="consecutive",
        help="which frames F-Consistency compares (%(default)s)",
    )
    parser.add_argument("--i3d", type=Path, metavar="FILE.pt", help="a TorchScript network of clips, for FVD")
    parser.add_argument("--i3d-size", type=int, default=224, metavar="PIXELS", help="its picture size (%(default)s)")
    parser.add_argument("--fid-net", type=Path, metavar="FILE.pt", help="a TorchScript network of pictures, for FID")
    parser.add_argument("--fid-size", type=int, default=299, metavar="PIXELS", help="its picture size (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the tables there")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="write frames of 24 clips as a .png, or 8 clips moving side by side as a .gif, .webp or .mp4",
    )
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    for name, least in (("clips", 1), ("seed", 0), ("first_scene", 0), ("i3d_size", 1), ("fid_size", 1)):
        if getattr(args, name) < least:
            raise InputError(f"{name.replace('_', '-')}: found {getattr(args, name)}, expected at least {least}")
    for path, endings in ((args.output, ()), (args.markdown, ()), (args.sheet, SHEETS)):
        if path and (
            path.is_dir()
            or not os.access(path.parent, os.W_OK | os.X_OK)
            or not path.name.lower().endswith(endings or "")
        ):
            ending = f" ending in {' or '.join(endings)}" if endings else ""
            raise InputError(f"{printable(str(path))}: expected a file name{ending}, in a folder to write in")
    with held():
        from trip_reference.data.annotations import held_out
        from trip_reference.evaluation.clips import (
            clips_of_bundle,
            config_of,
            demo_cases,
            folder_cases,
            is_bundle,
            make_clips,
        )
        from trip_reference.evaluation.made_clips import read_clips
        from trip_reference.evaluation.tables import tables

    if args.backend != "auto" and not is_bundle(args.source):
        raise InputError(
            f"{printable(str(args.source))}: --backend: found no bundle, expected one: a checkpoint has none"
        )
    if not args.source.is_dir():
        raise InputError(f"{printable(str(args.source))}: found no such folder, expected a checkpoint or a bundle")
    networks = _networks(args)  # before the long work
    config = config_of(args.source)
    if args.data:
        cases = folder_cases(args.data, args.annotations or held_out(args.data), config, args.fps, args.clips)
    else:
        cases = demo_cases(config, args.clips, args.first_scene)
    settings = settings_of(args)
    steps = settings.steps(config)
    engines: dict[str, Any] = {}
    if args.generated:
        clips = read_clips(args.generated, config, len(cases))
        cases = cases[: len(clips)]
    elif is_bundle(args.source):
        clips, engines = clips_of_bundle(args.source, cases, settings, args.seed, _backend(args.backend))
    else:
        clips = make_clips(args.source, cases, settings, args.seed)
    figures: dict[str, Any] = {
        "source": args.generated.name if args.generated else args.source.resolve().name,
        "data": args.data.name if args.data else "demo world, held out",
        "clips": len(clips),
        "frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        **({} if args.generated else _settings(args, config, len(steps))),
        **({} if args.data else {"first_scene": args.first_scene}),
        **({"engines": engines} if engines else {}),
        "networks": _named_networks(args),
        **_measured(args, networks, clips, [case.clip for case in cases]),
    }
    if not args.data:
        from trip_reference.demo_world.verdicts import judge_clips

        figures["demo"] = judge_clips(clips, cases)
    figures["versions"] = _versions()
    text = tables(figures)
    if args.sheet:
        _write_sheet(args.sheet, clips, [case.prompt for case in cases], config.fps)
    for path, content in ((args.output, json.dumps(figures, indent=2)), (args.markdown, text)):
        if path:
            with whole_file(path) as part:
                part.write_text(content + "\n", encoding="utf-8")
    report(args, figures, text)
    return 0


def _write_sheet(path: Path, clips: Sequence[np.ndarray], labels: Sequence[str], fps: float) -> None:
    from trip_reference.evaluation.moving_sheet import moving_sheet
    from trip_rt.images import contact_sheet, save_png
    from trip_rt.video import save

    if path.suffix.lower() != ".png":
        save(moving_sheet(clips[:8], labels[:8]), path, fps)
        return
    save_png(contact_sheet(clips[:24], labels=labels[:24]), path)


def _backend(name: str) -> str | type[Engine]:
    if name != EMULATION:
        return name
    from trip_engines.emulation import EmulatedEngine

    return EmulatedEngine


def _settings(args: argparse.Namespace, config: TripConfig, steps: int) -> dict[str, Any]:
    guidance_scale = config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    return {"steps": steps, "guidance_scale": guidance_scale, "speed": args.speed, "seed": args.seed}


def _named_networks(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Which networks were used: their names and the SHA-256 of their weights."""
    weights = {
        "clip_encoder": args.clip_encoder and args.clip_encoder / "model.safetensors",
        "i3d": args.i3d,
        "fid_net": args.fid_net,
    }
    names = {name: path.parent.name if name == "clip_encoder" else path.name for name, path in weights.items() if path}
    return {
        name: {"name": shown} | ({"sha256": file_sha256(weights[name])} if weights[name].is_file() else {})
        for name, shown in names.items()
    }


def _networks(args: argparse.Namespace) -> dict[str, Any]:
    """The networks that were named, opened."""
    with held():
        from trip_reference.evaluation.consistency import ClipEncoder
        from trip_reference.evaluation.networks import Network

    named = {
        "clip_encoder": (ClipEncoder, args.clip_encoder),
        "i3d": (Network, args.i3d),
        "fid_net": (Network, args.fid_net),
    }
    return {name: cls(path) for name, (cls, path) in named.items() if path}


def _measured(
    args: argparse.Namespace, networks: dict[str, Any], clips: Sequence[np.ndarray], real: Sequence[np.ndarray]
) -> dict[str, Any]:
    from trip_reference.demo_world.judge import MOST_PSNR
    from trip_reference.evaluation.consistency import consistency
    from trip_reference.evaluation.networks import fid, fvd

    figures: dict[str, Any] = {}
    left_out = {"F-Consistency": "--clip-encoder", "FVD": "--i3d", "FID": "--fid-net"}
    if encoder := networks.get("clip_encoder"):
        del left_out["F-Consistency"]
        embedded = [encoder.embed(clip) for clip in clips]
        for name, frames in (("F-Consistency4", 4), ("F-Consistency-all", None)):
            figures[name] = round(float(np.mean([consistency(vectors, frames, args.pairs) for vectors in embedded])), 3)
        figures["F-Consistency pairs"] = args.pairs
    if network := networks.get("i3d"):
        del left_out["FVD"]
        figures["FVD"] = fvd(network, clips, real, args.i3d_size)
    if network := networks.get("fid_net"):
        del left_out["FID"]
        figures["FID"] = fid(network, clips, real, args.fid_size)
    firsts = [psnr(clip[0], true[0], 255, MOST_PSNR) for clip, true in zip(clips, real, strict=True)]
    return figures | {
        "frame 1, dB": round(float(np.mean(firsts)), 2),
        "frame 1 at worst, dB": round(min(firsts), 2),
        "left_out": left_out,
    }


def _versions() -> dict[str, str]:
    import torch
    import torchmetrics
    import transformers

    named = {"torch": torch, "torchmetrics": torchmetrics, "transformers": transformers, "numpy": np}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in named.items()}


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
