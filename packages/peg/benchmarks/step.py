"""Whole training steps: 80,000 candidates in bounded memory, and the same step as sentence-transformers' cached loss takes.

    uv run python packages/peg/benchmarks/step.py huge [--target_negatives 80000] [--encoder scratch:128x2] [--length 32]
    uv run python packages/peg/benchmarks/step.py peer [--queries 512] [--encoder scratch:128x2] [--rounds 3]

`huge` takes pieces of 20 words from the standard library's documentation, made distinct by a number, so that nothing is saved by
encoding equal texts once; it reports the peak resident memory of the process. `peer` takes the sample with five mined hard
negatives a query: PegTrainer and SentenceTransformerTrainer with CachedMultipleNegativesRankingLoss, the same rows, batch and
tokens in a micro-batch, in turn.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import resource
import tempfile
import time
from typing import Any

import datasets
import torch
from papercore.lab.study import machine, versions
from papercore.ops import seed_everything
from peg.data import training_rows
from peg.mine import mine_hard_negatives
from peg.models import new_model
from peg.sample import sample
from peg.trainer import PegConfig, PegTrainer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def encoder(name: str) -> SentenceTransformer:
    seed_everything(0)
    data = sample()["train"]
    model = new_model(name, [*data.queries.values(), *data.corpus.values()])
    return SentenceTransformer(name) if model is None else model


def config(folder: str, **options: Any) -> PegConfig:
    shared = {"save_strategy": "no", "max_steps": 1, "query_length": 32, "disable_tqdm": True, "warmup_steps": 0}
    return PegConfig(output_dir=folder, **{**shared, **options})


def huge(args: argparse.Namespace) -> None:
    words = " ".join(sample()["train"].corpus.values()).split()
    pieces = [" ".join(words[i : i + 20]) for i in range(0, len(words) - 20, 20)]
    texts = (f"{number} {piece}" for number, piece in enumerate(itertools.cycle(pieces)))
    queries = -(-args.target_negatives // 6)
    rows = datasets.Dataset.from_list(
        [{"query": next(texts), "pos": [next(texts)], "neg": [next(texts) for _ in range(5)]} for _ in range(queries)]
    )
    model = encoder(args.encoder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        options = config(
            folder, target_negatives=args.target_negatives, passage_length=args.length, micro_batch_tokens=args.tokens
        )
        clock = Clock()
        trainer = PegTrainer(model, options, rows, callbacks=[clock])
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{queries:,} queries, {6 * queries:,} candidates, {args.encoder}: one step in {seconds:.0f} s "
        f"({clock.seconds[0]:.0f} s without tokenising), peak resident memory {peak:.2f} GiB (before: {before:.2f})"
    )


def peer(args: argparse.Namespace) -> None:
    data = sample()["train"]
    mined = mine_hard_negatives(encoder(args.encoder), data, ranks=(1, 200), relative=None)
    rows = training_rows(data, mined)
    columns = rows.map(
        lambda row: (
            {"anchor": row["query"], "positive": row["pos"][0]}
            | {f"negative_{i}": n for i, n in enumerate(row["neg"], 1)}
        ),
        remove_columns=rows.column_names,
    )
    seconds: dict[str, list[float]] = {"ours": [], "sentence-transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, timed in seconds.items():
                clock = Clock()
                model = encoder(args.encoder)
                model.max_seq_length = args.length
                trainer: Any
                if name == "ours":
                    options = config(
                        folder, per_device_train_batch_size=args.queries, passage_length=args.length,
                        micro_batch_tokens=args.tokens, max_steps=4,
                    )  # fmt: skip
                    trainer = PegTrainer(model, options, rows, callbacks=[clock])
                else:
                    loss = CachedMultipleNegativesRankingLoss(model, 50.0, mini_batch_size=args.tokens // args.length)
                    arguments = SentenceTransformerTrainingArguments(
                        folder, per_device_train_batch_size=args.queries, max_steps=4, save_strategy="no",
                        disable_tqdm=True, report_to="none", use_cpu=not torch.cuda.is_available(),
                    )  # fmt: skip
                    trainer = SentenceTransformerTrainer(model, arguments, columns, loss=loss, callbacks=[clock])
                started = time.perf_counter()
                trainer.train()
                timed.append((time.perf_counter() - started) / 4)
    medians = {name: sorted(timed)[len(timed) // 2] for name, timed in seconds.items()}
    print(
        f"{args.queries} queries, {6 * args.queries} candidates of at most {args.length} tokens, {args.encoder}: "
        + ", ".join(f"{name} {value:.2f} s a step" for name, value in medians.items())
        + f"; ratio {medians['sentence-transformers'] / medians['ours']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["huge", "peer"])
    parser.add_argument("--encoder", default="scratch:128x2")
    parser.add_argument("--target_negatives", type=int, default=80_000)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--length", type=int, default=None, help="tokens of a passage; huge: 32, peer: 128")
    parser.add_argument("--tokens", type=int, default=16_384, help="in a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.length = args.length or {"huge": 32, "peer": 128}[args.what]
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    {"huge": huge, "peer": peer}[args.what](args)
    print(f"{datetime.date.today()}, {machine()}, {args.threads} threads, {versions('sentence-transformers')}")


if __name__ == "__main__":
    main()
