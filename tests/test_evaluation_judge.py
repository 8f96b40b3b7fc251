"""The judge of clips: right on clips that are right by making, and not fooled by what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.video import read_frames, write_video
from videolavit.evaluation.judge import look
from videolavit.evaluation.outlines import diameter, overlaps
from videolavit.evaluation.regions import colour_names, components, regions
from videolavit.evaluation.verdicts import check_one, check_two, way_of
from videolavit.shapes.drawing import render, render_frame
from videolavit.shapes.scene import COLOURS, KINDS, Motion, Scene, sample_scene

SCENES = 9  # of each number of shapes; `videolavit evaluate shapes --only judge` takes hundreds


def held_out(seed: int, shapes: int) -> Scene:
    return sample_scene(seed, split="held-out", shapes=shapes)


def recorded(frames: np.ndarray, folder: Path) -> np.ndarray:
    write_video(folder / "clip.mp4", frames, 6, {}, force=True)
    return np.stack(list(read_frames(folder / "clip.mp4")))


@pytest.mark.parametrize("seed", range(SCENES))
def test_one_shape_is_seen_as_it_was_drawn(seed: int, tmp_path: Path) -> None:
    shape = held_out(seed, 1).shapes[0]
    seen = look(recorded(render(held_out(seed, 1)), tmp_path))
    assert all(check_one(shape, seen).values()), [str(one) for one in seen]
    assert seen[0].size(1) == shape.size
    assert seen[0].diameter == pytest.approx(shape.diameter, abs=0.012)
    if shape.motion.deed == "move":
        assert seen[0].speed == shape.motion.speed


@pytest.mark.parametrize("seed", range(SCENES))
def test_two_shapes_are_seen_as_they_were_drawn(seed: int, tmp_path: Path) -> None:
    scene = held_out(seed, 2)
    seen = look(recorded(render(scene), tmp_path))
    assert all(check_two(scene, seen).values()), [str(one) for one in seen]
    assert {one.colour: one.size(2) for one in seen} == {shape.colour: shape.size for shape in scene.shapes}


@pytest.mark.parametrize("seed", range(4))
def test_a_blurred_pale_and_noisy_clip_is_still_read(seed: int) -> None:
    """What a decoder of few channels makes of a shape."""
    scene = held_out(100 + seed, 1)
    frames = render(scene)[::3].astype(np.float64)
    blurred = sum(np.roll(frames, shift, axis=(1, 2)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1))) / 4
    pale = blurred + 0.15 * (blurred.mean(axis=-1, keepdims=True) - blurred)
    noisy = pale + np.random.default_rng(seed).normal(0, 6, pale.shape)
    assert check_one(scene.shapes[0], look(np.clip(noisy, 0, 255).astype(np.uint8)))["all"]


def moving_scene() -> Scene:
    return next(scene for scene in (held_out(seed, 1) for seed in range(50)) if scene.shapes[0].motion.speed)


def test_a_clip_run_backwards_moves_the_other_way() -> None:
    scene = moving_scene()
    checks = check_one(scene.shapes[0], look(render(scene)[::-1]))
    assert checks["colour"] and checks["kind"] and not checks["direction"] and not checks["all"]


def test_the_wrong_colour_kind_size_and_speed_are_found_wrong() -> None:
    scene = moving_scene()
    shape = scene.shapes[0]
    seen = look(render(scene)[::2])
    other_colour = COLOURS[(COLOURS.index(shape.colour) + 1) % len(COLOURS)]
    other_kind = KINDS[(KINDS.index(shape.kind) + 1) % len(KINDS)]
    assert not check_one(replace(shape, colour=other_colour), seen)["colour"]
    assert not check_one(replace(shape, kind=other_kind), seen)["kind"]
    sizes = {size: check_one(shape, seen, size=size)["size"] for size in ("small", "large")}
    assert sizes == {size: shape.size == size for size in sizes}
    speeds = {speed: look(render(scene))[0].speed == speed for speed in ("slowly", "quickly")}
    assert speeds == {speed: shape.motion.speed == speed for speed in speeds}


def test_a_shape_that_goes_and_comes_back_has_no_direction() -> None:
    frames = render(moving_scene())
    assert look(np.concatenate([frames[::2], frames[::-2]]))[0].way == "wandering"


def test_growth_is_measured() -> None:
    scene = held_out(3, 1)
    shape = replace(scene.shapes[0], diameter=0.2, start=(0.5, 0.5), motion=Motion(deed="grow", rate=1.9))
    seen = look(render(replace(scene, shapes=(shape,))))
    assert seen[0].growth == pytest.approx(1.9, rel=0.12)
    assert seen[0].way == "still"


@pytest.mark.parametrize("frames", [np.zeros((0, 64, 64, 3)), np.zeros((4, 64, 64, 3)), np.full((4, 64, 64, 3), 110)])
def test_nothing_is_seen_where_nothing_is(frames: np.ndarray) -> None:
    seen = look(frames.astype(np.uint8))
    assert seen == []
    checks = check_one(held_out(0, 1).shapes[0], seen, "small", "slowly")
    assert checks.pop("count") is False and not any(checks.values())
    assert not any(check_two(held_out(0, 2), seen).values())


def test_noise_and_a_frame_full_of_colour_do_no_harm() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    full = np.zeros((3, 64, 64, 3), np.uint8)
    full[..., 0] = 255
    assert isinstance(look(noise), list)
    assert [one.colour for one in look(full)] == ["red"]


def test_a_shape_that_is_there_for_a_moment_does_not_count() -> None:
    scene = moving_scene()
    frames = render(scene)
    empty = render(replace(scene, shapes=()))
    frames[8:] = empty[8:]
    assert look(frames) == []


def test_every_colour_has_its_name_and_grounds_have_none() -> None:
    for seed in range(40):
        scene = held_out(seed, 1)
        shape = scene.shapes[0]
        names = colour_names(render_frame(scene, 0))
        x, y = (round(place * 128) for place in shape.centre_at(0))
        assert COLOURS[names[y, x]] == shape.colour
        assert (colour_names(render_frame(replace(scene, shapes=()), 0)) == -1).all()


def test_touching_shapes_of_two_colours_are_two() -> None:
    frame = np.full((64, 64, 3), 60, np.uint8)
    frame[20:40, 10:30] = (230, 20, 20)
    frame[20:40, 30:50] = (20, 40, 230)
    assert sorted(region.colour for region in regions(frame)) == ["blue", "red"]


def test_components_of_a_spiral_and_a_speck() -> None:
    mask = np.zeros((9, 9), bool)
    mask[0, :] = mask[:, 8] = mask[8, :] = mask[2:, 0] = mask[2, :7] = True
    mask[4:6, 3:5] = True
    assert sorted(int(part.sum()) for part in components(mask, 1)) == [4, int(mask.sum()) - 4]
    assert len(components(mask, 5)) == 1
    assert components(np.zeros((4, 4), bool), 1) == []


@pytest.mark.parametrize("kind", KINDS)
def test_outlines_fit_their_own_kind_best(kind: str) -> None:
    scene = next(scene for scene in (held_out(seed, 1) for seed in range(200)) if scene.shapes[0].kind == kind)
    region = regions(render_frame(scene, 0))[0]
    scores = overlaps(region.alpha)
    assert max(scores, key=scores.__getitem__) == kind
    assert sorted(scores.values())[-1] > 0.93
    assert diameter(scene.shapes[0].kind, region.area) / 128 == pytest.approx(scene.shapes[0].diameter, abs=0.012)


def test_way_of_a_still_shape() -> None:
    scene = held_out(0, 1)
    assert way_of(replace(scene.shapes[0], motion=Motion(deed="still"))) == "still"
