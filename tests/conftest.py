"""Fixtures: the tiny model as a checkpoint and as a bundle, each made once a test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which some of the following do

from tiny import TINY, tiny_model

from trip_export.export import ExportResult, export_bundle
from trip_reference import checkpoint
from trip_reference.demo_world.text import build_tokenizer
from trip_rt import Animator


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
