"""Checkpoint folders in diffusers' layout: one subfolder per part, safetensors only.

    model_index.json  trip_config.json  text_encoder/  tokenizer/  vae/  unet/  fusion/

Stored weights may be fp16; loading always gives fp32, so that one checkpoint means one set of numbers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
from transformers.utils.logging import disable_progress_bar

from trip_reference.model import TripModel
from trip_rt.config import TripConfig, from_json, to_json
from trip_rt.errors import InputError

_PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("tokenizers", "Tokenizer"),
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet3DConditionModel"),
    "fusion": ("trip_reference", "NoiseFusion"),
}
_FUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_pretrained(
    model: TripModel, tokenizer_json: str, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write `model` and its tokenizer (the text of a tokenizer.json) to `folder`, weights as `dtype`.

    Written beside and moved into place, so that a folder with a `model_index.json` is always whole.
    """
    disable_progress_bar()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        draft = Path(temporary)
        model = copy.deepcopy(model).to(dtype)
        model.vae.register_to_config(scaling_factor=model.config.scaling_factor)
        model.vae.save_pretrained(draft / "vae")
        model.residual_unet.unet.save_pretrained(draft / "unet")
        model.text_encoder.save_pretrained(draft / "text_encoder")
        for part in ("vae", "unet"):  # diffusers also writes the path that it loaded them from
            path = draft / part / "config.json"
            _write_json(
                path,
                {
                    name: value
                    for name, value in json.loads(path.read_text(encoding="utf-8")).items()
                    if name != "_name_or_path"
                },
            )
        (draft / "fusion").mkdir()
        save_file(model.fusion.state_dict(), draft / "fusion" / _FUSION_WEIGHTS)
        (draft / "tokenizer").mkdir()
        (draft / "tokenizer" / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        _write_json(draft / "trip_config.json", to_json(model.config))
        index = {"_class_name": "TripPipeline"} | {name: list(origin) for name, origin in _PARTS.items()}
        _write_json(draft / "model_index.json", index)
        (folder / "model_index.json").unlink(missing_ok=True)
        for name in [*_PARTS, "trip_config.json", "model_index.json"]:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            os.replace(draft / name, folder / name)


def from_pretrained(folder: str | os.PathLike[str], only: str | None = None) -> TripModel:
    """The model of a checkpoint folder, fp32 and in evaluation mode; InputError where the folder is not a whole
    checkpoint.

    With `only` (text_encoder, vae, unet or fusion) the other parts are on the meta device: they have shapes but take no
    memory.
    """
    folder = Path(folder)
    config = load_config(folder)
    model = TripModel(
        config,
        _load_part(UNet3DConditionModel, folder / "unet", only not in (None, "unet"), torch_dtype=torch.float32),
        load_vae(folder, only not in (None, "vae")),
        _load_part(CLIPTextModel, folder / "text_encoder", only not in (None, "text_encoder"), dtype=torch.float32),
    )
    weights = folder / "fusion" / _FUSION_WEIGHTS
    with _named(weights):
        model.fusion.load_state_dict(load_file(weights))
    return model.float().eval()


def load_config(folder: str | os.PathLike[str]) -> TripConfig:
    """The TripConfig of a checkpoint folder."""
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: found no model_index.json, expected a checkpoint folder; make one with trip-train")
    path = folder / "trip_config.json"
    with _named(path):
        data = json.loads(path.read_text(encoding="utf-8"))
    return from_json(TripConfig, data, str(path))


def load_vae(folder: str | os.PathLike[str], empty: bool = False) -> AutoencoderKL:
    """The VAE of a checkpoint or Stable Diffusion folder, fp32; `empty`: without its weights, on the meta device."""
    return _load_part(AutoencoderKL, Path(folder) / "vae", empty, torch_dtype=torch.float32)


def latent_multiple(folder: str | os.PathLike[str]) -> int:
    """What the sides of the latents must be multiples of: each of the UNet's levels but the last halves them."""
    path = Path(folder) / "unet" / "config.json"
    with _named(path):
        return 2 ** (len(json.loads(path.read_text(encoding="utf-8"))["block_out_channels"]) - 1)


def load_tokenizer_json(folder: str | os.PathLike[str]) -> str:
    """The text of the checkpoint's tokenizer.json."""
    path = Path(folder) / "tokenizer" / "tokenizer.json"
    with _named(path):
        return path.read_text(encoding="utf-8")


def assemble(
    config: TripConfig, modelscope: str | os.PathLike[str], stable_diffusion: str | os.PathLike[str]
) -> tuple[TripModel, str]:
    """A TRIP model from published parts, and the text of its tokenizer.json.

    `modelscope` is a text-to-video folder whose `unet/` starts the residual UNet; `stable_diffusion` gives `vae/`,
    `text_encoder/` and `tokenizer/`. The fusion starts untrained, which is the linear one. With the `channel` first
    frame the UNet's first convolution gets input channels of zeros, so that it starts as the published network.
    """
    modelscope, stable_diffusion = Path(modelscope), Path(stable_diffusion)
    unet = _load_part(UNet3DConditionModel, modelscope / "unet", torch_dtype=torch.float32)
    vae = load_vae(stable_diffusion)
    text_encoder, tokenizer_json = load_text(stable_diffusion)
    for what, found, expected in (
        ("UNet cross_attention_dim", unet.config["cross_attention_dim"], config.text_width),
        ("UNet in_channels", unet.config["in_channels"], config.latent_channels),
        ("VAE latent_channels", vae.config["latent_channels"], config.latent_channels),
        ("text encoder hidden_size", text_encoder.config.hidden_size, config.text_width),
        ("text encoder max_position_embeddings", text_encoder.config.max_position_embeddings, config.text_length),
    ):
        if found != expected:
            raise InputError(f"{what}: found {found}, expected {expected}; choose parts that fit the preset")
    if config.first_frame == "channel":
        widen_conv_in(unet)
    return TripModel(config, unet, vae, text_encoder).eval(), tokenizer_json


def load_text(folder: str | os.PathLike[str]) -> tuple[CLIPTextModel, str]:
    """The text encoder of a folder with text_encoder/ and tokenizer/ in transformers' layout, fp32, and the text of a
    tokenizer.json that cuts and pads to the encoder's length."""
    folder = Path(folder)
    text_encoder = _load_part(CLIPTextModel, folder / "text_encoder", dtype=torch.float32)
    with _named(folder / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, use_fast=True)
    length, backend = text_encoder.config.max_position_embeddings, tokenizer.backend_tokenizer
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return text_encoder, backend.to_str(pretty=True)


def widen_conv_in(unet: UNet3DConditionModel) -> None:
    """Double the input channels of the UNet's first convolution in place, the new half zero."""
    old = unet.conv_in
    new = nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        new.weight.copy_(torch.cat([old.weight, torch.zeros_like(old.weight)], dim=1))
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)


def _load_part(cls: Any, folder: Path, empty: bool = False, **dtype: torch.dtype) -> Any:
    if not folder.is_dir():
        raise InputError(f"{folder}: not found, expected the folder of a {cls.__name__}")
    disable_progress_bar()
    with _named(folder):
        if empty:
            with torch.device("meta"):
                if cls is CLIPTextModel:
                    return cls(CLIPTextConfig.from_pretrained(folder, local_files_only=True))
                return cls.from_config(cls.load_config(folder, local_files_only=True))
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, **dtype)


@contextlib.contextmanager
def _named(path: Path) -> Any:
    """Turn whatever a library raises for a broken file into one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {line}); restore it from its source"
        ) from error


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
