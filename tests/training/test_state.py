"""The file of a run's state, as strangers, other versions and full disks leave it."""

import os
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_run import SCALE, SmallRun, saved_state

from trip_reference.training import state
from trip_reference.training.state import Place, read_place
from trip_rt import InputError


@pytest.fixture
def path(tmp_path):
    return saved_state(tmp_path)


def test_a_state_comes_back(path):
    expected, run = SmallRun(), SmallRun()
    expected.step()
    assert read_place(path, "run") == Place(5, 1.5, ([3, 4],), SCALE)
    run.load(path)
    for name, tensor in expected.tensors.items():
        assert torch.equal(run.tensors[name], tensor)
        assert torch.equal(run.average.tensors[name], expected.average.tensors[name])
        for key, value in expected.optimizer.state[tensor].items():
            assert torch.equal(run.optimizer.state[run.tensors[name]][key], value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (None, "holds a run with other settings"),
        ("{", "found no JSON"),
        ("[" * 100000, "found no JSON"),
        ("{}", "missing required field `step`"),
        ('{"step": -1}', "step: found -1, expected int >= 0"),
        ('{"step": 1099511627777}', "step: found 1099511627777"),
        ('{"step": "5"}', "step: found '5', expected int"),
        ('{"step": 5, "seconds": Infinity}', "seconds: found inf"),
        ('{"step": 5, "data": [[-3]]}', "data"),
        ('{"step": 5, "data": 3}', "data: found 3"),
        ('{"step": 5, "loss_scale": {"scale": 1.0}}', "loss_scale: found"),
        ('{"step": 5, "other": 1}', "unknown field other"),
    ],
)
def test_a_place_that_is_none_is_refused(path, place, message):
    save_file(load_file(path), path, metadata=None if place is None else {"run": "run", "place": place})
    with pytest.raises(InputError, match=message) as caught:
        read_place(path, "run")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights.0.weight": None}, "lacks 'weights.0.weight'"),
        ({"weights.9.weight": torch.ones(1)}, "has the unknown 'weights.9.weight'"),
        ({"weights.0.weight": torch.ones(1)}, "found F32 .1., expected F32 .4, 3."),  # it would be spread over all
        ({"weights.0.weight": torch.ones(4, 3, dtype=torch.int64)}, "found I64 .4, 3., expected F32"),
        ({"average.1.bias": torch.full((1,), torch.nan)}, "average.1.bias: found a number that is not finite"),
        ({"optimizer.0.bias.exp_avg": None}, r"optimizer.0.bias..: found"),
        ({"optimizer.0.bias.exp_avg": torch.ones(5)}, "found F32 .5., expected F32 .4."),
        ({"optimizer.0.bias.exp_avg_sq": -torch.ones(4)}, "found a negative number"),
        ({"optimizer.0.bias.step": torch.ones(4)}, "found F32 .4., expected F32 .."),
    ],
)
def test_tensors_that_are_not_the_runs_are_refused(path, change, message):
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(InputError, match=message) as caught:
        SmallRun().load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_state_that_is_no_plain_file_is_not_opened(tmp_path, make):
    make(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match=r"found a (named pipe|folder), expected the state of a run"):
        read_place(tmp_path / "state.safetensors", "run")


def test_a_full_disk_is_said_in_one_line(path, monkeypatch):
    before = path.read_bytes()

    def full(*args, **kwargs):  # what safetensors raises, word for word
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(InputError, match="the disk is full; make room and try again"):
        SmallRun().save(path)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_a_file_that_may_not_grow_is_said_in_one_line(path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError, match="larger than files may be here"):
            SmallRun().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
