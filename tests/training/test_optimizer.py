"""Muon for matrices, AdamW for the rest."""

import dataclasses

import pytest
import torch
from torch import nn

from trip_reference.training.checks import check_optimizer
from trip_reference.training.config import load_config
from trip_reference.training.optimizer import build_optimizer, moments_of, orthogonal
from trip_rt.errors import InputError

CONFIG = load_config("demo").optimizer


def parameters():
    torch.manual_seed(0)
    shapes = {
        "attn.to_q.weight": (6, 4),
        "conv1.weight": (8, 3, 3, 3),
        "conv2.weight": (8, 3, 3, 3),
        "conv_in.weight": (8, 3, 3, 3),
        "token_embedding.weight": (5, 4),
        "norm.weight": (8,),
        "unused.weight": (4, 4),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def with_gradients(named):
    torch.manual_seed(1)
    for name, parameter in named.items():
        parameter.grad = None if name.startswith("unused") else torch.randn_like(parameter)
    return named


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8), (1, 1, 5)], ids=str)
def test_orthogonal_brings_singular_values_near_one_and_keeps_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices)
    assert found.shape == matrices.shape and found.dtype == matrices.dtype
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.diagonal(u.mT @ found @ v.mT, dim1=-2, dim2=-1)
    kept = s > 0.05 * s[..., :1]  # the smallest take more iterations
    assert (along[kept] > 0.5).all() and (along[kept] < 1.3).all()


def test_muon_takes_the_matrices_inside_and_adamw_the_rest_as_ever():
    ours, theirs = with_gradients(parameters()), with_gradients(parameters())
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    muon = build_optimizer(ours, lambda name: 1e-2, CONFIG)
    adamw = build_optimizer(theirs, lambda name: 1e-2, dataclasses.replace(CONFIG, name="adamw"))
    for optimizer in (muon, adamw):
        optimizer.step()
        optimizer.step()
    by_muon = {"attn.to_q.weight", "conv1.weight", "conv2.weight"}
    for name, parameter in ours.items():
        if name.startswith("unused"):
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, theirs[name]) == (name not in by_muon)
    kinds = moments_of(muon)
    assert {name for name, parameter in ours.items() if kinds[parameter] == {"momentum"}} - {"unused.weight"} == by_muon
    assert all(set(muon.state[ours[name]]) == kinds[ours[name]] for name in ours if not name.startswith("unused"))


def test_a_step_of_muon_is_of_adamws_size_whatever_the_gradients_scale():
    steps = []
    for scale in (1e-4, 1e4):
        named = with_gradients(parameters())
        before = named["conv1.weight"].detach().clone()
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.grad *= scale
        build_optimizer(named, lambda name: 1e-2, dataclasses.replace(CONFIG, weight_decay=0.0)).step()
        steps.append(named["conv1.weight"].detach() - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-2, atol=1e-4)
    assert steps[0].square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2)


def test_a_rate_belongs_to_its_own_parameters():
    named = parameters()
    optimizer = build_optimizer(named, lambda name: 1e-3 if name.startswith("conv") else 1e-2, CONFIG)
    rates = {parameter: group["highest"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name for name in named if rates[named[name]] == 1e-3} == {"conv1.weight", "conv2.weight", "conv_in.weight"}


def test_muon_is_refused_where_processes_share_the_weights():
    check_optimizer(CONFIG, sharded=False)
    check_optimizer(dataclasses.replace(CONFIG, name="adamw"), sharded=True)
    with pytest.raises(InputError, match="found muon under FSDP, expected adamw there"):
        check_optimizer(CONFIG, sharded=True)
