"""The notes of finished engines that an interrupted export leaves: one that is taken up speaks of whole files."""

import json

from fuzzing import fuzz_area, mutated_json

from trip_export.store import store
from trip_rt.bundle import file_spec
from trip_rt.components import TensorSpec
from trip_rt.manifest import EngineSpec

KEY = "0" * 64
TENSOR = TensorSpec("x", "float32", (1, 2))


@fuzz_area("finished notes", quick=60, full=1000)
def test_notes(fuzz, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"graph")
    spec = EngineSpec(("a.onnx",), KEY, "fp32", {}, 1.0, {"backend": "onnxruntime"}, (TENSOR,), (TENSOR,))
    with store(tmp_path) as made:
        made.finish(spec)
    (note,) = tmp_path.glob(".finished-*")
    valid = [json.loads(note.read_text())]

    def take_up(data):
        note.write_bytes(data)
        with store(tmp_path) as again:
            found = again.finished(KEY)
            if found is None:
                raise LookupError("not taken up")
            assert found.key == KEY and found.files == ("a.onnx",)
            assert again.files == {"a.onnx": file_spec(tmp_path / "a.onnx")}

    fuzz(mutated_json(valid), take_up, LookupError, folder=tmp_path)
