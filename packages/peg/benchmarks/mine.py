"""Time and memory of the search in mining: ours, faiss.IndexFlatIP, and torch.topk of the whole score matrix.

All in one process, in turn, round after round, so that a machine whose speed drifts treats them alike: quote the ratios. Memory
is the growth of the process above the embeddings (psutil), results included, in a process of its own for each.

    uv run --group peers python packages/peg/benchmarks/mine.py [--documents 15809] [--k 210] [--threads 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable

import faiss
import psutil
import torch
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from peg.search import top_k
from torch import Tensor


def embeddings(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.nn.functional.normalize(torch.randn(size, d, generator=generator), dim=1) for size in (n, m))


def contestants(queries: Tensor, documents: Tensor, k: int) -> dict[str, Callable[[], object]]:
    def them() -> object:
        index = faiss.IndexFlatIP(documents.shape[1])
        index.add(documents.numpy())
        return index.search(queries.numpy(), k)

    return {
        "ours": lambda: top_k(queries, documents, k),
        "faiss.IndexFlatIP": them,
        "torch.topk": lambda: (queries @ documents.T).topk(k),
    }


def growth(name: str, sizes: tuple[int, int, int, int], answer: multiprocessing.Queue) -> None:
    """Bytes at the worst moment, sampled every millisecond, above those before."""
    *shape, k = sizes
    queries, documents = embeddings(*shape)
    for run in contestants(queries[:300], documents[:1000], k).values():
        run()  # what libraries allocate once
    process, done, worst = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal worst
        while not done.wait(0.001):
            worst = max(worst, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    contestants(queries, documents, k)[name]()
    done.set()
    watcher.join()
    answer.put(worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"queries": 12_600, "documents": 15_809, "width": 384, "k": 210, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = options.queries, options.documents, options.width, options.k
    faiss.omp_set_num_threads(torch.get_num_threads())
    memory = {}
    context = multiprocessing.get_context("spawn")
    runs = contestants(*embeddings(*sizes[:3]), options.k)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    for name in runs:
        answer = context.Queue()
        child = context.Process(target=growth, args=(name, sizes, answer))
        child.start()
        memory[name] = answer.get()
        child.join()
    # Of each round the ratio, then the median: a drift between rounds cancels.
    ratios = {name: statistics.median(t / o for t, o in zip(times[name], times["ours"], strict=True)) for name in runs}
    rows = [
        [name, f"{statistics.median(times[name]):.2f}", f"{ratios[name]:.2f}", f"{memory[name] / 2**20:.0f}"]
        for name in runs
    ]
    print(
        f"{options.queries} x {options.documents} x {options.width}, top {options.k}, {torch.get_num_threads()} threads"
    )
    print(markdown_table(["search", "seconds", "time / ours", "MiB above the embeddings"], rows))
    print(f"{machine()}; {versions('peg')}")


if __name__ == "__main__":
    main()
