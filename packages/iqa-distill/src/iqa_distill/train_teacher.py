"""The verb ``teacher``: a NAR-teacher, from human scores or, without any, from a full-reference measure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console

from iqa_distill.data import DataOptions, Rated, ReferencePool, check_leakage, hashes, load_pool, load_ratings
from iqa_distill.fit import fit, judge
from iqa_distill.images import ScoreScale
from iqa_distill.metrics import srcc
from iqa_distill.pixels import Pixels
from iqa_distill.plots import plot_training
from iqa_distill.pool import make_pool
from iqa_distill.teacher import NARTeacher, default_crop
from iqa_distill.trainer import IQAConfig
from iqa_distill.training import TeacherTraining
from iqa_distill.weights import load_weights, read_weights

GATE = 0.7  # SRCC on held-out images from which a teacher has something to teach (ours)
HELD_OUT = 0.1  # share of the pristine images that it is judged on
WIDER = 32  # pixels by which a distorted piece is larger than a crop of it


@dataclass
class TeacherOptions:
    """What the teacher is, and what it learns from."""

    nar_backbone: str = flag(
        "tiny, from scratch; inception_resnet_v2 (descriptions of the paper) or resnet50, frozen", "tiny"
    )
    nar_weights: str | None = flag("file of pretrained weights for that backbone", None)
    dim: int | None = flag("width of its features; 64 for tiny, else 256, if not given", None)
    depth: int = flag("transformer layers, each of which is taught", 2)
    labels: str = flag(
        "gmsd: pieces of --references, distorted here, labelled by minus GMSD, no human; human: the scores of --data",
        "gmsd",
    )
    pieces: int = flag("of each pristine image, for gmsd", 15)

    def __post_init__(self) -> None:
        if self.labels not in ("gmsd", "human"):
            raise ValueError(f"labels must be gmsd or human; got {self.labels!r}")


def teacher(data: DataOptions, options: TeacherOptions, config: IQAConfig) -> float:
    """The verb ``teacher``."""
    config.output_dir = config.output_dir or "runs/iqa-distill-teacher"
    if options.labels == "human":
        splits = load_ratings(dataclasses.replace(data, validation=data.validation or HELD_OUT))
        assert splits.validation is not None
        if splits.pool is None:
            raise ValueError(f"{data.data} has no pristine images: give --references")
        return train_teacher(splits.train, splits.validation, splits.pool, data, options, config)
    pool = load_pool(data.references) if data.references else load_ratings(data).pool
    if pool is None:
        raise ValueError("give --references, a folder of pristine images to distort")
    return teach_by_gmsd(pool, data, options, config)


def teach_by_gmsd(pool: ReferencePool, data: DataOptions, options: TeacherOptions, config: IQAConfig) -> float:
    """A teacher whose labels are minus the GMSD of pieces of pristine images that are distorted here; see :func:`train_teacher`.

    A tenth of the pristine images, one at least, is held out: its pieces are what the teacher is judged by.

    Raises:
        ValueError: for fewer than 3 pristine images.
    """
    if len(pool) < 3:
        raise ValueError(f"a teacher needs at least 3 pristine images, one of them to judge it by; got {len(pool)}")
    cache = Path(str(config.output_dir)) / "pool.npz"
    cache.parent.mkdir(parents=True, exist_ok=True)
    arrays = [pool.pixels[i].movedim(0, -1).numpy() for i in range(len(pool))]
    side = (data.crop_size or default_crop(options.nar_backbone)) + WIDER
    with config.main_process_first(local=False):  # the others read it
        drawn = make_pool(arrays, options.pieces, crop=side, seed=config.seed, cache=cache)
    known = len(pool) - max(1, round(HELD_OUT * len(pool)))

    def part(chosen: np.ndarray) -> Rated:
        rows = np.flatnonzero(chosen)
        names = [pool.ids[row] for row in drawn.references[rows]]
        pixels = Pixels.of([drawn.images[i] for i in rows], names)
        return Rated(
            pixels, drawn.labels[rows], names, hashes(pixels), names, [f"{kind:02}" for kind in drawn.kinds[rows]]
        )

    rest = ReferencePool(pool.pixels.select(range(known)), pool.ids[:known])
    return train_teacher(part(drawn.references < known), part(drawn.references >= known), rest, data, options, config)


def train_teacher(
    rated: Rated, held: Rated, pool: ReferencePool, data: DataOptions, options: TeacherOptions, config: IQAConfig
) -> float:
    """Train, or go on with training, a NAR-teacher in ``config.output_dir``. teacher.json there says how good it is, on what.

    Args:
        rated: images to learn from. held: images to judge by. pool: pristine images to compare with.

    Returns:
        SRCC on ``held``.
    """
    folder = Path(str(config.output_dir))
    kinds = len(set(rated.distortions or ())) if config.kind_weight else 0
    torch.manual_seed(config.seed)
    network = NARTeacher(
        options.nar_backbone, crop_size=data.crop_size, dim=options.dim, depth=options.depth, kinds=kinds, crops=data.crops,
        scale=dataclasses.astuple(ScoreScale.of(rated.scores)),
    )  # fmt: skip
    if options.nar_weights is not None:
        load_weights(network.trunk, read_weights(options.nar_weights), options.nar_weights)
    trainer = fit(
        TeacherTraining(network, config.kind_weight), rated, network.preprocessing, network.scale, config, data, options,
        pool=pool, validation=held,
    )  # fmt: skip
    found = srcc(judge(network, held, pool), held.scores)
    if trainer.is_world_process_zero():
        plot_training(folder / "training.png", trainer.state.log_history)
        write_json(folder / "teacher.json", {"held_out_srcc": found, "ids": [*rated.ids, *hashes(pool.pixels)]})
        console.print(
            f"NAR-teacher {folder}: SRCC {found:.3f} on {len(held)} images that were held out", soft_wrap=True
        )
    return found


def load_teacher(folder: str | Path, test_ids: Sequence[str] = ()) -> tuple[NARTeacher, str | None]:
    """The NAR-teacher of a folder that the verb ``teacher`` wrote, and a warning if it is too weak to teach.

    Args:
        test_ids: images that it must not have seen.

    Raises:
        ValueError: if it has seen one of them. OSError: for another folder.
    """
    record: dict[str, Any] = json.loads((Path(folder) / "teacher.json").read_text())
    check_leakage(record["ids"], test_ids)
    network: NARTeacher = NARTeacher.from_pretrained(folder)
    found, warning = record["held_out_srcc"], None
    if not found >= GATE:
        warning = (
            f"{folder}: the teacher's SRCC on held-out images is {found:.2f}; below {GATE} nothing can be concluded from what a "
            "student learns of it: train it longer, or on more images"
        )
    return network.eval(), warning
