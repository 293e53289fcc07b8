"""A queue of the latest keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """The latest ``size`` keys, as negatives (MoCo's queue; He et al. 2020). Its state_dict has them and the place to write next.

    Args:
        size: keys kept, >= 1. dim: of each. generator: of the first ones, random unit vectors.

    Example:
        >>> bank = MemoryBank(3, 2)
        >>> bank.enqueue(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> bank.enqueue(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        >>> bank.keys
        tensor([[0., 2.],
                [0., 1.],
                [2., 0.]])
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a memory bank needs a size and a dim of at least 1, got {size} and {dim}")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "*n dim"]) -> None:
        """Write over the oldest keys, around the end if need be.

        Raises:
            ValueError: for more keys than the bank holds, or of another width.
        """
        size, dim = self.keys.shape
        if keys.dim() != 2 or keys.shape[1] != dim or len(keys) > size:
            raise ValueError(
                f"keys {tuple(keys.shape)} do not fit a memory bank of {size} x {dim}: at most so many at once"
            )
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % size  # no wait for the device
        self.keys[places] = keys.to(self.keys)
        self.pointer.copy_((self.pointer + len(keys)) % size)
