"""Fixtures: a tiny TRIP model with random weights, as a checkpoint and as a bundle, each made once a test run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which some of the following do

from trip_export.export import ExportResult, export_bundle
from trip_reference import checkpoint
from trip_reference.demo_text import build_tokenizer, text_overrides
from trip_reference.model import TripModel, build_model
from trip_reference.presets import DEMO, Preset
from trip_rt import Animator

TINY = Preset(
    trip=dataclasses.replace(
        DEMO.trip, num_frames=5, height=32, width=48, text_width=16, num_inference_steps=4, tnf=dataclasses.replace(DEMO.trip.tnf, hidden_size=16)
    ),
    unet=DEMO.unet | dict(block_out_channels=(8, 16), norm_num_groups=4),
    vae=DEMO.vae | dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    text_encoder=DEMO.text_encoder | dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1),
)


def tiny_model(seed: int = 0, **changes: object) -> TripModel:
    """A tiny model whose every parameter is random, zero-initialised ones too, so that no path is dead."""
    torch.manual_seed(seed)
    preset = dataclasses.replace(TINY, trip=dataclasses.replace(TINY.trip, **changes))
    model = build_model(preset, text_overrides(build_tokenizer(preset.trip.text_length)))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = build_tokenizer(TINY.trip.text_length)
    checkpoint.save_pretrained(tiny_model(), tokenizer.to_str(pretty=True), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The export of `tiny_checkpoint`; its `bundle` must not be changed by a test."""
    return export_bundle(tiny_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: ExportResult) -> Path:
    return tiny_export.bundle


@pytest.fixture(scope="session")
def tiny_animator(tiny_bundle: Path) -> Animator:
    return Animator(tiny_bundle)
