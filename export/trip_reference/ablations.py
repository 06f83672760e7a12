"""`python -m trip_reference.ablations`: fusion × first frame on the demo world, at equal budgets, over several
seeds."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.config import FirstFrame, Fusion
from trip_rt.errors import InputError
from trip_rt.files import whole_file

FUSIONS: tuple[Fusion, ...] = ("none", "linear", "tnf")
FIRST_FRAMES: tuple[FirstFrame, ...] = ("start", "end", "channel")
# (heading, key, decimals); the first is the loss on held-out clips at fixed draws, the others are of sampled ones.
COLUMNS = (
    ("held-out loss ↓", "held_out_loss", 3),
    ("dB to the true clip ↑", "truth_psnr", 2),
    ("background dB ↑", "background_psnr", 2),
    ("moves as told % ↑", "motion", 1),
    ("keeps its colour % ↑", "colour", 1),
)


def ablate(
    folder: Path, vae: Path, seeds: int, steps: int, batch: int, clips: int, judged: int, jobs: int
) -> list[dict[str, Any]]:
    """Train and judge every variant with every seed, `jobs` at a time with one thread each. Variants whose figures are
    in `folder` are not run again.

    All variants see the same clips in the same order with the same noise: those depend on the seed alone.
    """
    variants = [
        (folder, str(vae), fusion, first_frame, seed, steps, batch, clips, judged)
        for seed, fusion, first_frame in product(range(seeds), FUSIONS, FIRST_FRAMES)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _cache(folder / "latents", vae, clips)
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_one_thread, maxtasksperchild=1) as pool:
        return list(
            tqdm(pool.imap(_variant, variants), total=len(variants), desc="ablations", unit="run", disable=None)
        )


def table(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, a row a variant, as Markdown."""
    lines = [
        "| fusion | first frame | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |",
        "| --- | --- |" + " --- |" * len(COLUMNS),
    ]
    for fusion, first_frame in product(FUSIONS, FIRST_FRAMES):
        rows = [row for row in results if (row["fusion"], row["first_frame"]) == (fusion, first_frame)]
        columns = [([row[key] for row in rows], decimals) for _, key, decimals in COLUMNS]
        cells = [f"{mean(values):.{decimals}f} ± {_spread(values):.{decimals}f}" for values, decimals in columns]
        lines.append(f"| {fusion} | {first_frame} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _cache(folder: Path, vae: Path, clips: int) -> None:
    """The latents that all runs train on."""
    from trip_reference.data.cache import INDEX, write_cache
    from trip_reference.demo_world.clips import DemoWorldClips
    from trip_reference.training.start import start_model

    if not (folder / INDEX).exists():
        model, tokenizer_json = start_model(_config(str(vae), "none", "start", 0, 1, 1, "demo").model, 0)
        write_cache(DemoWorldClips(model.config, clips), model, tokenizer_json, folder)


def _config(vae: str, fusion: str, first_frame: str, seed: int, steps: int, batch: int, source: str) -> Any:
    from trip_reference.training.config import load_config

    quoted = {"model.vae": vae, "data.source": source}
    settings = {
        "model.preset": "demo-small",
        "model.fusion": fusion,
        "model.first_frame": first_frame,
        "vae.steps": 0,
        "data.cache": "false",
        "data.validation": "demo",
        "stages.0.steps": steps,
        "stages.0.warmup": min(50, steps // 4),
        "run.batch": batch,
        "run.seed": seed,
        "run.validate_every": steps,
        "run.validation_clips": 32,
        "run.tracker": "none",
        "optimizer.ema_decay": 0.99,
    }
    words = [f"{name}={value!r}" for name, value in quoted.items()] + [
        f"{name}={value}" for name, value in settings.items()
    ]
    return load_config("demo", None, words)


def _variant(task: tuple[Path, str, str, str, int, int, int, int, int]) -> dict[str, Any]:
    folder, vae, fusion, first_frame, seed, steps, batch, clips, judged = task
    from trip_reference import checkpoint
    from trip_reference.demo_world.verdicts import judge_clips
    from trip_reference.evaluation.clips import demo_cases, make_clips
    from trip_reference.training.run import train_run
    from trip_rt.settings import Settings

    name = f"{fusion}-{first_frame}-{seed}"
    settings = {"steps": steps, "batch": batch, "clips": clips, "judged": judged}
    path = folder / f"{name}.json"
    if path.exists() and settings.items() <= (done := json.loads(path.read_text(encoding="utf-8"))).items():
        return done
    run = folder / name
    train_run(_config(vae, fusion, first_frame, seed, steps, batch, str(folder / "latents")), run)
    cases = demo_cases(checkpoint.load_config(run), judged)
    figures = judge_clips(make_clips(run, cases, Settings(num_inference_steps=10, guidance_scale=1.0)), cases)
    records = [
        json.loads(line) for line in (run / "training" / "denoiser.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    loss = [record["validation_loss"] for record in records if "validation_loss" in record][-1]
    result = figures["all"] | {
        "fusion": fusion,
        "first_frame": first_frame,
        "seed": seed,
        **settings,
        "held_out_loss": loss,
    }
    with whole_file(path) as part:
        part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m trip_reference.ablations",
        description=(
            "Train the small demo with each fusion, first frame and seed, judge held-out clips, and print the table. "
            "Run it again to go on; finished runs are kept."
        ),
        epilog=(
            "example: python -m trip_reference.ablations -o out/ablations --seeds 3 --steps 400 --markdown"
            " out/ablations.md"
        ),
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the runs and their figures"
    )
    parser.add_argument(
        "--vae",
        type=Path,
        default=Path("checkpoints/demo"),
        metavar="CHECKPOINT",
        help="whose VAE all share (%(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="clips a step (%(default)s)")
    parser.add_argument("--clips", type=int, default=1500, help="to train on (%(default)s)")
    parser.add_argument(
        "--judged", type=int, default=48, help="held-out clips that are sampled, 10 steps each (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs side by side, on a core each (%(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table there too")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    for name in ("seeds", "steps", "batch", "clips", "judged", "jobs"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}: found {getattr(args, name)}, expected at least 1")
    results = ablate(args.output, args.vae, args.seeds, args.steps, args.batch, args.clips, args.judged, args.jobs)
    text = table(results)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    report(args, results, text)
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
