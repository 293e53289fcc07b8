"""Train a network, or go on with it; and score images by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast
from papercore.lab.training import resumable
from papercore.ops import seed_everything

from iqa_distill.data import Rated, ReferencePool
from iqa_distill.images import Preprocessing, ScoreScale
from iqa_distill.trainer import IQAConfig, IQATrainer, predict, score_of
from iqa_distill.training import Training


def fit(
    model: Training,
    rated: Rated,
    preprocessing: Preprocessing,
    scale: ScoreScale,
    config: IQAConfig,
    *record: Any,
    pool: ReferencePool | None = None,
    validation: Rated | None = None,
) -> IQATrainer:
    """Train, or go on with training, in ``config.output_dir``, where the network is saved.

    Args:
        record: the other options that define the run.
    """
    checkpoint = resumable(Path(str(config.output_dir)), config, *record)
    seed_everything(config.seed)
    trainer = IQATrainer(
        model, config, rated=rated, preprocessing=preprocessing, scale=scale, pool=pool, validation=validation
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    broadcast(list(model.buffers()))  # batch statistics, of which each process has its own: all learn from one teacher
    if trainer.is_world_process_zero():
        model.network.save_pretrained(str(config.output_dir))
    return trainer


def judge(network: Any, rated: Rated, pool: ReferencePool | None = None) -> np.ndarray:
    """A network's scores of some images, (images,), in the units that it was trained on. A NAR-teacher needs ``pool``."""
    network.eval()
    found = predict(score_of(network, rated, pool), rated, network.preprocessing, next(network.parameters()).device)
    return network.scale.restore(found)
