"""`trip-imagine`: words to a picture, and on to a clip."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from trip_pictures.pictures import Control, make_picture
from trip_rt import images, video
from trip_rt.bundle import read_manifest
from trip_rt.checks import real_number, whole_number
from trip_rt.command_line import CommandParser, add_json_flag, add_settings, main_of, report, settings_of, size_of
from trip_rt.errors import InputError, printable
from trip_rt.launch import note
from trip_rt.settings import MAX_GUIDANCE_SCALE, check_prompt, check_seed

if TYPE_CHECKING:
    from trip_pictures.pipelines import Kind

MIN_SIDE, MAX_SIDE = 8, 4096  # pixels


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-imagine",
        usage="%(prog)s WORDS --model DIR -o PICTURE.png [options]\n"
        "       %(prog)s WORDS --model DIR --then PROMPT --bundle BUNDLE -o CLIP [options]",
        description=(
            "Make a picture from words by an image model of diffusers, and animate it. Options without `picture` in"
            " their names say how the clip is made, as in trip-animate."
        ),
        epilog="""examples:
  trip-imagine "a red ball on sand" --model stable-diffusion-xl -o ball.png
  trip-imagine "a red ball on sand" --then "the ball rolls left" --model sdxl --bundle bundle -o clip.mp4
  trip-imagine "make it blue" --edit photo.png --model instruct-pix2pix -o blue.png
  trip-imagine "a house" --control canny sketch.png --control-model controlnet-canny --model sd15 -o house.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", metavar="WORDS", help="what the picture shows or, with --edit, what is to change")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder of a diffusers pipeline, or a hub id such as owner/name"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a .png or, with --then, the clip")
    parser.add_argument("--then", metavar="PROMPT", help="animate the picture: the sentence that says what happens")
    parser.add_argument("--bundle", type=Path, help="what animates it, as trip-export writes it")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="with --then: keep the picture too")
    parser.add_argument("--edit", metavar="FILE", help="a picture to change, by an InstructPix2Pix model")
    parser.add_argument(
        "--control",
        nargs=2,
        metavar=("KIND", "FILE"),
        help="canny: follow a picture's edges; depth: follow a map of depths, near white",
    )
    parser.add_argument("--control-model", metavar="DIR", help="the ControlNet for --control, a folder or a hub id")
    parser.add_argument("--picture-steps", type=int, metavar="N", help="(the pipeline's own)")
    parser.add_argument("--picture-guidance-scale", type=float, metavar="G", help="(the pipeline's own)")
    parser.add_argument("--picture-size", type=size_of, metavar="WxH", help="in pixels (the model's own)")
    parser.add_argument("--picture-negative-prompt", default="", metavar="T", help="what the picture should not show")
    add_settings(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of picture and clip (%(default)s)")
    parser.add_argument("--fps", type=float, metavar="F", help="frames a second of the clip (the model's own)")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    kind = _check(args)
    settings = settings_of(args)
    fps = 0.0
    if args.then is not None:
        config = read_manifest(args.bundle).config
        settings.steps(config)
        fps = float(config.fps if args.fps is None else args.fps)
        video.check_fps(fps)
    from PIL import Image

    from trip_pictures.pipelines import open_pipeline

    pipeline = open_pipeline(args.model, kind, args.control_model)
    note(f"picture: {type(pipeline).__name__} on {pipeline.device}")
    picture = make_picture(
        pipeline,
        args.words,
        edited=args.edit,
        control=args.control and tuple(args.control),
        size=args.picture_size,
        steps=args.picture_steps,
        guidance_scale=args.picture_guidance_scale,
        negative_prompt=args.picture_negative_prompt,
        seed=args.seed,
    )
    del pipeline  # its memory, before the engines take theirs
    seconds = {"picture": round(time.perf_counter() - began, 3)}
    kept = Path(args.output) if args.then is None else args.picture
    if kept is not None:
        images.save_png(Image.fromarray(picture), kept)
    figures: dict[str, Any] = {"words": args.words, "seed": args.seed, "picture": kept and str(kept)}
    figures["size"] = f"{picture.shape[1]}x{picture.shape[0]}"
    text = f"{printable(str(kept))}: {figures['size']}" if kept else f"a picture of {figures['size']}"
    if args.then is not None:
        from trip_rt.animator import Animator

        with Animator(args.bundle) as animator:
            note(f"clip: {animator.backend}")
            clip = animator(picture, args.then, seed=args.seed, settings=settings)
        clip.save(args.output, fps)
        seconds["clip"] = round(time.perf_counter() - began - seconds["picture"], 3)
        figures |= {"prompt": args.then, "output": args.output, "frames": len(clip.frames), "fps": fps}
        text += f"\n{printable(args.output)}: {len(clip.frames)} frames at {fps:g} a second"
    took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    report(args, figures | {"seconds": seconds}, f"{text} ({took})")
    return 0


def _check(args: argparse.Namespace) -> Kind:
    """Everything that can be wrong without opening a model; which kind of model is asked for."""
    check_prompt(args.words)
    check_seed(args.seed)
    if args.picture_steps is not None:
        whole_number("picture steps", args.picture_steps, 1, 1000)
    if args.picture_guidance_scale is not None:
        real_number("picture guidance scale", args.picture_guidance_scale, 0, MAX_GUIDANCE_SCALE)
    for side in args.picture_size or ():
        whole_number("picture size", side, MIN_SIDE, MAX_SIDE)
    if args.then is None:
        for option, given in (("--bundle", args.bundle), ("--picture", args.picture), ("--fps", args.fps)):
            if given is not None:
                raise InputError(f"found {option} without --then, expected both or neither; see trip-imagine --help")
        images.check_png(Path(args.output), "the picture")
    else:
        check_prompt(args.then)
        if args.bundle is None:
            raise InputError("found --then without --bundle, expected the bundle that animates the picture")
        video.output_format(args.output)
        if args.picture is not None:
            images.check_png(args.picture, "the picture")
    if (args.control is None) != (args.control_model is None):
        raise InputError("found one of --control and --control-model, expected both or neither")
    if args.control and args.control[0] not in get_args(Control):
        raise InputError(f"control: found {printable(args.control[0])!r}, expected {' or '.join(get_args(Control))}")
    if args.control and args.edit:
        raise InputError("found --control beside --edit, expected one or the other")
    for source in filter(None, (args.edit, args.control and args.control[1])):
        images.load_image(source, 8, 8)  # it can be read; its size is the model's to say
    return "edit" if args.edit else "control" if args.control else "words"


main = main_of(build_parser, run)
