"""Time and memory of involution's sum: ours, one shifted column of the kernel at a time, and the published one.

The published layer unfolds k * k copies of the input. Both take turns in one process, round after round: quote the ratios. The
sizes are those of RedNet at 224 pixels: the stem, then the first blocks of its four stages.

    uv run python packages/iqa-distill/benchmarks/involution.py [--threads 1] [--batch 4] [--rounds 5]
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from iqa_distill.involution import _Aggregate
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from torch import Tensor

# channels, side, kernel, stride
SIZES = ((32, 112, 3, 1), (64, 56, 7, 1), (128, 56, 7, 2), (256, 28, 7, 2), (512, 14, 7, 2), (256, 14, 7, 1))


def unfolded(x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """As published."""
    b, g, places, h, w = kernels.shape
    size = round(places**0.5)
    patches = F.unfold(x, size, padding=size // 2, stride=stride).view(b, g, -1, places, h, w)
    return (kernels[:, :, None] * patches).sum(3).view(b, -1, h, w)


def row(size: tuple[int, int, int, int], batch: int, rounds: int, device: torch.device) -> list[str]:
    channels, side, kernel, stride = size
    x = torch.randn(batch, channels, side, side, device=device, requires_grad=True)
    out = side // stride
    kernels = torch.randn(batch, channels // 16, kernel**2, out, out, device=device, requires_grad=True)

    def forward(aggregate: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            aggregate(x, kernels, stride)

    def step(aggregate: Callable[..., Tensor]) -> None:
        torch.autograd.grad(aggregate(x, kernels, stride).sum(), (x, kernels))

    cells = [f"{channels} x {side}^2, {kernel} x {kernel}, stride {stride}"]
    for part in (forward, step):
        seconds: dict[Callable[..., Tensor], list[float]] = {_Aggregate.apply: [], unfolded: []}
        for _ in range(rounds + 1):
            for contestant, taken in seconds.items():
                started = time.perf_counter()
                part(contestant)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
        ours, theirs = (sorted(taken[1:])[rounds // 2] for taken in seconds.values())
        cells += [f"{1000 * ours:.1f}", f"{theirs / ours:.1f}"]
    memory = []
    for contestant in (_Aggregate.apply, unfolded):
        with peak_memory(device) as peak:
            step(contestant)
        memory.append(peak.bytes)
    return [*cells, f"{memory[0] / 2**20:.0f}", f"{memory[1] / memory[0]:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device()
    threads = torch.get_num_threads()
    print(
        f"{datetime.date.today()}, {machine()}, {threads} threads, {versions('iqa-distill')}, batch {arguments.batch}"
    )
    heads = ["size", "forward, ms", "unfolded / ours", "with gradient, ms", "unfolded / ours", "MiB", "unfolded / ours"]
    print(markdown_table(heads, [row(size, arguments.batch, arguments.rounds, device) for size in SIZES]))


if __name__ == "__main__":
    main()
