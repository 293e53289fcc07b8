"""Training on the Hugging Face engine: its configuration, its random crops, its schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from papercore.lab.cli import flag
from papercore.lab.training import ModuleTrainer, adapt_to_machine
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from iqa_distill.data import Rated, ReferencePool
from iqa_distill.distill import MASKS, MaskedQualityDistillation
from iqa_distill.images import Preprocessing, ScoreScale
from iqa_distill.metrics import srcc
from iqa_distill.training import LOSSES, Distillation, Training


@dataclass
class IQAConfig(TrainingArguments):
    """The method's own fields first, then the engine's defaults that differ. No other values of the paper were to be found.

    >>> config = IQAConfig(arm="mcd", mask_ratio=0.3)  # distillation, without regularisation
    >>> config.distils, config.regularises
    (True, False)
    """

    arm: str = flag(
        "full; base: scores alone; reg: no distillation; mcd: no regularisation; drd: direct features, no mask", "full"
    )
    loss: str = flag("of scores: l1 (descriptions of the paper), or smooth_l1 (DEIQT)", "l1")
    mcd_weight: float = flag("lambda 1, of masked quality-contrastive distillation (paper: not known)", 1.0)
    reg_weight: float = flag("lambda 2, of inductive-bias regularisation (paper: not known)", 1.0)
    mask: str = flag("spatial, channel (MGD in classification) or none (paper: not known)", "spatial")
    mask_ratio: float = flag("share of the student's features that is masked, [0, 1) (paper: not known)", 0.5)
    mcd_blocks: list[int] | None = flag(
        "blocks whose patches are used, one for each teacher layer; the last patches if not given", None
    )
    reverse: bool = flag("the bridge learns from the student, too", True)
    bridge: bool = flag("False: the Conv and Inv heads imitate their teachers' scores directly", True)
    hq_crops: int = flag(
        "fixed crops of each pristine image, whose features are computed once; 0: new crops at each step", 8
    )
    kind_weight: float = flag("of the kind of distortion, in a NAR-teacher's training; 0: it does not learn it", 0.5)
    step_schedule: bool = flag(
        "warm up for a third of the steps, a tenth for the last third (DEIQT: 3 of 9 epochs each); or lr_scheduler_type",
        True,
    )
    select: str = flag(
        "last: the last weights; val: those with the best SRCC on validation images, never on test images", "last"
    )

    output_dir: str | None = flag("folder of checkpoints and results; runs/iqa-distill-DATA if not given", "")
    num_train_epochs: float = flag("epochs; each shows every image `crops` times (DEIQT: 9, of 10 crops)", 9)
    per_device_train_batch_size: int = flag("crops in a step, on each device (DEIQT: 16)", 16)
    learning_rate: float = flag("of AdamW (DEIQT: 2e-4)", 2e-4)
    weight_decay: float = flag("of matrices; not of biases, norms, positions and tokens (DEIQT: 0.05)", 0.05)
    max_grad_norm: float = flag("gradients are clipped to this norm (DEIQT: 5)", 5.0)
    dataloader_drop_last: bool = flag("leave out an epoch's last, smaller batch", True)
    logging_steps: float = flag("steps between logs, or their share of all", 0.02)
    eval_strategy: str = flag("when to score the validation images", "epoch")
    save_strategy: str = flag("when to save", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of new weights, crops, masks and order", 0)

    def __post_init__(self) -> None:
        if self.arm not in ("full", "base", "reg", "mcd", "drd"):
            raise ValueError(f"arm must be full, base, reg, mcd or drd; got {self.arm!r}")
        if self.loss not in LOSSES or self.mask not in MASKS:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, mask one of {', '.join(MASKS)}")
        if self.select not in ("last", "val"):
            raise ValueError(f"select must be last or val; got {self.select!r}")
        if min(self.mcd_weight, self.reg_weight, self.kind_weight, self.hq_crops) < 0:
            raise ValueError("mcd_weight, reg_weight, kind_weight and hq_crops must not be negative")
        MaskedQualityDistillation(1, [1], ratio=self.mask_ratio)
        if self.select == "val":
            self.load_best_model_at_end, self.metric_for_best_model, self.greater_is_better = True, "srcc", True
        self.remove_unused_columns = False
        self.label_names = []
        adapt_to_machine(self)
        super().__post_init__()

    @property
    def distils(self) -> bool:
        """Whether the arm has a teacher that compares."""
        return self.arm in ("full", "mcd", "drd")

    @property
    def regularises(self) -> bool:
        """Whether the arm has teachers of inductive bias."""
        return self.arm in ("full", "reg")


class CropDraws(Dataset[Tensor]):
    """Each image so many times; an item is its number. Crops are cut, at random places, when a batch is on its way.

    >>> CropDraws(3, 10).__getitems__([0, 1, 5])
    {'index': tensor([0, 1, 2])}
    """

    def __init__(self, images: int, crops: int) -> None:
        self.images, self.crops = images, crops

    def __len__(self) -> int:
        return self.images * self.crops

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"index": torch.as_tensor(indices) % self.images}


class IQATrainer(ModuleTrainer):
    """The transformers Trainer for a student with its teachers (:mod:`iqa_distill.training`), and for each teacher.

    Args:
        model: a :class:`iqa_distill.training.Training`.
        args: an :class:`IQAConfig`.
        rated: the images to learn from, decoded.
        preprocessing, scale: of the network that is trained.
        pool: pristine images, for a model that compares.
        validation: images whose scores' SRCC is wanted while training.

    Raises:
        ValueError: for fewer crops than a step takes, and for no pool where one is needed.

    Example:
        >>> import tempfile
        >>> from iqa_distill import RKIQT
        >>> from iqa_distill.data import hashes
        >>> from iqa_distill.pixels import Pixels
        >>> images = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8)
        >>> pixels = Pixels.of(list(images), names=list("abcd"))
        >>> rated = Rated(pixels, np.array([1.0, 2.0, 3.0, 4.0]), None, hashes(pixels), pixels.names)
        >>> student = RKIQT("tiny", crop_size=32)
        >>> how = {"rated": rated, "preprocessing": student.preprocessing, "scale": ScoreScale.of(rated.scores)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
        ...     args = IQAConfig(output_dir=folder, arm="base", disable_tqdm=True, use_cpu=True, **step)
        ...     IQATrainer(Distillation(student), args, **how).train().global_step
        1
    """

    args: IQAConfig
    model: Training

    def __init__(
        self,
        model: Training,
        args: IQAConfig,
        *,
        rated: Rated,
        preprocessing: Preprocessing,
        scale: ScoreScale,
        pool: ReferencePool | None = None,
        validation: Rated | None = None,
        **kwargs: Any,
    ) -> None:
        draws, step = CropDraws(len(rated.pixels), preprocessing.crops), args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(draws) < step:
            raise ValueError(
                f"{len(draws)} crops are fewer than the {step} of a step: give a smaller --per_device_train_batch_size"
            )
        if model.compares and pool is None:
            raise ValueError("this needs a pool of pristine images: give --references")
        if validation is None:
            if args.select == "val":
                raise ValueError(
                    "select val needs validation images: give --validation, a share of the training images"
                )
            args.eval_strategy = "no"
        super().__init__(model=model, args=args, train_dataset=draws, eval_dataset=validation, **kwargs)
        self.rated, self.pool, self.preprocessing, self.scale = rated, pool, preprocessing, scale
        self.targets = torch.from_numpy(scale.normalize(rated.scores)).float()
        names = sorted(set(rated.distortions or ()))
        self.kinds = torch.tensor([names.index(d) for d in rated.distortions]) if rated.distortions else None
        self.bank: Tensor | None = None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        index = inputs["index"].cpu()
        generator = self.batch_generator()
        size, device = self.preprocessing.crop_size, self.args.device
        images = self._normal(self.rated.pixels.crops(index, size, generator))
        extra: dict[str, Any] = {}
        if self.model.compares:
            assert self.pool is not None
            references = self.rated.references
            own = [None if references is None else references[i] for i in index.tolist()]
            rows = self.pool.draw(own, generator)
            if not isinstance(self.model, Distillation):
                extra["hq"] = self._normal(self.pool.pixels.crops(rows, size, generator))
            else:
                extra["hq_features"] = self._pristine(rows, generator)
        if self.kinds is not None:
            extra["kinds"] = self.kinds[index].to(device)
        loss, terms = model(images, self.targets[index].to(device), generator=generator, **extra)
        self.note(**terms)
        return (loss, {}) if return_outputs else loss

    def _normal(self, crops: Tensor) -> Tensor:
        return self.preprocessing.normalize(crops.to(self.args.device, non_blocking=True))

    def _pristine(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The NAR-teacher's features of a random crop of each of these pristine images: new, or from a bank made once."""
        assert self.pool is not None
        assert isinstance(self.model, Distillation)
        nar, size, each = self.model.nar, self.preprocessing.crop_size, self.args.hq_crops
        assert nar is not None
        with torch.no_grad():
            if not each:
                return nar.features(self._normal(self.pool.pixels.crops(rows, size, generator)))
            if self.bank is None:
                own, everyone = torch.Generator().manual_seed(self.args.seed), torch.arange(len(self.pool.pixels))
                self.bank = torch.cat(
                    [
                        nar.features(self._normal(self.pool.pixels.crops(part, size, own)))
                        for part in everyone.repeat_interleave(each).split(64)
                    ]
                )
        chosen = rows * each + torch.randint(each, rows.shape, generator=generator)
        return self.bank[chosen.to(self.bank.device)]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """SRCC, and the mean absolute error of normalised scores, on the validation images."""
        rated: Any = eval_dataset or self.eval_dataset
        network = self.model.network.eval()
        found = predict(score_of(network, rated, self.pool), rated, self.preprocessing, self.args.device)
        wanted = self.scale.normalize(rated.scores)
        metrics = {
            f"{metric_key_prefix}_srcc": srcc(found, wanted),
            f"{metric_key_prefix}_mae": float(np.abs(found - wanted).mean()),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels; not what is one vector for each position, token or query."""
        apart = ("pos_embed", "cls_token", "tokens", "queries", "positions")
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and n.rsplit(".", 1)[-1] not in apart]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As ``lr_scheduler_type`` says; or DEIQT's: up from a thousandth for a third of the steps, a tenth in the last third."""
        if not self.args.step_schedule:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:

            def factor(step: int) -> float:
                done = 3 * step / num_training_steps
                return 0.001 + 0.999 * done if done < 1 else 1.0 if done < 2 else 0.1

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler


Score = Callable[[Tensor, Tensor], Tensor]


def score_of(network: Any, rated: Rated, pool: ReferencePool | None) -> Score:
    """A network's normalised scores of crops (batch, 3, c, c), given which images they are of.

    A NAR-teacher compares each crop with a pristine image of something else, the same at each call.
    """
    if hasattr(network, "predict"):
        return lambda crops, index: network.predict(crops)
    if not hasattr(network, "features"):
        return lambda crops, index: network(crops).score
    assert pool is not None
    references = rated.references

    def compare(crops: Tensor, index: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(index[0]))
        own = [None if references is None else references[i] for i in index.tolist()]
        size = network.preprocessing.crop_size
        pristine = pool.pixels.crops(pool.draw(own, generator), size, generator)
        return network(crops, network.preprocessing.normalize(pristine.to(crops.device))).score

    return compare


@torch.inference_mode()
def predict(
    score: Score, rated: Rated, preprocessing: Preprocessing, device: Any = "cpu", batch: int = 64
) -> np.ndarray:
    """Normalised scores (images,) of rated images: the mean over each one's test crops."""
    each = preprocessing.crops
    together = max(1, batch // each)
    found = []
    for start in range(0, len(rated.pixels), together):
        chosen = range(start, min(start + together, len(rated.pixels)))
        crops = torch.cat([preprocessing.crops_of(rated.pixels[i]) for i in chosen]).to(device)
        index = torch.tensor(chosen).repeat_interleave(each)
        found.append(score(preprocessing.normalize(crops), index).float().view(-1, each).mean(1).cpu())
    return torch.cat(found).double().numpy()
