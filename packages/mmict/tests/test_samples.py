from dataclasses import replace

import numpy as np
import pytest
from mmict.samples import Samples
from PIL import Image


@pytest.fixture
def samples():
    """Two pictures and a video of both and a third."""
    return Samples(
        images=[np.full((4, 6, 3), shade, np.uint8) for shade in (10, 20, 30)],
        frames=[(0,), (2,), (2, 0, 1)],
        texts=["a", "b", "c"],
        questions=["", "", "what?"],
        groups=["x", "y", "x"],
        ids=["1", "2", "3"],
        references=[["a"], ["b"], ["c", "d"]],
    )


def shades(samples):
    return [[int(samples.open(row)[0, 0, 0]) for row in rows] for rows in samples.frames]


def test_select_keeps_only_images_that_are_used(samples):
    part = replace(samples, demos=[("2",), (), ("2",)], splits=["train", "test", "train"]).select([2, 1])
    assert shades(part) == [[30, 10, 20], [30]]
    assert len(samples.select([1]).images) == 1
    assert shades(samples.select(np.array([1]))) == [[30]]
    assert (part.ids, part.texts, part.questions, part.groups) == (["3", "2"], ["c", "b"], ["what?", ""], ["x", "y"])
    assert (part.references, part.demos, part.splits) == ([["c", "d"], ["b"]], [("2",), ()], ["train", "test"])


def test_kind(samples):
    assert samples.kind == "both"
    assert samples.select([0, 1]).kind == "captions"
    assert samples.select([2]).kind == "questions"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["x"]}, "groups must be as many as texts, 3; got 1"),
        ({"demos": [()]}, "demos must be as many as texts, 3; got 1"),
        ({"ids": ["1", "7", "7"]}, "'7' is there more than once"),
        ({"frames": [(0,), (), (1,)]}, "sample '2' has no frames"),
        ({"frames": [(0,), (3,), (1,)]}, "sample '2': frames are rows of the 3 images, got .3,."),
    ],
)
def test_refuses(samples, change, message):
    with pytest.raises(ValueError, match=message):
        replace(samples, **change)


def test_fixed_demonstrations(samples):
    replace(samples, demos=[("2",), ("1", "3"), ()]).check_demos(samples)
    with pytest.raises(ValueError, match="sample '1': its demonstration '9' is not among the training samples"):
        replace(samples, demos=[("9",), (), ()]).check_demos(samples)
    for leak in ("1", "3"):  # itself, and one of its group
        with pytest.raises(ValueError, match=f"sample '1': its demonstration '{leak}' is of the same group 'x'"):
            replace(samples, demos=[(leak,), (), ()]).check_demos(samples)


class TestOpen:
    def opened(self, samples, tmp_path, picture, name="a.png", **save):
        picture.save(tmp_path / name, **save)
        return replace(samples, images=[str(tmp_path / name)] * 3).open(0)

    def test_grey_and_transparent_pictures_become_rgb(self, samples, tmp_path):
        grey = self.opened(samples, tmp_path, Image.new("L", (6, 4), 77))
        assert grey.shape == (4, 6, 3)
        assert (grey == 77).all()
        assert (self.opened(samples, tmp_path, Image.new("RGBA", (6, 4), (9, 9, 9, 0))) == 255).all()

    def test_upright_by_exif(self, samples, tmp_path):
        exif = Image.Exif()
        exif[274] = 6  # turned by a quarter
        assert self.opened(samples, tmp_path, Image.new("RGB", (6, 4)), "a.jpg", exif=exif).shape == (6, 4, 3)

    def test_an_error_names_the_file(self, samples, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"broken\.png"):
            replace(samples, images=[str(tmp_path / "broken.png")] * 3).open(1)
        with pytest.raises(ValueError, match="image 1: expected uint8"):
            replace(samples, images=[np.zeros((4, 4, 3), np.int64)] * 3).open(1)
