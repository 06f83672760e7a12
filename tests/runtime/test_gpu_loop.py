"""The GPU loop on a fake GPU: real devices, pipeline, kernel arguments and graphs; engines by ONNX Runtime, the kernel
by Triton's interpreter."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from tiny import TINY

from trip_export.export import export_bundle
from trip_export.kernels import shape_of
from trip_export.plan import ExportOptions
from trip_kernels.packing import packed_tensors, weight_layout
from trip_rt import Animator, InputError, arithmetic
from trip_rt.accuracy import psnr
from trip_rt.backends import EngineOptions
from trip_rt.backends.onnxruntime import OnnxRuntimeEngine
from trip_rt.bundle import open_bundle
from trip_rt.devices import Buffer, open_device
from trip_rt.errors import EngineError
from trip_rt.fused_step import fitting
from trip_rt.sampling.step import UNetKind

PROMPT = "a red ball rolls to the right"
PIXELS = 16  # a program
OPTIONS = ExportOptions(gpus=("8.0", "9.0"), parity_steps=2, quantised=("int8",))
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tiny_bundle, tmp_path_factory):
    copy = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("gpu") / "bundle")  # whose engines are reused
    return export_bundle(tiny_checkpoint, copy, OPTIONS).bundle


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeCuda().install(monkeypatch)
    fake.kernels["fused_step_kernel"] = lambda programs, arguments: interpret(fake, programs, arguments)
    OnTheFake.fake = fake
    return fake


class OnTheFake(OnnxRuntimeEngine):
    """ONNX Runtime on the fake GPU's memory."""

    capturable = True
    fake: FakeCuda

    @classmethod
    def probe(cls, spec, options):
        return "cuda"

    @classmethod
    def open(cls, path, spec, options, device=None):
        inner = OnnxRuntimeEngine.open(path, spec, dataclasses.replace(options, device="cpu"), open_device("cpu"))
        return cls(spec, inner, device)

    def __init__(self, spec, inner, device):
        super(OnnxRuntimeEngine, self).__init__(spec, device)
        self._inner = inner

    def bind(self, buffers):
        self.check(buffers, (*self.spec.inputs, *self.spec.outputs))
        views = {name: self.fake.view(buffer.address, buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
        work = self._inner.bind(
            {name: Buffer(view.dtype, view.shape, view.ctypes.data, view) for name, view in views.items()}
        )
        return lambda: self.fake.work(work)

    def describe(self):
        return {"backend": "fake", "device": "cuda"}

    def close(self):
        self._inner.close()


def interpret(fake, programs, arguments):
    """The fused kernel on the fake GPU's memory, its parameters by position alone, as the GPU takes them."""
    from trip_kernels.compile import parameter_type
    from trip_kernels.fused_step import fused_step_kernel

    dtypes = {"*fp32": torch.float32, "*u8": torch.uint8, "*i32": torch.int32, "*i64": torch.int64}
    names = [name for name in fused_step_kernel.arg_names if not name.isupper()]
    assert arguments[len(names) :] == [0, 0], "two scratch pointers, null"
    values = []
    for name, value in zip(names, arguments, strict=False):
        if (kind := parameter_type(name)) == "i32":
            values.append(value)
        else:
            block = fake.block(value, 1)
            values.append(torch.frombuffer(block, dtype=dtypes[kind], count=len(block) // dtypes[kind].itemsize))
    shape = shape_of(TINY.trip)
    constants = dict(SHAPE=shape, LAYOUT=weight_layout(shape, torch.float32), PIXELS=PIXELS)
    fused_step_kernel[(programs,)](*values, **constants)


def animator_on(folder, cuda_graph=True, kernels=True):
    """An Animator on the fake GPU; large programs keep the interpreter quick."""
    bundle = open_bundle(folder)
    profile = bundle.manifest.profile()
    specs = {
        name: dataclasses.replace(
            spec, cubins={gpu: dataclasses.replace(cubin, pixels=PIXELS) for gpu, cubin in spec.cubins.items()}
        )
        for name, spec in profile.kernels.items()
    }
    profile = dataclasses.replace(profile, kernels=specs if kernels else {})
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, profiles=(profile,)))
    return Animator(bundle, OnTheFake, options=EngineOptions(cuda_graph=cuda_graph))


@pytest.fixture(scope="module")
def expected(bundle):
    with Animator(bundle, "onnxruntime") as animator:
        return {
            steps: animator.latents(images(animator), [PROMPT], [7], num_inference_steps=steps, guidance_scale=3.0)
            for steps in (2, 1)
        }


def images(animator):
    from trip_rt.images import load_image

    return load_image(PICTURE, animator.config.height, animator.config.width)[None]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_fused_kernel_makes_the_clip_that_the_engines_make(gpu, bundle, expected, cuda_graph):
    with animator_on(bundle, cuda_graph) as animator:
        about = animator.describe()
        assert (
            about["after_unet"] == "the fused kernel for compute capability 9.0" and about["cuda_graph"] is cuda_graph
        )
        held = len(gpu.memory)
        for steps in (2, 1):  # one graph serves any number of steps
            gpu.calls.clear()
            found = animator.latents(images(animator), [PROMPT], [7], num_inference_steps=steps, guidance_scale=3.0)
            assert psnr(found, expected[steps], np.ptp(expected[steps])) > 100
            assert gpu.calls.count("cudaGraphLaunch") == (steps if cuda_graph else 0)
            assert gpu.calls.count("cuLaunchKernel") == (1 if cuda_graph else steps + 1)
            assert (
                not {"cudaMalloc", "cudaMallocHost", "cudaGraphInstantiate"} & set(gpu.calls)
                and len(gpu.memory) == held
            )
    assert not gpu.memory and not gpu.handles


def test_quantised_networks_have_graphs_of_their_own(gpu, bundle, monkeypatch):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "arithmetic": "int8"}
    with Animator(bundle, "onnxruntime") as animator:
        expected = animator.latents(images(animator), [PROMPT], [7], **settings)
    monkeypatch.setattr(arithmetic, "LEAST_GFLOP", 0.0)
    with animator_on(bundle) as animator:
        for kept in False, True:  # auto frees the network, then takes it
            monkeypatch.setattr(arithmetic, "WORTH", 1e9 if kept else 0.0)
            gpu.calls.clear()
            found = animator.latents(images(animator), [PROMPT], [7], **settings)
            assert psnr(found, expected, np.ptp(expected)) > 60 and gpu.calls.count("cudaGraphLaunch") == 2
            animator._chooser._auto = None
            assert animator.arithmetic("auto")[0] == ("int8" if kept else "own")
            assert ("unet in int8" in animator.engines) == kept
    assert not gpu.memory and not gpu.handles


def test_longer_clips_are_made_by_the_engines_and_clips_go_on_by_the_kernel(gpu, bundle):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    with animator_on(bundle) as animator, Animator(bundle, "onnxruntime") as on_the_host:
        found, expected = (
            one.latents(images(one), [PROMPT], [7], num_frames=8, **settings) for one in (animator, on_the_host)
        )
        assert psnr(found, expected, np.ptp(expected)) > 100
        clip = on_the_host(PICTURE, PROMPT, seed=7, **settings)
        gpu.calls.clear()
        found, expected = (one.extend(clip, PROMPT, **settings).latents for one in (animator, on_the_host))
        assert psnr(found, expected, np.ptp(expected)) > 100 and gpu.calls.count("cudaGraphLaunch") == 2


def test_between_encoding_and_decoding_nothing_waits_for_the_host(gpu, bundle):
    with animator_on(bundle) as animator:
        pipeline, steps = animator._pipeline, 4
        started = []
        replay = pipeline._works[UNetKind()]
        pipeline._works[UNetKind()] = lambda: (started.append(len(gpu.calls)), replay())
        animator(PICTURE, PROMPT, num_inference_steps=steps)
        loop = gpu.calls[started[0] : started[-1]]
    assert set(loop) == {
        "cudaGraphLaunch",
        "cudaEventCreateWithFlags",
        "cudaEventRecord",
        "cudaEventSynchronize",
        "cudaEventDestroy",
    }
    assert loop.count("cudaEventSynchronize") == steps - 3, "two steps are under way before the host waits for one"


def test_threads_and_streams_take_turns(gpu, bundle):
    with animator_on(bundle) as animator:
        alone = [animator(PICTURE, PROMPT, seed=seed, num_inference_steps=1).frames for seed in range(4)]
        streams = [animator.stream(PICTURE, PROMPT, seed=seed, num_inference_steps=1) for seed in range(4)]
        mixed = [np.stack(frames) for frames in zip(*zip(*streams, strict=True), strict=True)]
        gpu.calls.clear()
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(animator, PICTURE, PROMPT, seed=i % 4, num_inference_steps=1) for i in range(12)]
            threaded = [call.result(timeout=100).frames for call in calls]
        assert "cudaSetDevice" in gpu.calls, "a new thread's calls go to the same GPU"
        for i, frames in enumerate([*mixed, *threaded]):
            assert (frames == alone[i % 4]).all()
    with pytest.raises(RuntimeError, match="closed GPU device"):
        animator(PICTURE, PROMPT, num_inference_steps=1)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_gpu_without_a_kernel_runs_the_engine_of_tnf_and_says_so(gpu, bundle, expected, kernels):
    gpu.capability = (12, 1) if not kernels else (7, 5)
    with pytest.warns(
        UserWarning,
        match=r"this GPU \(a fake GPU\) is .*: the engine of tnf runs in its place, more slowly; export .*--gpus",
    ):
        animator = animator_on(bundle, kernels=kernels)
    with animator:
        assert animator.describe()["after_unet"] == "the engine of tnf" and animator.describe()["cuda_graph"] is False
        found = animator.latents(images(animator), [PROMPT], [7], num_inference_steps=2, guidance_scale=3.0)
        assert np.array_equal(found, expected[2]), "the same code on another device: bit for bit"
    assert not gpu.memory and not gpu.handles


@pytest.mark.filterwarnings("ignore:the bundle has no kernel")
def test_frames_are_decoded_while_others_are_read_back(gpu, bundle):
    with animator_on(bundle, kernels=False) as animator:
        latents = np.random.default_rng(0).standard_normal((8, 5, 4, 6), np.float32)
        whole = np.concatenate(list(animator.decode_pixels(latents)))
        with Animator(bundle, "onnxruntime") as on_the_host:
            assert np.array_equal(whole, np.concatenate(list(on_the_host.decode_pixels(latents))))
        next(animator.decode_pixels(latents))  # abandoned half-way
        assert np.array_equal(whole, np.concatenate(list(animator.decode_pixels(latents))))


def test_an_interrupted_run_leaves_the_animator_as_it_was(gpu, bundle, expected):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with animator_on(bundle) as animator:
        with pytest.raises(KeyboardInterrupt):
            animator(PICTURE, PROMPT, on_step=interrupt)
        found = animator.latents(images(animator), [PROMPT], [7], num_inference_steps=1, guidance_scale=3.0)
        assert psnr(found, expected[1], np.ptp(expected[1])) > 100
    assert not gpu.memory and not gpu.handles


@pytest.mark.parametrize(
    ("function", "error", "kind", "says"),
    [
        ("cuLaunchKernel", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", EngineError, "cuLaunchKernel failed"),
        ("cuModuleLoadData", "CUDA_ERROR_OUT_OF_MEMORY", InputError, "too little memory"),
    ],
)
def test_a_kernel_that_fails_says_so_in_one_line_and_frees_all(gpu, bundle, function, error, kind, says):
    gpu.failing[function] = getattr(gpu.driver.CUresult, error)
    with pytest.raises(kind, match=says) as caught:
        animator_on(bundle)
    assert "\n" not in str(caught.value) and not gpu.memory and not gpu.handles


@pytest.mark.parametrize("foreign", [False, True])
def test_machine_code_that_the_driver_does_not_take_leaves_its_work_to_the_engine(gpu, bundle, expected, foreign):
    if foreign:  # what the manifest calls code for 8.0 is for 9.0
        (cubin,) = bundle.glob("fused_step-9.0*")
        gpu.capability = (8, 0)
        opened = open_bundle(bundle)
        profile = opened.manifest.profile()
        kernel = profile.kernels["fp32"]
        cubins = {"8.0": dataclasses.replace(kernel.cubins["8.0"], file=cubin.name)}
        kernels = {"fp32": dataclasses.replace(kernel, cubins=cubins)}
        changed = dataclasses.replace(opened.manifest, profiles=(dataclasses.replace(profile, kernels=kernels),))
        opened, reason = dataclasses.replace(opened, manifest=changed), "NO_BINARY_FOR_GPU"
    else:
        gpu.failing["cuModuleLoadData"] = gpu.driver.CUresult.CUDA_ERROR_INVALID_IMAGE
        opened, reason = open_bundle(bundle), "INVALID_IMAGE"
    with pytest.warns(UserWarning, match=rf"the driver does not take the one for [89].0 \(cuModuleLoadData.*{reason}"):
        animator = Animator(opened, OnTheFake)
    with animator:
        found = animator.latents(images(animator), [PROMPT], [7], num_inference_steps=1, guidance_scale=3.0)
        assert psnr(found, expected[1], np.ptp(expected[1])) > 100
    assert not gpu.memory and not gpu.handles


def test_a_kernel_of_another_trip_rt_is_refused(gpu, bundle, monkeypatch):
    opened = open_bundle(bundle)
    profile = opened.manifest.profile()
    strange = dataclasses.replace(profile.kernels["fp32"], parameters=("latents", "depth_map"))
    changed = dataclasses.replace(opened.manifest, profiles=(dataclasses.replace(profile, kernels={"fp32": strange}),))
    with pytest.raises(InputError, match="wants depth_map, which this trip-rt does not know"):
        Animator(dataclasses.replace(opened, manifest=changed), OnTheFake)
    assert not gpu.memory and not gpu.handles


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ("8.0", "8.0"),
        ("8.7", "8.6"),
        ("8.9", "8.9"),
        ("9.0", "9.0"),
        ("10.3", None),
        ("7.5", None),
        ("11.0", None),
        ("12.0", "12.0"),
        ("12.1", None),
    ],
)
def test_machine_code_runs_on_later_minor_versions_below_9(there, found):
    assert fitting(["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"], there) == found


def test_a_kernel_is_compiled_once(tiny_checkpoint, bundle):
    before = {path: path.stat().st_mtime_ns for path in bundle.glob("fused_step*")}
    assert len(before) == 3
    again = export_bundle(tiny_checkpoint, bundle, OPTIONS)
    assert "fused step" in again.reused and before == {
        path: path.stat().st_mtime_ns for path in bundle.glob("fused_step*")
    }


def test_kernels_are_kept_where_asked_and_removed_with_their_profile(tiny_checkpoint, bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    export_bundle(tiny_checkpoint, copy, ExportOptions(add=True, parity_steps=2))
    assert list(open_bundle(copy).manifest.profile().kernels["fp32"].cubins) == ["8.0", "9.0"]
    export_bundle(tiny_checkpoint, copy, ExportOptions(parity_steps=2))
    assert not list(copy.glob("fused_step*")) and not open_bundle(copy).manifest.profile().kernels


def test_gpus_that_nothing_is_compiled_for_are_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"gpus: found 7\.5, expected all, none, or some of 8\.0,8\.6"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportOptions(gpus=("9.0", "7.5")))
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_holds_all_the_weights_that_its_kernel_reads(bundle):
    manifest = open_bundle(bundle).manifest
    kernel = manifest.profile().kernels["fp32"]
    shape, timesteps = shape_of(TINY.trip), TINY.trip.schedule.num_train_timesteps
    modulation = packed_tensors(shape, torch.float32)["modulation"]
    expected = weight_layout(shape, torch.float32).modulation + timesteps * modulation.nbytes
    assert "weights" in kernel.parameters and manifest.files[kernel.weights].bytes == expected
