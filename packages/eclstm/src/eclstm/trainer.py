"""Training on the Hugging Face engine: the method's configuration, its loss, and the verb ``train``."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console
from papercore.lab.training import ModuleTrainer, adapt_to_machine, resumable
from papercore.ops import seed_everything
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, TrainingArguments

from eclstm.data import RunToFailure, Segments, select_features
from eclstm.evaluate import evaluate, rmse
from eclstm.model import ECLSTMRegressor
from eclstm.plots import plot_predictions
from eclstm.sources import DataOptions, load


@dataclass
class ECLSTMConfig(TrainingArguments):
    """Network and training of one regressor; the defaults are the authors' naive setting on C-MAPSS (their code).

    >>> config = ECLSTMConfig(sequence_length=10, window_size=12, layers='[{"filters": [8], "kernel_sizes": [5]}]')
    >>> config.layers, config.learning_rate
    ([{'filters': [8], 'kernel_sizes': [5]}], 0.001)
    """

    sequence_length: int = flag("sub-windows T of a segment, the recurrent steps (authors' naive: 5)", 5)
    window_size: int = flag("cycles L of a sub-window (authors' naive: 16); a segment has T + L - 1", 16)
    network: str = flag("eclstm, or to compare with: lstm, convlstm, cnn-lstm", "eclstm")
    layers: list[Any] | str | None = flag(
        "JSON list with the arguments of each ECLSTM layer, or the width of each other one", None
    )
    preprocessing: list[Any] | str | None = flag(
        "JSON list of convolutions before them: filters, kernel_size, stride (authors' naive: none)", None
    )
    dense: list[int] = flag("widths of the hidden dense layers (authors' naive: 150)", [150])
    dropout: float = flag("share dropped before each dense layer, 0 to 1 (authors: 0)", 0.0)
    norm_momentum: float = flag("of batch normalisation; the authors' 0.01 suits only runs of thousands of steps", 0.1)
    conditions: int = flag("operating conditions, each with its own scaler; 1: one scaler (authors)", 1)
    condition_columns: list[str] = flag("columns that tell the condition, used if conditions > 1", ["setting_1"])
    select_features: bool = flag("drop columns that do not depend on the remaining life (authors: yes)", True)
    validation_share: float = flag(
        "share of the training units to validate on (authors: the last 7.5 % of segments)", 0.1
    )
    every: int = flag("use every n-th training segment only", 1)
    patience: int = flag("stop after so many epochs without a better validation RMSE (authors: 15)", 15)

    output_dir: str | None = flag("folder of checkpoints and results; runs/eclstm-DATA if not given", "")
    num_train_epochs: float = flag("largest number of epochs (authors: 30)", 30)
    per_device_train_batch_size: int = flag("segments in a step, on each device (authors: 15)", 15)
    per_device_eval_batch_size: int = flag("segments in an evaluation step", 1024)
    learning_rate: float = flag("of Adam, without weight decay (authors: 1e-3)", 1e-3)
    adam_epsilon: float = flag("of Adam (Keras and authors: 1e-7)", 1e-7)
    optim: str = flag("optimizer; without weight decay AdamW is Adam", "adamw_torch_fused")
    max_grad_norm: float = flag("gradient clipping; 0: none (authors)", 0.0)
    lr_scheduler_type: str = flag("schedule; authors: x 0.3 after 5 epochs without improvement", "reduce_lr_on_plateau")
    lr_scheduler_kwargs: dict[str, Any] | str | None = flag("of the schedule", None)
    eval_strategy: str = flag("when to validate", "epoch")
    save_strategy: str = flag("when to save", "epoch")
    logging_strategy: str = flag("when to log", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep beside the best", 2)
    load_best_model_at_end: bool = flag("end with the best epoch's weights (authors: yes)", True)
    metric_for_best_model: str | None = flag("what decides which epoch is best", "rmse")
    greater_is_better: bool | None = flag("whether more of it is better", False)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of weights, data order and the split of units", 0)

    def __post_init__(self) -> None:
        for name in ("layers", "preprocessing"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{name} is not a JSON list: {error}") from None
        for name in ("every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and self.lr_scheduler_kwargs is None:
            # torch counts the bad epochs it tolerates, Keras those it waits: 4 is Keras's 5.
            self.lr_scheduler_kwargs = {"factor": 0.3, "patience": 4}
        self.label_names = ["labels"]
        adapt_to_machine(self)
        super().__post_init__()
        if self.train_batch_size == 1:
            transformers.utils.logging.get_logger("eclstm").warning(
                "a batch of 1 gives batch normalisation noisy statistics"
            )


class ECLSTMTrainer(ModuleTrainer):
    """Mean squared error in cycles on capped labels; stops early and ends with the best epoch.

    Args:
        model: a :class:`eclstm.ECLSTMRegressor` (:func:`build_model` makes one that fits the data).
        args: an :class:`ECLSTMConfig`.
        train_dataset, eval_dataset: :class:`eclstm.data.Segments`, or any that give segments and labels.

    Example:
        >>> import tempfile
        >>> from eclstm.simulated import simulate
        >>> fleet = simulate(units=2, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"num_train_epochs": 1, "every": 50, "disable_tqdm": True, "use_cpu": True}
        ...     args = ECLSTMConfig(output_dir=folder, **step)
        ...     model = build_model(fleet, args, cap=120)
        ...     train, validation = split_segments(fleet, model, args)
        ...     result = ECLSTMTrainer(model, args, train, validation).train()
        >>> result.metrics["epoch"]
        1.0
    """

    def __init__(
        self, model: nn.Module, args: ECLSTMConfig, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any
    ) -> None:
        callbacks = [*kwargs.pop("callbacks", ())]
        if args.load_best_model_at_end:
            callbacks.append(EarlyStoppingCallback(args.patience))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=_metrics,
            callbacks=callbacks,
            **kwargs,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        predicted = model(inputs["segments"])
        loss = F.mse_loss(predicted, inputs["labels"])
        return (loss, {"predictions": predicted}) if return_outputs else loss


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"rmse": rmse(np.asarray(prediction.label_ids), np.asarray(prediction.predictions))}


def build_model(table: RunToFailure, config: ECLSTMConfig, cap: float | None) -> ECLSTMRegressor:
    """A regressor for these histories: features chosen, scaler fitted, output started at the mean label."""
    many = config.conditions > 1
    features = select_features(table, cap) if config.select_features else table.columns
    model = ECLSTMRegressor(
        features=features,
        sequence_length=config.sequence_length,
        window_size=config.window_size,
        network=config.network,
        layers=config.layers,
        preprocessing=cast(list[Any], config.preprocessing or []),
        dense=config.dense,
        dropout=config.dropout,
        condition_columns=config.condition_columns if many else (),
        conditions=config.conditions,
        norm_momentum=config.norm_momentum,
        cap=cap,
    )
    labels = table.labels(cap)
    rows = torch.from_numpy(table.rows(model.columns))
    model.standardize.fit(rows, _centres(rows[:, : len(config.condition_columns)].numpy(), config) if many else None)
    # Labels reach 120 and raw outputs start near 0: spare the first epochs learning the mean.
    nn.init.constant_(model.output.bias, float(labels.mean()))
    return model


def _centres(columns: np.ndarray, config: ECLSTMConfig) -> Tensor:
    """Cluster the condition columns: the best of several k-means runs."""
    different = len(np.unique(columns, axis=0))
    if different < config.conditions:
        raise ValueError(
            f"conditions {config.conditions}: condition_columns {config.condition_columns} have only {different} different values"
        )
    scale = columns.std(0)
    if (scale == 0).any():
        raise ValueError(
            f"condition_columns {config.condition_columns}: one is constant, so it tells no conditions apart"
        )
    scaled = columns / scale
    best = None
    for restart in range(20):
        centres, at = kmeans2(scaled, config.conditions, minit="++", seed=restart, missing="warn")
        distance = float(np.square(scaled - centres[at]).sum())
        if best is None or distance < best[0]:
            best = (distance, centres)
    assert best is not None
    return torch.as_tensor(best[1] * scale)


def split_segments(table: RunToFailure, model: ECLSTMRegressor, config: ECLSTMConfig) -> tuple[Segments, Segments]:
    """Training and validation segments of different units."""
    kept, held_out = table.split(config.validation_share, config.seed)
    train, validation = (Segments(part, model.columns, model.rows, part.labels(model.cap)) for part in (kept, held_out))
    return train.thin(config.every), validation


def fit(
    data: DataOptions, config: ECLSTMConfig, train: RunToFailure, may_change: Collection[str] = ()
) -> ECLSTMTrainer:
    """Train, or go on with training, in ``config.output_dir``; the trainer's model is the best epoch's.

    A run may be continued with other values of the fields in ``may_change`` (more epochs, say).
    """
    checkpoint = resumable(str(config.output_dir), data, config, may_change=may_change)
    seed_everything(config.seed)
    model = build_model(train, config, data.cap)
    trainer = ECLSTMTrainer(model, config, *split_segments(train, model, config))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def train(data: DataOptions, config: ECLSTMConfig) -> dict[str, float]:
    """The verb ``train``: fit, save, judge on the test units, and draw."""
    config.output_dir = config.output_dir or f"runs/eclstm-{data.name}"
    folder = Path(config.output_dir)
    training, test = load(data, config.seed)
    trainer = fit(data, config, training)
    result = evaluate(trainer.model, test)
    if trainer.is_world_process_zero():
        trainer.save_model(str(folder))
        write_json(folder / "metrics.json", result.metrics)
        plot_predictions(result, folder / "predicted.png", data.name, trainer.state.log_history)
        result.show(data.name)
        console.print(f"checkpoint {folder}, plot {folder / 'predicted.png'}", soft_wrap=True)
    return result.metrics
