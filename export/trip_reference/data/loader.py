"""Clips in the order of a run. (seed, step) alone says what a step trains on, whatever the number of processes and
however often the run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from trip_reference.data.sample import BrokenClip, ClipDataset, Sample
from trip_reference.data.shards import ShardSource
from trip_reference.data.workers import follow_the_parent
from trip_rt.errors import InputError

Batch = dict[str, Any]
MOST_BROKEN = 100  # in a row


@dataclass(frozen=True)
class BatchPlan:
    """How a step's `batch` clips are divided: into `accumulation` parts, and each part among `world` processes. This
    process is number `rank`."""

    batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.accumulation * self.world):
            raise InputError(
                f"run.batch: found {self.batch} clips a step, expected a multiple of {self.accumulation} parts times"
                f" {self.world} processes"
            )

    @property
    def clips(self) -> int:
        """The number of clips in one part of one process."""
        return self.batch // (self.accumulation * self.world)

    def positions(self, part: int) -> range:
        """Which of the step's clips this process has in that part."""
        first = (part * self.world + self.rank) * self.clips
        return range(first, first + self.clips)


class OrderedBatches(Dataset[Batch]):
    """Item k is part k of the run, counted from step 0. Every epoch permutes the clips anew; a clip's own randomness
    comes from (seed, epoch, clip).

    A clip that is broken is replaced by the next that is not.
    """

    def __init__(self, clips: ClipDataset, plan: BatchPlan, seed: int, collate: Callable[[list[Sample]], Batch]):
        self.clips, self.plan, self.seed, self.collate = clips, plan, seed, collate
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        if not len(clips):
            raise InputError("data: found no clips, expected at least one")

    def __getitem__(self, k: int) -> Batch:
        step, part = divmod(k, self.plan.accumulation)
        broken: list[str] = []
        samples = [self._clip(step * self.plan.batch + position, broken) for position in self.plan.positions(part)]
        return self.collate(samples) | {"broken": broken}

    def _clip(self, number: int, broken: list[str]) -> Sample:
        for _ in range(MOST_BROKEN):
            epoch, place = divmod(number, len(self.clips))
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.clips))
            index = int(self._order[1][place])
            try:
                return self.clips.clip(index, np.random.default_rng([self.seed, epoch, index]))
            except BrokenClip as error:
                broken.append(str(error))
                number += 1
        raise InputError(f"{broken[-1]}: {MOST_BROKEN} broken clips in a row; `trip-data check` reports on a data set")


class StreamedBatches(IterableDataset[Batch]):
    """Parts read from shards. Every worker of every process reads its own shards; `start` is the position of each
    worker of this process."""

    def __init__(
        self,
        shards: ShardSource,
        plan: BatchPlan,
        seed: int,
        collate: Callable[[list[Sample]], Batch],
        workers: int,
        first: int,
        start: list[int],
    ):
        self.shards, self.plan, self.seed, self.collate = shards, plan, seed, collate
        self.workers, self.first, self.start = workers, first, start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        # DataLoader begins with its worker 0; a resumed run goes on with the worker whose turn it is.
        worker = ((info.id if info else 0) + self.first) % self.workers
        stream = self.shards.stream(
            self.plan.rank * self.workers + worker, self.plan.world * self.workers, self.seed, self.start[worker]
        )
        samples: list[Sample] = []
        broken: list[str] = []
        for position, sample in stream:
            if isinstance(sample, BrokenClip):
                broken.append(str(sample))
                if len(broken) >= MOST_BROKEN and not samples:
                    raise InputError(
                        f"{broken[-1]}: {MOST_BROKEN} broken clips in a row; `trip-data check` reports on a data set"
                    )
            else:
                samples.append(sample)
            if len(samples) == self.plan.clips:
                yield self.collate(samples) | {"broken": broken, "worker": worker, "position": position}
                samples, broken = [], []


class Loader:
    """This process's parts from `first` (counted from step 0) to `last`, in order. `state()` is the place after the
    parts taken so far."""

    def __init__(
        self,
        source: ClipDataset | ShardSource,
        plan: BatchPlan,
        seed: int,
        collate: Callable[[list[Sample]], Batch],
        first: int,
        last: int,
        workers: int = 0,
        state: list[int] | None = None,
        pin_memory: bool = False,
    ):
        self._left = last - first
        self._places = list(state or [0] * max(workers, 1))
        options: dict[str, Any] = dict(batch_size=None, num_workers=workers, pin_memory=pin_memory)
        if workers:
            options |= dict(worker_init_fn=follow_the_parent, prefetch_factor=2)
        if isinstance(source, ShardSource):
            if len(self._places) != max(workers, 1):
                raise InputError(
                    f"data.workers: found {workers}, expected {len(self._places)} as when this run began: each has its"
                    " own shards"
                )
            batches = StreamedBatches(
                source, plan, seed, collate, len(self._places), first % len(self._places), self._places
            )
            self._loader: DataLoader[Batch] = DataLoader(batches, **options)
        else:
            self._loader = DataLoader(
                OrderedBatches(source, plan, seed, collate), sampler=range(first, last), **options
            )

    def __iter__(self) -> Iterator[Batch]:
        for _, batch in zip(range(self._left), self._loader, strict=False):
            if "worker" in batch:
                self._places[batch.pop("worker")] = batch.pop("position")
            yield batch

    def state(self) -> list[int]:
        """The position of every worker in its stream of shards. Other sources need none: the step is their
        position."""
        return list(self._places)
