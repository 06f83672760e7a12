"""In which precisions a network is declared, which NVIDIA's parser tells, and a plan computes, which its inspector
tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import helper
from small_graphs import BF16, FP16, FP32, saved

from trip_engines.tensorrt_layers import check_precisions, declared_precisions, layer_precisions
from trip_rt.errors import InputError


def _layer(kind: str, inputs: list[str], outputs: list[str], **more: Any) -> dict[str, Any]:
    def tensors(formats: list[str]) -> list[dict[str, Any]]:
        return [{"Name": "t", "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": text} for text in formats]

    return {
        "Name": kind,
        "LayerType": kind,
        "Inputs": tensors(inputs),
        "Outputs": tensors(outputs),
        "StreamId": 0,
    } | more


def _inspected(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["x", "y"]})


REFORMAT = _layer("Reformat", ["Float"], ["Half"], Origin="REFORMAT", TacticValue="0x00000000000003e8")
MIXED = _inspected(
    REFORMAT,
    _layer(
        "CaskConvolution",
        ["Half"],
        ["Half"],
        Weights={"Type": "Half", "Count": 9408},
        TacticName="sm80_xmma_fprop_implicit_gemm_f16f16",
    ),
    _layer("kgen", ["Half", "Float"], ["Float"], TacticName="__myl_CastMeanSub"),
    _layer("gemm", ["Half", "Half", "Float", "Float"], ["Half"], TacticName="sm90_xmma_gemm_f16f16"),
    _layer("gemm", ["Float", "Float"], ["Float"], TacticName="sm80_xmma_gemm_f32f32"),
)
SINGLE = _inspected(
    REFORMAT,
    _layer("gemm", ["Float", "Float"], ["Half"]),
    _layer("kgen", ["Half"], ["Float"], TacticName="__myl_Cast"),
    "a bare name",
)


@pytest.mark.parametrize(
    ("information", "counts"),
    [
        (MIXED, {"FP16": 2, "FP32": 1}),
        (SINGLE, {"FP32": 1}),
        (_inspected(_layer("CaskConvolution", ["BFloat16"], ["BFloat16"])), {"BF16": 1}),
        (
            _inspected(
                _layer(
                    "CaskConvolution",
                    ["Row major linear FP16 format"],
                    ["Channel major FP16 format where channel % 8 == 0"],
                )
            ),
            {"FP16": 1},
        ),
        (_inspected(_layer("CaskConvolution", ["Half(64,1:8,...)"], [])), {"FP16": 1}),
        (
            _inspected(
                _layer("CaskConvolution", ["N/A due to dynamic shapes"], [], Weights={"Type": "Half", "Count": 1})
            ),
            {"FP16": 1},
        ),
        (
            _inspected({"LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1", "Inputs": [{"Datatype": "Half"}]}),
            {"FP16": 1},
        ),
        (_inspected({"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Float"}]}), {"FP32": 1}),
        (
            _inspected(_layer("kgen", ["Half"], ["Half"]), _layer("kgen", ["Int64"], ["Bool"])),
            {"FP16": 1},
        ),  # no product: all else is counted
        (
            (
                '{"Layers": [{"LayerType": "gemm", "Metadata": "[ONNX Layer: a]\x1f[ONNX Layer: b]", "Inputs":'
                ' [{"Format/Datatype": "Half"}]}]}'
            ),
            {"FP16": 1},
        ),
        (_inspected("names", "only"), {}),
        (_inspected({}), {}),
        ('{"Layers": []}', {}),
        ("{}", {}),
        ("null", {}),
        ("not json", {}),
    ],
)
def test_layers_are_counted_by_precision(information: str, counts: dict[str, int]) -> None:
    assert layer_precisions(information) == counts


@pytest.mark.parametrize(("dtype", "name"), [(FP32, "FP32"), (FP16, "FP16"), (BF16, "BF16")])
def test_what_a_parsed_network_declares_is_counted(tmp_path: Path, dtype: int, name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    graph = saved(
        tmp_path, [helper.make_node("MatMul", ["a", "b"], ["p"]), helper.make_node("MatMul", ["p", "b"], ["y"])], dtype
    )
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(str(graph))
    assert declared_precisions(trt, network) == {name: 2}


def test_precisions_are_held_against_the_graphs() -> None:
    assert check_precisions({"FP32": 2}, {"FP32": 3}, "a") == "convolutions and matrix products: 3 in FP32"
    assert check_precisions({"FP32": 1, "BF16": 3}, {"BF16": 3}, "a").endswith("3 in BF16")
    assert "shows in speed and parity only" in check_precisions({"FP16": 1}, {}, "a")
    for declared, found in (
        ({"FP16": 9}, {"FP32": 9}),
        ({"BF16": 1, "FP32": 2}, {"FP16": 1, "FP32": 2}),
        ({"FP16": 1}, {"FP16": 0, "FP32": 1}),
    ):
        with pytest.raises(InputError, match=r"^a: found an engine silently built in FP"):
            check_precisions(declared, found, "a")
