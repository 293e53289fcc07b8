"""Text attention: a mask over the feature map that amplifies where there is text (Gao et al., VCIP 2019).

The paper's abstract says what the module is for; its form here, a residual hourglass mask, is ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsan._widths import Columns, conv_bn_relu, keep, upsample

MODES, MAPS = ("residual", "gate"), ("spatial", "channel")


class TextAttention(nn.Module):
    r"""A mask A of the features F, from an hourglass of three scales, and the features it weighs.

    .. math:: F' = (1 + A) \odot F, \quad A = \sigma(w^\top u_0(F) + b) \in (0, 1)

    A starts as 0.5 everywhere. It has no supervision of its own by default, no temperature and no stopped gradient.

    Args:
        channels: of the features. mask_channels: of the hourglass (ours: 32 for small networks, 64 for the base one).
        mode: "residual": (1 + A) F, which never erases a feature; "gate": A F.
        maps: "spatial": one map for all channels; "channel": one for each.

    Shape:
        features: (batch, channels, height, width). widths: (batch,), columns that are crop, or None for all. Returns the
        weighed features, and A: (batch, 1 or channels, height, width).

    Raises:
        ValueError: for an unknown mode or kind of maps.

    Example:
        >>> attention = TextAttention(8, mask_channels=4)
        >>> features = torch.randn(2, 8, 8, 25)
        >>> weighed, mask = attention(features)
        >>> bool((mask == 0.5).all()), torch.equal(weighed, 1.5 * features)
        (True, True)
    """

    def __init__(
        self, channels: int, mask_channels: int = 32, *, mode: str = "residual", maps: str = "spatial"
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if maps not in MAPS:
            raise ValueError(f"maps must be one of {', '.join(MAPS)}; got {maps!r}")
        super().__init__()
        self.mode = mode
        m = mask_channels
        self.enter = Columns(*conv_bn_relu(channels, m))
        self.down = nn.ModuleList(
            Columns(nn.MaxPool2d(2, ceil_mode=True), *conv_bn_relu(m, m)) for _ in range(2)
        )  # to a half, to a quarter
        self.up = Columns(*conv_bn_relu(m, m))
        self.mask = nn.Conv2d(m, 1 if maps == "spatial" else channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A of 0.5: a neutral start, where the usual initialisation would saturate it."""
        nn.init.zeros_(self.mask.weight)
        assert self.mask.bias is not None
        nn.init.zeros_(self.mask.bias)

    def forward(
        self, features: Float[Tensor, "batch channels height width"], widths: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch maps height width"]]:
        whole, widths = self.enter(features, widths)
        half, half_widths = self.down[0](whole, widths)
        quarter, quarter_widths = self.down[1](half, half_widths)
        back = half + upsample(quarter, half.shape[2:], quarter_widths, half_widths)
        back, _ = self.up(back, half_widths)
        mask = torch.sigmoid(self.mask(whole + upsample(back, whole.shape[2:], half_widths, widths)))
        mask = keep(mask, widths)
        return features * (mask if self.mode == "gate" else 1 + mask), mask
