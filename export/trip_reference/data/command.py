"""`trip-data`: check, make, pack and encode training data."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trip_rt.command_line import CommandParser, add_json_flag, main_of, report, size_of
from trip_rt.errors import InputError, printable
from trip_rt.launch import note
from trip_rt.signals import held


class _Parser(CommandParser):
    """argparse has no intermixed form of subcommands."""

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        return self.parse_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trip-data",
        description="Look after training data: a folder of videos with annotations.json, or WebDataset shards.",
        epilog=(
            "example: trip-data demo clips --clips 200 --val-clips 20 && trip-data check clips && trip-data pack clips"
            " -o shards"
        ),
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in (add_check_parser, add_demo_parser, add_pack_parser, add_cache_parser):
        add(commands)
    return parser


def run(args: argparse.Namespace) -> int:
    return args.run(args)


def add_check_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="decode one clip of every video and report what is there and what is broken",
        description=(
            "Decode one clip of every video; report lengths, sizes, captions and what is broken. Exits with 1 if"
            " anything is."
        ),
        epilog="example: trip-data check data --frames 16 --size 256x256 --fps 4",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with annotations.json, or with shards")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="say which words its tokenizer does not know; it has frame number and size too",
    )
    _add_shape(parser, "the checkpoint's, or 16", "the checkpoint's, or 256x256")
    _add_rate(parser)
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="decoding processes, 0 for none but this (one for each core)"
    )
    add_json_flag(parser)
    parser.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    with held():
        from trip_reference.data.check import broken_count, check_folder
        from trip_reference.data.sample import ClipFormat

    frames, (height, width), tokenizer_json = 16, (256, 256), None
    if args.checkpoint:
        with held():
            from trip_reference import checkpoint

        trip, tokenizer_json = checkpoint.load_config(args.checkpoint), checkpoint.load_tokenizer_json(args.checkpoint)
        frames, height, width = trip.num_frames, trip.height, trip.width
    height, width = args.size or (height, width)
    frames = frames if args.frames is None else args.frames
    clip = ClipFormat(frames, height, width, args.fps, args.stride)
    figures = check_folder(args.folder, clip, args.workers, tokenizer_json)
    broken = broken_count(figures)
    sections = [_table(split, figures[split]) for split in ("train", "val") if figures[split]]
    if figures["unused_videos"]["count"]:
        sections.append("\n".join(_list("videos that no annotation names", figures["unused_videos"])))
    verdict = f"{broken} broken" if broken else "nothing broken"
    report(args, figures, "\n\n".join([*sections, f"{printable(str(args.folder))}: {verdict}"]))
    return 1 if broken else 0


def add_demo_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="write the demo world as a data set of real files",
        description=(
            "Write clips of the demo world as .mp4 files with annotations, or as shards; validation has combinations"
            " that training lacks."
        ),
        epilog="example: trip-data demo clips --clips 2000 --val-clips 100",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--clips", type=int, default=200, metavar="N", help="clips to train on (%(default)s)")
    parser.add_argument("--val-clips", type=int, default=20, metavar="M", help="clips for validation (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (%(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip (%(default)s)")
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second (%(default)s)")
    parser.add_argument("--shards", action="store_true", help="write DIR/*.tar and, for validation, DIR/val/*.tar")
    parser.set_defaults(run=run_demo, json=False)


def run_demo(args: argparse.Namespace) -> int:
    from trip_reference.data.new_folder import new_folder
    from trip_reference.data.shards import write_shards
    from trip_reference.demo_world.clips import write_demo_folder

    shape = (args.clips, args.val_clips, args.size, args.frames, args.fps)
    if not args.shards:
        write_demo_folder(args.folder, *shape)
    else:
        with (
            new_folder(args.folder) as draft,
            tempfile.TemporaryDirectory(dir=draft.parent, prefix=".trip-") as temporary,
        ):
            videos = Path(temporary) / "videos"
            write_demo_folder(videos, *shape)
            write_shards(_files(videos, "annotations.json"), draft)
            if args.val_clips:
                write_shards(_files(videos, "val_annotations.json"), draft / "val")
    report(
        args, None, f"{printable(str(args.folder))}: {args.clips} clips to train on, {args.val_clips} for validation"
    )
    return 0


def add_pack_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pack",
        help="turn a folder of videos into shards",
        description=(
            "Copy the videos and sentences of a folder into WebDataset shards, which many machines read faster than"
            " single files."
        ),
        epilog="example: trip-data pack data -o shards --per-shard 500",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with annotations.json")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="SHARDS", help="folder to write, new or empty"
    )
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="clips of a shard (%(default)s)")
    parser.add_argument(
        "--annotations",
        default="annotations.json",
        metavar="FILE",
        help="or val_annotations.json, into a folder of its own (%(default)s)",
    )
    parser.set_defaults(run=run_pack, json=False)


def run_pack(args: argparse.Namespace) -> int:
    from trip_reference.data.shards import write_shards

    count = write_shards(_files(args.folder, args.annotations), args.output, args.per_shard)
    report(args, None, f"{printable(str(args.output))}: {count} shard{'s' if count > 1 else ''}")
    return 0


def add_cache_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "cache",
        help="encode clips once, for training that reads latents",
        description=(
            "Encode a clip of every video with a checkpoint's VAE, and with --text its sentence too, for trip-train"
            " --data CACHE."
        ),
        epilog="example: trip-data cache data checkpoints/start -o cache --text",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with annotations.json")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="whose encoders, frame number and size are used"
    )
    _add_shape(parser, "the checkpoint's", "the checkpoint's")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="CACHE", help="folder to write, new or empty"
    )
    parser.add_argument(
        "--text", action="store_true", help="encode the sentences too; the text encoder then stays frozen in training"
    )
    parser.add_argument(
        "--motion",
        action="store_true",
        help="with each clip's optical flow, for trip-train --recipe control; needs trip-rt[larger]",
    )
    parser.add_argument(
        "--unknown-words",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the words that the checkpoint's tokenizer may not know (%(default)s)",
    )
    _add_rate(parser)
    parser.add_argument("--crop", choices=("centre", "random"), default="centre", help="(%(default)s)")
    parser.add_argument("--start", choices=("first", "random"), default="random", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random crops and starts (%(default)s)")
    parser.add_argument(
        "--annotations", default="annotations.json", metavar="FILE", help="or val_annotations.json (%(default)s)"
    )
    parser.set_defaults(run=run_cache, json=False)


def run_cache(args: argparse.Namespace) -> int:
    with held():
        import torch

        from trip_reference import checkpoint
        from trip_reference.data.cache import write_cache
        from trip_reference.data.folder import VideoFolder
        from trip_reference.data.motion import WithMotion
        from trip_reference.data.sample import ClipDataset, ClipFormat
        from trip_reference.data.words import sentences_of, words_of
        from trip_reference.shape import reshaped

    trip, multiple = checkpoint.load_config(args.checkpoint), checkpoint.latent_multiple(args.checkpoint)
    trip = reshaped(trip, multiple, args.frames, *(args.size or (None, None)))
    tokenizer_json = checkpoint.load_tokenizer_json(args.checkpoint)
    clip = ClipFormat(trip.num_frames, trip.height, trip.width, args.fps, args.stride, args.crop, args.start)
    clips: ClipDataset = VideoFolder(args.folder, clip, args.annotations)
    if args.motion:
        clips = WithMotion(clips, trip)
    words = words_of(tokenizer_json, sentences_of(clips))
    words.check(args.unknown_words, "train a text encoder of your own first, or allow it with --unknown-words 1")
    note(f"words: {words}")
    model = checkpoint.from_pretrained(args.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    model.config = trip
    broken = write_cache(clips, model, tokenizer_json, args.output, args.seed, args.text)
    report(
        args, None, f"{printable(str(args.output))}: {len(clips) - broken} clips encoded, {broken} broken ones left out"
    )
    return 0


def _files(folder: Path, annotations: str) -> Iterator[tuple[str, bytes, str]]:
    """The (key, video, sentence) that annotations list, as `write_shards` takes them."""
    from tqdm import tqdm

    from trip_reference.data.annotations import read_annotations

    for number, entry in enumerate(tqdm(read_annotations(folder, annotations), desc="pack", unit="clip", disable=None)):
        if not entry.video.is_file():
            found = f"found no such file, which {annotations} names on line {entry.line}"
            raise InputError(
                f"{printable(str(entry.video))}: {found}, expected a video; `trip-data check` finds all that are"
                " missing"
            )
        yield f"{number:08d}", entry.video.read_bytes(), entry.text


def _add_shape(parser: argparse.ArgumentParser, frames: str, size: str) -> None:
    parser.add_argument("--frames", type=_count, metavar="N", help=f"frames of a clip ({frames})")
    parser.add_argument("--size", type=size_of, metavar="WxH", help=f"picture size in pixels ({size})")


def _add_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second (%(default)s)")
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="take every N-th of these frames (%(default)s)"
    )


def _table(split: str, figures: dict[str, Any]) -> str:
    seconds, words = figures["seconds"], figures["caption_words"]
    rows = {
        "videos": f"{figures['videos']}, {figures['bytes'] / 2**20:.1f} MiB",
        "seconds": f"{_spread(seconds)}, {seconds['total']:g} in all",
        "short": f"{figures['short']}, padded with their last frame" if figures["short"] else "none",
        "resolutions": ", ".join(f"{size} ({count})" for size, count in figures["resolutions"].items()),
        "fps": ", ".join(f"{fps} ({count})" for fps, count in figures["fps"].items()),
        "captions": f"{figures['captions']}, {figures['duplicate_captions']} of them repeated",
        "words": _spread(words),
    }
    if figures["vocabulary"]:
        rows["vocabulary"] = figures["vocabulary"]["in_words"]
    broken = _list("broken", figures["broken"]) if figures["broken"]["count"] else ["broken: none"]
    return "\n".join(
        [split, *(f"  {name:<12} {value}" for name, value in rows.items()), *(f"  {line}" for line in broken)]
    )


def _spread(values: dict[str, Any]) -> str:
    return (
        "none"
        if values["min"] is None
        else f"{values['min']:g} to {values['max']:g}, median {values['median']:g}, p95 {values['p95']:g}"
    )


def _list(title: str, named: dict[str, Any]) -> list[str]:
    rest = named["count"] - len(named["first"])
    return [
        f"{title}: {named['count']}",
        *(f"  {name}" for name in named["first"]),
        *([f"  and {rest} more"] if rest else []),
    ]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 on")
    return int(text)


main = main_of(build_parser, run)
