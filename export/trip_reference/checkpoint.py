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
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from trip_reference.control import load_control
from trip_reference.model import TripModel
from trip_reference.parts import REMEDY, TEXT_ENCODER, UNET, VAE, Part, load_part, load_weights, read_config
from trip_rt.config import TripConfig, from_json, to_json
from trip_rt.errors import InputError, one_line, printable
from trip_rt.files import disk_full
from trip_rt.plain_files import check_plain, read_json, read_text
from trip_rt.tokenizer import PromptTokenizer
from trip_rt.tokenizer_file import MAX_MEGABYTES

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
    with disk_full(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        draft = Path(temporary)
        model = copy.deepcopy(model).to(dtype)
        model.vae.register_to_config(scaling_factor=model.config.scaling_factor)
        model.vae.save_pretrained(draft / "vae")
        model.residual_unet.unet.save_pretrained(draft / "unet")
        model.text_encoder.save_pretrained(draft / "text_encoder")
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


def from_pretrained(folder: str | os.PathLike[str], only: str | None = None, control: Path | None = None) -> TripModel:
    """The model of a checkpoint folder, fp32 and in evaluation mode; InputError where the folder is not a whole
    checkpoint.

    `control` is the folder of one trained beside this checkpoint's UNet. With `only` (text_encoder, vae, unet, fusion
    or control) the other parts are on the meta device: they have shapes but take no memory.
    """
    folder = Path(folder)
    config = load_config(folder)

    def part(kind: Part, name: str) -> Any:
        return load_part(kind, folder / name, only not in (None, name))

    unet, vae, text_encoder = part(UNET, "unet"), part(VAE, "vae"), part(TEXT_ENCODER, "text_encoder")
    channels = config.latent_channels * (2 if config.first_frame == "channel" else 1)
    with _named(folder):
        _check_fit(config, channels, unet, vae, text_encoder, REMEDY)
        with torch.device("meta"):
            model = TripModel(config, unet, vae, text_encoder)
    load_weights(model.fusion, folder / "fusion" / _FUSION_WEIGHTS)
    if control is not None:
        width = model.residual_unet.unet.config.block_out_channels[0]
        model.control = load_control(control, folder, config.latent_channels, width, config.first_frame)
    return model.eval()


def load_config(folder: str | os.PathLike[str]) -> TripConfig:
    """The TripConfig of a checkpoint folder."""
    folder = Path(folder)
    index = folder / "model_index.json"
    check_plain(index, "that of a checkpoint folder; make one with trip-train")
    path = folder / "trip_config.json"
    return from_json(TripConfig, read_json(path, f"the config of a TRIP model; {REMEDY}"), printable(str(path)))


def load_vae(folder: str | os.PathLike[str]) -> AutoencoderKL:
    """The VAE of a checkpoint or Stable Diffusion folder, fp32."""
    return load_part(VAE, Path(folder) / "vae")


def latent_multiple(folder: str | os.PathLike[str]) -> int:
    """What the sides of the latents must be multiples of: each of the UNet's levels but the last halves them."""
    return 2 ** (len(read_config(UNET, Path(folder) / "unet").block_out_channels) - 1)


def load_tokenizer_json(folder: str | os.PathLike[str]) -> str:
    """The text of the checkpoint's tokenizer.json; InputError unless it gives the ids that the text encoder takes, as
    many as it takes."""
    folder = Path(folder)
    path = folder / "tokenizer" / "tokenizer.json"
    text = read_text(path, f"a tokenizer; {REMEDY}", MAX_MEGABYTES << 20)
    length = load_config(folder).text_length
    vocabulary = read_config(TEXT_ENCODER, folder / "text_encoder").vocab_size
    try:
        PromptTokenizer(text, length, vocabulary)
    except InputError as error:
        raise InputError(f"{printable(str(path))}: {error}") from error
    return text


def assemble(
    config: TripConfig, modelscope: str | os.PathLike[str], stable_diffusion: str | os.PathLike[str]
) -> tuple[TripModel, str]:
    """A TRIP model from published parts, and the text of its tokenizer.json.

    `modelscope` is a text-to-video folder whose `unet/` starts the residual UNet; `stable_diffusion` gives `vae/`,
    `text_encoder/` and `tokenizer/`. The fusion starts untrained, which is the linear one. With the `channel` first
    frame the UNet's first convolution gets input channels of zeros, so that it starts as the published network.
    """
    modelscope, stable_diffusion = Path(modelscope), Path(stable_diffusion)
    unet = load_part(UNET, modelscope / "unet")
    vae = load_vae(stable_diffusion)
    text_encoder, tokenizer_json = load_text(stable_diffusion)
    _check_fit(config, config.latent_channels, unet, vae, text_encoder, "choose parts that fit the preset")
    if config.first_frame == "channel":
        widen_conv_in(unet)
    return TripModel(config, unet, vae, text_encoder).eval(), tokenizer_json


def load_text(folder: str | os.PathLike[str]) -> tuple[CLIPTextModel, str]:
    """The text encoder of a folder with text_encoder/ and tokenizer/ in transformers' layout, fp32, and the text of a
    tokenizer.json that cuts and pads to the encoder's length."""
    folder = Path(folder)
    text_encoder = load_part(TEXT_ENCODER, folder / "text_encoder")
    with _named(folder / "tokenizer"):  # by its own class: AutoTokenizer would run code that a folder brings
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
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


def _check_fit(
    config: TripConfig,
    in_channels: int,
    unet: UNet3DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    remedy: str,
) -> None:
    """InputError unless the parts' sizes are those of `config`."""
    for what, found, expected in (
        ("UNet cross_attention_dim", unet.config["cross_attention_dim"], config.text_width),
        ("UNet in_channels", unet.config["in_channels"], in_channels),
        ("UNet out_channels", unet.config["out_channels"], config.latent_channels),
        ("VAE latent_channels", vae.config["latent_channels"], config.latent_channels),
        ("VAE pixels to a latent", 2 ** (len(vae.config["block_out_channels"]) - 1), config.vae_scale_factor),
        ("VAE scaling_factor", vae.config["scaling_factor"], config.scaling_factor),
        ("text encoder hidden_size", text_encoder.config.hidden_size, config.text_width),
        ("text encoder max_position_embeddings", text_encoder.config.max_position_embeddings, config.text_length),
    ):
        if found != expected:
            raise InputError(f"{what}: found {found}, expected {expected}; {remedy}")


@contextlib.contextmanager
def _named(path: Path) -> Any:
    """Turn whatever a library raises for a broken file into one line that names the file."""
    where = printable(str(path))
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:
        raise InputError(f"{where}: cannot be read ({type(error).__name__}: {one_line(error)}); {REMEDY}") from error


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
