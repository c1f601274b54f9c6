import random

import pytest
import torch

from flowturbo_training.detector import judge, score
from flowturbo_training.world import GREY_INDEX, RELATIONS, Scene, Thing, draw_scene, draw_scenes, render


@pytest.mark.parametrize("size", [64, 128])
def test_the_detector_is_right_about_exact_renders(size):
    scenes = draw_scenes(11, 400)
    result = score(render(scenes, size), scenes)
    for name in ("ground", "colours", "shapes", "sizes", "relation"):
        assert result[name] >= 0.995, (name, result)


def test_the_detector_refuses_other_scenes_pictures():
    scenes = draw_scenes(12, 200)
    wrong = score(render(scenes[1:] + scenes[:1], 64), scenes)
    assert wrong["shapes"] < 0.1 and wrong["colours"] < 0.1


def test_the_detector_refuses_each_kind_of_error():
    right = Scene((Thing(0, 0, "", 0.5, 0.25, 0.17), Thing(1, 4, "", 0.5, 0.75, 0.17)), GREY_INDEX, 0)
    assert right.caption == "a red circle above a blue square"
    one, two = right.things
    shape = Scene((Thing(2, 0, "", 0.5, 0.25, 0.17), two), GREY_INDEX, 0)
    swapped = Scene((Thing(0, 0, "", 0.5, 0.75, 0.17), Thing(1, 4, "", 0.5, 0.25, 0.17)), GREY_INDEX, 0)
    ground = Scene((one, two), 5, 0)
    assert not judge(render([shape], 64)[0], right).shapes
    assert not judge(render([swapped], 64)[0], right).relation
    assert not judge(render([ground], 64)[0], right).ground
    assert not judge(torch.zeros(3, 64, 64), right).colours


def test_scenes_stay_inside_and_mean_what_they_say():
    rng = random.Random(3)
    for _ in range(2000):
        scene = draw_scene(rng)
        for thing in scene.things:
            assert 0 <= thing.x - thing.radius and thing.x + thing.radius <= 1
            assert 0 <= thing.y - thing.radius and thing.y + thing.radius <= 1
            assert thing.colour != scene.ground
        if scene.relation is not None:
            first, second = scene.things
            difference = {"above": second.y - first.y, "below": first.y - second.y,
                          "left of": second.x - first.x, "right of": first.x - second.x}  # fmt: skip
            assert difference[RELATIONS[scene.relation]] >= first.radius + second.radius


def test_coverage_is_the_area():
    scene = Scene((Thing(0, 0, "large", 0.5, 0.5, 0.3),), GREY_INDEX, None)
    picture = render([scene], 256)[0]
    ground = render([Scene((Thing(0, 0, "large", 9, 9, 0.3),), GREY_INDEX, None)], 256)[0]
    red = (picture[0] - ground[0, 0, 0]) / (picture[0].max() - ground[0, 0, 0])
    assert abs(float(red.mean()) - 3.14159265 * (0.95 * 0.3) ** 2) < 1e-3
