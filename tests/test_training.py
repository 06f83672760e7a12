import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from trip_reference import checkpoint, train
from trip_reference.training import StageConfig, run_stage, step_rngs
from trip_rt import InputError

STAGE = StageConfig(steps=12, batch=2, lr=2e-3, warmup=2, save_every=4, log_every=2)


def line_fit(folder, stage=STAGE, stop_at=None, inputs="x", shards=1):
    """Fit a line with `run_stage`; an exception at step `stop_at` stands for a crash."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)

    def losses_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        rng, generator = step_rngs(0, step)
        x, offset = torch.randn(8, 3, generator=generator), float(rng.normal(scale=0.01))
        return [lambda part=part: (module(part) - part.sum(1, keepdim=True) - offset).square().mean() for part in x.chunk(shards)]

    folder.mkdir(exist_ok=True)
    return module, run_stage("line", module, stage, losses_of, folder, inputs)


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_a_resumed_stage_ends_in_the_same_bits(tmp_path, stop_at):
    module, average = line_fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        line_fit(tmp_path / "cut", stop_at=stop_at)
    resumed, resumed_average = line_fit(tmp_path / "cut")
    for a, b in ((module, resumed), (average, resumed_average)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_shards_side_by_side_train_as_one_whole(tmp_path):
    whole, _ = line_fit(tmp_path / "whole")
    sharded, _ = line_fit(tmp_path / "sharded", shards=4)
    torch.testing.assert_close(whole.weight, sharded.weight, rtol=1e-5, atol=1e-6)
    again, _ = line_fit(tmp_path / "again", shards=4)
    assert torch.equal(sharded.weight, again.weight)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    line_fit(tmp_path)
    _, average = line_fit(tmp_path, stop_at=0)  # would raise if a step ran
    assert average.weight.isfinite().all()


def test_the_average_lags_behind_and_the_loss_is_logged(tmp_path):
    module, average = line_fit(tmp_path, dataclasses.replace(STAGE, steps=200, lr=0.05))
    target = torch.ones(1, 3)
    assert 0 < (module.weight - target).norm() < (average.weight - target).norm()
    records = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(2, 201, 2))
    assert records[-1]["loss"] < records[0]["loss"] / 2


def test_state_of_another_run_is_refused(tmp_path):
    line_fit(tmp_path)
    with pytest.raises(InputError, match="holds a run with other settings"):
        line_fit(tmp_path, inputs="y")
    with pytest.raises(InputError, match="holds a run with other settings"):
        line_fit(tmp_path, dataclasses.replace(STAGE, lr=1.0))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="step 1: the loss is nan"):
        run_stage("bad", module, STAGE, lambda step: [lambda: module(torch.tensor([float("nan")])).sum()], tmp_path, "x")


def test_warm_up_and_cosine():
    stage = StageConfig(steps=1000, batch=1, lr=1.0, warmup=100, final_lr=0.1)
    assert stage.lr_at(0) == pytest.approx(0.01, rel=0.01)
    assert stage.lr_at(99) == pytest.approx(1.0, abs=0.03)
    assert stage.lr_at(999) == pytest.approx(0.1, abs=0.01)


@pytest.fixture
def tiny_demo(monkeypatch):
    """`train_demo` on the tiny networks; the renderer needs square pictures."""
    preset = dataclasses.replace(TINY, trip=dataclasses.replace(TINY.trip, width=32))
    monkeypatch.setattr(train, "DEMO", preset)


def run_demo(folder, **changes):
    settings = dict(seed=1, clip_count=8, vae_stage=STAGE, denoiser_stage=STAGE, fusion="tnf", first_frame="start", vae_from=None)
    return train.train_demo(folder, **(settings | changes))


def weights(folder):
    return {path.relative_to(folder): load_file(path) for path in sorted(folder.glob("*/*.safetensors")) if path.parent.name != "training"}


def test_the_demo_trains_into_a_checkpoint_and_resumes_exactly(tiny_demo, tmp_path, monkeypatch):
    result = run_demo(tmp_path / "whole")
    assert checkpoint.from_pretrained(tmp_path / "whole").config.scaling_factor == result["scaling_factor"]

    from trip_reference import train_denoiser

    real, calls = train_denoiser.step_rngs, []

    def crash_at_step_6(seed, step):
        calls.append(step)
        if step == 6 and len(calls) == 7:
            raise KeyboardInterrupt
        return real(seed, step)

    monkeypatch.setattr(train_denoiser, "step_rngs", crash_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "cut")
    assert not (tmp_path / "cut" / "model_index.json").exists()
    run_demo(tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for path, tensors in whole.items():
        assert all(torch.equal(tensors[name], cut[path][name]) for name in tensors), path


def test_the_denoisers_loss_falls(tiny_demo, tmp_path):
    run_demo(tmp_path, denoiser_stage=dataclasses.replace(STAGE, steps=160, batch=4, log_every=20))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "training" / "denoiser.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("change", [{"fusion": "linear"}, {"fusion": "none"}, {"first_frame": "end"}, {"first_frame": "channel"}])
def test_ablations_share_the_vae_and_train_the_rest(tiny_demo, tmp_path, change):
    run_demo(tmp_path / "base", denoiser_stage=dataclasses.replace(STAGE, steps=2))
    run_demo(tmp_path / "other", denoiser_stage=dataclasses.replace(STAGE, steps=2), vae_from=tmp_path / "base", **change)
    base, other = checkpoint.from_pretrained(tmp_path / "base"), checkpoint.from_pretrained(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(base.vae.parameters(), other.vae.parameters(), strict=True))
    assert all(getattr(other.config, name) == value for name, value in change.items())


def test_training_goes_on_from_a_checkpoint(tiny_demo, tmp_path):
    run_demo(tmp_path / "first")
    run_demo(tmp_path / "second", start_from=tmp_path / "first", denoiser_stage=dataclasses.replace(STAGE, steps=1, lr=1e-9))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for path, tensors in first.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(second[path][name], tensor, rtol=1e-3, atol=1e-6)


def test_going_on_from_another_kind_of_model_is_refused_before_any_work(tiny_demo, tmp_path):
    run_demo(tmp_path / "linear", denoiser_stage=dataclasses.replace(STAGE, steps=1), fusion="linear")
    with pytest.raises(InputError, match="fusion: found linear, expected tnf"):
        run_demo(tmp_path / "new", start_from=tmp_path / "linear")
    assert not (tmp_path / "new").exists()


def test_latents_of_another_vae_are_encoded_anew(tiny_demo, tmp_path):
    run_demo(tmp_path / "a", denoiser_stage=dataclasses.replace(STAGE, steps=1))
    run_demo(tmp_path / "b", seed=2, denoiser_stage=dataclasses.replace(STAGE, steps=1))
    (tmp_path / "b" / "training" / "denoiser.safetensors").unlink()
    before = load_file(tmp_path / "b" / "training" / "latents.safetensors")["latents"]
    run_demo(tmp_path / "b", seed=2, denoiser_stage=dataclasses.replace(STAGE, steps=1), vae_from=tmp_path / "a")
    assert not np.array_equal(before, load_file(tmp_path / "b" / "training" / "latents.safetensors")["latents"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps: found 0, expected at least 1"),
        (["--clips", "-3"], "clips: found -3, expected at least 1"),
        (["--seed", "-1"], "seed: found -1, expected at least 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    assert train.main(["--demo", "-o", str(tmp_path / "run"), *arguments]) == 2
    assert capsys.readouterr().err == f"trip-train: {message}\n"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_command_in_one_line(tmp_path):
    command = [sys.executable, "-m", "trip_reference.train", "--demo", "-o", str(tmp_path / "run"), "--clips", "400"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "training").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "trip-train: interrupted"
    assert "Traceback" not in stderr
