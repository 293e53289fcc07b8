import argparse
import copy
import os
import re

import pytest
import torch
from disco import Encoder, load_teacher
from disco.checkpoints import describe, load_encoder, load_queue, weights_hash
from disco.model import DisCo
from safetensors.torch import save_file
from torch import nn
from torchvision import models

PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.fixture
def encoder():
    """A small one whose running statistics have moved off their start."""
    torch.manual_seed(0)
    encoder = Encoder("cnn:4-6", dim=5, hidden=8, image_size=16)
    encoder(torch.randn(8, 3, 16, 16))
    return encoder.eval()


def moco(encoder):
    """The names of MoCo for an encoder of ours, and its queue."""
    torch.manual_seed(1)
    names = {f"encoder_q.{_inner(name, 'fc')}": tensor for name, tensor in encoder.state_dict().items()}
    keys = {name.replace("encoder_q", "encoder_k"): torch.randn_like(tensor.float()) for name, tensor in names.items()}
    queue = nn.functional.normalize(torch.randn(5, 32), dim=0)
    return names | keys | {"queue": queue, "queue_ptr": torch.tensor([7])}


def swav(encoder):
    names = {_inner(name, "projection_head"): tensor for name, tensor in encoder.state_dict().items()}
    return names | {"prototypes.weight": torch.randn(9, 5)}


def _inner(name, head):
    return name.removeprefix("backbone.") if name.startswith("backbone.") else head + name.removeprefix("head")


def same(encoder, other):
    theirs = other.state_dict()
    return encoder.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in encoder.state_dict().items()
    )


# The published programs' own forms, by networks built as they build them


def test_moco_v2_with_resnet(tmp_path):
    torch.manual_seed(0)
    network = models.resnet18(num_classes=16)  # as in MoCo's program, where --mlp puts two layers before the last
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), network.fc)
    network(torch.randn(4, 3, 32, 32))
    state = {f"module.encoder_q.{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {f"module.encoder_k.{name}": torch.zeros(tensor.shape) for name, tensor in network.state_dict().items()}
    state |= {"module.queue": torch.randn(16, 64), "module.queue_ptr": torch.tensor([48])}
    path = tmp_path / "checkpoint_0199.pth.tar"
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9).state_dict()
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}, path)
    images = torch.randn(2, 3, 32, 32)
    for name in ("resnet18", "torchvision:resnet18"):
        teacher = load_teacher(path, name, image_size=32)
        assert not teacher.training
        assert (teacher.dim, teacher.width, teacher.image_size) == (16, 512, 32)
        torch.testing.assert_close(teacher(images), network.eval()(images))
        assert torch.equal(teacher.head[2].weight, network.fc[2].weight)
    keys, pointer = load_queue(path)
    assert torch.equal(keys, state["module.queue"].T)
    assert pointer == 48
    assert keys.is_contiguous()
    with pytest.raises(
        ValueError,
        match=r"does not fit the backbone timm:resnet34: 96 tensors are missing: backbone\.layer1\.2\.conv1.weight, ",
    ):
        load_teacher(path, "timm:resnet34", image_size=32)


class SwAVNetwork(nn.Module):
    """Trunk, projection and prototypes under the names that SwAV, DeepCluster-v2 and SeLa give them."""

    def __init__(self, prototypes):
        super().__init__()
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.conv1, self.bn1, self.pool, self.flat = trunk
        self.projection_head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 5))
        self.prototypes = prototypes

    def trunk(self):
        names = ("conv1", "bn1", "pool", "flat")
        return nn.Sequential()._modules and None or nn.Sequential(dict_of(self, names))

    def forward(self, images):
        return self.projection_head(self.flat(self.pool(self.bn1(self.conv1(images)))))


def dict_of(module, names):
    from collections import OrderedDict

    return OrderedDict((name, copy.deepcopy(getattr(module, name))) for name in names)
