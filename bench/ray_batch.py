"""What Ray costs around the clips of `trip-animate --batch FILE --ray`, with an engine that only sleeps: rows a second,
and whether the driver's memory grows with their number.

    python bench/ray_batch.py DIR [--rows 10000] [--sleep 0.0005] [--workers 1:2] [--ray ADDRESS]
    [--json bench/results/NAME.json]

DIR is filled with the batch, a line a row, each of another seed; its clips are of 2 frames of 16x16. What is there
already is not made again. DIR/engine.log has a line a clip that was made. The memory is the resident set of this
process, which reads nothing but results, at every tenth of the rows. The last line on stdout is the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image
from timing import machine

from trip_rt.backends import EngineOptions
from trip_rt.cluster import batch
from trip_rt.cluster.clip_maker import CLIPS, Work
from trip_rt.cluster.rows import pieces_of
from trip_rt.cluster.session import LOCAL, connected
from trip_rt.command_line import CommandParser, fewest_and_most, main_of
from trip_rt.files import whole_file
from trip_rt.settings import Settings

SIZE = 16
_TENTHS = 10


class Sleeping:
    """What a ClipMaker needs of an Animator. A clip's latents take `sleep` seconds and leave a line with its seed in
    `log`; a clip of the prompt "die" ends the process."""

    def __init__(self, log: Path, sleep: float):
        self.config = SimpleNamespace(height=SIZE, width=SIZE, num_frames=2)
        self.profile = SimpleNamespace(batch=1)
        self._log, self._sleep = log, sleep

    def latents(
        self, pictures: NDArray[np.uint8], prompts: Sequence[str], seeds: Sequence[int], **_: Any
    ) -> NDArray[np.uint8]:
        """uint8 [n, 2], by the seed."""
        if "die" in prompts:
            os._exit(1)
        time.sleep(self._sleep)
        with self._log.open("a") as file:
            file.writelines(f"{seed}\n" for seed in seeds)
        return np.array([[seed % 256, seed // 256 % 256] for seed in seeds], np.uint8)

    def decode(self, latents: NDArray[np.uint8], picture: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Two frames, uint8 [2, H, W, 3], of even grey."""
        yield np.broadcast_to(latents[:, None, None, None], (2, SIZE, SIZE, 3)).copy()

    def close(self) -> None:
        """Nothing is open."""


def open_sleeping(work: Work) -> Sleeping:
    """The opener of such a Work as `sleeping_work` gives: the time to sleep is in the bundle's place."""
    return Sleeping(Path(work.folder) / "engine.log", float(work.bundle))


def sleeping_work(folder: Path, sleep: float) -> Work:
    """A Work whose clips go to `folder` and take no engines."""
    return Work(
        bundle=str(sleep),
        identity="",
        folder=str(folder),
        here=str(folder),
        profile="",
        backend="auto",
        options=EngineOptions("cpu", 1),
        settings=Settings(),
        fps=8.0,
        opener="ray_batch:open_sleeping",
    )


def write_batch(folder: Path, rows: int) -> Path:
    """A file of JSON Lines with so many rows, each of another seed, and their one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(folder / "photo.png")
    with (folder / "rows.jsonl").open("w") as file:
        for seed in range(rows):
            file.write(json.dumps({"image": "photo.png", "prompt": "a red ball rolls", "seed": seed}) + "\n")
    return folder / "rows.jsonl"


class _Memory(batch.ResultParts):
    """Results that go to disk, and what memory the process has at every tenth of them."""

    def __init__(self, folder: Path, rows: int):
        super().__init__(folder)
        self.megabytes: list[float] = []
        self._rows_of_all, self._seen, self._process = rows, 0, psutil.Process()

    def add(self, results: Sequence[Any]) -> None:
        super().add(results)
        self._seen += len(results)
        while len(self.megabytes) < _TENTHS * self._seen // self._rows_of_all:
            self.megabytes.append(round(self._process.memory_info().rss / 2**20, 1))


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="bench/ray_batch.py", description="Time Ray around clips that take no engines.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for the batch, its clips and results")
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="rows of the batch (%(default)s)")
    parser.add_argument("--sleep", type=float, default=0.0005, metavar="S", help="seconds a clip (%(default)s)")
    parser.add_argument("--workers", type=fewest_and_most, default=(1, 2), metavar="MIN:MAX", help="processes (1:2)")
    parser.add_argument("--ray", default=LOCAL, metavar="ADDRESS", help="a Ray cluster (one of this machine)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the clips and print the figures."""
    file = write_batch(args.folder, args.rows)
    folder = args.folder.resolve()
    with batch.output_folder(folder), batch.quiet(), connected(args.ray):
        parts = _Memory(folder / "results", args.rows)
        began = time.perf_counter()
        pool = batch.Pool(*args.workers, cpus=1, gpu=False)
        counts = batch.make_clips(pieces_of(file), sleeping_work(folder, args.sleep), pool, 0, parts)
        took = time.perf_counter() - began
    figures = {
        "what": "trip-animate --ray with an engine that sleeps",
        "rows": args.rows,
        "sleep_s": args.sleep,
        "workers": args.workers,
        **counts,
        "clips": sum(1 for _ in (folder / CLIPS).glob("*.mp4")),
        "seconds": round(took, 2),
        "rows_a_second": round(args.rows / took, 1),
        "driver_rss_mb_by_tenth": parts.megabytes,
        "machine": machine(),
    }
    if args.json:
        with whole_file(args.json) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
