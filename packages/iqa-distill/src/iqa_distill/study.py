"""The comparison: does a student learn more with a teacher that compares, and with teachers of two inductive biases?"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from papercore.lab.study import Metric, Scale, Study

from iqa_distill.compare import record
from iqa_distill.data import RESYNTH, SAMPLE, DataOptions, Rated, Splits, load_pool, load_ratings
from iqa_distill.fit import fit, judge
from iqa_distill.gmsd import psnr
from iqa_distill.metrics import correlations
from iqa_distill.sample import sample_references
from iqa_distill.teacher import NARTeacher
from iqa_distill.train import ModelOptions, bias_teachers, distillation, new_student
from iqa_distill.train_teacher import TeacherOptions, load_teacher, teach_by_gmsd
from iqa_distill.trainer import IQAConfig


@cache
def splits_of(data: str) -> Splits:
    """The images, decoded once for all runs; ``data`` is DataOptions as JSON."""
    return load_ratings(DataOptions(**json.loads(data)))


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell: an arm on one task from one seed, which also says which references are tested on.

    ``role`` is "student", "teacher" (the NAR-teacher's own scores) or "psnr" (full reference, no learning). All arms of a seed
    share splits, the student's first weights, order and crops, and the teachers: one NAR-teacher for the whole study; a
    convolution and an involution teacher for each task and seed. Scores of the test images go to predictions.jsonl beside the
    results.
    """
    role, arm = options.pop("role", "student"), options.pop("arm", "full")
    data = DataOptions(**options.pop("data"), split_seed=seed)
    recipe = options.pop("teacher")
    watch = options.pop("watch", False)
    splits = splits_of(json.dumps(dataclasses.asdict(data)))
    assert splits.test is not None
    shared = folder.parents[1]
    config = quiet(folder, seed, arm=arm, **options)
    curve: list[list[float]] = []
    if role == "psnr":
        found = psnr_of(splits.test, data)
    elif role == "teacher":
        found = judge(teach(shared / "teacher", splits, data, recipe), splits.test, splits.pool)
    else:
        models = ModelOptions()
        student = new_student(models, data, splits, seed)
        nar = teach(shared / "teacher", splits, data, recipe) if config.distils else None
        bias = None
        if config.regularises:
            place = shared / f"bias-{data.train_references}-{seed}"
            bias = bias_teachers(place, models, student, splits, dataclasses.replace(config, eval_strategy="no"), data)
        if watch:  # for the picture of the test loss alone: nothing is chosen by it
            config = dataclasses.replace(config, eval_strategy="steps", eval_steps=0.1)
        trainer = fit(
            distillation(student, config, nar, bias), splits.train, student.preprocessing, splits.scale, config, data,
            pool=splits.pool, validation=splits.test if watch else None,
        )  # fmt: skip
        curve = [[row["step"], row["eval_mae"]] for row in trainer.state.log_history if "eval_mae" in row]
        found = judge(student, splits.test)
    record(shared / "predictions.jsonl", folder.name, found, splits.test, curve)
    return correlations(found, splits.test.scores)


def psnr_of(rated: Rated, data: DataOptions) -> np.ndarray:
    """Of each image against its own pristine original, dB, (images,)."""
    if data.data == RESYNTH:
        table = pd.read_csv(Path(data.resynth) / "ratings.csv").set_index("image")["psnr"]
        return table[[Path(name).name for name in rated.names]].to_numpy()
    pristine = sample_references()
    images = (rated.pixels[i].movedim(0, -1).numpy() for i in range(len(rated)))
    return np.array([psnr(image, pristine[name]) for image, name in zip(images, rated.references or [], strict=True)])


def teach(place: Path, splits: Splits, data: DataOptions, recipe: dict[str, Any]) -> NARTeacher:
    """The study's NAR-teacher, trained with seed 0 on distorted pieces of the pool of pristine images, if that is not done yet.

    Raises:
        ValueError: if it is too weak for anything to be concluded from its students; not on the sample, where nothing is
        concluded.
    """
    if not (place / "teacher.json").exists():
        pool = splits.pool if data.data != RESYNTH else load_pool("bsds")
        assert pool is not None
        teach_by_gmsd(
            pool,
            DataOptions(crops=data.crops),
            TeacherOptions(**recipe["options"]),
            quiet(place, 0, **recipe["config"]),
        )
    network, weak = load_teacher(place, splits.test.ids if splits.test else ())
    if weak and data.data != SAMPLE:
        raise ValueError(weak)
    return network


def quiet(folder: Path, seed: int, **options: Any) -> IQAConfig:
    """A run's configuration: cosine, as the protocol says, instead of DEIQT's steps."""
    how: dict[str, Any] = {
        "eval_strategy": "no", "save_strategy": "steps", "save_steps": 0.5, "disable_tqdm": True, "step_schedule": False,
        "lr_scheduler_type": "cosine", "warmup_steps": 50, "per_device_train_batch_size": 32, "learning_rate": 8e-4,
    }  # fmt: skip
    return IQAConfig(output_dir=str(folder), seed=seed, **{**how, **options})


QUICK: dict[str, Any] = {
    "data": {"data": "sample", "crops": 4},
    "teacher": {"options": {"pieces": 60}, "config": {"max_steps": 150}},
}
SMALL: dict[str, Any] = {
    "teacher": {"options": {}, "config": {"max_steps": 2000, "logging_steps": 50}},
}


def resynth(references: int) -> dict[str, Any]:
    """The images with human scores, of which so many references are trained on."""
    return {**SMALL, "data": {"data": RESYNTH, "crops": 4, "train_references": references}}


study = Study(
    name="iqa-distill",
    claim="A student scores images better if it learns from a teacher that compares them with unrelated pristine ones, and from "
    "teachers of two inductive biases.",
    metrics=[Metric("srcc"), Metric("plcc"), Metric("plcc_fitted"), Metric("krcc"), Metric("rmse_fitted", lower_is_better=True)],
    baseline="a: base",
    method="e: MCD + Reg",
    arms={
        "PSNR, full reference": {"role": "psnr"},
        "f: NAR-teacher": {"role": "teacher"},
        "a: base": {"arm": "base", "watch": True},
        "b: + Reg": {"arm": "reg", "watch": True},
        "c: + DRD": {"arm": "drd"},
        "d: + MCD": {"arm": "mcd"},
        "e: MCD + Reg": {"arm": "full"},
    },
    scales={
        "quick": Scale({"sample": QUICK}, seeds=1, options={"max_steps": 40}),
        "small": Scale(
            {"6 references": resynth(6), "19 references": resynth(19)}, seeds=3, options={"max_steps": 900}
        ),
        "full": Scale(
            {"6 references": resynth(6), "19 references": resynth(19)}, seeds=5, options={"max_steps": 1500}
        ),
    },
    run=train_and_evaluate,
)  # fmt: skip
