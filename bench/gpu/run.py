"""All that can be said of trip-rt on this GPU, in one run of a few minutes: is it right, how fast is it, how far from
what the GPU could do.

    make gpu        # or: python bench/gpu/run.py [--only PART,PART] [--quick] [--output FILE.json]

What this machine lacks is left out and named. `--dry-run` runs every line that needs no GPU, at tiny sizes, its kernels
in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ in place of this folder, or transformers and others would import its modules
    sys.path[0] = str(Path(__file__).parents[1])

from own_process import apart

from trip_rt.command_line import CommandParser, add_json_flag, main_of, note, report
from trip_rt.errors import InputError

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("parity", "kernel", "full_loop", "demo_loop", "inductor", "libraries", "tests")
SECONDS = 460  # for all parts together


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/gpu/run.py",
        description=(
            "Check and time trip-rt on this GPU: kernels, cubins, the loop on the demo model, the loop at full size."
        ),
        epilog="examples: make gpu; python bench/gpu/run.py --only kernel --quick; python bench/gpu/run.py --dry-run",
    )
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: tiny sizes, nothing worth reporting")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="(bench/results/NAME-OF-THE-GPU.json)")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    chosen = tuple(args.only.split(",")) if args.only else PARTS
    if unknown := [part for part in chosen if part not in PARTS]:
        raise InputError(f"only: found {', '.join(unknown)}, expected some of {','.join(PARTS)}")
    machine = apart(lambda keep: _machine(), 60)
    machine.pop("seconds")
    if machine.pop("state") != "done":
        raise InputError(
            f"gpu: found no torch that works ({machine['reason']}), expected it with CUDA; run this with a python that"
            " has it"
        )
    if not machine.pop("cuda_works") and not args.dry_run:
        raise InputError(
            "gpu: found no NVIDIA GPU that torch can use, expected one; run this on a machine with a GPU, or see"
            " --dry-run"
        )
    parts = _parts()
    figures: dict[str, Any] = {"machine": machine, "parts": {}} | (
        {"dry run": "no figure means anything"} if args.dry_run else {}
    )
    output = args.output or (None if args.dry_run else RESULTS / f"{_slug(machine['gpu'])}.json")
    ends = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory(prefix="trip-") as folder:
        for part in chosen:
            work, seconds = parts[part]
            left = ends - time.monotonic()
            note(f"{part} …")
            found = (
                apart(partial(work, args, Path(folder)), min(seconds, left))
                if left > 5
                else {"state": "skipped", "reason": "no time was left"}
            )
            figures["parts"][part] = found
            note(
                f"{part}: {found['state']}{': ' + found['reason'] if 'reason' in found else ''}"
                f" ({found.get('seconds', 0):.0f} s)"
            )
            if output:  # after every part: a run cut short keeps what it has
                draft = output.with_suffix(".draft")
                draft.write_text(json.dumps(figures, indent=1) + "\n")
                os.replace(draft, output)
    report(args, figures, table(figures))
    return 1 if any(found["state"] in ("failed", "red") for found in figures["parts"].values()) else 0


def _parts() -> dict[str, tuple[Callable[..., dict[str, Any]], float]]:
    """What each part runs, in a process of its own, and the seconds it has."""
    try:
        import torch

        from gpu.cases import Context
        from gpu.parts import PARTS as table
    except ImportError as error:
        raise InputError(f"gpu: found no {error.name}, expected it beside torch; pip install {error.name}") from error

    def part(
        name: str, args: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        if args.dry_run:
            torch.set_num_threads(1)  # a spinning second thread costs tiny sizes more than it gives
        return table[name][0](Context(args.dry_run, args.quick, folder, keep))  # type: ignore[no-any-return]

    return {name: (partial(part, name), seconds) for name, (_, seconds) in table.items()} | {"tests": (_tests, 90)}


def _tests(args: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """tests/gpu by pytest; without a GPU they skip themselves."""
    import pytest  # noqa: F401  (whose absence is said)

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--confcutdir", "tests/gpu", "tests/gpu"]
    ran = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or " in " in line]
    return {"passed": ran.returncode == 0, "said": said[-9:]}


def _machine() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "cuda_works": torch.cuda.is_available(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    if not found["cuda_works"]:
        return found | {"gpu": "none"}
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        found["driver"] = "unknown"
    return found | {
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"dry run: {figures['dry run']}"] if "dry run" in figures else []
    lines.append(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for part, found in figures["parts"].items():
        lines += ["", f"{part}: {found['state']}" + (f": {found['reason']}" if "reason" in found else "")]
        lines += [
            f"  {line}"
            for line in _lines(
                {name: value for name, value in found.items() if name not in ("state", "reason", "seconds")}
            )
        ]
    return "\n".join(lines)


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in found.items():
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
