"""Judging a model on a task: classification, regression, rank classification of prompts, or language modelling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from papercore.lab.cli import flag
from papercore.lab.files import write_json, write_text
from papercore.lab.report import console, print_table
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from sinkd.encode import encode_language, encode_prompts, encode_texts
from sinkd.inference import logits_of
from sinkd.metrics import METRICS, likeness
from sinkd.models import architecture_of, load_model, load_tokenizer
from sinkd.prompts import Prompt, Prompted, render
from sinkd.readers import DataOptions, load
from sinkd.tasks import Examples, Task


def class_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_length: int,
    batch_size: int = 128,
) -> NDArray[np.float32]:
    """(examples, classes) of a classifier, (examples, 1) of a regressor."""
    rows = encode_texts(examples, tokenizer, max_length)
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i]["input_ids"])
    )  # batches of like lengths need little padding
    parts = [row for batch in logits_of(model, tokenizer, [rows[i] for i in order], batch_size) for row in batch]
    logits = torch.cat(parts).numpy()
    result = np.empty_like(logits)
    result[order] = logits
    return result


@torch.inference_mode()
def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompted: list[Prompted],
    max_length: int,
    batch_size: int = 32,
) -> NDArray[np.float32]:
    """(prompts, choices): the sum of the log-probabilities of each choice's tokens (rank classification; T0's evaluation).

    Prompts with fewer choices than others get -inf for those they lack.
    """
    architecture = architecture_of(model)
    flat = [Prompted(p.source, choice, p.choices, p.label) for p in prompted for choice in p.choices]
    rows = encode_prompts(flat, tokenizer, max_length, architecture)
    labels = [torch.tensor([t for t in row["labels"] if t != -100]) for row in rows]
    sums: list[float] = []
    for batch in logits_of(model, tokenizer, rows, batch_size):
        for logits in batch:
            sums.append(float(logits.log_softmax(-1).gather(1, labels[len(sums)].unsqueeze(1)).sum()))
    scores = np.full((len(prompted), max(len(p.choices) for p in prompted)), -np.inf, np.float32)
    place = iter(sums)
    for i, prompt in enumerate(prompted):
        scores[i, : len(prompt.choices)] = [next(place) for _ in prompt.choices]
    return scores


def language_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int = 32
) -> dict[str, float]:
    """Cross-entropy in nats and accuracy of the next token, means over tokens."""
    rows = encode_language(texts, tokenizer, max_length)
    losses, hits, done = [], [], 0
    for batch in logits_of(model, tokenizer, rows, batch_size):
        for logits in batch:
            target = torch.tensor(rows[done]["labels"][1:])
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(-1) == target)
            done += 1
    nats = float(torch.cat(losses).mean())
    return {"nats": nats, "perplexity": float(np.exp(nats)), "token_accuracy": float(torch.cat(hits).float().mean())}


def language_likeness(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int,
    tau: float,
    batch_size: int = 32,
) -> dict[str, float]:
    """:func:`sinkd.metrics.likeness` of two language models, over all predicted tokens."""
    rows = encode_language(texts, tokenizer, max_length)
    batches = zip(*(logits_of(m, tokenizer, rows, batch_size) for m in (model, teacher)), strict=True)
    near, tokens = [], []
    for ours, theirs in batches:
        near.append(likeness(torch.cat(ours).numpy(), torch.cat(theirs).numpy(), tau))
        tokens.append(sum(map(len, ours)))
    return {name: float(np.average([n[name] for n in near], weights=tokens)) for name in near[0]}


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_length: int,
    objective: str = "classify",
    prompt: Prompt | None = None,
) -> tuple[dict[str, float], NDArray[np.float32] | None]:
    """The task's metrics, the decisive one first, and the logits or choice scores behind them."""
    if objective == "language":
        return language_loss(model, tokenizer, examples.first, max_length), None
    if examples.labels is None:
        raise ValueError(f"{examples.task.name}: these rows have no labels to judge by")
    if architecture_of(model) == "encoder":
        logits = class_logits(model, tokenizer, examples, max_length)
    else:
        assert prompt is not None
        logits = choice_scores(model, tokenizer, render(examples, prompt), max_length)
    predicted = logits[:, 0] if examples.task.labels is None else logits.argmax(1)
    return {name: METRICS[name](examples.labels, predicted) for name in examples.task.metrics}, logits


RECORD = "sinkd.json"


def write_record(folder: Path, **entries: Any) -> None:
    """What evaluation must know beside the model: objective, prompt, lengths."""
    write_json(folder / RECORD, entries)


def read_record(folder: str) -> dict[str, Any]:
    """Defaults for a model that did not come from `sinkd train`."""
    path = Path(folder) / RECORD
    known = json.loads(path.read_text()) if path.is_file() else {}
    return {"objective": "classify", "prompt": None, "max_length": 128, **known}


@dataclass
class EvalOptions:
    """What to evaluate."""

    model: str = flag("folder that `sinkd train` wrote, or any folder or Hub name of a model for this task")
    teacher: str | None = flag(
        "teacher of it: also print how often both choose the same class, and how far outputs are", None
    )
    architecture: str | None = flag("encoder, encoder-decoder or decoder; what the config says if not given", None)
    submission: bool = flag("write predictions of the unlabelled test file in GLUE's submission format", False)
    output_dir: str | None = flag("where metrics.json goes; eval-DATA in the model's folder if not given", None)
    seed: int = flag("that the model was trained with: decides which rows a plain file holds out", 0)


def evaluate_checkpoint(options: EvalOptions, data: DataOptions) -> dict[str, float]:
    """The verb ``eval``: a table and metrics.json."""
    config = AutoConfig.from_pretrained(options.model) if Path(options.model).is_dir() else None
    if config is None and (Path(options.model).parent.is_dir() or options.model.count("/") != 1):
        raise FileNotFoundError(
            f"{options.model}: no such folder; expected one that `sinkd train` wrote, or a Hub name"
        )
    config = config or AutoConfig.from_pretrained(options.model)
    splits = load(data, options.seed)
    record = read_record(options.model)
    architecture = options.architecture or architecture_of(config)
    task: Task = splits.test.task
    tokenizer, model = load_tokenizer(options.model), load_model(options.model, architecture, task)
    prompt = (
        None if record["prompt"] is None else Prompt(record["prompt"]["template"], tuple(record["prompt"]["choices"]))
    )
    metrics, logits = judge(model, tokenizer, splits.test, record["max_length"], record["objective"], prompt)
    for name, examples in splits.extra.items():
        more, _ = judge(model, tokenizer, examples, record["max_length"], record["objective"], prompt)
        metrics |= {f"{name}_{key}": value for key, value in more.items()}
    if options.teacher is not None and logits is not None and task.labels is not None:
        teacher = load_model(options.teacher, architecture, task)
        _, theirs = judge(teacher, load_tokenizer(options.teacher), splits.test, record["max_length"], prompt=prompt)
        assert theirs is not None
        metrics |= likeness(logits, theirs, tau=2.0)
    folder = Path(options.output_dir or Path(options.model) / f"eval-{task.name}")
    print_table(f"{task.name}, {len(splits.test)} rows", list(metrics), [[f"{v:.4f}" for v in metrics.values()]])
    write_json(folder / "metrics.json", metrics)
    if options.submission:
        if splits.unlabelled is None:
            raise ValueError(f"{data.data} has no unlabelled test file to write predictions for")
        scores = class_logits(model, tokenizer, splits.unlabelled, record["max_length"])
        write_text(folder / f"{task.name}.tsv", submission(task, splits.unlabelled, scores))
    console.print(f"{folder / 'metrics.json'}", soft_wrap=True)
    return metrics


def submission(task: Task, examples: Examples, logits: NDArray[np.float32]) -> str:
    """GLUE's format: a header, then index and prediction; label names except for 0/1 tasks; STS-B clipped to 0 to 5."""
    if task.labels is None:
        words = [f"{value:.3f}" for value in np.clip(logits[:, 0], 0, 5)]
    else:
        words = [str(task.labels[i]) for i in logits.argmax(1)]
    return "index\tprediction\n" + "".join(f"{i}\t{word}\n" for i, word in zip(examples.ids, words, strict=True))
