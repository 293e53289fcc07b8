"""Small networks and images for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from disco.encoder import Encoder
from disco.model import DisCo
from disco.swav import DisCoSwAV
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """The arrays of a golden case; scalars as numbers."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) if arrays[key].shape else arrays[key].item() for key in arrays}


class LinearMap(nn.Module):
    """images -> images.reshape(batch, -1) @ weight: the network of the golden cases."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.dim = weight.shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


def encoder(widths: str = "4-8", seed: int = 0, dim: int = 8, hidden: int = 16, size: int = 8) -> Encoder:
    """A convolutional network of a few hundred weights."""
    torch.manual_seed(seed)
    return Encoder(f"cnn:{widths}", dim=dim, hidden=hidden, image_size=size, mean=(0.5,) * 3, std=(0.25,) * 3)


def views(count: int = 6, size: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of images."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, 3, size, size, generator=generator))


def golden_steps(case, world=1, rank=0):
    """The trajectory's steps on one rank's part of each batch; the training module afterwards."""
    disco = DisCo(
        LinearMap(case["w_student0"]), LinearMap(case["w_teacher"]), queue_size=case["K"], momentum=case["m"],
        distill_weight=16.0,
    )  # fmt: skip
    disco.key.weight.data.copy_(case["w_key0"])
    disco.queue.queue.keys.copy_(case["queue0"].T)
    disco.queue.queue.pointer.fill_(case["ptr0"].item())
    model = disco if world == 1 else nn.parallel.DistributedDataParallel(disco)
    optimizer = torch.optim.SGD(disco.student.parameters(), lr=case["lr"], momentum=0.9, weight_decay=1e-4)
    for view_q, view_k in zip(case["im_q"], case["im_k"], strict=True):
        optimizer.zero_grad()
        model(view_q.chunk(world)[rank], view_k.chunk(world)[rank]).loss.backward()
        optimizer.step()
    return disco


def run_rank(rank, world, port, folder):
    """One process of several."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    disco = golden_steps(golden("disco_traj"), world, rank)
    torch.save(disco.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def swav_steps(world=1, rank=0):
    """Three steps of DisCo on SwAV on one rank's part of each batch: prototypes move from the second, the last has the queue."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 48, 6, generator=generator)
    disco = DisCoSwAV(
        LinearMap(weights[0]), LinearMap(weights[1]), prototypes=5, queue_size=12, frozen_prototype_steps=1, generator=generator
    )  # fmt: skip
    model = disco if world == 1 else nn.parallel.DistributedDataParallel(disco, find_unused_parameters=True)
    optimizer = torch.optim.SGD(disco.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        crops = torch.randn(3, 8, 3, 4, 4, generator=generator)
        optimizer.zero_grad()
        model([crop.chunk(world)[rank] for crop in crops]).loss.backward()
        optimizer.step()
    return disco


def run_swav_rank(rank, world, port, folder):
    """One process of several."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(swav_steps(world, rank).state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
