import pytest
import torch
from iqa_distill.bias import BiasTeacher
from iqa_distill.involution import Involution
from torch import nn


@pytest.mark.parametrize(
    ("kind", "backbone", "channels"),
    [
        ("conv", "tiny", [32, 64, 128]),
        ("inv", "tiny", [32, 64, 128]),
        ("inv", "rednet26", [512, 1024, 2048]),
        ("conv", "mobilenetv3_small_050", [16, 24, 288]),
    ],
)
def test_score_and_three_maps(kind, backbone, channels):
    teacher = BiasTeacher(kind, backbone)
    with torch.no_grad():
        score, maps = teacher(torch.randn(2, 3, 64, 64))
    assert score.shape == (2,)
    assert teacher.channels == channels == [x.shape[1] for x in maps]
    strides = [4, 8, 16] if backbone == "tiny" else [8, 16, 32]
    assert [x.shape[2:] for x in maps] == [(64 // stride, 64 // stride) for stride in strides]
    torch.testing.assert_close(score, teacher.head(maps[-1].mean((2, 3)))[:, 0])


def test_tiny_networks_have_one_bias_each():
    def overlapping(kind):
        convs = [m for m in BiasTeacher(kind).modules() if isinstance(m, nn.Conv2d)]
        return sum(m.kernel_size > m.stride for m in convs)

    assert overlapping("conv") == 4
    assert overlapping("inv") == 0
    assert sum(isinstance(m, Involution) for m in BiasTeacher("inv").modules()) == 4


@pytest.mark.parametrize("kind", ["conv", "inv"])
def test_tiny_networks_learn(kind):
    """Whether an image is smooth."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    images[::2] = torch.nn.functional.avg_pool2d(images[::2], 3, 1, 1) * 3
    labels = torch.tensor([1.0, -1.0]).repeat(16)
    teacher = BiasTeacher(kind)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for _ in range(12):
        loss = (teacher(images).score - labels).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_save_and_load(tmp_path):
    teacher, images = BiasTeacher("inv").eval(), torch.randn(2, 3, 32, 32)
    teacher.save_pretrained(tmp_path)
    loaded = BiasTeacher.from_pretrained(tmp_path).eval()
    assert loaded.kind == "inv"
    assert torch.equal(loaded(images).score, teacher(images).score)


@pytest.mark.parametrize(
    ("kind", "backbone", "unused"), [("inv", "rednet26", "head.fc.bias"), ("conv", "resnet10t", "fc.bias")]
)
def test_pretrained_trunk(kind, backbone, unused, tmp_path):
    source = BiasTeacher(kind, backbone).trunk
    weights = {f"backbone.{name}": value for name, value in getattr(source, "model", source).state_dict().items()}
    torch.save({"state_dict": {**weights, unused: torch.zeros(1000)}, "meta": {"epoch": 100}}, tmp_path / "weights.pth")
    teacher = BiasTeacher(kind, backbone)
    assert teacher.load_trunk(tmp_path / "weights.pth") == [unused]
    loaded = teacher.trunk.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "backbone", "message"),
    [
        ("vit", "tiny", "kind must be one of conv, inv"),
        ("conv", "rednet26", "needs the kind inv"),
        ("inv", "resnet18", "tiny, rednet26, rednet38"),
        ("conv", "resnet19", "resnet19: no network of timm's"),
    ],
)
def test_refuses(kind, backbone, message):
    with pytest.raises(ValueError, match=message):
        BiasTeacher(kind, backbone)
