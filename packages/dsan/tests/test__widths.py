import pytest
import torch
import torch.nn.functional as F
from dsan._widths import Columns, Residual, after, conv_bn_relu, keep, upsample
from torch import nn

WIDTHS = torch.tensor([5, 12, 9])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_keep():
    features = torch.ones(2, 3, 4, 5)
    kept = keep(features, torch.tensor([2, 5]))
    assert kept.sum((1, 2, 3)).tolist() == [24, 60]
    assert not kept[0, :, :, 2:].any()
    assert keep(features, None) is features


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, (2, 3), stride=(1, 2), padding=(0, 1)),
        nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d((2, 1)), nn.MaxPool2d(2, (2, 1), (0, 1)),
    ],
)  # fmt: skip
def test_after_is_the_width_that_the_layer_gives(layer):
    for width in range(4, 20):
        out = layer(torch.randn(1, 1, 8, width))
        assert after(layer, torch.tensor([width])).tolist() == [out.shape[3]]


@pytest.mark.parametrize(
    "layers",
    [
        Columns(*conv_bn_relu(2, 4), nn.MaxPool2d(2, ceil_mode=True), *conv_bn_relu(4, 4)),
        Columns(Residual(2, 4), nn.MaxPool2d((2, 1)), Columns(Residual(4, 4))),
    ],
)
def test_a_crop_in_a_wider_batch_is_as_alone(layers):
    layers.eval()
    images = torch.randn(3, 2, 8, 12)
    out, widths = layers(images, WIDTHS)
    assert widths.tolist() == layers.after(WIDTHS).tolist()
    for image, width, features, wide in zip(images, WIDTHS, out, widths, strict=True):
        alone, none = layers(image[None, :, :, :width])
        assert none is None
        torch.testing.assert_close(features[None, :, :, :wide], alone)


def test_residual_adds_its_input():
    layer = Residual(4, 4).eval()
    nn.init.zeros_(layer.body[-1].weight)
    images = torch.randn(2, 4, 3, 5)
    assert torch.equal(layer(images)[0], F.relu(images))
    assert isinstance(Residual(2, 4).shortcut[0], nn.Conv2d)


def test_upsample_is_pytorchs_for_each_crop_alone():
    features, source, target = torch.randn(3, 2, 4, 6), (WIDTHS + 1) // 2, WIDTHS
    out = upsample(features, (8, 12), source, target)
    for crop, low, high, own in zip(out, source, target, features, strict=True):
        alone = F.interpolate(own[None, :, :, :low], (8, int(high)), mode="bilinear", align_corners=False)
        torch.testing.assert_close(crop[None, :, :, :high], alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(upsample(own[None, :, :, :low], (8, int(high)), None, None), alone)
