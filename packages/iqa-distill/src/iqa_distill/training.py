"""What is optimised: a student with its teachers, a NAR-teacher, a teacher of inductive bias. Each maps a batch to its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from iqa_distill.bias import BiasTeacher
from iqa_distill.distill import MaskedQualityDistillation
from iqa_distill.model import RKIQT
from iqa_distill.regularize import InductiveBiasRegularization
from iqa_distill.teacher import NARTeacher

Loss = tuple[Tensor, dict[str, Tensor]]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class Training(nn.Module):
    """A module whose checkpoints are all its weights. ``network`` is what is kept; ``compares``: it needs pristine crops."""

    compares = False

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def save_pretrained(self, folder: str | Path) -> None:
        """All that a stopped training needs to go on, frozen teachers excepted, as safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self, str(Path(folder) / "model.safetensors"))


class Distillation(Training):
    """RKIQT's training: ``L = |Y - y| + mcd_weight L_MCD + reg_weight L_reg``.

    Args:
        student: what is to be kept.
        nar: the teacher that compares, or None for no masked quality-contrastive distillation.
        bias: teachers by kind, "conv" and "inv", or None for no inductive-bias regularisation.
        loss: "l1" (descriptions of the paper), or "smooth_l1" (DEIQT).
        mcd_weight, reg_weight: the paper's lambdas, whose values were not to be found; ours: 1, for normalised scores.
        blocks: numbers of the student's blocks whose patches the teacher's layers are made from, one for each layer; None: the
            last patches, normalised, for all.
        mcd, reg: options of :class:`iqa_distill.MaskedQualityDistillation` and :class:`iqa_distill.InductiveBiasRegularization`.

    The teachers are in eval mode, receive no gradient, and are in no checkpoint; they move along to a device.
    """

    def __init__(
        self,
        student: RKIQT,
        nar: NARTeacher | None = None,
        bias: Mapping[str, BiasTeacher] | None = None,
        *,
        loss: str = "l1",
        mcd_weight: float = 1.0,
        reg_weight: float = 1.0,
        blocks: Sequence[int] | None = None,
        mcd: Mapping[str, Any] | None = None,
        reg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(student)
        self.loss = LOSSES[loss]
        self.mcd_weight, self.reg_weight, self.blocks = mcd_weight, reg_weight, tuple(blocks or ())
        self.mcd = self.reg = None
        if nar is not None:
            if blocks is not None and len(self.blocks) != nar.depth:
                raise ValueError(
                    f"{len(self.blocks)} student blocks for a teacher of {nar.depth} layers: give one for each"
                )
            if nar.preprocessing.crop_size != student.preprocessing.crop_size:
                raise ValueError(
                    f"the teacher sees crops of {nar.preprocessing.crop_size} pixels, the student of "
                    f"{student.preprocessing.crop_size}: they must be equal"
                )
            self.mcd = MaskedQualityDistillation(student.vit.embed_dim, [nar.dim] * nar.depth, **(mcd or {}))
        if bias:
            self.reg = InductiveBiasRegularization({kind: t.channels for kind, t in bias.items()}, **(reg or {}))
        self.compares = nar is not None
        # In plain containers, and so not among the submodules.
        self._nar, self._bias = [nar] if nar is not None else [], dict(bias or {})
        for teacher in self._frozen:
            teacher.eval().requires_grad_(False)

    @property
    def _frozen(self) -> list[nn.Module]:
        return [*self._nar, *self._bias.values()]

    @property
    def nar(self) -> NARTeacher | None:
        """The teacher that compares, if there is one."""
        return self._nar[0] if self._nar else None

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)
        for teacher in self._frozen:
            teacher._apply(fn, recurse)
        return self

    def forward(
        self, images: Tensor, targets: Tensor, hq_features: Tensor | None = None, generator: torch.Generator | None = None,
        kinds: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """Normalised crops (batch, 3, c, c) and scores (batch,); ``hq_features`` of pristine crops, by the NAR-teacher."""
        output = self.network(images, self.blocks)
        terms = {"score": self.loss(output.score, targets)}
        total = terms["score"]
        if self.mcd is not None:
            with torch.no_grad():
                layers = self._nar[0](images, hq_features=hq_features).layers
            seen = output.blocks or output.patches
            terms["mcd"] = self.mcd(seen, layers, generator=generator)
            total = total + self.mcd_weight * terms["mcd"]
        if self.reg is not None:
            with torch.no_grad():
                taught = {kind: teacher(images) for kind, teacher in self._bias.items()}
            terms["reg"], _ = self.reg(taught, output.conv, output.inv)
            total = total + self.reg_weight * terms["reg"]
        return total, terms


class TeacherTraining(Training):
    """The NAR-teacher's: L1 on normalised scores (as CVRKD-IQA), and cross-entropy of the distortion if it has that head."""

    compares = True

    def __init__(self, teacher: NARTeacher, kind_weight: float = 0.5) -> None:
        super().__init__(teacher)
        self.kind_weight = kind_weight

    def forward(
        self, images: Tensor, targets: Tensor, hq: Tensor | None = None, generator: torch.Generator | None = None,
        kinds: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """``hq``: pristine crops; ``kinds``: (batch,) numbers of the distortions."""
        output = self.network(images, hq)
        terms = {"score": F.l1_loss(output.score, targets)}
        total = terms["score"]
        if output.kinds is not None and kinds is not None:
            terms["kind"] = F.cross_entropy(output.kinds, kinds)
            total = total + self.kind_weight * terms["kind"]
        return total, terms


class BiasTraining(Training):
    """A teacher of inductive bias is fine-tuned on the scores themselves: L1."""

    def forward(self, images: Tensor, targets: Tensor, **_: Any) -> Loss:
        loss = F.l1_loss(self.network(images).score, targets)
        return loss, {"score": loss}
