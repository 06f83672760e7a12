import contextlib
import dataclasses
import errno
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
import untraced
from export_server import ExportServer
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import nn

from trip_engines.check import check_bundle
from trip_engines.onnx_engine import finish_onnx_engine
from trip_engines.parity import MAX_COMPONENT_RMS
from trip_engines.tensorrt_build import BuildOptions
from trip_export import command
from trip_export import export as export_module
from trip_export.components import component, signatures
from trip_export.export import export_bundle
from trip_export.onnx_export import DYNAMIC_SHAPE_OPERATORS, export_onnx
from trip_export.plan import ExportOptions, Plan
from trip_export.store import store
from trip_rt import Animator, InputError
from trip_rt.arithmetic import parity_name
from trip_rt.backends import EngineOptions, engine_class
from trip_rt.bundle import open_bundle
from trip_rt.components import ALL, REQUIRED, VARIANTS, TensorSpec
from trip_rt.manifest import EngineSpec

EVERYTHING_REUSED = [f"{name} (onnx)" for name in (*REQUIRED, *VARIANTS)]
BRIEF = ExportOptions(parity_steps=1)


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy of the tiny bundle to change."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_graphs_have_the_documented_names_and_static_shapes(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    described = {
        name: [
            {t.name: (t.dtype, t.shape) for t in side}
            for side in (engines["onnxruntime"].inputs, engines["onnxruntime"].outputs)
        ]
        for name, engines in manifest.profile().engines.items()
    }
    f32, i64 = "float32", "int64"
    latents, first, one = (f32, (2, 8, 5, 4, 6)), (f32, (2, 8, 4, 6)), (f32, (1,))
    both = {"latents": latents, "first_frame": first, "timestep": (i64, (1,)), "context": (f32, (2, 16, 80))}
    features = (f32, (2, 6, 8, 4, 6))
    half = {name: (dtype, shape if len(shape) == 1 else (1, *shape[1:])) for name, (dtype, shape) in both.items()}
    tnf = {
        "latents": latents,
        "first_frame": first,
        "residual_noise": latents,
        "sqrt_alpha_bar": one,
        "sqrt_one_minus_alpha_bar": one,
    }
    tnf |= {"timestep": (i64, (1,))}
    latent, feature = ((f32, (1, *shape[1:])) for _, shape in (latents, features))
    assert described == {
        "text_encoder": [{"input_ids": (i64, (1, 16))}, {"text": (f32, (1, 16, 16))}],
        "vae_encoder": [{"image": (f32, (1, 3, 32, 48))}, {"latent": (f32, (1, 8, 4, 6))}],
        "text_projection": [{"text": (f32, (2, 16, 16))}, {"context": (f32, (2, 16, 80))}],
        "unet": [both, {"residual_noise": latents, "features": features}],
        "unet_shallow": [both | {"features": features}, {"residual_noise": latents}],
        "unet_unguided": [half, {"residual_noise": latent, "features": feature}],
        "unet_unguided_shallow": [half | {"features": feature}, {"residual_noise": latent}],
        "tnf": [tnf, {"noise": latents}],
        "tnf_unguided": [
            {name: (t, s if s == (1,) else (1, *s[1:])) for name, (t, s) in tnf.items()},
            {"noise": latent},
        ],
        "vae_decoder": [{"latents": (f32, (4, 8, 4, 6))}, {"image": (f32, (4, 3, 32, 48))}],
    }


def test_graphs_hold_no_dynamic_shape_arithmetic(tiny_bundle):
    for path in tiny_bundle.glob("*.onnx"):
        operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert not operators & DYNAMIC_SHAPE_OPERATORS, path.name


@pytest.mark.parametrize("name", ["text_encoder", "unet_shallow"])
def test_nothing_of_a_traced_model_stays_in_memory(tmp_path, name):
    """Neither of the weights that a graph uses nor, of the shallow UNet, of those that it does not."""

    def held():
        gc.collect()
        return sum(one.nbytes for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter))

    before = held()
    part = component(tiny_model(), name, 1, 5)
    model = held() - before
    export_onnx(part, tmp_path / "graph.onnx")
    del part
    assert model > 1e5 and held() - before < model / 20


def test_weights_have_the_shape_they_are_used_in(tiny_bundle):
    """A weight that is reshaped at run time would stay in fp32 beside its half-precision copy."""
    for path in tiny_bundle.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        first = [(node.op_type, node.input[0]) for node in graph.node if node.input]
        assert not [op for op, name in first if name in weights and op in ("Squeeze", "Unsqueeze", "Reshape")], (
            path.name
        )


def test_simplification_is_counted(tiny_export):
    for name, (before, after) in tiny_export.operators.items():
        assert after.total() < before.total() / (1.5 if name == "text_projection" else 2), name
        assert {"Shape", "Expand"} & set(before) or name.startswith("text_")


def test_graphs_say_nothing_of_where_they_were_made(tiny_bundle):
    for path in tiny_bundle.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
        assert str(os.getcwd()).encode() not in path.read_bytes()
    names = [
        node.name for node in onnx.load(next(tiny_bundle.glob("unet-*.onnx")), load_external_data=False).graph.node
    ]
    assert any(name.startswith("unet.mid_block.resnets.0.conv1/Conv_") for name in names)


def test_parity_is_measured_and_recorded(tiny_export):
    (parity,) = open_bundle(tiny_export.bundle).manifest.profile().parity.values()
    assert parity == tiny_export.parity["onnxruntime"].to_json()
    assert parity["passed"]
    assert set(parity["components"]) == {*REQUIRED, *VARIANTS}
    assert parity["latents_psnr"] >= 60


def test_a_second_export_reuses_everything(tiny_checkpoint, bundle):
    before = contents(bundle)
    notes = []
    result = export_bundle(tiny_checkpoint, bundle, note=notes.append)
    assert result.reused == EVERYTHING_REUSED
    assert notes[-1] == "parity of onnxruntime: unchanged, reused"
    assert contents(bundle) == before


def test_a_changed_component_is_the_only_one_rebuilt(tiny_checkpoint, bundle, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    (weights,) = (source / "fusion").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    before = set(files(bundle))
    result = export_bundle(source, bundle)
    assert result.built == ["tnf (onnx)", "tnf_unguided (onnx)"]
    assert result.parity["onnxruntime"].passed
    assert {name.split("-")[0] for name in before ^ set(files(bundle))} == {
        "tnf",
        "tnf_unguided",
        "reference",
    }  # the old ones are gone
    open_bundle(bundle)


@pytest.mark.parametrize("ending", ["onnx", "weights"])
def test_a_damaged_engine_is_rebuilt(tiny_checkpoint, bundle, ending):
    (path,) = bundle.glob(f"tnf-*.{ending}")
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(InputError, match="tnf"):
        open_bundle(bundle)
    result = export_bundle(tiny_checkpoint, bundle)
    assert result.built == ["tnf (onnx)"]
    assert path.read_bytes() == original  # an export gives the same bytes again


def test_an_export_cut_short_is_no_bundle_and_is_taken_up_again(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "export_onnx", untraced.graph_of_a_weight)
    export_bundle(tiny_checkpoint, tmp_path / "whole", BRIEF)
    real = export_module.finish_onnx_engine

    def interrupted(graph, destination, like=None):
        if destination.name.startswith("tnf"):
            raise KeyboardInterrupt
        return real(graph, destination, like)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export_module, "finish_onnx_engine", interrupted)
        export_bundle(tiny_checkpoint, tmp_path / "cut", BRIEF)
    assert not list((tmp_path / "cut").glob(".exporting-*"))
    with pytest.raises(InputError, match="found no manifest"):
        Animator(tmp_path / "cut")
    result = export_bundle(tiny_checkpoint, tmp_path / "cut", BRIEF)
    assert result.built == [f"{name} (onnx)" for name in ("tnf", "vae_decoder", *VARIANTS)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_sigterm_ends_an_export_as_ctrl_c_does(tiny_checkpoint, tmp_path):
    """At a moment when it comes in a finaliser as a rule: garbage is collected between two stages."""
    code = "from trip_export.command import export_main; raise SystemExit(export_main())"
    command = [sys.executable, "-c", code, str(tiny_checkpoint), "-o", str(tmp_path / "new"), "--gpus", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("new/.exporting-*/*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.terminate()
        said = process.stderr.read().splitlines()
    assert process.returncode == 143 and said[-1] == "trip-export: terminated"
    assert not list(tmp_path.glob("new/.exporting-*")) and "Traceback" not in "".join(said)


@pytest.fixture(scope="module")
def export_in_a_child(tiny_checkpoint):
    with contextlib.closing(ExportServer(tiny_checkpoint)) as server:
        yield server


def test_a_killed_export_of_traced_graphs_is_taken_up_again(tiny_checkpoint, tiny_bundle, tmp_path, export_in_a_child):
    """One that another process began: the same bytes again."""
    code, _ = export_in_a_child(tmp_path / "bundle", component="tnf", traced=True)
    assert code == -signal.SIGKILL
    with pytest.raises(InputError, match="found no manifest"):
        open_bundle(tmp_path / "bundle")
    result = export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportOptions(speedups=False))
    assert result.built == ["tnf (onnx)", "vae_decoder (onnx)"]
    whole, found = contents(tiny_bundle), contents(tmp_path / "bundle")
    del found["manifest.json"]  # without the speedups
    assert {name.partition("-")[0] for name in found if name.endswith(".onnx")} == set(REQUIRED)
    assert [name for name, data in found.items() if whole[name] != data] == []


def test_exports_killed_at_random_moments(tmp_path, export_in_a_child):
    """What kill −9 leaves never opens, and the rerun ends in the bytes of an undisturbed export. TRIP_KILLS sets how
    many moments."""
    code, seconds = export_in_a_child(tmp_path / "whole")
    assert code == 0
    whole = contents(tmp_path / "whole")
    moments = np.random.default_rng(0).uniform(0, seconds, int(os.environ.get("TRIP_KILLS", "4")))
    folder, cut_short = tmp_path / "0", 0
    for attempt, moment in enumerate(moments):
        code, _ = export_in_a_child(folder, seconds=float(moment))
        killed = code == -signal.SIGKILL
        assert killed or code == 0
        cut_short += killed
        for place in [folder, *(path for path in folder.iterdir() if path.is_dir())] if folder.exists() else []:
            if killed and not (place == folder and (folder / "manifest.json").exists()):
                with pytest.raises(InputError, match="found no manifest"):
                    open_bundle(place)
        if attempt % 3 == 2 or not killed:  # let some be killed again on the way
            assert export_in_a_child(folder)[0] == 0
            found = contents(folder)
            assert sorted(found) == sorted(whole)
            assert [name for name, data in whole.items() if found[name] != data] == []
            folder = tmp_path / str(attempt + 1)
    assert cut_short


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
        ({"size": (2**20, 2**20)}, "found 5 frames of 1048576x1048576, 15360.0 GiB of pixels, expected at most 1"),
        ({"batch": 0}, "batch: found 0"),
        ({"batch": 2**40}, "batch: found 1099511627776, expected 1 to 1024"),
        ({"backends": ("abacus",)}, "backend: found 'abacus', expected one of tensorrt-rtx, tensorrt, openvino"),
        ({"precision": "fp8"}, "precision: found 'fp8'"),
        ({"parity_steps": 1001}, "parity steps: found 1001"),
        ({"parity_steps": 0, "precision": "fp16"}, "parity steps: found 0, expected at least 1"),
    ],
)
def test_shapes_the_model_cannot_have_are_refused_before_any_work(tiny_checkpoint, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "new", ExportOptions(**changes))
    assert not (tmp_path / "new").exists()


def test_the_memory_is_told_before_and_a_machine_too_small_is_refused(tiny_checkpoint, bundle, tmp_path, monkeypatch):
    notes = []
    export_bundle(tiny_checkpoint, bundle, note=notes.append)
    told = float(re.match(r"memory: about (\d+\.\d) GB at most, of \d+\.\d GB on this machine", notes[0])[1])
    assert told == pytest.approx(1, abs=0.1), "a tiny model takes what the libraries take"
    large = ExportOptions(size=(1024, 1024), parity_steps=0)
    monkeypatch.setattr(export_module, "machine_memory_gb", lambda: 2.0)
    with pytest.raises(
        InputError, match=r"^memory: found 2.0 GB on this machine, expected about \d+.\d GB at most; ex"
    ):
        export_bundle(tiny_checkpoint, tmp_path / "new", large)
    assert not (tmp_path / "new").exists()
    plans = [Plan(tiny_checkpoint, ExportOptions(size=(side, side))).memory_gb for side in (256, 1024)]
    assert plans[1] - 1 > 15 * (plans[0] - 1), "the picture's area, or its square"


def test_profiles_and_backends_share_one_bundle(tiny_checkpoint, tiny_animator, bundle):
    """Two clips at a time beside one, OpenVINO beside ONNX Runtime: the weights are there once, and all give the same
    clips."""
    weights = set(bundle.glob("*.weights"))
    two = ExportOptions(batch=2, backends=("openvino",), add=True, speedups=False)
    result = export_bundle(tiny_checkpoint, bundle, two)
    assert result.parity["openvino"].passed
    assert set(bundle.glob("*.weights")) == weights
    again = export_bundle(tiny_checkpoint, bundle, ExportOptions(backends=("openvino",), add=True))
    assert again.reused == EVERYTHING_REUSED and again.parity["openvino"].passed
    manifest = open_bundle(bundle).manifest
    assert [(profile.name, sorted(profile.backends)) for profile in manifest.profiles] == [
        ("48x32-5f-b1", ["onnxruntime", "openvino"]),
        ("48x32-5f-b2", ["openvino"]),
    ]
    assert set(manifest.profiles[0].parity) == {"onnxruntime", "openvino"}
    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
    prompts = ["a red star spins", "a blue ball falls", "the heart grows"]
    apart = tiny_animator.latents(pictures, prompts, [5, 6, 7])
    for profile in (None, "48x32-5f-b2"):
        with Animator(bundle, "openvino", profile) as animator:
            found = animator.latents(pictures, prompts, [5, 6, 7])
        np.testing.assert_allclose(found, apart, atol=1e-3 * np.abs(apart).max())
    with pytest.raises(InputError, match="found 'huge', the bundle has 48x32-5f-b1, 48x32-5f-b2"):
        Animator(bundle, profile="huge")
    assert export_bundle(tiny_checkpoint, bundle).built == []  # without add, the rest goes
    assert len(open_bundle(bundle).manifest.profiles) == 1


@pytest.mark.parametrize("native", [True, False])
def test_bf16_arithmetic_of_fp32_engines_is_measured(tiny_checkpoint, bundle, monkeypatch, native):
    """By OpenVINO where the CPU has bf16, else emulated; what fails is written down and not taken."""
    monkeypatch.setattr(export_module, "LEAST_GFLOP", 0.0)
    monkeypatch.setattr(engine_class("openvino"), "lowers", classmethod(lambda cls: native))
    options = ExportOptions(backends=("openvino",), parity_steps=2, speedups=True)
    result = export_bundle(tiny_checkpoint, bundle, options)
    name = parity_name("openvino", "bf16")
    assert set(result.parity) == {"openvino"} and set(result.less) == {name}
    found = result.less[name]
    assert found.precision == "bf16" and found.passed
    assert found.measured_on.startswith("openvino" if native else "an emulation of bf16")
    assert set(found.components) == {"unet", "unet_shallow", "unet_unguided", "unet_unguided_shallow"}
    assert native or all(1e-4 < figures.rms_error < 4e-2 for figures in found.components.values())
    assert open_bundle(bundle).manifest.profiles[0].parity == {
        "openvino": result.parity["openvino"].to_json(),
        name: found.to_json(),
    }
    parity, refused = check_bundle(bundle)
    assert set(parity) == {"48x32-5f-b1 openvino", "48x32-5f-b1 openvino in bf16"} and not refused
    assert all(figures.passed for figures in parity.values())
    assert export_bundle(tiny_checkpoint, bundle, options).less == result.less  # reused
    monkeypatch.setitem(MAX_COMPONENT_RMS, "bf16", 1e-12)
    shutil.rmtree(bundle)
    failed = export_bundle(tiny_checkpoint, bundle, options)
    assert failed.parity["openvino"].passed
    assert native or not failed.less[name].passed
    if not failed.less[name].passed:
        assert set(check_bundle(bundle)[0]) == {"48x32-5f-b1 openvino"}


def test_plans_name_the_graphs_that_parity_was_measured_on(tiny_checkpoint, bundle):
    pytest.importorskip("tensorrt_rtx")
    options = BuildOptions(capabilities=("8.9", "12.0"))
    rtx = ExportOptions(backends=("tensorrt-rtx",), tensorrt=options, add=True)
    result = export_bundle(tiny_checkpoint, bundle, rtx)
    assert result.reused == EVERYTHING_REUSED and set(result.plans) == {
        f"{name} (tensorrt-rtx)" for name in (*REQUIRED, *VARIANTS)
    }
    head, *rows = command.plan_table(result).splitlines()
    assert "layers" in head and len(rows) == len(EVERYTHING_REUSED) and all(row.endswith("8.9, 12.0") for row in rows)
    manifest = open_bundle(bundle).manifest
    for engines in manifest.profile().engines.values():
        assert engines["tensorrt-rtx"].target["graph"] == manifest.files[engines["onnxruntime"].file].sha256
    parity = result.parity["tensorrt-rtx"]
    assert parity.passed and parity.measured_on.startswith("the graphs of the plans: onnxruntime")
    before = contents(bundle)
    again = export_bundle(tiny_checkpoint, bundle, rtx)
    assert again.reused == [f"{name} (tensorrt-rtx)" for name in (*REQUIRED, *VARIANTS)] and not again.plans
    assert again.parity["tensorrt-rtx"] == parity and contents(bundle) == before
    alone = export_bundle(tiny_checkpoint, bundle, dataclasses.replace(rtx, add=False))
    assert alone.reused == again.reused and not list(bundle.glob("*.onnx"))


def test_a_full_disk_is_one_line_and_leaves_no_draft(tmp_path):
    full = pytest.raises(InputError, match=r"^[^\n]*new: the disk is full; make room and run the export again")
    with full, store(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert files(tmp_path / "new") == []
    with pytest.raises(PermissionError), store(tmp_path / "new"):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize("name", ["unet_unguided_shallow", "tnf_unguided"])
def test_variants_for_two_clips_share_the_weights_too(name, bundle, tmp_path):
    export_onnx(component(tiny_model(), name, 2, 5), tmp_path / "draft.onnx")
    (network,) = bundle.glob(f"{ALL[name].variant_of}-*.onnx")
    shared = set(bundle.glob(f"{ALL[name].variant_of}-*.weights"))
    _, weights = finish_onnx_engine(tmp_path / "draft.onnx", bundle / f"{name}.onnx", network)
    assert {bundle / weights} == shared


def test_adding_to_the_bundle_of_another_checkpoint(tiny_checkpoint, bundle, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    config = json.loads((source / "trip_config.json").read_text())
    (source / "trip_config.json").write_text(json.dumps(config | {"guidance_scale": 2.0}))
    before = files(bundle)
    with pytest.raises(InputError, match="was made from another checkpoint"):
        export_bundle(source, bundle, ExportOptions(add=True))
    assert files(bundle) == before


def test_without_parity_there_is_no_reference(tiny_checkpoint, bundle):
    result = export_bundle(tiny_checkpoint, bundle, ExportOptions(parity_steps=0))
    assert result.reused == EVERYTHING_REUSED and not result.parity
    profile = open_bundle(bundle).manifest.profile()
    assert (profile.reference, profile.parity) == ("", {})
    assert not list(bundle.glob("reference-*"))


@pytest.mark.parametrize("fusion", ["linear", "none"])
def test_every_fusion_is_exported_with_the_same_inputs(fusion, tmp_path):
    model = tiny_model(fusion=fusion)
    part = component(model, "tnf", 1, 5)
    with torch.no_grad():
        expected = part.module(*part.inputs.values())
    export_onnx(part, tmp_path / "draft.onnx")
    names = finish_onnx_engine(tmp_path / "draft.onnx", tmp_path / "tnf.onnx")
    spec = EngineSpec(names, "", "fp32", {}, 0.0, {}, *signatures(model, 1, 5)["tnf"])
    assert [tensor.name for tensor in spec.inputs] == list(part.inputs)
    engine = engine_class("onnxruntime").open(tmp_path / "tnf.onnx", spec, EngineOptions())
    found = engine.run({name: tensor.numpy() for name, tensor in part.inputs.items()})["noise"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_graph_with_a_dynamic_shape_is_refused(tmp_path):
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3])  # noqa: E731
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x")], [value("y")])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "g.onnx",
    )
    with pytest.raises(ValueError, match="x: found a dynamic shape"):
        finish_onnx_engine(tmp_path / "g.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("change", ["files", "pipe", "text"])
def test_a_note_that_an_export_did_not_leave_is_passed_over(tmp_path, change):
    tensor = TensorSpec("x", "float32", (1, 2))
    (tmp_path / "a.onnx").write_bytes(b"graph")
    with store(tmp_path) as made:
        made.finish(EngineSpec(("a.onnx",), "0" * 64, "fp32", {}, 1.0, {}, (tensor,), (tensor,)))
        assert made.finished("0" * 64)
    (note,) = tmp_path.glob(".finished-*")
    if change == "files":  # which would be looked up in vain
        note.write_text(json.dumps(json.loads(note.read_text()) | {"files": {}}))
    elif change == "pipe":
        note.unlink()
        os.mkfifo(note)
    else:
        note.write_text("[" * 100_000)
    with store(tmp_path) as again:
        assert again.finished("0" * 64) is None


def test_a_model_that_asks_for_no_guidance_is_measured_with_some(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = json.loads((source / "trip_config.json").read_text())
    (source / "trip_config.json").write_text(json.dumps(config | {"guidance_scale": 1.0}))
    parity = export_bundle(source, tmp_path / "bundle").parity["onnxruntime"]
    assert parity.passed and {"unet", "unet_unguided", "tnf", "tnf_unguided"} <= parity.components.keys()
