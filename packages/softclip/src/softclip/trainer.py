"""Training: the method's configuration, and its loss on the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from papercore.lab.cli import flag
from papercore.lab.training import ModuleTrainer, adapt_to_machine
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainingArguments

from softclip.batch import ImageRoiBatch
from softclip.checkpoints import ROI_WEIGHTS, WEIGHTS, save_clip, save_roi
from softclip.dataset import PairDataset
from softclip.loss import DIVERGENCES, SoftClipLoss
from softclip.model import SoftClipModel, normalized

# Arms of the comparison (specification of the ablation): what they change of the full method, soft_re. ``roi_tag`` says whether
# the loss between regions and tags is on, where their encoders learn.
ARMS: dict[str, dict[str, Any]] = {
    "soft_re": {"roi_tag": True},
    "soft": {"lam": 0.0, "roi_tag": True},
    "soft_self": {"guidance": "self", "roi_tag": False},
    "clip_roitag": {"beta": 0.0, "lam": 0.0, "roi_tag": True},
    "label_smoothing": {"beta": 0.1, "lam": 0.0, "guidance": "label_smoothing", "roi_tag": False},
    "clip": {"beta": 0.0, "lam": 0.0, "roi_tag": False},
}
MOST_SCALE = math.log(100)  # of logit_scale, before exponentiation, as in CLIP


@dataclass
class SoftClipConfig(TrainingArguments):
    """The method's own fields first, then the engine's defaults that differ.

    >>> config = SoftClipConfig(arm="soft", beta=0.5)  # without the relation term
    >>> config.build_loss().options["lam"], config.needs
    (0.0, True)
    """

    arm: str = flag(
        "soft_re: the method; soft: without the relation term; soft_self: guided by images and texts themselves; to compare "
        "with: clip, label_smoothing, clip_roitag (CLIP and the loss between regions and tags)",
        "soft_re",
    )
    beta: float = flag("weight of the similarities in the target, 0 to 1 (paper: not known; ours: 0.3)", 0.3)
    lam: float = flag("weight of the relation between negatives, >= 0 (paper: not known; ours: 1)", 1.0)
    divergence: str = flag("symmetric_kl, kl or ce", "symmetric_kl")
    target_scale: float | None = flag("scale of the similarities; by default the learnt one (ours)", None)
    clip_weight: float = flag("of CLIP's own loss, beside (ours: 0)", 0.0)
    roi_tag_weight: float = flag("of CLIP's loss between regions and tags, where their encoders learn (ours: 1)", 1.0)
    allow_untrained_teacher: bool = flag(
        "let --roi_tag_weight be 0 although regions are encoded by trained weights", False
    )
    chunk_size: int | None = flag("rows of logits formed at a time; by default as suits the cache", None)
    micro_batch_size: int | None = flag("pairs encoded at a time, if a step's do not fit (ViT towers only)", None)
    group_positives: bool = flag(
        "let pairs of one group (--group_field) be positives of each other, as several captions of one image are", False
    )
    crop: float = flag("least share of an image's area in a random crop, 0 to 1; 1: no crops", 0.9)

    output_dir: str | None = flag("folder of checkpoints and results; runs/softclip-DATA if not given", "")
    num_train_epochs: float = flag("epochs", 32)
    per_device_train_batch_size: int = flag("pairs in a step, on each device", 256)
    learning_rate: float = flag("peak, of AdamW", 5e-4)
    lr_scheduler_type: str = flag("schedule after warm-up", "cosine")
    warmup_steps: float = flag("steps, or their share of all", 0.05)
    weight_decay: float = flag("of matrices; not of biases, norms and the scale", 0.2)
    adam_beta2: float = flag("of AdamW", 0.98)
    adam_epsilon: float = flag("of AdamW", 1e-6)
    dataloader_drop_last: bool = flag("leave out an epoch's last, smaller batch", True)
    logging_steps: float = flag("steps between logs, or their share of all", 0.02)
    save_strategy: str = flag("when to save", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of new weights, crops and order", 0)

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {self.arm!r}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {self.divergence!r}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is a share of the area, above 0 and at most 1; got {self.crop}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps would leave each part with its own negatives only: give the whole batch and "
                "--micro_batch_size"
            )
        self.build_loss()
        self.remove_unused_columns = False
        self.label_names = []
        adapt_to_machine(self)
        super().__post_init__()

    @property
    def needs(self) -> bool:
        """Whether the arm looks at regions and tags."""
        return ARMS[self.arm]["roi_tag"]

    def build_loss(self, frozen: bool = False) -> SoftClipLoss:
        """The arm's loss, over all ranks. frozen: guides are features that do not learn, so that no loss is between them."""
        options = {
            name: getattr(self, name)
            for name in ("beta", "lam", "divergence", "target_scale", "clip_weight", "chunk_size")
        }
        options |= ARMS[self.arm]
        trained = options.pop("roi_tag") and not frozen
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return SoftClipLoss(
            **options,
            roi_tag_weight=self.roi_tag_weight if trained else 0.0,
            local_loss=True,
            gather_with_grad=True,
            world_size=world,
        )


class SoftClipTrainer(ModuleTrainer):
    """The transformers Trainer for a :class:`softclip.SoftClipModel`.

    Args:
        model: with a ROI encoder where the guides learn.
        model_cfg: the CLIP's configuration, as :func:`softclip.checkpoints.new_clip` gives it, for its checkpoints.
        args: a :class:`SoftClipConfig`.
        train_dataset: :class:`softclip.dataset.PairDataset`.

    Raises:
        ValueError: for fewer pairs than a step takes; for encoders of regions that nothing would train.

    Example:
        >>> import tempfile
        >>> from softclip.checkpoints import new_clip, tokenizer_of
        >>> from softclip.sample import render_scenes
        >>> pairs, (clip, cfg) = render_scenes(8), new_clip("tiny-vit", seed=0)
        >>> dataset = PairDataset(pairs, tokenizer_of(cfg), image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
        ...     args = SoftClipConfig(output_dir=folder, arm="soft_self", disable_tqdm=True, use_cpu=True, **step)
        ...     SoftClipTrainer(SoftClipModel(clip), cfg, args, train_dataset=dataset).train().global_step
        1
    """

    args: SoftClipConfig
    model: SoftClipModel
    train_dataset: PairDataset

    def __init__(self, model: SoftClipModel, model_cfg: dict[str, Any], args: SoftClipConfig, **kwargs: Any) -> None:
        pairs, step = len(kwargs["train_dataset"]), args.train_batch_size * args.world_size
        if args.dataloader_drop_last and pairs < step:
            raise ValueError(
                f"{pairs} pairs are fewer than the {step} of a step: give a smaller --per_device_train_batch_size"
            )
        if model.roi_encoder is not None and not args.roi_tag_weight and not args.allow_untrained_teacher:
            raise ValueError(
                "roi_tag_weight 0 leaves the encoder of regions as random as it starts: targets have no gradient. Give a weight, "
                "frozen guides, or --allow_untrained_teacher true"
            )
        super().__init__(model=model.to(memory_format=torch.channels_last), args=args, **kwargs)
        self.model_cfg = model_cfg
        self.loss = args.build_loss(frozen=model.roi_encoder is None)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        images, texts = inputs
        if images.images.dtype == torch.uint8:
            pixels = random_crops(images.images.float() / 255, self.args.crop, self.batch_generator())
            pixels = normalized(pixels, self.model.visual).contiguous(memory_format=torch.channels_last)
            images = ImageRoiBatch(pixels, images.roi, images.roi_mask)
        output = model(images, texts, self.args.micro_batch_size)
        loss = self.loss(**output)
        latest = self.loss.latest
        assert latest is not None
        parts = {name: getattr(latest, name) for name in ("soft", "relation", "roi_tag", "target_entropy")}
        self.note(**parts, scale=output["logit_scale"])
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; after each step the scale is kept at 100 at most, as in CLIP."""
        optimizer = super().create_optimizer(model)

        def clamp(*_: Any) -> None:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, MOST_SCALE)

        optimizer.register_step_post_hook(clamp)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save(output_dir or str(self.args.output_dir), self.model, self.model_cfg)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, module = Path(resume_from_checkpoint), model or self.model
        module.clip.load_state_dict(load_file(folder / WEIGHTS))
        if module.roi_encoder is not None:
            module.roi_encoder.load_state_dict(load_file(folder / ROI_WEIGHTS))


def save(folder: str | Path, model: SoftClipModel, model_cfg: dict[str, Any]) -> None:
    """A folder that open_clip's ``create_model("local-dir:FOLDER")`` loads, and the encoder of regions beside."""
    save_clip(folder, model.clip, model_cfg)
    if model.roi_encoder is not None:
        save_roi(folder, model.roi_encoder)


def random_crops(images: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Squares of ``least`` to 1 of each image's area, at random places, resized to the whole: (b, 3, h, w) -> (b, 3, h, w)."""
    if least == 1:
        return images
    b = len(images)
    draws = torch.rand(3, b, generator=generator).to(images.device)
    side = (least + (1 - least) * draws[0]).sqrt()
    theta = images.new_zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = ((2 * draws[1:] - 1) * (1 - side)).T
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
