"""F-Consistency: how alike a clip's frames are to a CLIP image encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
from transformers.utils.logging import disable_progress_bar

from trip_rt.errors import InputError, one_line

Pairs = Literal["consecutive", "first"]

# OpenAI's CLIP, where a folder has no preprocessor_config.json.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder:
    """A CLIP image encoder from a local folder of transformers' layout (safetensors)."""

    def __init__(self, folder: Path, device: str = "cpu"):
        disable_progress_bar()
        try:
            if (Path(folder) / "adapter_config.json").exists():  # transformers would go on to the folder that it names
                raise ValueError("found adapter_config.json, expected no adapters")
            model, loading = CLIPVisionModelWithProjection.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if missing := min(loading["missing_keys"], default=None):  # transformers makes up what is missing
                raise ValueError(f"found no weights {missing}")
            self.model = model.to(device).eval()
            file = Path(folder) / "preprocessor_config.json"
            config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            mean, std = config.get("image_mean", MEAN), config.get("image_std", STD)
            self.mean, self.std = (
                torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std)
            )
        except Exception as error:
            raise InputError(
                f"{folder}: cannot be read as a CLIP image encoder ({one_line(error)}); expected a transformers folder"
                " with safetensors"
            ) from error
        self.size = int(self.model.config.image_size)

    @torch.no_grad()
    def embed(self, frames: NDArray[np.uint8]) -> Tensor:
        """uint8 [F, H, W, 3] → unit vectors [F, D]."""
        embeddings = self.model(pixel_values=self.pixels(frames)).image_embeds
        return F.normalize(embeddings.float(), dim=-1)

    def pixels(self, frames: NDArray[np.uint8]) -> Tensor:
        """uint8 [F, H, W, 3] → [F, 3, size, size]: the shorter side resized (bicubic, antialiased), the centre cut out,
        normalised."""
        images = torch.tensor(frames, device=self.mean.device).movedim(-1, 1).float()
        height, width = images.shape[2:]
        # Rounded down, as transformers does.
        scaled = [side * self.size // min(height, width) for side in (height, width)]
        resized = F.interpolate(images, scaled, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = ((side - self.size) // 2 for side in resized.shape[2:])
        return (resized[:, :, top : top + self.size, left : left + self.size] / 255 - self.mean) / self.std


def consistency(embeddings: Tensor, frames: int | None = None, pairs: Pairs = "consecutive") -> float:
    """100 × the mean cosine similarity of a clip's unit vectors [F, D], over its first `frames` or all.

    The paper does not say which pairs its F-Consistency4 and -all take: neighbours, or each frame and the first.
    """
    vectors = embeddings[:frames]
    if len(vectors) < 2:
        raise ValueError(f"consistency: found {len(vectors)} frames, expected at least 2")
    others = vectors[:-1] if pairs == "consecutive" else vectors[:1]
    return 100 * float((vectors[1:] * others).sum(-1).mean())
