import dataclasses
from itertools import product

import numpy as np
import pytest
from tokenizers import Tokenizer

from trip_reference.demo_world import world
from trip_reference.demo_world.judge import judge
from trip_reference.demo_world.text import build_tokenizer

SCENE = world.Scene("red", "star", x=0.5, y=0.5, radius=0.17, angle=0.1, background="gradient", seed=3)


def clip(motion, scene=SCENE, **size):
    return world.render(scene, motion, **size)


def centre(frame_mask):
    y, x = np.mgrid[: frame_mask.shape[0], : frame_mask.shape[1]]
    return (frame_mask * x).sum() / frame_mask.sum(), (frame_mask * y).sum() / frame_mask.sum()


def test_a_seed_fixes_scene_caption_and_pixels():
    assert world.sample(5) == world.sample(5)
    assert world.sample(5) != world.sample(6)
    np.testing.assert_array_equal(clip("left"), clip("left"))


def test_held_out_triples_are_never_trained_but_every_pair_is():
    seen, held_out = world.combinations(False), world.combinations(True)
    assert not set(seen) & set(held_out)
    assert len(held_out) > 40
    for pick in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(t[i] for i in pick) for t in held_out} <= {tuple(t[i] for i in pick) for t in seen}
    for seed in range(300):
        scene, motion, _ = world.sample(seed)
        assert (scene.colour, scene.shape, motion) not in held_out


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_frame_1_says_nothing_of_the_motion(motion):
    np.testing.assert_array_equal(clip(motion)[0], clip("still")[0])


@pytest.mark.parametrize(
    ("motion", "dx", "dy"),
    [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1), ("spins", 0, 0), ("still", 0, 0)],
)
def test_shapes_move_as_named(motion, dx, dy):
    cover = world.mask(SCENE, motion)
    (x0, y0), (x1, y1) = centre(cover[0]), centre(cover[-1])
    assert x1 - x0 == pytest.approx(dx * 18, abs=0.5)
    assert y1 - y0 == pytest.approx(dy * 18, abs=0.5)
    assert cover[-1].sum() == pytest.approx(cover[0].sum(), rel=0.02)


@pytest.mark.parametrize(("motion", "factor"), [("grows", world.GROWTH), ("shrinks", world.SHRINKAGE)])
def test_shapes_change_size_as_named(motion, factor):
    cover = world.mask(SCENE, motion)
    assert np.sqrt(cover[-1].sum() / cover[0].sum()) == pytest.approx(factor, rel=0.03)


def test_edges_are_antialiased_and_backgrounds_varied():
    cover = world.mask(SCENE, "still")
    assert ((cover > 0.05) & (cover < 0.95)).sum() > 30
    pictures = [world.background(world.Scene("red", "star", 0.5, 0.5, 0.1, 0, kind, 4)) for kind in world.BACKGROUNDS]
    assert min(np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]) > 0.01


def test_size_and_length_are_free():
    assert clip("up", num_frames=3, size=96).shape == (3, 96, 96, 3)


def test_the_tokenizer_knows_every_caption_and_reads_back_from_json():
    tokenizer = Tokenizer.from_str(build_tokenizer(16).to_str())
    rng = np.random.default_rng(0)
    for colour, shape, motion in product(world.COLOURS, world.SHAPES, world.MOTIONS):
        scene = world.Scene(colour, shape, 0.5, 0.5, 0.1, 0, "radial", 0)
        encoding = tokenizer.encode(world.caption(scene, motion, rng))
        assert len(encoding.ids) == 16
        assert tokenizer.token_to_id("<unk>") not in encoding.ids
        assert encoding.ids[-1] == tokenizer.token_to_id("<end>")
    assert tokenizer.encode("A RED star, moves up!").ids == tokenizer.encode("a red star moves up").ids


@pytest.mark.parametrize("seed", range(8))
def test_the_judge_passes_the_truth(seed):
    scene, motion, _ = world.sample(seed, held_out=True)
    assert all(judge(clip(motion, scene), scene, motion).checks(scene, motion).values())


@pytest.mark.parametrize("shown", world.MOTIONS)
def test_the_judge_tells_every_motion_from_every_other(shown):
    for told in world.MOTIONS:
        assert judge(clip(shown), SCENE, told).checks(SCENE, told)["motion"] == (shown == told)


def spoilt(kind):
    frames = clip("right").copy()
    if kind == "colour":
        frames[1:] = clip("right", dataclasses.replace(SCENE, colour="blue"))[1:]
    elif kind == "shape":
        frames[8:] = clip("right", dataclasses.replace(SCENE, shape="heart"))[8:]
    elif kind == "no trail":
        still = world.mask(SCENE, "still")[0][..., None]
        frames[8:] = np.rint(frames[8:] * (1 - 0.5 * still) + np.array(world.COLOURS["red"]) * 255 * 0.5 * still)
    elif kind == "background":
        frames[6:, :12] = frames[6:, :12] // 2
    elif kind == "frame 1":
        frames[0] = np.clip(frames[0].astype(int) + 14, 0, 255)
    return frames


@pytest.mark.parametrize("kind", ["colour", "shape", "no trail", "background", "frame 1"])
def test_the_judge_sees_what_is_spoilt_and_only_that(kind):
    checks = judge(spoilt(kind), SCENE, "right").checks(SCENE, "right")
    assert [name for name, met in checks.items() if not met] == [kind]
