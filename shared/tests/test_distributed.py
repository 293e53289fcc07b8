"""Run as a script, this file is one of two processes: ``python test_distributed.py RANK FILE``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from papercore.ops import gather_features
from torch.testing import assert_close

ROWS, FEATURES, WORLD = 3, 4, 2


def batch():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, WORLD * ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x, y, torch.arange(WORLD * ROWS)


def model():
    return torch.linspace(-1, 1, FEATURES * FEATURES, dtype=torch.float64).view(FEATURES, FEATURES).requires_grad_()


def loss_of(x, y):
    """It does not fall apart into terms of single rows."""
    return (x @ y.T).logsumexp(1).square().sum()


def work(rank):
    x, y, labels = (t[rank * ROWS : (rank + 1) * ROWS] for t in batch())
    weight = model()
    features = x @ weight
    (all_x, all_y), offset = gather_features(features, y)
    assert offset == rank * ROWS
    assert_close(all_x, batch()[0] @ weight, rtol=1e-14, atol=1e-14)
    assert_close(all_y, batch()[1], rtol=0, atol=0)
    assert all_x.requires_grad
    assert not all_y.requires_grad

    loss_of(all_x, all_y).backward()
    dist.all_reduce(weight.grad)  # as data-parallel training averages
    whole = model()
    loss_of(batch()[0] @ whole, batch()[1]).backward()
    assert_close(weight.grad / WORLD, whole.grad, rtol=1e-12, atol=1e-12)

    (constant, all_labels), _ = gather_features(x @ weight, labels, with_grad=False)
    assert not constant.requires_grad
    assert_close(constant, batch()[0] @ weight.detach(), rtol=1e-14, atol=1e-14)
    assert all_labels.tolist() == list(range(WORLD * ROWS))
    (turned,), _ = gather_features(features.T)  # not contiguous, in memory
    assert_close(turned[rank * FEATURES : (rank + 1) * FEATURES], features.T)

    alone = dist.new_group([rank], use_local_synchronization=True)
    (own,), offset = gather_features(features, group=alone)
    assert own is features
    assert offset == 0
    (everyone,), offset = gather_features(features, group=dist.group.WORLD)
    assert_close(everyone, all_x)
    assert offset == rank * ROWS

    message = "ranks have different numbers of rows, [[3, 3], [3, 2]]: use dataloader_drop_last=True"
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_features(features, y[rank:])


def test_one_process_keeps_what_it_has():
    x, y, labels = batch()
    (same_x, same_y, same_labels), offset = gather_features(x.requires_grad_(), y, labels)
    assert same_x is x
    assert same_y is y
    assert same_labels is labels
    assert offset == 0


def test_two_processes(tmp_path):
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


if __name__ == "__main__":
    this_rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=Path(sys.argv[2]).as_uri(), rank=this_rank, world_size=WORLD)
    work(this_rank)
    dist.barrier()  # so that neither leaves while the other is talking
    dist.destroy_process_group()
