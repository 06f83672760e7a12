"""`python -m trip_reference.demo_world.diagnosis`: where a checkpoint's clean latents are wrong, by timestep, place,
motion and frame, on held-out clips."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trip_reference import checkpoint
from trip_reference.demo_world import world
from trip_reference.evaluation.clips import BATCH, by_batches, demo_cases
from trip_reference.model import TripModel
from trip_reference.sampling import sample
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.config import TripConfig
from trip_rt.errors import InputError
from trip_rt.sampling.loop import initial_noise
from trip_rt.sampling.schedule import alpha_bars
from trip_rt.settings import Settings
from trip_rt.tokenizer import PromptTokenizer

TIMESTEPS = (999, 900, 800, 600, 400, 200, 50)  # of 1000; other schedules are asked at the same shares
SAMPLED = "sampled"
QUARTERS = 4  # of a clip's frames


def diagnose(folder: Path, count: int, first_seed: int, settings: Settings, sampled: bool = True) -> dict[str, Any]:
    """RMS errors of the clean latents of `count` held-out clips: one step from the true latents noised to each
    timestep, without guidance, and after sampling by `settings`.

    A row for each timestep and one for `sampled`, each with `all`, the places `object`, `edge` and `background`, each
    motion, and the quarters of the clip. A latent is an edge where the shape covers a part of its pixels.
    """
    model = checkpoint.from_pretrained(folder)
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer_json(folder), model.config.text_length, model.vocabulary)
    cases = demo_cases(model.config, count, first_seed)
    steps = settings.steps(model.config) if sampled else []

    @torch.no_grad()
    def errors(start: int) -> dict[str, Tensor]:  # by row, each [B, F, h, w]
        group = cases[start : start + BATCH]
        latents = torch.stack([model.encode_clip(torch.from_numpy(case.clip)) for case in group])
        text = model.encode_text(torch.from_numpy(tokenizer([""] * len(group) + [case.prompt for case in group])))
        seeds = range(first_seed + start, first_seed + start + len(group))
        noise = torch.from_numpy(initial_noise(list(seeds), model.config.latent_shape))
        found = {str(t): clean_latents(model, latents, noise, t, text[len(group) :]) for t in timesteps}
        if sampled:
            found[SAMPLED] = sample(model, latents[:, :, 0], noise, text, steps)
        return {name: (clean - latents).square().mean(1) for name, clean in found.items()}

    timesteps = [t * model.config.schedule.num_train_timesteps // 1000 for t in TIMESTEPS]
    parts = by_batches(errors, count, "diagnose")
    regions = _regions([(case.scene, case.motion) for case in cases if case.scene], model.config).items()
    return {
        "clips": count,
        "first_seed": first_seed,
        "rows": {
            row: {region: _rms(torch.cat([part[row] for part in parts]).numpy(), where) for region, where in regions}
            for row in parts[0]
        },
    }


def clean_latents(model: TripModel, latents: Tensor, noise: Tensor, timestep: int, text: Tensor) -> Tensor:
    """What the model takes the clean latents [B, C, F, h, w] to be, from the true ones noised to `timestep`; text:
    [B, L, D]."""
    alpha_bar = torch.tensor([alpha_bars(model.config.schedule)[timestep]])
    signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    noised, at = signal * latents + sigma * noise, torch.tensor([timestep])
    residual = model.residual_unet(noised, latents[:, :, 0], at, text)
    predicted = model.fusion(noised, latents[:, :, 0], residual, signal, sigma, at)
    return (noised - sigma * predicted) / signal


def _regions(scenes: Sequence[tuple[world.Scene, str]], config: TripConfig) -> dict[str, NDArray[np.bool_]]:
    """Where to look, each bool [N, F, h, w]; frame 1, which is given, is nowhere."""
    factor, frames = config.vae_scale_factor, config.num_frames
    covers = np.stack([world.mask(scene, motion, frames, config.height) for scene, motion in scenes])
    count, height, width = len(covers), config.height // factor, config.width // factor
    cover = covers.reshape(count, frames, height, factor, width, factor).mean((3, 5))
    made = np.broadcast_to((np.arange(frames) > 0)[:, None, None], cover.shape)
    edge = (cover > 0.01) & (cover < 0.99)
    regions = {"all": made, "object": made & (cover >= 0.99), "edge": made & edge, "background": made & (cover <= 0.01)}
    motions = np.array([motion for _, motion in scenes])[:, None, None, None]
    regions |= {motion: made & (motions == motion) for motion in world.MOTIONS}
    quarter = (np.arange(frames) * QUARTERS // frames)[:, None, None]
    return regions | {f"quarter {i + 1}": made & (quarter == i) for i in range(QUARTERS)}


def _rms(squares: NDArray[np.float32], where: NDArray[np.bool_]) -> float | None:
    return round(float(np.sqrt(squares[where].mean())), 4) if where.any() else None


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """The errors as Markdown, a row a timestep."""
    columns = list(next(iter(rows.values())))
    lines = ["| t | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in rows.items():
        cells = ["" if row[column] is None else f"{row[column]:.3f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m trip_reference.demo_world.diagnosis",
        description=(
            "RMS errors of a checkpoint's clean latents on held-out clips of the demo world: one step from the true"
            " noised latents at several timesteps, and after sampling."
        ),
        epilog="example: python -m trip_reference.demo_world.diagnosis checkpoints/demo --clips 64",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--clips", type=int, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="of the clips; their noise has it too (%(default)s)"
    )
    parser.add_argument("--no-sampling", action="store_true", help="leave out the sampled clips, which take longest")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.clips < 1 or args.first_seed < 0:
        raise InputError(f"clips: found {args.clips} from seed {args.first_seed}, expected at least 1 from 0 or more")
    figures = diagnose(args.checkpoint, args.clips, args.first_seed, Settings(), not args.no_sampling)
    report(args, figures, table(figures["rows"]))
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
