"""Clips on their way into training: their order, broken ones, videos and shards as sources, the cache."""

import json
import signal

import numpy as np
import pytest
import torch
from training_runs import losses, same_bits, start, train_tiny, weights

from trip_reference import checkpoint
from trip_reference.data import command
from trip_reference.data.cache import CachedClips
from trip_reference.data.loader import MOST_BROKEN, BatchPlan, Loader, OrderedBatches
from trip_reference.data.sample import BrokenClip, Sample
from trip_rt import InputError

NO_CACHE = ["data.cache=false"]


class Numbers:
    """A ClipDataset whose clips are their own numbers; those in `broken` cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)

    def __len__(self):
        return self.count

    def clip(self, index, rng):
        if index in self.broken:
            raise BrokenClip(f"{index}: broken")
        return Sample(np.full((1, 1, 1, 3), index, np.uint8), f"{rng.random()}", str(index))


def collate(samples):
    return {"numbers": [int(sample.name) for sample in samples], "texts": [sample.text for sample in samples]}


def taken(plan, first=0, last=6, source=None, workers=0):
    return list(Loader(source or Numbers(10), plan, 3, collate, first, last, workers))


def test_an_epoch_has_every_clip_once_and_the_next_another_order():
    numbers = [number for batch in taken(BatchPlan(5), 0, 4) for number in batch["numbers"]]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_processes_and_parts_share_what_one_would_take():
    alone = [number for batch in taken(BatchPlan(8), 0, 3) for number in batch["numbers"]]
    shares = [taken(BatchPlan(8, 2, rank, 2), 0, 6) for rank in range(2)]
    dealt = [
        number
        for step in range(3)
        for part in range(2)
        for rank in range(2)
        for number in shares[rank][2 * step + part]["numbers"]
    ]
    assert dealt == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_anywhere(workers):
    whole = taken(BatchPlan(3))
    assert taken(BatchPlan(3), 2, 6, workers=workers) == whole[2:]


def test_a_broken_clip_is_replaced_by_the_next_and_named():
    source = Numbers(10, broken={2, 7})
    batches = taken(BatchPlan(10), 0, 1, source)
    assert len(batches[0]["numbers"]) == 10
    assert not {2, 7} & set(batches[0]["numbers"])
    assert sorted(batches[0]["broken"]) == ["2: broken", "7: broken"]
    assert taken(BatchPlan(10), 0, 1, source) == batches


def test_nothing_but_broken_clips_ends_the_run():
    with pytest.raises(InputError, match=f"{MOST_BROKEN} broken clips in a row; `trip-data check`"):
        OrderedBatches(Numbers(3, broken=range(3)), BatchPlan(1), 0, collate)[0]


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(
        InputError, match=r"run.batch: found 6 clips a step, expected a multiple of 2 parts times 2 processes"
    ):
        BatchPlan(6, 2, 0, 2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The demo world as a data set of real files, one of them broken."""
    folder = tmp_path_factory.mktemp("videos") / "set"
    assert command.main(["demo", str(folder), "--clips", "9", "--val-clips", "2", "--size", "64", "--frames", "5"]) == 0
    (folder / "videos" / "video_000004.mp4").write_bytes(b"no video")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_videos_and_warns_of_broken_ones(videos, tmp_path, capfd, workers):
    options = [
        f"data.source={str(videos)!r}",
        f"data.validation={str(videos)!r}",
        f"data.workers={workers}",
        "run.validation_clips=2",
    ]
    train_tiny(tmp_path / "run", *NO_CACHE, *options, "run.validate_every=100")
    assert len(losses(tmp_path / "run")) == 12
    assert len(losses(tmp_path / "run", "validation_loss")) == 1
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: left out" in line]
    assert warnings
    assert all("video_000004.mp4" in line for line in warnings)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_shards_ends_in_the_same_bits_after_a_kill(videos, tmp_path, workers):
    assert command.main(["pack", str(videos), "-o", str(tmp_path / "shards"), "--per-shard", "2"]) == 0
    options = [*NO_CACHE, f"data.source={str(tmp_path / 'shards')!r}", "data.shuffle=3", f"data.workers={workers}"]
    whole = start(tmp_path / "whole", *options)
    whole.join(120)
    assert whole.exitcode == 0
    killed = start(tmp_path / "killed", *options, kill_at=8)
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    resumed = start(tmp_path / "killed", *options)
    resumed.join(120)
    assert resumed.exitcode == 0
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("text", [False, True])
def test_training_reads_a_cache(videos, trained, tmp_path, text):
    cache = tmp_path / "cache"
    assert command.main(["cache", str(videos), str(trained), "-o", str(cache), *(["--text"] if text else [])]) == 0
    clips = CachedClips(cache)
    assert len(clips) == 8
    texts = {entry["text"] for entry in json.loads((videos / "annotations.json").read_text())}
    sample = clips.clip(3, np.random.default_rng(0))
    assert sample.text in texts
    assert sample.latents.shape == (8, 3, 4, 4)
    assert (sample.embedding is not None) == text
    options = [f"data.source={str(cache)!r}", f"model.checkpoint={str(trained)!r}"]
    if text:
        model = checkpoint.from_pretrained(trained)
        assert clips.empty_text().shape == (model.config.text_length, model.config.text_width)
        with pytest.raises(InputError, match="found a text encoder that is trained, on a cache of its embeddings"):
            train_tiny(tmp_path / "refused", *options)
        options.append("stages.0.trains=['residual_unet.*']")
    train_tiny(tmp_path / "run", *options)
    before, after = weights(trained), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("unet."))
    assert text == all(torch.equal(before[name], after[name]) for name in before if name.startswith("text_encoder."))


def test_a_cache_of_other_encoders_is_refused(videos, trained, tmp_path):
    assert command.main(["cache", str(videos), str(trained), "-o", str(tmp_path / "cache")]) == 0
    with pytest.raises(InputError, match=r"found latents of the VAE .*, expected .*; make the cache anew"):
        train_tiny(tmp_path / "run", f"data.source={str(tmp_path / 'cache')!r}", "run.seed=5")


def test_a_cut_cache_is_one_line(videos, trained, tmp_path, capsys):
    assert command.main(["cache", str(videos), str(trained), "-o", str(tmp_path / "cache")]) == 0
    capsys.readouterr()
    file = tmp_path / "cache" / "latents-00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"latents-00000.safetensors: cannot be read"):
        CachedClips(tmp_path / "cache").clip(0, np.random.default_rng(0))
    assert command.main(["cache", str(videos), str(trained), "-o", str(tmp_path / "cache")]) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
