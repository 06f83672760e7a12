"""All that can be said of trip-rt on this GPU, in one run of a few minutes: is it right, how fast is it, how far from what the GPU could do.

    make gpu        # or: python bench/gpu.py [--only PART,PART] [--quick] [--output FILE.json]

What this machine lacks is left out and named. `--dry-run` runs every line that needs no GPU, at tiny sizes, its kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trip_rt.command import CommandParser, add_json_flag, main_of, note, report
from trip_rt.errors import InputError

RESULTS = Path(__file__).parent / "results"
PARTS = ("ceilings", "parity", "kernel", "demo_loop", "inductor", "full_loop")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/gpu.py",
        description="Check and time trip-rt on this GPU: kernels, cubins, the loop on the demo model, the loop at full size.",
        epilog="examples: make gpu; python bench/gpu.py --only kernel --quick; python bench/gpu.py --dry-run",
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
    try:
        import torch
    except ImportError as error:
        raise InputError("gpu: found no torch, expected it with CUDA; run this with a python that has it") from error
    chosen = tuple(args.only.split(",")) if args.only else PARTS
    if unknown := [part for part in chosen if part not in PARTS]:
        raise InputError(f"only: found {', '.join(unknown)}, expected some of {','.join(PARTS)}")
    if not torch.cuda.is_available() and not args.dry_run:
        raise InputError("gpu: found no NVIDIA GPU that torch can use, expected one; run this on a machine with a GPU, or see --dry-run")
    import gpu_parts

    figures: dict[str, Any] = {"machine": _machine(torch), "parts": {}}
    output = args.output or (None if args.dry_run else RESULTS / f"{_slug(figures['machine']['gpu'])}.json")
    failed = False
    with tempfile.TemporaryDirectory(prefix="trip-") as folder:
        context = gpu_parts.Context(args.dry_run, args.quick, Path(folder))
        for part in chosen:
            note(f"{part} …")
            figures["parts"][part] = found = _part(gpu_parts.PARTS[part], context)
            failed |= found["state"] in ("failed", "red")
            note(f"{part}: {found['state']}{': ' + found['reason'] if 'reason' in found else ''} ({found['seconds']:.0f} s)")
            if output:  # after every part: a run cut short keeps what it has
                output.write_text(json.dumps(figures, indent=1) + "\n")
    report(args, figures, table(figures))
    return 1 if failed else 0


def _part(part: Callable[[Any], dict[str, Any]], context: Any) -> dict[str, Any]:
    from gpu_parts import Skipped

    began = time.monotonic()
    try:
        found = part(context)
        found = {"state": "red" if found.get("passed") is False else "done", **found}
    except (ImportError, InputError, Skipped) as error:
        found = {"state": "skipped", "reason": " ".join(str(error).split())[:200]}
    except Exception as error:  # the other parts are worth having all the same
        found = {"state": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _machine(torch: Any) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "not installed"
    if not torch.cuda.is_available():
        return versions | {"gpu": "none: a dry run, its figures mean nothing"}
    properties = torch.cuda.get_device_properties(0)
    about = {"gpu": properties.name, "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    try:
        from trip_rt.devices.cuda import call

        about["driver_cuda"] = call("cudaDriverGetVersion")
    except InputError as error:
        about["driver_cuda"] = str(error)
    return versions | about | {"memory_gb": round(properties.total_memory / 1e9, 1), "multiprocessors": properties.multi_processor_count}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [", ".join(f"{name} {value}" for name, value in figures["machine"].items())]
    for part, found in figures["parts"].items():
        lines += ["", f"{part}: {found['state']}" + (f": {found['reason']}" if "reason" in found else "")]
        lines += [f"  {line}" for line in _lines({name: value for name, value in found.items() if name not in ("state", "reason", "seconds")})]
    return "\n".join(lines)


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, dict) and set(value) == {"median", "p95", "p99"}:
            lines.append(f"{indent}{name:<44}{value['median']:>12.1f} µs   p95 {value['p95']:.1f}   p99 {value['p99']:.1f}")
        elif isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<44}{value:>12.4g}" if isinstance(value, float) else f"{indent}{name:<44}{value!s:>12}")
    return lines


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
