"""Bundles of strangers, right by their own hashes. One that is accepted holds what it says: names that stay inside,
tensors that fit in memory, tokens that the text encoder knows, engines that give what the manifest promises."""

import contextlib
import json
import os
import shutil

import numpy as np
import onnx
from fuzzing import damaged, fuzz_area, mutated_json
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto
from sealed import body_of, seal, sealed

from trip_rt import Animator, EngineError, InputError
from trip_rt.backends import EngineOptions, engine_class
from trip_rt.bundle import open_bundle
from trip_rt.components import signatures
from trip_rt.config import from_json, to_json
from trip_rt.manifest import MAX_TENSOR_BYTES, Manifest, serialise
from trip_rt.onnx_file import check_onnx_file
from trip_rt.tokenizer import PromptTokenizer


@fuzz_area("manifests", quick=40, full=1500)
def test_manifests(fuzz, both_backends, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(both_backends, bundle, copy_function=os.link)
    (bundle / "manifest.json").unlink()
    body = body_of(both_backends)
    del body["manifest_sha256"]

    def read(data):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):  # what is no JSON goes in as it is
            data = sealed(json.loads(data))
        (bundle / "manifest.json").write_bytes(data)
        manifest = open_bundle(bundle).manifest
        assert serialise(manifest) == data
        for spec in manifest.engine_specs():
            assert all("/" not in name and name in manifest.files for name in spec.files)
            assert all(tensor.nbytes <= MAX_TENSOR_BYTES for tensor in (*spec.inputs, *spec.outputs))

    fuzz(mutated_json([body]), read, folder=tmp_path)


def lie(body, profile_changes, config_changes, swap):
    """A manifest that agrees with itself in every shape, and with its graphs only by chance."""
    other = json.loads(json.dumps(body))
    profile = other["profiles"][0] | profile_changes
    other["config"] |= config_changes
    told = {name: part for name, part in other.items() if name != "format_version"} | {"profiles": [profile]}
    manifest = from_json(Manifest, told, "manifest.json")
    (changed,) = manifest.profiles
    shapes = changed.batch, changed.decode_frames, changed.context_width, changed.features_shape
    for component, (inputs, outputs) in signatures(manifest.config_of(changed), *shapes).items():
        for spec in profile["engines"].get(component, {}).values():
            spec["inputs"], spec["outputs"] = ([to_json(tensor) for tensor in side] for side in (inputs, outputs))
    if swap:
        one, two = (profile["engines"][name] for name in swap)
        for backend in one:
            one[backend]["files"], two[backend]["files"] = two[backend]["files"], one[backend]["files"]
    return other | {"profiles": [profile]}


@fuzz_area("manifests and graphs", quick=8, full=200)
def test_manifests_against_graphs(fuzz, both_backends, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(both_backends, bundle, copy_function=os.link)
    body = body_of(both_backends)
    del body["manifest_sha256"]

    def make(drawn):
        *changes, backend = drawn
        seal(bundle, lie(body, *changes))
        with Animator(bundle, backend) as animator:
            picture = np.zeros((32, 48, 3), np.uint8)
            clip = animator(picture, "a red ball", num_inference_steps=1)
            config = animator.config
            assert clip.frames.shape == (config.num_frames, config.height, config.width, 3)

    sides = st.sampled_from([1, 2, 4, 5, 8, 32, 48, 64, 256, 4096])
    shapes = ("num_frames", "height", "width", "batch", "decode_frames", "context_width")
    names = st.sampled_from(sorted(body["profiles"][0]["engines"]))
    drawn = st.tuples(
        st.fixed_dictionaries({}, optional=dict.fromkeys(shapes, sides)),
        st.fixed_dictionaries({}, optional=dict.fromkeys(("latent_channels", "text_length", "fps"), sides)),
        st.none() | st.tuples(names, names),
        st.sampled_from(["onnxruntime", "openvino"]),
    )
    fuzz(drawn, make, (InputError, EngineError), folder=tmp_path)


@fuzz_area("tokenizers", quick=60, full=1500)
def test_tokenizers(fuzz, tiny_animator):
    from transformers import CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b": 3, "b</w>": 4, "bb</w>": 5}
    clip = CLIPTokenizer(vocab=words, merges=[("b", "b</w>")]).backend_tokenizer
    clip.enable_padding(length=16, pad_id=1, pad_token="<|endoftext|>")
    valid = [json.loads(tiny_animator.tokenizer_json), json.loads(clip.to_str())]
    known = tiny_animator._bundle.manifest.vocabulary

    def encode(data):
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return
        ids = PromptTokenizer(text, 16, known)(["", "a red ball", "b" * 300, "ü\0 \N{GRINNING FACE}" * 1000])
        assert ids.shape == (4, 16) and ids.min() >= 0 and ids.max() < known

    fuzz(mutated_json(valid), encode)


def named_files(message):
    """The files that onnx's own parser finds named anywhere in a model."""
    if isinstance(message, TensorProto):
        return {entry.value for entry in message.external_data if entry.key == "location"}
    found = set()
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                found |= named_files(one)
    return found


def graph_with_files():
    """A model that names files in initialisers, attributes and subgraphs."""
    tensor = TensorProto(name="location", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights")
    tensor.external_data.add(key="offset", value="0")
    inner = GraphProto(name="inner", initializer=[tensor])
    inner.node.add(op_type="Constant", output=["w"]).attribute.add(name="value", type=AttributeProto.TENSOR, t=tensor)
    outer = GraphProto(name="outer", initializer=[tensor])
    outer.node.add(op_type="If").attribute.add(name="then_branch", type=AttributeProto.GRAPH, g=inner)
    return ModelProto(ir_version=10, producer_name="location", graph=outer).SerializeToString()


@fuzz_area("graphs, their files", quick=60, full=1500)
def test_files_that_graphs_name(fuzz, tmp_path):
    def check(data):
        (tmp_path / "engine.onnx").write_bytes(data)
        check_onnx_file(tmp_path / "engine.onnx", ["weights"])
        try:
            model = onnx.load_model_from_string(data)
        except Exception:
            return  # what the libraries cannot parse they do not open
        assert named_files(model) <= {"weights"}

    fuzz(damaged([graph_with_files()]), check)


@fuzz_area("graphs", quick=15, full=1500)
def test_graphs(fuzz, both_backends, tmp_path):
    """A damaged graph does not open, or gives tensors of the manifest's shapes, or fails as it runs."""
    opened = open_bundle(both_backends)
    spec = opened.manifest.profiles[0].engines["text_projection"]["onnxruntime"]
    for name in spec.files:
        os.link(both_backends / name, tmp_path / name)
    data = (tmp_path / spec.file).read_bytes()
    (tmp_path / spec.file).unlink()
    inputs = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in spec.inputs}

    def run(drawn):
        graph, backend = drawn
        (tmp_path / spec.file).write_bytes(graph)
        engine = engine_class(backend).open(tmp_path / spec.file, spec, EngineOptions(threads=1))
        try:
            outputs = engine.run(inputs)
            assert {(name, array.shape) for name, array in outputs.items()} == {
                (tensor.name, tensor.shape) for tensor in spec.outputs
            }
        finally:
            engine.close()

    fuzz(st.tuples(damaged([data]), st.sampled_from(["onnxruntime", "openvino"])), run, (InputError, EngineError))
