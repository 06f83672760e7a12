"""One component to native code, by torch.export and AOTInductor: a `.pt2` package that needs torch but no Python of the
model's."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from trip_export.components import Component
from trip_rt.backends.inductor import full_fp32
from trip_rt.errors import InputError
from trip_rt.files import whole_file

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def export_inductor(component: Component, path: Path, precision: str, device: str) -> dict[str, str]:
    """Write `component` to `path`, a name ending in .pt2, in fp32, fp16 or bf16, compiled for this machine's `device`,
    cpu or cuda.

    Returns what `target_for` does, with its InputErrors.

    A weight that the graph casts or reorders is cast and reordered here ("freezing"), so in half precision the package
    holds half of each matrix and nothing is converted at a call. Threads are not baked in. Every build has a cache of
    its own, gone afterwards, so that nothing compiled by another torch or with other settings gets in. The generated
    C++ is left out of the package: nothing reads it.
    """
    target = target_for(device)
    from torch._inductor import aoti_compile_and_package

    with (
        _building(path.parent) as folder,
        full_fp32(torch),
        torch.no_grad(),  # inductor freezes weights only without gradients
    ):
        package = folder / "engine.pt2"  # its stem is the folder that all members lie in, which the runtime knows
        try:
            aoti_compile_and_package(export_program(component, precision, device), package_path=str(package))
        finally:
            component.module.to("cpu")  # and not before: the program holds the same tensors
        with whole_file(path) as part:
            _strip(package, part)
    return target


def target_for(device: str) -> dict[str, str]:
    """What a machine must have in common with this one to run what is compiled here for `device`. InputError without a
    C++ compiler or that device.

    `torch` is the release without the build's name (2.13.0, not 2.13.0+cpu): the code calls torch by an interface that
    is the same in all builds of a release. `cpu` names the vector extensions used, in the words of
    `torch.cpu.get_capabilities()`; for a GPU it is `compute_capability`, and `cuda` the toolkit's major version.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: found no GPU that this torch can use, expected one to compile for; export for the CPU or install"
            " torch with CUDA"
        )
    target = {"torch": torch.__version__.split("+")[0], "device": device, "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as folder, _building(Path(folder)):
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        flags = pick_vec_isa().build_arch_flags()  # tries them out with the compiler, once a process
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return target | {"compute_capability": f"{major}.{minor}", "cuda": str(torch.version.cuda).split(".")[0]}
    # From the compiler's words (-mavx512f -mfma) to torch's (avx512_f fma3).
    known = {name.replace("_", ""): name for name in torch.cpu.get_capabilities()} | {"fma": "fma3"}
    used = {flag.removeprefix("-m").replace("-", "") for flag in re.findall(r"[\w-]+", flags)}
    return target | {"cpu": " ".join(sorted(known[flag] for flag in used & known.keys()))}


def export_program(component: Component, precision: str, device: str) -> ExportedProgram:
    """The graph to be compiled, static in all shapes; in half precision by autocast, its inputs and outputs as
    documented all the same. The component's module is moved to the device, and its weights are the program's."""
    module: nn.Module = component.module.eval()
    if precision != "fp32":
        module = _Autocast(module, device, _HALF[precision])
    with torch.no_grad():
        return torch.export.export(module.to(device), tuple(tensor.to(device) for tensor in component.inputs.values()))


class _Autocast(nn.Module):
    """PyTorch's own policy: matrix products and convolutions in half precision, norms and softmax summed in fp32; the
    noise prior, which is neither, stays as it is."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype):
        super().__init__()
        self.module, self.device, self.dtype = module, device, dtype

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(self.device, self.dtype):
            return tree_map(Tensor.float, self.module(*inputs))


def _strip(package: Path, stripped: Path) -> None:
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(stripped, "w") as kept:
        for member in source.infolist():
            if not member.filename.endswith(".cpp"):
                with (
                    source.open(member) as read,
                    kept.open(zipfile.ZipInfo(member.filename), "w", force_zip64=True) as written,
                ):
                    shutil.copyfileobj(read, written)


def _knows(config: Any, name: str) -> bool:
    """Whether this torch has that setting of inductor's; some are newer than torch 2.11, and patching one that is not
    there fails."""
    for word in name.split("."):
        if not hasattr(config, word):
            return False
        config = getattr(config, word)
    return True


@contextlib.contextmanager
def _building(place: Path) -> Iterator[Path]:
    """A folder in `place` for a build, with inductor set up to work there. Its messages are about its own internals and
    are not shown; errors are raised.

    The compiler is looked for first, as inductor would miss it only after minutes.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise InputError(
            f"inductor: found no C++ compiler ({compiler}), expected one to build native code with; install g++ or"
            " set CXX"
        )
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    settings: dict[str, Any] = {
        "freezing": True,
        "cpp.cxx": (None, compiler),
        "cpp.march": "",  # not the compiler's "native", but only what the target can tell of
        "cpp.dynamic_threads": True,  # else the number of this machine's cores is compiled in
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.precompile_headers": False,  # these would stay, outside the cache's folder
        "aot_inductor.embed_kernel_binary": True,  # a GPU's kernels in the library: files beside it would be gone
    }
    settings = {name: value for name, value in settings.items() if _knows(config, name)}
    disabled = logging.root.manager.disable
    # The prefix is that of an export's draft, which the next export sweeps up should this process be killed.
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=place) as folder:
        logging.disable(logging.WARNING)
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                with fresh_cache(dir=folder), config.patch(settings):
                    yield Path(folder)
        finally:
            logging.disable(disabled)
