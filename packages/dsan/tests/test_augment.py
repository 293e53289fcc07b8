"""What changes of crops may do, and what never happens."""

from dataclasses import replace

import pytest
import torch
from dsan.augment import Augmentation

STILL = Augmentation(0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # changes nothing


def crops(count=4, channels=1, width=40, low=0, high=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (count, channels, 32, width), generator=generator, dtype=torch.uint8)


def changed(images, widths=None, seed=0, augmentation=None):
    return (augmentation or Augmentation())(images, widths, torch.Generator().manual_seed(seed))


def test_the_same_generator_gives_the_same_and_each_crop_another_change():
    images = crops(1).repeat(3, 1, 1, 1)
    first = changed(images)
    state = torch.get_rng_state()
    assert torch.equal(first, changed(images))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, changed(images, seed=1))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_range(channels):
    images = crops(16, channels)
    out = changed(images)
    assert (out.shape, out.dtype) == (images.shape, torch.float32)
    assert 0 <= out.min() < out.max() <= 255


def test_nothing_is_nothing():
    torch.testing.assert_close(changed(crops(), augmentation=STILL), crops().float(), rtol=0, atol=0.01)


def test_what_is_beyond_a_crop_never_enters_it():
    images, widths = crops(8), torch.tensor([16, 20, 24, 28, 32, 36, 39, 40])
    beyond = (torch.arange(40) >= widths[:, None])[:, None, None]
    black, white = (changed(images.masked_fill(beyond, shade), widths) for shade in (0, 255))
    torch.testing.assert_close(black, white, rtol=0, atol=0.05)
    assert (changed(images, None) - white).abs().max() > 50  # but what it takes from there if all is the crop


def test_a_blank_crop_keeps_its_shade_wherever_it_is_moved():
    places = replace(STILL, turn=5.0, shear=0.3, zoom=1.15, shift=0.04, bend=0.05)
    blank = torch.full((8, 1, 32, 40), 200, dtype=torch.uint8)
    torch.testing.assert_close(changed(blank, torch.arange(33, 41), augmentation=places), blank.float())


@pytest.mark.parametrize("place", ["turn", "shear", "zoom", "shift", "bend"])
def test_each_change_of_place_moves_text_a_little(place):
    only = replace(STILL, **{place: getattr(Augmentation(), place)})
    distances = []
    for step, ramp in ((4, 4 * torch.arange(32).view(32, 1)), (2, 2 * torch.arange(100))):
        images = ramp.expand(32, 1, 32, 100).to(torch.uint8)
        moved = (changed(images, augmentation=only) - images)[:, :, 8:24, 20:80]
        distances.append(float(moved.abs().max()) / step)
    assert 0.5 < max(distances) < 8  # pixels, up or down and to a side


def test_of_greys_each_crop_is_stretched_lifted_or_inverted_in_place():
    images = crops(64, low=100, high=150)
    out = changed(images, augmentation=replace(Augmentation.of_greys(), blur=0.0, noise=0.0))
    pairs = torch.stack([images.float().flatten(1), out.flatten(1)], 1)
    slopes = torch.stack([torch.corrcoef(pair)[0, 1] * pair[1].std() / pair[0].std() for pair in pairs])
    assert torch.allclose(torch.stack([torch.corrcoef(pair)[0, 1].abs() for pair in pairs]), torch.ones(64), atol=1e-3)
    assert (slopes.abs() > 1 / 1.5 - 1e-2).all()
    assert (slopes.abs() < 1.5 + 1e-2).all()
    assert 2 <= int((slopes < 0).sum()) <= 20


def test_of_greys_leaves_an_edge_where_it_was():
    image = torch.zeros(32, 1, 32, 40, dtype=torch.uint8)
    image[..., 20:] = 200
    out = changed(image, augmentation=replace(Augmentation.of_greys(), blur=0.0, noise=0.0))
    assert (out.diff(dim=3).abs().argmax(3) == 19).all()
