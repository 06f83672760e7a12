"""The manners every command shares: one clear line and exit code 2 for bad input, 130 for Ctrl-C and 143 for SIGTERM,
figures on request as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from trip_rt.arithmetic import Asked
from trip_rt.errors import EngineError, InputError, one_line
from trip_rt.images import Fit
from trip_rt.launch import note, until_stopped
from trip_rt.sampling.solvers import SOLVERS
from trip_rt.settings import SPEEDS, Settings

MAX_LINE = 2000  # characters of an error


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message, MAX_LINE)}; see {self.prog} --help\n")


def main_of(
    build_parser: Callable[[], argparse.ArgumentParser], run: Callable[[argparse.Namespace], int]
) -> Callable[[Sequence[str] | None], int]:
    """A console-script entry point out of a parser and a `run(args) -> exit code`."""

    def main(argv: Sequence[str] | None = None) -> int:
        parser = build_parser()
        return until_stopped(parser.prog, lambda: _reported(parser, run, argv))

    return main


def _reported(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """The exit code of `run`; what a person got wrong and what the machine lacks is one line on stderr."""
    try:
        return run(parser.parse_intermixed_args(argv))  # options may stand between optional positionals
    except InputError as error:
        note(f"{parser.prog}: {one_line(error, MAX_LINE)}")
        return 2
    except EngineError as error:
        note(f"{parser.prog}: {one_line(error, MAX_LINE)}")
        return 1
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        _drop_output()
        return 141
    except OSError as error:  # a full disk, a share that went away: not a fault of ours to trace
        note(f"{parser.prog}: cannot go on: {one_line(error, MAX_LINE)}")
        _drop_output()
        return 1


def _drop_output() -> None:
    """Give up what stdout does not take, or the flush at exit would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """--json, which `report` obeys."""
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON line on stdout instead of text"
    )


def report(args: argparse.Namespace, figures: Any, text: str) -> None:
    """The command's result on stdout: `text` for people, or `figures` where --json was asked for."""
    print(json.dumps(figures) if args.json else text, flush=True)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that say how a clip is made, which `settings_of` reads. An option that is left out leaves the choice
    to the speed or to the model."""
    parser.add_argument(
        "--speed",
        choices=tuple(SPEEDS),
        default=Settings.speed,
        help="settled ways to trade likeness to the exact clip for time (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=int,
        metavar="N",
        help="denoising steps (the speed's, or the model's own)",
    )
    parser.add_argument("--solver", choices=SOLVERS, help="how to step; all but ddim need fewer steps (the speed's)")
    parser.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="LOW,HIGH",
        help="guide only where the timestep lies between these shares of the schedule, 0 to 1 (the speed's)",
    )
    parser.add_argument(
        "--feature-reuse",
        type=int,
        metavar="N",
        help="run the whole UNet every N steps only, 1 for each step (the speed's)",
    )
    parser.add_argument(
        "--arithmetic",
        choices=get_args(Asked),
        help="what the UNet computes in, fp32 being the engines' own precision; auto: bf16, int8 or fp8 where this"
        " machine is faster so (the speed's)",
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="G", help="how closely to follow the prompt, 0 to 100 (the model's own)"
    )
    parser.add_argument(
        "--negative-prompt", default=Settings.negative_prompt, metavar="T", help="what should not be seen"
    )
    parser.add_argument(
        "--fit",
        choices=get_args(Fit),
        default=Settings.fit,
        help="how a picture of another shape is fitted (%(default)s)",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options of `add_settings` and a command's own ask for; InputError for one out of bounds."""
    names = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in vars(args).items() if name in names})


def _interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected two numbers such as 0.2,0.8") from None


def size_of(text: str) -> tuple[int, int]:
    """An argument's WIDTHxHEIGHT as (height, width)."""
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected WIDTHxHEIGHT such as 256x256")
    return int(height), int(width)


def check_installed(modules: Sequence[str], extra: str) -> None:
    """InputError where packages of an extra of trip-rt are not there."""
    if lacking := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"found no {', '.join(lacking)}, expected what trip-rt[{extra}] brings; run pip install 'trip-rt[{extra}]'"
        )


def fewest_and_most(text: str) -> tuple[int, int]:
    """The argument N or MIN:MAX as two whole numbers from 1."""
    least, colon, most = text.partition(":")
    numbers = [int(part) for part in (least, most if colon else least) if part.isdecimal() and len(part) < 6]
    if len(numbers) < 2 or not 1 <= numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"found {text[:50]!r}, expected N or MIN:MAX such as 4 or 1:8")
    return numbers[0], numbers[1]
