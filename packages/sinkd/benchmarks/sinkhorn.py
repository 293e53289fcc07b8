"""Time and memory of the Sinkhorn term, forward and backward: ours, the eager loop, POT, geomloss.

All of them in one process, in turn, round after round, so that a machine whose speed drifts treats them alike: quote the ratios.
Each does 20 iterations at eps 0.1 between clouds of softmax outputs, L1 cost, and differentiates the transport cost (geomloss:
its own value) with respect to the student's outputs. geomloss chooses its own number of iterations; scaling=0.9 is near 20.

    uv run --group peers python packages/sinkd/benchmarks/sinkhorn.py [--threads 1] [--sizes 16x2 64x3] [--batched 1024x32]
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable

import geomloss
import ot
import torch
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device, sinkhorn, sinkhorn_cost
from sinkd import SinKDLoss
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

EPS, ITERATIONS = 0.1, 20


def eager(p: Tensor, q: Tensor) -> Tensor:
    """The authors' procedure written plainly: normalise rows, then columns; autograd through all of it."""
    cost = torch.cdist(p, q, 1)
    plan = torch.exp(-cost / EPS)
    for _ in range(ITERATIONS):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def ours(p: Tensor, q: Tensor) -> Tensor:
    return sinkhorn_cost(p, q, eps=EPS, n_iters=ITERATIONS, mass="count", cost_max=2.0, check=False).linear_cost


def pot(p: Tensor, q: Tensor) -> Tensor:
    cost, ones = torch.cdist(p, q, 1), p.new_ones(len(p))
    return (ot.sinkhorn(ones, ones, cost, EPS, numItermax=ITERATIONS, stopThr=0, warn=False) * cost).sum()


def _geomloss() -> Callable[[Tensor, Tensor], Tensor]:
    return geomloss.SamplesLoss(
        "sinkhorn",
        p=1,
        blur=EPS,
        scaling=0.9,
        debias=False,
        backend="tensorized",
        cost=lambda x, y: torch.cdist(x, y, 1),
    )


def median_times(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; each sample is long enough to be timed."""
    device = pick_device()
    repeats, samples = {}, {name: [] for name in contestants}
    for name, step in contestants.items():
        for _ in range(3):
            step()
        started = time.perf_counter()
        step()
        repeats[name] = max(1, int(0.01 / (time.perf_counter() - started)))
    for _ in range(rounds):
        for name, step in contestants.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - started) / repeats[name])
    return {name: sorted(values)[len(values) // 2] for name, values in samples.items()}


def compare(sizes: list[str], rounds: int) -> None:
    """One problem of b rows and C classes at a time."""
    device = pick_device()
    terms = {"ours": ours, "eager loop": eager, "POT": pot, "geomloss": _geomloss()}
    rows = []
    for size in sizes:
        b, classes = map(int, size.split("x"))
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(b, classes, generator=generator).mul(2).softmax(1).to(device) for _ in range(2))
        student.requires_grad_()

        def step(
            term: Callable[[Tensor, Tensor], Tensor], x: Tensor = student, y: Tensor = teacher
        ) -> Callable[[], None]:
            return lambda: torch.autograd.grad(term(x, y), x)[0].sum() and None

        contestants = {name: step(term) for name, term in terms.items()}
        times = median_times(contestants, rounds)
        memory = {}
        for name, run in contestants.items():
            with peak_memory(device) as peak:
                run()
            memory[name] = peak.bytes
        rows.append(
            [f"{b} x {classes}", f"{1e3 * times['ours']:.2f}"]
            + [f"{times[n] / times['ours']:.2f}" for n in list(terms)[1:]]
            + [f"{memory['ours'] / 2**20:.2f}"]
            + [f"{memory[n] / memory['ours']:.1f}" for n in list(terms)[1:]]
        )
        print(rows[-1], flush=True)
    peers = list(terms)[1:]
    columns = [
        "b x C",
        "ours, ms",
        *(f"{n} / ours" for n in peers),
        "ours, MiB",
        *(f"{n} / ours, memory" for n in peers),
    ]
    print(markdown_table(columns, rows))


def batched(size: str, rounds: int) -> None:
    """Many small problems at once, against POT's batched solver."""
    problems, b = map(int, size.split("x"))
    cost = (
        (torch.rand(problems, b, b, generator=torch.Generator().manual_seed(0)) * 2).to(pick_device()).requires_grad_()
    )

    def us() -> None:
        result = sinkhorn(cost, eps=EPS, n_iters=ITERATIONS, cost_max=2.0, check=False)
        torch.autograd.grad(result.linear_cost.sum(), cost)

    def them() -> None:
        result = ot.solve_batch(cost, reg=EPS, max_iter=ITERATIONS, tol=1e-30, grad="envelope")
        torch.autograd.grad(result.value.sum(), cost)

    times = median_times({"ours": us, "POT, batched": them}, rounds)
    ratio = times["POT, batched"] / times["ours"]
    print(
        f"{problems} problems of {b} x {b}: ours {1e3 * times['ours']:.1f} ms, POT solve_batch(envelope) / ours {ratio:.2f}"
    )


def overhead(batch: int, classes: int, length: int) -> None:
    """The Sinkhorn term's share of a training step of BERT-base: both timed on their own, since their difference is noise."""
    device = pick_device()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    tokens = torch.randint(1000, 30000, (batch, length), device=device)
    labels = torch.randint(classes, (batch,), device=device)
    logits, teacher = (torch.randn(batch, classes, device=device) for _ in range(2))
    logits.requires_grad_()
    without, full = SinKDLoss(beta=0.0), SinKDLoss()

    def step() -> None:
        without(model(tokens).logits, teacher, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss(criterion: SinKDLoss) -> Callable[[], None]:
        return lambda: torch.autograd.grad(criterion(logits, teacher, labels).loss, logits) and None

    times = median_times({"step": step, "without": loss(without), "full": loss(full)}, 5)
    extra = times["full"] - times["without"]
    print(
        f"BERT-base, batch {batch}, {length} tokens, {classes} classes: step {1e3 * times['step']:.0f} ms without Sinkhorn term, "
        f"which takes {1e3 * extra:.2f} ms: {100 * extra / times['step']:.2f} %"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--sizes", nargs="*", default=["16x2", "64x3", "256x3", "32x1000", "1024x8", "4096x2", "64x32000"]
    )
    parser.add_argument("--batched", nargs="*", default=["1024x32"])
    parser.add_argument("--steps", nargs="*", default=["32x3x128"], help="of BERT-base: batch x classes x tokens")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{datetime.date.today()}, {machine()}, {torch.get_num_threads()} threads; {versions('sinkd')}", flush=True)
    print(f"POT {ot.__version__}, geomloss {geomloss.__version__}", flush=True)
    if options.sizes:
        compare(options.sizes, options.rounds)
    for each in options.batched:
        batched(each, options.rounds)
    for each in options.steps:
        overhead(*map(int, each.split("x")))
