import pytest
import torch
from iqa_distill.rednet import RedNet


@pytest.mark.parametrize(("depth", "published"), [(26, 9.23), (38, 12.39), (50, 15.54), (101, 25.65), (152, 33.99)])
def test_parameters_as_published(depth, published):
    """In millions, with a classifier of 1000 kinds."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in RedNet(depth).parameters())
    assert (parameters + 2048 * 1000 + 1000) / 1e6 == pytest.approx(published, abs=0.01)


def test_names_as_published():
    with torch.device("meta"):
        names = set(RedNet(26).state_dict())
    assert names > {
        "stem.0.conv.weight", "stem.0.bn.running_mean", "stem.1.conv1.conv.weight", "stem.1.conv2.conv.bias", "stem.2.weight",
        "stem.4.conv.weight", "layer1.0.conv1.weight", "layer1.0.bn2.bias", "layer3.3.conv2.conv1.bn.weight",
        "layer4.0.conv2.conv2.conv.weight", "layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var",
    }  # fmt: skip
    assert "layer1.0.conv2.conv1.conv.bias" not in names


def test_stages_and_gradients():
    model = RedNet(26)
    stages = model(torch.randn(2, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in stages] == [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)]
    assert model.channels == [x.shape[1] for x in stages]
    stages[-1].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_unknown_depth():
    with pytest.raises(ValueError, match="depth must be one of 26, 38, 50, 101, 152; got 34"):
        RedNet(34)
