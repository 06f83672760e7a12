"""`python -m trip_reference.evaluate_demo`: how well a demo checkpoint animates pictures it never saw, judged clip by clip."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trip_reference import checkpoint, demo_world
from trip_reference.demo_data import to_pixels
from trip_reference.demo_judge import Verdict, judge
from trip_reference.model import TripModel
from trip_reference.sampling import sample
from trip_rt.command import CommandParser, add_json_flag, main_of, report
from trip_rt.errors import InputError
from trip_rt.images import contact_sheet, to_frames
from trip_rt.sampler import initial_noise
from trip_rt.speed import Speed, loop_steps
from trip_rt.tokenizer import PromptTokenizer

BATCH = 8


@torch.no_grad()
def animate(
    model: TripModel, tokenizer: PromptTokenizer, pictures: NDArray[np.uint8], prompts: list[str], seeds: list[int], steps: int, guidance_scale: float
) -> NDArray[np.uint8]:
    """Clips uint8 [B, F, H, W, 3] of pictures uint8 [B, H, W, 3], by the oracle."""
    config = model.config
    text = model.encode_text(torch.from_numpy(tokenizer([""] * len(prompts) + prompts)))
    first_frame = model.encode_image(to_pixels(pictures))
    shape = (config.latent_channels, config.num_frames, config.latent_height, config.latent_width)
    noise = torch.from_numpy(initial_noise(seeds, shape))
    latents = sample(model, first_frame, noise, text, loop_steps(config, Speed(num_inference_steps=steps), guidance_scale))
    return np.stack([to_frames(model.decode(clip.transpose(0, 1)).numpy()) for clip in latents])


def evaluate(
    model: TripModel, tokenizer_json: str, count: int, steps: int, guidance_scale: float
) -> tuple[dict[str, Any], list[NDArray[np.uint8]], list[str]]:
    """Figures over `count` held-out clips, overall and by motion, and the clips with their captions."""
    tokenizer = PromptTokenizer(tokenizer_json, model.config.text_length)
    config = model.config
    cases = [demo_world.sample(seed, held_out=True) for seed in range(count)]

    def animate_group(start: int) -> NDArray[np.uint8]:
        group = cases[start : start + BATCH]
        pictures = np.stack([demo_world.render(scene, motion, 1, config.height)[0] for scene, motion, _ in group])
        seeds = list(range(start, start + len(group)))
        return animate(model, tokenizer, pictures, [text for _, _, text in group], seeds, steps, guidance_scale)

    starts = range(0, count, BATCH)
    # A thread a core, each running whole batches: tensors this small do not keep several cores busy.
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        groups_done = tqdm(pool.map(animate_group, starts), total=len(starts), desc="animate", unit="batch", disable=None)
        clips = [clip for group in groups_done for clip in group]
    judged = []
    for clip, (scene, motion, _) in zip(clips, cases, strict=True):
        verdict = judge(clip, scene, motion)
        judged.append((motion, verdict, verdict.checks(scene, motion)))
    groups: dict[str, list[tuple[str, Verdict, dict[str, bool]]]] = defaultdict(list)
    for row in judged:
        groups[row[0]].append(row)
    figures = {"clips": count, "num_inference_steps": steps, "guidance_scale": guidance_scale, "all": _summary(judged)}
    figures["by_motion"] = {motion: _summary(groups[motion]) for motion in demo_world.MOTIONS if groups[motion]}
    return figures, clips, [text for _, _, text in cases]


def _summary(rows: list[tuple[str, Verdict, dict[str, bool]]]) -> dict[str, Any]:
    """Shares of clips that meet each demand, in percent, and mean figures in dB."""
    summary: dict[str, Any] = {"clips": len(rows)}
    summary |= {name: round(100 * float(np.mean([checks[name] for _, _, checks in rows])), 1) for name in rows[0][2]}
    summary["every demand"] = round(100 * float(np.mean([all(checks.values()) for _, _, checks in rows])), 1)
    for name in ("frame_1_psnr", "background_psnr", "truth_psnr"):
        summary[name] = round(float(np.mean([getattr(verdict, name) for _, verdict, _ in rows])), 2)
    summary["frame_1_psnr_min"] = round(min(verdict.frame_1_psnr for _, verdict, _ in rows), 2)
    return summary


def table(figures: dict[str, Any]) -> str:
    """Figures as Markdown, a row a motion."""
    columns = [name for name in figures["all"] if name != "clips"]
    lines = ["| | clips | " + " | ".join(columns) + " |", "| --- |" + " --- |" * (len(columns) + 1)]
    for name, row in {**figures["by_motion"], "**all**": figures["all"]}.items():
        lines.append(f"| {name} | {row['clips']} | " + " | ".join(str(row[column]) for column in columns) + " |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m trip_reference.evaluate_demo",
        description="Animate held-out pictures of the demo world with a checkpoint and judge each clip. Shares are percent of clips, PSNRs dB.",
        epilog="example: python -m trip_reference.evaluate_demo checkpoints/demo --clips 200",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clips", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="DDIM steps (the checkpoint's)")
    parser.add_argument("--guidance-scale", type=float, help="(the checkpoint's)")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet of the first clips")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.clips < 1:
        raise InputError(f"clips: found {args.clips}, expected at least 1")
    model = checkpoint.from_pretrained(args.checkpoint)
    steps = model.config.num_inference_steps if args.steps is None else args.steps
    guidance_scale = model.config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    figures, clips, captions = evaluate(model, checkpoint.load_tokenizer_json(args.checkpoint), args.clips, steps, guidance_scale)
    if args.sheet:
        contact_sheet(clips[:24], labels=captions[:24]).save(args.sheet)
    report(args, figures, table(figures))
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
