"""All that can be said of trip-rt on this GPU, in two commands of at most ten minutes: is it right, how fast is it, how
far from what the GPU could do.

    make gpu                            # is it right, and how fast: the parts of `figures`
    make gpu ARGS="--only engines"      # engine libraries, and tests/gpu
    make gpu ARGS="--kernels FOLDER"    # on machine code that `--kernels FOLDER --compile-for 9.0` made elsewhere
    python bench/gpu/run.py --only kernel,demo_loop --quick

parts.py says what the parts are and how long each may take. One that needs what this machine lacks is skipped; one that
fails in any way, or is cut off, makes the exit code 1. `--dry-run` runs every line that needs no GPU, at tiny sizes,
its kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ in place of this folder, or transformers and others would import its modules
    sys.path[0] = str(Path(__file__).parents[1])

from own_process import apart, require

from gpu.parts import COMMAND_SECONDS, GROUPS, MACHINE_SECONDS, PARTS
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.errors import InputError
from trip_rt.files import whole_file
from trip_rt.launch import note

RESULTS = Path(__file__).parents[1] / "results"
_SAID = ("state", "reason", "seconds", "seconds_allowed")  # in the heading of a part, not among its figures


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/gpu/run.py",
        description=(
            "Check and time trip-rt on this GPU: kernels, cubins, the loop on the demo model, the loop at full size."
        ),
        epilog="examples: make gpu; python bench/gpu/run.py --only kernel --quick; python bench/gpu/run.py --dry-run",
    )
    parser.add_argument(
        "--only",
        metavar="PARTS",
        default="figures",
        help=f"some of {','.join(PARTS)}, or {' or '.join(GROUPS)} (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: tiny sizes, nothing worth reporting")
    parser.add_argument(
        "--kernels",
        type=Path,
        metavar="FOLDER",
        help="machine code from here, in place of compiling it on this machine",
    )
    parser.add_argument(
        "--compile-for",
        metavar="LIST",
        help="compile into the folder of --kernels for compute capabilities such as 9.0, and end; needs no GPU",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="(bench/results/NAME-OF-THE-GPU.json, or …-PARTS.json)"
    )
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if args.compile_for:
        return _compile(args)
    chosen = _chosen(args.only, args.dry_run)
    machine = apart(lambda keep: _machine(), MACHINE_SECONDS)
    machine.pop("seconds")
    if machine.pop("state") != "done":
        raise InputError(
            f"gpu: found no torch and triton that work ({machine['reason']}), expected torch with CUDA, and triton; run"
            " this with a python that has them"
        )
    if not machine.pop("cuda_works") and not args.dry_run:
        raise InputError(
            "gpu: found no NVIDIA GPU that torch can use, expected one; run this on a machine with a GPU, or see"
            " --dry-run"
        )
    figures: dict[str, Any] = {"machine": machine, "quick": args.quick, "parts": {}} | (
        {"dry run": "no figure means anything"} if args.dry_run else {}
    )
    output = args.output or (None if args.dry_run else RESULTS / _file_name(machine["gpu"], args))
    with tempfile.TemporaryDirectory(prefix="trip-") as folder:
        for name in chosen:
            seconds = PARTS[name].seconds
            note(f"{name}: at most {seconds} s …")
            part = apart(partial(_run_part, name, args, Path(folder)), seconds) | {"seconds_allowed": seconds}
            figures["parts"][name] = part
            note(f"{_heading(name, part)} ({part['seconds']:.0f} s)")
            if output:  # after every part: a run cut short keeps what it has
                with whole_file(output) as part_file:
                    part_file.write_text(json.dumps(figures, indent=1) + "\n")
    report(args, figures, table(figures))
    return 0 if all(part["state"] in ("done", "skipped") for part in figures["parts"].values()) else 1


def _chosen(only: str, dry_run: bool) -> list[str]:
    """The parts of --only, in the order of PARTS."""
    names = {part for name in only.split(",") for part in GROUPS.get(name, (name,))}
    if unknown := sorted(names - set(PARTS)):
        expected = f"some of {','.join(PARTS)}, or {' or '.join(GROUPS)}"
        raise InputError(f"only: found {', '.join(unknown)}, expected {expected}")
    seconds = MACHINE_SECONDS + sum(PARTS[name].seconds for name in names)
    if seconds > COMMAND_SECONDS and not dry_run:
        raise InputError(
            f"only: found parts that may take {seconds} s, expected at most {COMMAND_SECONDS} s in a command; run"
            " figures and engines one after the other"
        )
    return [name for name in PARTS if name in names]


def _run_part(
    name: str, args: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """What the part gives. It imports all that it runs, torch too, in its own process: what cannot be imported costs no
    other part."""
    part = PARTS[name]
    require(*part.needs)
    import torch

    from gpu.cases import Context

    if args.dry_run:
        torch.set_num_threads(1)  # a spinning second thread costs tiny sizes more than it gives
    work = getattr(importlib.import_module(f"gpu.{part.module}"), name)
    return dict(work(Context(args.dry_run, args.quick, folder, keep, args.kernels)))


def _compile(args: argparse.Namespace) -> int:
    if not args.kernels:
        raise InputError("compile-for: found no folder to compile into, expected --kernels FOLDER beside it")
    from gpu import prebuilt
    from trip_kernels.compile import CAPABILITIES

    capabilities = args.compile_for.split(",")
    if unknown := [name for name in capabilities if name not in CAPABILITIES]:
        raise InputError(f"compile-for: found {', '.join(unknown)}, expected some of {','.join(CAPABILITIES)}")
    prebuilt.write(args.kernels, capabilities, note)
    return 0


def _machine() -> dict[str, Any]:
    import torch
    import triton

    about: dict[str, Any] = {
        "cuda_works": torch.cuda.is_available(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }
    if not about["cuda_works"]:
        return about | {"gpu": "none"}
    properties = torch.cuda.get_device_properties(0)
    about |= {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        about["driver"] = "unknown"
    return about | {
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _file_name(gpu: str, args: argparse.Namespace) -> str:
    """Of the GPU and of what was run on it, so that a part run by itself replaces no whole run's figures."""
    words = [gpu, *(args.only.split(",") if args.only != "figures" else ()), *(["quick"] if args.quick else ())]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") + ".json"


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"dry run: {figures['dry run']}"] if "dry run" in figures else []
    lines.append(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for name, part in figures["parts"].items():
        lines += ["", _heading(name, part)]
        rest = {key: value for key, value in part.items() if key not in _SAID}
        lines += [f"  {line}" for line in _lines(rest)]
    return "\n".join(lines)


def _heading(name: str, part: dict[str, Any]) -> str:
    return f"{name}: {part['state']}" + (f": {part['reason']}" if "reason" in part else "")


def _lines(figures: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict) and set(value) == {"median", "p95", "p99"}:
            lines.append(
                f"{indent}{name:<48}{value['median']:>12.1f} µs   p95 {value['p95']:.1f}   p99 {value['p99']:.1f}"
            )
        elif isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{name:<48}{value:>12.4g}" if isinstance(value, float) else f"{indent}{name:<48}{value!s:>12}"
            )
    return lines


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
