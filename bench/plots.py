"""Pictures of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def bars(path: Path, title: str, values: Mapping[str, float]) -> None:
    """Horizontal bars, the first on top, each with its number."""
    figure, (axes,) = _figure(1, (7, 0.6 + 0.5 * len(values)))
    drawn = axes.barh(list(values), list(values.values()), color=["tab:blue"] + ["tab:gray"] * (len(values) - 1))
    axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def scaling(path: Path, panels: Sequence[tuple[str, str, Sequence[float], Mapping[str, Sequence[float]]]]) -> None:
    """Log-log lines, a panel each: title, label of x, x, and y by name."""
    figure, all_axes = _figure(len(panels), (4.5 * len(panels), 4))
    for axes, (title, label, x, lines) in zip(all_axes, panels, strict=True):
        for name, y in lines.items():
            axes.loglog(x, y, "o-", base=2, label=name)
        axes.set(title=title, xlabel=label)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # without pyplot, and so without a display or a state of its own

    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(1, columns, index + 1) for index in range(columns)]
