"""Bundles that are whole by their own hashes and yet not what trip-export writes: each is refused before it does harm,
on every backend."""

from __future__ import annotations

import json
import shutil
from itertools import permutations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sealed import body_of, seal

from trip_rt import Animator, EngineError, InputError
from trip_rt.bundle import open_bundle
from trip_rt.manifest import MAX_TENSOR_BYTES
from trip_rt.onnx_file import check_onnx_file
from trip_rt.tokenizer import PromptTokenizer
from trip_rt.tokenizer_file import open_tokenizer

BACKENDS = ("onnxruntime", "openvino")
PROMPT = "a red ball rolls to the right"


@pytest.fixture
def copied(both_backends, tmp_path):
    return shutil.copytree(both_backends, tmp_path / "bundle")


@pytest.fixture
def body(copied):
    return body_of(copied)


def files_of(body, component):
    return body["profiles"][0]["engines"][component]["onnxruntime"]["files"]


def refused(bundle, backend, says):
    with pytest.raises(InputError, match=says) as caught:
        Animator(bundle, backend)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_the_manifest_does_not_list(copied, body, backend):
    """Those of the UNet, multiplied, in a file beside the bundle's own."""
    graph, weights = files_of(body, "unet")
    model = onnx.load(copied / graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "others.weights"
    onnx.save(model, copied / graph)
    (1.5 * np.fromfile(copied / weights, np.float32)).tofile(copied / "others.weights")
    refused(seal(copied, body), backend, "keeps weights in 'others.weights', which the manifest does not list")


def test_a_name_that_is_left_out(tmp_path):
    """It is the empty name to a parser, and was overlooked."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location")
    holder = helper.make_graph([], "g", [], [], initializer=[tensor])
    (tmp_path / "engine.onnx").write_bytes(helper.make_model(holder).SerializeToString())
    with pytest.raises(InputError, match="keeps weights in ''"):
        check_onnx_file(tmp_path / "engine.onnx", ["listed.weights"])


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "manifest.json"])
@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "function", "sparse"])
def test_every_place_of_a_graph_that_can_name_a_file(tmp_path, location, place):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    holder = helper.make_graph([], "g", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [2])])
    functions = []
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    if place == "initializer":
        holder.initializer.append(tensor)
    elif place == "attribute":
        holder.node.append(constant)
    elif place == "subgraph":
        inner = helper.make_graph([constant], "inner", [], [holder.output[0]])
        holder.node.append(helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner))
    elif place == "function":
        functions = [helper.make_function("f", "F", [], ["w"], [constant], [helper.make_opsetid("", 18)])]
    else:
        holder.sparse_initializer.add().values.CopyFrom(tensor)
    path = tmp_path / "engine.onnx"
    path.write_bytes(helper.make_model(holder, functions=functions).SerializeToString())
    with pytest.raises(InputError, match="keeps weights in"):
        check_onnx_file(path, ["listed.weights"])
    if place == "initializer":
        check_onnx_file(path, ["listed.weights", location])


def test_a_file_is_named_however_its_entry_is_written(tmp_path):
    """Fields out of order, twice, or beside unknown ones: a parser takes one of the values, so each of them counts."""

    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    key, good, evil = field(1, b"location"), field(2, b"listed"), field(2, b"evil")
    for entry in (evil + key, key + evil + good, key + good + evil, evil + key + good, key + field(9, b"x") + evil):
        model = field(7, field(5, field(13, entry)))
        (tmp_path / "engine.onnx").write_bytes(model)
        with pytest.raises(InputError, match="keeps weights in 'evil'"):
            check_onnx_file(tmp_path / "engine.onnx", ["listed"])
    (tmp_path / "engine.onnx").write_bytes(field(7, field(5, field(13, key + good))))
    check_onnx_file(tmp_path / "engine.onnx", ["listed"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'<?xml version="1.0"?><net name="unet" version="11"></net>',
        b"\x1c\0\0\0TFL3" + b"\0" * 40,
        b"\x0b\x0c",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x3a\x05abc",
        b"\x08\x0a",
        b"\x3a\x00\x80",
    ],
)
def test_what_is_no_onnx(tmp_path, data):
    (tmp_path / "engine.onnx").write_bytes(data)
    with pytest.raises(InputError, match="found no ONNX graph"):
        check_onnx_file(tmp_path / "engine.onnx", [])


def test_references_nested_without_end(tmp_path):
    data = b"location"
    for _ in range(400):
        data = b"".join(
            bytes([number << 3 | 2]) + _varint(len(part)) + part
            for number, part in [(5, b"\x32" + _varint(len(data)) + data)]
        )
        data = b"\x0a" + _varint(len(data)) + data
    (tmp_path / "engine.onnx").write_bytes(b"\x3a" + _varint(len(data)) + data)
    with pytest.raises(InputError, match="within each other"):
        check_onnx_file(tmp_path / "engine.onnx", [])


def _varint(value):
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_openvino_model_called_onnx(copied, body, backend):
    import openvino

    graph = files_of(body, "vae_decoder")[0]
    openvino.save_model(openvino.Core().read_model(copied / graph), copied / "ir.xml", compress_to_fp16=False)
    (copied / graph).write_bytes((copied / "ir.xml").read_bytes())
    (copied / "ir.bin").rename(copied / graph.replace(".onnx", ".bin"))
    (copied / "ir.xml").unlink()
    refused(seal(copied, body), backend, "found no ONNX graph")


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_in_a_graph_that_are_no_text(copied, body, backend):
    graph = files_of(body, "text_projection")[0]
    data = (copied / graph).read_bytes()
    assert data.count(b"val_1") > 1
    (copied / graph).write_bytes(data.replace(b"val_1", b"\xf6\x1b[3m", 1))
    refused(seal(copied, body), backend, "cannot open it")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "pair", [("unet", "unet_unguided"), ("tnf", "unet"), ("vae_encoder", "vae_decoder"), ("text_encoder", "tnf")]
)
def test_swapped_engines(copied, body, backend, pair):
    engines = body["profiles"][0]["engines"]
    for one, other in permutations(pair):
        engines[one] = {name: dict(spec) for name, spec in engines[one].items()}
        for name in BACKENDS:
            engines[one][name]["files"] = files_of(body_of(copied), other)
    refused(seal(copied, body), backend, "the engine is not this manifest's")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("field", "value"), [("num_frames", 6), ("num_frames", 1), ("height", 64), ("width", 8), ("batch", 2)]
)
def test_a_manifest_that_agrees_with_itself_and_not_with_its_graphs(copied, body, backend, field, value):
    from trip_rt.components import signatures
    from trip_rt.config import to_json
    from trip_rt.manifest import Manifest, from_json

    profile = body["profiles"][0]
    profile[field] = value
    (changed,) = from_json(
        Manifest, {name: part for name, part in body.items() if name not in ("format_version", "manifest_sha256")}, ""
    ).profiles
    config = open_bundle(copied).manifest.config_of(changed)
    told = signatures(config, changed.batch, changed.decode_frames, changed.context_width, changed.features_shape)
    for component, engines in profile["engines"].items():
        for spec in engines.values():
            spec["inputs"], spec["outputs"] = ([to_json(tensor) for tensor in side] for side in told[component])
    refused(seal(copied, body), backend, "the engine is not this manifest's")


def test_shapes_that_no_memory_holds(copied, body):
    for name, value in (("num_frames", 1_000_000), ("height", 1 << 20), ("width", 8192)):
        other = json.loads(json.dumps(body))
        other["profiles"][0][name] = value
        refused(seal(copied, other), "onnxruntime", r"manifest\.json: ")
    for engines in body["profiles"][0]["engines"].values():
        for spec in engines.values():
            for tensor in (*spec["inputs"], *spec["outputs"]):
                tensor["shape"] = [1 << 20] * len(tensor["shape"])
    refused(seal(copied, body), "onnxruntime", f"expected at most {MAX_TENSOR_BYTES >> 20} MB")


@pytest.fixture(scope="module")
def tokenizer(both_backends):
    return json.loads((both_backends / "tokenizer.json").read_text(encoding="utf-8"))


def changed(tokenizer, path, value):
    other = json.loads(json.dumps(tokenizer))
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(other)


BOMB = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": " "}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["model", "vocab"], {}, "not a tokenizer such as CLIP's"),
        (["model", "vocab", "a"], 2**31, "not a tokenizer such as CLIP's"),
        (["model", "vocab", "a"], 10**6, "found the token id 1000000, expected less than"),
        (["model", "vocab"], {"a": 1}, "the unknown token '<unk>' is no entry"),
        (["padding", "pad_id"], 2**31, "not a tokenizer such as CLIP's"),
        (["padding", "pad_id"], 10**6, "found the token id 1000000"),
        (["padding", "pad_to_multiple_of"], 2**31 - 1, "not a tokenizer such as CLIP's"),
        (["padding", "strategy"], {"Fixed": 2**31}, "padding: found 2147483648, expected 16"),
        (["post_processor", "special_tokens", "<end>", "ids"], [10**6], "found the token id 1000000"),
        (["post_processor", "special_tokens", "<end>", "ids"], [2] * 100, "not a tokenizer such as CLIP's"),
        (["post_processor", "single", 0, "SpecialToken", "id"], "none", "no entry found for key"),
        (["normalizer"], BOMB, "not a tokenizer such as CLIP's"),
        (["normalizer", "normalizers"], [{"type": "Prepend", "prepend": "a" * 10**6}], "not a tokenizer"),
        (["normalizer", "normalizers", 1, "content"], "xx", "not a tokenizer such as CLIP's"),
        (["pre_tokenizer"], {"type": "Split", "pattern": {"Regex": "(a|a)*"}}, "not a tokenizer such as CLIP's"),
        (["model", "type"], "WordPiece", "not a tokenizer such as CLIP's"),
        (["added_tokens", 0, "content"], "zzz", "found the token id"),
    ],
)
def test_tokenizers_that_would_do_harm(tokenizer, path, value, says):
    known = len(tokenizer["model"]["vocab"])
    with pytest.raises(InputError, match=says) as caught:
        PromptTokenizer(changed(tokenizer, path, value), 16, known)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_tokenizers_of_clip_are_let_through():
    from transformers import CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b": 3, "b</w>": 4}
    backend = CLIPTokenizer(vocab=words, merges=[]).backend_tokenizer
    assert open_tokenizer(backend.to_str()).encode("A b").ids == backend.encode("A b").ids == [0, 2, 4, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_ids_beyond_the_text_encoders_table(copied, body, backend):
    """A vocabulary that both the manifest and the tokenizer claim: nothing is made of what the table lacks."""
    tokenizer = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
    (copied / "tokenizer.json").write_text(changed(tokenizer, ["model", "vocab", "ball"], 900), encoding="utf-8")
    refused(seal(copied, body), backend, "found the token id 900")
    body["vocabulary"] = 1000
    seal(copied, body)
    if backend == "onnxruntime":
        with Animator(copied, backend) as animator, pytest.raises(EngineError, match="failed while it ran"):
            animator(np.zeros((32, 48, 3), np.uint8), PROMPT, num_inference_steps=1)


def test_broken_weights_of_an_fp32_bundle_are_called_so(copied, body):
    weights = files_of(body, "vae_decoder")[1]
    broken = np.fromfile(copied / weights, np.float32)
    broken[:] = np.nan
    broken.tofile(copied / weights)
    says = r"NaN of .* expected none; the model's weights are broken"
    with Animator(seal(copied, body), "onnxruntime") as animator, pytest.raises(EngineError, match=says):
        animator(np.zeros((32, 48, 3), np.uint8), PROMPT, num_inference_steps=1)
