"""The verb ``cache-teacher``: a teacher's logits on disk, for many students."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from papercore.lab.cli import flag
from papercore.lab.report import console

from sinkd.encode import fingerprint
from sinkd.inference import logits_of
from sinkd.models import ModelOptions, label_names, load_model
from sinkd.readers import DataOptions
from sinkd.teacher_cache import TeacherCache
from sinkd.train import Setting, TrainOptions, prepare


@dataclass
class CacheOptions:
    """Whose logits to write where."""

    teacher: str = flag("folder or Hub name of the fine-tuned teacher")
    cache: str = flag("folder to write")
    student: str | None = flag("folder or Hub name of the students, if their tokenizer is another one", None)
    architecture: str | None = flag(
        "encoder, encoder-decoder or decoder; what the teacher's config says if not given", None
    )
    topk: int | None = flag("keep the k largest logits of each row and the mass of the rest", None)
    dtype: str = flag("float16, bfloat16 or float32", "float16")
    max_length: int = flag("tokens of a text, as the students will have it", 128)
    seed: int = flag("that the students will have: decides which rows are held out", 0)


def cache_teacher(options: CacheOptions, data: DataOptions, train: TrainOptions) -> TeacherCache:
    """Run the teacher once over the training split and write its logits.

    ``sinkd train --teacher_cache`` takes them for any student with the same data options, seed, tokenizer and max_length.
    """
    models = ModelOptions(teacher=options.teacher, student=options.student, architecture=options.architecture)
    setting = prepare(data, models, train, options.max_length, options.seed)
    return write_cache(setting, options)


def write_cache(setting: Setting, options: CacheOptions) -> TeacherCache:
    """The cache of a prepared setting; one that is already complete is opened."""
    tokenizer = setting.teacher_tokenizer or setting.tokenizer
    teacher = load_model(options.teacher, setting.architecture, setting.splits.train.task)
    mark = fingerprint(setting.encode(setting.tokenizer))
    rows = setting.encode(tokenizer)
    counts = None
    if setting.architecture != "encoder":
        skip = 1 if setting.architecture == "decoder" else 0
        counts = [sum(label != -100 for label in row["labels"][skip:]) for row in rows]
    if (Path(options.cache) / "meta.json").exists():
        return TeacherCache.open(options.cache, mark)
    start = TeacherCache.written(options.cache, mark)  # of an interrupted run
    batches = logits_of(teacher, tokenizer, rows, batch_size=32, start=start)
    classes = len(label_names(teacher.config)) if counts is None else teacher.get_output_embeddings().weight.shape[0]
    cache = TeacherCache.write(
        options.cache,
        (torch.cat(part) for part in batches),
        classes=classes,
        total=len(rows) if counts is None else sum(counts),
        dtype=options.dtype,
        topk=options.topk,
        fingerprint=mark,
        row_counts=counts,
        start=start,
    )
    console.print(f"{options.cache}: {len(rows)} rows", soft_wrap=True)
    return cache
