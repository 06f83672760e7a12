import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from trip_engines.onnx_engine import finish_onnx_engine
from trip_export import export as export_module
from trip_export.components import components
from trip_export.export import export_bundle
from trip_export.onnx_export import export_onnx
from trip_rt import Animator, InputError
from trip_rt.backends import engine_class
from trip_rt.bundle import COMPONENTS, open_bundle


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy of the tiny bundle to change."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_graphs_have_the_documented_names_and_static_shapes(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    described = {
        name: [{t.name: (t.dtype, t.shape) for t in side} for side in (engines["onnxruntime"].inputs, engines["onnxruntime"].outputs)]
        for name, engines in manifest.engines.items()
    }
    f32, i64 = "float32", "int64"
    latents, first, one = (f32, (2, 8, 5, 4, 6)), (f32, (2, 8, 4, 6)), (f32, (1,))
    assert described == {
        "text_encoder": [{"input_ids": (i64, (1, 16))}, {"text": (f32, (1, 16, 16))}],
        "vae_encoder": [{"image": (f32, (1, 3, 32, 48))}, {"latent": (f32, (1, 8, 4, 6))}],
        "unet": [{"latents": latents, "first_frame": first, "timestep": (i64, (1,)), "text": (f32, (2, 16, 16))}, {"residual_noise": latents}],
        "tnf": [
            {
                "latents": latents,
                "first_frame": first,
                "residual_noise": latents,
                "sqrt_alpha_bar": one,
                "sqrt_one_minus_alpha_bar": one,
                "timestep": (i64, (1,)),
            },
            {"noise": latents},
        ],
        "vae_decoder": [{"latents": (f32, (5, 8, 4, 6))}, {"image": (f32, (5, 3, 32, 48))}],
    }


def test_graphs_hold_no_dynamic_shape_arithmetic(tiny_bundle):
    for path in tiny_bundle.glob("*.onnx"):
        operators = {node.op_type for node in onnx.load(path).graph.node}
        assert not operators & {"Shape", "Range", "NonZero", "Loop", "If"}, path.name


def test_parity_is_measured_and_recorded(tiny_export):
    parity = open_bundle(tiny_export.bundle).manifest.parity
    assert parity == tiny_export.parity.to_json()
    assert parity["passed"]
    assert set(parity["components"]) == set(COMPONENTS)
    assert parity["latents_psnr"] >= 60


def test_a_second_export_reuses_everything(tiny_checkpoint, bundle):
    before = {name: (bundle / name).read_bytes() for name in files(bundle)}
    notes = []
    result = export_bundle(tiny_checkpoint, bundle, note=notes.append)
    assert result.reused == list(COMPONENTS)
    assert notes[-1] == "parity: unchanged, reused"
    assert {name: (bundle / name).read_bytes() for name in files(bundle)} == before


def test_a_changed_component_is_the_only_one_rebuilt(tiny_checkpoint, bundle, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    (weights,) = (source / "fusion").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    before = set(files(bundle))
    result = export_bundle(source, bundle)
    assert list(result.seconds) == ["tnf"]
    assert result.parity.passed
    assert {name.split("-")[0] for name in before ^ set(files(bundle))} == {"tnf"}  # the old engine is gone
    open_bundle(bundle)


def test_a_damaged_engine_is_rebuilt(tiny_checkpoint, bundle):
    (path,) = bundle.glob("tnf-*.onnx")
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(InputError, match="tnf"):
        open_bundle(bundle)
    result = export_bundle(tiny_checkpoint, bundle)
    assert list(result.seconds) == ["tnf"]
    assert path.read_bytes() == original  # an export gives the same bytes again


def test_an_export_cut_short_is_no_bundle_and_is_taken_up_again(tiny_checkpoint, bundle, monkeypatch):
    names = files(bundle)
    for name in names:
        if name.split("-")[0] in ("manifest.json", "tnf", "vae_decoder"):
            (bundle / name).unlink()
    real = export_module.finish_onnx_engine

    def interrupted(graph, destination, key, precision):
        if destination.name.startswith("vae_decoder"):
            raise KeyboardInterrupt
        return real(graph, destination, key, precision)

    monkeypatch.setattr(export_module, "finish_onnx_engine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, bundle)
    assert set(names) - set(files(bundle)) == {"manifest.json", next(name for name in names if name.startswith("vae_decoder"))}
    with pytest.raises(InputError, match="found no manifest"):
        Animator(bundle)
    monkeypatch.undo()
    result = export_bundle(tiny_checkpoint, bundle)
    assert list(result.seconds) == ["vae_decoder"]
    assert result.parity.passed
    assert files(bundle) == names


def test_a_killed_export_leaves_nothing_that_opens(tiny_checkpoint, tmp_path):
    bundle = tmp_path / "killed"
    code = "import sys; from trip_export.command import export_main; sys.exit(export_main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_checkpoint), "-o", str(bundle)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(bundle.glob("vae_encoder-*.onnx")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in [bundle, *(path for path in bundle.iterdir() if path.is_dir())]:
        with pytest.raises(InputError, match="found no manifest"):
            open_bundle(folder)


def test_two_exports_into_one_folder_do_not_mix(tiny_checkpoint, bundle):
    handle = os.open(bundle, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another export is writing"):
        export_bundle(tiny_checkpoint, bundle)
    os.close(handle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 7}, "frames: found 7"),
        ({"size": (40, 32)}, "size: found 32x40, expected multiples of 16"),
        ({"size": (0, 32)}, "size: found 32x0"),
        ({"batch": 0}, "batch: found 0"),
    ],
)
def test_shapes_the_model_cannot_have_are_refused_before_any_work(tiny_checkpoint, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_bundle_of_two_clips_at_a_time_gives_the_same_clips(tiny_checkpoint, tiny_animator, tmp_path):
    result = export_bundle(tiny_checkpoint, tmp_path / "two", batch=2)
    assert result.parity.passed
    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
    prompts = ["a red star spins", "a blue ball falls", "the heart grows"]
    with Animator(tmp_path / "two") as pairs:
        together = pairs.latents(pictures, prompts, [5, 6, 7])
    apart = tiny_animator.latents(pictures, prompts, [5, 6, 7])
    np.testing.assert_allclose(together, apart, atol=1e-3 * np.abs(apart).max())


@pytest.mark.parametrize("fusion", ["linear", "none"])
def test_every_fusion_is_exported_with_the_same_inputs(fusion, tmp_path):
    model = tiny_model(fusion=fusion)
    component = next(c for c in components(model, 1, 5) if c.name == "tnf")
    export_onnx(component, tmp_path / "draft.onnx")
    spec = finish_onnx_engine(tmp_path / "draft.onnx", tmp_path / "tnf.onnx", "key", "fp32")
    assert [tensor.name for tensor in spec.inputs] == list(component.inputs)
    engine = engine_class("onnxruntime").open(tmp_path / "tnf.onnx", spec, None)
    found = engine.run({name: tensor.numpy() for name, tensor in component.inputs.items()})["noise"]
    with torch.no_grad():
        np.testing.assert_allclose(found, component.module(*component.inputs.values()), atol=1e-5)


def test_a_graph_with_a_dynamic_shape_is_refused(tmp_path):
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3])  # noqa: E731
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x")], [value("y")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), tmp_path / "g.onnx")
    with pytest.raises(ValueError, match="x: found a dynamic shape"):
        finish_onnx_engine(tmp_path / "g.onnx", tmp_path / "out.onnx", "key", "fp32")
    assert not (tmp_path / "out.onnx").exists()
