"""Time and memory of the loss, forward and backward, on given embeddings: ours against sentence-transformers' losses.

All of them in one process, in turn, round after round, so that a machine whose speed drifts treats them alike: quote the ratios.
The same float32 inputs, temperature 0.02, cosine, gradients of all embeddings. MNRL is MultipleNegativesRankingLoss, its cached
form is timed on embeddings alone (calculate_loss with its backward), in chunks of 32 rows, its default, and 256.

    uv run python packages/peg/benchmarks/loss.py [--threads 1] [--sizes 2048x5x128 1024x77x64] [--rounds 7]
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable

import torch
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from peg import progressive_info_nce
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

TEMPERATURE, HARDNESS = 0.02, 5.0
PRODUCTS = "the matrix products alone"


def contestants(queries: Tensor, positives: Tensor, negatives: Tensor) -> dict[str, Callable[[], float]]:
    """Each computes the loss and all gradients, and returns the loss."""
    leaves = [queries, positives, *negatives]

    def stepping(loss: Callable[[], Tensor]) -> Callable[[], float]:
        def step() -> float:
            for leaf in leaves:
                leaf.grad = None
            value = loss()
            if value.requires_grad:
                value.backward()
            return value.item()

        return step

    def ours(hardness: float) -> Callable[[], float]:
        return stepping(
            lambda: (
                progressive_info_nce(
                    queries, positives, list(negatives), temperature=TEMPERATURE, hardness=hardness
                ).loss
            )
        )

    def mnrl(**options: object) -> Callable[[], float]:
        loss = MultipleNegativesRankingLoss(nn.Identity(), scale=1 / TEMPERATURE, **options)
        return stepping(lambda: loss.compute_loss_from_embeddings(leaves, None))

    def cached(rows: int) -> Callable[[], float]:
        loss = CachedMultipleNegativesRankingLoss(
            SentenceTransformer(modules=[nn.Identity()]), scale=1 / TEMPERATURE, mini_batch_size=rows
        )
        return stepping(lambda: loss.calculate_loss([[leaf] for leaf in leaves], with_backward=True))

    def products() -> float:
        """What every exact implementation must multiply: the logits, and both gradients."""
        with torch.no_grad():
            logits = queries @ candidates.T
            return float((logits @ candidates)[0, 0] + (logits.T @ queries)[0, 0])

    candidates = torch.cat(leaves[1:]).detach()
    return {
        "ours": ours(0.0),
        "ours, weighted": ours(HARDNESS),
        "MNRL": mnrl(),
        "MNRL, weighted": mnrl(hardness_mode="all_negatives", hardness_strength=HARDNESS),
        "cached MNRL 256": cached(256),
        "cached MNRL 32": cached(32),
        PRODUCTS: products,
    }


def compare(size: str, rounds: int) -> list[list[str]]:
    device = pick_device()
    b, k, width = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(b, width, generator=generator)
    positives = queries + torch.randn(b, width, generator=generator)
    negatives = 0.3 * queries + torch.randn(k, b, width, generator=generator)
    given = [tensor.to(device).requires_grad_() for tensor in (queries, positives, *negatives)]
    steps = contestants(given[0], given[1], given[2:])  # type: ignore[arg-type]
    losses = {name: step() for name, step in steps.items()}  # warms up, too
    losses.pop(PRODUCTS)
    for name, loss in losses.items():
        alike = losses["ours, weighted" if "weighted" in name else "ours"]
        assert abs(loss - alike) < 1e-4 * max(1.0, abs(alike)), (name, loss, alike)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - started)
    memory = {}
    for name, step in steps.items():
        for leaf in given:
            leaf.grad = None
        with peak_memory(device) as peak:
            step()
        memory[name] = peak.bytes / 2**20
    times = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
    rows = [
        [
            f"{b:,} x {b * (1 + k):,}, {width}", name, f"{times[name]:.3f}", f"{times['ours'] / times[name]:.2f}",
            f"{memory[name]:.0f}", f"{memory['ours'] / memory[name]:.2f}",
        ]
        for name in steps
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=["1024x5x128", "2048x5x128", "1024x77x64"], help="BxKxD")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for size in args.sizes for row in compare(size, args.rounds)]
    columns = ["queries x candidates, width", "", "seconds", "ours / it", "MiB", "ours / it, memory"]
    print(markdown_table(columns, rows))
    print(f"{datetime.date.today()}, {machine()}, {args.threads} threads, {versions('sentence-transformers')}")


if __name__ == "__main__":
    main()
