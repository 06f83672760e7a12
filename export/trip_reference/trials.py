"""`python -m trip_reference.trials`: what a change of the demo's recipe does, at equal budgets of minutes, over several
seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trip_reference.progress import shown_progress
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.config import to_json
from trip_rt.errors import InputError
from trip_rt.files import whole_file

ENDLESS = 10_000_000  # clips, of which no run sees the end
WARM = 20  # steps by which a run's speed is measured, after as many
EPILOG = """examples:
  python -m trip_reference.trials loss size -o out/trials --minutes 4 --markdown out/trials.md
  python -m trip_reference.trials fusion -o out/fusions --preset demo-small --minutes 8 --seeds 3"""
LOOKED_AT = 5  # last records of the log, of 20 steps each, that the loss is the mean of
TIMESTEPS = ("999", "600", "200", "50")


@dataclass(frozen=True, eq=False)
class Trial:
    """What differs from the recipe: `settings` as `trip-train --set` takes them, fields of the preset's `trip` and
    `unet`, and the number of cached clips, if not the budget's; 0 are rendered and encoded as they are needed."""

    name: str
    settings: tuple[str, ...] = ()
    trip: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    clips: int | None = None


RECIPE = Trial("the recipe")


def _rates(rate: float) -> tuple[str, ...]:
    return f"stages.0.unet_lr={rate}", f"stages.0.tnf_lr={rate}"


_ADAMW = "optimizer.name='adamw'"
_WIDER = {"block_out_channels": (64, 128)}
_DEEPER = {"layers_per_block": 2}
_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
}
GROUPS: dict[str, tuple[Trial, ...]] = {
    "gate": (RECIPE, Trial("λ by frame", trip={"gate": "frame"})),
    "optimiser": (
        RECIPE,
        Trial("Muon at 1e-3", _rates(1e-3)),
        Trial("Muon at 1e-2", _rates(1e-2)),
        Trial("AdamW at 1e-3", (_ADAMW, *_rates(1e-3))),
        Trial("AdamW at 3e-3", (_ADAMW, *_rates(3e-3))),
        Trial("no warm-down", ("optimizer.final_lr=1",)),
    ),
    "batch": (RECIPE, Trial("4 clips a step", ("run.batch=4",)), Trial("16 clips a step", ("run.batch=16",))),
    "loss": (
        RECIPE,
        Trial("weights up to 100", ("loss.max_weight=100",)),
        Trial("plain ε-loss", ("loss.weighting='none'",)),
        Trial("uniform timesteps", ("loss.timesteps='uniform'",)),
        Trial("what moves counts double", ("loss.change=1",)),
        Trial("what moves counts fivefold", ("loss.change=4",)),
    ),
    "data": (RECIPE, Trial("500 clips", clips=500), Trial("5 000 clips", clips=5000), Trial("endless clips", clips=0)),
    "capacity": (
        Trial("64 clips", clips=64),
        Trial("64 clips, widths 64, 128", unet=_WIDER, clips=64),
        Trial("64 clips, two layers a block", unet=_DEEPER, clips=64),
    ),
    "size": (
        RECIPE,
        Trial("widths 32, 64", unet={"block_out_channels": (32, 64)}),
        Trial("widths 64, 128", unet=_WIDER),
        Trial("two layers a block", unet=_DEEPER),
        Trial("attention at 4×4 too", unet=_ATTENTION),
    ),
    "fusion": (
        Trial("TNF", trip={"fusion": "tnf"}),
        Trial("linear", trip={"fusion": "linear"}),
        Trial("none", trip={"fusion": "none"}),
    ),
    "first-frame": (
        Trial("start", trip={"first_frame": "start"}),
        Trial("end", trip={"first_frame": "end"}),
        Trial("channel", trip={"first_frame": "channel"}),
    ),
}
# (heading, key, decimals)
COLUMNS = (
    ("clips seen", "clips_seen", 0),
    ("training loss ↓", "loss", 4),  # its own, so that trials of the loss cannot be compared by it
    *((f"RMS at {t} ↓", f"rms_{t}", 3) for t in TIMESTEPS),
    ("moves as told % ↑", "motion", 1),
    ("shape % ↑", "shape", 1),
    ("truth, dB ↑", "truth_psnr", 2),
)


@dataclass(frozen=True)
class Budget:
    """What every trial of a table gets: minutes of one thread or, with `steps`, a number of steps."""

    preset: str
    vae: str
    minutes: float
    steps: int
    clips: int
    judged: int


def run_trials(trials: Sequence[Trial], seeds: int, budget: Budget, folder: Path, jobs: int) -> list[dict[str, Any]]:
    """Train and judge every trial with every seed, `jobs` at a time with one thread each. Those whose figures are in
    `folder` are not run again.

    Trials of one seed see the same clips in the same order with the same noise, as far as their batches allow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for clips in sorted({_clips(trial, budget) for trial in trials} - {0}):
        _cache(folder, budget, clips)
    tasks = [(trial, seed) for seed in range(seeds) for trial in trials]
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_begin, maxtasksperchild=1) as pool:
        done = pool.imap(partial(_run, budget=budget, folder=folder), tasks)
        return list(shown_progress(done, len(tasks), "trials", "run"))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, a row a trial, as Markdown."""
    lines = [
        "| trial | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for name in dict.fromkeys(result["trial"] for result in results):
        rows = [result for result in results if result["trial"] == name]
        cells = [_cell([row[key] for row in rows], decimals) for _, key, decimals in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], decimals: int) -> str:
    spread = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean(values):.{decimals}f}{spread}"


def _begin() -> None:
    """Of a process: one thread, and Ctrl-C is the parent's to answer, which ends them all."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _run(task: tuple[Trial, int], budget: Budget, folder: Path) -> dict[str, Any]:
    trial, seed = task
    what = {"trial": trial.name, "seed": seed, "differs": to_json(trial), "budget": to_json(budget)}
    what = json.loads(json.dumps(what))  # as it is read again
    name = "-".join("".join(c if c.isalnum() else " " for c in trial.name).split())
    path = folder / f"{name}-{seed}.json"
    if path.exists() and what.items() <= (done := json.loads(path.read_text(encoding="utf-8"))).items():
        return dict(done)
    run = folder / f"{name}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    start = run / "start"
    _write_start(trial, seed, budget, start)
    clips = _clips(trial, budget)
    data = _latents(folder, budget, clips) if clips else None
    steps = budget.steps or _steps_in(budget.minutes, trial, seed, start, data, run / "warm")
    log = _train(trial, seed, steps, start, data, run / "run")
    loss = round(mean(record["loss"] for record in log[-LOOKED_AT:]), 6)
    made = {"steps": steps, "loss": loss, "clips_seen": steps * _batch(trial)}
    result = what | made | _judged(run / "run", budget)
    with whole_file(path) as part:
        part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    shutil.rmtree(run)
    return result


def _judged(run: Path, budget: Budget) -> dict[str, float]:
    """Errors of the clean latents by timestep, and what is seen in clips made by `balanced`; held-out scenes."""
    from trip_reference import checkpoint
    from trip_reference.demo_world.diagnosis import diagnose
    from trip_reference.demo_world.verdicts import judge_clips
    from trip_reference.evaluation.clips import demo_cases, make_clips
    from trip_rt.settings import Settings

    settings = Settings(speed="balanced")
    rows = diagnose(run, budget.judged, 0, settings, sampled=False)["rows"]
    cases = demo_cases(checkpoint.load_config(run), budget.judged)
    seen = judge_clips(make_clips(run, cases, settings), cases)["all"]
    figures = {f"rms_{t}": rows[t]["all"] for t in TIMESTEPS}
    return figures | {name: seen[name] for name in ("motion", "colour", "shape", "every demand", "truth_psnr")}


def _write_start(trial: Trial, seed: int, budget: Budget, folder: Path) -> None:
    """The checkpoint that a trial starts from: random weights of its seed, and the VAE that all share."""
    import torch

    from trip_reference import checkpoint
    from trip_reference.random_checkpoint import random_model

    model, tokenizer_json = random_model(_preset(trial, budget), seed)
    model.vae = checkpoint.load_vae(Path(budget.vae))
    checkpoint.save_pretrained(model, tokenizer_json, folder, torch.float32)


def _preset(trial: Trial, budget: Budget) -> Any:
    from trip_reference import checkpoint
    from trip_reference.presets import PRESETS

    preset = PRESETS[budget.preset]
    scale = checkpoint.load_config(budget.vae).scaling_factor
    return dataclasses.replace(
        preset,
        trip=dataclasses.replace(preset.trip, scaling_factor=scale, **trial.trip),
        unet=preset.unet | trial.unet,
    )


def _cache(folder: Path, budget: Budget, clips: int) -> None:
    """The latents that all trials of that many clips train on."""
    from trip_reference.data.cache import INDEX, write_cache
    from trip_reference.demo_world.clips import DemoWorldClips

    latents = _latents(folder, budget, clips)
    if not (latents / INDEX).exists():
        from trip_reference import checkpoint

        start = folder / "start"
        _write_start(RECIPE, 0, budget, start)
        model = checkpoint.from_pretrained(start)
        write_cache(DemoWorldClips(model.config, clips), model, checkpoint.load_tokenizer_json(start), latents)
        shutil.rmtree(start)


def _clips(trial: Trial, budget: Budget) -> int:
    return budget.clips if trial.clips is None else trial.clips


def _latents(folder: Path, budget: Budget, clips: int) -> Path:
    return folder / f"latents-{budget.preset}-{clips}"


def _train(trial: Trial, seed: int, steps: int, start: Path, latents: Path | None, run: Path) -> list[dict[str, Any]]:
    """Train into `run`; returns its log."""
    from trip_reference import checkpoint
    from trip_reference.training.config import load_config
    from trip_reference.training.loop import Stopped
    from trip_reference.training.run import train_run

    trip = checkpoint.load_config(start)
    words = [
        f"model.checkpoint={str(start)!r}",
        f"model.fusion={trip.fusion}",
        f"model.first_frame={trip.first_frame}",
        "vae.steps=0",
        f"data.source={str(latents or 'demo')!r}",
        "data.validation=''",
        f"data.cache={'true' if latents else 'false'}",
        f"data.clips={ENDLESS}",
        f"stages.0.steps={steps}",
        f"stages.0.warmup={min(50, max(1, steps // 4))}",
        f"run.seed={seed}",
        "run.weights=fp32",
        "run.tracker=none",
        "run.save_every=1000000",
        # An average over a thousand steps would still hold the beginning of a run this short.
        f"optimizer.ema_decay={min(0.999, 1 - 20 / max(steps, 40)):.4f}",
        *trial.settings,
    ]
    try:
        train_run(load_config("demo", None, words), run)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signal) from None  # without a word: the parent says that all was stopped
    log = (run / "training" / "denoiser.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in log.splitlines()]


def _steps_in(minutes: float, trial: Trial, seed: int, start: Path, latents: Path | None, run: Path) -> int:
    """How many steps fit, by the speed of a few."""
    log = _train(trial, seed, 2 * WARM, start, latents, run)
    shutil.rmtree(run)
    return max(1, round(minutes * 60 * log[-1]["clips_per_second"] / _batch(trial)))


def _batch(trial: Trial) -> int:
    from trip_reference.training.config import load_config

    return load_config("demo", None, trial.settings).run.batch


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m trip_reference.trials",
        description=(
            "Train the demo by its recipe and by what differs from it, each for the same minutes of one thread, judge"
            " held-out clips, and print the table. Run it again to go on; finished runs are kept."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "groups", nargs="+", choices=(*GROUPS, "all"), metavar="GROUP", help=", ".join((*GROUPS, "all"))
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for latents, runs and figures"
    )
    parser.add_argument(
        "--vae",
        type=Path,
        default=Path("checkpoints/demo"),
        metavar="CHECKPOINT",
        help="whose VAE all share (%(default)s)",
    )
    parser.add_argument("--preset", choices=("demo", "demo-small"), default="demo", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, each (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="the same number of steps for all, whatever they take")
    parser.add_argument(
        "--clips", type=int, default=20_000, help="to train on, for trials that do not vary it (%(default)s)"
    )
    parser.add_argument("--judged", type=int, default=48, help="held-out clips to judge by (%(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs side by side, on a core each (%(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table there too")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    for name, least in (("seeds", 1), ("steps", 0), ("clips", 1), ("judged", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            raise InputError(f"{name}: found {getattr(args, name)}, expected at least {least}")
    if not 0 < args.minutes < 1e4:
        raise InputError(f"minutes: found {args.minutes:g}, expected more than 0")
    groups = GROUPS if "all" in args.groups else args.groups
    trials = list(dict.fromkeys(trial for group in groups for trial in GROUPS[group]))
    budget = Budget(args.preset, str(args.vae), args.minutes, args.steps, args.clips, args.judged)
    results = run_trials(trials, args.seeds, budget, args.output, args.jobs)
    text = table(results)
    if args.markdown:
        with whole_file(args.markdown) as part:
            part.write_text(text + "\n", encoding="utf-8")
    report(args, results, text)
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
