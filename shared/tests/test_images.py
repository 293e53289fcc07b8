import io
import re

import numpy as np
import pytest
from papercore.lab.images import find_images, open_image
from PIL import Image


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


RAMP = np.linspace(0, 255, 48).astype(np.uint8)[None].repeat(16, 0)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))


class TestTraps:
    """Each is a documented conversion or an error that names the file."""

    def test_rgba_is_laid_on_white(self):
        found = open_image(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 51))))
        assert (found.mode, found.getpixel((0, 0))) == ("RGB", (244, 204, 204))

    def test_its_info_says_so(self):
        found = [open_image(Image.new("RGBA", (4, 4), (200, 0, 0, alpha))) for alpha in (51, 255)]
        assert [picture.info.get("laid_on_white", False) for picture in found] == [True, False]
        assert found[1].getpixel((0, 0)) == (200, 0, 0)

    def test_grey_with_alpha_stays_grey_on_white(self):
        found = open_image(encoded(Image.new("LA", (4, 4), (0, 0))))
        assert (found.mode, found.getpixel((0, 0))) == ("L", 255)

    def test_palette_with_transparency_is_laid_on_white(self):
        picture = Image.new("P", (2, 1))
        picture.putpalette([10, 20, 30, 200, 0, 0])
        picture.putpixel((1, 0), 1)
        for kind in ("PNG", "GIF"):
            found = open_image(encoded(picture, kind, transparency=0))
            assert (found.mode, found.getpixel((0, 0)), found.getpixel((1, 0))) == ("RGB", (255,) * 3, (200, 0, 0))

    def test_a_transparent_colour_of_rgb_is_laid_on_white(self):
        found = open_image(encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)))
        assert found.getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_16_bits_are_scaled_to_8(self, kind):
        found = open_image(encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), kind))
        assert found.mode == "L"
        np.testing.assert_array_equal(np.asarray(found), RAMP)

    def test_cmyk_keeps_its_colours(self):
        found = open_image(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95))
        assert found.mode == "RGB"
        assert np.abs(np.asarray(found).astype(int) - [0, 255, 255]).max() < 6

    def test_exif_rotation_is_applied(self):
        picture = Image.new("L", (30, 10))
        picture.putpixel((0, 0), 255)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        content = encoded(picture, exif=exif)
        assert open_image(content).size == (10, 30)
        assert open_image(content).getpixel((9, 0)) == 255

    def test_black_and_white_is_grey(self):
        found = open_image(encoded(Image.fromarray(RAMP > 127)))
        assert (found.mode, found.getpixel((0, 0)), found.getpixel((47, 0))) == ("L", 0, 255)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "the file is empty"),
            (b"a,b\n", "not an image that can be read"),
            (encoded(NOISE)[:-60], "truncated"),
            (encoded(Image.fromarray(RAMP)).replace(b"IDAT", b"IDAX"), "x.png: "),
            (b"P5 0 5 255\n", "x.png: "),
            (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "white is unknown"),
            (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "white is unknown"),
        ],
        ids=["0 bytes", "text", "cut short", "corrupt", "no width", "float32", "int32"],
    )
    def test_what_is_broken_is_named(self, tmp_path, content, message):
        (tmp_path / "x.png").write_bytes(content)
        for source, name in ((tmp_path / "x.png", None), (content, "x.png")):
            with pytest.raises(ValueError, match=r"x\.png: .*") as raised:
                open_image(source, name)
            assert message in str(raised.value)
            assert "\n" not in str(raised.value)

    def test_no_pixels(self):
        with pytest.raises(ValueError, match=r"image: it has no pixels \(0 x 5\)"):
            open_image(Image.new("L", (0, 5)))


class TestSources:
    def test_each_gives_the_same(self, tmp_path):
        picture = Image.fromarray(RAMP)
        picture.save(tmp_path / "x.png")
        with (tmp_path / "x.png").open("rb") as file:
            sources = [
                tmp_path / "x.png",
                str(tmp_path / "x.png"),
                file,
                encoded(picture),
                picture,
                RAMP,
                RAMP[..., None],
            ]
            sources += [RAMP.astype(np.uint16) * 257, RAMP / 255, (RAMP / 255).astype(np.float32)]
            for source in sources:
                np.testing.assert_array_equal(np.asarray(open_image(source)), RAMP)

    def test_colour_arrays(self):
        assert open_image(np.full((4, 6, 3), 7, np.uint8)).getpixel((5, 3)) == (7, 7, 7)
        assert open_image(np.zeros((4, 6, 4), np.uint8)).getpixel((5, 3)) == (255, 255, 255)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((3, 4, 6), np.uint8), r"crop: expected \(h, w\).* got \(3, 4, 6\)"),
            (np.zeros((4, 0), np.uint8), "crop: it has no pixels"),
            (np.full((4, 6), 255.0), "crop: floats must be from 0 to 1, got 255 to 255"),
            (np.full((4, 6), np.nan), "crop: floats must be from 0 to 1"),
            (np.zeros((4, 6), np.int64), "crop: expected uint8, uint16 or floats from 0 to 1, got int64"),
        ],
    )
    def test_other_arrays(self, array, message):
        with pytest.raises(ValueError, match=message):
            open_image(array, "crop")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.png"):
            open_image(tmp_path / "none.png")

    def test_a_given_picture_stays_as_it_is(self):
        picture = Image.new("RGBA", (4, 4))
        open_image(picture)
        assert picture.mode == "RGBA"


@pytest.fixture
def crops(tmp_path):
    """Six empty files with the suffixes of images in a folder and one below it, two of them of one name, and a text."""
    (tmp_path / "below").mkdir()
    for name in ["a.png", "b.jpg", "c.PNG", "d.webp", "below/a.png", "below/e.bmp", "notes.txt"]:
        (tmp_path / name).touch()
    return tmp_path


class TestFindImages:
    def test_folders_patterns_and_files(self, crops):
        names = ["a.png", "b.jpg", "below/a.png", "below/e.bmp", "c.PNG", "d.webp"]
        assert find_images([str(crops)]) == [crops / name for name in names]
        assert find_images([f"{crops}/**/?.png"]) == [crops / "a.png", crops / "below" / "a.png"]
        assert find_images([str(crops / "notes.txt")]) == [crops / "notes.txt"]  # a file is taken at its word
        assert find_images([str(crops / "d.webp"), f"{crops}/*.webp"]) == [crops / "d.webp"]

    def test_nothing_there(self, crops):
        (crops / "empty").mkdir()
        for name in (crops / "z.png", f"{crops}/*.gif", crops / "empty"):
            with pytest.raises(FileNotFoundError, match=f"{re.escape(str(name))}: no image there"):
                find_images([str(name)])
