"""How time and memory grow with frames, picture size and batch, one at a time around a preset's own shape, on random
weights.

python bench/scaling.py demo --output bench/results/scaling.json --plot bench/results/scaling.png
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from own_process import apart
from timing import interleaved, machine, percentiles
from tqdm import tqdm

from trip_reference.presets import PRESETS
from trip_rt.command_line import CommandParser, main_of
from trip_rt.errors import InputError
from trip_rt.launch import note
from trip_rt.process_memory import peak_memory_mb

_AXES = {"frames": "frames", "sizes": "picture side, pixels", "batches": "clips at a time"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A shape to measure; the picture is `size` pixels on each side."""

    frames: int
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size}, {self.frames} frames, batch {self.batch}"


class LeftOut(Exception):
    """Why a point has no figures."""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/scaling.py",
        description=(
            "Time a guided step and decoding, and measure memory, over frames, size and batch. Every point has"
            " processes of its own."
        ),
        epilog="example: python bench/scaling.py demo --frames 8,16,32 --sizes 64,128 --batches 1,2 --plot scaling.png",
    )
    parser.add_argument("preset", choices=tuple(PRESETS), help="whose architecture to take, with random weights")
    parser.add_argument("--frames", type=_numbers, default=(8, 16, 32, 64), metavar="LIST", help="(8,16,32,64)")
    parser.add_argument(
        "--sizes",
        type=_numbers,
        default=(64, 128, 256, 512),
        metavar="LIST",
        help="pixels on each side (64,128,256,512)",
    )
    parser.add_argument("--batches", type=_numbers, default=(1, 2, 4), metavar="LIST", help="(1,2,4)")
    parser.add_argument("--backend", choices=("onnxruntime", "openvino"), default="openvino", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed at each point (%(default)s)")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=600,
        metavar="S",
        help="leave out a point that takes longer, with its export (%(default)g)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there too")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise InputError(f"rounds: found {args.rounds}, expected at least 1")
    config = PRESETS[args.preset].trip
    multiple = config.vae_scale_factor * 2 ** (len(PRESETS[args.preset].unet["block_out_channels"]) - 1)
    if wrong := [size for size in args.sizes if size % multiple]:
        raise InputError(f"sizes: found {wrong[0]}, expected multiples of {multiple}")
    own = Point(config.num_frames, config.height, 1)
    axes = {
        "frames": [dataclasses.replace(own, frames=value) for value in args.frames],
        "sizes": [dataclasses.replace(own, size=value) for value in args.sizes],
        "batches": [dataclasses.replace(own, batch=value) for value in args.batches],
    }
    points = list(dict.fromkeys(point for axis in axes.values() for point in axis))
    rows, left_out = {}, {}
    for point in tqdm(points, unit="point", disable=None, leave=False):
        try:
            rows[point] = _measured(args, point)
        except LeftOut as error:
            left_out[point] = str(error)
            note(f"{point}: left out: {left_out[point]}")
    figures: dict[str, Any] = {"preset": args.preset, "backend": args.backend, "machine": machine()}
    for name, wanted in axes.items():
        measured = [point for point in wanted if point in rows]
        figures[name] = {
            "points": [dataclasses.asdict(point) | rows[point] for point in measured],
            "slopes": _slopes(name, measured, rows),
        }
    figures["left_out"] = [dataclasses.asdict(point) | {"reason": reason} for point, reason in left_out.items()]
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot:
        from plots import scaling

        drawn = {
            "step_ms": "a guided step, ms",
            "decode_ms": "decoding a clip, ms",
            "loop_mb": "memory, MB",
            "decode_growth_mb": "… of decoding, MB",
        }
        panels = []
        for name, label in _AXES.items():
            along = figures[name]["points"]
            lines = {title: [max(point[key], 1) for point in along] for key, title in drawn.items()}
            panels.append((name, label, [_value(name, point) for point in along], lines))
        scaling(args.plot, panels)
    print(_table(figures))
    print(json.dumps(figures))
    return 0 if rows else 1


def _measured(args: argparse.Namespace, point: Point) -> dict[str, float]:
    """Export in one process, the loop in another, decoding in a third: the peak memory of each is its own."""
    with tempfile.TemporaryDirectory(prefix="trip-bench-") as folder:
        bundle = Path(folder) / "bundle"
        return _in_turn(
            {
                "export": partial(_export, args.preset, point, args.backend, bundle),
                "loop": partial(_loop, bundle, args.backend, args.rounds),
                "decoding": partial(_decoding, bundle, args.backend, args.rounds),
            },
            args.max_seconds,
        )


def _in_turn(works: dict[str, Callable[[], dict[str, float]]], seconds: float) -> dict[str, float]:
    """All their figures, each work in a process of its own; LeftOut where one fails, is killed, or would end after
    `seconds` of all."""
    figures: dict[str, float] = {}
    for name, work in works.items():
        result = apart(lambda _, work=work: work(), seconds)
        if result.pop("state") != "done":
            raise LeftOut(f"{name}: {result['reason']}")
        seconds -= result.pop("seconds")
        figures |= result
    return figures


def _export(preset: str, point: Point, backend: str, bundle: Path) -> dict[str, float]:
    from trip_export.export import export_bundle
    from trip_export.plan import ExportOptions
    from trip_reference.random_checkpoint import save_random

    chosen = PRESETS[preset]
    config = dataclasses.replace(chosen.trip, num_frames=point.frames, height=point.size, width=point.size)
    save_random(dataclasses.replace(chosen, trip=config), bundle.with_name("checkpoint"))
    export_bundle(
        bundle.with_name("checkpoint"),
        bundle,
        ExportOptions(backends=(backend,), batch=point.batch, parity_steps=0, speedups=False),
    )
    return {}


def _loop(bundle: Path, backend: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of a guided step, and the peak memory of a process that has opened the bundle and run the
    loop."""
    from trip_engines.recording import guided_scale
    from trip_rt.animator import Animator
    from trip_rt.sampling.loop import initial_noise
    from trip_rt.settings import Settings

    with Animator(bundle, backend) as animator:
        config, pipeline, batch = animator.config, animator._pipeline, animator.profile.batch
        noise = initial_noise(range(batch), config.latent_shape)
        pipeline.encode(
            *np.ones((2, batch, config.text_length), np.int64),
            np.zeros((batch, 3, config.height, config.width), np.float32),
        )
        steps = Settings(guidance_scale=guided_scale(config)).steps(config)[:1]
        seconds = interleaved({"step": lambda: pipeline.denoise(noise, steps)}, rounds, warm_ups=1)["step"]
        return {"step_ms": percentiles(seconds)["p50"], "loop_mb": peak_memory_mb()}


def _decoding(bundle: Path, backend: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of decoding one clip, and how much the peak memory grows by it once the decoder is open."""
    from trip_rt.backends import EngineOptions, engine_class
    from trip_rt.bundle import open_bundle

    opened = open_bundle(bundle)
    profile = opened.manifest.profile()
    spec = profile.engines["vae_decoder"][backend]
    engine = engine_class(backend).open(opened.engine_path(spec), spec, EngineOptions())
    latents = np.random.default_rng(0).standard_normal(spec.inputs[0].shape, np.float32)
    chunks = -(-profile.num_frames // len(latents))
    gc.collect()
    before = peak_memory_mb()

    def decode() -> None:
        for _ in range(chunks):
            engine.run({"latents": latents})

    seconds = interleaved({"decode": decode}, rounds, warm_ups=1)["decode"]
    return {"decode_ms": percentiles(seconds)["p50"], "decode_growth_mb": round(peak_memory_mb() - before, 1)}


def _value(axis: str, point: dict[str, Any]) -> int:
    return int(point[{"frames": "frames", "sizes": "size", "batches": "batch"}[axis]])


def _slopes(axis: str, points: Sequence[Point], rows: dict[Point, dict[str, float]]) -> dict[str, float]:
    """Exponents fitted in log-log, of pixels rather than sides: 1 is linear, 0 flat."""
    if len(points) < 2:
        return {}
    x = np.log([_value(axis, dataclasses.asdict(point)) ** (2 if axis == "sizes" else 1) for point in points])
    return {
        key: round(float(np.polyfit(x, np.log([max(rows[point][key], 0.1) for point in points]), 1)[0]), 2)
        for key in rows[points[0]]
    }


def _table(figures: dict[str, Any]) -> str:
    lines = []
    for axis, label in _AXES.items():
        lines.append(f"{label:<24}{'step ms':>12}{'loop MB':>12}{'decode ms':>12}{'decode + MB':>13}")
        for point in figures[axis]["points"]:
            row = f"{_value(axis, point):<24}{point['step_ms']:>12.1f}{point['loop_mb']:>12.0f}"
            lines.append(f"{row}{point['decode_ms']:>12.1f}{point['decode_growth_mb']:>13.1f}")
        if slopes := figures[axis]["slopes"]:
            row = f"{'slope':<24}{slopes['step_ms']:>12.2f}{slopes['loop_mb']:>12.2f}{slopes['decode_ms']:>12.2f}"
            lines.append(f"{row}{slopes['decode_growth_mb']:>13.2f}")
        lines.append("")
    lines += [
        f"left out: {Point(*(point[name] for name in ('frames', 'size', 'batch')))}: {point['reason']}"
        for point in figures["left_out"]
    ]
    return "\n".join(lines)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected whole numbers such as 8,16,32")
    return tuple(sorted({int(part) for part in parts}))


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
