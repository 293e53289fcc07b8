import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmict.features import encode
from mmict.samples import Samples
from mmict.vision import VisionEncoder
from PIL import Image
from torch import nn


class Counting(nn.Conv2d):
    """Patches of 8 pixels, which counts the pictures it sees."""

    seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        return super().forward(pixels)


@pytest.fixture
def vision():
    torch.manual_seed(0)
    encoder = VisionEncoder(Counting(3, 6, 8, 8), source="patches", image_size=16)
    encoder.network.seen = 0
    return encoder


def samples_of(images, frames=((0,),)):
    names = [str(i) for i in range(len(frames))]
    return Samples(list(images), list(frames), names, [""] * len(names), names, names, [[name] for name in names])


@pytest.fixture
def images():
    return list(np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8))


def test_are_those_of_the_live_encoder_each_image_once(vision, images):
    found = encode(vision, samples_of(images, [(0,), (0, 1, 2), (1,), (4, 3)]), batch_size=2, progress=False)
    assert vision.network.seen == len(found) == 5
    rows = torch.tensor([3, 0, 3])
    live = vision(vision.pixels([images[row] for row in rows]))
    assert found[rows].dtype == torch.float32
    torch.testing.assert_close(found[rows], live, rtol=0, atol=2e-3)
    exact = encode(vision, samples_of(images), dtype=torch.float32, progress=False)
    torch.testing.assert_close(exact[rows], live)


def test_pooled_are_means_of_length_one(vision, images, monkeypatch):
    monkeypatch.setattr("mmict.features.BLOCK", 2)
    found = encode(vision, samples_of(images), dtype=torch.float32, progress=False)
    torch.testing.assert_close(found.pooled(), F.normalize(found[torch.arange(5)].mean(1), dim=1))


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "run" / "features.npy"

    def test_is_mapped_and_used_again(self, vision, images, path):
        first = encode(vision, samples_of(images), path, progress=False)
        again = encode(vision, samples_of(images), path, progress=False)
        assert vision.network.seen == 5
        assert isinstance(again.array, np.memmap)
        rows = torch.arange(5)
        assert torch.equal(again[rows], first[rows])
        assert torch.equal(again[rows], encode(vision, samples_of(images), progress=False)[rows])
        assert sorted(file.name for file in path.parent.iterdir()) == ["features.json", "features.npy"]

    def test_of_other_images_encoder_size_or_precision_is_made_anew(self, vision, images, path):
        encode(vision, samples_of(images), path, progress=False)
        with torch.no_grad():
            vision.network.weight.mul_(1.1)
        found = encode(vision, samples_of(images), path, progress=False)
        torch.testing.assert_close(found[torch.tensor([1])], vision(vision.pixels(images[1:2])), rtol=0, atol=2e-3)
        images[2] = images[2].copy()
        images[2][0, 0, 0] ^= 1
        encode(vision, samples_of(images), path, progress=False)
        vision.mean = (0.5, 0.5, 0.5)
        encode(vision, samples_of(images), path, progress=False)
        encode(vision, samples_of(images), path, dtype=torch.float32, progress=False)
        assert vision.network.seen == 5 + 1 + 4 * 5
        assert json.loads(path.with_suffix(".json").read_text())["dtype"] == "float32"

    def test_of_pictures_on_disk_goes_by_name_size_and_time(self, vision, images, path, tmp_path):
        files = [str(tmp_path / f"{i}.bmp") for i in range(2)]
        for file, image in zip(files, images, strict=False):
            Image.fromarray(image).save(file)
        for _ in range(2):
            found = encode(vision, samples_of(files), path, progress=False)
        assert vision.network.seen == 2
        torch.testing.assert_close(found[torch.tensor([1])], vision(vision.pixels(images[1:2])), rtol=0, atol=2e-3)
        Image.fromarray(images[4]).save(files[1])  # as many bytes
        os.utime(files[1], ns=(1, 1))
        found = encode(vision, samples_of(files), path, progress=False)
        torch.testing.assert_close(found[torch.tensor([1])], vision(vision.pixels(images[4:])), rtol=0, atol=2e-3)

    def test_that_is_not_ours_is_left_alone(self, vision, images, path):
        path.parent.mkdir()
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"has no features\.json beside it, so it is not ours"):
            encode(vision, samples_of(images), path, progress=False)
        assert path.read_bytes() == b"mine"

    def test_an_interrupted_run_leaves_the_old_one(self, vision, images, path):
        encode(vision, samples_of(images), path, progress=False)
        broken = path.parent / "broken.png"
        broken.write_bytes(b"no")
        with pytest.raises(ValueError, match=r"broken\.png: not an image"):
            encode(vision, samples_of([*images, str(broken)]), path, batch_size=2, progress=False)
        assert sorted(file.name for file in path.parent.iterdir()) == ["broken.png", "features.json", "features.npy"]
        seen = vision.network.seen
        encode(vision, samples_of(images), path, progress=False)
        assert vision.network.seen == seen


def test_refuses_what_float16_cannot_hold(vision, images):
    with torch.no_grad():
        vision.network.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"features up to .* do not fit float16: keep them in float32"):
        encode(vision, samples_of(images), progress=False)


def test_refuses_other_precisions(vision, images):
    with pytest.raises(ValueError, match=r"float16 or float32, not torch\.bfloat16"):
        encode(vision, samples_of(images), dtype=torch.bfloat16, progress=False)
