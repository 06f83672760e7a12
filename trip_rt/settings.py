"""How a clip is made: the settings of a run, the named speeds, and the steps that follow from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, get_args

from trip_rt.arithmetic import Asked
from trip_rt.checks import is_number, is_whole, one_of, real_number, shown, text, whole_number
from trip_rt.config import MAX_FRAMES, MOST_CLIP, MOST_SIDE, TripConfig
from trip_rt.errors import InputError
from trip_rt.images import Fit
from trip_rt.sampling.solvers import SOLVERS, Solver, solver_steps
from trip_rt.sampling.step import Step

MAX_GUIDANCE_SCALE = 100
MAX_CONTROL_SCALE = 10


@dataclass(frozen=True)
class Speed:
    """How much work a run saves; the defaults save none.

    - `solver` and `num_inference_steps` (None: the model's own): a better solver needs fewer steps.
    - `guidance_interval`: shares of the schedule, 0 to 1. Guidance, and with it the unconditional half of all work,
      happens only where timestep / num_train_timesteps lies within (Kynkäänniemi et al. 2024).
    - `feature_reuse` N: only every N-th step runs the whole UNet. The steps between run its outermost layer on the deep
      features of the last whole run (DeepCache, Ma et al. 2023).
    - `arithmetic`: what the UNet computes in; fp32 is the engines' own precision. `auto` takes bf16 or, of a bundle
      that has it, int8 or fp8, where that is faster on this machine and the bundle says that it comes close enough to
      PyTorch (arithmetic.py).
    """

    solver: Solver = "ddim"
    num_inference_steps: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    feature_reuse: int = 1
    arithmetic: Asked = "fp32"


SPEEDS = {
    "exact": Speed(),
    "balanced": Speed("unipc", 20, arithmetic="auto"),
    "fast": Speed("unipc", 8, arithmetic="auto"),
}


class SettingsKeywords(TypedDict, total=False):
    """The fields of Settings as keywords of Animator's methods, for type checkers and editors."""

    speed: Speed | str
    num_inference_steps: int | None
    solver: Solver | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    feature_reuse: int | None
    arithmetic: Asked | None
    negative_prompt: str
    fit: Fit
    num_frames: int | None
    size: str | None
    control_scale: float
    control_guidance_start: float
    control_guidance_end: float


@dataclass(frozen=True)
class Settings:
    """How a clip is made. InputError for a value that no model could take.

    `speed` is one of SPEEDS or a Speed; `num_inference_steps`, `solver`, `guidance_interval`, `feature_reuse` and
    `arithmetic` replace the speed's own where they are given. `guidance_scale` 0 to 100 says how closely the clip
    follows the prompt (None: the model's own), `negative_prompt` what should not be seen. `fit` says how a picture of
    another shape is fitted: `crop` keeps its largest centred part, `letterbox` all of it. `num_frames` may be more than
    the engines have (None: theirs): then overlapping windows make the clip. `size` WIDTHxHEIGHT may be larger than the
    engines', of the same shape (None: theirs): then the picture's own detail is moved as the clip moves (enlarge.py). A
    clip's control counts `control_scale` times, 0 to 10, in the steps between the shares `control_guidance_start` and
    `control_guidance_end` of a run, 0 to 1.
    """

    speed: Speed | str = "exact"
    num_inference_steps: int | None = None
    solver: Solver | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    feature_reuse: int | None = None
    arithmetic: Asked | None = None
    negative_prompt: str = ""
    fit: Fit = "crop"
    num_frames: int | None = None
    size: str | None = None
    control_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.speed, Speed):
            one_of("speed", self.speed, tuple(SPEEDS))
        one_of("fit", self.fit, get_args(Fit))
        text("negative prompt", self.negative_prompt)
        if self.guidance_scale is not None:
            real_number("guidance scale", self.guidance_scale, 0, MAX_GUIDANCE_SCALE)
        speed = self.resolved_speed
        one_of("solver", speed.solver, SOLVERS)
        one_of("arithmetic", speed.arithmetic, get_args(Asked))
        if not is_whole(speed.feature_reuse) or speed.feature_reuse < 1:
            found = shown(speed.feature_reuse)
            raise InputError(f"feature reuse: found {found}, expected at least 1 as a whole number; 1 reuses none")
        # How many there may be is the schedule's to say.
        if speed.num_inference_steps is not None and not is_whole(speed.num_inference_steps):
            raise InputError(f"num_inference_steps: found {shown(speed.num_inference_steps)}, expected a whole number")
        _check_interval(speed.guidance_interval)
        if self.num_frames is not None:
            whole_number("num_frames", self.num_frames, 1, MAX_FRAMES)
        if self.size is not None:
            _sides(self.size)
        real_number("control scale", self.control_scale, 0, MAX_CONTROL_SCALE)
        start = real_number("control guidance start", self.control_guidance_start, 0, 1)
        real_number("control guidance end", self.control_guidance_end, start, 1)

    @property
    def resolved_speed(self) -> Speed:
        """The speed with the fields that these settings replace."""
        speed = SPEEDS[self.speed] if isinstance(self.speed, str) else self.speed
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Speed)}
        return dataclasses.replace(speed, **{name: value for name, value in given.items() if value is not None})

    def steps(self, config: TripConfig) -> list[Step]:
        """The steps of a run of this model, first to last; InputError for more steps than its schedule has."""
        speed = self.resolved_speed
        # Plain numbers: numpy's would make the latents fp64.
        scale = float(config.guidance_scale if self.guidance_scale is None else self.guidance_scale)
        count = int(config.num_inference_steps if speed.num_inference_steps is None else speed.num_inference_steps)
        low, high = speed.guidance_interval
        steps: list[Step] = []
        whole = -1  # the last step that ran the whole UNet
        for i, step in enumerate(solver_steps(config.schedule, count, speed.solver)):
            guided = scale != 1 and low <= step.timestep / config.schedule.num_train_timesteps <= high
            # The features of an unguided step are of the conditional half alone.
            reusable = whole >= 0 and (steps[whole].guided or not guided)
            shallow = reusable and i - whole < speed.feature_reuse
            whole = whole if shallow else i
            controlled = self.control_guidance_start <= i / count and (i + 1) / count <= self.control_guidance_end
            steps.append(
                dataclasses.replace(
                    step, guidance_scale=scale if guided else 1.0, shallow=shallow, controlled=controlled
                )
            )
        return steps

    def frames(self, config: TripConfig) -> int:
        """How many frames a clip of this model's engines has; InputError for fewer than they make."""
        count = config.num_frames if self.num_frames is None else int(self.num_frames)
        if count < config.num_frames:
            raise InputError(
                f"num_frames: found {count}, expected at least {config.num_frames}, which these engines make at once;"
                " leave some out, or export others with trip-export --frames N --add"
            )
        if count > config.num_frames == 1:
            raise InputError(
                f"num_frames: found {count}, expected 1: engines of one frame show no motion to go on with"
            )
        return count

    def runs(self, config: TripConfig) -> int:
        """How many runs of this model's engines go on with a clip, each by all of its frames but the first; InputError
        where none can."""
        if self.size is not None:
            raise InputError(
                f"size: found {self.size} for a clip that goes on, expected none: extend clips of the engines'"
                " size, then trip_rt.enlarge.enlarged(clip.frames, picture) makes them larger"
            )
        each = config.num_frames - 1
        if not each:
            raise InputError("extend: found engines of one frame, expected some that show a motion to go on with")
        return math.ceil((each if self.num_frames is None else int(self.num_frames)) / each)

    def picture_size(self, config: TripConfig) -> tuple[int, int]:
        """Height and width of a clip's frames; InputError for a size that these engines cannot be enlarged to."""
        own = config.height, config.width
        if self.size is None:
            return own
        height, width = _sides(self.size)
        if height * own[1] != width * own[0] or height < own[0]:
            raise InputError(
                f"size: found {width}x{height}, expected the engines' own, {own[1]}x{own[0]}, or a larger one of that"
                f" shape, such as {2 * own[1]}x{2 * own[0]}"
            )
        if (amount := 3 * self.frames(config) * height * width) > MOST_CLIP:
            raise InputError(
                f"size: found {self.frames(config)} frames of {width}x{height}, {amount / 2**30:.1f} GiB, expected at"
                f" most {MOST_CLIP >> 30}; take a smaller one, or fewer frames"
            )
        return height, width

    def changed(self, keywords: Mapping[str, Any]) -> Settings:
        """These settings with some fields replaced; InputError names a keyword that is none and what to write
        instead."""
        fields = [field.name for field in dataclasses.fields(self)]
        if unknown := next((name for name in keywords if name not in fields), None):
            advice = _INSTEAD.get(unknown, f"expected some of {', '.join(fields)}")
            raise InputError(f"{unknown}: found no such setting, {advice}")
        return dataclasses.replace(self, **keywords)


def _sides(size: Any) -> tuple[int, int]:
    """Height and width of WIDTHxHEIGHT."""
    width, cross, height = size.partition("x") if isinstance(size, str) else ("", "", "")
    sides = [int(side) for side in (height, width) if side.isdecimal() and side.isascii() and len(side) < 6]
    if not cross or len(sides) < 2 or not all(1 <= side <= MOST_SIDE for side in sides):
        raise InputError(f"size: found {shown(size)}, expected WIDTHxHEIGHT such as 256x256, up to {MOST_SIDE}")
    return sides[0], sides[1]


def check_prompt(prompt: Any) -> None:
    """InputError for what is no sentence."""
    if not text("prompt", prompt).strip():
        raise InputError("prompt: found an empty one, expected a sentence that says what happens")


def check_seed(seed: Any) -> int:
    """The seed as an int; InputError for one that the noise generator cannot take."""
    return whole_number("seed", seed, 0, 2**64 - 1)


def _check_interval(interval: Any) -> None:
    expected = "expected two numbers from 0 to 1, the lower one first"
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise InputError(f"guidance interval: found {shown(interval)}, {expected}")
    low, high = interval
    if not (is_number(low) and is_number(high) and 0 <= low <= high <= 1):
        raise InputError(f"guidance interval: found {shown(low)} to {shown(high)}, {expected}")


# What users of diffusers' pipelines write first, and what does it here.
_INSTEAD = {
    "generator": "write seed=7 in its place",
    "height": "write size='WIDTHxHEIGHT', or export engines of that size with trip-export --size WxH --add",
    "width": "write size='WIDTHxHEIGHT', or export engines of that size with trip-export --size WxH --add",
    "fps": "frames a second are chosen when the clip is written: clip.save('clip.mp4', fps=8)",
    "output_type": (
        "clip.frames is uint8 [F, H, W, 3]; PIL pictures are [Image.fromarray(frame) for frame in clip.frames]"
    ),
    "callback_on_step_end": "write on_step=f, which is called as f(done, total)",
    "callback": "write on_step=f, which is called as f(done, total)",
    "num_videos_per_prompt": "write animator.batch([picture] * n, [prompt] * n, seeds=range(n))",
    "num_images_per_prompt": "write animator.batch([picture] * n, [prompt] * n, seeds=range(n))",
    "decode_chunk_size": "the bundle decodes in chunks of its own; leave it out",
    "steps": "write num_inference_steps=N",
}
