import pytest
import torch
from dsan.backbones import build_backbone


# Parameters as the specification counted them on independent code.
@pytest.mark.parametrize(
    ("name", "widths", "columns", "millions"),
    [("base", None, 26, 44.264), ("base", [256], 26, 11.072), ("vgg", None, 24, 5.550), ("tiny", None, 25, 0.273)],
)
def test_sizes(name, widths, columns, millions):
    with torch.device("meta"):
        backbone = build_backbone(name, 1, widths)
        middle, _ = backbone.stem(torch.zeros(2, 1, 32, 100))
        out, _ = backbone.rest(middle)
    assert middle.shape == (2, backbone.middle, 8, 25)
    assert out.shape == (2, backbone.dim, 1, columns)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)


def test_timm_keeps_columns_apart():
    backbone = build_backbone("timm/resnet10t", 3).eval()
    middle, _ = backbone.stem(torch.zeros(1, 3, 32, 128))
    out, _ = backbone.rest(middle)
    assert middle.shape[2:] == (8, 32)
    assert out.shape == (1, backbone.dim, 1, 32)


@pytest.mark.parametrize(
    ("name", "widths", "message"),
    [
        ("large", None, "backbone must be one of tiny, base, vgg or timm/NAME; got 'large'"),
        ("tiny", [8], r"takes 4 width\(s\), got 1"),
        ("base", [100], "divided by 16"),
        ("timm/no_such_net", None, "timm/no_such_net: no feature extractor"),
        ("timm/vit_tiny_patch16_224", None, "not a convolutional network|no feature extractor"),
        ("timm/resnet18", [8], "has its own widths"),
    ],
)
def test_what_cannot_be_had_is_said(name, widths, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, 1, widths)
