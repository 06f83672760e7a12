"""The figures of an evaluation as Markdown, beside the paper's."""

from __future__ import annotations

from typing import Any

from trip_reference.demo_world.verdicts import table

# TRIP (arXiv 2403.17005), table 1: WebVid-10M.
PAPER = {"F-Consistency4": 95.36, "F-Consistency-all": 96.41, "FVD": 38.9}


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown, beside the paper's."""
    lines = ["| | measured | the paper, WebVid-10M |", "| --- | --- | --- |"]
    rows = {
        name: figures.get(name)
        for name in ("F-Consistency4", "F-Consistency-all", "FVD", "FID", "frame 1, dB", "frame 1 at worst, dB")
    }
    for name, figure in rows.items():
        value = figure["value"] if isinstance(figure, dict) else figure
        lines.append(f"| {name} | {'not measured' if value is None else f'{value:.2f}'} | {PAPER.get(name, '')} |")
    how = f"{figures['steps']} steps, guidance {figures['guidance_scale']:g}" if "steps" in figures else "made earlier"
    about = (
        f"{figures['clips']} clips of {figures['frames']} frames, {figures['width']}×{figures['height']},"
        f" {figures['data']}; {how}."
    )
    notes = [about, "Figures of other data, networks or clip counts cannot be compared with the paper's."]
    for name in ("FVD", "FID"):
        if figure := figures.get(name):
            limit = (
                f", {figure['extrapolated']:.2f} when continued to endless data"
                if figure.get("extrapolated") is not None
                else ""
            )
            bias = "; so few for that width that it is biased upwards" if figure["biased"] else ""
            count = f"{figure['clips']} clips" if "clips" in figure else f"{figure['frames']} frames"
            notes.append(
                f"{name}: {figure['feature_width']} features of {count} at {figure['size']}×{figure['size']}"
                f"{bias}{limit}."
            )
    for name, option in figures["left_out"].items():
        notes.append(f"{name} needs {option}.")
    text = "\n".join(lines) + "\n\n" + "\n".join(notes)
    if "demo" in figures:
        text += "\n\n" + table(figures["demo"])
    return text
