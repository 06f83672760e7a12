"""What each way of saving work costs and brings on the demo model: seconds a clip, likeness to the exact clip, and does
it still move as told?

python bench/speeds.py out/demo-bundle --clips 64
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine
from tqdm import tqdm

from trip_reference.demo_world import world
from trip_reference.demo_world.judge import judge
from trip_rt.accuracy import psnr
from trip_rt.animator import Animator
from trip_rt.backends import EngineOptions
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.errors import InputError
from trip_rt.settings import SPEEDS, Speed

# Each option by itself, and the settled combinations.
WAYS = {
    "exact": SPEEDS["exact"],
    "ddim, 25 steps": Speed(num_inference_steps=25),
    "dpm++, 20 steps": Speed("dpm++", 20),
    "unipc, 20 steps": Speed("unipc", 20),
    "unipc, 8 steps": Speed("unipc", 8),
    "unipc, 5 steps": Speed("unipc", 5),
    "guidance from 0.2 up": Speed(guidance_interval=(0.2, 1.0)),
    "guidance from 0.5 up": Speed(guidance_interval=(0.5, 1.0)),
    "features reused once": Speed(feature_reuse=2),
    "features reused twice": Speed(feature_reuse=3),
    "balanced": SPEEDS["balanced"],
    "fast": SPEEDS["fast"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/speeds.py",
        description=(
            "Animate held-out pictures of the demo world in each way of saving work, interleaved clip by clip, and"
            " judge the clips."
        ),
        epilog='example: python bench/speeds.py out/demo-bundle --clips 64 --ways "exact;balanced;fast"',
    )
    parser.add_argument("bundle", type=Path, help="of the demo model")
    parser.add_argument("--clips", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--ways", metavar="LIST", help=f"some of: {'; '.join(WAYS)} (all); exact is always among them")
    parser.add_argument("--backend", default="auto", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (the engine library's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there too")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.ways.split(";")] if args.ways else list(WAYS)
    if unknown := [name for name in names if name not in WAYS]:
        raise InputError(f"ways: found {unknown[0]!r}, expected some of {'; '.join(WAYS)}")
    if args.clips < 1:
        raise InputError(f"clips: found {args.clips}, expected at least 1")
    ways = {name: WAYS[name] for name in dict.fromkeys(["exact", *names])}
    with Animator(args.bundle, args.backend, options=EngineOptions(threads=args.threads)) as animator:
        if animator.config.width != animator.config.height:
            size = f"{animator.config.width}x{animator.config.height}"
            raise InputError(
                f"found pictures of {size}, expected square ones, by which clips are judged; export the bundle so"
            )
        figures = {"clips": args.clips, "machine": machine(), "engine": animator.describe()}
        figures["ways"] = measure(animator, ways, args.clips)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    report(args, figures, table(figures["ways"]))
    return 0


def measure(animator: Animator, ways: dict[str, Speed], clips: int) -> dict[str, dict[str, Any]]:
    """By name: median seconds a clip (picture to frames), how often faster than exact (median over clips of both made
    in turn), mean and least PSNR of the frames to exact's in dB (peak 255), and the shares of clips that move as told
    and that meet every demand, in percent."""
    rows: dict[str, list[tuple[float, float, float, bool, bool]]] = {name: [] for name in ways}
    size = animator.config.height
    for seed in tqdm(range(-1, clips), desc="animate", unit="clip", disable=None, leave=False):
        scene, motion, caption = world.sample(max(0, seed), held_out=True)
        picture = world.render(scene, motion, 1, size)[0]
        exact = np.zeros(0)
        for name, speed in ways.items():
            began = time.perf_counter()
            frames = animator(picture, caption, seed=max(0, seed), speed=speed).frames
            seconds = time.perf_counter() - began
            exact = frames if name == "exact" else exact
            checks = judge(frames, scene, motion).checks(scene, motion)
            likeness = psnr(frames, exact, 255, most=100)
            if seed >= 0:  # the first one warms up
                exact_seconds = seconds if name == "exact" else rows["exact"][-1][0]
                rows[name].append((seconds, exact_seconds / seconds, likeness, checks["motion"], all(checks.values())))
    return {name: _summary(ways[name], clips_of_way) for name, clips_of_way in rows.items()}


def _summary(speed: Speed, rows: list[tuple[float, float, float, bool, bool]]) -> dict[str, Any]:
    seconds, ratios, likeness, moves, demands = (np.array(column, float) for column in zip(*rows, strict=True))
    return {
        "speed": dataclasses.asdict(speed),
        "seconds": round(float(np.median(seconds)), 4),
        "times_faster": round(float(np.median(ratios)), 2),
        "psnr_mean": round(float(likeness.mean()), 1),
        "psnr_min": round(float(likeness.min()), 1),
        "moves_as_told": round(100 * float(moves.mean()), 1),
        "every_demand": round(100 * float(demands.mean()), 1),
    }


def table(ways: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row a way."""
    lines = [
        "| | s a clip | times faster | dB to exact, mean | least | moves as told, % | every demand, % |",
        "| --- |" + " --- |" * 6,
    ]
    for name, row in ways.items():
        likeness = ("—", "—") if name == "exact" else (row["psnr_mean"], row["psnr_min"])
        cells = name, row["seconds"], row["times_faster"], *likeness, row["moves_as_told"], row["every_demand"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
