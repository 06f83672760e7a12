"""`trip-animate`: a picture and a sentence to a clip, or a file full of them."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trip_rt import backends, images, video
from trip_rt.animator import Animation, Animator
from trip_rt.bundle import read_manifest
from trip_rt.clip_requests import Job, Pictures, check_jobs, read_batch
from trip_rt.cluster.session import LOCAL
from trip_rt.command_line import (
    CommandParser,
    add_json_flag,
    add_settings,
    fewest_and_most,
    main_of,
    report,
    settings_of,
)
from trip_rt.config import ControlConfig
from trip_rt.control import check_points
from trip_rt.enlarge import enlarged
from trip_rt.errors import InputError, printable
from trip_rt.launch import note
from trip_rt.optical_flow import opencv
from trip_rt.play import check_live, play
from trip_rt.sampling.windows import window_starts
from trip_rt.settings import Settings, check_prompt

_SHEET_COLUMNS = 8


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-animate",
        usage="%(prog)s BUNDLE IMAGE PROMPT -o CLIP [options]\n       %(prog)s BUNDLE --batch FILE [options]\n"
        "       %(prog)s BUNDLE --batch FILE --ray [ADDRESS] -o DIR [options]\n"
        "       %(prog)s BUNDLE IMAGE PROMPT --live [options]",
        description="Animate a picture as a sentence says. Everything given is checked before the slow work begins.",
        epilog=(
            'example: trip-animate bundle photo.jpg "a red ball rolls to the right" -o clip.mp4 --seed 7; a line of a'
            ' --batch file: {"image": "photo.jpg", "prompt": "a red ball rolls to the right", "output": "clip.mp4",'
            ' "seed": 7}'
        ),
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder, as trip-export writes it")
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="picture to begin with")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="sentence that says what happens")
    parser.add_argument(
        "-o", "--output", metavar="CLIP", help="name ending in .mp4, .gif or .webp, or a folder for PNG frames"
    )
    parser.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help="a file that asks for a clip a line; paths in it are relative to the current folder",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="make the batch with a pool of processes, of this machine or of the Ray cluster at ADDRESS (auto,"
        " HOST:6379): FILE may be JSON Lines, .parquet or .tar, -o is a folder; exits with 1 where some rows failed,"
        " which its results say (docs/scale.md)",
    )
    parser.add_argument(
        "--ray-workers",
        type=fewest_and_most,
        metavar="N|MIN:MAX",
        help="processes of --ray, each with --threads CPUs or a GPU (as many as there is room for)",
    )
    add_settings(parser)
    parser.add_argument(
        "--frames",
        dest="num_frames",
        type=int,
        metavar="N",
        help="frames of a clip: the engines' own, or more, by overlapping windows",
    )
    parser.add_argument(
        "--size",
        metavar="WxH",
        help="size of the clip: the engines' own, or a larger one of that shape, by the picture's own detail",
    )
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="PROMPT",
        help="what happens next, once for each --then: the clip goes on from its last frame or, with --frames, all"
        " sentences share the frames",
    )
    parser.add_argument(
        "--path",
        type=_path,
        metavar="'X,Y X,Y …'",
        help="where the thing at the first point goes, in shares of the picture's sides, y down, such as '0.3,0.5"
        " 0.7,0.4'; for bundles exported with --control",
    )
    for option, what in (
        ("--control-scale", "how strongly --path counts, 0 to 10"),
        ("--control-guidance-start", "share of the steps from which --path counts"),
        ("--control-guidance-end", "share of the steps up to which --path counts"),
    ):
        default = getattr(Settings, option[2:].replace("-", "_"))
        parser.add_argument(option, type=float, default=default, metavar="X", help=f"{what} (%(default)s)")
    parser.add_argument(
        "--live",
        action="store_true",
        help="show a clip without end in the terminal; every line that is typed says what happens next. Take a --speed"
        " that makes frames faster than they are shown",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="end --live after so long (never)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another clip (%(default)s)")
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help=f"frames a second, {video.MIN_FPS:g} to {video.MAX_FPS:g} (the model's own)",
    )
    parser.add_argument(
        "--backend", choices=("auto", *backends.NAMES), default="auto", help="engine library (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run it (%(default)s)"
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="which of the bundle's sets of shapes, such as 256x256-16f-b1 (its first)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (the engine library's choice)")
    parser.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, queue each step's work anew")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="also write one picture with frames of all the clips"
    )
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the clips, each saved as soon as it is finished."""
    if args.ray is not None:
        from trip_rt.cluster.batch import run_on_ray

        return run_on_ray(args)
    if args.ray_workers is not None:
        raise InputError("found --ray-workers without --ray, expected both or neither")
    began = time.perf_counter()
    seconds = dict.fromkeys(("load", "denoise", "decode", "save"), 0.0)
    with _timed(seconds, "load"):
        jobs = _jobs(args)
        if not args.live:
            check_jobs(jobs, args.contact_sheet)
        manifest = read_manifest(args.bundle)
        profile = manifest.profile(args.profile)
        options = backends.EngineOptions(args.device, args.threads, cuda_graph=not args.no_cuda_graph)
        settings = settings_of(args)
        engines_own = settings.changed({"size": None})
        shared, later = ((), args.then) if args.num_frames is None else (args.then, ())
        for sentence in args.then:
            check_prompt(sentence)
        config = manifest.config_of(profile)
        steps = settings.steps(config)
        windows = len(window_starts(settings.frames(config), config.num_frames))
        fps = float(manifest.config.fps if args.fps is None else args.fps)
        video.check_fps(fps)
        if args.path is not None:
            _check_path(args, manifest.control)
        if args.live:
            check_live(args, fps)
        elif args.seconds is not None:
            raise InputError(
                "found --seconds without --live, expected both or neither; --frames says how long a clip is"
            )
        backends.choose(profile, args.backend, options)
        height, width = settings.picture_size(config)
        larger = (height, width) != (profile.height, profile.width)
        if larger:
            opencv()  # before any slow work
            seconds["enlarge"] = 0.0
        pictures = Pictures(height, width, settings.fit)
        pictures.check(jobs)
        animator = Animator(args.bundle, args.backend, profile.name, options)
        control = None if args.path is None else animator.path(args.path)
        arithmetic = settings.resolved_speed.arithmetic
        _, chosen = animator.arithmetic(arithmetic)
    note(f"backend: {animator.backend} ({animator.backend_reason})")
    if arithmetic != "fp32":
        note(f"arithmetic: {chosen}")
    if args.live:
        with animator, _plain_warnings():
            return play(args, animator, jobs[0], settings, fps)
    clips: list[dict[str, Any]] = []
    strips = []
    total = len(steps) * (windows * math.ceil(len(jobs) / profile.batch) + len(later) * len(jobs))
    with (
        animator,
        _plain_warnings(),
        tqdm(total=total, desc="denoising", unit="step", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(jobs), profile.batch):
            group, group_began = jobs[start : start + profile.batch], time.perf_counter()
            with _timed(seconds, "denoise"):
                latents = animator.latents(
                    np.stack([pictures.of(job) for job in group]),
                    [[job.prompt, *shared] for job in group],
                    [job.seed for job in group],
                    controls=[control] * len(group),
                    settings=settings,
                    on_step=lambda *_: bar.update(),
                )
            for job, clip in zip(group, latents, strict=True):
                with _timed(seconds, "decode"):
                    frames = np.concatenate(list(animator.decode(clip)))
                with _timed(seconds, "denoise"):
                    animation = Animation(frames, fps, "; ".join([job.prompt, *shared]), job.seed, clip)
                    for sentence in later:
                        animation = animator.extend(
                            animation,
                            sentence,
                            settings=engines_own,
                            on_step=lambda *_: bar.update(),
                        )
                    frames = animation.frames
                if larger:
                    with _timed(seconds, "enlarge"):
                        frames = np.stack(list(enlarged(frames, pictures.of(job))))
                with _timed(seconds, "save"):
                    video.save(frames, job.output, fps)
                clips.append(
                    {
                        "image": job.image,
                        "prompt": animation.prompt,
                        "seed": job.seed,
                        "output": job.output,
                        "frames": len(frames),
                        "fps": fps,
                    }
                )
                if args.contact_sheet:
                    strips.append(
                        frames[np.linspace(0, len(frames) - 1, min(_SHEET_COLUMNS, len(frames))).round().astype(int)]
                    )
                if not args.json:
                    took = time.perf_counter() - group_began
                    tqdm.write(
                        f"{printable(job.output)}: {len(frames)} frames at {fps:g} a second, made in {took:.2f} s"
                    )
                    sys.stdout.flush()
    if args.contact_sheet:
        with _timed(seconds, "save"):
            sheet_of_all = images.contact_sheet(strips, _SHEET_COLUMNS, [clip["prompt"] for clip in clips])
            images.save_png(sheet_of_all, args.contact_sheet)
    seconds = {stage: round(value, 3) for stage, value in {"total": time.perf_counter() - began, **seconds}.items()}
    figures = {"clips": clips, "seconds": seconds, "backend": animator.backend, "reason": animator.backend_reason}
    figures["arithmetic"] = chosen
    figures["contact_sheet"] = args.contact_sheet and str(args.contact_sheet)
    sheet = f"{printable(str(args.contact_sheet))}: contact sheet\n" if args.contact_sheet else ""
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items() if stage != "total")
    report(
        args,
        figures,
        f"{sheet}{len(clips)} {'clip' if len(clips) == 1 else 'clips'} in {seconds['total']:.2f} s: {stages}",
    )
    return 0


def _path(text: str) -> list[tuple[float, ...]]:
    try:
        points = [tuple(float(number) for number in point.split(",")) for point in text.split()]
        check_points(points)
    except (ValueError, InputError) as error:
        found = str(error) if isinstance(error, InputError) else f"found {text[:100]!r}, expected 'X,Y X,Y …'"
        raise argparse.ArgumentTypeError(found) from None
    return points


def _check_path(args: argparse.Namespace, control: ControlConfig | None) -> None:
    """InputError for --path where nothing would follow it."""
    if control is None:
        raise InputError(
            f"--path: the UNet of {args.bundle} takes no control; export it with trip-export --control DIR"
        )
    for option, value in (("--live", args.live), ("--batch", args.batch), ("--frames", args.num_frames)):
        if value:
            raise InputError(f"found --path beside {option}, expected one or the other; --then goes on after a path")


def _jobs(args: argparse.Namespace) -> list[Job]:
    single = [args.image, args.prompt, args.output]
    if args.batch and not args.live:
        if any(value is not None for value in single):
            raise InputError(
                "found --batch beside IMAGE, PROMPT or -o, expected one or the other; see trip-animate --help"
            )
        return read_batch(args.batch, args.seed)
    if args.live and not any(value is None for value in single[:2]):
        return [Job(args.image, args.prompt, args.output or "", args.seed)]
    if any(value is None for value in single):
        raise InputError("expected IMAGE, PROMPT and -o CLIP or --live, or --batch FILE; see trip-animate --help")
    return [Job(args.image, args.prompt, args.output, args.seed)]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - began


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Each warning once, as a line of its own that says nothing about our sources."""
    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            tqdm.write(f"trip-animate: warning: {printable(str(message))}\n", file=sys.stderr, end="")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        yield


main = main_of(build_parser, run)
