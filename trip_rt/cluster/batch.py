"""`trip-animate --batch FILE --ray`: a file full of clips, made by a pool of processes of a Ray cluster.

Ray Data reads the file, hands groups of rows to the pool and brings back what became of them. A row of its dataset is a
group of rows of the file, as bytes of msgpack. So Ray's blocks are as small as groups, and nothing is ever unpickled.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from trip_rt import backends, video
from trip_rt.bundle import read_manifest
from trip_rt.cluster.clip_maker import CLIPS, LOCK, NAMED, RESULTS, ClipMaker, Result, Work, identity_of, swept
from trip_rt.cluster.rows import Piece, Row, dealt, pieces_of, read_rows, together
from trip_rt.cluster.session import LOCAL, connected
from trip_rt.command_line import check_installed, report, settings_of
from trip_rt.errors import EngineError, InputError, one_line, printable
from trip_rt.files import whole_file
from trip_rt.launch import note
from trip_rt.manifest import Profile
from trip_rt.optical_flow import opencv
from trip_rt.settings import check_seed

_NEEDS = ("ray", "pyarrow")
_REFUSED = ("live", "then", "path", "contact_sheet", "seconds")
_PART = re.compile(r"part-\d{5,}\.parquet")
_ROWS_A_PART = 5000
_SECONDS_A_PART = 60.0
_NOTE_EVERY = 30.0  # seconds, where there is no terminal for a bar
_MOST_GROUP = 16  # rows that a process is handed at a time, but in a batch of very many
_GROUPS_A_WORKER = 8  # at least
_MOST_GROUPS = 10_000  # Ray keeps about 9 KB of each (bench/ray_batch.py)
_BYTES_A_ROW = 100_000  # of a shard, whose rows nobody counted
_READERS = 2  # pieces that are read at a time


@dataclass(frozen=True)
class Pool:
    """From `least` to `most` processes, each with `cpus` CPUs or a GPU of its own."""

    least: int
    most: int
    cpus: int
    gpu: bool


def run_on_ray(args: argparse.Namespace) -> int:
    """Make the clips: 0 where there is one for every row, 1 where some rows failed."""
    began = time.perf_counter()
    pieces, work = _asked(args)
    folder = Path(work.folder)
    with output_folder(folder):
        try:
            with quiet(), connected(args.ray):
                pool = pool_of(args.ray_workers, work.options, args.ray == LOCAL)
                if not pool.gpu:
                    work = replace(work, options=replace(work.options, threads=pool.cpus))
                counts = make_clips(pieces, work, pool, args.seed, ResultParts(folder / RESULTS))
        finally:
            swept(folder / CLIPS, tries=True)
            swept(folder / RESULTS)
    if not sum(counts.values()):
        raise InputError(f"{args.batch}: found no rows, expected a clip a row; see trip-animate --help")
    took = round(time.perf_counter() - began, 3)
    rows, failed = counts["made"] + counts["there"] + counts["failed"], counts["failed"]
    places = {name: str(folder / name) for name in (CLIPS, RESULTS)}
    text = f"{rows - failed} of {rows} rows completed ({counts['there']} without work), {failed} failed in {took:.2f} s"
    report(args, {**counts, "rows": rows, "seconds": took, **places}, f"{text}: {printable(places[RESULTS])}")
    return 1 if failed else 0


def make_clips(pieces: Sequence[Piece], work: Work, pool: Pool, seed: int, parts: ResultParts) -> Counter[str]:
    """Make the clips of all rows on the Ray that is connected, and write the results to `parts` as they come.

    Gives how many clips were "made", how many were "there" already and how many rows "failed". EngineError where Ray
    gives up.
    """
    import ray

    total = sum(piece.rows for piece in pieces)
    group = group_size(pieces, pool)
    counts = Counter(made=0, there=0, failed=0)
    try:
        with tqdm(total=total or None, desc="clips", unit="clip", disable=None, leave=False) as bar:
            noted = time.monotonic()
            for results in _streamed(pieces, work, pool, seed, group):
                for result in results:
                    failed = result.status == "failed"
                    counts["failed" if failed else "there" if result.seconds is None else "made"] += 1
                parts.add(results)
                bar.update(len(results))
                if bar.disable and time.monotonic() - noted > _NOTE_EVERY:
                    noted = time.monotonic()
                    of = f" of about {total}" if total else ""
                    note(f"{sum(counts.values())}{of} rows, {counts['failed']} of them failed")
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        kind = type(cause) if isinstance(cause, (InputError, EngineError)) else EngineError
        raise kind(f"Ray gave up: {one_line(cause, 500)}") from error
    parts.close()
    return counts


def group_size(pieces: Sequence[Piece], pool: Pool) -> int:
    """How many rows a process is handed at a time: few, so that none is idle long while the last one works, but not so
    few that what Ray keeps of every group fills the driver's memory."""
    rows = sum(piece.rows or (piece.stop - piece.start) // _BYTES_A_ROW for piece in pieces)
    fair = min(_MOST_GROUP, rows // (pool.most * _GROUPS_A_WORKER))
    return max(1, fair, rows // _MOST_GROUPS)


def _streamed(pieces: Sequence[Piece], work: Work, pool: Pool, seed: int, group: int) -> Iterator[list[Result]]:
    """What becomes of the rows, group by group, in no order.

    A process or machine that is lost costs no rows: Ray Data restarts what it ran, however often.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # here, for its import sets another level
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # a row of Ray's, which is a group of ours, is a block
    shares = dealt(pieces)
    groups = ray.data.read_datasource(
        _source(shares, seed, group), override_num_blocks=len(shares), concurrency=_READERS, num_cpus=0
    )
    results = groups.map_batches(
        _Worker,
        fn_constructor_args=(work,),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most, max_tasks_in_flight_per_actor=2),
        **({"num_gpus": 1} if pool.gpu else {"num_cpus": pool.cpus}),
    )
    decoder = msgspec.msgpack.Decoder(list[Result])
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for data in block.column("rows").to_pylist():
            yield decoder.decode(data)


class _Worker:
    """A process of the pool, as Ray Data calls it."""

    def __init__(self, work: Work):
        self._maker = ClipMaker(work)
        self._rows = msgspec.msgpack.Decoder(list[Row])

    def __call__(self, block: Any) -> Any:
        return _block([self._maker.made(self._rows.decode(data)) for data in block.column("rows").to_pylist()])


def _block(groups: Sequence[Sequence[Row | Result]]) -> Any:
    """Groups as a table of Ray's."""
    import pyarrow as pa

    return pa.table({"rows": pa.array([msgspec.msgpack.encode(group) for group in groups], pa.large_binary())})


def _source(shares: Sequence[Sequence[Piece]], seed: int, group: int) -> Any:
    """The file as Ray Data reads it: a task a share of its pieces, a block a group of rows."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def reading(share: Sequence[Piece]) -> Callable[[], Iterator[Any]]:
        def read() -> Iterator[Any]:
            for piece in share:
                for rows in together(read_rows(piece, seed), group):
                    yield _block([rows])

        return read

    def about(share: Sequence[Piece]) -> Any:
        size = sum(piece.stop - piece.start for piece in share if piece.kind != "parquet")
        return BlockMetadata(num_rows=None, size_bytes=size or None, input_files=None, exec_stats=None)

    class Rows(Datasource):
        def get_name(self) -> str:
            return "rows"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            return [ReadTask(reading(share), about(share)) for share in shares]

    return Rows()  # type: ignore[no-untyped-call]


class ResultParts:
    """The results' table, a file of some thousand rows at a time, none of which is ever seen in part."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._rows: list[Result] = []
        self._parts = 0
        self._since = time.monotonic()

    def add(self, results: Sequence[Result]) -> None:
        """More rows; they are on disk a minute later at most, if others come."""
        self._rows += results
        if len(self._rows) >= _ROWS_A_PART or time.monotonic() - self._since > _SECONDS_A_PART:
            self.close()

    def close(self) -> None:
        """Write the rows that are not written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._rows:
            kinds = {"seed": pa.uint64(), "frames": pa.int32(), "fps": pa.float64(), "seconds": pa.float64()}
            schema = pa.schema(
                [(name, kinds.get(name, pa.string())) for name in (field.name for field in fields(Result))]
            )
            with whole_file(self._folder / f"part-{self._parts:05d}.parquet") as part:
                pq.write_table(pa.Table.from_pylist([asdict(row) for row in self._rows], schema), part)
            self._parts += 1
        self._rows, self._since = [], time.monotonic()


def pool_of(workers: tuple[int, int] | None, options: backends.EngineOptions, alone: bool) -> Pool:
    """The pool on the Ray that is connected. Without `workers` it is as large as the cluster is now, and without a
    number of threads a process has those of the cluster's smallest machine. InputError where
    this machine is all of the cluster (`alone`) and has no room for one process."""
    import ray

    gpu = options.device == "cuda"
    rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cpus = options.threads or min((int(room["CPU"]) for room in rooms if room.get("CPU", 0) >= 1), default=1)
    fitting = sum(int(room.get("GPU", 0) if gpu else room.get("CPU", 0) // cpus) for room in rooms)
    if not fitting:
        lacking = "GPU" if gpu else f"{cpus} CPUs at once"
        if alone:
            raise InputError(f"--ray: found no {lacking} on this machine, expected room for a process; ask for less")
        note(f"found no {lacking} on any machine of the cluster: waiting for one that joins it")
    least, most = workers or (1, max(1, fitting))
    return Pool(least, most, cpus, gpu)


def _asked(args: argparse.Namespace) -> tuple[list[Piece], Work]:
    """What is to be made and how, checked before Ray is started."""
    check_installed(_NEEDS, "ray")
    if any(value is not None for value in (args.image, args.prompt)) or args.batch is None or args.output is None:
        raise InputError("--ray: expected --batch FILE and -o DIR, without IMAGE and PROMPT; see trip-animate --help")
    for name in _REFUSED:
        if getattr(args, name):
            option = name.replace("_", "-")
            raise InputError(f"found --{option} beside --ray, expected one or the other; leave --{option} out")
    manifest = read_manifest(args.bundle)
    profile = manifest.profile(args.profile)
    config = manifest.config_of(profile)
    settings = settings_of(args)
    settings.steps(config)
    settings.frames(config)
    if settings.picture_size(config) != (profile.height, profile.width):
        opencv()
    check_seed(args.seed)
    fps = float(manifest.config.fps if args.fps is None else args.fps)
    video.check_fps(fps)
    work = Work(
        bundle=str(args.bundle.resolve()),
        identity=identity_of(args.bundle),
        folder=os.path.realpath(args.output),
        here=os.getcwd(),
        profile=profile.name,
        backend=args.backend,
        options=_options(args, profile),
        settings=settings,
        fps=fps,
    )
    return pieces_of(args.batch), work


def _options(args: argparse.Namespace, profile: Profile) -> backends.EngineOptions:
    """How the engines are opened. The kind of device is settled here, for Ray must know what a process takes; other
    machines may have GPUs that this one lacks."""
    options = backends.EngineOptions(args.device, args.threads, cuda_graph=not args.no_cuda_graph)
    device = args.device
    if args.ray == LOCAL or device != "cuda":
        backend, _ = backends.choose(profile, args.backend, options)
        device = backends.engine_class(backend).probe(profile.engines["unet"][backend], options)
    return replace(options, device=device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of Ray's own inside."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\.")
        yield


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """The folder with its parts, for this run alone; the table of the run before is removed."""
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"{printable(str(folder))}: expected a folder, or a free name in one, for clips and results; choose another"
        )
    try:
        for name in (CLIPS, NAMED, RESULTS):
            (folder / name).mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+b")
    except OSError as error:
        raise InputError(
            f"{printable(str(folder))}: cannot write there ({error.strerror}), expected a folder for clips and results"
        ) from error
    with lock:
        try:
            # Byte 0 alone: the others stand for clips (clip_maker.py).
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError as error:
            raise InputError(
                f"{printable(str(folder))}: found that another run writes there ({error.strerror}), expected none;"
                " wait for it, or name another folder"
            ) from error
        video.output_format(folder / CLIPS / "clip.mp4")
        swept(folder / CLIPS, tries=True)
        for part in (folder / RESULTS).iterdir():
            if _PART.fullmatch(part.name):
                part.unlink()
        yield
