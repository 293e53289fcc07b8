import io

import numpy as np
import pytest
import torch
from iqa_distill.scoring import score_images, score_tensor
from papercore.ops import peak_memory
from PIL import Image
from tiny_rkiqt import tiny_rkiqt

RANDOM = np.random.default_rng(0)
SIZES = [(40, 60), (33, 32), (80, 50), (64, 64), (48, 90)]
IMAGES = [
    np.repeat(np.repeat(RANDOM.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3), np.uint8), 4, 0), 4, 1)[:h, :w]
    for h, w in SIZES
]


@pytest.fixture(scope="module")
def model():
    return tiny_rkiqt()


def one_crop_at_a_time(model, image):
    """The slow version: every crop by itself, its mean, then the units of the scores."""
    with torch.no_grad():
        crops = model.preprocessing.crops_of(torch.from_numpy(model.preprocessing.resized(image)).permute(2, 0, 1))
        found = [model.predict(model.preprocessing.normalize(crop[None])).item() for crop in crops]
    return model.scale.mean + model.scale.std * np.mean(found)


class TestImages:
    def test_as_one_crop_at_a_time(self, model):
        scores = score_images(model, IMAGES)
        assert scores.dtype == np.float64
        assert scores == pytest.approx([one_crop_at_a_time(model, image) for image in IMAGES], abs=1e-3)
        assert np.ptp(scores) > 1

    @pytest.mark.parametrize("size", [1, 2, 7, 100])
    def test_neither_the_batch_size_nor_other_images_change_a_score(self, model, size):
        scores = score_images(model, IMAGES)
        assert score_images(model, IMAGES[::-1], max_crops_per_batch=size)[::-1] == pytest.approx(scores, abs=1e-5 * 20)
        assert score_images(model, IMAGES[2:3], max_crops_per_batch=size) == pytest.approx(scores[2:3], abs=1e-5 * 20)

    def test_batches_are_full_and_bounded(self, model, monkeypatch):
        seen, predict = [], model.predict
        monkeypatch.setattr(model, "predict", lambda crops: (seen.append(len(crops)), predict(crops))[1])
        score_images(model, IMAGES, max_crops_per_batch=4)
        assert seen == [4, 4, 4, 3]

    def test_every_kind_of_source(self, model, tmp_path):
        image = IMAGES[0]
        Image.fromarray(image).save(tmp_path / "a.png")
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "BMP")
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        sources = [
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            buffer.getvalue(),
            image,
            Image.fromarray(image),
            tensor,
            tensor / 255,
        ]
        expected = score_images(model, [image])[0]
        assert score_images(model, sources) == pytest.approx([expected] * 7, abs=1e-3)
        for single in (
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            tensor,
            tensor[None],
            tensor[None] / 255,
            iter([image]),
        ):
            assert score_images(model, single) == pytest.approx([expected], abs=1e-3)
        assert score_images(model, []).shape == (0,)

    def test_units(self, model):
        scores = score_images(model, IMAGES)
        assert score_images(model, IMAGES, normalize=True) == pytest.approx(scores / 100)

    def test_the_mode_stays(self, model):
        model.train()
        score_images(model, IMAGES[:1])
        assert model.training
        model.eval()

    def test_a_resizing_belongs_to_the_model(self):
        resizing = tiny_rkiqt(resize=(48, 64))
        expected = [one_crop_at_a_time(resizing, image) for image in IMAGES]
        assert score_images(resizing, IMAGES) == pytest.approx(expected, abs=1e-3)
        assert abs(score_images(tiny_rkiqt(), IMAGES) - expected).max() > 0.1
        floats = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in IMAGES]
        assert score_images(resizing, floats) == pytest.approx(expected, abs=0.5)  # Pillow rounds to whole levels

    def test_memory_does_not_grow_with_the_image(self, model):
        peaks = []
        for side in (64, 1024):
            image = np.zeros((side, side, 3), np.uint8)
            with peak_memory() as peak:
                score_images(model, [image] * 3, max_crops_per_batch=4)
            peaks.append(peak.bytes)
        assert peaks[1] <= 1.2 * peaks[0]

    def test_what_cannot_be_scored(self, model, tmp_path):
        (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
        with pytest.raises(ValueError, match=r"cut\.png"):
            score_images(model, [IMAGES[0], tmp_path / "cut.png"])
        with pytest.raises(ValueError, match="image 2: 60 x 20 pixels"):
            score_images(model, [IMAGES[0], IMAGES[0][:20]])
        with pytest.raises(ValueError, match="255"):
            score_images(model, torch.full((1, 3, 40, 40), 128.0))
        with pytest.raises(ValueError, match="max_crops_per_batch must be at least 1, got 0"):
            score_images(model, IMAGES, max_crops_per_batch=0)


class TestTensor:
    @pytest.mark.parametrize("resize", [None, (40, 36)])
    def test_the_gradient_is_that_of_the_score(self, resize):
        model = tiny_rkiqt(resize=resize)
        images = torch.rand(2, 3, 36, 45, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(score_tensor(model, images).sum(), images)
        step = 2e-3 * gradient / gradient.norm()
        with torch.no_grad():
            rise = (score_tensor(model, images + step) - score_tensor(model, images - step)).sum()
        assert rise.item() == pytest.approx(4e-3 * gradient.norm().item(), rel=0.02)
        assert gradient.norm() > 1

    def test_the_same_scores(self, model):
        images = torch.from_numpy(np.stack([IMAGES[0], IMAGES[0][::-1]])).permute(0, 3, 1, 2) / 255
        assert score_tensor(model, images).detach().numpy() == pytest.approx(score_images(model, images), abs=1e-3)
        assert score_tensor(model, images, normalize=True).detach().numpy() == pytest.approx(
            score_images(model, images, normalize=True), abs=1e-5
        )


def test_grey_is_repeated(model):
    grey = IMAGES[1][..., 0]
    assert score_images(model, [grey]) == pytest.approx(score_images(model, [np.stack([grey] * 3, -1)]))
