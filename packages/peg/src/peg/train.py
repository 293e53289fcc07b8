"""The verb ``train``: mine hard negatives, train, judge before and after, search."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from papercore.ops import pick_device, seed_everything
from sentence_transformers import SentenceTransformer
from torch import Tensor

from peg.data import RetrievalData, is_beir, load_rows, training_rows
from peg.encode import encode_texts
from peg.evaluate import evaluate, read_split
from peg.mine import mine_hard_negatives
from peg.models import load_model, new_model
from peg.plan import memory_plan
from peg.plots import plot_training
from peg.trainer import PegConfig, PegTrainer, use_prompts

SHOWN = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100")
# What models with random weights need, where the defaults stand: they rank at random, so that ranks say little at first.
FROM_SCRATCH: dict[str, Any] = {
    "learning_rate": 5e-3, "num_train_epochs": 10, "per_device_train_batch_size": 256, "temperature": 0.05,
    "mine_ranks": [1, 30], "mine_relative": None,
}  # fmt: skip


@dataclass
class TrainOptions:
    """On what, from what, judged on what."""

    data: str = flag(
        "sample; BEIR folder; JSONL file or folder of query, pos, neg; datasets folder; hub:NAME", "sample"
    )
    split: str = flag("of a BEIR folder, to train on", "train")
    model: str | None = flag(
        "folder or Hub name; static:WIDTH or scratch:WIDTHxLAYERS: a new one; none: static:256 on the sample", None
    )
    pooling: str | None = flag("cls, mean or last, for a plain transformers model; none: cls (authors)", None)
    test_data: str | None = flag("sample or BEIR folder to judge on; none: data, if it is one of these", None)
    test_split: str = flag("of that folder", "test")
    mine: bool = flag("mine hard negatives by the model, before it is trained, for data that have none", True)
    mine_ranks: list[int] = flag("ranks from which they are drawn, from and below (authors: not found)", [10, 210])
    mine_relative: float | None = flag("leave out what scores above this share of the best positive's cosine", 0.95)
    queries: list[str] = flag("example searches; three queries of the test data if none are given", [])
    dry_run: bool = flag("only say how much memory a step takes, and what for", False)


def train(options: TrainOptions, config: PegConfig) -> dict[str, dict[str, float]]:
    """The verb ``train``; returns the metrics before and after."""
    transformers.utils.logging.disable_progress_bar()  # of weights read and written: milliseconds
    datasets.disable_progress_bars()
    config, folder = _suited(options, config)
    seed_everything(config.seed)
    to_mine, rows, test = _read(options)
    model = _model(options, to_mine, rows).to(pick_device())
    use_prompts(model, config)
    if options.dry_run:
        plan = memory_plan(model, config, rows if rows is not None else training_rows(_some(to_mine)))
        print_table(
            f"memory of a step, {config.per_device_train_batch_size} queries", ["for", "MiB", "how known"], plan
        )
        return {}
    checkpoint = resumable(folder, options, config)
    results: dict[str, dict[str, float]] = {}
    documents = _Documents(model)
    if test is not None:
        results["before"] = _once(
            folder / "before.json", lambda: evaluate(model, test, documents=documents.of(test)).mean
        )
    if rows is None:
        rows = training_rows(_some(to_mine), _mined(model, _some(to_mine), options, config, folder, documents))
    if config.hard_negatives and not any(rows[:1000]["neg"]):
        config.hard_negatives = 0  # or masked columns would be computed
    trainer = PegTrainer(model, config, rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.is_world_process_zero():
        return results
    trainer.save_model(str(folder))
    history = trainer.state.log_history
    write_json(folder / "history.json", history)
    if test is not None:
        documents = _Documents(model)
        results["after"] = evaluate(model, test, documents=documents.of(test)).mean
        write_json(folder / "metrics.json", results)
        print_table(
            f"{len(test.qrels)} queries, {len(test.corpus)} documents",
            ["", *SHOWN],
            [[name, *(f"{metrics[m]:.4f}" for m in SHOWN)] for name, metrics in results.items()],
        )
        some = list(test.queries.values())
        _search(model, test, documents.of(test), options.queries or some[:: max(1, len(some) // 3)][:3])
    plot_training(history, results, folder / "training.png")
    console.print(f"model {folder}, plot {folder / 'training.png'}", soft_wrap=True)
    return results


def _suited(options: TrainOptions, config: PegConfig) -> tuple[PegConfig, Path]:
    """Another recipe for new models, where the defaults stand; the folder."""
    if options.data == "sample" and options.model is None:
        options.model = "static:256"
    if options.model is None:
        raise ValueError("give --model: a folder, a Hub name, static:WIDTH or scratch:WIDTHxLAYERS")
    if len(options.mine_ranks) != 2:
        raise ValueError(f"mine_ranks are two numbers, from and below; got {options.mine_ranks}")
    config.output_dir = config.output_dir or f"runs/peg-{Path(options.data).stem}"
    if options.model.partition(":")[0] in ("static", "scratch"):
        usual: dict[str, Any] = dataclasses.asdict(TrainOptions()) | {
            f.name: f.default for f in dataclasses.fields(config)
        }
        for name, value in FROM_SCRATCH.items():
            place: Any = options if hasattr(options, name) else config
            if getattr(place, name) == usual[name]:
                setattr(place, name, value)
    return config, Path(config.output_dir)


def _read(options: TrainOptions) -> tuple[RetrievalData | None, datasets.Dataset | None, RetrievalData | None]:
    """(data to mine negatives from, or rows that have theirs; data to judge on)."""
    to_mine = rows = None
    test_folder = options.test_data
    if options.data == "sample" or is_beir(options.data):
        to_mine, test_folder = read_split(options.data, options.split), test_folder or options.data
    else:
        rows = load_rows(options.data)
    return to_mine, rows, None if test_folder is None else read_split(test_folder, options.test_split)


def _some(data: RetrievalData | None) -> RetrievalData:
    assert data is not None
    return data


def _model(options: TrainOptions, data: RetrievalData | None, rows: datasets.Dataset | None) -> SentenceTransformer:
    if data is not None:
        texts = [*data.queries.values(), *data.corpus.values()]
    else:
        assert rows is not None
        texts = [text for row in rows.select(range(min(100_000, len(rows)))) for text in (row["query"], *row["pos"])]
    assert options.model is not None
    return new_model(options.model, texts) or load_model(options.model, options.pooling)


class _Documents:
    """Embeddings of a corpus by a model as it is now, each computed once: test and training data may share theirs."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        self.known: list[tuple[dict[str, str], Tensor]] = []

    def of(self, data: RetrievalData) -> Tensor:
        for corpus, embeddings in self.known:
            if corpus == data.corpus:
                return embeddings
        self.known.append((data.corpus, encode_texts(self.model, list(data.corpus.values()), side="passage")))
        return self.known[-1][1]


def _mined(
    model: SentenceTransformer,
    data: RetrievalData,
    options: TrainOptions,
    config: PegConfig,
    folder: Path,
    documents: _Documents,
) -> dict[str, list[str]]:
    """Hard negatives by query."""
    if not options.mine or not config.hard_negatives:
        return {}
    low, high = options.mine_ranks
    return _once(
        folder / "negatives.json",
        lambda: mine_hard_negatives(
            model, data, ranks=(low, high), num_negatives=config.hard_negatives, relative=options.mine_relative,
            seed=config.seed, documents=documents.of(data),
        ),
    )  # fmt: skip


def _once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run computed before it was trained, from its file if it goes on."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text())


def _search(model: SentenceTransformer, data: RetrievalData, documents: Tensor, queries: list[str], k: int = 3) -> None:
    """The best documents for some queries, and at what rank the first relevant one is (a star)."""
    ids, texts = list(data.corpus), list(data.corpus.values())
    of_text = {text: query for query, text in data.queries.items()}
    for query, scores in zip(queries, encode_texts(model, queries, side="query") @ documents.T, strict=True):
        order = scores.argsort(descending=True, stable=True).tolist()
        gains = data.qrels.get(of_text.get(query, ""), {})
        relevant = [rank for rank, i in enumerate(order) if gains.get(ids[i], 0) > 0][:1]
        lines = []
        for rank in sorted({*range(min(k, len(ids))), *relevant}):
            i = order[rank]
            star = " *" if gains.get(ids[i], 0) > 0 else ""
            lines.append([f"{rank + 1}{star}", f"{scores[i]:.3f}", ids[i], texts[i][:80]])
        print_table(query, ["rank", "cosine", "document", "text"], lines)
