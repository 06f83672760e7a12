"""UNets in int8 and fp8 beside the whole ones: their graphs, what is measured of them, and clips that they make."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import pytest

from trip_engines import quantisation
from trip_engines.check import check_bundle
from trip_engines.parity import MAX_COMPONENT_RMS
from trip_engines.quantisation import _from_timestep, quantise
from trip_engines.recording import Reference
from trip_engines.tensorrt_build import BuildOptions, build_engine
from trip_export.export import export_bundle
from trip_export.plan import ExportOptions
from trip_rt import Animator, EngineError, EngineOptions, InputError, Speed, arithmetic
from trip_rt.accuracy import psnr
from trip_rt.arithmetic import parity_name
from trip_rt.bundle import open_bundle

PROMPT = "a red ball rolls to the right"
NAMES = {"unet_int8", "unet_unguided_int8"}
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def export(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    """The tiny bundle with int8 for two backends, and what its export said."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("int8") / "bundle")
    result = export_bundle(tiny_checkpoint, folder, ExportOptions(backends=BACKENDS, quantised=("int8",)))
    return folder, result


@pytest.fixture(scope="module")
def manifest(export):
    return open_bundle(export[0]).manifest


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)


def test_int8_stands_beside_fp32_and_is_measured(export, manifest):
    folder, result = export
    assert {name.partition(" ")[0] for name in result.built} == NAMES, "all else is reused"
    profile = manifest.profiles[0]
    assert set(result.less) == {parity_name(backend, "int8") for backend in BACKENDS}
    for name, found in result.less.items():
        assert found.passed and found.precision == "int8" and found.latents_psnr > 30, found.table()
        assert profile.parity[name] == found.to_json()
        assert all(1e-4 < figures.rms_error < MAX_COMPONENT_RMS["int8"] for figures in found.components.values())
    assert len({profile.engines[name]["openvino"].files[1] for name in NAMES}) == 1, "the weights are there once"
    for name in NAMES:
        assert set(profile.engines[name]) == set(BACKENDS)
        spec, whole = profile.engines[name]["openvino"], profile.engines[name.removesuffix("_int8")]["openvino"]
        assert (spec.precision, spec.inputs, spec.outputs) == ("int8", whole.inputs, whole.outputs)
        assert spec.policy["from_timestep"] <= profile.quantised_from["int8"] < 1000
        size = sum((folder / file).stat().st_size for file in spec.files if file.endswith(".weights"))
        assert size < 0.5 * (folder / whole.files[1]).stat().st_size


def test_graphs_hold_symmetric_int8_with_a_scale_for_each_channel(export, manifest):
    folder, _ = export
    spec = manifest.profiles[0].engines["unet_int8"]["openvino"]
    model = onnx.load(folder / spec.file)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    quantised = 0
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert (values[node.input[2]] == 0).all() and values[node.input[2]].dtype == np.int8
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in makers:
            weight = makers[node.input[1]]
            if weight.op_type == "DequantizeLinear" and weight.input[0] in values:
                channels = values[weight.input[0]].shape[0 if node.op_type == "Conv" else -1]
                assert values[weight.input[0]].dtype == np.int8 and values[weight.input[1]].shape == (channels,)
                quantised += 1
    kept = set(spec.policy["not_quantised"])
    assert quantised > 50 and any("conv_in" in name for name in kept) and any("conv_out" in name for name in kept)
    by_name = {node.name: node for node in model.graph.node}
    assert all(node not in makers for name in kept for node in by_name[name].input[1:])


def test_a_rerun_reuses_and_a_check_measures_again(export, tiny_checkpoint):
    folder, result = export
    before = sorted(os.listdir(folder))
    again = export_bundle(tiny_checkpoint, folder, ExportOptions(backends=BACKENDS, quantised=("int8",)))
    assert again.built == [] and again.less == result.less and sorted(os.listdir(folder)) == before
    parity, refused = check_bundle(folder)
    names = {f"48x32-5f-b1 {backend}{less}" for backend in BACKENDS for less in ("", " in int8")}
    assert set(parity) == names and not refused and all(figures.passed for figures in parity.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_in_int8(export, manifest, picture, backend, monkeypatch):
    with Animator(export[0], backend, options=EngineOptions(threads=1)) as animator:

        def frames(**settings):
            return animator(picture, PROMPT, seed=7, **settings).frames

        exact = frames()
        quantised = frames(arithmetic="int8")
        assert psnr(quantised, exact, 255) > 25 and (quantised != exact).any()
        assert (frames(arithmetic="int8") == quantised).all() and (frames() == exact).all()
        mixed = Speed(num_inference_steps=6, guidance_interval=(0.4, 1.0), feature_reuse=2, arithmetic="int8")
        assert frames(speed=mixed, guidance_scale=2).shape == exact.shape
        assert animator.arithmetic("auto") == ("own", animator.describe()["auto_arithmetic"]), "it is too small"
        animator._chooser._auto = None
        monkeypatch.setattr(arithmetic, "LEAST_GFLOP", 0.0)
        monkeypatch.setattr(arithmetic, "WORTH", 1e9)
        assert animator.arithmetic("auto")[0] == "int8" and "unet in int8" in animator.engines
        assert animator.describe()["auto_arithmetic"].startswith("int8: the UNet's share of its time in fp32 is ")


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(quantised=("int8",), precision="fp16"),
        ExportOptions(quantised=("int8",), parity_steps=0),
        ExportOptions(quantised=("int8",), backends=("inductor",)),
    ],
)
def test_int8_needs_fp32_and_a_recording(tiny_checkpoint, tmp_path, options):
    with pytest.raises(InputError, match=r"int8: found .*, expected fp32 or fp16, at least 1 and "):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_a_network_that_int8_ruins_is_no_bundle(export, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(quantisation.MAX_COMPONENT_RMS, "int8", 1e-9)
    folder = shutil.copytree(export[0], tmp_path / "bundle")
    for graph in folder.glob("unet_int8-*.onnx"):
        graph.write_bytes(b"")  # so that it is built again
    with pytest.raises(EngineError, match=r"found an error of .* in int8 where it is least.*; export without --int8"):
        export_bundle(tiny_checkpoint, folder, ExportOptions(backends=BACKENDS, quantised=("int8",)))
    assert not [name for name in os.listdir(folder) if name.startswith("raw-")]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [([0.1, 0.1, 0.1], 0), ([0.3, 0.1, 0.1], 400), ([0.1, 0.3, 0.1], 900), ([0.1, 0.1, 0.3], None), ([0.5], None)],
)
def test_where_int8_is_close_enough(errors, expected):
    assert _from_timestep([*zip((20, 400, 900), errors, strict=False)], 0.2) == expected


def test_nvidias_builder_takes_it(export, manifest, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    spec = manifest.profiles[0].engines["unet_int8"]["onnxruntime"]
    options = BuildOptions(capabilities=("8.9",))
    (plan,), _ = build_engine(export[0] / spec.file, tmp_path / "int8.plan", "tensorrt-rtx", "fp32", options)
    assert plan.layers > 100


def test_fp8_graphs(export, manifest, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    profile, graph = manifest.profiles[0], tmp_path / "fp8.onnx"
    whole = export[0] / profile.engines["unet"]["onnxruntime"].file
    samples = Reference.load(export[0] / profile.reference).samples["unet"]
    policy = quantise(whole, graph, "fp8", samples)
    assert all(0.01 < error < 0.16 for error in policy["rms_error_by_timestep"].values()), policy
    model = onnx.load(graph)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    stored = [tensor for tensor in values.values() if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    weights = [onnx.numpy_helper.to_array(tensor).astype(np.float32) for tensor in stored if len(tensor.dims) > 1]
    assert len(weights) > 50 and all(np.abs(weight).max() == 448 for weight in weights)
    assert onnx.TensorProto.INT8 not in {tensor.data_type for tensor in values.values()}
    (plan,), _ = build_engine(
        graph, tmp_path / "fp8.plan", "tensorrt-rtx", "fp32", BuildOptions(capabilities=("8.9", "12.0"))
    )
    assert plan.layers > 100


@pytest.mark.slow
def test_plans_in_int8_and_fp8_beside_fp16(tiny_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    options = ExportOptions(
        backends=("tensorrt-rtx",),
        precision="fp16",
        quantised=("int8", "fp8"),
        speedups=False,
        parity_steps=4,
        tensorrt=BuildOptions(capabilities=("8.6", "12.0")),
    )
    result = export_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    assert set(result.less) == {"tensorrt-rtx in int8", "tensorrt-rtx in fp8"}
    for name, found in result.less.items():
        number = name.rpartition(" ")[2]
        assert found.passed and found.precision == number and f"an emulation of fp16 and {number}" in found.measured_on
    profile = open_bundle(tmp_path / "bundle").manifest.profiles[0]
    gpus = {name: profile.engines[name]["tensorrt-rtx"].target["compute_capabilities"] for name in profile.engines}
    assert (gpus["unet"], gpus["unet_int8"], gpus["unet_fp8"]) == ("8.6 12.0", "8.6 12.0", "12.0")
    assert set(profile.quantised_from) == {"int8", "fp8"}
    again = export_bundle(tiny_checkpoint, tmp_path / "bundle", options)
    assert again.built == [] and again.less == result.less


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ExportOptions(quantised=("fp8",)), "expected fp32 or fp16, at least 1 and tensorrt or tensorrt-rtx"),
        (
            ExportOptions(("tensorrt-rtx",), quantised=("fp8",), tensorrt=BuildOptions(capabilities=("8.6",))),
            "fp8: found GPUs of compute capability 8.6, expected one of 8.9 or later",
        ),
    ],
)
def test_fp8_is_for_gpus_that_have_it(tiny_checkpoint, tmp_path, options, says):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=says):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", options)
