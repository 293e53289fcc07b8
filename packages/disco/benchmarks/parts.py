"""The contrast with the queue, the key encoder's average and the views, each against what people use today.

All contestants of a table take turns in one process, round after round: quote the ratios. Memory is measured in runs of its own.

    uv run --group peers python packages/disco/benchmarks/parts.py [--threads 1] [--rounds 9] [--queue 65536]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from disco import ContrastiveHead
from disco.augment import Augmentation
from disco.loss import unit
from lightly.loss import NTXentLoss
from lightly.models.utils import update_momentum
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as V

Contestants = dict[str, Callable[[], object]]


def medians(contestants: Contestants, rounds: int) -> dict[str, float]:
    """Seconds, each contestant once in every round."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first warms up
                samples[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 2] for name, values in samples.items()}


def table(title: str, contestants: Contestants, rounds: int, memory: bool = False) -> None:
    """Ours is the first; "ours / it" below 1 is in its favour."""
    seconds = medians(contestants, rounds)
    ours = next(iter(seconds.values()))
    rows = [[name, f"{1000 * value:.1f}", f"{ours / value:.2f}"] for name, value in seconds.items()]
    columns = ["", "ms", "ours / it"]
    if memory:
        peaks = []
        for run in contestants.values():
            with peak_memory(pick_device()) as peak:
                run()
            peaks.append(peak.bytes / 2**20)
        columns += ["MiB", "ours / it, memory"]
        rows = [[*row, f"{peak:.1f}", f"{peaks[0] / peak:.2f}"] for row, peak in zip(rows, peaks, strict=True)]
    print(f"\n### {title}\n\n{markdown_table(columns, rows)}", flush=True)


def head(batch: int, queue: int, rounds: int) -> None:
    """Forward, backward to the queries, and the enqueue."""
    device, generator = pick_device(), torch.Generator().manual_seed(0)
    queries, keys = (unit(torch.randn(batch, 128, generator=generator)).to(device) for _ in range(2))
    queries.requires_grad_()
    ours = ContrastiveHead(128, queue, 0.2, generator).to(device)
    bank = ours.queue.keys.T.clone()
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(queue, 128)).to(device)

    def stream() -> Tensor:
        queries.grad = None
        loss = ours(queries, keys)
        loss.backward()
        ours.enqueue(keys)
        return loss

    def eager() -> Tensor:
        queries.grad = None
        positives = torch.einsum("nc,nc->n", queries, keys).unsqueeze(1)
        negatives = torch.einsum("nc,ck->nk", queries, bank.clone())
        logits = torch.cat([positives, negatives], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long, device=device))
        loss.backward()
        bank[:, :batch] = keys.T
        return loss

    def peer() -> Tensor:
        queries.grad = None
        loss = theirs(queries, keys)
        loss.backward()
        return loss

    losses, gradients = [], []
    for run in (stream, eager):
        losses.append(run().item())
        gradients.append(queries.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    contestants: Contestants = {"ours": stream, "cat and cross_entropy": eager, "lightly's NTXentLoss": peer}
    table(f"contrast of {batch} queries with a queue of {queue:,}, width 128", contestants, rounds, memory=True)


def average(rounds: int) -> None:
    """The key encoder of a ResNet-18."""
    student = timm.create_model("resnet18", num_classes=0).to(pick_device())
    keys = [copy.deepcopy(student).requires_grad_(False) for _ in range(3)]
    pairs = [list(key.parameters()) for key in keys]
    own = list(student.parameters())

    @torch.no_grad()
    def ours() -> None:
        torch._foreach_lerp_(pairs[0], own, 0.001)

    @torch.no_grad()
    def loop() -> None:
        for mine, theirs in zip(pairs[1], own, strict=True):
            mine.data = 0.999 * mine.data + 0.001 * theirs.data

    contestants: Contestants = {
        "ours (foreach)": ours, "a loop over parameters": loop,
        "lightly's update_momentum": lambda: update_momentum(student, keys[2], 0.999),
    }  # fmt: skip
    table("moving average of a ResNet-18", contestants, rounds)


def views(size: int, side: int, count: int, rounds: int) -> None:
    """One MoCo-v2 view of each image; PIL's from images that are decoded already."""
    device, generator = pick_device(), torch.Generator().manual_seed(0)
    noise = torch.randint(256, (count, 3, side // 8, side // 8), generator=generator, dtype=torch.uint8)
    images = V.resize(noise, [side, side], antialias=True)
    augmentation = Augmentation.moco(size)
    blur = [T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], 0.5)] if size >= 64 else []
    pipeline = T.Compose(
        [
            T.RandomResizedCrop(size, (0.2, 1.0)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            T.RandomGrayscale(0.2), *blur, T.RandomHorizontalFlip(), T.ToTensor(),
        ]
    )  # fmt: skip
    pictures = [V.to_pil_image(image) for image in images]
    on_device = images.to(device)
    contestants: Contestants = {
        "ours": lambda: augmentation(on_device, augmentation.draw(count)),
        "torchvision on PIL images": lambda: torch.stack([pipeline(picture) for picture in pictures]),
        "torchvision on tensors, one by one": lambda: torch.stack([pipeline_of_tensors(image) for image in images]),
    }
    pipeline_of_tensors = T.Compose([*pipeline.transforms[:-1], T.ConvertImageDtype(torch.float32)])
    table(f"views of {count} images, {side} to {size} pixels", contestants, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--queue", type=int, default=65536)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(), versions("disco"), f"{arguments.threads} thread(s)")
    head(256, arguments.queue, arguments.rounds)
    average(arguments.rounds)
    views(32, 32, 256, arguments.rounds)
    views(224, 256, 16, arguments.rounds)
