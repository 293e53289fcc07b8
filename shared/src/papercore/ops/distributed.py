"""Features of all ranks, with the gradients of one process that holds the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_features(
    *tensors: Tensor, with_grad: bool = True, group: dist.ProcessGroup | None = None
) -> tuple[list[Tensor], int]:
    """Each tensor's rows of all ranks, one below the other, and where this rank's rows begin.

    The gradient that reaches a rank's rows is the sum over all ranks' losses. Where each rank computes the same loss of the whole
    batch, the average that data-parallel training takes is then the gradient of that loss; see ``sinkd`` for a use.

    Args:
        tensors: (rows, ...), the same number of rows on each rank. with_grad: False for targets and labels.

    Raises:
        ValueError: if ranks differ in the number of rows.

    Example:
        >>> (rows,), offset = gather_features(torch.ones(2, 3))  # one process: as they are
        >>> rows.shape, offset
        (torch.Size([2, 3]), 0)
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return list(tensors), 0
    from torch.distributed.nn.functional import all_gather  # not in every build of torch

    world, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = tensors[0].new_tensor([len(t) for t in tensors], dtype=torch.long)
    counts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(counts, rows, group)
    if any(not torch.equal(count, rows) for count in counts):
        sizes = [count.tolist() for count in counts]
        raise ValueError(f"ranks have different numbers of rows, {sizes}: use dataloader_drop_last=True")
    gathered = []
    for tensor in tensors:
        if with_grad and tensor.requires_grad:
            parts = list(all_gather(tensor.contiguous(), group))
        else:
            parts = [torch.empty_like(tensor) for _ in range(world)]
            dist.all_gather(parts, tensor.detach().contiguous(), group)
        gathered.append(torch.cat(parts))
    return gathered, rank * len(tensors[0])
