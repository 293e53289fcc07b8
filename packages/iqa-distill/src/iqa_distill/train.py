"""The verb ``train``: the teachers of inductive bias, then the student with all its teachers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table

from iqa_distill.bias import BiasTeacher
from iqa_distill.data import DataOptions, Splits, load_ratings
from iqa_distill.deit3 import load_deit3
from iqa_distill.fit import fit, judge
from iqa_distill.metrics import correlations
from iqa_distill.model import RKIQT
from iqa_distill.plots import plot_scatter, plot_training
from iqa_distill.sample import make_worse
from iqa_distill.teacher import NARTeacher
from iqa_distill.train_teacher import TeacherOptions, load_teacher, teach_by_gmsd
from iqa_distill.trainer import IQAConfig
from iqa_distill.training import BiasTraining, Distillation

# Ours, for a few minutes of two cores.
SAMPLE: dict[str, Any] = {
    "num_train_epochs": 6, "per_device_train_batch_size": 32, "learning_rate": 8e-4, "step_schedule": False,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
}  # fmt: skip
SAMPLE_TEACHER: dict[str, Any] = {**SAMPLE, "num_train_epochs": 3}
SAMPLE_PIECES, SAMPLE_CROP = 60, 64
BIAS_SHARE = 0.5  # of the student's steps, for each teacher of inductive bias (ours)


@dataclass
class ModelOptions:
    """Who learns from whom. By default networks for CPUs, from scratch."""

    backbone: str = flag("tiny, or a VisionTransformer of timm (paper: deit3_small_patch16_224)", "tiny")
    weights: str | None = flag("file of pretrained weights for it, with timm's names or DeiT III's", None)
    token_init: str = flag("start of the Conv and Inv tokens: aligned or learned (paper: not known)", "aligned")
    infer: str = flag("the score is that of the panel: cls; or the mean with the Conv and Inv heads: mean", "cls")
    teacher: str | None = flag("folder of `iqa-distill teacher`; on the sample one is trained", None)
    conv_teacher: str = flag(
        "its backbone: tiny, or a network of timm (descriptions of the paper: efficientnet_b0)", "tiny"
    )
    conv_weights: str | None = flag("file of pretrained weights for that backbone", None)
    inv_teacher: str = flag(
        "its backbone: tiny, or rednet26 to rednet152 (descriptions of the paper: rednet101)", "tiny"
    )
    inv_weights: str | None = flag("file of pretrained weights for that backbone", None)


def new_student(options: ModelOptions, data: DataOptions, splits: Splits, seed: int) -> RKIQT:
    """With random weights of ``seed``, or pretrained ones in its ViT."""
    torch.manual_seed(seed)
    student = RKIQT(
        options.backbone, crop_size=data.crop_size, crops=data.crops, resize=splits.resize,
        scale=dataclasses.astuple(splits.scale), token_init=options.token_init, infer=options.infer,
    )  # fmt: skip
    if options.weights is not None:
        load_deit3(student.vit, options.weights)
    return student


def of_teacher(config: IQAConfig, folder: Path, **changes: Any) -> IQAConfig:
    """The configuration of a teacher that is trained along with a student: nothing of the student's arm, no choice of weights."""
    apart: dict[str, Any] = {
        "arm": "base", "select": "last", "load_best_model_at_end": False, "metric_for_best_model": None,
        "greater_is_better": None,
    }  # fmt: skip
    return dataclasses.replace(config, output_dir=str(folder), **{**apart, **changes})


def bias_teachers(
    folder: Path, options: ModelOptions, student: RKIQT, splits: Splits, config: IQAConfig, *record: Any
) -> dict[str, BiasTeacher]:
    """The convolution and the involution teacher, fine-tuned on the training images of this run: in ``folder``, unless they are
    there already."""
    backbones = {
        "conv": (options.conv_teacher, options.conv_weights),
        "inv": (options.inv_teacher, options.inv_weights),
    }
    teachers = {}
    for kind, (backbone, weights) in backbones.items():
        torch.manual_seed(config.seed)
        teachers[kind] = BiasTeacher(kind, backbone)
        if weights is not None:
            teachers[kind].load_trunk(weights)
        epochs, steps = config.num_train_epochs * BIAS_SHARE, math.ceil(config.max_steps * BIAS_SHARE)
        own = of_teacher(config, folder / kind, num_train_epochs=epochs, max_steps=steps or -1)
        fit(BiasTraining(teachers[kind]), splits.train, student.preprocessing, splits.scale, own, *record)
    return teachers


def distillation(
    student: RKIQT, config: IQAConfig, nar: NARTeacher | None, bias: Mapping[str, BiasTeacher] | None
) -> Distillation:
    """The training module that ``config.arm`` asks for. Its own new weights do not disturb other random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Distillation(
            student,
            nar if config.distils else None,
            bias if config.regularises else None,
            loss=config.loss,
            mcd_weight=config.mcd_weight,
            reg_weight=config.reg_weight,
            blocks=config.mcd_blocks,
            mcd={"ratio": config.mask_ratio, "mask": config.mask, "generate": config.arm != "drd"},
            reg={"reverse": config.reverse, "bridge": config.bridge},
        )


def train(data: DataOptions, options: ModelOptions, config: IQAConfig) -> dict[str, float]:
    """The verb ``train``."""
    config.output_dir = config.output_dir or f"runs/iqa-distill-{name_of(data.data)}"
    folder, sample = Path(str(config.output_dir)), data.data == "sample"
    if sample:
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{k: v for k, v in SAMPLE.items() if getattr(config, k) == defaults[k]})
        if options.backbone == "tiny":
            data = dataclasses.replace(data, crop_size=data.crop_size or SAMPLE_CROP)
    if config.distils and options.teacher is None and not sample:
        raise ValueError("give --teacher: train one with `iqa-distill teacher`; or --arm base or reg, which need none")
    splits = load_ratings(data)
    student = new_student(options, data, splits, config.seed)
    nar = None
    if config.distils:
        if splits.pool is None:
            raise ValueError(
                f"{data.data} has no pristine images to compare with: give --references; or --arm base or reg"
            )
        place = options.teacher or str(folder / "teacher")
        if options.teacher is None:
            teach_by_gmsd(
                splits.pool, dataclasses.replace(data, crop_size=student.preprocessing.crop_size),
                TeacherOptions(pieces=SAMPLE_PIECES), of_teacher(config, Path(place), **SAMPLE_TEACHER),
            )  # fmt: skip
        with config.main_process_first(local=False):  # that which writes the teacher's record
            nar, weak = load_teacher(place, splits.test.ids if splits.test else ())
        if weak:
            console.print(weak, soft_wrap=True)
        distillation(student, config, nar, None)  # refuses a teacher that does not fit, before others are trained
    bias = bias_teachers(folder, options, student, splits, config, data, options) if config.regularises else None
    trainer = fit(
        distillation(student, config, nar, bias), splits.train, student.preprocessing, splits.scale, config, data, options,
        pool=splits.pool, validation=splits.validation,
    )  # fmt: skip
    results: dict[str, float] = {}
    if trainer.is_world_process_zero():
        plot_training(folder / "training.png", trainer.state.log_history)
        written = [folder / "training.png"]
        if splits.test is not None:
            found = judge(student, splits.test)
            results = correlations(found, splits.test.scores)
            write_json(folder / "metrics.json", results)
            written.append(folder / "test.png")
            title = f"{len(found)} test images"
            plot_scatter(written[-1], found, splits.test.scores, splits.test.distortions, title)
            print_table(title, list(results), [[f"{value:.3f}" for value in results.values()]])
        console.print(f"checkpoint {folder}, pictures {' and '.join(map(str, written))}", soft_wrap=True)
        if sample and splits.test is not None and splits.test.references:
            worse = make_worse(splits.test.references[0], folder / "worse")
            console.print(f"try `iqa-distill score --model {folder} {worse}/*.png --plot falling.png`", soft_wrap=True)
    return results


def name_of(data: str) -> str:
    """Of a data set, for a folder."""
    return re.sub(r"\W+", "-", Path(data.rstrip("/")).stem).strip("-") or "data"
