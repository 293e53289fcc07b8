import copy
import json

import numpy as np
import pytest
import torch
from disco import Encoder
from disco.encoder import IMAGENET_MEAN, IMAGENET_STD, projection_head
from torch import nn


def layers(head):
    return [type(layer).__name__ for layer in head], [
        layer.weight.shape for layer in head if isinstance(layer, nn.Linear)
    ]


def test_heads():
    assert layers(projection_head(6, 8, 4)) == (["Linear", "ReLU", "Linear"], [(8, 6), (4, 8)])
    assert layers(projection_head(6, -1, 4)) == (["Linear", "ReLU", "Linear"], [(6, 6), (4, 6)])
    assert layers(projection_head(6, 0, 4)) == (["Linear"], [(4, 6)])
    assert layers(projection_head(6, 8, 4, True)) == (["Linear", "BatchNorm1d", "ReLU", "Linear"], [(8, 6), (4, 8)])
    assert all(layer.bias is not None for layer in projection_head(6, 8, 4) if isinstance(layer, nn.Linear))
    for hidden, dim in ((-2, 4), (8, 0)):
        with pytest.raises(ValueError, match=rf"hidden >= -1 and dim >= 1, got {hidden} and {dim}"):
            projection_head(6, hidden, dim)


def test_head_of_the_papers_students_is_wide():
    encoder = Encoder("cnn:4-6")
    assert layers(encoder.head)[1] == [(2048, 6), (128, 2048)]


def test_forward_is_head_of_backbone_without_normalisation():
    encoder = Encoder("cnn:4-6", dim=5, hidden=8).eval()
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(encoder(images), encoder.head(encoder.backbone(images)))
    assert encoder.width == 6
    assert not torch.allclose(encoder(images).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("hidden", [-1, 0, 12])
def test_saved_and_loaded(tmp_path, hidden):
    options = {"dim": 5, "batch_norm": True, "image_size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    encoder = Encoder("cnn:4-6", hidden=hidden, **options)
    encoder(torch.randn(4, 3, 16, 16))
    encoder.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    for name, value in options.items():
        assert getattr(loaded, name, value) == value
    assert loaded.backbone_name == "cnn:4-6"
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), encoder.eval()(images))


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_statistics_of_any_kind_are_saved(tmp_path, kind):
    mean, std = np.array([0.5, 0.25, 0.125]), np.array([0.25, 0.5, 0.75])
    encoder = Encoder("cnn:4", dim=5, hidden=0, image_size=8, mean=kind(mean), std=kind(std))
    copy.deepcopy(encoder).save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    assert loaded.mean == encoder.mean == (0.5, 0.25, 0.125)
    assert loaded.std == encoder.std == (0.25, 0.5, 0.75)


@pytest.mark.parametrize("std", [(1.0, 1.0), (1.0, 1.0, 0.0)])
def test_statistics_must_be_three_and_positive(std):
    with pytest.raises(ValueError, match=r"three numbers each, std above 0; got .*, 1.0"):
        Encoder("cnn:4", dim=5, hidden=0, image_size=8, std=std)


def test_a_module_for_a_backbone_is_needed_again(tmp_path):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    encoder = Encoder(backbone, dim=5, hidden=8, image_size=4)
    encoder.save_pretrained(tmp_path)
    assert encoder.backbone_name is None
    assert "backbone" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(
        ValueError, match=r"config.json names no backbone.* give it, Encoder.from_pretrained\(folder, backbone=module\)"
    ):
        Encoder.from_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path, backbone=nn.Sequential(nn.Flatten(), nn.Linear(48, 6)))
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(again(images), encoder(images))


def test_loading_is_strict(tmp_path):
    Encoder("cnn:4-6", dim=5, hidden=8).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.6"):
        Encoder.from_pretrained(tmp_path, backbone="cnn:4-6-6")


def test_normalize():
    encoder = Encoder("cnn:4", dim=5, hidden=0, image_size=8)
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.float() / 255 - mean) / std
    torch.testing.assert_close(encoder.normalize(images), expected)
    torch.testing.assert_close(encoder.normalize(images.float() / 255), expected)


def test_backbones_must_pool():
    with pytest.raises(ValueError, match=r"2 images gave \(2, 4, 8, 8\)"):
        Encoder(nn.Conv2d(3, 4, 1), image_size=8)
