"""Opening an image model that diffusers knows: a local folder or a hub id, checked before anything of it is loaded.

Weights are safetensors, code is diffusers' and transformers' alone: what a model brings of its own is never run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from trip_rt.errors import InputError, one_line, printable
from trip_rt.plain_files import read_json
from trip_rt.signals import held

Kind = Literal["words", "edit", "control"]
_EXPECTED = {
    "words": "a text-to-image model, such as Stable Diffusion XL",
    "edit": "an InstructPix2Pix model, which edits a picture as a sentence says",
    "control": "a text-to-image model that takes a ControlNet",
}
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last is diffusers' own, for its safety checker
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_pipeline(model: str, kind: Kind, control_model: str | None = None) -> Any:
    """diffusers' pipeline of a model, on the GPU in half precision where there is one; `control_model` is the folder or
    hub id of a ControlNet. InputError in one line for what is missing, pickled, of another kind or out of reach."""
    with held():
        import diffusers
        import transformers

    for library in diffusers, transformers:  # bars of loading would stand in an error's line
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    folder = _folder(model, diffusers.DiffusionPipeline.download)
    name = _check_pipeline(folder, model)
    more: dict[str, Any] = {}
    if kind == "control":
        more["controlnet"] = open_control(control_model or "")
    edits = "InstructPix2Pix" in name
    known = edits if kind == "edit" else not edits and name in _text_to_image()
    if not known:
        raise InputError(f"{printable(model)}: found a {printable(name)}, expected {_EXPECTED[kind]}")
    cls = diffusers.DiffusionPipeline if edits else diffusers.AutoPipelineForText2Image
    pipeline = _opened(model, lambda: cls.from_pretrained(str(folder), **_how(), **more))
    pipeline.set_progress_bar_config(disable=None, leave=False, desc="picture", unit="step")
    return pipeline.to(_device())


def open_control(model: str) -> Any:
    """A ControlNet's network."""
    import diffusers

    folder = _folder(model, lambda name, **how: _snapshot(name))
    _check_weights(folder, model)
    return _opened(model, lambda: diffusers.ControlNetModel.from_pretrained(str(folder), **_how()))


def _text_to_image() -> set[str]:
    """The classes that diffusers' AutoPipeline makes pictures from words with."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    return {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _how() -> dict[str, Any]:
    dtype = torch.float32 if _device().type == "cpu" else torch.float16
    return {"use_safetensors": True, "local_files_only": True, "torch_dtype": dtype}


def _folder(model: str, download: Callable[..., Any]) -> Path:
    """Where a model lies: its folder, or the hub's files of it, fetched once."""
    if Path(model).is_dir():
        return Path(model)
    if not _HUB_ID.fullmatch(model):
        raise InputError(
            f"{printable(model)}: found no such folder, expected one, or a hub id such as"
            " stabilityai/stable-diffusion-xl-base-1.0"
        )
    try:
        return Path(download(model, use_safetensors=True, trust_remote_code=False))
    except Exception as error:  # of the hub, of the network, of a model without safetensors
        raise InputError(
            f"{model}: cannot be fetched from the hub ({one_line(error, 200)}); check the name and the connection, or"
            " name a folder"
        ) from error


def _snapshot(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])


def _check_pipeline(folder: Path, model: str) -> str:
    """The pipeline's class, by a model_index.json that names nothing but what diffusers and transformers have."""
    index = folder / "model_index.json"
    remedy = "name the folder of a diffusers pipeline"
    if not index.exists():
        raise InputError(f"{printable(model)}: found no model_index.json, expected one; {remedy}")
    entries = read_json(index, f"a pipeline's index; {remedy}")
    name = entries.get("_class_name") if isinstance(entries, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{printable(str(index))}: found no _class_name, expected a pipeline's; {remedy}")
    for part, entry in entries.items():
        if part.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        words = len(entry) == 2 and all(isinstance(word, str) for word in entry)
        if not words or entry[0] not in _LIBRARIES:
            raise InputError(
                f"{printable(model)}: found {printable(part)} of {printable(str(entry[:1]))}, expected diffusers' or"
                " transformers'; code that a model brings is not run"
            )
        if not (folder / part).is_dir():
            raise InputError(f"{printable(model)}: found no folder {printable(part)}, expected it; fetch it whole")
        _check_weights(folder / part, model)
    return name


def _check_weights(folder: Path, model: str) -> None:
    """InputError for a part whose weights are pickled."""
    names = [path.name for path in folder.iterdir()]
    pickled = [name for name in names if name.endswith(_PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"{printable(model)}: found pickled weights, {printable(folder.name)}/{printable(pickled[0])}, expected"
            " .safetensors; a pickle can run anything, save the model anew with safetensors"
        )


def _opened(model: str, load: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated names in old models
            return load()
    except Exception as error:  # whatever a damaged model makes two large libraries raise
        raise InputError(f"{printable(model)}: cannot be opened ({one_line(error, 200)}); fetch it again") from error
