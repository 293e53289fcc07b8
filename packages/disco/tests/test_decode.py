import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from disco.decode import open_picture, square
from PIL import Image
from torchvision.transforms.v2 import functional as F


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def colours(width=24, height=24, seed=0):
    """A smooth picture, which JPEG keeps."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def decode(content, side=24):
    return square(open_picture(content), side)


@pytest.mark.parametrize(
    ("kind", "options", "off"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("GIF", {}, 40),
    ],
)
def test_every_format_gives_the_pixels(kind, options, off):
    picture = colours()
    found = decode(encoded(picture, kind, **options))
    assert (found.dtype, found.shape) == (torch.uint8, (3, 24, 24))
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)).max() <= off


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    ramp = np.linspace(0, 255, 24).astype(np.uint8)[None].repeat(24, 0)
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
        assert picture.mode == mode
    else:
        picture = Image.fromarray(ramp)
        picture = (picture if mode in ("1", "L", "P") else picture.convert("RGB")).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"))
    expected = np.where(ramp < 128, 0, 255) if mode == "1" else ramp
    if mode == "1":  # dithered
        assert set(found.unique().tolist()) == {0, 255}
        assert abs(found.float().mean() - ramp.mean()) < 5
    else:
        assert np.abs(found.numpy().astype(int) - expected).max() <= 1


def test_cmyk_jpegs_keep_their_colours():
    found = decode(encoded(Image.new("CMYK", (24, 24), (255, 0, 0, 0)), "JPEG"))
    assert found[0].max() < 10
    assert found[1:].min() > 245


def test_transparency_is_dropped_without_a_word():
    picture = Image.new("RGBA", (24, 24), (200, 100, 50, 0))
    palette = Image.new("P", (24, 24), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (encoded(picture), encoded(palette, transparency=b"\xff\x00")):
            assert decode(content)[:, 5, 5].tolist() == [200, 100, 50]


def test_numbers_without_a_white_are_refused():
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"32-bit numbers .mode {mode}., whose white is unknown"):
            decode(encoded(Image.new(mode, (24, 24), 3), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(orientation):
    upright = colours(24, 24)
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright if orientation == 1 else upright.transpose(turned[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, exif=exif))
    torch.testing.assert_close(found, decode(encoded(upright)), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (41, 60), (30, 30)])
@pytest.mark.parametrize("side", [16, 30, 50])
def test_square_is_resizing_the_shorter_side_and_cropping_the_centre(size, side):
    picture = colours(*size)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    expected = F.center_crop(F.resize(pixels, [side], antialias=True), [side, side])
    found = square(picture, side)
    # Up to a fraction of a pixel.
    assert (found.float() - expected.float()).abs().mean() < 8
    assert found.is_contiguous()
    if size != (30, 30):
        corner = F.resize(pixels[:, : min(size), : min(size)], [side, side], antialias=True)
        assert (corner.float() - expected.float()).abs().mean() > 16


def test_large_jpegs_are_decoded_at_a_fraction_and_look_the_same():
    picture = colours(800, 600)
    content = encoded(picture, "JPEG", quality=95)
    opened = open_picture(content)
    found = square(opened, 64)
    assert opened.size == (200, 150)
    assert (found.float() - square(picture, 64).float()).abs().max() < 8


def test_a_picture_of_extreme_shape_costs_no_memory():
    assert decode(encoded(Image.new("RGB", (200_000, 1), (9, 8, 7))), 224)[:, 100, 100].tolist() == [9, 8, 7]


def png_of(width, height):
    """The header of a PNG, and no more than a pixel in it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused_by_their_header():
    with pytest.raises(Image.DecompressionBombError):
        open_picture(png_of(20_000, 20_000))


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"])
def test_other_formats_are_no_images(content):
    with pytest.raises(OSError, match=r"not an image \(BMP, GIF, JPEG"):
        open_picture(content)


def test_half_a_file_is_no_image():
    content = encoded(colours(64, 64), "JPEG")
    with pytest.raises(OSError, match=r"(?i)truncated"):
        decode(content[: len(content) // 2])
