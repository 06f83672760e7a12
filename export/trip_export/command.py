"""`trip-export` and `trip-parity`."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trip_rt import backends
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report, size_of
from trip_rt.components import QUANTISED
from trip_rt.errors import InputError
from trip_rt.launch import note
from trip_rt.process_memory import peak_memory_mb
from trip_rt.signals import held

if TYPE_CHECKING:
    from trip_export.export import ExportResult
    from trip_export.plan import ExportOptions


def build_export_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-export",
        usage="%(prog)s CHECKPOINT -o BUNDLE [options]\n       %(prog)s --check BUNDLE",
        description=(
            "Export a checkpoint to a bundle of engines, and measure that they agree with PyTorch. What is unchanged is"
            " reused."
        ),
        epilog=(
            "examples: trip-export checkpoints/demo -o bundle; trip-export checkpoints/demo -o bundle --backend"
            " openvino --add; trip-export checkpoints/demo -o rtx --fp16 --backend tensorrt-rtx --gpus 8.6,8.9,12.0;"
            " trip-export --check rtx"
        ),
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="checkpoint folder, as trip-train writes it"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="bundle folder to write")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="BUNDLE",
        help="verify a bundle, open all of it that can run here, and compare with its reference",
    )
    precision = parser.add_mutually_exclusive_group()
    for name in ("fp16", "bf16"):
        precision.add_argument(
            f"--{name}",
            dest="precision",
            action="store_const",
            const=name,
            help=f"{name} where measured error allows it",
        )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="UNets in int8 beside those in fp32 or, in plans, fp16: trip-animate's faster speeds take them where they"
        " are faster and close enough to PyTorch",
    )
    parser.add_argument(
        "--fp8",
        action="store_true",
        help="the same in fp8 (E4M3), in plans for GPUs of compute capability 8.9 and later",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help=(
            f"{', '.join(backends.NAMES)}; may be given several times (openvino and onnxruntime in fp32, onnxruntime in"
            " half precision)"
        ),
    )
    parser.add_argument(
        "--control",
        type=Path,
        metavar="DIR",
        help="a control trained beside this checkpoint's UNet (trip-train --recipe control), by which a drawn path"
        " steers clips",
    )
    parser.add_argument("--batch", type=int, default=1, help="clips animated at a time (%(default)s)")
    parser.add_argument("--frames", type=int, help="frames of a clip (the checkpoint's)")
    parser.add_argument("--size", type=size_of, metavar="WxH", help="picture size in pixels (the checkpoint's)")
    parser.add_argument(
        "--add", action="store_true", help="keep what the bundle already holds: other backends, other shapes"
    )
    parser.add_argument(
        "--parity-steps",
        type=int,
        metavar="N",
        help="denoising steps that parity compares, 0 for none (the model's own number)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="what inductor compiles for (a GPU where there is one)"
    )
    parser.add_argument(
        "--gpus",
        type=_gpus,
        metavar="LIST",
        help=(
            "compute capabilities to compile the fused kernel and tensorrt-rtx's plans for, such as 8.6,8.9,12.0; all;"
            " none: no kernel, plans for all (all, with triton)"
        ),
    )
    parser.add_argument(
        "--no-speedups",
        action="store_true",
        help="leave out the engines that only trip-animate's approximate and unguided steps need",
    )
    parser.add_argument(
        "--plan-per-gpu",
        action="store_true",
        help="tensorrt-rtx: a plan for each of --gpus, in place of one for them all",
    )
    tensorrt = parser.add_argument_group("TensorRT")
    tensorrt.add_argument(
        "--workspace", type=float, metavar="GB", help="memory the builder may try tactics in (%(default)s)", default=8.0
    )
    tensorrt.add_argument(
        "--optimization-level",
        type=int,
        default=3,
        metavar="0-5",
        help="higher builds longer for faster engines (%(default)s)",
    )
    tensorrt.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="read and update this cache of measured tactics"
    )
    tensorrt.add_argument(
        "--version-compatible", action="store_true", help="engines that later TensorRT of the same major version opens"
    )
    tensorrt.add_argument(
        "--hardware-compatibility",
        choices=("none", "ampere_plus", "same_compute_capability"),
        default="none",
        help="(%(default)s)",
    )
    tensorrt.add_argument("--refittable", action="store_true", help="engines whose weights can be replaced")
    add_json_flag(parser)
    return parser


def run_export(args: argparse.Namespace) -> int:
    if args.check:
        if args.checkpoint or args.output:
            raise InputError("found --check beside CHECKPOINT or -o, expected one or the other; see trip-export --help")
        return _check(args)
    if not (args.checkpoint and args.output):
        raise InputError("expected CHECKPOINT and -o BUNDLE, or --check BUNDLE; see trip-export --help")
    with held():
        from trip_export.export import export_bundle

    result = export_bundle(args.checkpoint, args.output, _options(args), note)
    # bf16 arithmetic was not asked for, int8 and fp8 were.
    quantised = [parity for parity in result.less.values() if parity.precision in QUANTISED]
    asked_for = [*result.parity.values(), *quantised]
    passed = all(parity.passed for parity in asked_for)
    verdict = "do not ship" if not passed else "ready" if result.parity else "written; parity: not measured"
    peak = max((stage.peak_memory_gb for stage in result.stages.values()), default=peak_memory_mb() / 1e3)
    figures = _figures(result) | {"peak_memory_gb": peak}
    lines = [plan_table(result), *(parity.table() for parity in (result.parity | result.less).values())]
    report(
        args,
        figures,
        "\n\n".join([*filter(None, lines), f"{args.output}: {result.profile} {verdict} (peak memory {peak:.1f} GB)"]),
    )
    return 0 if passed else 1


def _check(args: argparse.Namespace) -> int:
    with held():
        from trip_engines.check import check_bundle

    parity, refused = check_bundle(args.check, note)
    passed = bool(parity) and all(figures.passed for figures in parity.values())
    lines = [f"{name}\n{figures.table()}" for name, figures in parity.items()]
    lines += [f"{name}: not compared: {reason}" for name, reason in refused.items()]
    figures = {
        "passed": passed,
        "parity": {name: figures.to_json() for name, figures in parity.items()},
        "not_compared": refused,
    }
    report(args, figures, "\n\n".join([*lines, f"{args.check}: {'passed' if passed else 'FAILED'}"]))
    return 0 if passed else 1


def _options(args: argparse.Namespace) -> ExportOptions:
    from torch.cuda import is_available

    from trip_engines.tensorrt_build import BuildOptions
    from trip_export.plan import ExportOptions

    gpus = args.gpus or ("all" if find_spec("triton") else "none")
    return ExportOptions(
        backends=tuple(dict.fromkeys(args.backend or ["openvino", "onnxruntime"][args.precision is not None :])),
        precision=args.precision or "fp32",
        batch=args.batch,
        frames=args.frames,
        size=args.size,
        gpus=_kernel_gpus(gpus, with_plans="tensorrt-rtx" in (args.backend or [])),
        speedups=not args.no_speedups,
        quantised=tuple(name for name in QUANTISED if getattr(args, name)),
        control=args.control,
        add=args.add,
        parity_steps=args.parity_steps,
        device=args.device or ("cuda" if is_available() else "cpu"),
        tensorrt=BuildOptions(
            capabilities=() if gpus in ("all", "none") else gpus,
            plan_per_gpu=args.plan_per_gpu,
            workspace_gb=args.workspace,
            optimization_level=args.optimization_level,
            timing_cache=args.timing_cache,
            version_compatible=args.version_compatible,
            hardware_compatibility=args.hardware_compatibility,
            refittable=args.refittable,
        ),
    )


def plan_table(result: ExportResult) -> str:
    """The plans that were built, for people."""
    rows = [
        f"{name:<40}{plan.layers:>7}{plan.bytes / 1e6:>9.1f}{plan.seconds:>9.1f}{plan.peak_memory_gb:>9.1f}"
        f"  {', '.join(plan.capabilities) or 'the GPU here'}"
        for name, plans in result.plans.items()
        for plan in plans
    ]
    head = f"{'plan':<40}{'layers':>7}{'MB':>9}{'seconds':>9}{'peak GB':>9}  compute capabilities"
    return "\n".join([head, *rows]) if rows else ""


def _figures(result: ExportResult) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle),
        "profile": result.profile,
        "stages": {name: dataclasses.asdict(stage) for name, stage in result.stages.items()},
        "built": result.built,
        "reused": result.reused,
        "operators": {
            name: {"traced": dict(before), "simplified": dict(after)}
            for name, (before, after) in result.operators.items()
        },
        "plans": {name: [dataclasses.asdict(plan) for plan in plans] for name, plans in result.plans.items()},
        "parity": {name: parity.to_json() for name, parity in (result.parity | result.less).items()},
    }


def build_parity_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trip-parity",
        description=(
            "Compare a bundle with the checkpoint it was made from: every component on real inputs, then the whole"
            " loop."
        ),
        epilog="example: trip-parity bundle checkpoints/demo",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--backend", metavar="NAME", help="(the bundle's first)")
    parser.add_argument(
        "--profile", metavar="NAME", help="one of the bundle's sets of shapes, such as 256x256-16f-b1 (its first)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (the model's own number)")
    parser.add_argument("--control", type=Path, metavar="DIR", help="of a bundle that was exported with one")
    add_json_flag(parser)
    return parser


def run_parity(args: argparse.Namespace) -> int:
    with held():
        from trip_engines.check import animator_for, precision_of
        from trip_engines.parity import measure
        from trip_export.record import record
        from trip_reference import checkpoint
        from trip_rt.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    profile = bundle.manifest.profile(args.profile)
    config = bundle.manifest.config_of(profile)
    backend = args.backend or profile.backends[0]
    if (bundle.manifest.control is None) != (args.control is None):
        found, expected = ("no --control", "the one") if args.control is None else ("--control", "none, as it was")
        raise InputError(f"found {found}, expected {expected} that {args.bundle} was exported with")
    model = checkpoint.from_pretrained(args.checkpoint, control=args.control)
    if config.schedule != model.config.schedule or config.latent_channels != model.config.latent_channels:
        raise InputError(
            f"{args.bundle}: was not made from {args.checkpoint}, their configs differ; compare it with its own"
            " checkpoint"
        )
    model.config = config  # the profile's shapes
    animator, measured_on = animator_for(bundle, profile, backend)
    with animator:
        reference = record(
            model, bundle.tokenizer_json, profile.batch, profile.decode_frames, args.steps or config.num_inference_steps
        )
        parity = measure(animator, reference, precision_of(profile, backend), measured_on)
    report(args, parity.to_json(), parity.table())
    return 0 if parity.passed else 1


def _gpus(text: str) -> str | tuple[str, ...]:
    return text if text in ("all", "none") else tuple(dict.fromkeys(text.split(",")))


def _kernel_gpus(gpus: str | tuple[str, ...], with_plans: bool) -> tuple[str, ...]:
    """The capabilities that the fused kernel is compiled for; beside plans, which may be for more, those it can be."""
    if gpus == "none":
        return ()
    from trip_kernels.compile import CAPABILITIES

    if gpus == "all":
        return CAPABILITIES
    return tuple(name for name in gpus if name in CAPABILITIES or not with_plans)


export_main = main_of(build_export_parser, run_export)
parity_main = main_of(build_parity_parser, run_parity)
