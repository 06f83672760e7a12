"""Buffers and their order of work on the host and on a fake GPU, and every call of ours against the real
cuda-bindings."""

from __future__ import annotations

import ast
import inspect
import sys

import numpy as np
import pytest
from fake_cuda import FakeCuda

from trip_rt.devices import cuda as module
from trip_rt.devices import open_device
from trip_rt.devices.cuda import CudaDevice
from trip_rt.errors import EngineError, InputError


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    fake = FakeCuda().install(monkeypatch)
    made = open_device(request.param)
    yield made
    made.close()
    made.close()
    assert not fake.memory and not fake.handles


def test_buffers_hold_what_is_written(device):
    buffer = device.zeros("float32", (3, 2, 2))
    assert not device.read(buffer).any() and buffer.nbytes == 48
    value = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    device.write(buffer, np.asfortranarray(value))
    value[:] = -1  # the caller's own again
    kept = device.read(buffer)
    device.write(buffer[1:2], np.full((1, 2, 2), 9, np.float32))
    assert kept.ravel().tolist() == list(range(12)), "what was read is the caller's own"
    assert device.read(buffer).ravel().tolist() == [0, 1, 2, 3, 9, 9, 9, 9, 8, 9, 10, 11]
    assert device.read(buffer.row(2)).tolist() == [[8, 9], [10, 11]] and buffer[1:].shape == (2, 2, 2)
    device.copy(buffer[:1], buffer[2:])
    assert device.read(buffer.row(2)).tolist() == [[0, 1], [2, 3]]


def test_frames_are_gathered(device):
    clip = np.random.default_rng(0).standard_normal((3, 5, 2, 4), np.float32)
    source, target = device.zeros("float32", clip.shape), device.zeros("float32", (4, 3, 2, 4))
    device.write(source, clip)
    device.gather_frames(source, [3, 4, 4, 0], target)
    assert np.array_equal(device.read(target), clip[:, [3, 4, 4, 0]].swapaxes(0, 1))


def test_reading_back_while_work_goes_on(device):
    buffer = device.zeros("int64", (2,))
    reader = device.read_back(buffer)
    for start in range(reader.depth):
        device.write(buffer, np.array([start, 7]))
        reader.put()
    device.write(buffer, np.array([99, 99]))
    assert [reader.take().tolist() for _ in range(reader.depth)] == [[start, 7] for start in range(reader.depth)]
    reader.put()
    reader.drop()
    reader.put()
    assert reader.take().tolist() == [99, 99]


def test_a_captured_body_does_the_same_again(device):
    one, other = device.zeros("float32", (2,)), device.zeros("float32", (2,))
    again = device.capture(lambda: device.copy(one, other))
    device.write(one, np.array([1, 2], np.float32))
    again()
    device.pace()
    assert device.read(other).tolist() == [1, 2]
    for value in (3, 4, 5, 6):
        device.write(one, np.full(2, value, np.float32))
        again()
        device.pace()
        assert device.read(other).tolist() == [value, value]


@pytest.mark.parametrize(
    ("function", "code", "kind", "message"),
    [
        (
            "cudaMalloc",
            "cudaErrorMemoryAllocation",
            InputError,
            r"too little memory \(cudaMalloc\).*; close what else uses the GPU",
        ),
        ("cudaMallocHost", "cudaErrorMemoryAllocation", InputError, "too little memory"),
        (
            "cudaMalloc",
            "cudaErrorIllegalAddress",
            EngineError,
            r"cudaMalloc failed \(.*illegal.*\); start the process again",
        ),
        ("cudaStreamCreateWithFlags", "cudaErrorNoDevice", EngineError, "cudaStreamCreateWithFlags failed"),
        (
            "cudaStreamEndCapture",
            "cudaErrorStreamCaptureInvalidated",
            InputError,
            "cannot be replayed as a CUDA graph .*; pass EngineOptions",
        ),
        ("cudaGraphInstantiate", "cudaErrorMemoryAllocation", InputError, "too little memory"),
    ],
)
def test_failures_say_why_and_leave_nothing(monkeypatch, function, code, kind, message):
    fake = FakeCuda().install(monkeypatch)
    made = []
    with pytest.raises(kind, match=message) as caught:
        fake.failing[function] = getattr(fake.runtime.cudaError_t, code)
        made.append(CudaDevice())
        made[0].read_back(made[0].zeros("float32", (2,)))
        made[0].capture(lambda: None)
    assert "\n" not in str(caught.value)
    fake.failing.clear()
    for device in made:
        device.close()
    assert not fake.memory and not fake.handles


def test_without_a_gpu_or_its_package_it_says_so(monkeypatch):
    runtime = pytest.importorskip("cuda.bindings.runtime")
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or not count:
        with pytest.raises(
            InputError, match=r"^cuda: found no usable GPU \(.+\), expected an NVIDIA GPU; .*driver[^\n]*$"
        ):
            open_device("cuda")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(InputError, match=r"found no cuda-bindings, .*pip install trip-rt\[gpu\]"):
        open_device("cuda")


def dotted(node):
    """("self", "_trt", "Runtime") of such an expression; a call in it counts as the function called."""
    if isinstance(node, ast.Attribute):
        return (*dotted(node.value), node.attr)
    if isinstance(node, ast.Call):
        return dotted(node.func)
    return (node.id,) if isinstance(node, ast.Name) else ("",)


def test_every_cuda_function_exists_and_takes_what_it_is_given():
    libraries = {
        "cuda": pytest.importorskip("cuda.bindings.runtime"),
        "driver": pytest.importorskip("cuda.bindings.driver"),
    }
    calls = 0
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call):
            function, arguments = dotted(node.func), node.args
            if function == ("call",) and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                function, arguments = ("cuda" if name.startswith("cuda") else "driver", name), node.args[1:]
            if function[0] in libraries and len(function) == 2:
                inspect.signature(getattr(libraries[function[0]], function[1])).bind(*arguments)
                calls += 1
        elif isinstance(node, ast.Attribute) and dotted(node)[0] in libraries:
            value = libraries[dotted(node)[0]]
            for name in dotted(node)[1:]:
                assert hasattr(value, name), dotted(node)
                value = getattr(value, name)
    assert calls >= 28
    assert {"name", "major", "minor"} <= set(dir(libraries["cuda"].cudaDeviceProp))
