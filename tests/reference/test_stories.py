"""The judge of long clips, held to the truth that the demo world renders."""

import dataclasses

import numpy as np
import pytest

from trip_reference.demo_world import world
from trip_reference.demo_world.stories import BACK, judge_ending, poses, render_story


def story_of(motion, parts=3, each=15):
    motions = [motion if part % 2 == 0 else BACK.get(motion, motion) for part in range(parts)]
    return [name for name in motions for _ in range(each)]


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_a_story_of_one_motion_is_the_worlds_clip(motion):
    scene = dataclasses.replace(world.sample(3)[0], shape="heart")
    np.testing.assert_allclose(
        render_story(scene, [motion] * 15, 64).astype(int), world.render(scene, motion, 16, 64), atol=1
    )


def test_a_story_comes_back():
    scene = world.sample(3)[0]
    for motion in BACK:
        last = poses(scene, story_of(motion, 2))[-1]
        if motion in ("grows", "shrinks"):
            assert last.radius == pytest.approx(scene.radius * world.GROWTH * world.SHRINKAGE)
        else:
            assert (last.x, last.y) == pytest.approx((scene.x, scene.y))


@pytest.mark.parametrize("seed", range(24))
def test_the_truth_meets_every_demand(seed):
    scene, motion, _ = world.sample(seed, held_out=True)
    story = story_of(motion)
    ending = judge_ending(render_story(scene, story), scene, story)
    assert all(ending.checks(scene, story[-1]).values()), (ending, scene, motion)
    assert ending.truth_psnr == ending.last_psnr == 100


def test_it_sees_another_motion_shape_colour_and_a_jump():
    scene, story = world.sample(7, held_out=True)[0], story_of("left")
    scene = dataclasses.replace(scene, shape="star", colour="red")
    frames = render_story(scene, story)
    other = render_story(scene, [*story[:-15], *["right"] * 15])
    assert judge_ending(other, scene, story).motion == "right"
    late = dataclasses.replace(scene, shape="square", colour="blue")
    changed = np.concatenate([frames[:20], render_story(late, story)[20:]])
    ending = judge_ending(changed, scene, story)
    assert (ending.motion, ending.shape, ending.colour) == ("left", "square", "blue")
    skipping = np.concatenate([frames[:20], frames[23:], frames[-3:]])
    assert judge_ending(skipping, scene, story).step == pytest.approx(4, abs=0.5)
    assert not judge_ending(skipping, scene, story).checks(scene, "left")["no jump"]


def test_small_errors_of_place_and_size_are_forgiven():
    scene, story = dataclasses.replace(world.sample(7, held_out=True)[0], shape="heart"), story_of("up")
    drifted = dataclasses.replace(scene, x=scene.x + 0.06, y=scene.y - 0.05, radius=scene.radius * 1.15)
    ending = judge_ending(render_story(drifted, story), scene, story)
    assert all(ending.checks(scene, story[-1]).values()), ending
