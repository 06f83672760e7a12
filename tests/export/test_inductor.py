"""AOTInductor on this CPU: what is compiled agrees with PyTorch and is in the precision asked for, and what the runtime
refuses to load.

Building even the tiny UNet takes a minute or two, so of it only the graph is looked at; two convolutions stand in for
it. Nothing here needs a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch._inductor import config
from torch.export import ExportedProgram
from torch.fx import GraphModule

from trip_export import inductor_export
from trip_export.components import Call, Component, component
from trip_export.inductor_export import export_inductor, export_program, target_for
from trip_rt.accuracy import relative_errors
from trip_rt.backends import EngineOptions
from trip_rt.backends.inductor import InductorEngine
from trip_rt.components import TensorSpec
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec

COMPILER = os.environ.get("CXX") or "g++"
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed, and inductor compiles C++"
)


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that builds native code: it needs the compiler, and time."""
    return pytest.mark.slow(needs_compiler(test))


QUICK = {"cpp.vec_isa_ok": True, "aot_inductor.compile_wrapper_opt_level": "O0"}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
HERE = {"torch": torch.__version__.split("+")[0], "device": "cpu", "machine": os.uname().machine, "cpu": ""}
X = TensorSpec("x", "float32", (2, 3))
SPEC = EngineSpec(("engine.pt2",), "0" * 64, "fp32", {}, 0.0, HERE, (X,), (dataclasses.replace(X, name="y"),))
LIBRARY = "engine/data/aotinductor/model/a.so"


@dataclasses.dataclass
class Built:
    """A component, its engine file, and the C++ that became it."""

    part: Component
    path: Path
    spec: EngineSpec
    code: str

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy().copy() for name, tensor in self.part.inputs.items()}

    def expected(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return self.part.module(*map(torch.from_numpy, inputs.values())).numpy()

    def open(self, **options: object) -> InductorEngine:
        return InductorEngine.open(self.path, self.spec, EngineOptions(**options))


def convolutions() -> Component:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 4, 3, padding=1),
        nn.Softmax(dim=1),
    )
    return Component("convolutions", Call(layers), {"latents": torch.randn(2, 4, 8, 6)}, ("image",))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Built]:
    """Builds a component in a precision, each once a test run; to be quick, inductor takes the vector extensions that
    torch finds without trying them out, and has the compiler spend no time on the code between the kernels."""
    folder = tmp_path_factory.mktemp("inductor")
    done: dict[tuple[str, str], Built] = {}
    strip, model = inductor_export._strip, tiny_model()

    def build(name: str, precision: str) -> Built:
        if (name, precision) not in done:
            part = convolutions() if name == "convolutions" else component(model, name, 1, 5)
            path, code = folder / f"{name}-{precision}.pt2", []

            def read(package: Path, stripped: Path) -> None:
                with zipfile.ZipFile(package) as archive:
                    code.extend(
                        archive.read(member).decode() for member in archive.namelist() if member.endswith(".cpp")
                    )
                strip(package, stripped)

            with pytest.MonkeyPatch.context() as patch, config.patch(QUICK):
                patch.setattr(inductor_export, "_strip", read)
                target = export_inductor(part, path, precision, "cpu")
            with torch.no_grad():
                made = part.module(*part.inputs.values())
            inputs = tuple(
                TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in part.inputs.items()
            )
            shapes = [tuple(tensor.shape) for tensor in (made if isinstance(made, tuple) else (made,))]
            outputs = tuple(
                TensorSpec(name, "float32", shape) for name, shape in zip(part.outputs, shapes, strict=True)
            )
            spec = EngineSpec((path.name,), "0" * 64, precision, {}, 0.0, target, inputs, outputs)
            done[name, precision] = Built(part, path, spec, "".join(code))
        return done[name, precision]

    return build


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that temporary files go to, empty again when the test is over."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def package(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as refusal:
        InductorEngine.open(path, SPEC, EngineOptions())
    assert "\n" not in str(refusal.value)


# What is compiled


@compiles
@pytest.mark.parametrize(
    ("name", "precision", "least", "most"),
    [("convolutions", "fp32", 0, 1e-5), ("convolutions", "fp16", 1e-5, 4e-2), ("tnf", "bf16", 1e-5, 4e-2)],
)
def test_an_engine_agrees_with_pytorch(build, temporary, name, precision, least, most):
    built = build(name, precision)
    engine = built.open(device="cpu")
    assert list(temporary.iterdir()) == []
    (first,) = engine.run(built.inputs).values()
    kept = first.copy()
    changed = {
        key: array[::-1].copy()[::-1] + array.dtype.type(1) for key, array in built.inputs.items()
    }  # not contiguous
    for array in changed.values():
        array.flags.writeable = False
    outputs = engine.run(changed)
    assert list(outputs) == list(built.part.outputs)
    for found, inputs in (
        (first, built.inputs),
        (outputs[built.part.outputs[0]], {key: array.copy() for key, array in changed.items()}),
    ):
        assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
        assert least <= relative_errors(found, built.expected(inputs))[1] <= most
    assert (first == kept).all(), "the second call wrote into the first one's output"
    assert relative_errors(outputs[built.part.outputs[0]], first)[1] > 1e-3
    assert engine.describe() == {"backend": "inductor", "version": torch.__version__, "device": "cpu"}


@compiles
def test_weights_are_converted_when_built(build):
    built = build("tnf", "bf16")
    linear = sum(isinstance(module, nn.Linear) for module in built.part.module.modules())
    assert built.code.count("].dtype = cached_torch_dtype_bfloat16") >= linear
    frozen = re.findall(r'\[(\d+)\].name = "_frozen', built.code)
    assert len(frozen) >= linear


@compiles
def test_what_a_build_leaves_behind(build):
    caches = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    folder = Path.cwd()
    before = set(folder.iterdir())
    built = build("convolutions", "fp32")
    assert {path.suffix for path in built.path.parent.iterdir()} == {".pt2"}
    assert set(folder.iterdir()) - {folder / "__pycache__", folder / ".pytest_cache"} <= before
    assert caches == {name: os.environ.get(name) for name in caches}
    with zipfile.ZipFile(built.path) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".o", ".pkl", ".pt"))]
        assert all(not name.startswith(("engine/data/weights", "engine/models")) for name in archive.namelist())


@compiles
def test_the_target_is_this_machine(build):
    target = build("convolutions", "fp32").spec.target
    assert target == target_for("cpu")
    assert target | {"cpu": ""} == HERE
    assert all(torch.cpu.get_capabilities()[name] for name in target["cpu"].split())


@compiles
def test_threads_hold_during_a_call(build):
    built = build("convolutions", "fp32")
    before = torch.get_num_threads()
    seen = []
    engine = built.open(threads=before + 1)
    run, loader = engine._loader.run, engine._loader

    class Watched:
        def run(self, inputs):
            seen.append(torch.get_num_threads())
            return run(inputs)

    engine._loader = Watched()
    (found,) = engine.run(built.inputs).values()
    assert loader and seen == [before + 1] and torch.get_num_threads() == before
    assert relative_errors(found, built.expected(built.inputs))[1] <= 1e-5


@compiles
def test_closing(build):
    built = build("convolutions", "fp32")
    engine = built.open()
    with pytest.raises(ValueError, match=r"input latents: found float64 .*, expected float32 \[2, 4, 8, 6\]"):
        engine.run({"latents": built.inputs["latents"].astype(np.float64)})
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed engine"):
        engine.run(built.inputs)


def dtypes(program: ExportedProgram, *operators: str) -> Counter[torch.dtype]:
    """Of what the operators whose names begin so give, those under autocast too; without `operators`, of all
    of them."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    nodes = [
        node
        for graph in graphs
        for node in graph.nodes
        if node.op == "call_function" and str(node.target).startswith(operators or "aten.")
    ]
    return Counter(node.meta["val"].dtype for node in nodes if node.meta["val"] is not None)


@pytest.mark.parametrize(("name", "precision"), [("unet", "bf16"), ("text_encoder", "fp16"), ("text_encoder", "fp32")])
def test_matrix_products_and_convolutions_are_in_the_precision_asked_for(name, precision):
    part = component(tiny_model(), name, 1, 5)
    layers = sum(isinstance(one, (nn.Linear, nn.Conv2d, nn.Conv3d)) for one in part.module.modules())
    program = export_program(part, precision, "cpu")
    products = dtypes(program, "aten.conv", "aten.linear", "aten.matmul", "aten.scaled_dot_product")
    assert set(products) == {HALF.get(precision, torch.float32)} and products.total() >= layers > 0
    outputs = program.graph.output_node().args[0]
    inputs = [node.meta["val"].dtype for node in program.graph.find_nodes(op="placeholder")]
    assert {output.meta["val"].dtype for output in outputs} == {torch.float32} and set(inputs) <= {
        torch.float32,
        torch.int64,
    }


def test_the_noise_prior_stays_in_fp32():
    linear_fusion = component(tiny_model(fusion="linear"), "tnf", 1, 5)
    assert set(dtypes(export_program(linear_fusion, "bf16", "cpu"))) == {torch.float32}


def test_a_missing_compiler_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(inductor_export, "export_program", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for compiler in ("g++", "no-such-compiler"):
        with pytest.raises(
            InputError,
            match=re.escape(f"found no C++ compiler ({compiler}), expected one") + ".*; install g\\+\\+ or set CXX",
        ):
            export_inductor(convolutions(), tmp_path / "a.pt2", "fp32", "cpu")
        monkeypatch.setenv("CXX", "no-such-compiler")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gpu_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: found no GPU"):
        target_for("cuda")


@compiles
def test_a_cut_short_build_leaves_the_old_engine(monkeypatch, tmp_path):
    def cut_short(program, package_path):
        Path(package_path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", cut_short)
    path = tmp_path / "a.pt2"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        export_inductor(convolutions(), path, "fp32", "cpu")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


# What the runtime refuses


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            {},
            {"device": "cuda"},
            "inductor: found that cuda was asked for, the engine was compiled for cpu; export it for cuda",
        ),
        (
            {"device": "cuda"},
            {"device": "cpu"},
            "inductor: found that cpu was asked for, the engine was compiled for cuda; export it for cpu",
        ),
        (
            {"torch": "2.0.1"},
            {},
            f"inductor: found torch {HERE['torch']}, the engine was compiled for 2.0.1; pip install torch==2.0.1",
        ),
        (
            {"machine": "sparc64"},
            {},
            f"inductor: found machine {HERE['machine']}, the engine was compiled for sparc64; export",
        ),
        (
            {"cpu": "avx1024 amx_dream"},
            {},
            "inductor: found a CPU without avx1024, amx_dream, the engine was compiled for one with it; export",
        ),
        (
            {"device": "cuda"},
            {},
            "inductor: found no GPU that torch can use, the engine was compiled for one; install a driver",
        ),
    ],
)
def test_probe_refuses_another_target(monkeypatch, target, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as refusal:
        InductorEngine.probe(dataclasses.replace(SPEC, target=HERE | target), EngineOptions(**options))
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_probe_compares_the_gpu(monkeypatch):
    """With torch's answers put in its mouth, as there may be no GPU here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    target = HERE | {"device": "cuda", "compute_capability": "9.0", "cuda": "13"}
    assert InductorEngine.probe(dataclasses.replace(SPEC, target=target), EngineOptions()) == "cuda"
    for changed, message in (({"compute_capability": "8.6"}, "compute capability 9.0"), ({"cuda": "12"}, "cuda 13")):
        with pytest.raises(InputError, match=f"inductor: found {message}, the engine was compiled for"):
            InductorEngine.probe(dataclasses.replace(SPEC, target=target | changed), EngineOptions())


def test_without_torch_the_module_imports_and_the_probe_says_what_to_install():
    code = f"""
import sys
sys.modules["torch"] = None
from trip_rt.backends.base import EngineOptions
from trip_rt.backends.inductor import InductorEngine
from trip_rt.manifest import EngineSpec
try:
    InductorEngine.probe(EngineSpec(("a",), "", "fp32", {{}}, 0.0, {HERE!r}, (), ()), EngineOptions())
except ValueError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ran.stdout == "inductor: the package torch is not installed; pip install torch\n"


class Pickled:
    def __reduce__(self):
        return exec, ("import trip_rt; trip_rt.unpickled = True",)


@pytest.mark.parametrize(
    "member",
    [
        "engine/data/aotinductor/model/../../../../../escaped.so",
        "engine/data/aotinductor/model/..so",
        "/engine/data/aotinductor/model/b.so",
        "../engine/data/aotinductor/model/b.so",
        "engine/data/aotinductor/model/b.cpp",
        "engine/data/aotinductor/model/b.wrapper_compile_flags.json/",
        "engine/data/aotinductor/other/b.json",
        "engine/data/aotinductor/model/b.json\n",
        "engine/data/weights/weight_0",
        "engine/data/constants/custom_obj_0",
        "engine/data/sample_inputs/model.pt",
        "engine/models/model.json",
        "other/data/aotinductor/model/b.json",
    ],
)
def test_a_package_with_a_strange_member_is_refused(temporary, tmp_path, member):
    import trip_rt

    path = package(tmp_path / "a.pt2", {LIBRARY: b"", member: pickle.dumps(Pickled())})
    refused(path, "a.pt2: found '.*' inside, which no engine holds")
    assert sorted(tmp_path.iterdir()) == [path, temporary] and not hasattr(trip_rt, "unpickled")


def test_a_damaged_package_is_refused(temporary, tmp_path):
    path = tmp_path / "a.pt2"
    path.write_bytes(b"no archive")
    refused(path, "damaged, it is not a package")
    whole = package(path, {LIBRARY: b"library" * 1000}).read_bytes()
    path.write_bytes(whole[:4000])
    refused(path, "damaged, it is not a package")
    path.write_bytes(whole.replace(b"librarylibrary", b"librarylibrarx"))
    refused(path, "damaged, it is not a package")
    refused(package(path, {}), "not one library among them")
    refused(package(path, {LIBRARY: b"", LIBRARY.replace("a.so", "b.so"): b""}), "not one library among them")
    metadata = {LIBRARY.replace(".so", "_metadata.json"): b'{"AOTI_DEVICE_KEY": "cpu"}'}
    refused(package(path, {LIBRARY: b"no library"} | metadata), "torch cannot load it")


# What a GPU would need, seen without one


def test_the_weights_stay_on_the_gpu_until_the_package_is_compiled(monkeypatch, tmp_path):
    """The program holds the module's own tensors: moved back before, a GPU's package would get a CPU's weights."""
    order = []

    class Moved(nn.Module):
        def to(self, device):
            order.append(f"to {device}")
            return self

    part = Component("a", Moved(), {}, {})
    monkeypatch.setattr(inductor_export, "target_for", lambda device: {})
    monkeypatch.setattr(torch.export, "export", lambda module, inputs: order.append("export"))

    def compiled(program, package_path):
        order.append("compile")
        with zipfile.ZipFile(package_path, "w"):
            pass

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    export_inductor(part, tmp_path / "a.pt2", "fp32", "cuda")
    assert order == ["to cuda", "export", "compile", "to cpu"]


def test_kernels_for_a_gpu_are_in_the_library_and_settings_that_torch_lacks_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with inductor_export._building(tmp_path):
        assert config.aot_inductor.embed_kernel_binary is True and config.cpp.march == ""
    assert not config.aot_inductor.embed_kernel_binary
    knows = inductor_export._knows
    monkeypatch.setattr(inductor_export, "_knows", lambda of, name: name != "cpp.march" and knows(of, name))
    with inductor_export._building(tmp_path):
        assert config.cpp.march is None and config.freezing
    assert knows(config, "cpp.cxx") and not knows(config, "cpp.no_such") and not knows(config, "no.such.thing")


@pytest.mark.parametrize(("version", "loads_folders"), [("2.11.0+cu130", False), ("2.13.0+cpu", True)])
def test_a_torch_that_loads_no_folders_is_given_the_package(monkeypatch, tmp_path, version, loads_folders):
    package = tmp_path / "engine.pt2"
    with zipfile.ZipFile(package, "w") as file:
        file.writestr(LIBRARY, b"a library")
    places = []
    monkeypatch.setattr(InductorEngine, "probe", lambda spec, options: "cpu")
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda place, *_: places.append(Path(place)))
    InductorEngine.open(package, SPEC, EngineOptions()).close()
    (place,) = places
    assert (place == package) is not loads_folders and not (loads_folders and place.exists())
