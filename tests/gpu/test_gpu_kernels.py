"""The kernels as this GPU runs them, against fp64. Their cubins, launched without Triton, are held to the same in
bench/gpu/run.py."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import BOUNDS, fusion_of, rms_ratio, step_buffers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="found no NVIDIA GPU that torch can use")

SHAPES = [
    (1, 1, 1, 1),
    (3, 3, 1, 5),
    (2, 8, 7, 3),
    (2, 16, 8, 8),
    (1, 17, 5, 5),
    (1, 24, 3, 4),
]  # clips, frames, height, width


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_noise_and_its_gradient(shape, dtype):
    from trip_kernels.fuse_noise import fuse_noise

    batch, frames, height, width = shape
    fusion = fusion_of(num_frames=frames).cuda()
    generator = torch.Generator().manual_seed(0)
    latents, residual = (
        torch.randn(batch, 8, frames, height, width, generator=generator).cuda().to(dtype) for _ in range(2)
    )
    first = torch.randn(batch, 8, height, width, generator=generator).cuda().to(dtype)
    signal = torch.rand(batch, generator=generator).cuda()
    timestep = torch.randint(0, 1000, (batch,), generator=generator).cuda()
    arguments = latents, first, residual, signal, (1 - signal**2).sqrt(), timestep
    double = copy.deepcopy(fusion).double()(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments)
    )
    assert rms_ratio(fuse_noise(fusion, *arguments, compute=dtype), double) <= BOUNDS[dtype]
    residual.requires_grad_()
    gradients = [
        torch.autograd.grad(op(*arguments).square().mean(), residual)[0]
        for op in (fusion, lambda *tensors: fuse_noise(fusion, *tensors))
    ]
    assert rms_ratio(gradients[1], gradients[0]) <= 10 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_step(shape, dtype):
    from trip_kernels.fused_step import fused_step, fused_step_ref

    batch, frames, height, width = shape
    fusion = fusion_of(num_frames=frames).cuda()
    buffers = {name: tensor.cuda() for name, tensor in step_buffers(batch, 8, frames, height, width).items()}
    double = {
        name: tensor.double() if name != "table" and tensor.is_floating_point() else tensor.clone()
        for name, tensor in buffers.items()
    }
    for row in range(2, 6):
        fused_step(fusion, **buffers, compute=dtype)
        fused_step_ref(copy.deepcopy(fusion).double(), **double)
        assert int(buffers["step"]) == row and torch.equal(buffers["timestep"], double["timestep"])
        assert rms_ratio(buffers["latents"], double["latents"]) <= BOUNDS[dtype]
