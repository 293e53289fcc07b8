import io

import numpy as np
import pytest
import torch
from dsan.images import Size, collate, fit, normalize, open_image, upright_size
from PIL import Image


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


RAMP = np.linspace(0, 255, 48).astype(np.uint8)[None].repeat(16, 0)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))


def test_upright_size_obeys_exif():
    picture = Image.new("L", (30, 10))
    picture.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    content = encoded(picture, exif=exif)
    assert open_image(content).size == upright_size(content) == (10, 30)
    assert open_image(content).getpixel((9, 0)) == 255


class TestFit:
    def test_one_pixel_wide_is_stretched(self):
        narrow = open_image(encoded(Image.new("L", (1, 60), 9)))
        assert fit(narrow).shape == (1, 32, 100)
        assert fit(narrow, keep_ratio=True).shape == (1, 32, 16)
        assert (fit(narrow) == 9).all()

    @pytest.mark.parametrize(
        ("size", "width"), [((200, 50), 128), ((33, 32), 33), ((101, 100), 33), ((5, 50), 16), ((9999, 9), 800)]
    )
    def test_keep_ratio(self, size, width):
        assert fit(Image.new("L", size), keep_ratio=True).shape == (1, 32, width)
        assert Size(keep_ratio=True).fitted_width(*size) == width

    def test_channels(self):
        picture = Image.new("RGB", (100, 32), (255, 0, 0))
        assert fit(picture, channels=3)[:, 0, 0].tolist() == [255, 0, 0]
        assert fit(picture)[:, 0, 0].tolist() == [76]

    def test_tall_crops_are_turned_counter_clockwise(self):
        picture = Image.new("L", (20, 60))
        picture.paste(255, (0, 0, 20, 30))  # the upper half, which is then the left one
        found = fit(picture, rotate_tall=True, keep_ratio=True)
        assert found.shape == (1, 32, 96)
        assert found[0, :, :40].min() == 255
        assert found[0, :, 56:].max() == 0
        assert fit(picture, rotate_tall=True)[0, 16, 10] == 255
        assert fit(picture, keep_ratio=True).shape == (1, 32, 16)
        assert not Size(rotate_tall=True).turns(20, 30)

    def test_bicubic(self):
        picture = Image.fromarray(RAMP)
        expected = np.asarray(picture.resize((100, 32), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(fit(picture)[0], expected)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"height": 0}, "height must be at least 1"),
            ({"max_width": 15}, "max_width"),
            ({"channels": 4}, r"channels must be 1 \(grey\)"),
        ],
    )
    def test_wrong_sizes(self, fields, message):
        with pytest.raises(ValueError, match=message):
            fit(Image.new("L", (4, 4)), **fields)


def test_collate_pads_on_the_right():
    images, widths = collate([np.full((3, 8, w), w, np.uint8) for w in (17, 30, 4)])
    assert (images.shape, images.dtype, widths.tolist(), widths.dtype) == (
        (3, 3, 8, 32),
        torch.uint8,
        [17, 30, 4],
        torch.int64,
    )
    for image, width in zip(images, (17, 30, 4), strict=True):
        assert (image[..., :width] == width).all()
        assert (image[..., width:] == 128).all()


def test_normalize():
    found = normalize(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(found, torch.tensor([-1, -0.6, 1.0]))
