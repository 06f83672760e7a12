"""A picture made by an image model: from words, by editing another, or along another's outlines or depth."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trip_rt.errors import EngineError, InputError, one_line
from trip_rt.images import Picture, load_image

Picture8 = NDArray[np.uint8]
Control = Literal["canny", "depth"]
CANNY_LOW, CANNY_HIGH = 100, 200  # gradients in grey levels: what is surely no edge, and what surely is one


def make_picture(
    pipeline: Any,
    words: str,
    *,
    edited: Picture | None = None,
    control: tuple[Control, Picture] | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    seed: int = 0,
) -> Picture8:
    """uint8 [H, W, 3] of `size` (height, width; the model's own), which is rounded down to what its latents allow."""
    import torch  # here, as trip-imagine's --help needs none

    height, width = _size(pipeline, size)
    asked: dict[str, Any] = {"prompt": words, "generator": torch.Generator("cpu").manual_seed(seed)}
    asked |= {"num_inference_steps": steps} if steps is not None else {}
    asked |= {"guidance_scale": guidance_scale} if guidance_scale is not None else {}
    asked |= {"negative_prompt": negative_prompt} if negative_prompt else {}
    if edited is not None:
        asked["image"] = Image.fromarray(load_image(edited, height, width))
    else:
        asked |= {"height": height, "width": width}
    if control is not None:
        asked["image"] = Image.fromarray(control_map(control[0], load_image(control[1], height, width)))
    try:
        with torch.inference_mode():
            made = pipeline(**asked, output_type="np").images[0]
    except torch.OutOfMemoryError as error:
        raise InputError(f"picture: found too little memory for {width}x{height}; ask for a smaller one") from error
    except (ValueError, TypeError, RuntimeError) as error:  # what the pipeline does not take, in its own words
        raise InputError(f"picture: the model does not take this ({one_line(error, 200)})") from error
    if not np.isfinite(made).all():
        raise EngineError("picture: found NaN, expected none; its weights are broken, fetch the model again")
    return np.rint(np.clip(made, 0, 1) * 255).astype(np.uint8)


def control_map(control: Control, picture: Picture8) -> Picture8:
    """What a ControlNet is given of a picture [H, W, 3]: its edges (Canny 1986), or the depth that it shows, near white
    and far black."""
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    if control == "canny":
        try:
            import cv2
        except ImportError as error:
            raise InputError(
                "control: found no OpenCV, expected it for canny; pip install trip-rt[pictures]"
            ) from error
        grey = cv2.Canny(grey, CANNY_LOW, CANNY_HIGH)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _size(pipeline: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    factor = int(getattr(pipeline, "vae_scale_factor", 8))
    if size is None:
        network = getattr(pipeline, "unet", None) or pipeline.transformer
        sides = network.config.sample_size
        size = (sides * factor,) * 2 if isinstance(sides, int) else tuple(side * factor for side in sides)
    height, width = (side // factor * factor for side in size)
    if not (height and width):
        raise InputError(f"picture size: found {size[1]}x{size[0]}, expected at least {factor} pixels a side")
    return height, width
