"""The attention-panel decoder: several learned queries, each a panel member who gives a score."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AttentionPanel(nn.Module):
    """Reads a score out of a ViT's tokens (DEIQT, Qin et al., AAAI 2023; the student's decoder in RKIQT).

    Each of the J panel members is a learned query, to which the class token is added. One pre-norm decoder layer lets them attend
    to each other and to the patch tokens. One linear map without bias gives each member's score; the result is their mean.

    Args:
        dim: D, width of the tokens. queries: J (DEIQT: 6). heads: of attention.

    Shape:
        cls: (batch, D). patches: (batch, N, D). Returns (batch,).

    Raises:
        ValueError: for fewer than one query, and heads that do not divide D.

    Example:
        >>> AttentionPanel(24, heads=6)(torch.zeros(3, 24), torch.zeros(3, 16, 24)).shape
        torch.Size([3])
    """

    def __init__(self, dim: int, queries: int = 6, heads: int = 6) -> None:
        super().__init__()
        if queries < 1:
            raise ValueError(f"an attention panel needs at least 1 query, got {queries}")
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.queries = nn.Parameter(torch.empty(1, queries, dim))
        self.layer = nn.TransformerDecoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(dim, 1, bias=False)
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.apply(init_linear)

    def forward(
        self, cls: Float[Tensor, "batch dim"], patches: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, " batch"]:
        members = self.layer(self.queries + cls.unsqueeze(1), patches)
        return self.head(members).squeeze(2).mean(1)


def init_linear(module: nn.Module) -> None:
    """Weights of a Linear from a truncated normal of deviation 0.02, biases 0, as in DEIQT's program."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
