"""The training loop: the same bits after any interruption, the same losses on any number of processes, and what it
leaves behind."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from training_runs import SETTINGS, TWO_STAGES, losses, same_bits, start, train_tiny, train_together, weights

from trip_reference import checkpoint
from trip_reference.data.loader import BatchPlan
from trip_reference.gradient_checkpointing import checkpoint_gradients
from trip_reference.training import command
from trip_reference.training.average import Average
from trip_reference.training.config import load_config, lr_factor
from trip_reference.training.denoiser import Denoiser, change_weight, loss_weight
from trip_reference.training.draws import draw
from trip_reference.training.start import train_only
from trip_rt import InputError

LOSS = load_config("demo").loss
ADAMW = "optimizer.name=adamw"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two stages in one process and one thread, as the children run."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = start(folder, *TWO_STAGES)
    process.join(120)
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def by_adamw(tmp_path_factory):
    """As `undisturbed`, by the one optimiser that sharded weights may have."""
    folder = tmp_path_factory.mktemp("runs") / "by-adamw"
    process = start(folder, *TWO_STAGES, ADAMW)
    process.join(120)
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of this process with nothing set."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Half of it, in a process of its own."""
    return run_apart(tmp_path_factory.mktemp("runs") / "short")


def run_apart(folder, *settings):
    process = start(folder, "stages.0.steps=6", *settings)  # Accelerate has one precision a process
    process.join(120)
    assert process.exitcode == 0
    return folder


def test_a_killed_run_ends_in_the_same_bits(undisturbed, tmp_path):
    """TRIP_KILLS sets at how many random steps."""
    steps = np.random.default_rng(0).choice(12, int(os.environ.get("TRIP_KILLS", "2")), replace=False)
    for step in steps:
        folder = tmp_path / f"killed-{step}"
        killed = start(folder, *TWO_STAGES, kill_at=int(step))
        killed.join(120)
        assert killed.exitcode == -signal.SIGKILL
        assert not (folder / "model_index.json").exists()
        resumed = start(folder, *TWO_STAGES)
        resumed.join(120)
        assert resumed.exitcode == 0
        assert same_bits(undisturbed, folder), step
        assert losses(folder) == losses(undisturbed)


def test_two_processes_train_as_one(undisturbed, tmp_path):
    train_together(tmp_path / "two", 2, *TWO_STAGES)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(undisturbed), rtol=1e-4)
    assert len(losses(tmp_path / "two")) == 12


def test_two_processes_that_share_the_weights_train_as_one(by_adamw, tmp_path):
    train_together(tmp_path / "two", 2, *TWO_STAGES, ADAMW, sharded=True)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(by_adamw), rtol=1e-4)
    assert len(losses(tmp_path / "two")) == 12


def test_a_run_goes_on_with_another_number_of_processes(by_adamw, tmp_path):
    folder = tmp_path / "run"
    killed = start(folder, *TWO_STAGES, ADAMW, kill_at=8)
    killed.join(120)
    train_together(folder, 2, *TWO_STAGES, ADAMW, sharded=True)
    np.testing.assert_allclose(losses(folder), losses(by_adamw), rtol=1e-4)


def test_parts_of_a_step_add_up_to_it(tmp_path):
    # By AdamW: Muon rounds to bf16 inside, and two sums that differ in their last bit may round apart.
    train_tiny(tmp_path / "whole", ADAMW)
    train_tiny(tmp_path / "parts", ADAMW, "run.accumulation=2")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)


@pytest.mark.parametrize(
    ("setting", "tolerance"), [("run.gradient_checkpointing=true", 1e-6), ("run.mixed_precision=bf16", 3e-2)]
)
def test_other_ways_of_computing_give_the_same_losses(short, tmp_path, setting, tolerance):
    np.testing.assert_allclose(losses(run_apart(tmp_path / "other", setting)), losses(short), rtol=tolerance)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(undisturbed, tmp_path, number, code):
    script = (
        "import sys; sys.path.insert(0, 'tests/support'); import training_runs, torch; torch.set_num_threads(1)\n"
        "from trip_reference.training.command import main; raise SystemExit(main(sys.argv[1:]))"
    )
    settings = [word for setting in (*SETTINGS, *TWO_STAGES, "run.save_every=1000") for word in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "-o", str(tmp_path / "run"), *settings], stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "training" / "denoiser.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "trip-train: stopped after step" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "model_index.json").exists()
    resumed = start(tmp_path / "run", *TWO_STAGES)
    resumed.join(120)
    assert same_bits(undisturbed, tmp_path / "run")


def test_a_finished_run_is_not_trained_again(undisturbed):
    before = weights(undisturbed)
    again = start(undisturbed, *TWO_STAGES, kill_at=0)  # would die in a step
    again.join(120)
    assert again.exitcode == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(undisturbed).items())


def test_state_of_another_run_is_refused(undisturbed):
    with pytest.raises(InputError, match="holds a run with other settings"):
        train_tiny(undisturbed, *TWO_STAGES, "run.seed=1")


def test_stages_train_what_they_name(trained, tmp_path):
    train_tiny(tmp_path / "run", f"model.checkpoint={str(trained)!r}", "stages.0.trains=['fusion.tnf.*']")
    before, after = weights(trained), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("fusion.tnf.") for name in changed)


def test_a_pattern_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="found no parameter like 'tnf"):
        train_tiny(tmp_path / "run", "stages.0.trains=['tnf.*']")


def test_rates_differ_between_unet_and_fusion(trained, tmp_path):
    train_tiny(tmp_path / "run", "stages.0.unet_lr=1e-12", "stages.0.tnf_lr=1e-2")
    before, after = weights(trained), weights(tmp_path / "run")
    moved = {name.split(".")[0]: 0.0 for name in before}
    for name in before:
        moved[name.split(".")[0]] = max(
            moved[name.split(".")[0]], float((after[name].float() - before[name].float()).abs().max())
        )
    assert moved["unet"] < 1e-6 < 1e-3 < moved["fusion"]


def test_the_loss_falls(tmp_path):
    train_tiny(
        tmp_path / "run", "stages.0.steps=60", "run.log_every=15", "stages.0.unet_lr=5e-3", "stages.0.tnf_lr=5e-3"
    )
    found = losses(tmp_path / "run")
    assert found[-1] < 0.7 * found[0]


def test_a_loss_that_is_not_finite_skips_the_step_and_then_ends_the_run(tmp_path, monkeypatch):
    real, seen = Denoiser.forward, []

    def broken(self, *args, **inputs):
        seen.append(len(seen))
        return real(self, *args, **inputs) * (math.nan if len(seen) in bad else 1)

    monkeypatch.setattr(Denoiser, "forward", broken)
    bad = {3, 4}
    train_tiny(tmp_path / "skipped", "run.max_bad_steps=3")
    assert [math.isfinite(loss) for loss in losses(tmp_path / "skipped")] == [True] * 2 + [False] * 2 + [True] * 8
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skipped").values())
    seen.clear()
    bad = set(range(5, 100))
    with pytest.raises(InputError, match=r"all, step 7: the loss is nan.*for 3 steps in a row"):
        train_tiny(tmp_path / "ended", "run.max_bad_steps=3")


def test_validation_looks_at_held_out_clips_and_changes_nothing(plain, tmp_path):
    train_tiny(
        tmp_path / "looking",
        "data.validation=demo",
        "run.validate_every=5",
        "run.validation_clips=2",
        "run.tracker=tensorboard",
    )
    assert same_bits(plain, tmp_path / "looking")
    work = tmp_path / "looking" / "training"
    assert [path.name for path in sorted((work / "samples").iterdir())] == [
        "step-000005.png",
        "step-000010.png",
        "step-000012.png",
    ]
    for path in (work / "samples").iterdir():
        with Image.open(path) as sheet:
            assert min(sheet.size) > 2 * 32 and len(sheet.convert("RGB").getcolors(1 << 24)) > 100
    assert len(losses(tmp_path / "looking", "validation_loss")) == 3
    assert list((work / "tracker").rglob("events.out.tfevents.*"))


def test_adapters_alone_are_trained_and_merged_into_the_checkpoint(trained, tmp_path):
    options = [
        f"model.checkpoint={str(trained)!r}",
        "lora.rank=2",
        "stages.0.trains=['residual_unet.*']",
        "stages.0.unet_lr=1e-2",
    ]
    train_tiny(tmp_path / "run", *options)
    before, after = weights(trained), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(name.rsplit(".", 2)[1] in ("to_q", "to_k", "to_v", "0") for name in changed), changed
    adapters = json.loads((tmp_path / "run" / "lora" / "adapter_config.json").read_text())
    assert adapters["r"] == 2
    assert all(np.linalg.matrix_rank((after[name] - before[name]).double().numpy(), tol=1e-5) <= 2 for name in changed)


def test_checkpoints_on_the_way(tmp_path):
    train_tiny(tmp_path / "run", "run.checkpoint_every=8")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert same_bits(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000012")
    assert not same_bits(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000008")


def test_the_demo_trains_its_vae_first(tmp_path):
    result = train_tiny(tmp_path / "run", "vae.steps=6", "data.cache=true")
    config = checkpoint.from_pretrained(tmp_path / "run").config
    assert config.scaling_factor == result["scaling_factor"] != 1
    first = (tmp_path / "run" / "training" / "config.toml").read_text()
    assert load_config("demo", tmp_path / "run" / "training" / "config.toml") == load_config(
        "demo", None, [*SETTINGS, "vae.steps=6"]
    )
    assert 'preset = "tiny"' in first


@pytest.mark.parametrize(
    "change", ["model.fusion=linear", "model.fusion=none", "model.first_frame=end", "model.first_frame=channel"]
)
def test_ablations_share_the_vae_and_train_the_rest(tmp_path, change, tiny_checkpoint):
    train_tiny(tmp_path / "run", change, f"model.vae={str(tiny_checkpoint)!r}", "stages.0.steps=2")
    one, other = checkpoint.from_pretrained(tiny_checkpoint), checkpoint.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(one.vae.parameters(), other.vae.parameters(), strict=True))
    name, value = change.removeprefix("model.").split("=")
    assert getattr(other.config, name) == value


def test_going_on_from_another_kind_of_model_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"fusion: found tnf, expected linear; --set model.fusion=tnf"):
        train_tiny(tmp_path / "run", f"model.checkpoint={str(tiny_checkpoint)!r}", "model.fusion=linear")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointed_gradients_are_the_same_and_take_less_memory(dropout):
    model = tiny_model(num_frames=3, width=32)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    denoiser = Denoiser(model, LOSS).train()
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 8, 3, 4, 4, generator=generator) for _ in range(2))
    ids = torch.zeros(2, model.config.text_length, dtype=torch.long)

    def gradients():
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        denoiser.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = denoiser(latents, noise, torch.tensor([100, 800]), ids)
        loss.backward()
        return [parameter.grad.clone() for parameter in denoiser.parameters()], sum(saved.values())

    plain, all_of_it = gradients()
    assert checkpoint_gradients(model.residual_unet.unet)
    checkpointed, some_of_it = gradients()
    assert all((a - b).abs().max() <= 1e-6 * max(a.abs().max(), 1) for a, b in zip(checkpointed, plain, strict=True))
    assert some_of_it < 0.6 * all_of_it


def test_draws_are_the_same_however_a_batch_is_dealt_out():
    whole = draw(7, 3, range(8), 8, (2, 3, 4, 4), 1000, LOSS)
    dealt = [
        draw(7, 3, BatchPlan(8, 2, rank, 2).positions(part), 8, (2, 3, 4, 4), 1000, LOSS)
        for part in range(2)
        for rank in range(2)
    ]
    for name in ("noise", "timestep", "drop_text"):
        assert torch.equal(torch.cat([getattr(draws, name) for draws in dealt]), getattr(whole, name))
    assert not torch.equal(draw(7, 4, range(8), 8, (2, 3, 4, 4), 1000, LOSS).noise, whole.noise)


def test_draws_have_the_right_distributions():
    draws = [draw(1, step, range(64), 64, (1, 1, 1, 1), 1000, LOSS) for step in range(60)]
    timesteps = torch.cat([one.timestep for one in draws]).double()
    assert timesteps.mean() == pytest.approx(1000 * 2 / 3, rel=0.01)  # density 2t/T²
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert torch.cat([one.drop_text for one in draws]).double().mean() == pytest.approx(0.1, abs=0.02)
    noise = torch.cat([one.noise for one in draws])
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.03)


def test_weights_of_the_loss():
    alpha_bar = torch.tensor([0.99, 0.5, 1e-4], dtype=torch.float64)
    config = load_config("demo", None, ["loss.weighting=min-snr"]).loss
    torch.testing.assert_close(  # signal to noise is 99, 1, and 1 to 9 999
        loss_weight(alpha_bar, config), torch.tensor([5 / 99, 1, 1], dtype=torch.float64)
    )
    torch.testing.assert_close(loss_weight(alpha_bar, LOSS), torch.tensor([1 / 0.99, 2, 10000], dtype=torch.float64))
    assert loss_weight(alpha_bar, load_config("trip-256").loss).tolist() == [1, 1, 1]


def test_what_moves_counts_more():
    still = torch.zeros(1, 2, 3, 2, 2)
    moved = still.clone()
    moved[0, :, 1, 0, 0] = 0.5  # a quarter of a deviation, squared
    moved[0, :, 2, 1, 1] = 4.0
    weights = change_weight(moved, 2.0)
    assert weights.shape == (1, 1, 3, 2, 2)
    assert weights[0, 0, 1, 0, 0] == 1.5
    assert weights[0, 0, 2, 1, 1] == 3
    assert weights.sum() == 12 + 0.5 + 2
    model = tiny_model(num_frames=3, width=32)
    latents, noise = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 3, 4, 4)
    latents[1] = latents[1, :, :1]  # a still clip
    ids, timestep = torch.zeros(2, model.config.text_length, dtype=torch.long), torch.tensor([500, 500])

    def loss(change, row):
        denoiser = Denoiser(model, dataclasses.replace(LOSS, change=change))
        return float(denoiser(latents[row], noise[row], timestep[row], ids[row]))

    assert loss(3.0, slice(0, 1)) > 1.5 * loss(0.0, slice(0, 1))
    assert loss(3.0, slice(1, 2)) == loss(0.0, slice(1, 2))


def test_the_average_lags_behind():
    """By hand; it keeps 1/10 of itself at first, 2/11 and 3/12 then, and `decay` in the end."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average({"x": parameter}, decay=0.5)
    for step, value, expected in ((0, 1.0, 0.9), (1, 2.0, 1.8), (2, 4.0, 3.45), (100, 0.05, 1.75)):
        parameter.data.fill_(value)
        average.update(step)
        assert average.tensors["x"].tolist() == pytest.approx([expected] * 3)
    with average.in_place():
        assert parameter.tolist() == pytest.approx([1.75] * 3)
    assert parameter.tolist() == pytest.approx([0.05] * 3)


def test_warm_up_and_cosine():
    assert lr_factor(0, 1000, 100, 0.1) == pytest.approx(0.01, rel=0.01)
    assert lr_factor(99, 1000, 100, 0.1) == pytest.approx(1.0, abs=0.03)
    assert lr_factor(999, 1000, 100, 0.1) == pytest.approx(0.1, abs=0.01)


def test_stages_are_named_from_either_end():
    config = load_config("trip-256", None, ["stages.0.steps=3", "stages.-1.steps=7"])
    assert [stage.steps for stage in config.stages] == [3, 7]
    for word in ("stages.2.steps=1", "stages.-3.steps=1"):
        with pytest.raises(InputError, match="found no such setting"):
            load_config("trip-256", None, [word])


def test_train_only_freezes_by_name():
    denoiser = Denoiser(tiny_model(), LOSS)
    train_only(denoiser, ["residual_unet.*.attn2.*", "fusion.gate"])
    names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    assert "fusion.gate" in names
    assert all(".attn2." in name or name == "fusion.gate" for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "stages.0.steps: found 0, expected at least 1"),
        (["--seed", "-1"], "run.seed: found -1, expected at least 0"),
        (["--lr", "2"], "stages.0.unet_lr: found 2, expected 0 to less than 1"),
        (
            ["--set", "run.batch=3", "--set", "run.accumulation=2"],
            "run.batch: found 3, expected a multiple of run.accumulation, which is 2",
        ),
        (
            ["--set", "run.bath=3"],
            (
                "'run.bath=3': found no such setting, expected section.name=value with a name that the recipe has, as"
                " run.batch=16"
            ),
        ),
        (["--data", "nowhere"], "data: found neither annotations.json, shards nor cache.json in nowhere"),
        (["nowhere.toml"], "nowhere.toml: found no such file, expected a recipe in TOML"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    settings = [
        "--set",
        "vae.untrained=true",
        "--set",
        "vae.steps=0",
        "--set",
        "model.preset=tiny",
        "--set",
        "run.tracker=none",
    ]
    assert command.main(["--demo", "-o", str(tmp_path / "run"), *settings, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trip-train: {message}")
    assert error.count("\n") == 1


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("trip_reference.training.config.find_spec", lambda name: None)
    with pytest.raises(InputError, match="found wandb, which is not installed"):
        load_config("demo", None, ["run.tracker=wandb"])


def test_the_recipes_are_whole_and_can_be_printed(capsys, tmp_path):
    for recipe in command.RECIPES:
        assert command.main(["--recipe", recipe, "-o", "x", "--print-config"]) == 0
        printed = tmp_path / f"{recipe}.toml"
        printed.write_text(capsys.readouterr().out)
        assert load_config("demo", printed) == load_config(recipe)
