"""The networks of a checkpoint, each from a folder in its own library's layout: config.json and one safetensors file.

The libraries' own loaders are not used for strangers' folders. They fill what the weights lack with random numbers,
pass over what they do not know, and follow what config.json says to other classes, folders and packages. Here a config
is checked field by field, shapes are compared before any memory is taken, and every tensor has to be there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from msgspec import Meta
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from trip_rt.config import from_json
from trip_rt.errors import InputError, one_line, printable
from trip_rt.plain_files import check_plain, read_json
from trip_rt.process_memory import machine_memory_gb

REMEDY = "restore it from its source"

Width = Annotated[int, Meta(ge=1, le=1 << 16)]
Layers = Annotated[int, Meta(ge=1, le=64)]
LayersPerBlock = Annotated[int, Meta(ge=1, le=8)]
Levels = Annotated[tuple[Width, ...], Meta(min_length=1, max_length=8)]
Blocks = Meta(min_length=1, max_length=8)
Epsilon = Annotated[float, Meta(gt=0, lt=1)]
Scale = Annotated[float, Meta(gt=0, le=1e6)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 20)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet3DConditionModel is built from; the fields without a default are those of its sizes."""

    in_channels: Width
    out_channels: Width
    down_block_types: Annotated[tuple[Literal["CrossAttnDownBlock3D", "DownBlock3D"], ...], Blocks]
    up_block_types: Annotated[tuple[Literal["CrossAttnUpBlock3D", "UpBlock3D"], ...], Blocks]
    block_out_channels: Levels
    layers_per_block: LayersPerBlock
    cross_attention_dim: Width
    attention_head_dim: Width
    norm_num_groups: Width
    sample_size: Width | None = None
    downsample_padding: Literal[1] = 1
    mid_block_scale_factor: Scale = 1
    act_fn: Activation = "silu"
    norm_eps: Epsilon = 1e-5
    num_attention_heads: None = None
    time_cond_proj_dim: None = None


@dataclass(frozen=True)
class VaeConfig:
    """What an AutoencoderKL is built from."""

    down_block_types: Annotated[tuple[Literal["DownEncoderBlock2D"], ...], Blocks]
    up_block_types: Annotated[tuple[Literal["UpDecoderBlock2D"], ...], Blocks]
    block_out_channels: Levels
    layers_per_block: LayersPerBlock
    latent_channels: Width
    norm_num_groups: Width
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    act_fn: Activation = "silu"
    sample_size: Width = 32
    scaling_factor: Scale = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def scale_factor(self) -> int:
        """Pixels to a latent: each level but the last halves them."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """What a CLIPTextModel is built from."""

    vocab_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    max_position_embeddings: Width
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "relu", "silu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    initializer_range: Annotated[float, Meta(ge=0, le=1)] = 0.02
    initializer_factor: Annotated[float, Meta(ge=0, le=100)] = 1.0
    projection_dim: Width | None = 512
    pad_token_id: TokenId | None = 1
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId | None = 49407


@dataclass(frozen=True)
class Part:
    """A kind of network: the class of its config, the entry of config.json that names the network with the name it must
    have, its file of weights, how it is built, and what its tensors were called by earlier versions of the library."""

    config: type[Any]
    named_by: tuple[str, str]
    weights: str
    build: Callable[[Any], nn.Module]
    renamed: Callable[[str], str | None] = lambda name: name


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


_ATTENTION = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _vae_name(name: str) -> str:
    """Stable Diffusion's VAEs were saved before diffusers had one kind of attention."""
    if match := _ATTENTION.fullmatch(name):
        return f"{match[1]}.{_ATTENTION_NAMES[match[2]]}.{match[3]}"
    return name


def _text_name(name: str) -> str | None:
    """Up to version 4 of transformers all names began with text_model, and positions were stored; None: not needed."""
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else name


_DIFFUSERS = "diffusion_pytorch_model.safetensors"
UNET = Part(
    UNetConfig,
    ("_class_name", "UNet3DConditionModel"),
    _DIFFUSERS,
    lambda config: UNet3DConditionModel(**_fields(config)),
)
VAE = Part(
    VaeConfig, ("_class_name", "AutoencoderKL"), _DIFFUSERS, lambda config: AutoencoderKL(**_fields(config)), _vae_name
)
TEXT_ENCODER = Part(
    TextConfig,
    ("model_type", "clip_text_model"),
    "model.safetensors",
    lambda config: CLIPTextModel(CLIPTextConfig(**_fields(config))),
    _text_name,
)


def read_config(part: Part, folder: Path) -> Any:
    """The part's checked config.json; fields that the network does not have are passed over, as its library does."""
    path = folder / "config.json"
    expected = f"the config.json of a {part.named_by[1]}; {REMEDY}"
    data = read_json(path, expected)
    if not isinstance(data, dict):
        raise InputError(f"{printable(str(path))}: found a JSON {type(data).__name__}, expected {expected}")
    key, name = part.named_by
    if data.get(key) != name:
        raise InputError(f"{printable(str(path))}: {key}: found {data.get(key)!r:.100}, expected {name!r}; {REMEDY}")
    known = {field.name for field in dataclasses.fields(part.config)}
    return from_json(part.config, {key: data[key] for key in data.keys() & known}, printable(str(path)), REMEDY)


def load_part(part: Part, folder: Path, empty: bool = False) -> Any:
    """The network in `folder`, fp32 and in evaluation mode; `empty`: with its shapes checked but without weights, on
    the meta device. InputError names the file that is not as it should be."""
    if not folder.is_dir():
        raise InputError(f"{printable(str(folder))}: not found, expected the folder of a {part.named_by[1]}")
    config = read_config(part, folder)
    try:
        with torch.device("meta"):
            model = part.build(config).eval()
    except Exception as error:  # sizes that do not fit each other: both libraries say so in many ways
        raise InputError(
            f"{printable(str(folder / 'config.json'))}: found sizes of no {part.named_by[1]} ({one_line(error)});"
            f" {REMEDY}"
        ) from error
    load_weights(model, folder / part.weights, part.renamed, empty)
    if part is TEXT_ENCODER and not empty:  # the one tensor that a network computes, and does not store
        model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return model


def load_weights(
    model: nn.Module, path: Path, renamed: Callable[[str], str | None] = lambda name: name, empty: bool = False
) -> None:
    """Give `model`, which is on the meta device, the weights of a safetensors file as fp32; `empty`: compare the shapes
    alone.

    InputError unless the file holds exactly the model's tensors, floating-point and finite.
    """
    where = printable(str(path))
    wanted = dict(model.state_dict())
    check_plain(path, f"the weights of a checkpoint; {REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            stored = {name: stored for stored in file.keys() if (name := renamed(stored)) is not None}  # noqa: SIM118
            _compare(where, wanted, stored, {name: file.get_slice(name).get_shape() for name in stored.values()})
            if not empty:
                _check_memory(where, wanted)
                tensors = {name: _tensor(where, file, stored[name]) for name in wanted}
    except InputError:
        raise
    except Exception as error:  # safetensors' own errors are of several kinds
        raise InputError(f"{where}: cannot be read ({type(error).__name__}: {one_line(error)}); {REMEDY}") from error
    if not empty:
        model.load_state_dict(tensors, assign=True)


def _compare(
    where: str, wanted: Mapping[str, torch.Tensor], stored: Mapping[str, str], shapes: Mapping[str, list[int]]
) -> None:
    for name, tensor in wanted.items():
        if name not in stored:
            raise InputError(f"{where}: found no tensor {name}, expected one as config.json says; {REMEDY}")
        if (found := shapes[stored[name]]) != list(tensor.shape):
            raise InputError(
                f"{where}: {name}: found shape {found}, expected {list(tensor.shape)} as config.json says; {REMEDY}"
            )
    if unknown := next((name for name in stored if name not in wanted), None):
        raise InputError(
            f"{where}: found the tensor {printable(unknown)[:100]}, expected those that config.json asks for; {REMEDY}"
        )


def _check_memory(where: str, wanted: Mapping[str, torch.Tensor]) -> None:
    needed, has = sum(4 * tensor.numel() for tensor in wanted.values()) / 1e9, machine_memory_gb()
    if has is not None and needed > has:
        raise InputError(
            f"{where}: found weights of {needed:.1f} GB in fp32, expected at most the {has:.1f} GB of this machine's"
            " memory; take a larger one"
        )


def _tensor(where: str, file: Any, name: str) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(
            f"{where}: {printable(name)[:100]}: found {str(tensor.dtype).removeprefix('torch.')}, expected fp32, fp16"
            f" or bf16; {REMEDY}"
        )
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise InputError(f"{where}: {printable(name)[:100]}: found a number that is not finite; {REMEDY}")
    return tensor
