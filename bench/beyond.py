"""What goes beyond one run of the engines, judged on the demo world: longer and larger clips, live ones, and drawn
paths.

python bench/beyond.py out/demo-bundle --only longer
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timing import machine
from tqdm import tqdm

from trip_reference.demo_world import world
from trip_reference.demo_world.judge import judge
from trip_reference.demo_world.paths import DemoPathClips, away_from_path, render_places
from trip_reference.demo_world.stories import BACK, Ending, judge_ending, seen_in
from trip_reference.demo_world.verdicts import interval
from trip_rt import Animator, Settings
from trip_rt.accuracy import psnr
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.control import places_along
from trip_rt.enlarge import enlarged
from trip_rt.errors import InputError
from trip_rt.live import Live
from trip_rt.sampling.windows import sentence_of_window, window_starts, window_weights

FIRST_SEED = 70_000  # of held-out scenes that nothing else looks at
LENGTHS = (64, 256)
TIMES = 2  # the engines' side, of larger clips
NEAR = 3.0  # 64ths of the picture's side: as near to a path as an object should stay
_MEMORY = """
import sys
from trip_rt import Animator
from trip_rt.process_memory import peak_memory_mb
bundle, picture, frames, size = sys.argv[1:]
with Animator(bundle) as animator:
    for frame in animator.stream(picture, "a red ball spins", speed="fast", num_frames=int(frames), size=size):
        pass
print(peak_memory_mb())
"""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/beyond.py",
        description="Make clips of held-out scenes that are longer or larger than the engines', live, or steered by"
        " paths, and judge them.",
        epilog="example: python bench/beyond.py out/demo-bundle --output bench/results/beyond_demo.json",
    )
    parser.add_argument("bundle", type=Path, help="of the demo model")
    parser.add_argument(
        "--only",
        choices=PARTS,
        action="append",
        help="a part, once for each (all but control, which takes a bundle exported with --control)",
    )
    parser.add_argument("--clips", type=int, default=32, help="of 64 frames; a quarter as many of 256 (%(default)s)")
    parser.add_argument("--scenes", type=int, default=50, help="of larger clips (%(default)s)")
    parser.add_argument("--paths", type=int, default=100, help="clips with a path (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of the live clip (%(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the figures there; other parts are kept"
    )
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.clips < 4:
        raise InputError(f"clips: found {args.clips}, expected at least 4")
    for name in ("paths", "scenes"):
        if (found := getattr(args, name)) < 1:
            raise InputError(f"{name}: found {found}, expected at least 1")
    if not 2 <= args.seconds <= 3600:
        raise InputError(f"seconds: found {args.seconds:g}, expected 2 to 3600")
    figures: dict[str, Any] = {}
    if args.output and args.output.exists():
        figures = json.loads(args.output.read_text())
    text = []
    with Animator(args.bundle) as animator:
        if animator.config.width != animator.config.height:
            raise InputError("found pictures that are not square, expected the demo's; export the bundle so")
        for name in args.only or ("longer", "larger", "live"):
            measure, table = PARTS[name]
            figures[name] = measure(animator, args) | {"machine": machine(), "engine": animator.describe()}
            text.append(table(figures[name]))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    report(args, figures, "\n\n".join(text))
    return 0


def longer(animator: Animator, args: argparse.Namespace) -> dict[str, Any]:
    """By way and length: shares of clips whose ending meets each demand in percent, mean PSNRs, median seconds, and the
    peak memory of a process that streams one."""
    plain = animator.config.num_frames
    rows = {f"{plain} frames, one run": _judged(animator, args.clips, plain, _at_once)}
    for length in LENGTHS:
        clips = args.clips if length < 200 else max(1, args.clips // 4)
        rows[f"{length} frames, windows"] = _judged(animator, clips, length, _windows)
        rows[f"{length} frames, chained"] = _judged(animator, clips, length, _chained)
    size = f"{animator.config.width}x{animator.config.height}"
    memory = {str(length): _peak_memory_mb(args.bundle, length, size) for length in (plain, *LENGTHS)}
    return {"first_seed": FIRST_SEED, "speed": "fast", "ways": rows, "stream_peak_memory_mb": memory}


def _judged(animator: Animator, clips: int, length: int, make: Any) -> dict[str, Any]:
    endings: list[tuple[Ending, dict[str, bool]]] = []
    seconds = []
    for seed in tqdm(
        range(FIRST_SEED, FIRST_SEED + clips), desc=make.__name__[1:], unit="clip", disable=None, leave=False
    ):
        scene, motion, _ = world.sample(seed, held_out=True)
        picture = world.render(scene, motion, 1, animator.config.height)[0]
        began = time.perf_counter()
        frames, story = make(animator, picture, scene, motion, length, seed)
        seconds.append(time.perf_counter() - began)
        ending = judge_ending(frames, scene, story)
        endings.append((ending, ending.checks(scene, story[-1])))
    met = {name: [checks[name] for _, checks in endings] for name in endings[0][1]}
    shares = {name: round(100 * float(np.mean(found)), 1) for name, found in met.items()}
    figures: dict[str, Any] = {"clips": clips} | shares
    figures["intervals"] = {name: interval(sum(found), len(found)) for name, found in met.items()}
    figures["largest step"] = round(float(np.median([ending.step for ending, _ in endings])), 2)
    for name in ("truth_psnr", "last_psnr"):
        figures[name] = round(float(np.mean([getattr(ending, name) for ending, _ in endings])), 2)
    return figures | {"seconds": round(float(np.median(seconds)), 2)}


def _at_once(
    animator: Animator, picture: NDArray[np.uint8], scene: world.Scene, motion: str, length: int, seed: int
) -> tuple[NDArray[np.uint8], list[str]]:
    clip = animator(picture, world.caption(scene, motion), seed=seed, speed="fast")
    return clip.frames, [motion] * (length - 1)


def _windows(
    animator: Animator, picture: NDArray[np.uint8], scene: world.Scene, motion: str, length: int, seed: int
) -> tuple[NDArray[np.uint8], list[str]]:
    """A sentence a window; a frame is that window's which counts most in it."""
    each = animator.config.num_frames
    starts = window_starts(length, each)
    motions = _there_and_back(motion, len(starts))
    weights = np.zeros((len(starts), length))
    for window, (start, weight) in enumerate(zip(starts, window_weights(starts, each), strict=True)):
        weights[window, start : start + each] = weight
        assert sentence_of_window(start, each, length, len(starts)) == window
    sentences = [world.caption(scene, name) for name in motions]
    frames = animator(picture, sentences, seed=seed, speed="fast", num_frames=length).frames
    return frames, [motions[window] for window in weights.argmax(axis=0)[1:]]


def _chained(
    animator: Animator, picture: NDArray[np.uint8], scene: world.Scene, motion: str, length: int, seed: int
) -> tuple[NDArray[np.uint8], list[str]]:
    """A sentence a run; the last one is told for what is left over too."""
    each = animator.config.num_frames - 1
    motions = _there_and_back(motion, (length - 1) // each)
    clip = animator(picture, world.caption(scene, motions[0]), seed=seed, speed="fast")
    for name in motions[1:-1]:
        clip = animator.extend(clip, world.caption(scene, name), speed="fast")
    left = length - len(clip.frames)
    clip = animator.extend(clip, world.caption(scene, motions[-1]), speed="fast", num_frames=left)
    story = [name for name in motions[:-1] for _ in range(each)]
    return clip.frames, [*story, *[motions[-1]] * left]


def _there_and_back(motion: str, count: int) -> list[str]:
    return [motion if turn % 2 == 0 else BACK.get(motion, motion) for turn in range(count)]


def _peak_memory_mb(bundle: Path, frames: int, size: str) -> float:
    picture = Path(__file__).parents[1] / "examples" / "ball.png"
    command = [sys.executable, "-c", _MEMORY, str(bundle), str(picture), str(frames), size]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return float(ran.stdout.split()[-1])


def longer_table(figures: dict[str, Any]) -> str:
    demands = ("motion", "shape", "colour", "no jump")
    lines = [
        "| | clips | motion at the end, % | shape, % | colour, % | no jump, % | truth, dB | its end, dB | s a clip |",
        "| --- |" + " ---: |" * 8,
    ]
    for name, row in figures["ways"].items():
        cells = [
            row["clips"],
            *(row[demand] for demand in demands),
            row["truth_psnr"],
            row["last_psnr"],
            row["seconds"],
        ]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    memory = ", ".join(f"{count} frames {peak:.0f} MB" for count, peak in figures["stream_peak_memory_mb"].items())
    return "\n".join([*lines, "", f"Peak memory of a process that streams one: {memory}."])


def live(animator: Animator, args: argparse.Namespace) -> dict[str, Any]:
    """Frames shown and late over some seconds, and how long a new sentence takes to its first frame; sentences come at
    random moments, 1 to 3 seconds apart."""
    scene, _, _ = world.sample(FIRST_SEED, held_out=True)
    picture = world.render(scene, "still", 1, animator.config.height)[0]
    rng, back = np.random.default_rng(0), "left"
    clip = Live(animator, picture, world.caption(scene, "right"), settings=Settings(speed="fast"))
    began = time.monotonic()
    following = began + 1.5
    with closing(clip.frames()) as frames, tqdm(desc="live", unit="frame", disable=None, leave=False) as bar:
        for _ in frames:
            bar.update()
            # A person speaks at any moment between two frames.
            time.sleep(rng.uniform(0, 0.8 / clip.fps))
            if time.monotonic() > following:
                clip.say(world.caption(scene, back))
                back = BACK[back]
                following = time.monotonic() + rng.uniform(1, 3)
            if time.monotonic() - began > args.seconds:
                break
    heard = np.array(clip.pace.heard)
    return {
        "seconds": args.seconds,
        "fps": clip.fps,
        "shown": clip.pace.shown,
        "late": clip.pace.late,
        "sentences": len(heard),
        "sentence_to_frame_s": {f"p{q}": round(float(np.percentile(heard, q)), 3) for q in (50, 95, 100)},
    }


def live_table(figures: dict[str, Any]) -> str:
    after, rate = figures["sentence_to_frame_s"], f"{figures['seconds']:g} s at {figures['fps']:g} frames a second"
    return (
        f"Live, {rate}: {figures['shown']} frames, {figures['late']} late; a new sentence is shown after"
        f" {after['p50']:.2f} s (p95 {after['p95']:.2f}, {figures['sentences']} of them)."
    )


def larger(animator: Animator, args: argparse.Namespace) -> dict[str, Any]:
    """Clips at TIMES the engines' size against a bicubic filter of the same clips: PSNR to the truth around the object
    and elsewhere, what is seen, seconds, and the peak memory of a process that streams one."""
    side = animator.config.height * TIMES
    rows: dict[str, list[dict[str, float]]] = {"by the picture": [], "bicubic": []}
    extra = []
    seeds = range(FIRST_SEED, FIRST_SEED + args.scenes)
    for seed in tqdm(seeds, desc="larger", unit="clip", disable=None, leave=False):
        scene, motion, _ = world.sample(seed, held_out=True)
        truth = world.render(scene, motion, animator.config.num_frames, side)
        around = dataclasses.replace(scene, radius=1.35 * scene.radius)  # with its shadow
        near = world.mask(around, motion, len(truth), side) > 0
        small = animator(truth[0], world.caption(scene, motion), seed=seed, speed="fast").frames
        began = time.perf_counter()
        made = {"by the picture": np.stack(list(enlarged(small, truth[0])))}
        extra.append(time.perf_counter() - began)
        filtered = (Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC) for frame in small)
        made["bicubic"] = np.stack([np.asarray(frame) for frame in filtered])
        for name, frames in made.items():
            verdict = judge(frames, scene, motion)
            rows[name].append(
                {
                    "motion": float(verdict.motion == motion),
                    "shape": float(verdict.shape == scene.shape),
                    "object_psnr": psnr(frames[near], truth[near], 255.0, 100.0),
                    "background_psnr": psnr(frames[~near], truth[~near], 255.0, 100.0),
                }
            )
    sizes = [f"{animator.config.width * times}x{animator.config.height * times}" for times in (1, TIMES, 4 * TIMES)]
    memory = {size: _peak_memory_mb(args.bundle, animator.config.num_frames, size) for size in sizes}
    return {
        "first_seed": FIRST_SEED,
        "speed": "fast",
        "scenes": args.scenes,
        "size": sizes[1],
        "extra_seconds": round(float(np.median(extra)), 2),
        "stream_peak_memory_mb": memory,
    } | {name: _shares_and_means(found, ("motion", "shape")) for name, found in rows.items()}


def larger_table(figures: dict[str, Any]) -> str:
    lines = [
        f"| {figures['scenes']} scenes, {figures['size']} | motion, % | shape, % | object, dB | background, dB |",
        "| --- |" + " ---: |" * 4,
    ]
    for name in ("by the picture", "bicubic"):
        columns = (figures[name][column] for column in ("motion", "shape", "object_psnr", "background_psnr"))
        lines.append(f"| {name} | " + " | ".join(map(str, columns)) + " |")
    memory = ", ".join(f"{size} {peak:.0f} MB" for size, peak in figures["stream_peak_memory_mb"].items())
    after = (
        f"It takes {figures['extra_seconds']:.2f} s more a clip. Peak memory of a process that streams one: {memory}."
    )
    return "\n".join([*lines, "", after])


def control(animator: Animator, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out scenes with a path each: how far the object is from it, in 64ths of the picture's side, with the control
    and without, and whether it stays what it is."""
    clips = DemoPathClips(animator.config, args.paths, FIRST_SEED, held_out=True)
    rows: dict[str, list[dict[str, float]]] = {"steered": [], "by the sentence alone": []}
    for index in tqdm(range(args.paths), desc="control", unit="clip", disable=None, leave=False):
        scene, points = clips.case(index)
        picture = world.render(scene, "still", 1, animator.config.height)[0]
        told, places = clips.text(index, np.random.default_rng(index)), places_along(points, animator.config.num_frames)
        truth = render_places(scene, places, animator.config.height)
        for name, given in zip(rows, (animator.path(points), None), strict=True):
            frames = animator(picture, told, seed=index, control=given, speed="fast").frames
            away = away_from_path(frames, scene, points)
            pose = dataclasses.replace(scene, x=float(places[-1, 0]), y=float(places[-1, 1]))
            shape, colour = seen_in(frames[-1], pose)
            rows[name].append(
                {
                    "mean": float(away.mean()),
                    "most": float(away.max()),
                    "within": float(away.mean() <= NEAR),
                    "always within": float(away.max() <= NEAR),
                    "shape": float(shape == scene.shape),
                    "colour": float(colour == scene.colour),
                    "truth_psnr": psnr(frames, truth, 255.0, 100.0),
                }
            )
    shares = ("within", "always within", "shape", "colour")
    return {"first_seed": FIRST_SEED, "speed": "fast", "clips": args.paths, "near": NEAR} | {
        name: _shares_and_means(figures, shares) for name, figures in rows.items()
    }


def _shares_and_means(rows: list[dict[str, float]], shares: tuple[str, ...]) -> dict[str, Any]:
    """Over clips, in percent with an interval for `shares`, which are 0 or 1 of each."""
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    found = {name: round(100 * mean[name], 1) if name in shares else round(mean[name], 2) for name in mean}
    intervals = {name: interval(int(sum(row[name] for row in rows)), len(rows)) for name in shares}
    return found | {"intervals": intervals}


def control_table(figures: dict[str, Any]) -> str:
    lines = [
        f"| {figures['clips']} clips | mean distance | largest | mean within {NEAR:g}, % | always within {NEAR:g}, % |"
        " shape, % | colour, % | truth, dB |",
        "| --- |" + " ---: |" * 7,
    ]
    columns = ("mean", "most", "within", "always within", "shape", "colour", "truth_psnr")
    for name in ("steered", "by the sentence alone"):
        lines.append(f"| {name} | " + " | ".join(str(figures[name][column]) for column in columns) + " |")
    return "\n".join(lines)


PARTS: dict[str, Any] = {
    "longer": (longer, longer_table),
    "larger": (larger, larger_table),
    "live": (live, live_table),
    "control": (control, control_table),
}
main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
