"""A cache of three clips with embeddings, as `write_cache` leaves one, of random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SENTENCES = [["a ball rolls", "the ball is rolling"], ["a star falls"], ["a heart"]]
INDEX = {"version": 1, "clips": 3, "shape": [2, 3, 2, 2], "vae": "a", "text_encoder": "b"}


def save_cache(folder: Path) -> Path:
    torch.manual_seed(0)
    tensors = {"latents": torch.randn(3, 2, 3, 2, 2).half(), "text": torch.randn(3, 4, 5).half()}
    save_file(tensors, folder / "latents-00000.safetensors", metadata={"texts": json.dumps(SENTENCES)})
    save_file({"text": torch.randn(4, 5).half()}, folder / "empty.safetensors")
    (folder / "cache.json").write_text(json.dumps(INDEX))
    return folder
