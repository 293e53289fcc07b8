"""Time and memory of the loss, forward and backward, on given features: ours against open_clip's ClipLoss and a naive version.

All of them in one process, in turn, round after round, so that a machine whose speed drifts treats them alike: quote the ratios.
float32, frozen guides as wide as the features, beta 0.3, lam 1, KL(target || prediction). "naive" is what one writes first: whole
matrices, F.kl_div, autograd; "eager" has whole matrices, too, in log space (this package with detach_targets=False).

    uv run python packages/softclip/benchmarks/loss.py [--threads 1] [--sizes 1024x512 4096x512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import info_nce, peak_memory, pick_device
from softclip import softclip_loss
from torch import Tensor

BETA, LAM, SCALE, TARGET_SCALE = 0.3, 1.0, 100.0, 10.0


def naive(image: Tensor, text: Tensor, scale: Tensor, roi: Tensor, tag: Tensor) -> Tensor:
    """The same loss as one writes it first."""
    n = len(image)
    eye = torch.eye(n, dtype=torch.bool, device=image.device)
    total = image.new_zeros(())
    logits = scale * image @ text.T
    for rows, guide in ((logits, roi), (logits.T, tag)):
        similarity = TARGET_SCALE * guide @ guide.T
        target = (1 - BETA) * eye.float() + BETA * similarity.softmax(1)
        total = total + F.kl_div(rows.log_softmax(1), target, reduction="batchmean")
        others = similarity[~eye].view(n, n - 1).softmax(1)
        total = total + LAM * F.kl_div(rows[~eye].view(n, n - 1).log_softmax(1), others, reduction="batchmean")
    return total / 2


def contestants(features: list[Tensor]) -> dict[str, Callable[[], float]]:
    """Each computes the loss and all gradients, and returns the loss."""
    image, text, roi, tag = features
    scale = torch.tensor(SCALE, device=image.device, requires_grad=True)
    clip = ClipLoss()
    soft = {"beta": BETA, "lam": LAM, "target_scale": TARGET_SCALE}

    def stepping(loss: Callable[[], Tensor]) -> Callable[[], float]:
        def step() -> float:
            for leaf in (image, text, scale):
                leaf.grad = None
            value = loss()
            value.backward()
            return value.item()

        return step

    def ours(**options: object) -> Callable[[], float]:
        return stepping(lambda: softclip_loss(image, text, scale, roi, tag, **soft, **options).loss)  # type: ignore[arg-type]

    return {
        "ours, kl": ours(divergence="kl"),
        "ours, symmetric_kl": ours(),
        "eager, kl": ours(divergence="kl", detach_targets=False),
        "naive, kl": stepping(lambda: naive(image, text, scale, roi, tag)),
        "open_clip ClipLoss": stepping(lambda: clip(image, text, scale)),
        "papercore info_nce": stepping(lambda: info_nce(image, text, scale, symmetric=True)),
    }


def compare(size: str, rounds: int, largest_whole: int) -> list[list[str]]:
    device = pick_device()
    n, width = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, width, generator=generator)
    given = [F.normalize(base + 2.0 * torch.randn(n, width, generator=generator), dim=1).to(device) for _ in range(4)]
    given = [given[0].requires_grad_(), given[1].requires_grad_(), *given[2:]]
    steps = contestants(given)
    if n > largest_whole:
        steps = {name: step for name, step in steps.items() if name not in ("eager, kl", "naive, kl")}
    losses = {name: step() for name, step in steps.items()}  # warms up, too
    for one, other in (
        ("ours, kl", "eager, kl"),
        ("ours, kl", "naive, kl"),
        ("open_clip ClipLoss", "papercore info_nce"),
    ):
        if other in losses:
            assert abs(losses[one] - losses[other]) <= 1e-5 * max(1.0, abs(losses[other])), losses
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
    mine = {name: "papercore info_nce" if "Clip" in name or "info" in name else "ours, kl" for name in steps}
    rows = [
        [
            f"{n:,} x {width}", name, f"{times[name]:.3f}", f"{times['ours, kl'] / times[name]:.2f}", f"{memory[name]:.0f}",
            f"{memory['ours, kl'] / memory[name]:.2f}", f"{times[mine[name]] / times[name]:.2f}",
        ]
        for name in steps
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=["1024x512", "4096x512", "8192x512"], help="PAIRSxWIDTH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--largest_whole", type=int, default=8192, help="most pairs for the versions with many matrices"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for size in args.sizes for row in compare(size, args.rounds, args.largest_whole)]
    columns = ["pairs x width", "", "seconds", "ours, kl / it", "MiB", "ours, kl / it, memory", "of its kind / it"]
    print(markdown_table(columns, rows))
    print(f"{datetime.date.today()}, {machine()}, {args.threads} threads, {versions('softclip')}")


if __name__ == "__main__":
    main()
