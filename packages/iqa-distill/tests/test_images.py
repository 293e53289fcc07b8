import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iqa_distill.images import LEAST_SIDE, Preprocessing, ScoreScale, check_tensor, open_rgb, reflect_to
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)


class TestOpenRGB:
    """Trap 11: each is a documented conversion or an error that names the file."""

    def test_colours_stay(self, tmp_path):
        Image.fromarray(NOISE).save(tmp_path / "x.png")
        np.testing.assert_array_equal(open_rgb(tmp_path / "x.png"), NOISE)
        assert open_rgb(NOISE).flags.writeable

    @pytest.mark.parametrize(
        "picture", [Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)]
    )
    def test_grey_is_repeated_and_16_bits_are_scaled(self, picture):
        np.testing.assert_array_equal(open_rgb(picture), NOISE[..., :1].repeat(3, 2))

    def test_transparency_is_laid_on_white_with_a_notice(self, tmp_path):
        Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "x.webp", lossless=True, exact=True)
        with pytest.warns(UserWarning, match=r"transparent pixels of \.webp images are laid on white"):
            assert (open_rgb(tmp_path / "x.webp") == 255).all()

    def test_opaque_alpha_gives_no_notice(self, recwarn):
        assert (open_rgb(Image.new("RGBA", (40, 40), (9, 9, 9, 255))) == 9).all()
        assert not recwarn

    def test_exif_palette_cmyk(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        Image.fromarray(NOISE).save(file, "PNG", exif=exif)
        np.testing.assert_array_equal(open_rgb(file.getvalue()), np.rot90(NOISE, -1))
        palette = Image.fromarray(NOISE).quantize(256)
        np.testing.assert_array_equal(open_rgb(palette), np.asarray(palette.convert("RGB")))
        assert (open_rgb(Image.new("CMYK", (40, 40), (255, 0, 0, 0))) == [0, 255, 255]).all()

    def test_errors_name_the_file(self, tmp_path):
        Image.new("RGB", (31, 90)).save(tmp_path / "small.png")
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match=r"small\.png: 31 x 90 pixels; a side needs at least 32"):
            open_rgb(tmp_path / "small.png")
        with pytest.raises(ValueError, match=r"text\.png: not an image"):
            open_rgb(tmp_path / "text.png")
        with pytest.raises(ValueError, match=r"^mine: not an image"):
            open_rgb(b"no image", "mine")


class TestCheckTensor:
    def test_uint8_is_scaled(self):
        images = torch.from_numpy(NOISE).movedim(2, 0)
        torch.testing.assert_close(check_tensor(images), images[None] / 255)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_floats_and_grey(self, dtype):
        grey = torch.rand(2, 1, 32, 33).to(dtype)
        found = check_tensor(grey)
        assert (found.shape, found.dtype) == ((2, 3, 32, 33), torch.float32)
        torch.testing.assert_close(found[:, 2], grey[:, 0].float())

    def test_gradient(self):
        images = torch.rand(1, 3, 32, 32, requires_grad=True)
        check_tensor(images).sum().backward()
        assert (images.grad == 1).all()

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.full((3, 32, 32), 255.0), "got 255 to 255: divide them by 255"),
            (torch.full((3, 32, 32), 1.01), "got 1.01 to 1.01: clamp them"),
            (torch.full((3, 32, 32), -0.1), "floats must be from 0 to 1, got -0.1"),
            (torch.full((3, 32, 32), math.nan), "images hold NaN"),
            (torch.full((3, 32, 32), math.inf), "floats must be from 0 to 1"),
            (torch.zeros(3, 32, 32, dtype=torch.int64), "uint8, or floats from 0 to 1, got torch.int64"),
            (torch.zeros(1, 3, 31, 40), "images of 40 x 31 pixels; a side needs at least 32"),
            (torch.zeros(1, 40, 40, 3), r"must be \(batch, 3, height, width\).* got \(1, 40, 40, 3\)"),
            (torch.zeros(40, 40), "must be"),
        ],
    )
    def test_what_is_wrong_is_told(self, images, message):
        with pytest.raises(ValueError, match=message):
            check_tensor(images)


class TestReflectTo:
    @settings(max_examples=30, deadline=None)
    @given(h=st.integers(1, 9), w=st.integers(1, 9), height=st.integers(1, 30), width=st.integers(1, 30))
    @pytest.mark.filterwarnings("ignore:images smaller")
    def test_equals_numpy(self, h, w, height, width):
        image = np.random.default_rng(0).integers(0, 256, (3, h, w), np.uint8)
        down, across = max(height - h, 0), max(width - w, 0)
        margins = [(0, 0), (down // 2, down - down // 2), (across // 2, across - across // 2)]
        expected = np.pad(image, margins, "reflect")
        np.testing.assert_array_equal(reflect_to(torch.from_numpy(image), height, width).numpy(), expected)

    def test_warns_only_if_it_pads(self, recwarn):
        image = torch.zeros(3, 40, 50, dtype=torch.uint8)
        assert reflect_to(image, 40, 32) is image
        assert not recwarn
        with pytest.warns(UserWarning, match="smaller than the crop"):
            reflect_to(image, 41, 32)


class TestPreprocessing:
    how = Preprocessing(crop_size=32, crops=5, seed=3)

    def test_positions_are_within_and_depend_on_seed_and_size_alone(self):
        found = self.how.positions(100, 60)
        assert (found.shape, found.dtype) == ((5, 2), torch.int64)
        assert (found >= 0).all()
        assert (found <= torch.tensor([68, 28])).all()
        self.how.positions(7000, 50)
        torch.testing.assert_close(self.how.positions(100, 60), found)
        assert not torch.equal(dataclasses.replace(self.how, seed=4).positions(100, 60), found)

    def test_positions_stay_the_same_for_ever(self):
        assert Preprocessing(crop_size=224, crops=3).positions(384, 512).tolist() == [[57, 214], [42, 110], [56, 141]]

    def test_positions_reach_both_ends(self):
        found = Preprocessing(crop_size=32, crops=200).positions(34, 32)
        assert set(found[:, 0].tolist()) == {0, 1, 2}
        assert set(found[:, 1].tolist()) == {0}

    def test_crops_are_cut_there(self):
        image = torch.from_numpy(NOISE).movedim(2, 0)
        crops = self.how.crops_of(image)
        assert (crops.shape, crops.dtype) == ((5, 3, 32, 32), torch.uint8)
        for crop, (y, x) in zip(crops, self.how.positions(48, 40).tolist(), strict=True):
            assert torch.equal(crop, image[:, y : y + 32, x : x + 32])

    def test_small_images_are_padded_and_not_enlarged(self):
        image = torch.from_numpy(NOISE[:32, :33]).movedim(2, 0)
        with pytest.warns(UserWarning, match="padded by reflection"):
            crops = Preprocessing(crop_size=100, crops=2).crops_of(image)
        assert torch.equal(crops[0, :, 34:66, 33:66], image)
        with pytest.raises(ValueError, match="an image of 40 x 31 pixels"):
            self.how.crops_of(torch.zeros(3, 31, 40, dtype=torch.uint8))

    def test_resized_with_antialiasing(self):
        stripes = np.zeros((64, 128, 3), np.uint8)
        stripes[:, ::2] = 255
        found = Preprocessing(resize=(32, 40)).resized(stripes)
        assert found.shape == (32, 40, 3)
        assert np.ptp(found[:, 5:-5]) < 60  # without it: 255
        assert Preprocessing().resized(stripes) is stripes

    def test_normalize(self):
        pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        expected = (torch.tensor([0, 0.2, 1]) - torch.tensor(self.how.mean)) / torch.tensor(self.how.std)
        torch.testing.assert_close(self.how.normalize(pixels).flatten(), expected)
        torch.testing.assert_close(self.how.normalize(pixels.float()).flatten(), expected)

    def test_goes_through_json(self):
        how = Preprocessing(96, 4, (384, 512), 7)
        assert Preprocessing(**json.loads(json.dumps(dataclasses.asdict(how)))) == how

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"crop_size": LEAST_SIDE - 1}, "crop_size must be at least 32"),
            ({"crops": 0}, "crops at least 1"),
            ({"resize": (384,)}, r"resize is \(height, width\)"),
            ({"resize": (384, 5)}, "at least 32 pixels"),
            ({"std": (1, 1, 0)}, "std positive"),
        ],
    )
    def test_wrong_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Preprocessing(**fields)


class TestScoreScale:
    scale = ScoreScale.of([1.0, 2, 6], low=0, high=10)

    @pytest.mark.parametrize("kind", [float, np.float64, torch.tensor])
    def test_there_and_back(self, kind):
        score = kind(4.5)
        normalized = self.scale.normalize(score)
        assert float(normalized) == pytest.approx((4.5 - 3) / np.std([1, 2, 6]))
        assert float(self.scale.restore(normalized)) == pytest.approx(4.5)
        assert float(self.scale.unit(normalized)) == pytest.approx(0.45)

    def test_of(self):
        scores = np.array([3.0, 4, 8])
        scale = ScoreScale.of(scores)
        assert (scale.low, scale.high) == (3, 8)
        assert (scale.normalize(scores).mean(), scale.normalize(scores).std()) == pytest.approx((0, 1))

    def test_unit_is_not_clipped(self):
        assert self.scale.unit(self.scale.normalize(-5.0)) == pytest.approx(-0.5)

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([1, 2], "2 scored images are too few"),
            ([5, 5, 5, 5], r"all 4 scores are equal \(5\)"),
            ([1, math.nan, 3, math.inf], "finite numbers; see rows 1, 3"),
        ],
    )
    def test_scores_without_a_scale(self, scores, message):
        """Trap 18."""
        with pytest.raises(ValueError, match=message):
            ScoreScale.of(scores)

    def test_wrong_fields(self):
        for fields in ((0, 0, 0, 1), (0, 1, 1, 1), (0, math.nan, 0, 1)):
            with pytest.raises(ValueError, match="positive deviation"):
                ScoreScale(*fields)
