"""Figures that only the demo world allows: every clip is judged against the rendered truth."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import Any

import numpy as np

from trip_reference.demo_world import world
from trip_reference.demo_world.judge import Verdict, judge
from trip_reference.evaluation.clips import Case, Clip
from trip_reference.progress import shown_progress

EVERY = "every demand"
Judged = tuple[Verdict, dict[str, bool]]


def judge_clips(clips: Sequence[Clip], cases: Sequence[Case]) -> dict[str, Any]:
    """Shares of clips that meet each demand, in percent with 95 % confidence intervals, and mean PSNRs (dB): `all`, and
    `by_motion`."""
    groups: dict[str, list[Judged]] = defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = shown_progress(pool.map(_judged, clips, cases), len(cases), "judge", "clip")
        for case, found in zip(cases, judged, strict=True):
            groups[case.motion].append(found)
    return {
        "all": _summary([row for rows in groups.values() for row in rows]),
        "by_motion": {motion: _summary(groups[motion]) for motion in world.MOTIONS if groups[motion]},
    }


def _judged(clip: Clip, case: Case) -> Judged:
    if case.scene is None:
        raise ValueError("case: found one without a scene, expected the demo world's")
    verdict = judge(clip, case.scene, case.motion)
    return verdict, verdict.checks(case.scene, case.motion)


def _summary(rows: Sequence[Judged]) -> dict[str, Any]:
    summary: dict[str, Any] = {"clips": len(rows)}
    met = {name: [checks[name] for _, checks in rows] for name in rows[0][1]}
    met[EVERY] = [all(checks.values()) for _, checks in rows]
    summary |= {name: round(100 * float(np.mean(found)), 1) for name, found in met.items()}
    for name in ("frame_1_psnr", "background_psnr", "truth_psnr"):
        summary[name] = round(float(np.mean([getattr(verdict, name) for verdict, _ in rows])), 2)
    summary["frame_1_psnr_min"] = round(min(verdict.frame_1_psnr for verdict, _ in rows), 2)
    summary["intervals"] = {name: interval(sum(found), len(found)) for name, found in met.items()}
    return summary


def interval(met: int, count: int) -> tuple[float, float]:
    """Between which percentages the share lies with 95 % confidence, where `met` of `count` were seen (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.975)
    middle, share = (met + z**2 / 2) / (count + z**2), met / count
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return round(100 * max(0.0, middle - half), 1), round(100 * min(1.0, middle + half), 1)


def table(figures: dict[str, Any]) -> str:
    """Figures as Markdown, a row a motion; the last row and column have the 95 % confidence intervals."""
    columns = [name for name in figures["all"] if name not in ("clips", "intervals")]
    lines = [
        "| | clips | " + " | ".join(columns) + f" | {EVERY}, 95 % |",
        "| --- | ---: |" + " ---: |" * (len(columns) + 1),
    ]
    for name, row in {**figures["by_motion"], "**all**": figures["all"]}.items():
        cells = [row["clips"], *(row[column] for column in columns), _span(row["intervals"][EVERY])]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    intervals = figures["all"]["intervals"]
    cells = ["", *(_span(intervals[column]) if column in intervals else "" for column in columns), ""]
    return "\n".join([*lines, "| all, 95 % | " + " | ".join(cells) + " |"])


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g} to {ends[1]:g}"
