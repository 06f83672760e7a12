"""What training costs: a step with and without gradient checkpointing, its memory, and how fast clips are read beside
it.

    python bench/training.py demo
    python bench/training.py bench --batch 2 --output bench/results/training_bench.json

A step is forward and backward of the loss; activation memory is what the process has at most within a step beyond what
it had before, gradients laid out already, in a process of its own. The loader reads .mp4 files at the preset's size:
the demo world's, or those of --data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, machine, percentiles, ratio

from trip_reference.data.collate import Collate
from trip_reference.data.folder import VideoFolder
from trip_reference.data.loader import BatchPlan, Loader
from trip_reference.data.sample import ClipFormat
from trip_reference.demo_world.clips import write_demo_folder
from trip_reference.gradient_checkpointing import checkpoint_gradients
from trip_reference.presets import PRESETS
from trip_reference.training.config import load_config
from trip_reference.training.denoiser import Denoiser
from trip_reference.training.start import start_model
from trip_rt.command_line import CommandParser, main_of
from trip_rt.errors import InputError
from trip_rt.launch import note
from trip_rt.process_memory import peak_memory_mb

KINDS = ("plain", "checkpointed")


class Step:
    """Forward and backward of one batch of noise."""

    def __init__(self, preset: str, batch: int, kind: str):
        model, self.tokenizer_json = start_model(load_config("demo", None, [f"model.preset={preset}"]).model, 0)
        if kind == "checkpointed":
            checkpoint_gradients(model.residual_unet.unet)
        self.denoiser = Denoiser(model, load_config("demo").loss).train()
        trip = model.config
        generator = torch.Generator().manual_seed(0)
        shape = (batch, *trip.latent_shape)
        self.latents, self.noise = (torch.randn(shape, generator=generator) for _ in range(2))
        self.timestep = torch.randint(0, 1000, (batch,), generator=generator)
        self.ids = torch.zeros(batch, trip.text_length, dtype=torch.long)
        for parameter in self.denoiser.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self) -> None:
        torch.manual_seed(0)  # dropout
        self.denoiser(self.latents, self.noise, self.timestep, self.ids).backward()


def activation_memory(preset: str, batch: int, kind: str) -> float:
    """Megabytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, preset, "--batch", str(batch), "--memory-of", kind], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(
            f"memory of {kind}: the process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        )
    return float(done.stdout)


def gradient_difference(preset: str, batch: int) -> float:
    """The largest difference of any gradient, relative to the largest of its tensor."""
    gradients = []
    for kind in KINDS:
        step = Step(preset, batch, kind)
        step()
        gradients.append([parameter.grad for parameter in step.denoiser.parameters()])
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(*gradients, strict=True))


def loader_speed(preset: str, data: Path, tokenizer_json: str, batch: int, workers: int, clips: int) -> float:
    """Clips a second with nothing else to do; the first batches, which wait for the workers to start, are not
    counted."""
    trip = PRESETS[preset].trip
    source = VideoFolder(data, ClipFormat(trip.num_frames, trip.height, trip.width))
    skipped = 2 * max(workers, 1)
    loader = iter(
        Loader(source, BatchPlan(batch), 0, Collate(tokenizer_json), 0, skipped + max(clips // batch, 1), workers)
    )
    for _ in range(skipped):
        next(loader)
    began, count = time.perf_counter(), 0
    for tensors in loader:
        count += len(tensors["frames"])
    return count / (time.perf_counter() - began)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/training.py",
        description=__doc__.splitlines()[0],
        epilog="example: python bench/training.py bench --batch 2",
    )
    parser.add_argument("preset", choices=tuple(PRESETS))
    parser.add_argument("--batch", type=int, default=4, help="clips a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder with annotations.json (one of the demo world is written)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read (%(default)s)")
    parser.add_argument("--clips", type=int, default=200, help="read by the loader (%(default)s)")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there")
    return parser


def run(args: argparse.Namespace) -> int:
    for name in ("batch", "rounds", "clips"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}: found {getattr(args, name)}, expected at least 1")
    if args.memory_of:
        step = Step(args.preset, args.batch, args.memory_of)
        before = peak_memory_mb()
        step()
        print(peak_memory_mb() - before)
        return 0
    steps = {kind: Step(args.preset, args.batch, kind) for kind in KINDS}
    tokenizer_json = steps["plain"].tokenizer_json
    seconds = interleaved(steps, args.rounds, warm_ups=1, label="steps")
    steps.clear()
    memory = {kind: round(activation_memory(args.preset, args.batch, kind), 1) for kind in KINDS}
    trip = PRESETS[args.preset].trip
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary) / "set"
        if not args.data:
            write_demo_folder(data, 64, 0, max(trip.height, 64), 2 * trip.num_frames, 8)
        speed = loader_speed(args.preset, data, tokenizer_json, args.batch, args.workers, args.clips)
    trained = args.batch / percentiles(seconds["plain"])["p50"] * 1000
    figures: dict[str, Any] = {
        "preset": args.preset,
        "batch": args.batch,
        "machine": machine(),
        "step_ms": {kind: percentiles(values) for kind, values in seconds.items()},
        "checkpointed_times_plain": ratio(seconds["checkpointed"], seconds["plain"]),
        "activation_memory_mb": memory,
        "memory_share": round(memory["checkpointed"] / memory["plain"], 3),
        "largest_gradient_difference": gradient_difference(args.preset, args.batch),
        "loader_clips_per_second": round(speed, 2),
        "workers": args.workers,
        "step_clips_per_second": round(trained, 3),
        "loader_times_step": round(speed / trained, 2),
    }
    slower = figures["checkpointed_times_plain"]["median"]
    note(
        f"a step of {args.batch} clips: {figures['step_ms']['plain']['p50']:.0f} ms, checkpointed {slower:.2f} times"
        " that"
    )
    note(
        f"activations: {memory['plain']:.0f} MB, checkpointed {memory['checkpointed']:.0f} MB"
        f" ({figures['memory_share']:.0%})"
    )
    note(f"gradients differ by at most {figures['largest_gradient_difference']:.1e} of their tensor's largest")
    note(
        f"loader: {speed:.1f} clips/s by {args.workers} processes; step: {trained:.2f} clips/s; the loader is"
        f" {speed / trained:.1f} times as fast"
    )
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
