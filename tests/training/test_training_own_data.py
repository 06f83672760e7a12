"""Training on data of one's own: words, VAE, validation, length and size are the data's, and nothing that would train
for nothing begins."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny import save_published
from training_runs import losses, same_bits, start, train_tiny, weights

from trip_reference import checkpoint
from trip_reference.data.command import main as data
from trip_reference.data.loader import BatchPlan
from trip_reference.data.sources import open_held_out, read_some
from trip_reference.demo_world.clips import DemoWorldClips, write_demo_folder
from trip_reference.fusion import NoiseFusion, fusion_for
from trip_reference.presets import PRESETS
from trip_reference.training import command
from trip_reference.training.config import load_config
from trip_reference.training.run import lost_to_fp16
from trip_reference.training.vae import Clips, frames_of_step
from trip_rt import InputError
from trip_rt.tokenizer import PromptTokenizer

SENTENCES = ["the dog runs on a beach", "a cat sleeps", "two birds fly over the sea"]
OWN = ["data.cache=false", "model.text=own"]


def worded(folder, sentences=SENTENCES, name="annotations.json"):
    entries = json.loads((folder / name).read_text())
    for i, entry in enumerate(entries):
        entry["text"] = sentences[i % len(sentences)]
    (folder / name).write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos with sentences that the demo's tokenizer does not know, and two held-out ones."""
    folder = tmp_path_factory.mktemp("own") / "set"
    write_demo_folder(folder, 3, 2, 64, 5)
    worded(folder)
    return folder


def on(folder):
    return f"data.source={str(folder)!r}"


# Words


def test_unknown_words_are_said_and_too_many_are_refused(videos, trained, tmp_path, capfd):
    options = ["data.cache=false", on(videos), f"model.checkpoint={str(trained)!r}"]
    with pytest.raises(InputError, match=r"words: 11 of 15 are unknown \(73.3 %\): beach, birds, .*model.text=own"):
        train_tiny(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
    train_tiny(tmp_path / "run", *options, "data.unknown_words=0.8", "stages.0.steps=1")
    assert "words: 11 of 15 are unknown (73.3 %): beach, birds" in capfd.readouterr().err


def test_a_text_encoder_of_its_own_knows_the_data(videos, tmp_path, capfd):
    train_tiny(tmp_path / "run", on(videos), *OWN, "model.text_length=10")
    assert "words: all 15 are known" in capfd.readouterr().err
    model, tokenizer_json = (
        checkpoint.from_pretrained(tmp_path / "run"),
        checkpoint.load_tokenizer_json(tmp_path / "run"),
    )
    assert model.config.text_length == 10
    ids = PromptTokenizer(tokenizer_json, 10, model.vocabulary)(SENTENCES)
    assert model.encode_text(torch.from_numpy(ids)).shape == (3, 10, model.config.text_width)
    words = {word for sentence in SENTENCES for word in sentence.split()}
    assert model.text_encoder.config.vocab_size == len(words) + 3
    assert model.text_encoder.config.eos_token_id == PromptTokenizer(tokenizer_json, 10, model.vocabulary)([""])[0][-1]


def test_a_run_with_its_own_text_and_vae_ends_in_the_same_bits_after_a_kill(videos, tmp_path):
    options = [on(videos), *OWN, "vae.steps=2", "vae.batch=2", "stages.0.steps=6"]
    for name, kill_at in (("whole", None), ("killed", 4), ("killed", None)):
        process = start(tmp_path / name, *options, kill_at=kill_at)
        process.join(120)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_takes_new_words(videos, trained, tmp_path):
    train_tiny(tmp_path / "run", on(videos), *OWN, f"model.checkpoint={str(trained)!r}", "stages.0.unet_lr=1e-12")
    before, after = weights(trained), weights(tmp_path / "run")
    assert len(after["text_encoder.embeddings.token_embedding.weight"]) == 13 + 3
    name = next(name for name in before if name.startswith("unet."))
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)  # the rest is the checkpoint's


def test_a_new_text_encoder_has_to_be_trained(videos, tmp_path):
    with pytest.raises(InputError, match=r"stages: found none that trains all of the text encoder"):
        train_tiny(tmp_path / "run", on(videos), *OWN, "stages.0.trains=['residual_unet.*','fusion.*']")


def test_a_text_encoder_is_taken_from_a_folder_where_its_width_fits(videos, tmp_path):
    _, folder = save_published(tmp_path)
    options = [on(videos), "data.cache=false", f"model.text={str(folder)!r}", "stages.0.steps=1"]
    train_tiny(tmp_path / "run", *options, "stages.0.trains=['fusion.*']")
    before = checkpoint.load_text(folder)[0].state_dict()
    after = checkpoint.from_pretrained(tmp_path / "run").text_encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(InputError, match="found a text encoder of width 16, expected 64"):
        train_tiny(tmp_path / "other", *options, "model.preset=demo")
    with pytest.raises(InputError, match=r"model.text_length: found 9, expected 0"):
        train_tiny(tmp_path / "other", *options, "model.text_length=9")


# VAE


def test_the_vae_is_trained_on_the_clips_of_the_data(videos, tmp_path, capfd):
    options = [on(videos), *OWN, "vae.batch=4", "stages.0.steps=1", "run.validation_clips=2", "run.validate_every=9"]
    few, many = (train_tiny(tmp_path / str(n), *options, f"vae.steps={n}") for n in (1, 60))
    assert many["vae_psnr_db"] > few["vae_psnr_db"] + 2
    assert "VAE gives its own frames back at" in capfd.readouterr().err  # data.validation is empty in these runs
    assert checkpoint.load_config(tmp_path / "60").scaling_factor == many["scaling_factor"] != 1
    train_tiny(tmp_path / "seen", *options, "vae.steps=1", "data.validation=auto")
    assert "VAE gives held-out frames back at" in capfd.readouterr().err


def test_frames_of_clips_that_are_not_square_are_cropped_anywhere():
    """Each pixel says where it is: red its column, green its row, blue its frame."""
    rows, columns = np.mgrid[:48, :80]
    frames = np.stack([np.stack([columns, rows, np.full_like(rows, 10 * i)], -1) for i in range(3)]).astype(np.uint8)
    config = load_config("demo", None, ["vae.steps=10", "vae.batch=8"]).vae
    corners = set()
    for step in range(10):
        batch = frames_of_step(Clips(frames[None]), config, BatchPlan(8), 0, step, channels=4, factor=8)
        pixels = np.rint((batch["pixels"].numpy() + 1) * 127.5).astype(int)
        height, width = (24, 40) if step < 8 else (48, 80)
        assert pixels.shape == (24 if step < 8 else 8, 3, height, width)
        assert batch["noise"].shape[1:] == (4, height // 8, width // 8)
        assert (np.diff(pixels[:, 0], axis=2) == 1).all() and (np.diff(pixels[:, 1], axis=1) == 1).all()
        corners |= {(x, y) for x, y in pixels[:, :2, 0, 0].tolist()}
    assert len({x for x, _ in corners}) > 20 and len({y for _, y in corners}) > 15


def test_a_denoiser_is_not_trained_on_a_vae_of_random_weights(videos, trained, tmp_path, capfd):
    options = [on(videos), *OWN, "vae.untrained=false", "stages.0.steps=1"]
    with pytest.raises(InputError, match=r"vae.steps: found 0 and a VAE of random weights, .* by --checkpoint"):
        train_tiny(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
    for trusted in ("vae", "checkpoint"):
        result = train_tiny(tmp_path / trusted, *options, f"model.{trusted}={str(trained)!r}")
        found = f"VAE gives frames of the data back at {result['vae_psnr_db']:.2f} dB, expected 20 dB or more"
        assert found in capfd.readouterr().err  # for this one has not learned anything


def test_latents_train_no_vae(videos, trained, tmp_path):
    assert data(["cache", str(videos), str(trained), "-o", str(tmp_path / "cache"), "--unknown-words", "1"]) == 0
    with pytest.raises(InputError, match=r"vae.steps: found 3 on a cache of latents, expected 0"):
        train_tiny(tmp_path / "run", on(tmp_path / "cache"), *OWN, f"model.checkpoint={str(trained)!r}", "vae.steps=3")


def test_a_vae_with_other_latents_is_refused(trained, tmp_path):
    folder = tmp_path / "copy"
    model = checkpoint.from_pretrained(trained)
    checkpoint.save_pretrained(model, checkpoint.load_tokenizer_json(trained), folder)
    with pytest.raises(InputError, match="found a VAE of 8 latent channels, expected 4"):
        train_tiny(tmp_path / "run", "model.preset=bench", f"model.vae={str(folder)!r}")


# Validation


def test_validation_is_on_what_the_data_holds_out(videos, tmp_path, trained):
    trip = PRESETS["tiny"].trip
    without = tmp_path / "without"
    write_demo_folder(without, 2, 0, 32, 3)
    assert data(["pack", str(videos), "-o", str(tmp_path / "shards")]) == 0
    assert data(["pack", str(videos), "-o", str(tmp_path / "bare")]) == 0
    validation = ["--annotations", "val_annotations.json"]
    assert data(["pack", str(videos), "-o", str(tmp_path / "shards" / "val"), *validation]) == 0
    held_out = sorted(entry["text"] for entry in json.loads((videos / "val_annotations.json").read_text()))

    def looked_at(source, validation="auto"):
        config = load_config("demo", None, [on(source), f"data.validation={str(validation)!r}"]).data
        found, words = open_held_out(config, trip, 2)
        return words, found if found is None else sorted(sample.text for sample in read_some(found, 2))

    assert looked_at(videos) == (str(videos / "val_annotations.json"), held_out)
    assert looked_at(tmp_path / "shards") == (str(tmp_path / "shards" / "val"), held_out)
    assert looked_at(without) == (f"none, as {without} holds no clips out", None)
    assert looked_at(tmp_path / "bare") == (f"none, as {tmp_path / 'bare'} holds no clips out", None)
    assert looked_at(videos, "") == ("none", None)
    assert looked_at(without, videos) == (str(videos / "val_annotations.json"), held_out)
    config = load_config("demo").data
    found, words = open_held_out(config, trip, 2)
    assert words == "demo"
    assert isinstance(found, DemoWorldClips) and found._held_out


def test_a_broken_clip_is_left_out_of_validation(videos, tmp_path, capfd):
    folder = shutil.copytree(videos, tmp_path / "copy")
    (folder / "videos" / "val_000000.mp4").write_bytes(b"no video")
    options = [on(folder), *OWN, "data.validation=auto", "run.validation_clips=2", "run.validate_every=12"]
    train_tiny(tmp_path / "run", *options)
    error = capfd.readouterr().err
    assert f"validation: {folder / 'val_annotations.json'}" in error
    assert "left out" in error and "val_000000.mp4" in error
    assert len(losses(tmp_path / "run", "validation_loss")) == 1


# Length and size


def test_clips_of_another_length_and_size(videos, tmp_path):
    options = [on(videos), *OWN, "model.num_frames=4", "model.width=48", "model.height=16"]
    train_tiny(tmp_path / "run", *options, "stages.0.steps=2", "data.fps=6", "data.stride=2")
    config = checkpoint.load_config(tmp_path / "run")
    assert (config.num_frames, config.width, config.height, config.fps) == (4, 48, 16, 3)
    longer = [on(videos), *OWN, "model.num_frames=6", f"model.checkpoint={str(tmp_path / 'run')!r}"]
    train_tiny(tmp_path / "longer", *longer, "stages.0.steps=2")
    config = checkpoint.from_pretrained(tmp_path / "longer").config
    assert (config.num_frames, config.width, config.height) == (6, 48, 16)


def test_a_fusion_for_another_length_keeps_its_ends():
    trip = PRESETS["tiny"].trip
    torch.manual_seed(0)
    fusion = NoiseFusion(trip)
    with torch.no_grad():
        fusion.gate.copy_(torch.tensor([3.0, 1.0, -2.0]))
    other = fusion_for(dataclasses.replace(trip, num_frames=5), fusion)
    assert other.gate.tolist() == pytest.approx([3, 2, 1, -0.5, -2])
    before, after = fusion.tnf.frame_embedding, other.tnf.frame_embedding
    assert after.shape == (5, before.shape[1])
    torch.testing.assert_close(after[::2], before)
    torch.testing.assert_close(after[1], (before[0] + before[1]) / 2)
    shared = fusion.state_dict().keys() - {"gate", "tnf.frame_embedding"}
    assert all(torch.equal(other.state_dict()[name], fusion.state_dict()[name]) for name in shared)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "1"], "frames: found 1, expected at least 2"),
        (["--frames", "-1"], "model.num_frames: found -1, expected at least 0"),
        (["--set", f"run.batch={2**40}"], "run.batch: found 1099511627776, expected at most 65536"),
        (["--set", "optimizer.clip=nan"], "optimizer.clip: found nan, expected more than 0"),
        (["--set", "optimizer.weight_decay=inf"], "optimizer.weight_decay: found inf, expected 0 or more"),
        (["--size", "40x32"], "size: found 40x32, expected multiples of 16"),
        (["--frames", "1000000", "--size", "32x32"], "model.num_frames: found 1000000, expected at most 4096"),
        (["--set", "run.mixed_precision=fp16"], "run.mixed_precision: found fp16 and no GPU, expected bf16 or no"),
        (["--set", "run.fused_kernel=true"], "run.fused_kernel: found true and no NVIDIA GPU, expected false"),
        (["--lr", "0"], "stages.0.unet_lr: found 0, expected more than 0, as the stage trains text_encoder."),
        (["--set", "data.unknown_words=2"], "data.unknown_words: found 2, expected 0 to 1"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU can do some of it")
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    settings = ["vae.untrained=true", "vae.steps=0", "model.preset=tiny", "run.tracker=none"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert command.main(["--demo", "-o", str(tmp_path / "run"), *words, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trip-train: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Rates and steps


def test_a_stage_needs_no_rate_for_what_it_does_not_train(tmp_path):
    (tmp_path / "fusion.toml").write_text(
        '[[stages]]\nname = "tnf"\nsteps = 2\ntrains = ["fusion.*"]\ntnf_lr = 1e-3\nwarmup = 1\n'
    )
    config = load_config("demo", tmp_path / "fusion.toml")
    assert (config.stages[0].unet_lr, config.stages[0].tnf_lr) == (0, 1e-3)
    assert load_config("demo", tmp_path / "fusion.toml", ["stages.-1.unet_lr=1e-4"]).stages[0].unet_lr == 1e-4
    stage = '{name="tnf", steps=2, trains=["fusion.*"], RATE=1e-3, warmup=1}'
    train_tiny(tmp_path / "run", f"stages=[{stage.replace('RATE', 'tnf_lr')}]")
    with pytest.raises(InputError, match=r"stages.1.tnf_lr: found 0, expected more than 0, as the stage trains"):
        other = stage.replace("RATE", "unet_lr").replace('"tnf"', '"more"')
        train_tiny(tmp_path / "refused", f"stages=[{stage.replace('RATE', 'tnf_lr')},{other}]")
    assert not (tmp_path / "refused").exists()


def test_a_finished_run_is_made_longer(tmp_path, capfd):
    run = tmp_path / "run"
    train_tiny(run)
    before = losses(run)
    capfd.readouterr()
    train_tiny(run, "stages.-1.steps=18")
    error = capfd.readouterr().err
    assert (
        "stage all: 12 steps become 18; from step 12 on the rates follow the cosine of 18, and go from 3.67 % to"
        " 26.5 % of their highest"
    ) in error
    assert "all: step 18 of 18" in error
    assert losses(run)[:12] == before
    assert len(losses(run)) == 18
    rates = losses(run, "lr")
    assert rates[11] == pytest.approx(0.0367 * 3e-3, rel=0.01)
    assert rates[12] == pytest.approx(0.265 * 3e-3, rel=0.01)
    capfd.readouterr()
    train_tiny(run, "stages.-1.steps=18")
    assert "become" not in capfd.readouterr().err
    with pytest.raises(InputError, match=r"stages: found 13 steps in all, expected at least the 18 that"):
        train_tiny(run, "stages.-1.steps=13")


def test_a_longer_run_ends_in_the_same_bits_after_a_kill(tmp_path):
    whole, killed, longer = tmp_path / "whole", tmp_path / "killed", "stages.-1.steps=8"
    for folder, steps, kill_at in (
        (whole, "stages.-1.steps=4", None),
        (killed, longer, 6),
        (killed, longer, None),
        (whole, longer, None),
    ):
        if folder == killed and not killed.exists():
            shutil.copytree(whole, killed)
        process = start(folder, steps, kill_at=kill_at)
        process.join(120)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    assert same_bits(whole, killed)


def test_updates_that_half_precision_would_lose_are_said_and_kept_in_the_state(trained, tmp_path, capfd):
    small = [f"stages.0.{rate}=1e-6" for rate in ("unet_lr", "tnf_lr")]
    options = [f"model.checkpoint={str(trained)!r}", "stages.0.steps=4", *small]
    run = tmp_path / "run"
    train_tiny(run, *options, "run.weights=fp16")
    warning = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: weights in fp16 lose")]
    assert len(warning) == 1
    assert warning[0].endswith("; --set run.weights=fp32 keeps it, and the same command with it trains nothing again")
    written, before, half = (run / "training" / "denoiser.jsonl").read_text(), weights(trained), weights(run)
    lost = [name for name, tensor in half.items() if torch.equal(tensor, before[name].half())]
    train_tiny(run, *options)  # in fp32
    assert "warning" not in capfd.readouterr().err
    assert (run / "training" / "denoiser.jsonl").read_text() == written
    full = weights(run)
    assert sum(not torch.equal(full[name], before[name]) for name in lost if name.startswith("unet.")) > 10
    large = [word.replace("1e-6", "1e-3") for word in small]
    train_tiny(tmp_path / "large", *options, *large, "run.weights=fp16")
    assert "warning" not in capfd.readouterr().err


def test_small_updates_by_adapters_are_said_to_be_lost_too(trained, tmp_path, capfd):
    adapters = ["lora.rank=2", "stages.0.trains=['residual_unet.*']", "stages.0.unet_lr=1e-6", "stages.0.steps=2"]
    train_tiny(tmp_path / "run", f"model.checkpoint={str(trained)!r}", *adapters, "run.weights=fp16")
    assert "warning: weights in fp16 lose" in capfd.readouterr().err


def test_what_half_precision_loses():
    """1 + 2⁻¹² is rounded to 1, 1 + 2⁻¹⁰ is kept."""
    before, after = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    before.weight.data.fill_(1)
    after.weight.data = torch.tensor([[1 + 2**-12, 1]])
    assert lost_to_fp16(before, after) == 1
    after.weight.data = torch.tensor([[1 + 2**-12, 1 + 2**-10]])
    assert lost_to_fp16(before, after) == pytest.approx(1 / 17**0.5)
    assert lost_to_fp16(before, before) == 0


def test_recipes_keep_small_updates():
    for recipe in command.RECIPES:
        config = load_config(recipe)
        least = min(rate for stage in config.stages for rate in (stage.unet_lr, stage.tnf_lr) if rate)
        assert config.run.weights == "fp32" or least >= 1e-4, recipe
