"""Half precision: graphs typed as the policy says, run as a GPU would, and chosen by measured error."""

from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import untraced
from once import made_once
from onnx import TensorProto, helper

from trip_engines.emulation import Emulation
from trip_engines.onnx_engine import to_precision
from trip_engines.parity import MAX_COMPONENT_RMS
from trip_engines.precision import ALWAYS_FP32, Group, choose_precision, fold_weights, typed_graph
from trip_engines.recording import Reference, Sample
from trip_export.export import export_bundle
from trip_export.plan import ExportOptions
from trip_rt import Animator, InputError
from trip_rt.accuracy import relative_errors
from trip_rt.bundle import open_bundle
from trip_rt.components import REQUIRED, VARIANTS
from trip_rt.errors import EngineError

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def graph_of(nodes, path, weights=None, shape=(2, 4, 8)):
    """An ONNX file of x → y, both fp32 of `shape`, with types recorded for every value, as the exporter leaves them."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def fp32(path, x):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def half(path, precision, groups=ALWAYS_FP32):
    typed = path.with_name(f"typed-{path.name}")
    model = typed_graph(ir.load(path), precision, groups)
    fold_weights(model)
    ir.save(model, typed)
    onnx.checker.check_model(typed, full_check=True)
    return typed


RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 8), np.float32)
W = RNG.standard_normal((8, 8)).astype(np.float32)


def linear(*extra):
    return [helper.make_node("MatMul", ["x", "w"], ["h"], name="net.proj/MatMul_0"), *extra]


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", "bfloat16")])
def test_emulation_rounds_where_a_tensor_core_stores(precision, dtype, tmp_path):
    import ml_dtypes

    def rounded(array):
        return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)

    nodes = linear(helper.make_node("Sigmoid", ["h"], ["y"], name="net.act/Sigmoid_1"))
    typed = half(graph_of(nodes, tmp_path / "g.onnx", {"w": W}), precision)
    (found,), peaks = Emulation(typed, watch=True).run_watched({"x": X})
    product = rounded(X) @ rounded(W)
    expected = rounded(1 / (1 + np.exp(-rounded(product))))
    np.testing.assert_allclose(found, expected, atol=2e-7)
    assert (found == rounded(found)).all()
    (largest,) = (peak for peak in peaks if peak.node == "net.proj/MatMul_0")
    assert largest.value == pytest.approx(np.abs(product).max(), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_graphs_keep_their_inputs_and_outputs_and_store_half_weights(precision, tmp_path):
    typed = onnx.load(
        half(
            graph_of(linear(helper.make_node("Relu", ["h"], ["y"], name="net/Relu_1")), tmp_path / "g.onnx", {"w": W}),
            precision,
        )
    )
    assert [v.type.tensor_type.elem_type for v in (*typed.graph.input, *typed.graph.output)] == [TensorProto.FLOAT] * 2
    assert [value.name for value in typed.graph.output] == ["y"]
    (weight,) = typed.graph.initializer
    assert weight.data_type == HALF[precision]
    assert [node.op_type for node in typed.graph.node] == ["Cast", "MatMul", "Relu", "Cast"]
    assert typed.opset_import[0].version == (22 if precision == "bf16" else 18)


def test_groups_kept_in_fp32_get_casts_around_them(tmp_path):
    nodes = linear(
        helper.make_node("Softmax", ["h"], ["s"], name="net/Softmax_1"),
        helper.make_node("MatMul", ["s", "w"], ["y"], name="net.out/MatMul_2"),
    )
    path = half(graph_of(nodes, tmp_path / "g.onnx", {"w": W}), "fp16", [*ALWAYS_FP32, Group("softmax")])
    typed = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    assert (types["h"], types["s"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)
    assert len(typed.graph.initializer) == 1


def test_own_arithmetic_outside_any_module_stays_fp32(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["h"], name="/Mul_0"),
        helper.make_node("Sigmoid", ["h"], ["y"], name="net/Sigmoid_1"),
    ]
    typed = onnx.load(half(graph_of(nodes, tmp_path / "g.onnx"), "fp16"))
    assert [node.op_type for node in typed.graph.node] == ["Mul", "Cast", "Sigmoid", "Cast"]


@pytest.mark.parametrize("kind", ["Softmax", "InstanceNormalization"])
def test_reductions_are_spelled_out_and_still_right(kind, tmp_path):
    weights = {"scale": RNG.uniform(0.5, 2, 4).astype(np.float32), "bias": RNG.standard_normal(4).astype(np.float32)}
    if kind == "Softmax":
        node, weights = helper.make_node("Softmax", ["x"], ["y"], axis=1, name="net/Softmax_0"), {}
    else:
        node = helper.make_node(kind, ["x", "scale", "bias"], ["y"], epsilon=1e-3, name="net/Norm_0")
    path = graph_of([node], tmp_path / "g.onnx", weights)
    (found,) = Emulation(half(path, "fp16")).run({"x": X})
    assert 1e-5 < relative_errors(found, fp32(path, X))[1] < 2e-3


def test_a_square_that_overflows_in_a_normalisation_is_seen(tmp_path):
    """Statistics in fp16 overflow at deviations of 256 and more: the black frames that people complain of."""
    node = helper.make_node(
        "InstanceNormalization", ["x", "one", "zero"], ["y"], name="net.norm/InstanceNormalization_0"
    )
    path = graph_of([node], tmp_path / "g.onnx", {"one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32)})
    samples = [Sample({"x": 1000 * X}, fp32(path, 1000 * X))]
    policy = choose_precision(path, "fp16", samples)
    assert policy.fp32 == (*ALWAYS_FP32, Group("normalisation")) and policy.error < 1e-3
    assert policy.to_json()["rms_error_of_kind_alone"]["normalisation"] >= 1


def test_only_the_blocks_that_need_it_go_back_to_fp32(tmp_path):
    big, small = np.eye(8, dtype=np.float32) * 30000, np.eye(8, dtype=np.float32) / 30000
    names = ("net.blocks.0.a", "net.blocks.1.a", "net.blocks.1.b", "net.blocks.2.a")
    weights = [W / 3, big, small, W / 3]
    nodes = [
        helper.make_node("MatMul", ["xhijk"[i], f"w{i}"], ["hijkl"[i]], name=f"{name}/MatMul_{i}")
        for i, name in enumerate(names)
    ]
    nodes[-1].output[0] = "l"
    nodes.append(helper.make_node("Tanh", ["l"], ["y"], name="net.out/Tanh_4"))
    path = graph_of(nodes, tmp_path / "g.onnx", {f"w{i}": weight for i, weight in enumerate(weights)})
    samples = [Sample({"x": 10 * X}, fp32(path, 10 * X))]
    policy = choose_precision(path, "fp16", samples)
    assert policy.fp32 == (*ALWAYS_FP32, Group("matrix product", "net.blocks.1"))
    assert policy.error <= MAX_COMPONENT_RMS["fp16"]
    assert choose_precision(path, "bf16", samples).fp32 == ALWAYS_FP32  # bf16 has fp32's range


def test_what_no_policy_can_hold_fails_with_the_nodes_name(tmp_path):
    nodes = [
        helper.make_node("Sqrt", ["x"], ["h"], name="net.bad/Sqrt_0"),
        helper.make_node("Sigmoid", ["h"], ["y"], name="net/Sigmoid_1"),
    ]
    path = graph_of(nodes, tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"net\.bad/Sqrt_0 gave nan"):
        choose_precision(path, "bf16", [Sample({"x": -np.abs(X)}, fp32(path, -np.abs(X)))])


def test_weights_that_half_precision_cannot_hold_are_named(tmp_path):
    path = graph_of(
        linear(helper.make_node("Relu", ["h"], ["y"], name="net/Relu_1")), tmp_path / "g.onnx", {"w": W * 1e6}
    )
    with pytest.raises(EngineError, match="w: holds weights that float16 cannot"):
        half(path, "fp16")


def test_masks_become_minus_infinity_and_are_no_overflow(tmp_path):
    mask = np.triu(np.full((8, 8), np.finfo(np.float32).min), 1)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["h"], name="net/Add_0"),
        helper.make_node("Softmax", ["h"], ["y"], name="net/Softmax_1"),
    ]
    path = graph_of(nodes, tmp_path / "g.onnx", {"mask": mask}, (2, 8, 8))
    x = RNG.standard_normal((2, 8, 8)).astype(np.float32)
    assert choose_precision(path, "fp16", [Sample({"x": x}, fp32(path, x))]).fp32 == ALWAYS_FP32
    (found,) = Emulation(half(path, "fp16")).run({"x": x})
    assert (found[:, mask < 0] == 0).all()


@pytest.fixture(scope="module")
def halves(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """The tiny model in fp16 for ONNX Runtime and in bf16 for OpenVINO too, in two bundles, of the graphs that the fp32
    one had traced."""
    options = {
        "fp16": ExportOptions(precision="fp16"),
        "bf16": ExportOptions(precision="bf16", backends=("onnxruntime", "openvino"), speedups=False),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trip_export.export.export_onnx", untraced.graphs_of(tiny_bundle))
        return {
            precision: made_once(
                tmp_path_factory, f"tiny-{precision}", partial(export_bundle, tiny_checkpoint, options=option)
            )
            for precision, option in options.items()
        }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_whole_model_passes_parity(halves, precision):
    result = halves[precision]
    for parity in result.parity.values():
        assert parity.passed and parity.precision == precision
        assert 1e-5 < parity.components["unet"].rms_error <= MAX_COMPONENT_RMS[precision]
    assert "emulation" in result.parity["onnxruntime"].measured_on
    assert result.parity["onnxruntime"].table().splitlines()[-1].startswith("parity: passed")
    manifest = open_bundle(result.bundle).manifest
    for name in REQUIRED:
        spec = manifest.profile().engines[name]["onnxruntime"]
        assert spec.precision == precision
        assert spec.policy["kept_fp32"][0] == "own arithmetic"
        assert {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)} <= {"float32", "int64"}
        stored = [
            tensor.data_type
            for tensor in onnx.load(result.bundle / spec.file, load_external_data=False).graph.initializer
        ]
        assert HALF[precision] in stored


def test_weights_take_half_the_room(halves, tiny_bundle):
    (whole,), (half,) = tiny_bundle.glob("unet-*.weights"), halves["fp16"].bundle.glob("unet-*.weights")
    assert half.stat().st_size < 0.6 * whole.stat().st_size


def test_onnx_runtime_runs_fp16_on_a_cpu_and_refuses_bf16(halves, tiny_animator):
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    with Animator(halves["fp16"].bundle) as animator:
        found, expected = animator(picture, "a red ball").frames, tiny_animator(picture, "a red ball").frames
    assert np.abs(found.astype(int) - expected).mean() < 1
    with pytest.raises(InputError, match="has no bf16 on a CPU"):
        Animator(halves["bf16"].bundle, "onnxruntime")
    with Animator(halves["bf16"].bundle) as animator:
        assert animator.backend == "openvino" and "onnxruntime: has no bf16" in animator.backend_reason
        assert animator(picture, "a red ball").frames.shape == expected.shape


def test_changing_precision_reuses_the_recording(halves, tiny_bundle):
    names = {
        next(path.glob("reference-*")).name for path in (tiny_bundle, halves["fp16"].bundle, halves["bf16"].bundle)
    }
    assert len(names) == 1


def test_fp32_is_the_graph_itself(tmp_path):
    path = graph_of(linear(helper.make_node("Relu", ["h"], ["y"], name="net/Relu_1")), tmp_path / "g.onnx", {"w": W})
    assert to_precision(path, "fp32", [], print) == (path, {})


def test_the_recording_serves_every_component(tiny_bundle):
    (path,) = tiny_bundle.glob("reference-*")
    assert set(Reference.load(path).samples) == {*REQUIRED, *VARIANTS}
