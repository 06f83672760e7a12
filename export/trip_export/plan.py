"""What an export is asked for, checked before any slow work, and the keys of all that it builds."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from trip_engines.tensorrt_build import LIBRARIES, BuildOptions, cache_key, target
from trip_export.components import context_width, default_decode_frames, features_shape, signatures
from trip_export.memory import estimate_gb
from trip_reference import checkpoint
from trip_reference.control import CONFIG, WEIGHTS
from trip_rt import backends
from trip_rt.backends.tensorrt import version_numbers
from trip_rt.bundle import file_sha256
from trip_rt.components import ALL, QUANTISED, REQUIRED, VARIANTS, Quantised, quantised_name
from trip_rt.config import TripConfig, to_json
from trip_rt.errors import InputError
from trip_rt.manifest import Precision

PRECISIONS = tuple(name for name in get_args(Precision) if name not in QUANTISED)
# What quantised UNets are made for: of ONNX Runtime's and OpenVINO's, those in fp32, as CPUs compute in that.
_QUANTISED_FOR: dict[Quantised, tuple[str, ...]] = {
    "int8": ("openvino", "onnxruntime", *LIBRARIES),
    "fp8": tuple(LIBRARIES),
}
_FIRST_WITH_FP8 = (8, 9)  # the first compute capability
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """What to export: engines for `backends` in `precision`, run on `batch` clips of `frames` frames of `size` (height,
    width), by default the checkpoint's.

    `gpus` are the compute capabilities that the fused step is compiled for, whether there is a GPU here or not.
    `speedups`: also the engines that only approximate or unguided steps need (trip_rt/settings.py). `quantised`: also
    UNets in int8, fp8 or both, for the backends that have such. `add` keeps what the bundle already holds of the same
    checkpoint. `parity_steps` is how many denoising steps parity compares (the model's own number by default; 0: none).
    `device` is what inductor compiles for. `control` is the folder of one trained beside the checkpoint's UNet, which
    then takes its features.
    """

    backends: tuple[str, ...] = ("onnxruntime",)
    precision: str = "fp32"
    batch: int = 1
    frames: int | None = None
    size: tuple[int, int] | None = None
    gpus: tuple[str, ...] = ()
    speedups: bool = True
    quantised: tuple[Quantised, ...] = ()
    add: bool = False
    parity_steps: int | None = None
    device: str = "cpu"
    control: Path | None = None
    tensorrt: BuildOptions = field(default_factory=BuildOptions)


class Plan:
    """The checkpoint and what is asked of it, checked before any slow work."""

    def __init__(self, source: Path, options: ExportOptions):
        self.source, self.options = source, options
        self.checkpoint_config = checkpoint.load_config(source)
        self.config = _with_shapes(source, self.checkpoint_config, options)
        for name, found, expected in (
            ("precision", options.precision, PRECISIONS),
            *(("backend", name, backends.NAMES) for name in options.backends),
        ):
            if found not in expected:
                raise InputError(f"{name}: found {found!r}, expected one of {', '.join(expected)}")
        if not 1 <= options.batch <= 1024:
            raise InputError(f"batch: found {options.batch}, expected 1 to 1024")
        self.decode_frames = default_decode_frames(self.config)
        self.steps = self.config.num_inference_steps if options.parity_steps is None else options.parity_steps
        if not 0 <= self.steps <= self.config.schedule.num_train_timesteps:
            raise InputError(
                f"parity steps: found {self.steps}, expected 0 to {self.config.schedule.num_train_timesteps}"
            )
        if self.steps == 0 and options.precision != "fp32":
            raise InputError(
                f"parity steps: found 0, expected at least 1, since {options.precision} is chosen by measured error"
            )
        for quantised in options.quantised:
            able = self._able(quantised)
            if options.precision == "bf16" or not self.steps or not {*options.backends} & {*able}:
                raise InputError(
                    f"{quantised}: found {options.precision}, {self.steps} parity steps and the backends"
                    f" {', '.join(options.backends)}, expected fp32 or fp16, at least 1 and {' or '.join(able)}"
                )
        if missing := [
            name
            for name in ("onnxruntime", "openvino")
            if name in options.backends and not importlib.util.find_spec(name)
        ]:
            raise InputError(
                f"{missing[0]}: the package is not installed, parity is measured with it; pip install {missing[0]}"
            )
        if options.gpus:
            self._check_gpus()
        self.tensorrt = {
            (backend, quantised): cache_key(backend, options.precision, self.build_options(backend, quantised))
            for backend in options.backends
            if backend in LIBRARIES
            for quantised in (None, *options.quantised)
        }
        if "inductor" in options.backends:
            from trip_export.inductor_export import target_for

            self.inductor = target_for(options.device)
        outline = checkpoint.from_pretrained(source, ALL["tnf"].part, options.control)
        outline.config = self.config
        self.control = outline.control.config if outline.control else None
        self.context_width, self.features_shape = context_width(outline), features_shape(outline)
        self.signatures = signatures(outline, options.batch, self.decode_frames)
        self.memory_gb = estimate_gb(self, outline)
        self.components = (
            *REQUIRED,
            *(("control_encoder",) if self.control else ()),
            *(VARIANTS if options.speedups else ()),
        )
        for quantised in options.quantised:
            names = [quantised_name(name, quantised) for name in self.components]
            self.components += tuple(name for name in names if name in ALL)
        self.vocabulary = outline.vocabulary
        self.tokenizer_json = checkpoint.load_tokenizer_json(source)
        self.versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self.hashes = {path.relative_to(source).as_posix(): file_sha256(path) for path in _checkpoint_files(source)}
        if options.control:
            self.hashes |= {f"control/{name}": file_sha256(options.control / name) for name in (CONFIG, WEIGHTS)}

    def _able(self, quantised: Quantised) -> list[str]:
        """The backends that have such UNets beside those of the precision asked for."""
        fp32 = self.options.precision == "fp32"
        return [name for name in _QUANTISED_FOR[quantised] if fp32 or name in LIBRARIES]

    def backends_of(self, name: str) -> list[str]:
        """Those that a component gets an engine for."""
        if (quantised := ALL[name].quantised) is None:
            return list(self.options.backends)
        return [backend for backend in self.options.backends if backend in self._able(quantised)]

    def build_options(self, backend: str, quantised: Quantised | None) -> BuildOptions:
        """How plans are built: those in fp8 for the GPUs that have it alone."""
        options = self.options.tensorrt
        if quantised != "fp8":
            return options
        gpus = target(backend, self.options.precision, options)["compute_capabilities"].split()
        able = tuple(gpu for gpu in gpus if version_numbers(gpu) >= _FIRST_WITH_FP8)
        if not able:
            first = ".".join(map(str, _FIRST_WITH_FP8))
            raise InputError(
                f"fp8: found GPUs of compute capability {', '.join(gpus)}, expected one of {first} or later; export"
                " without --fp8"
            )
        return dataclasses.replace(options, capabilities=able)

    def _check_gpus(self) -> None:
        if not importlib.util.find_spec("triton"):
            raise InputError(
                "gpus: the package triton is not installed, kernels are compiled with it; pip install triton, or take"
                " --gpus none"
            )
        from trip_kernels.compile import CAPABILITIES

        if unknown := [name for name in self.options.gpus if name not in CAPABILITIES]:
            raise InputError(
                f"gpus: found {', '.join(unknown)}, expected all, none, or some of {','.join(CAPABILITIES)}"
            )

    @cached_property
    def kernel_key(self) -> str:
        """The hash of all that the fused step's files are built from."""
        from trip_export.kernels import shape_of, sources_sha256

        fusion = {path: digest for path, digest in self.hashes.items() if path.startswith(f"{ALL['tnf'].part}/")}
        compiler = [importlib.metadata.version("triton"), sources_sha256(), *self.options.gpus]
        schedule = self.config.schedule.num_train_timesteps
        return self.key(
            kernel=to_json(shape_of(self.config)),
            weights=fusion,
            timesteps=schedule,
            precision=self.options.precision,
            compiler=compiler,
        )

    def key(self, **ingredients: Any) -> str:
        """The hash of everything a file is built from."""
        return hashlib.sha256(
            json.dumps(ingredients | {"versions": self.versions}, sort_keys=True).encode()
        ).hexdigest()

    @cached_property
    def reference_key(self) -> str:
        shapes = [self.options.batch, self.decode_frames, self.steps]
        return self.key(weights=self.hashes, config=to_json(self.config), shapes=shapes) if self.steps else ""

    @property
    def reference_name(self) -> str:
        """The file of the recorded reference, or "" where none is asked for."""
        return f"reference-{self.reference_key[:16]}.safetensors" if self.steps else ""

    def ingredients(self, name: str) -> dict[str, Any]:
        """What every engine of a component depends on; not on shapes that it does not have, so that profiles share what
        they can."""
        shapeless = to_json(self.config) | dict(num_frames=0, height=0, width=0)
        inputs, outputs = self.signatures[name]
        return {
            "name": name,
            "weights": {path: digest for path, digest in self.hashes.items() if path.startswith(f"{ALL[name].part}/")},
            "config": shapeless,
            "tensors": [to_json(tensor) for tensor in (*inputs, *outputs)],
            "precision": self.options.precision,
            "chosen_on": self.reference_key if self.options.precision != "fp32" or ALL[name].quantised else "",
        }


def _with_shapes(source: Path, config: TripConfig, options: ExportOptions) -> TripConfig:
    height, width = options.size or (config.height, config.width)
    frames = config.num_frames if options.frames is None else options.frames
    step = config.vae_scale_factor * checkpoint.latent_multiple(source)
    if height % step or width % step or min(height, width) < step:
        raise InputError(f"size: found {width}x{height}, expected multiples of {step}")
    if config.fusion != "none" and frames != config.num_frames:
        raise InputError(
            f"frames: found {frames}, but this checkpoint's fusion was trained for {config.num_frames}; leave"
            " --frames out"
        )
    if frames < 1:
        raise InputError(f"frames: found {frames}, expected at least 1")
    return dataclasses.replace(config, num_frames=frames, height=height, width=width)


def _checkpoint_files(source: Path) -> list[Path]:
    parts = ("text_encoder", "tokenizer", "vae", "unet", "fusion")
    return [
        source / "trip_config.json",
        *sorted(path for part in parts for path in (source / part).glob("*") if path.is_file()),
    ]
