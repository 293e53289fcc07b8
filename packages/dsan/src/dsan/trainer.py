"""Training: the method's configuration, and its two supervisions on the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from papercore.lab.cli import flag
from papercore.lab.training import ModuleTrainer, adapt_to_machine
from torch import Tensor, nn
from transformers import TrainingArguments

from dsan.augment import Augmentation
from dsan.data import WidthBuckets, WordBatch, Words
from dsan.images import normalize
from dsan.loss import DoubleSupervisionLoss
from dsan.metrics import word_accuracy
from dsan.model import DSAN


@dataclass
class DSANConfig(TrainingArguments):
    """The method's own fields first, then the engine's defaults that differ.

    >>> config = DSANConfig(enhancement_weight=0.5, optimizer="adadelta", learning_rate=1.0)
    >>> config.enhancement_weight, config.per_device_train_batch_size
    (0.5, 64)
    """

    enhancement_weight: float = flag("lambda, of the enhancement branch's loss, >= 0 (paper: not known; ours: 1)", 1.0)
    ctc_reduction: str = flag(
        "mean_per_sample, or torch_mean: each word's loss divided by its length", "mean_per_sample"
    )
    mask_weight: float = flag("of a loss of the text mask against the characters' boxes (paper: none known; 0)", 0.0)
    augment: bool = flag("change crops a little while training", True)
    optimizer: str = flag(
        "adamw, one cycle; or adadelta, rho 0.95 at a constant rate, as was usual in 2018 (rate 1)", "adamw"
    )

    output_dir: str | None = flag("folder of checkpoints and results; runs/dsan-DATA if not given", "")
    num_train_epochs: float = flag("epochs", 10)
    per_device_train_batch_size: int = flag("crops in a step, on each device", 64)
    learning_rate: float = flag("peak of the one-cycle schedule", 1e-3)
    warmup_steps: float = flag("steps to the peak, or their share of all", 0.1)
    weight_decay: float = flag("of matrices; not of biases and norms", 1e-4)
    max_grad_norm: float = flag("gradients are clipped to this norm", 5.0)
    dataloader_drop_last: bool = flag("leave out an epoch's last, smaller batch", True)
    logging_steps: float = flag("steps between logs, or their share of all", 0.02)
    eval_strategy: str = flag("when to read the validation crops", "epoch")
    save_strategy: str = flag("when to save", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of new weights, changes of crops and order", 0)

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "adadelta"):
            raise ValueError(f"optimizer must be adamw or adadelta; got {self.optimizer!r}")
        if self.mask_weight < 0:
            raise ValueError(f"mask_weight must not be negative, got {self.mask_weight}")
        DoubleSupervisionLoss(self.enhancement_weight, ctc_reduction=self.ctc_reduction)
        self.remove_unused_columns = False
        self.label_names = []
        adapt_to_machine(self)
        super().__post_init__()


class DSANTrainer(ModuleTrainer):
    """The transformers Trainer for a :class:`dsan.DSAN`.

    Args:
        model: with the branches that are to be trained.
        args: a :class:`DSANConfig`.
        train_dataset: :class:`dsan.data.Words` or more of them; labels are normalised, and fit their frames.
        validation: words to be read while training, or None.

    Raises:
        ValueError: for fewer crops than a step takes; for a loss that needs boxes, without boxes.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> crops = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 100), np.uint8)
        >>> words = Words.from_arrays(crops, ["stop", "exit", "open", "taxi"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
        ...     args = DSANConfig(output_dir=folder, disable_tqdm=True, use_cpu=True, **step)
        ...     DSANTrainer(DSAN(), args, train_dataset=words).train().global_step
        1
    """

    args: DSANConfig
    model: DSAN

    def __init__(self, model: DSAN, args: DSANConfig, *, validation: Words | None = None, **kwargs: Any) -> None:
        words, step = kwargs["train_dataset"], args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(words) < step:
            raise ValueError(
                f"{len(words)} crops are fewer than the {step} of a step: give a smaller --per_device_train_batch_size"
            )
        if validation is None:
            args.eval_strategy = "no"
        super().__init__(
            model=model.to(memory_format=torch.channels_last),
            args=args, eval_dataset=validation, data_collator=_in_tuple, **kwargs,
        )  # fmt: skip
        self.loss = DoubleSupervisionLoss(
            args.enhancement_weight,
            context=model.context_kind,
            enhancement=model.enhancement_kind or "ctc",
            ctc_reduction=args.ctc_reduction,
        )
        self.framed = model.enhancement_kind == "frame" and args.enhancement_weight > 0
        boxes = self.framed or args.mask_weight > 0
        self.augmentation = (Augmentation.of_greys() if boxes else Augmentation()) if args.augment else None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        (batch,) = inputs
        images = batch.images.float()
        if self.augmentation is not None:
            images = self.augmentation(batch.images, batch.widths, self.batch_generator())
        targets, lengths = self.model.charset.encode(batch.labels)
        branches = "both" if self.args.enhancement_weight and self.model.enhancement is not None else "ctx"
        output = model(
            normalize(images).contiguous(memory_format=torch.channels_last), batch.widths, (targets, lengths), branches
        )
        columns = None
        if self.framed:
            columns = self._columns(batch, output.enhancement.shape[1], targets, output.lengths)
        loss = self.loss(
            output.context, output.enhancement, targets.to(images.device), lengths, output.lengths, columns
        )
        total, terms = loss.loss, {"context": loss.context, "enhancement": loss.enhancement}
        if self.args.mask_weight:
            terms["mask"] = self._mask_loss(batch, output.attention)
            total = total + self.args.mask_weight * terms["mask"]
        self.note(**terms)
        return (total, output) if return_outputs else total

    def _columns(self, batch: WordBatch, frames: int, targets: Tensor, lengths: Tensor | None) -> Tensor:
        """(b, frames) classes: the character whose box covers a column's centre (the first of several), else the blank.

        Beyond a crop, and where its boxes are not known, -100, which the loss ignores.
        """
        boxes = _boxes(batch)
        centres = (torch.arange(frames) + 0.5) * batch.images.shape[3] / frames
        columns = torch.full((len(boxes), frames), -100)
        ids = targets.split([len(label) for label in batch.labels])
        for row, (own, word) in enumerate(zip(boxes, ids, strict=True)):
            if len(own):
                inside = (centres >= own[:, :1]) & (centres < own[:, :1] + own[:, 2:3])  # (characters, frames)
                columns[row] = torch.where(inside.any(0), word[inside.int().argmax(0)], 0)
        if lengths is not None:
            columns[torch.arange(frames) >= lengths.cpu().unsqueeze(1)] = -100
        return columns

    def _mask_loss(self, batch: WordBatch, mask: Tensor | None) -> Tensor:
        """Binary cross-entropy of the text mask against the characters' boxes, at the mask's resolution, where they are known."""
        if mask is None:
            raise ValueError("mask_weight needs text attention (--attention true)")
        boxes = _boxes(batch)
        known = [row for row, own in enumerate(boxes) if len(own)]
        mask = mask[known]
        height, width = mask.shape[2:]
        y, x = (
            (torch.arange(n) + 0.5) * side / n
            for n, side in ((height, batch.images.shape[2]), (width, batch.images.shape[3]))
        )
        wanted = torch.zeros(len(mask), 1, height, width)
        for row, at in enumerate(known):
            left, top, across, down = boxes[at].unbind(1)
            columns = (x >= left[:, None]) & (x < (left + across)[:, None])
            rows = (y >= top[:, None]) & (y < (top + down)[:, None])
            wanted[row, 0] = (rows[:, :, None] & columns[:, None]).any(0)
        with torch.autocast(mask.device.type, enabled=False):
            return F.binary_cross_entropy(mask.float(), wanted.to(mask.device).expand_as(mask))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Word accuracy, 0 to 1, of the validation words."""
        words: Any = eval_dataset or self.eval_dataset
        was = self.model.training
        readings = self.model.read_fitted(words.arrays(), batch_size=256)
        self.model.train(was)
        metrics = {f"{metric_key_prefix}_accuracy": word_accuracy([r.text for r in readings], words.labels)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Crops of like width share a batch, where widths differ."""
        words: Any = train_dataset or self.train_dataset
        if not self.model.size.keep_ratio:
            return super()._get_train_sampler(train_dataset)
        return WidthBuckets(words.widths, self.args.train_batch_size * self.args.world_size, seed=self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or Adadelta."""
        if self.optimizer is None and self.args.optimizer == "adadelta":
            self.optimizer = torch.optim.Adadelta(
                self.model.parameters(), lr=self.args.learning_rate, rho=0.95, eps=1e-8
            )
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """One cycle: by half a cosine from a 25th of the peak up to it, then down to nearly 0. Adadelta's rate is constant."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)

            def one_cycle(step: int) -> float:
                if self.args.optimizer == "adadelta":
                    return 1.0
                low, done = (
                    (0.04, step / warmup)
                    if step < warmup
                    else (4e-6, 1 - (step - warmup) / max(1, num_training_steps - warmup))
                )
                return low + (1 - low) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, max(0.0, done))))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), one_cycle)
        return self.lr_scheduler


def _in_tuple(batch: WordBatch) -> tuple[WordBatch]:
    """A batch in which the engine can look for its own keys."""
    return (batch,)


def _boxes(batch: WordBatch) -> list[Tensor]:
    """Of each crop (characters, 4), or (0, 4) where they are not known."""
    if batch.boxes is None or not any(map(len, batch.boxes)):
        raise ValueError("these crops have no boxes of characters, which --enhancement frame and --mask_weight need")
    return [torch.as_tensor(own, dtype=torch.float32).view(-1, 4) for own in batch.boxes]
