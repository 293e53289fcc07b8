import math

import pytest
import torch
from disco.augment import Augmentation, Draws
from PIL import Image
from torchvision.transforms.v2 import functional as V


def pictures(count=4, side=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def drawn(count, **changes):
    """Draws that change nothing but what is named."""
    still = {
        "box": torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(count, 1), "flip": torch.zeros(count, dtype=torch.bool),
        "jitter": torch.zeros(count, dtype=torch.bool), "factors": torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1),
        "order": torch.arange(4).repeat(count, 1), "grey": torch.zeros(count, dtype=torch.bool), "sigma": torch.zeros(count),
    }  # fmt: skip
    return Draws(**{**still, **changes})


def test_without_any_change_an_image_stays():
    images = pictures()
    torch.testing.assert_close(Augmentation(20)(images, drawn(4)), images / 255)


@pytest.mark.parametrize("size", [8, 20, 33])
def test_crops_are_torchvisions(size):
    """Of the same integer box, antialiased, each image its own; PIL's too, up to its rounding to whole levels."""
    images = pictures(side=24)
    boxes = [(3, 5, 12, 15), (0, 0, 24, 24), (23, 2, 1, 9), (10, 0, 14, 7)]  # top, left, height, width
    shares = [(h / 24, w / 24, (t + 0.5) / (25 - h), (left + 0.5) / (25 - w)) for t, left, h, w in boxes]
    views = Augmentation(size)(images, drawn(4, box=torch.tensor(shares)))
    for image, view, (top, left, height, width) in zip(images, views, boxes, strict=True):
        expected = V.resized_crop(image / 255, top, left, height, width, [size, size], antialias=True)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
        picture = V.to_pil_image(image).crop((left, top, left + width, top + height))
        pil = V.pil_to_tensor(picture.resize((size, size), Image.Resampling.BILINEAR)) / 255
        torch.testing.assert_close(view, pil, rtol=0, atol=1.01 / 255)


def test_flips_are_of_each_image():
    images = pictures(2)
    views = Augmentation(20)(images, drawn(2, flip=torch.tensor([True, False])))
    torch.testing.assert_close(views, torch.stack([images[0].flip(2), images[1]]) / 255)


@pytest.mark.parametrize("seed", range(3))
def test_colours_are_torchvisions_in_each_images_own_order(seed):
    augmentation, images = Augmentation(20), pictures(6, seed=seed)
    random = augmentation.draw(6, torch.Generator().manual_seed(seed))
    jitter = torch.tensor([True] * 5 + [False])
    views = augmentation(images, drawn(6, jitter=jitter, factors=random.factors, order=random.order))
    change = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for row in range(5):
        expected = images[row] / 255
        for operation in random.order[row]:
            expected = change[operation](expected, random.factors[row, operation].item())
        torch.testing.assert_close(views[row], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(views[5], images[5] / 255)


def test_grey_is_torchvisions():
    images = pictures(2)
    views = Augmentation(20)(images, drawn(2, grey=torch.tensor([True, False])))
    torch.testing.assert_close(views[0], V.rgb_to_grayscale(images[0] / 255, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(views[1], images[1] / 255)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian_of_each_images_own_width(sigma):
    images = pictures(2, side=40)
    views = Augmentation(40)(images, drawn(2, sigma=torch.tensor([sigma, 0.0])))
    expected = V.gaussian_blur(images[0] / 255, [15, 15], [sigma, sigma])
    inside = (slice(None), slice(8, -8), slice(8, -8))  # edges are extended in another way
    torch.testing.assert_close(views[0][inside], expected[inside], rtol=0, atol=1e-4)
    torch.testing.assert_close(views[1], images[1] / 255)


def test_draws_have_the_papers_probabilities_and_ranges():
    draws = Augmentation.moco(224).draw(20_000, torch.Generator().manual_seed(0))
    for share, expected in ((draws.flip, 0.5), (draws.jitter, 0.8), (draws.grey, 0.2), (draws.sigma > 0, 0.5)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.02)
    blurred = draws.sigma[draws.sigma > 0]
    assert blurred.min() >= 0.1
    assert blurred.max() <= 2.0
    area, ratio = draws.box[:, 0] * draws.box[:, 1], draws.box[:, 1] / draws.box[:, 0]
    assert 0.2 <= area.min() < 0.21
    assert area.max() <= 1
    assert ratio.min() >= 0.75 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    assert draws.box.min() >= 0
    assert draws.box.max() <= 1
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert low <= draws.factors[:, column].min() < low + 0.01
        assert high - 0.01 < draws.factors[:, column].max() <= high
    counts = torch.unique(draws.order, dim=0, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert counts.min() > 700  # of 833


def test_small_images_are_not_blurred_and_linear_evaluation_only_crops_and_flips():
    generator = torch.Generator().manual_seed(0)
    assert not Augmentation.moco(32).draw(500, generator).sigma.any()
    draws = Augmentation.crop_flip(32).draw(5000, generator)
    assert not (draws.jitter.any())
    assert not (draws.grey.any())
    assert not (draws.sigma.any())
    assert (draws.box[:, 0] * draws.box[:, 1]).min() < 0.1


def test_draws_are_reproducible_and_can_be_selected():
    augmentation, images = Augmentation.moco(16), pictures(8)
    draws = augmentation.draw(8, torch.Generator().manual_seed(3))
    again = augmentation.draw(8, torch.Generator().manual_seed(3))
    assert torch.equal(augmentation(images, draws), augmentation(images, again))
    some = torch.tensor([5, 2])
    torch.testing.assert_close(augmentation(images[some], draws.select(some)), augmentation(images, draws)[some])


def test_views_stay_in_range_and_inputs_as_they_are():
    augmentation, images = Augmentation.moco(64), pictures(32, side=70)
    before = images.clone()
    views = augmentation(images, augmentation.draw(32, torch.Generator().manual_seed(0)))
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1 + 1e-5
    assert torch.equal(images, before)


def test_autocast_does_not_reach_the_views():
    augmentation, images = Augmentation.moco(16), pictures()
    draws = augmentation.draw(4, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = augmentation(images, draws)
    assert torch.equal(inside, augmentation(images, draws))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_a_gpu_equal_those_on_a_cpu():
    augmentation, images = Augmentation.moco(64), pictures(32, side=70)
    draws = augmentation.draw(32, torch.Generator().manual_seed(0))
    views = augmentation(images.cuda(), draws).cpu()
    torch.testing.assert_close(views, augmentation(images, draws), rtol=0, atol=2e-3)
