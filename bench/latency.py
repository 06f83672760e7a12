"""Milliseconds a call of every component, on every backend of a bundle that runs here and in PyTorch, measured side by side.

    python bench/latency.py BUNDLE [--checkpoint CHECKPOINT] [--rounds 30] [--output bench/results/NAME.json]

Calls are interleaved, a round at a time, so that whatever else the machine does falls on all alike; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trip_rt.animator import Animator
from trip_rt.backends import EngineOptions
from trip_rt.bundle import open_bundle
from trip_rt.command import CommandParser, add_json_flag, main_of, note, report
from trip_rt.errors import InputError
from trip_rt.manifest import COMPONENTS


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/latency.py",
        description="Time every component of a bundle on every backend that runs here, side by side.",
        epilog="example: python bench/latency.py out/demo-bundle --checkpoint checkpoints/demo --threads 2",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="time the PyTorch model too")
    parser.add_argument("--profile", metavar="NAME", help="one of the bundle's sets of shapes (its first)")
    parser.add_argument("--rounds", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (each library's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there too")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise InputError(f"rounds: found {args.rounds}, expected at least 1")
    bundle = open_bundle(args.bundle)
    profile = bundle.manifest.profile(args.profile)
    animators = {}
    for backend in profile.backends:
        try:
            animators[backend] = Animator(bundle, backend, profile.name, EngineOptions(threads=args.threads))
        except InputError as error:
            note(f"{backend}: left out: {error}")
    inputs = {name: _inputs(next(iter(animators.values())), name) for name in COMPONENTS}
    calls: dict[str, dict[str, Callable[[], object]]] = {name: {} for name in COMPONENTS}
    if args.checkpoint:
        for name, call in _pytorch(args.checkpoint, bundle.manifest.config_of(profile), profile, inputs, args.threads).items():
            calls[name]["pytorch"] = call
    for backend, animator in animators.items():
        for name in COMPONENTS:
            calls[name][backend] = lambda engine=animator.engines[name], name=name: engine.run(inputs[name])
    milliseconds = {name: _interleaved(rivals, args.rounds) for name, rivals in calls.items()}
    figures = {
        "profile": profile.name,
        "precision": {backend: profile.engines["unet"][backend].precision for backend in animators},
        "milliseconds": milliseconds,
        "gflop": {name: round(next(iter(profile.engines[name].values())).gflop, 3) for name in COMPONENTS},
        "rounds": args.rounds,
        "machine": {"cpu": _cpu(), "python": platform.python_version(), "engines": {b: a.describe() for b, a in animators.items()}},
    }
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    report(args, figures, _table(milliseconds))
    return 0


def _inputs(animator: Animator, name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = animator.engines[name].spec.inputs
    return {t.name: (np.ones(t.shape, t.dtype) if t.dtype == "int64" else rng.standard_normal(t.shape, np.float32)) for t in tensors}


def _pytorch(folder: Path, config, profile, inputs, threads) -> dict[str, Callable[[], object]]:
    import torch

    from trip_export.components import component
    from trip_reference import checkpoint

    torch.set_num_threads(threads or torch.get_num_threads())
    model = checkpoint.from_pretrained(folder)
    model.config = config
    calls = {}
    for name in COMPONENTS:
        module = component(model, name, profile.batch, profile.decode_frames).module
        tensors = [torch.from_numpy(array) for array in inputs[name].values()]

        def call(module=module, tensors=tensors):
            with torch.inference_mode():
                return module(*tensors)

        calls[name] = call
    return calls


def _interleaved(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, after a call each to warm up."""
    for call in rivals.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in tqdm(range(rounds), disable=None, leave=False):
        for name, call in rivals.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: round(float(np.median(values)) * 1000, 3) for name, values in seconds.items()}


def _table(milliseconds: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(milliseconds.values())))
    lines = [f"{'ms a call, median':<18}" + "".join(f"{name:>14}" for name in names)]
    lines += [f"{component:<18}" + "".join(f"{row[name]:>14.2f}" for name in names) for component, row in milliseconds.items()]
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{models[0]} ({len(models)} threads)" if models else platform.processor()


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
