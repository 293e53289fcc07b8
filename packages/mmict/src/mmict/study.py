"""The comparison: does tuning with in-context examples help, and do features of them that picture and text guide help more?"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from papercore.lab.files import write_json
from papercore.lab.study import Metric, Scale, Study
from papercore.ops import pick_device

from mmict.corpus import Corpus, new_sampler, prepare
from mmict.data import DataOptions, Splits, load_samples
from mmict.judge import judge
from mmict.model import MMICTModel
from mmict.small import SmallOptions, cold_model, small_model
from mmict.texts import clean_caption
from mmict.train import fit, measure
from mmict.trainer import MMICTTrainingConfig

FIRST = "test_new"  # of emoji48's two test sets: concepts that no training sample shows


@cache
def splits_of(data: str) -> Splits:
    """Read once for all runs; ``data`` is DataOptions as JSON."""
    return load_samples(DataOptions(**json.loads(data)))


@cache
def corpora_of(data: str, parts: Path) -> dict[str, Corpus]:
    """Training and test samples, encoded once for all runs: the frozen parts are the same in all."""
    splits, model = splits_of(data), MMICTModel.from_pretrained(parts / "warm").to(pick_device())
    named = {"train": splits.train, **splits.tests}
    return {name: prepare(model, samples, parts / f"features-{name}.npy") for name, samples in named.items()}


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell: an arm from one seed, which is that of order, demonstrations, prompts and dropout.

    One small pretrained model is made for each data set, and all arms and seeds begin with it; ``warm`` False begins with a hub
    that knows nothing. An arm is judged with the demonstrations it was tuned with, chosen in the same way among the training
    samples, and without (names that end in k0). Texts are written greedily; they go to predictions.json in the cell's folder.
    """
    data = json.dumps(options.pop("data"))
    stages, samplers = SmallOptions(**options.pop("stages")), options.pop("samplers")
    sampler, warm, texts = samplers[options.pop("sampler")], options.pop("warm", True), options.pop("texts", 0)
    splits = splits_of(data)
    parts = folder.parents[1] / f"parts-{json.loads(data)['data']}"
    model = small_model(parts, splits.train, coco_captions(texts), stages)
    config = MMICTTrainingConfig(
        output_dir=str(folder), seed=seed, sampler=sampler, save_strategy="steps", save_steps=0.5, disable_tqdm=True,
        warmup_steps=0.1, max_grad_norm=1.0, **options,
    )  # fmt: skip
    if not warm:
        model = cold_model(parts, stages)
    model.config = config.model_config()
    corpora = corpora_of(data, parts)
    fit(model.to(pick_device()), corpora["train"], config)
    draw = new_sampler(corpora["train"], sampler, config.k, seed)
    metrics: dict[str, float] = {}
    written = {}
    for name, queries in corpora.items():
        if name == "train":
            continue
        suffix = "" if name in (FIRST, "test") else f"_{name.removeprefix('test_')}"
        for k in sorted({config.shown, 0}, reverse=True):
            found = judge(model, queries, corpora["train"], draw, k, progress=False, num_beams=1)
            ending = suffix if k == config.shown else f"{suffix}_k0"
            metrics |= {f"{metric}{ending}": value for metric, value in measure(found, queries).items()}
            written[f"{name}, k = {k}"] = dict(zip(queries.samples.ids, found.predictions, strict=True))
    write_json(folder / "predictions.json", written)
    return metrics


def coco_captions(count: int) -> list[str]:
    """One caption each of the first so many pictures of COCO val2017, for the language model alone."""
    if not count:
        return []
    path = Path(os.environ["PAPERCORE_DATA"]) / "mmict" / "coco_val2017_captions.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [clean_caption(json.loads(line)["captions"][0]) for line, _ in zip(lines, range(count), strict=False)]


def arms() -> dict[str, dict[str, Any]]:
    """By name: what :class:`MMICTTrainingConfig` calls them, how demonstrations are chosen, and the hub's start."""
    near: dict[str, Any] = {"sampler": "nearest"}
    return {
        "FT": {**near, "arm": "ft"},
        "FT + text": {**near, "arm": "ft+text"},
        "vanilla ICT": {**near, "arm": "ict"},
        "MMICT": {**near, "arm": "mmict"},
        "MMICT, text features": {**near, "arm": "mmict-text"},
        "MMICT, raw text": {**near, "arm": "mmict-raw"},
        "vanilla ICT, random": {"sampler": "random", "arm": "ict"},
        "MMICT, random": {"sampler": "random", "arm": "mmict"},
        "FT, cold": {**near, "arm": "ft", "warm": False},
        "vanilla ICT, cold": {**near, "arm": "ict", "warm": False},
        "MMICT, cold": {**near, "arm": "mmict", "warm": False},
    }


EMOJI: dict[str, Any] = {
    "data": {"data": "emoji48"},
    "samplers": {"nearest": "visual", "random": "random"},
    "texts": 2500,
}
VQA: dict[str, Any] = {
    "data": {"data": "easyvqa", "max_train": 8000, "max_test": 1500}, "samplers": {"nearest": "mixed", "random": "random"},
}  # fmt: skip
SMALL: dict[str, Any] = {
    "k": 4, "max_steps": 500, "per_device_train_batch_size": 24, "learning_rate": 1e-3, "stages": {"steps": [800, 1200, 600]},
}  # fmt: skip
LARGE: dict[str, Any] = {
    "vision_width": 384, "width": 384, "queries": 16, "layers": 6, "steps": [4000, 6000, 4000],
}  # fmt: skip

study = Study(
    name="mmict",
    claim="A model that is tuned with in-context examples as visual-guided textual features predicts texts better than one tuned "
    "without examples, and than one that gets the examples as they are.",
    metrics=[
        Metric("nll", lower_is_better=True, unit="nats a token"),
        Metric("nll_seen", lower_is_better=True, unit="nats a token"),
        *(Metric(name + part) for name in ("token_f1", "exact_match", "cider_d") for part in ("", "_seen")),
        *(Metric(name, lower_is_better=True) for name in ("copy_rate", "copy_rate_seen", "nll_k0", "nll_seen_k0")),
        *map(Metric, ("vqa_accuracy", "yes_no", "other")),
    ],
    baseline="vanilla ICT",
    method="MMICT",
    arms=arms(),
    scales={
        "quick": Scale(
            {"sample": {"data": {"data": "sample", "max_train": 400, "max_test": 48}, "samplers": EMOJI["samplers"]}},
            seeds=1,
            options={**SMALL, "max_steps": 10, "k": 2, "stages": {"steps": [20, 20, 10]}},
        ),
        "small": Scale({"emoji48": EMOJI, "easyvqa": VQA}, seeds=3, options=SMALL),
        "full": Scale(
            {"emoji48": EMOJI, "easyvqa": {**VQA, "data": {"data": "easyvqa"}}},
            seeds=3,
            options={**SMALL, "max_steps": 3000, "per_device_train_batch_size": 256, "bf16": True, "stages": LARGE},
        ),
    },
    run=train_and_evaluate,
)
