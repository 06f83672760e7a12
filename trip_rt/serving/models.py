"""The models that a server offers: each a bundle's profile, and how long its clips take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trip_rt.bundle import read_manifest
from trip_rt.config import TripConfig
from trip_rt.errors import InputError
from trip_rt.manifest import Profile
from trip_rt.settings import SPEEDS, Settings

_NEWEST = 0.2  # the share that a new measurement has in a running mean


@dataclass
class Timing:
    """How long a clip of this model takes, measured at the warm-up and with every clip: seconds of a step, and of all
    besides the steps."""

    step_s: float = 0.0
    other_s: float = 0.0

    def measured(self, steps: int, denoise_s: float, other_s: float) -> None:
        """A group of clips took that long."""
        self.step_s += _NEWEST * (denoise_s / steps - self.step_s)
        self.other_s += _NEWEST * (other_s - self.other_s)

    def expected_s(self, steps: int) -> float:
        """Seconds that a clip of so many steps takes."""
        return steps * self.step_s + self.other_s


@dataclass
class Model:
    """A bundle's profile under the name that clients call it; `steered` says whether a path may steer its clips.
    `engine` and `parity` are known once a worker has opened it."""

    name: str
    bundle: Path
    profile: Profile
    config: TripConfig
    workers: int = 1
    steered: bool = False
    timing: Timing = field(default_factory=Timing)
    engine: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    ready_workers: int = 0

    @property
    def size(self) -> str:
        return f"{self.profile.width}x{self.profile.height}"

    def seconds(self, fps: float) -> str:
        """How long a clip of the engines' own length plays at `fps`."""
        return playing_time(self.config.num_frames, fps)

    def speeds(self) -> dict[str, dict[str, Any]]:
        """The named speeds: how many steps each takes, and how long a clip of it is expected to take."""
        counts = {name: len(Settings(speed=name).steps(self.config)) for name in SPEEDS}
        return {
            name: {"num_inference_steps": count, "expected_s": round(self.timing.expected_s(count), 3)}
            for name, count in counts.items()
        }


def playing_time(frames: int, fps: float) -> str:
    """Seconds, as the API writes them."""
    return f"{frames / fps:.6g}"


def read_models(arguments: list[str], workers: int) -> dict[str, Model]:
    """The models that BUNDLE, NAME=BUNDLE and NAME=BUNDLE@PROFILE ask for; the name of a bundle alone is its folder's.
    InputError for two of one name and for what is no bundle."""
    models: dict[str, Model] = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        if not equals:
            name, place = "", argument
        path, profile = Path(place), None
        if not path.exists() and "@" in place:
            place, _, profile = place.rpartition("@")
            path = Path(place)
        manifest = read_manifest(path)
        name = name or path.resolve().name
        if not name.isprintable() or len(name) > 100:
            raise InputError(f"model: found the name {name[:100]!r}, expected up to 100 printable characters")
        if name in models:
            raise InputError(f"model: found two called {name}, expected a name for each; write NAME={place}")
        chosen = manifest.profile(profile)
        steered = manifest.control is not None
        models[name] = Model(name, path.resolve(), chosen, manifest.config_of(chosen), workers, steered)
    return models
