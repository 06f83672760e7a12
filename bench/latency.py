"""How fast a bundle is here: every component, the whole clip at every speed, a cold start, memory; and a guided step
beside what others would run.

    python bench/latency.py BUNDLE [--checkpoint DIR --compare eager,compile,onnxruntime,openvino,inductor] [--output
    bench/results/NAME.json]

Rivals take turns, so that whatever else the machine does falls on all alike. An engine that does not agree with PyTorch
has no figures, and neither has one that beats the machine's ceiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ceiling import Ceiling, beyond
from PIL import Image
from timing import interleaved, machine, percentiles, ratio

from trip_engines.check import animator_for, precision_of
from trip_engines.parity import Parity, measure
from trip_engines.recording import Reference, guided_scale
from trip_export.record import held_out
from trip_rt import backends
from trip_rt.accuracy import psnr
from trip_rt.animator import Animator
from trip_rt.arithmetic import LESS
from trip_rt.bundle import Bundle, open_bundle
from trip_rt.command_line import CommandParser, add_json_flag, main_of
from trip_rt.components import ALL
from trip_rt.errors import EngineError, InputError
from trip_rt.launch import note
from trip_rt.manifest import Profile
from trip_rt.sampling.loop import initial_noise
from trip_rt.sampling.step import Arithmetic, hold_first_frame
from trip_rt.settings import SPEEDS, Settings

_COLD_START = Path(__file__).parent / "cold_start.py"
_PEERS = ("eager", "compile", "onnxruntime", "openvino", "inductor", "openvino-bf16", "openvino-int8")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="bench/latency.py",
        description=(
            "Time a bundle on this machine: components, clips at every speed, cold start, memory, and a guided step"
            " beside its rivals."
        ),
        epilog=(
            "example: python bench/latency.py out/demo-bundle --checkpoint checkpoints/demo --compare"
            " eager,onnxruntime,openvino"
        ),
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--checkpoint", type=Path, help="what the bundle was made from: for --compare and for PyTorch's memory"
    )
    parser.add_argument(
        "--compare",
        type=_names(_PEERS),
        default=(),
        metavar="LIST",
        help=f"rivals on the same weights, some of {','.join(_PEERS)}",
    )
    parser.add_argument(
        "--speeds",
        type=_names(tuple(SPEEDS)),
        default=tuple(SPEEDS),
        metavar="LIST",
        help=f"some of {','.join(SPEEDS)} (all)",
    )
    parser.add_argument("--backend", choices=("auto", *backends.NAMES), default="auto", help="(%(default)s)")
    parser.add_argument("--profile", metavar="NAME", help="one of the bundle's sets of shapes (its first)")
    parser.add_argument("--rounds", type=int, default=15, help="of components and steps (%(default)s)")
    parser.add_argument(
        "--clips", type=int, default=3, help="made at every speed, and cold starts; 0 for none (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (each library's choice)")
    parser.add_argument(
        "--ceiling-seconds", type=float, default=10, metavar="S", help="spent on the machine's ceiling (%(default)g)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the guided steps")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there too")
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1 or args.clips < 0:
        raise InputError(f"rounds and clips: found {args.rounds} and {args.clips}, expected at least 1 and 0")
    if args.compare and not args.checkpoint:
        raise InputError("found --compare without --checkpoint, expected the checkpoint that the bundle was made from")
    bundle = open_bundle(args.bundle)
    profile = bundle.manifest.profile(args.profile)
    options = backends.EngineOptions(device="cpu", threads=args.threads)
    backend, reason = backends.choose(profile, args.backend, options)
    parity = _parity(bundle, profile, backend)
    if not parity.passed:
        print(parity.table())
        note("bench/latency.py: parity is red, so there are no figures; export the bundle again")
        return 1
    figures: dict[str, Any] = {
        "profile": profile.name,
        "backend": backend,
        "reason": reason,
        "precision": precision_of(profile, backend),
    }
    figures |= {"machine": machine(), "parity": parity.to_json()}
    with Animator(bundle, backend, profile.name, options) as animator:
        figures["components"], figures["peak"] = _components(animator, args)
        # The ceiling is fp32's: what multiplies 8 bits may be above it.
        exact = {name: row["gflops"] for name, row in figures["components"].items() if not ALL[name].quantised}
        if impossible := beyond(exact, figures["peak"]):
            note(f"bench/latency.py: {impossible}; there are no figures")
            return 1
        if args.clips:
            figures["clips"] = _clips(animator, args.speeds, args.clips)
        if args.compare:
            figures["guided_step"] = _compared(animator, args)
        figures["engine"] = animator.describe()
    if args.clips:
        figures["cold_start"] = {speed: _cold_start(args, profile, backend, speed) for speed in args.speeds}
        if args.checkpoint:
            figures["pytorch_peak_memory_mb"] = _child(
                args.threads, "pytorch", args.checkpoint, profile.height, profile.width, 2
            )["peak_memory_mb"]
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot and args.compare:
        from plots import bars

        steps = figures["guided_step"]["milliseconds"]
        bars(args.plot, f"guided step, {profile.name}, ms (p50)", {name: row["p50"] for name, row in steps.items()})
    if not args.json:
        print(_table(figures))
    print(json.dumps(figures))
    return 0


def _parity(bundle: Bundle, profile: Profile, backend: str) -> Parity:
    if not profile.reference:
        raise InputError(
            f"{bundle.folder}: found no recording of the model, expected one; export it without --parity-steps 0"
        )
    note(f"parity of {backend}")
    animator, measured_on = animator_for(bundle, profile, backend)
    with animator:
        return measure(
            animator, Reference.load(bundle.folder / profile.reference), precision_of(profile, backend), measured_on
        )


def _components(animator: Animator, args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Milliseconds of one call of every engine, GFLOP a call and a second, and its share of the machine's peak in
    percent; and the peak, timed before and after them."""
    calls: dict[str, Callable[[], object]] = {}
    for name in animator.profile.engines:
        if engine := animator.engine(name):
            rng, device = np.random.default_rng(0), engine.device
            buffers = {
                tensor.name: device.zeros(tensor.dtype, tensor.shape)
                for tensor in (*engine.spec.inputs, *engine.spec.outputs)
            }
            for tensor in engine.spec.inputs:
                random = rng.standard_normal(tensor.shape, np.float32)
                device.write(
                    buffers[tensor.name], np.ones(tensor.shape, np.int64) if tensor.dtype == "int64" else random
                )
            calls[name] = engine.bind(buffers)
    ceiling = Ceiling(args.threads)
    ceiling.measure(args.ceiling_seconds / 2)
    seconds = interleaved(calls, args.rounds, label="components")
    ceiling.measure(args.ceiling_seconds / 2)
    peak = ceiling.peak()
    rows = {}
    for name, values in seconds.items():
        gflop = animator.engines[name].spec.gflop
        rate = gflop / float(np.median(values))
        share = round(100 * rate / peak["gflops"], 1)
        rows[name] = {**percentiles(values), "gflop": round(gflop, 3), "gflops": round(rate, 2), "peak_percent": share}
    return rows, peak


def _clips(animator: Animator, speeds: Sequence[str], count: int) -> dict[str, dict[str, float]]:
    """From picture to frames: milliseconds, how many times faster than exact, and the frames' PSNR to exact's in dB
    (peak 255)."""
    names = list(dict.fromkeys(["exact", *speeds]))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    likeness: dict[str, list[float]] = {name: [] for name in names}
    pictures, prompts = held_out(animator.config.height, animator.config.width, count)
    for seed in range(-1, count):  # the first warms up
        picture, prompt = pictures[max(0, seed)], prompts[max(0, seed)]
        clips = {}
        for name in names:
            began = time.perf_counter()
            clips[name] = animator(picture, prompt, seed=max(0, seed), speed=name).frames
            if seed >= 0:
                seconds[name].append(time.perf_counter() - began)
                likeness[name].append(psnr(clips[name], clips["exact"], 255))
    return {
        name: {
            **percentiles(seconds[name]),
            "times_faster": round(1 / ratio(seconds[name], seconds["exact"])["median"], 2),
            "psnr": round(float(np.mean(likeness[name])), 1),
        }
        for name in names
    }


def _compared(animator: Animator, args: argparse.Namespace) -> dict[str, Any]:
    """The network and a whole guided step, by the runtime as its loop does them and by its rivals."""
    import torch
    from peers import Inputs, arithmetic_of, peers, wrong

    from trip_reference import checkpoint

    config, pipeline, batch = animator.config, animator._pipeline, animator.profile.batch
    model = checkpoint.from_pretrained(args.checkpoint)
    model.config = config
    middle = Settings(guidance_scale=guided_scale(config)).steps(config)[config.num_inference_steps // 2]
    noise = initial_noise(range(batch), config.latent_shape)
    ids = np.random.default_rng(0).integers(0, 20, (2, batch, config.text_length))
    pixels = np.random.default_rng(1).uniform(-1, 1, (batch, 3, config.height, config.width)).astype(np.float32)
    pipeline.encode(*ids, pixels)
    with torch.inference_mode():
        text = model.encode_text(torch.from_numpy(ids.reshape(2 * batch, -1)))
        first = model.encode_image(torch.from_numpy(pixels))
        latents = torch.from_numpy(noise.copy())
        hold_first_frame(middle, latents, first, latents[:, :, 0].clone())
        clean, timestep = torch.cat([first, first]), torch.tensor([middle.timestep])
        inputs = Inputs(torch.cat([latents, latents]), clean, timestep, text, middle)
    device, buffers = animator.engines["unet"].device, pipeline.buffers
    less = [arithmetic for arithmetic in LESS if not animator._chooser.impossible(arithmetic)]

    def bound(arithmetic: Arithmetic) -> Callable[[], object]:
        engine = animator.engine("unet", arithmetic)
        assert engine
        tensors = (*engine.spec.inputs, *engine.spec.outputs)
        return engine.bind({tensor.name: getattr(buffers, tensor.name) for tensor in tensors})

    def step_in(arithmetic: Arithmetic) -> Callable[[], np.ndarray]:
        steps = [dataclasses.replace(middle, arithmetic=arithmetic)]

        def step() -> np.ndarray:
            pipeline.denoise(noise, steps)
            return pipeline.latents()

        return step

    step = step_in("own")
    own_networks: dict[str, Callable[[], object]] = {"trip-rt": bound("own")}
    own_steps: dict[str, Callable[[], object]] = {"trip-rt": step}
    for arithmetic in less:
        name = f"trip-rt-{arithmetic}"
        own_networks[name], own_steps[name] = bound(arithmetic), step_in(arithmetic)
    with peers(model, inputs, args.compare, args.threads) as rivals:
        left_out = {
            name: reason
            for name, peer in rivals.items()
            if (reason := wrong(peer.step()[:, :, 1:].numpy(), step()[:, :, 1:], peer.arithmetic))
        }
        for name, reason in left_out.items():
            note(f"{name}: left out: {reason}")
            del rivals[name]
        device.write(buffers.latents, inputs.latents.numpy())
        networks = interleaved(
            own_networks | {name: peer.unet for name, peer in rivals.items()}, args.rounds, label="UNet"
        )
        steps = interleaved(
            own_steps | {name: peer.step for name, peer in rivals.items()}, args.rounds, label="guided step"
        )
        about = {name: peer.about for name, peer in rivals.items()}
    return {
        "rounds": args.rounds,
        "rivals": about,
        "left_out": left_out,
        "unet_milliseconds": {name: percentiles(seconds) for name, seconds in networks.items()},
        "milliseconds": {name: percentiles(seconds) for name, seconds in steps.items()},
        "times_as_long_as_trip_rt": {
            name: ratio(seconds, steps["trip-rt"]) for name, seconds in steps.items() if name != "trip-rt"
        },
        "times_as_long_as_trip_rt_in": {
            arithmetic: {
                name: ratio(seconds, steps[f"trip-rt-{arithmetic}"])
                for name, seconds in steps.items()
                if name == "trip-rt" or (arithmetic_of(name) == arithmetic and name in rivals)
            }
            for arithmetic in less
        },
    }


def _cold_start(args: argparse.Namespace, profile: Profile, backend: str, speed: str) -> dict[str, Any]:
    """Medians of fresh processes: seconds from their start to each milestone, and their peak memory."""
    (picture,), (prompt,) = held_out(profile.height, profile.width, 1)
    with tempfile.TemporaryDirectory(prefix="trip-bench-") as folder:
        path = Path(folder) / "picture.png"
        Image.fromarray(picture).save(path)
        runs = [
            _child(args.threads, "runtime", args.bundle, backend, profile.name, speed, path, prompt)
            for _ in range(args.clips)
        ]
    seconds = {
        name: round(float(np.median([child["seconds"][name] for child in runs])), 3) for name in runs[0]["seconds"]
    }
    return {"seconds": seconds, "peak_memory_mb": float(np.median([child["peak_memory_mb"] for child in runs]))}


def _child(threads: int | None, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(_COLD_START), str(time.monotonic()), str(threads or 0), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise EngineError(f"{_COLD_START.name} {arguments[0]}: {(ran.stderr.strip().splitlines() or ['died'])[-1]}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _table(figures: dict[str, Any]) -> str:
    cpu, peak = figures["machine"]["cpu"], figures["peak"]
    lines = [
        (
            f"{figures['profile']}, {figures['precision']}, {figures['backend']} on {cpu}, at most {peak['gflops']}"
            f" GFLOP/s ({peak['library']}, {peak['shape']})"
        ),
        "",
    ]
    lines += [f"{'component, a call':<24}{'p50 ms':>10}{'p95':>10}{'p99':>10}{'GFLOP':>10}{'% of peak':>11}"]
    for name, row in figures["components"].items():
        lines.append(
            f"{name:<24}{row['p50']:>10.2f}{row['p95']:>10.2f}{row['p99']:>10.2f}{row['gflop']:>10.2f}{row['peak_percent']:>11.1f}"
        )
    if "guided_step" in figures:
        guided = figures["guided_step"]
        lines += [
            "",
            f"{'a guided step':<24}{'p50 ms':>10}{'p95':>10}{'UNet p50':>10}{'times trip-rt':>15}{'p5 to p95':>16}",
        ]
        for name, row in guided["milliseconds"].items():
            times = guided["times_as_long_as_trip_rt"].get(name)
            spread = f"{times['median']:>15.2f}{times['p5']:>9.2f} – {times['p95']:.2f}" if times else ""
            lines.append(
                f"{name:<24}{row['p50']:>10.1f}{row['p95']:>10.1f}{guided['unet_milliseconds'][name]['p50']:>10.1f}{spread}"
            )
    if "clips" in figures:
        lines += ["", f"{'a clip, warm':<24}{'p50 ms':>10}{'p95':>10}{'p99':>10}{'faster':>10}{'dB to exact':>13}"]
        for name, row in figures["clips"].items():
            lines.append(
                f"{name:<24}{row['p50']:>10.0f}{row['p95']:>10.0f}{row['p99']:>10.0f}{row['times_faster']:>9.2f}×{row['psnr']:>13.1f}"
            )
        milestones = next(iter(figures["cold_start"].values()))["seconds"]
        lines += [
            "",
            f"{'a fresh process, s to':<24}" + "".join(f"{name:>12}" for name in milestones) + f"{'peak MB':>10}",
        ]
        for name, row in figures["cold_start"].items():
            lines.append(
                f"{name:<24}"
                + "".join(f"{value:>12.2f}" for value in row["seconds"].values())
                + f"{row['peak_memory_mb']:>10.0f}"
            )
        if "pytorch_peak_memory_mb" in figures:
            lines.append(
                f"{'PyTorch':<24}" + " " * 12 * len(milestones) + f"{figures['pytorch_peak_memory_mb']:>10.0f}"
            )
    return "\n".join(lines)


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected some of {','.join(known)}")
        return names

    return parse


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
