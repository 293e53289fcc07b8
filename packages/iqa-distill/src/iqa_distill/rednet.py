"""RedNet (Li et al., CVPR 2021): ResNet with 7 x 7 involution in place of 3 x 3 convolution."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from iqa_distill.involution import Involution, conv_norm

DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Bottleneck(nn.Module):
    """x + (1 x 1 convolution, 7 x 7 involution, 1 x 1 convolution), each with batch normalisation; the involution strides."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Involution(width, 7, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


class RedNet(nn.Module):
    """The trunk, without a classifier. Its modules have the published code's names.

    Args:
        depth: 26, 38, 50, 101 or 152.

    Attributes:
        channels: of the four stages' outputs.

    Shape:
        images: (batch, 3, height, width), normalised. Returns the outputs of the four stages, at strides 4, 8, 16 and 32.

    Raises:
        ValueError: for another depth.

    Example:
        >>> import torch
        >>> [tuple(stage.shape) for stage in RedNet(26)(torch.zeros(2, 3, 64, 64))]
        [(2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4), (2, 2048, 2, 2)]
    """

    def __init__(self, depth: int = 101) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}; got {depth}")
        super().__init__()
        self.stem = nn.Sequential(
            conv_norm(3, 32, 3, stride=2),
            Involution(32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            conv_norm(32, 64, 3),
        )  # fmt: skip
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = [256, 512, 1024, 2048]
        before = 64
        for stage, (blocks, out) in enumerate(zip(DEPTHS[depth], self.channels, strict=True), 1):
            first = Bottleneck(before, out // 4, stride=1 if stage == 1 else 2)
            rest = [Bottleneck(out, out // 4, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            before = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        x, stages = self.maxpool(self.stem(images)), []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            stages.append(x)
        return stages
