"""`trip-animate --live`: a clip without end in the terminal, told what happens next by the lines that are typed."""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trip_rt import terminal, video
from trip_rt.animator import Animator
from trip_rt.checks import real_number
from trip_rt.clip_requests import Job
from trip_rt.command_line import report
from trip_rt.config import MAX_FRAMES
from trip_rt.errors import InputError, printable
from trip_rt.launch import note
from trip_rt.live import Live, Pace
from trip_rt.settings import Settings, check_prompt, check_seed

_SAID_EVERY = 10.0  # seconds between two lines about how it goes, where there is no terminal to draw in


def check_live(args: argparse.Namespace, fps: float) -> None:
    """InputError for options that a clip without end has no use for."""
    for name, value in (
        ("--batch", args.batch),
        ("--frames", args.num_frames),
        ("--size", args.size),
        ("--then", args.then),
        ("--contact-sheet", args.contact_sheet),
    ):
        if value:
            raise InputError(f"found {name} beside --live, expected one or the other; see trip-animate --help")
    check_prompt(args.prompt)
    check_seed(args.seed)
    if args.seconds is not None:
        real_number("seconds", args.seconds, 1 / fps, 1e9)
    if args.output is not None:
        video.output_format(args.output)
        if args.seconds is None or args.seconds * fps > MAX_FRAMES:
            found = "no --seconds" if args.seconds is None else f"--seconds {args.seconds:g}"
            raise InputError(
                f"found {found} beside --live and -o, expected at most {MAX_FRAMES / fps:g}: what is saved is held in"
                " memory"
            )


def play(args: argparse.Namespace, animator: Animator, job: Job, settings: Settings, fps: float) -> int:
    """Show the clip until its seconds are over or somebody stops it; then save what was shown, if that was asked
    for."""
    live = Live(animator, job.image, job.prompt, seed=job.seed, fps=fps, settings=settings)
    size = shutil.get_terminal_size()
    rows = terminal.rows_of(animator.config.height, animator.config.width, size.columns, size.lines)
    draws = sys.stdout.isatty() and not args.json
    question = terminal.below(rows) + "what happens next? " if draws else ""
    print(terminal.CLEAR + question if draws else "", end="", flush=True)
    threading.Thread(target=_listen, args=(live, question), daemon=True).start()
    kept: list[NDArray[np.uint8]] = []
    said = began = time.monotonic()
    with closing(live.frames()) as frames:
        for frame in frames:
            if draws:
                sys.stdout.write(terminal.drawn(frame, rows))
                sys.stdout.flush()
            elif time.monotonic() - said > _SAID_EVERY:
                said = time.monotonic()
                note(f"live: {_told(live.pace)}")
            if args.output is not None:
                kept.append(frame)
            if args.seconds is not None and live.pace.shown >= round(args.seconds * fps):
                break
    seconds = time.monotonic() - began
    if draws:
        print(terminal.below(rows))
    if kept:
        video.save(np.stack(kept), job.output, fps)
    figures: dict[str, Any] = {"shown": live.pace.shown, "late": live.pace.late, "seconds": round(seconds, 3)}
    figures |= {"sentence_to_frame_s": [round(value, 3) for value in live.pace.heard], "output": args.output}
    saved = f"{printable(job.output)}: " if kept else ""
    report(args, figures, f"{saved}{_told(live.pace)} in {seconds:.1f} s")
    return 0


def _told(pace: Pace) -> str:
    heard = f", a new sentence shown after {np.median(pace.heard):.2f} s" if pace.heard else ""
    return f"{pace.shown} frames shown, {pace.late} late{heard}"


def _listen(live: Live, question: str) -> None:
    """Take every line of stdin for the next sentence, and ask for another."""
    for line in sys.stdin:
        sys.stdout.write(question)
        sys.stdout.flush()
        try:
            live.say(line.strip())
        except InputError as error:
            note(str(error))
