"""What an export at full size takes: seconds and memory of every stage, and the largest memory that the export and its
builders held together at any moment.

    python bench/full_export.py --output bench/results/export_trip-256.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from timing import machine

from trip_reference.presets import PRESETS
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.errors import EngineError
from trip_rt.files import whole_file
from trip_rt.launch import note

_EVERY = 0.2  # seconds between looks at the memory
_OPTIONS = ["--fp16", "--backend", "onnxruntime", "--backend", "tensorrt-rtx", "--parity-steps", "1"]


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/full_export.py",
        description=(
            "Export a model with random weights in fp16 to ONNX graphs and TensorRT-RTX plans, and say what it took."
        ),
        epilog="example: python bench/full_export.py --preset bench",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="trip-256", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to put checkpoint and bundle, 15 GB (a temporary folder)")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="trip-", dir=args.folder) as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        made = [sys.executable, "-m", "trip_reference.random_checkpoint", args.preset, "-o", str(checkpoint)]
        subprocess.run(made, check=True)
        command = [str(Path(sys.executable).with_name("trip-export")), str(checkpoint), "-o", str(bundle)]
        figures, seconds, peak = _watched([*command, *_OPTIONS, "--json"])
    figures = {
        "machine": machine() | {"tensorrt-rtx": importlib.metadata.version("tensorrt-rtx-cu13")},
        "command": " ".join(["trip-export", args.preset, "-o", "bundle", *_OPTIONS]),
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(peak, 2),
        **{name: figures[name] for name in ("stages", "plans", "parity")},
    }
    if args.output:
        with whole_file(args.output) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n")
    report(args, figures, _table(figures))
    return 0


def _watched(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """What the export says in JSON, its seconds, and the most memory that its processes held together, in GB."""
    began, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def look() -> None:
            nonlocal peak
            while not ended.wait(_EVERY):
                peak = max(peak, _resident_gb(process.pid))

        watcher = threading.Thread(target=look)
        watcher.start()
        assert process.stdout
        said = process.stdout.read()
        ended.set()
        watcher.join()
    if process.returncode:
        raise EngineError(f"trip-export: ended with {process.returncode}, expected 0; see what it said above")
    note(f"exported in {time.monotonic() - began:.0f} s")
    return json.loads(said.splitlines()[-1]), time.monotonic() - began, peak


def _resident_gb(pid: int) -> float:
    """What a process and all that it started hold in memory."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            total += process.memory_info().rss
    return total / 1e9


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{'stage':<40}{'seconds':>9}{'peak GB':>9}"]
    lines += [
        f"{name:<40}{stage['seconds']:>9.1f}{stage['peak_memory_gb']:>9.1f}"
        for name, stage in figures["stages"].items()
    ]
    lines.append(f"{'all':<40}{figures['seconds']:>9.1f}{figures['peak_resident_gb']:>9.1f}")
    return "\n".join(lines)


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
