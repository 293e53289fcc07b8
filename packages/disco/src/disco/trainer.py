"""Training on the Hugging Face engine: its configuration, its views, its optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.training import ModuleTrainer, adapt_to_machine
from torch import nn
from transformers import TrainingArguments

from disco.augment import Augmentation
from disco.data import Images
from disco.encoder import Encoder
from disco.model import ARMS, DisCo
from disco.swav import DisCoSwAV, swav_crops
from disco.teacher_cache import FixedViews

SWAV = "disco-swav"  # the arm of a training module of its own
_NOT_SWAV = (
    "distill_reduction", "queue_size", "queue_init", "key_momentum", "teacher_mode", "joint_views", "bn_splits", "fixed_views",
)  # fmt: skip


@dataclass
class DisCoConfig(TrainingArguments):
    """Loss and training of one student.

    >>> config = DisCoConfig(arm="seed", seed_temperature=0.02)
    >>> config.queue_for(50_000), config.key_momentum_for(50_000)  # where neither is given
    (8192, 0.99)
    """

    arm: str = flag(f"{', '.join(ARMS)}, {SWAV}; moco takes no teacher", "disco")
    distill_weight: float | None = flag(
        "weight of the squared distance from the teacher, averaged over the batch; 32 if not given (authors: a sum, on 8 devices "
        "of 32 images each, which is 32 on the mean), in disco-swav 1 (authors), averaged over dimensions, too",
        None,
    )
    distill_reduction: str = flag("mean: over the batch; sum (authors, with weight 1): grows with it", "mean")
    temperature: float | None = flag(
        "of the contrast with the queue, or with the prototypes of disco-swav; 0.2, or 0.1, if not given (authors)",
        None,
    )
    queue_size: int | None = flag(
        "keys in the queue; the largest power of two up to a quarter of the images, at most 65536, if not given "
        "(authors: 65536)",
        None,
    )
    queue_init: str = flag("random, or teacher: with the queue in the teacher's MoCo checkpoint (authors)", "random")
    key_momentum: float | None = flag(
        "of the key encoder; 0.999 (authors), below 50,000 steps 0.99, if not given", None
    )
    teacher_mode: str = flag("eval, or train: with batch statistics, and running ones that drift (authors)", "eval")
    joint_views: bool = flag("the student takes both views in one pass: faster, other batch statistics", False)
    bn_splits: int = flag("parts of a batch with batch statistics of their own (authors: 8 devices)", 1)
    seed_temperature: float = flag("the teacher's, in the arm seed (its program: 1e-4)", 0.01)
    prototypes: int = flag("of disco-swav (authors: 3000)", 3000)
    small_crops: int = flag(
        "of disco-swav, beside two large ones; 0 for networks of a fixed image size (authors: 6)", 6
    )
    frozen_prototype_steps: int | None = flag(
        "in disco-swav, steps in which the prototypes stay; a hundredth of all if not given (authors: 5005 of 500,400)",
        None,
    )
    swav_queue: int = flag("embeddings of each large crop that join disco-swav's assignment (authors: 3840)", 3840)
    swav_queue_after: int | None = flag(
        "steps after which they join; 0.075 of all if not given (authors: 15 of 200 epochs)", None
    )
    fixed_views: int = flag(
        "so many views of each image, the same in all epochs, which the teacher sees once; 0: new ones always (authors)",
        0,
    )
    fixed_views_file: str | None = flag(
        "where to keep the teacher's embeddings of them; in OUTPUT_DIR if not given", None
    )
    lr_per_epoch: bool = flag("change the learning rate at each epoch, not each step (authors)", False)

    output_dir: str | None = flag("folder of checkpoints and results; runs/disco-DATA if not given", "")
    num_train_epochs: float = flag("epochs (authors: 200)", 200)
    per_device_train_batch_size: int = flag("images in a step, on each device (authors: 32 on 8)", 256)
    learning_rate: float = flag(
        "of SGD at 256 images a step over all devices; scales with them (authors: 0.03; of disco-swav 0.3)", 0.03
    )
    lr_scheduler_type: str = flag("schedule (authors: cosine to 0, no warm-up)", "cosine")
    weight_decay: float = flag("of SGD, on all parameters (authors: 1e-4; of disco-swav 1e-6)", 1e-4)
    dataloader_drop_last: bool = flag("leave out an epoch's last, smaller batch (authors)", True)
    logging_steps: float = flag("steps between logs, or their share of all", 0.02)
    save_strategy: str = flag("when to save", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of new weights, views and data order", 0)

    def __post_init__(self) -> None:
        if self.arm not in (*ARMS, SWAV):
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, {SWAV}; got {self.arm!r}")
        changed = [name for name in _NOT_SWAV if getattr(self, name) != self.__dataclass_fields__[name].default]
        if self.arm == SWAV and changed:
            raise ValueError(f"the arm {SWAV} has no {', '.join(changed)}")
        if self.queue_init not in ("random", "teacher"):
            raise ValueError(f"queue_init must be random or teacher, got {self.queue_init!r}")
        if self.queue_init == "teacher" and self.arm == "mse_only":
            raise ValueError("queue_init teacher: the arm mse_only has no queue")
        if self.fixed_views and self.teacher_mode == "train":
            raise ValueError("fixed_views needs teacher_mode eval: batch statistics differ from step to step")
        self.remove_unused_columns = False
        self.label_names = []
        adapt_to_machine(self)
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # several by torchrun: one process with replicas would have a queue for each

    def queue_for(self, images: int) -> int:
        """Keys in the queue for a data set of so many images; at least those of a step."""
        if self.queue_size is not None:
            return self.queue_size
        step = self.train_batch_size * self.world_size
        return max(step, min(65536, 2 ** math.floor(math.log2(max(4, images) / 4))))

    def key_momentum_for(self, images: int) -> float:
        """The key encoder's momentum for a run over so many images."""
        if self.key_momentum is not None:
            return self.key_momentum
        return 0.999 if self.steps_for(images) >= 50_000 else 0.99

    def steps_for(self, images: int) -> float:
        """Steps of a run over so many images."""
        batch = self.train_batch_size * self.world_size
        return self.max_steps if self.max_steps > 0 else self.num_train_epochs * images / batch


class DisCoTrainer(ModuleTrainer):
    """The transformers Trainer for :class:`disco.DisCo` and :class:`disco.DisCoSwAV`.

    Args:
        model: the training module, made by :func:`disco.train.build` or by hand.
        args: a :class:`DisCoConfig`.
        train_dataset: :class:`disco.data.Images`; ``images`` of its batches are uint8.
        encoder: whose image size and normalisation the views have; the student, if it is an :class:`disco.Encoder`.
        views: fixed ones with the teacher's embeddings, instead of new ones.

    Raises:
        ValueError: for fewer images than a step takes.

    Example:
        >>> import tempfile
        >>> images = Images(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8))
        >>> teacher, student = (Encoder(f"cnn:{width}", dim=16, hidden=32, image_size=8) for width in ("8-16", "4-4"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
        ...     args = DisCoConfig(output_dir=folder, disable_tqdm=True, use_cpu=True, **step)
        ...     DisCoTrainer(DisCo(student, teacher, queue_size=4), args, train_dataset=images).train().global_step
        1
    """

    args: DisCoConfig
    model: DisCo | DisCoSwAV

    def __init__(
        self,
        model: DisCo | DisCoSwAV,
        args: DisCoConfig,
        *,
        train_dataset: Images,
        encoder: Encoder | None = None,
        views: FixedViews | None = None,
        **kwargs: Any,
    ) -> None:
        step = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(train_dataset) < step:
            raise ValueError(
                f"{len(train_dataset)} images are fewer than the {step} of a step: give a smaller --per_device_train_batch_size"
            )
        super().__init__(
            model=model.to(memory_format=torch.channels_last), args=args, train_dataset=train_dataset, **kwargs
        )
        encoder = encoder or model.student  # type: ignore[assignment]
        assert isinstance(encoder, Encoder)
        self.encoder, self.views = encoder, views
        self.augmentation = views.augmentation if views else Augmentation.moco(encoder.image_size)
        self.crops = swav_crops(encoder.image_size, args.small_crops) if isinstance(model, DisCoSwAV) else []

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        images, index = inputs["images"], inputs["index"].cpu()
        generator = self.batch_generator()
        known = None
        augmentations = self.crops or [self.augmentation] * 2
        if self.views is None:
            draws = [augmentation.draw(len(images), generator) for augmentation in augmentations]
        else:
            pair = self.views.pair(len(images), generator)
            draws = [self.views.of(index, view) for view in pair]
            if self.views.embeddings is not None:
                teacher_q, teacher_k = (self.views.teacher(index, view).to(images.device) for view in pair)
                known = teacher_q, teacher_k
        views = [
            self.encoder.normalize(augmentation(images, drawn)).contiguous(memory_format=torch.channels_last)
            for augmentation, drawn in zip(augmentations, draws, strict=True)
        ]
        output = model(views) if self.crops else model(*views, known)
        self.note(contrast=output.contrast, distill=output.distill)
        return (output.loss, {}) if return_outputs else output.loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """SGD with momentum 0.9 on all of the student's parameters, alike."""
        if self.optimizer is None:
            images = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            self.optimizer = torch.optim.SGD(
                [p for p in self.model.parameters() if p.requires_grad],
                lr=self.args.learning_rate * images / 256,
                momentum=0.9,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As ``lr_scheduler_type`` says; or the authors' cosine, epoch by epoch."""
        if not self.args.lr_per_epoch:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            epochs = math.ceil(self.args.num_train_epochs)
            steps = math.ceil(num_training_steps / epochs)

            def factor(step: int) -> float:
                return 0.5 * (1 + math.cos(math.pi * (step // steps) / epochs))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler
