import copy

import pytest
import timm
import torch
from disco.backbones import build_backbone, feature_width, small_cnn
from torch import nn
from torchvision import models

WIDTHS = {
    "resnet18": 512,
    "timm:resnet34": 512,
    "timm:resnet50": 2048,
    "efficientnet_b0": 1280,
    "timm:efficientnet_b1": 1280,
    "timm:mobilenetv3_large_100": 1280,
    "timm:mobilenetv3_small_100": 1024,
    "timm:vit_tiny_patch16_224": 192,
    "timm:vit_small_patch16_224": 384,
    "timm:xcit_tiny_12_p16_224": 192,
    "timm:swin_tiny_patch4_window7_224": 768,
    "timm:convnext_tiny": 768,
    "timm:vgg11": 4096,
    "timm:densenet121": 1024,
    "torchvision:resnet18": 512,
    "torchvision:mobilenet_v2": 1280,
    "torchvision:mobilenet_v3_large": 1280,
    "torchvision:mobilenet_v3_small": 1024,
    "torchvision:efficientnet_b0": 1280,
    "torchvision:vit_b_16": 768,
    "torchvision:convnext_tiny": 768,
    "torchvision:swin_t": 768,
    "torchvision:densenet121": 1024,
    "torchvision:vgg11": 4096,
    "torchvision:alexnet": 4096,
    "torchvision:maxvit_t": 512,
    "torchvision:mnasnet0_5": 1280,
    "torchvision:shufflenet_v2_x0_5": 1024,
    "torchvision:wide_resnet50_2": 2048,
    "torchvision:googlenet": 1024,
    "torchvision:inception_v3": 2048,
}
PARAMETERS = {  # millions, without the classifier
    "efficientnet_b0": 4.01,
    "efficientnet_b1": 6.51,
    "mobilenetv3_large_100": 4.20,
    "resnet18": 11.18,
    "resnet34": 21.28,
    "resnet50": 23.51,
    "resnet101": 42.50,
}


@pytest.mark.parametrize("name", WIDTHS)
def test_widths(name):
    with torch.device("meta"):
        assert feature_width(build_backbone(name, 224), 224) == WIDTHS[name]


def test_regnet_of_torchvision():
    assert feature_width(build_backbone("torchvision:regnet_y_400mf", 32), 32) == 440


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in build_backbone(name).parameters())
    assert f"{number / 1e6:.2f}" == f"{PARAMETERS[name]:.2f}"


def test_mobilenet_keeps_the_convolution_of_its_head():
    backbone = build_backbone("timm:mobilenetv3_large_100", 32)
    assert backbone.num_features == 960
    assert feature_width(backbone, 32) == backbone.head_hidden_size == 1280


@pytest.mark.parametrize(
    "name",
    [
        "timm:vit_tiny_patch16_224",
        "timm:xcit_tiny_12_p16_224",
        "torchvision:vit_b_32",
        "torchvision:swin_t",
        "cnn:4-6x2",
        "resnet18",
        "torchvision:vgg11",
    ],
)
def test_other_image_sizes(name):
    with torch.device("meta"):
        backbone = build_backbone(name, 64)
        assert backbone(torch.zeros(3, 3, 64, 64)).shape == (3, feature_width(backbone, 64))


def test_names_of_timm_and_torchvision_are_theirs():
    with torch.device("meta"):
        for name in ("vit_tiny_patch16_224", "mobilenetv3_small_100"):
            assert (
                build_backbone(name).state_dict().keys() == timm.create_model(name, num_classes=0).state_dict().keys()
            )
        ours, theirs = build_backbone("torchvision:mobilenet_v3_small"), models.mobilenet_v3_small()
        assert set(theirs.state_dict()) - set(ours.state_dict()) == {"classifier.3.weight", "classifier.3.bias"}


def test_features_of_torchvision_enter_its_classifier():
    torch.manual_seed(0)
    backbone = build_backbone("torchvision:resnet18").eval()
    whole = models.resnet18().eval()
    whole.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole.fc(backbone(images)), whole(images), rtol=0, atol=0)


def test_small_cnn():
    network = small_cnn([4, 6, 8], depth=2)
    assert [tuple(layer.weight.shape) for layer in network if isinstance(layer, nn.Conv2d)] == [
        (4, 3, 3, 3),
        (4, 4, 3, 3),
        (6, 4, 3, 3),
        (6, 6, 3, 3),
        (8, 6, 3, 3),
        (8, 8, 3, 3),
    ]
    assert network[:-2](torch.zeros(2, 3, 32, 32)).shape == (2, 8, 8, 8)  # 32 -> 16, 16, 8
    assert build_backbone("cnn:4-6-8x2").state_dict().keys() == network.state_dict().keys()
    assert sum(p.numel() for p in build_backbone("cnn:48-48-96-192x2").parameters()) == 687_120
    assert sum(p.numel() for p in build_backbone("cnn:12-12-24-48").parameters()) == 14_772


class Odd(nn.Module):
    """Features as some other networks give them."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


def test_width_leaves_the_backbone_as_it_was():
    torch.manual_seed(0)
    backbone = build_backbone("cnn:4-6")
    backbone(torch.randn(8, 3, 8, 8))
    backbone[1].eval()  # one frozen batch normalisation among those that train
    before, modes = copy.deepcopy(backbone.state_dict()), [module.training for module in backbone.modules()]
    feature_width(backbone, 8)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    with pytest.raises(ValueError, match="cannot take"):
        feature_width(nn.Sequential(backbone, nn.Linear(7, 7)), 8)
    assert [module.training for module in backbone.modules()] == modes


def test_width_of_half_precision_and_of_no_parameters():
    assert feature_width(build_backbone("cnn:4-6").to(torch.float64), 8) == 6
    assert feature_width(nn.Flatten(), 4) == 48


@pytest.mark.parametrize(
    ("answer", "shape"),
    [
        (lambda images: images, r"\(2, 3, 8, 8\)"),
        (lambda images: images.flatten(2), r"\(2, 3, 64\)"),
        (lambda images: images.sum((1, 2, 3)), r"\(2,\)"),
        (lambda images: images.flatten(1)[:1], r"\(1, 192\)"),
        (lambda images: {"features": images}, "dict"),
    ],
)
def test_features_must_be_batch_by_width(answer, shape):
    with pytest.raises(ValueError, match=rf"must map .* to \(batch, width\); 2 images gave {shape}"):
        feature_width(Odd(answer), 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "timm has no network 'resnet19'; did you mean '.*resnet.*'"),
        ("timm:mobilenetv3_large", "did you mean 'timm:mobilenetv3_large_100'"),
        ("mobilenet_v3_large", "did you mean 'torchvision:mobilenet_v3_large'"),
        ("torchvision:resnet_18", "torchvision has no network 'resnet_18'; did you mean 'torchvision:resnet18'"),
        ("torchvision:deeplabv3_resnet50", "torchvision has no network"),
        ("resnet18.a1_in1k", "did you mean 'resnet18'"),  # weights that would not be loaded
        ("timm:hf-hub:timm/resnet18", "timm has no network"),
        ("qqqqqqqqqqqqqq", "timm has no network 'qqqqqqqqqqqqqq'$"),
        ("", "timm has no network ''"),
        ("cnn:8-", "write widths and convolutions"),
        ("cnn:0-8", "write widths and convolutions"),
        ("cnn:8x0", "write widths and convolutions"),
        ("keras:resnet", "expected cnn:WIDTHS, timm:NAME"),
        ("torchvision:squeezenet1_0", "has no Linear"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name)


def test_image_sizes_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"'torchvision:vit_b_16' for images of 30 x 30: Input shape indivisible by patch"
    ):
        build_backbone("torchvision:vit_b_16", 30)
    with pytest.raises(ValueError, match=r"backbone cannot take images of 16 x 16"):
        feature_width(build_backbone("vit_tiny_patch16_224", 32), 16)
    with pytest.raises(ValueError, match="backbone cannot take images of -1 x -1"):
        feature_width(build_backbone("cnn:4"), -1)
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' for images of 0 x 0"):
        build_backbone("vit_tiny_patch16_224", 0)
