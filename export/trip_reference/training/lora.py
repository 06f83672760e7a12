"""Low-rank adapters on the UNet (Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from trip_reference.training.config import LoraConfig
from trip_rt.errors import InputError
from trip_rt.files import whole_file


def add_adapters(unet: nn.Module, config: LoraConfig) -> None:
    """Put adapters that add nothing yet on the layers of `unet` whose names end in one of `config.targets`, in place.

    Their parameters have `lora_` in their names; the layers' own are at `….base_layer.…`.
    """
    try:
        inject_adapter_in_model(
            PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)), unet
        )
    except ValueError as error:
        raise InputError(f"lora.targets: {error}") from error


def merged(unet: nn.Module) -> nn.Module:
    """A copy of `unet` with its adapters added into the weights, of the plain network's layers and names; `unet` itself
    where it has none."""
    if not any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
        return unet
    plain = copy.deepcopy(unet)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, module.get_base_layer())
    return plain


def save_adapters(unet: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Write the adapters alone in peft's layout (adapter_config.json, adapter_model.safetensors)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    with whole_file(folder / "adapter_model.safetensors") as part:
        save_file(tensors, part)
    peft_config = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=2) + "\n", encoding="utf-8")
