"""What a run reports: a line of JSON every few steps, the same figures to a tracker and to whoever watches, and
warnings about broken clips."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from trip_reference.progress import Progress
from trip_rt.files import whole_file
from trip_rt.launch import note
from trip_rt.process_memory import peak_memory_mb

MOST_WARNINGS = 20


class Log:
    """Appends to `path`; `batch` is the clips of a step, over all processes."""

    def __init__(self, accelerator: Accelerator, path: Path, batch: int, every: int):
        self.accelerator, self.path, self.batch, self.every = accelerator, path, batch, every
        self.broken = 0
        self._losses: list[float] = []
        self._since = time.monotonic()
        self._waited = 0.0

    def step(
        self,
        done: int,
        loss: float,
        norm: float,
        groups: Sequence[dict[str, Any]],
        waited: float,
        last: bool,
        progress: Progress,
    ) -> None:
        """Record a step; report at every `every`-th step and at the last."""
        self._losses.append(loss)
        if done % self.every and not last:
            return
        seconds = time.monotonic() - self._since
        record = {
            "step": done,
            "loss": round(float(np.mean(self._losses)), 6),
            "gradient_norm": round(norm, 6),
            "lr": max(group["lr"] for group in groups),
            "clips_per_second": round(len(self._losses) * self.batch / seconds, 3),
            "waited_for_data": round((waited - self._waited) / seconds, 4),
            "peak_memory_mb": round(peak_memory()),
        }
        self.write(record)
        progress.say(
            "loss {loss:.4g}, rate {lr:.2g}, {clips_per_second:.3g} clips/s, data {waited_for_data:.0%},"
            " {peak_memory_mb} MB".format(**record)
        )
        self._losses, self._since, self._waited = [], time.monotonic(), waited

    def rewind(self, step: int) -> None:
        """Remove the records of later steps, which are going to be repeated."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            with whole_file(self.path) as part:
                part.write_text("".join(kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One record to the file and the tracker."""
        self.accelerator.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def warn_of(self, broken: Iterable[str]) -> None:
        """Warn of each clip that could not be read, up to MOST_WARNINGS; further ones are counted only."""
        for message in broken:
            self.broken += 1
            if self.broken <= MOST_WARNINGS:
                more = "; further ones are only counted" if self.broken == MOST_WARNINGS else ""
                with tqdm.external_write_mode():
                    note(f"warning: left out: {message}{more}")


def peak_memory() -> float:
    """The peak memory of this process in MB: GPU memory where there is a GPU, else the machine's."""
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak_memory_mb()
