"""One component to an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from trip_export.components import Component

OPSET = 18


def export_onnx(component: Component, path: Path) -> None:
    """Write `component` to `path` as ONNX with static shapes and its documented tensor names; weights fp32, inside the file."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            component.module.eval(),
            tuple(component.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(component.inputs),
            output_names=[component.output],
            optimize=True,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates its passes on stdout and warns of its own deprecations; neither helps the person exporting."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
