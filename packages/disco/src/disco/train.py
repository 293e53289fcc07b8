"""The verbs ``pretrain-teacher`` and ``train``: a teacher, its student, and on the sample the student alone."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from papercore.ops import seed_everything
from torch import nn

from disco.augment import Augmentation
from disco.backbones import feature_width
from disco.checkpoints import describe, load_queue, load_teacher
from disco.data import SMALL, DataOptions, Images, Splits, channel_statistics, load_data
from disco.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from disco.evaluate import evaluate, extract_features
from disco.model import DisCo
from disco.plots import plot_neighbours, plot_training
from disco.swav import DisCoSwAV, swav_crops
from disco.teacher_cache import FixedViews
from disco.trainer import SWAV, DisCoConfig, DisCoTrainer


@dataclass
class ModelOptions:
    """Who learns from whom."""

    teacher: str | None = flag(
        "folder that `disco` wrote, or a checkpoint of MoCo, SwAV, DeepCluster-v2 or SeLa; on the sample one is pre-trained",
        None,
    )
    teacher_backbone: str | None = flag("of a checkpoint file, which does not say it: resnet50, ...", None)
    student: str | None = flag("backbone: a timm name, torchvision:NAME, or cnn:WIDTHS such as cnn:16-32", None)
    hidden: int = flag("hidden width of the student's head, -1: as wide as the features (authors: 2048)", 2048)

    def __post_init__(self) -> None:
        if self.teacher is None and self.teacher_backbone is not None:
            raise ValueError("teacher_backbone is of a --teacher, and none is given")


@dataclass
class TeacherOptions:
    """What is pre-trained."""

    backbone: str | None = flag(
        "a timm name, torchvision:NAME, or cnn:WIDTHS such as cnn:16-32; on the sample a small one", None
    )
    hidden: int = flag("hidden width of its head, -1: as wide as the features (MoCo-v2)", -1)
    dim: int = flag("width of the embedding, its students' too (authors: 128)", 128)


@dataclass
class TrainOptions:
    """What the student is compared with."""

    compare: bool | None = flag("also train it without the teacher; if not given: on the sample only", None)


NO_QUEUE = "queue_init teacher needs a --teacher checkpoint of MoCo, which holds a queue"
LOSS_RISES = "the contrastive loss may rise at first, while keys of images replace the random ones of the queue"

SAMPLE: dict[str, Any] = {"num_train_epochs": 40, "per_device_train_batch_size": 128, "learning_rate": 0.12}
SAMPLE_TEACHER, SAMPLE_STUDENT = "cnn:32-32-64x2", "cnn:6-6-12"


def suited(data: DataOptions, config: DisCoConfig) -> DisCoConfig:
    """For the small sample, another recipe where the defaults stand."""
    if data.data != "sample":
        return config
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in SAMPLE.items() if getattr(config, k) == defaults[k]})


def new_encoder(
    backbone: str,
    splits: Splits,
    dim: int,
    hidden: int,
    seed: int,
    teacher: Encoder | None = None,
    batch_norm: bool = False,
) -> Encoder:
    """With random weights of ``seed``; it sees images as its teacher does, which is shown the same views."""
    if teacher is not None:
        size, mean, std = teacher.image_size, teacher.mean, teacher.std
    else:
        size = splits.image_size
        mean, std = channel_statistics(splits.train) if size <= SMALL else (IMAGENET_MEAN, IMAGENET_STD)
    seed_everything(seed)
    return Encoder(backbone, dim, hidden, batch_norm, image_size=size, mean=mean, std=std)


def build(student: Encoder, teacher: Encoder | None, images: int, config: DisCoConfig) -> DisCo | DisCoSwAV:
    """The training module that ``config`` asks for.

    Args:
        images: how many there are.

    Raises:
        ValueError: as :class:`disco.DisCo` and :class:`disco.DisCoSwAV`, and for a backbone that cannot take small crops.
    """
    given = {
        name: getattr(config, name) for name in ("temperature", "distill_weight") if getattr(config, name) is not None
    }
    if config.arm != SWAV:
        return DisCo(
            student, teacher, arm=config.arm, queue_size=config.queue_for(images), momentum=config.key_momentum_for(images),
            distill_reduction=config.distill_reduction, teacher_mode=config.teacher_mode, joint_views=config.joint_views,
            bn_splits=config.bn_splits, seed_temperature=config.seed_temperature, **given,
        )  # fmt: skip
    for size in {crop.size for crop in swav_crops(student.image_size, config.small_crops)}:
        for encoder in (student, teacher or student):
            feature_width(encoder.backbone, size)
    steps = config.steps_for(images)
    frozen, after = config.frozen_prototype_steps, config.swav_queue_after
    return DisCoSwAV(
        student, teacher, prototypes=config.prototypes, queue_size=config.swav_queue,
        queue_after=round(0.075 * steps) if after is None else after,
        frozen_prototype_steps=round(0.01 * steps) if frozen is None else frozen, **given,
    )  # fmt: skip


def fit(
    student: Encoder, teacher: Encoder | None, images: Images, config: DisCoConfig, *record: Any, queue: Any = None
) -> DisCoTrainer:
    """Train, or go on with training, in ``config.output_dir``; the student is saved there, and is ``model.student``.

    Args:
        record: the other options that define the run. queue: (keys, pointer) to start with, for ``queue_init="teacher"``.
    """
    folder = Path(str(config.output_dir))
    checkpoint = resumable(folder, config, *record)
    seed_everything(config.seed)
    disco = build(student, teacher, len(images), config)
    if config.queue_init == "teacher":
        assert isinstance(disco, DisCo)  # the configuration refuses the other
        start_queue(disco, queue)
    views = None
    if config.fixed_views:
        views = FixedViews(Augmentation.moco(student.image_size), len(images), config.fixed_views)
        if disco.teacher is not None and teacher is not None:
            kept = Path(config.fixed_views_file or folder / "teacher-views.safetensors")
            with config.main_process_first(local=False):  # the others read it
                views.embed(teacher, images, kept, config.device, config.bf16)
    trainer = DisCoTrainer(disco, config, train_dataset=images, views=views)
    trainer.train(resume_from_checkpoint=checkpoint)
    broadcast(list(disco.buffers()))  # batch statistics, of which each process has its own: a student has one teacher
    if trainer.is_world_process_zero():
        student.save_pretrained(folder)
    return trainer


def start_queue(disco: DisCo, queue: Any) -> None:
    """The teacher's queue instead of random keys, as in the authors' runs."""
    if queue is None:
        raise ValueError(NO_QUEUE)
    keys, pointer = queue
    bank = disco.queue.queue
    if keys.shape != bank.keys.shape:
        raise ValueError(
            f"the teacher's queue is {tuple(keys.shape)}, the student's {tuple(bank.keys.shape)}: give --queue_size {len(keys)}"
        )
    bank.keys.copy_(keys)
    bank.pointer.fill_(pointer)


def pretrain_teacher(data: DataOptions, model: TeacherOptions, config: DisCoConfig) -> dict[str, dict[str, float]]:
    """The verb ``pretrain-teacher``: MoCo-v2 (Chen et al. 2020) on unlabelled images; judge if there are labels, and draw."""
    if config.arm not in ("disco", "moco"):
        raise ValueError(f"a teacher is pre-trained by the arm moco, not {config.arm!r}")
    config.output_dir = config.output_dir or f"runs/disco-teacher-{name_of(data)}"
    config = dataclasses.replace(suited(data, config), arm="moco")
    backbone = model.backbone or (SAMPLE_TEACHER if data.data == "sample" else None)
    if backbone is None:
        raise ValueError("give --backbone, such as resnet50 or cnn:48-48-96-192x2")
    splits = load_data(data)
    console.print(LOSS_RISES, soft_wrap=True)
    encoder = new_encoder(backbone, splits, model.dim, model.hidden, config.seed)
    random = copy.deepcopy(encoder)
    trainer = fit(encoder, None, splits.train, config, data, model)
    models = {"random": random, "teacher": encoder}
    return finish(models, {"teacher": trainer}, splits, config)


def train(
    data: DataOptions, models: ModelOptions, options: TrainOptions, config: DisCoConfig
) -> dict[str, dict[str, float]]:
    """The verb ``train``: the teacher, if there is none; its student; judge if there are labels, and draw."""
    config.output_dir = config.output_dir or f"runs/disco-{name_of(data)}"
    config = suited(data, config)
    folder, sample = Path(str(config.output_dir)), data.data == "sample"
    student_name = models.student or (SAMPLE_STUDENT if sample else None)
    if student_name is None:
        raise ValueError("give --student, such as mobilenetv3_large_100, efficientnet_b0 or cnn:12-12-24-48")
    if config.arm != "moco" and models.teacher is None and not sample:
        raise ValueError(
            "give --teacher: pre-train one with `disco pretrain-teacher`, or name a checkpoint; or --arm moco"
        )
    if config.queue_init == "teacher" and models.teacher is None:
        raise ValueError(NO_QUEUE)
    splits = load_data(data)
    if config.arm not in ("mse_only", SWAV):  # these have no queue of negatives
        console.print(LOSS_RISES, soft_wrap=True)
    trainers: dict[str, DisCoTrainer] = {}
    teacher, queue = None, None
    if config.arm != "moco" and models.teacher is not None:
        shape = {} if Path(models.teacher).is_dir() else {"image_size": splits.image_size}
        teacher = load_teacher(models.teacher, models.teacher_backbone, **shape)
        queue = load_queue(models.teacher) if config.queue_init == "teacher" else None
    elif config.arm != "moco":
        own = dataclasses.replace(config, arm="moco", queue_init="random", output_dir=str(folder / "teacher"))
        teacher = new_encoder(SAMPLE_TEACHER, splits, 128, -1, config.seed)
        trainers["teacher"] = fit(teacher, None, splits.train, own, data)
    results: dict[str, dict[str, float]] = {}
    if teacher is not None:
        console.print(f"teacher {describe(teacher)}", soft_wrap=True)
        if judged(splits):
            results["teacher"] = evaluate(teacher.to(config.device), splits, autocast=True)
            metric, value = next(iter(results["teacher"].items()))
            console.print(f"its accuracy ({metric}) is {value:.1f} %", soft_wrap=True)

    def new_student(arm: str) -> Encoder:
        dim = 128 if teacher is None else teacher.dim
        return new_encoder(student_name, splits, dim, models.hidden, config.seed, teacher, batch_norm=arm == SWAV)

    networks = {"random": new_student(config.arm)}
    if teacher is not None:
        networks["teacher"] = teacher
    own_name = "MoCo-v2" if config.arm == "moco" else config.arm
    arms = {own_name: config}
    if teacher is not None and (sample if options.compare is None else options.compare):
        alone = dataclasses.replace(config, arm="moco", queue_init="random", output_dir=str(folder / "moco"))
        arms = {"MoCo-v2": alone, **arms}
    for name, own in arms.items():
        student = networks[name] = new_student(own.arm)
        guide = None if own.arm == "moco" else teacher
        trainers[name] = fit(student, guide, splits.train, own, data, models, queue=queue)
    return finish(networks, trainers, splits, config, results)


def name_of(data: DataOptions) -> str:
    """Of a data set, for a folder."""
    return Path(data.data.rstrip("/*")).name.split(":")[-1].split(".")[0] or "data"


def judged(splits: Splits) -> bool:
    """Whether there is something to judge by."""
    return splits.train.labels is not None and splits.test is not None and splits.test.labels is not None


def finish(
    networks: dict[str, Encoder],
    trainers: dict[str, DisCoTrainer],
    splits: Splits,
    config: DisCoConfig,
    known: dict[str, dict[str, float]] | None = None,
) -> dict[str, dict[str, float]]:
    """Judge every network, show the table, write metrics.json and the pictures."""
    results: dict[str, dict[str, float]] = {}
    last = list(trainers.values())[-1]
    if not last.is_world_process_zero():
        return results
    folder = Path(str(config.output_dir))
    if judged(splits):
        for name, network in networks.items():
            place: nn.Module = network.to(config.device)
            results[name] = (known or {}).get(name) or evaluate(place, splits, autocast=True)  # type: ignore[arg-type]
        write_json(folder / "metrics.json", results)
        columns = list(dict.fromkeys(c for metrics in results.values() for c in metrics))
        rows = [[name, *(f"{m[c]:.1f}" if c in m else "" for c in columns)] for name, m in results.items()]
        count = len(splits.test) if splits.test is not None else 0
        print_table(f"accuracy in percent of frozen features, {count} test images", ["network", *columns], rows)
        assert splits.test is not None
        features = {n: [extract_features(e, s) for s in (splits.train, splits.test)] for n, e in networks.items()}
        plot_neighbours(features, splits.train, splits.test, folder / "neighbours.png")
    else:
        console.print("no labels or no test images: nothing is judged; see `disco eval`", soft_wrap=True)
    plot_training({n: t.state.log_history for n, t in trainers.items()}, results, folder / "training.png")
    pictures = "training.png, neighbours.png" if results else "training.png"
    console.print(f"checkpoint and pictures ({pictures}): {folder}", soft_wrap=True)
    return results
