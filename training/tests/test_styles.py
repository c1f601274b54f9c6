import pytest
import torch

from flowturbo_training.__main__ import main
from flowturbo_training.detector import score
from flowturbo_training.edges import agreement, as_picture, canny
from flowturbo_training.styles import STYLES, filled, outlined, outlines, world_examples
from flowturbo_training.world import draw_scenes, render


@pytest.mark.parametrize("size", [64, 128])
def test_outlined_things_are_filled_again(size):
    scenes = draw_scenes(21, 120)
    pictures = outlined(scenes, size)
    assert score(pictures, scenes)["shapes"] < 0.5
    back = [filled(p, s) for p, s in zip(pictures, scenes)]
    result = score(torch.stack([p for p, _ in back]), scenes)
    for name in ("ground", "colours", "shapes", "sizes", "relation"):
        assert result[name] >= 0.99, (name, result)
    assert min(hollow for _, hollow in back) > 0.05


def test_full_things_stay_as_they_are():
    scenes = draw_scenes(22, 60)
    for picture, scene in zip(render(scenes, 64), scenes):
        same, hollow = filled(picture, scene)
        assert hollow == 0 and torch.equal(same, picture)


@pytest.mark.parametrize("size", [64, 128])
def test_edges_are_the_outlines(size):
    scenes = draw_scenes(23, 40)
    found, drawn = canny(render(scenes, size)), outlines(scenes, size, [1.0] * 40)[:, 0] > 0
    assert agreement(found, drawn) > 0.99
    # Lines are thin: of a square of s pixels a side there are about 4·s.
    assert agreement(found[1:], found[:-1]) < 0.3
    assert as_picture(found).unique().tolist() == [-1.0, 1.0]


def test_an_edge_is_one_pixel_wide_and_weak_ones_need_strong_ones():
    picture = torch.full((1, 3, 16, 16), -1.0)
    picture[..., 8:] = 1.0
    assert canny(picture)[0].sum(1).tolist() == [1] * 16
    faint = torch.full((1, 3, 16, 16), -1.0)
    faint[..., 8:] = -1 + 40 / 127.5
    # 40 steps of grey have a magnitude of 160: weak. One stronger row keeps all of its line.
    assert not canny(faint).any()
    faint[..., 4, 8:] = 1.0
    assert canny(faint)[0, :, 7].sum() + canny(faint)[0, :, 8].sum() > 10


def test_examples_are_the_seed_and_the_size():
    first, again = (list(world_examples("outlined", 4, 6, 64, control=True)) for _ in range(2))
    assert [e[1] for e in first] == [e[1] for e in again] and first[0][0].tobytes() == again[0][0].tobytes()
    assert all(p.size == c.size == (64, 64) for p, _, c in first)


def test_the_command_knows_the_styles(capsys):
    with pytest.raises(SystemExit):
        main(["lora", "--help"])
    assert "{" + ",".join(STYLES) + "}" in capsys.readouterr().out
