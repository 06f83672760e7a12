"""A file of the PyTorch model's inputs and outputs, so that engines can be compared with it without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trip_rt.config import TripConfig
from trip_rt.errors import InputError, one_line

GUIDED = 2.0


def guided_scale(config: TripConfig) -> float:
    """At which guidance scale a model's guided engines are measured: its own, or GUIDED where it asks for none."""
    return GUIDED if config.guidance_scale == 1 else config.guidance_scale


@dataclass(frozen=True)
class Sample:
    """One call of a component: its named inputs and its output."""

    inputs: Mapping[str, NDArray[Any]]
    output: NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """Calls of every component, and a whole run: uint8 pictures [B, H, W, 3] with prompts, seeds and, where the model
    takes one, `control` [B, K, F, h, w], denoised in so many steps at that guidance scale to `latents` [B, C, F, h, w];
    `frames` [F, 3, H, W] are the first clip's."""

    samples: Mapping[str, list[Sample]]
    pictures: NDArray[np.uint8]
    prompts: list[str]
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    latents: NDArray[np.float32]
    frames: NDArray[np.float32]
    control: NDArray[np.float32] | None = None

    def save(self, path: Path, key: str) -> None:
        """Write a safetensors file; `key` says what it was recorded from. InputError where the disk is full."""
        arrays: dict[str, NDArray[Any]] = {
            "loop/pictures": self.pictures,
            "loop/latents": self.latents,
            "loop/frames": self.frames,
        }
        if self.control is not None:
            arrays["loop/control"] = self.control
        for name, samples in self.samples.items():
            for index, sample in enumerate(samples):
                arrays |= {f"{name}/{index}/in/{tensor}": array for tensor, array in sample.inputs.items()}
                arrays[f"{name}/{index}/out"] = sample.output
        about = {
            "key": key,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        # One entry: safetensors writes several in any order, and the same recording should be the same bytes.
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            save_file(arrays, path, {"about": json.dumps(about)})
        except SafetensorError as error:
            raise InputError(f"{path.name}: cannot be written ({error}); make room for it") from error

    @staticmethod
    def load(path: Path, key: str | None = None) -> Reference:
        """Read what `save` wrote; InputError for anything else, or where it was recorded from something else than
        `key`."""
        try:
            with safe_open(path, "np") as file:
                about = json.loads(file.metadata()["about"])
                if key not in (about.pop("key"), None):
                    raise InputError(f"{path}: was recorded from something else; export the bundle again")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            loop = {name: arrays.pop(f"loop/{name}") for name in ("pictures", "latents", "frames")}
            loop["control"] = arrays.pop("loop/control", None)
            calls: dict[str, dict[int, dict[str, NDArray[Any]]]] = {}
            for name, array in arrays.items():
                component, index, tensor = name.split("/", 2)
                calls.setdefault(component, {}).setdefault(int(index), {})[tensor] = array
            samples = {
                component: [
                    Sample({name[3:]: call[name] for name in call if name != "out"}, call["out"])
                    for _, call in sorted(by_index.items())
                ]
                for component, by_index in calls.items()
            }
            return Reference(samples=samples, **loop, **about)
        except InputError:
            raise
        except Exception as error:  # safetensors and numpy each have their own
            reason = one_line(error, 120)
            raise InputError(f"{path}: found no recording of the model ({reason}); export the bundle again") from error
