"""The comparison: do text attention and a second supervision read more words, and are they of help to each other?"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from papercore.lab.study import Metric, Scale, Study

from dsan.compare import record
from dsan.data import DataOptions, Splits, load_words
from dsan.metrics import GROUPS, correct, simplify
from dsan.model import DSAN
from dsan.train import ModelOptions, fit, judge, new_model, readings_of
from dsan.trainer import DSANConfig


@cache
def splits_of(data: str) -> Splits:
    """The words, read and drawn once for all runs; ``data`` is DataOptions as JSON. All arms have columns for the same words."""
    options = json.loads(data)
    if options.pop("supplied", False):  # word list and fonts beside the crops
        supplied = Path(os.environ.get("PAPERCORE_DATA", "")) / "dsan"
        options |= {"words": str(supplied / "words_mj88k.txt.gz"), "fonts": str(supplied / "fonts")}
    model = DSAN()
    return load_words(DataOptions(**options), model.charset, model.size, model.frames)


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell: an arm on one task from one seed. All arms of a seed share the weights that they have in common, the order of the
    crops and their changes. Which test words are read right goes to correct.jsonl beside the results."""
    splits = splits_of(json.dumps(options.pop("data")))
    model = new_model(ModelOptions(**options.pop("model"), **options.pop("arm")), seed)
    quiet: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 0.25, "disable_tqdm": True}
    trainer = fit(model, splits, DSANConfig(output_dir=str(folder), seed=seed, **quiet, **options))
    assert splits.test is not None
    readings = readings_of(trainer.model, splits.test)
    found = judge(readings, splits.test.labels)
    right = {branch: correct([r.text for r in words], splits.test.labels) for branch, words in readings.items()}
    digits = [GROUPS["digit"](simplify(label)) for label in splits.test.labels]
    record(
        folder.parents[1] / "correct.jsonl",
        folder.name,
        {name: np.array(v) for name, v in right.items()},
        np.array(digits),
    )
    wanted = ("accuracy", "accuracy_digit", "accuracy_repeat", "similarity")
    metrics = {name: 100 * found["ctx"][name] for name in wanted if name in found["ctx"]}
    return metrics | {branch: 100 * found[branch]["accuracy"] for branch in ("enh", "fuse") if branch in found}


SAMPLE: dict[str, Any] = {"data": {"max_train": 2000, "max_test": 200, "validation": 0}, "model": {}}
IIIT5K: dict[str, Any] = {"data": {"data": ["iiit5k"], "synthetic": 60_000, "supplied": True}, "model": {}}
FULL: dict[str, Any] = {
    "data": {"data": ["iiit5k"], "synthetic": 600_000, "supplied": True}, "model": {"backbone": "base", "widths": [256]},
}  # fmt: skip

study = Study(
    name="dsan",
    claim="Text attention and a second supervision of the visual columns make the same recogniser read more words.",
    metrics=[
        Metric("accuracy", unit="%"), Metric("accuracy_digit", unit="%"), Metric("accuracy_repeat", unit="%"),
        Metric("similarity", unit="%"), Metric("enh", unit="%"), Metric("fuse", unit="%"),
    ],
    baseline="A: base",
    method="D: full",
    arms={
        "A: base": {"arm": {"attention": False, "enhancement": None}},
        "B: + text attention": {"arm": {"attention": True, "enhancement": None}},
        "C: + enhancement": {"arm": {"attention": False, "enhancement": "ctc"}},
        "D: full": {"arm": {"attention": True, "enhancement": "ctc"}},
    },
    scales={
        "quick": Scale({"sample": SAMPLE}, seeds=1, options={"max_steps": 40, "learning_rate": 3e-3}),
        "small": Scale({"iiit5k": IIIT5K}, seeds=2, options={"max_steps": 1500, "learning_rate": 3e-3}),
        "full": Scale(
            {"iiit5k": FULL}, seeds=3, options={"max_steps": 2500, "learning_rate": 1e-3, "per_device_train_batch_size": 1024}
        ),
    },
    run=train_and_evaluate,
)  # fmt: skip
