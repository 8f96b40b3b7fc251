"""The world of shapes: scenes are what they say, and motion is what the encoder finds in them."""

from __future__ import annotations

import colorsys
import math
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.motion.grid import to_pixels
from videolavit.shapes import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    KINDS,
    caption,
    clip,
    clips,
    is_held_out,
    left_to_right,
    picture_caption,
    picture_questions,
    plain_caption,
    questions,
    render,
    render_frame,
    sample_scene,
)
from videolavit.shapes.mistakes import altered, exchanged
from videolavit.shapes.scene import HUES, REACH, STEPS

seeds = st.integers(0, 100_000)
splits = st.sampled_from(("train", "held-out"))


@settings(max_examples=60, deadline=None)
@given(seeds, splits)
def test_shapes_stay_whole_apart_and_of_their_split(seed, split):
    scene = sample_scene(seed, split=split)
    assert scene == sample_scene(seed, split=split)
    for shape in scene.shapes:
        assert is_held_out(shape.colour, shape.kind, shape.motion.direction) == (split == "held-out")
        for frame in range(FRAMES):
            reach = REACH * shape.diameter_at(frame)
            # A large quick shape may leave the frame a little at its ends.
            assert all(reach - 0.1 < place < 1.1 - reach for place in shape.centre_at(frame))
    if len(scene.shapes) == 2:
        one, other = scene.shapes
        assert one.colour != other.colour
        assert all(
            math.dist(one.centre_at(t), other.centre_at(t)) > REACH * (one.diameter_at(t) + other.diameter_at(t))
            for t in range(FRAMES)
        )


@settings(max_examples=40, deadline=None)
@given(seeds, splits)
def test_a_moving_shape_goes_where_its_direction_says(seed, split):
    for shape in sample_scene(seed, split=split).shapes:
        (x0, y0), (x1, y1) = shape.centre_at(0), shape.centre_at(FRAMES - 1)
        if shape.motion.direction is None:
            assert shape.motion.deed == "bounce" or (x0, y0) == (x1, y1)
        else:
            way = np.array([x1 - x0, y1 - y0])
            assert way / np.linalg.norm(way) == pytest.approx(STEPS[shape.motion.direction], abs=1e-6)
            assert np.linalg.norm(way) > 0.15


def test_one_combination_in_ten_is_held_out_and_each_word_is_trained():
    combinations = list(product(COLOURS, KINDS, (*DIRECTIONS, None)))
    held = [c for c in combinations if is_held_out(*c)]
    assert len(held) == pytest.approx(len(combinations) / 10, abs=2)
    for position in range(3):
        assert {c[position] for c in held} == {c[position] for c in combinations}


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_colours_are_saturated_and_grounds_are_muted(seed):
    scene = sample_scene(seed)
    picture = render_frame(scene, 0) / 255.0
    assert colorsys.rgb_to_hsv(*picture[0, 0])[1] < 0.3
    for shape in scene.shapes:
        x, y = (int(place * 128) for place in shape.centre_at(0))
        hue, saturation, value = colorsys.rgb_to_hsv(*picture[y, x])
        if shape.colour == "white":
            assert saturation < 0.1 and value > 0.75
        else:
            assert saturation > 0.8 and value > 0.7
            assert abs((hue * 360 - HUES[shape.colour] + 180) % 360 - 180) < 6


def test_pictures_are_the_same_scene_at_every_side():
    for seed in range(8):
        scene = sample_scene(seed)
        small = render_frame(scene, 0, 64).astype(float)
        large = render_frame(scene, 0, 256).astype(float)
        assert np.abs(large.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small).mean() < 3
        assert np.array_equal(render(scene, 64)[2], render_frame(scene, 2, 64))


@pytest.mark.parametrize("side", [128, 256])
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_the_encoder_sees_each_shape_move(side, split):
    checked = 0
    for seed in range(12):
        scene = sample_scene(seed, split=split, shapes=1)
        motion = scene.shapes[0].motion
        if motion.direction is None:
            continue
        pixels = to_pixels(clip(scene, side).grid, side, side, rescale=True)  # [24, 2, r, c]
        moving = np.hypot(pixels[:, 0], pixels[:, 1]) > 0.4
        mean = np.array([pixels[:, c][moving].mean() for c in (0, 1)])
        assert mean @ STEPS[motion.direction] / np.linalg.norm(mean) > 0.9, (seed, plain_caption(scene))
        checked += 1
    assert checked > 5


def test_longer_scenes_are_cut_into_clips():
    scene = sample_scene(3, clips=2)
    parts = clips(scene, 128)
    assert [part.frames.shape for part in parts] == [(24, 128, 128, 3)] * 2
    assert np.array_equal(np.concatenate([part.frames for part in parts]), render(scene))
    assert parts[1].grid.shape == (24, 2, 8, 8)


@settings(max_examples=60, deadline=None)
@given(seeds, splits, st.integers(0, 2**32))
def test_what_is_said_is_true(seed, split, words):
    scene = sample_scene(seed, split=split)
    rng = np.random.default_rng(words)
    for text in (caption(scene, rng), picture_caption(scene, rng), plain_caption(scene)):
        words_said = set(re.findall(r"[a-z]+", text.lower()))
        assert words_said & set(COLOURS) == {shape.colour for shape in scene.shapes}
        assert words_said & set(KINDS) == {shape.kind for shape in scene.shapes}
    asked = questions(scene, rng)
    assert len({question for question, _, _ in asked}) == len(asked) or len(scene.shapes) == 2
    answers = {topic: [a for _, a, t in asked if t == topic] for _, _, topic in asked}
    assert answers["count"] == [("one", "two")[len(scene.shapes) - 1]]
    assert set(answers.get("kind", [])) <= {shape.kind for shape in scene.shapes}
    assert set(answers.get("colour", [])) <= {shape.colour for shape in scene.shapes}
    assert not any("mov" in question for question, _, _ in picture_questions(scene, rng))


@settings(max_examples=60, deadline=None)
@given(seeds, splits)
def test_shapes_are_put_in_order_from_the_left(seed, split):
    scene = sample_scene(seed, split=split)
    ordered = left_to_right(scene)
    assert set(ordered.shapes) == set(scene.shapes) and ordered.background == scene.background
    places = [shape.start[0] for shape in ordered.shapes]
    assert places == sorted(places)


@settings(max_examples=60, deadline=None)
@given(seeds, splits, st.integers(0, 2**32))
def test_mistaken_scenes_say_nearly_the_same_and_have_no_held_out_combination(seed, split, draws):
    scene = sample_scene(seed, split=split)
    found = exchanged(scene)
    assert set(found) <= ({"motion", "colour", "kind"} if len(scene.shapes) == 2 else set())
    for name, wrong in found.items():
        assert sorted(str(getattr(s, name)) for s in wrong.shapes) == sorted(
            str(getattr(s, name)) for s in scene.shapes
        )
        assert [getattr(s, name) for s in wrong.shapes] == [getattr(s, name) for s in scene.shapes][::-1]
        said, true = (sorted(f" and {plain_caption(each)}".split(" and a")) for each in (wrong, scene))
        assert said != true, name
    changed = altered(scene, np.random.default_rng(draws))
    if changed is not None:
        topic, other = changed
        found["altered"] = other
        differing = {
            name
            for a, b in zip(scene.shapes, other.shapes, strict=True)
            for name, one, two in (
                ("colour", a.colour, b.colour),
                ("kind", a.kind, b.kind),
                ("size", a.size, b.size),
                ("direction", a.motion.direction, b.motion.direction),
                ("speed", a.motion.speed, b.motion.speed),
            )
            if one != two
        }
        assert differing <= {topic}
        assert sum(a != b for a, b in zip(scene.shapes, other.shapes, strict=True)) <= 1
        for a, b in zip(scene.shapes, other.shapes, strict=True):
            assert (a.size is None, a.motion.speed is None) == (b.size is None, b.motion.speed is None)
    for wrong in found.values():
        assert len({shape.colour for shape in wrong.shapes}) == len(scene.shapes)
        assert not any(is_held_out(shape.colour, shape.kind, shape.motion.direction) for shape in wrong.shapes)


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"clips": 0}, {"shapes": 3}])
def test_arguments_are_checked(wrong):
    with pytest.raises(UsageError):
        sample_scene(0, **wrong)
