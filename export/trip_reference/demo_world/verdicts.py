"""Figures that only the demo world allows: every clip is judged against the rendered truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from trip_reference.demo_world import world
from trip_reference.demo_world.judge import Verdict, judge
from trip_reference.evaluation.clips import Case, Clip

Judged = tuple[Verdict, dict[str, bool]]


def judge_clips(clips: Sequence[Clip], cases: Sequence[Case]) -> dict[str, Any]:
    """Shares of clips that meet each demand (percent) and mean PSNRs (dB): `all`, and `by_motion`."""
    groups: dict[str, list[Judged]] = defaultdict(list)
    for clip, case in zip(clips, cases, strict=True):
        if case.scene is None:
            raise ValueError("case: found one without a scene, expected the demo world's")
        verdict = judge(clip, case.scene, case.motion)
        groups[case.motion].append((verdict, verdict.checks(case.scene, case.motion)))
    return {
        "all": _summary([row for rows in groups.values() for row in rows]),
        "by_motion": {motion: _summary(groups[motion]) for motion in world.MOTIONS if groups[motion]},
    }


def _summary(rows: Sequence[Judged]) -> dict[str, Any]:
    summary: dict[str, Any] = {"clips": len(rows)}
    summary |= {name: round(100 * float(np.mean([checks[name] for _, checks in rows])), 1) for name in rows[0][1]}
    summary["every demand"] = round(100 * float(np.mean([all(checks.values()) for _, checks in rows])), 1)
    for name in ("frame_1_psnr", "background_psnr", "truth_psnr"):
        summary[name] = round(float(np.mean([getattr(verdict, name) for verdict, _ in rows])), 2)
    summary["frame_1_psnr_min"] = round(min(verdict.frame_1_psnr for verdict, _ in rows), 2)
    return summary


def table(figures: dict[str, Any]) -> str:
    """Figures as Markdown, a row a motion."""
    columns = [name for name in figures["all"] if name != "clips"]
    lines = ["| | clips | " + " | ".join(columns) + " |", "| --- |" + " --- |" * (len(columns) + 1)]
    for name, row in {**figures["by_motion"], "**all**": figures["all"]}.items():
        lines.append(f"| {name} | {row['clips']} | " + " | ".join(str(row[column]) for column in columns) + " |")
    return "\n".join(lines)
