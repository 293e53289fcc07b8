"""One training step of DisCo: student, its momentum encoder, frozen teacher and queue."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from papercore.ops import gather_features
from safetensors.torch import save_model
from torch import Tensor, nn

from disco.loss import ContrastiveHead, DisCoLoss, DisCoOutput, rkd_loss, seed_loss, unit

ARMS = ("disco", "moco", "mse_only", "rkd", "rkd+disco", "seed")
TEACHER_MODES = ("eval", "train")


class Distillation(nn.Module):
    """What :class:`DisCo` and :class:`disco.DisCoSwAV` share: a student, and a frozen teacher that is not a submodule.

    Neither optimisers, nor DistributedDataParallel, nor checkpoints see the teacher, but it goes along to a device or dtype. It
    is in eval mode, unless ``teacher_mode`` is "train".

    Args:
        student, teacher: images -> (batch, dim). dim: the student's width, if it has no attribute of that name.

    Raises:
        ValueError: for the student as its own teacher, an unknown width, or widths that differ.
    """

    teacher: nn.Module | None
    teacher_mode = "eval"

    def __init__(self, student: nn.Module, teacher: nn.Module | None, dim: int | None) -> None:
        super().__init__()
        if teacher is student:
            raise ValueError("teacher and student are the same object: the teacher must be a network of its own")
        dims = [getattr(module, "dim", dim) for module in (student, teacher) if module is not None]
        if dims[0] is None:
            raise ValueError("the student has no attribute dim: say how wide its embeddings are by dim=")
        if None not in dims and len(set(dims)) > 1:
            raise ValueError(
                f"the student's embeddings are {dims[0]} wide and the teacher's {dims[1]}: they must be equal"
            )
        self.student, self.dim = student, int(dims[0])
        self.__dict__["teacher"] = None if teacher is None else teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_mode == "train")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        """The teacher goes along to a device or dtype."""
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """All that a stopped training needs to go on, the teacher excepted, as safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self, str(Path(folder) / "model.safetensors"))


def check_finite(name: str, images: Tensor) -> None:
    """Raise ValueError with the places of images that are not finite."""
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        places = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"{name}: not finite in image {', '.join(map(str, places[:5]))} of the batch")


class DisCo(Distillation):
    """The training module: from two views of a batch of images to the loss.

    A student of any kind learns the last embedding of a frozen teacher of any kind, and to find its own view among a queue of
    others (section 3 of the paper). ``student`` and ``key`` (the paper's mean student: the student's moving average) are
    parameters and buffers of this module; the teacher is not: it receives no gradient and is in no checkpoint.

    One step is, in the authors' order: the student on both views, in two passes; the key encoder moves towards the student; keys
    of view k, from a batch shuffled across processes; the teacher on both views; the loss; the keys enter the queue.

    Args:
        student: images -> (batch, dim), projection head included: an :class:`disco.Encoder`, or any module.
        teacher: the same of a trained network; None for the arm "moco".
        arm: "disco"; "moco": contrast alone (MoCo-v2; He et al. 2020, Chen et al. 2020); "mse_only": distance from the teacher
            alone; "rkd": contrast and :func:`disco.rkd_loss`; "rkd+disco": all three; "seed": :func:`disco.seed_loss` on view q
            alone, as in its program.
        dim: embedding width; the student's own if it has one.
        queue_size, temperature, distill_weight, distill_reduction: see :class:`disco.DisCoLoss`.
        momentum: of the key encoder, 0 to 1, at each call in training mode (authors: 0.999).
        teacher_mode: "eval": fixed statistics, so that it does not change and takes both views in one pass. "train": batch
            statistics, and running ones that drift, as in the authors' program.
        joint_views: the student takes both views in one pass: faster, but batch normalisation sees both at once.
        bn_splits: parts of a batch, each with batch statistics of its own, in student and key encoder. The authors rely on
            shuffling among 8 devices, so that the statistics do not betray the positive; on one device parts do it.
        seed_temperature: the teacher's in the arm "seed".
        generator: of the queue's first keys.

    Shape:
        view_q, view_k: (batch, 3, height, width), normalised. teacher_embeddings: (batch, dim) twice, unit rows, if known
        beforehand. Returns a :class:`disco.DisCoOutput`; ``distill`` is the arm's term of the teacher.

    Raises:
        ValueError: for an unknown arm or mode, a missing teacher, the student as its own teacher, widths that differ, a momentum
            outside 0 to 1, fewer than 2 images, more than the queue holds, or images that are not finite (with their places).

    Example:
        >>> from disco import Encoder
        >>> teacher, student = (Encoder(f"cnn:{width}", dim=16, hidden=32, image_size=8) for width in ("8-16", "4-4"))
        >>> disco = DisCo(student, teacher, queue_size=64)
        >>> output = disco(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
        >>> output.loss.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        arm: str = "disco",
        dim: int | None = None,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        distill_weight: float = 32.0,
        distill_reduction: str = "mean",
        teacher_mode: str = "eval",
        joint_views: bool = False,
        bn_splits: int = 1,
        seed_temperature: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:
        if arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {arm!r}")
        if teacher_mode not in TEACHER_MODES:
            raise ValueError(f"teacher_mode must be one of {', '.join(TEACHER_MODES)}; got {teacher_mode!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        if bn_splits < 1:
            raise ValueError(f"bn_splits must be at least 1, got {bn_splits}")
        if arm != "moco" and teacher is None:
            raise ValueError(f"arm {arm!r} needs a teacher")
        super().__init__(student, None if arm == "moco" else teacher, dim)
        self.arm, self.momentum, self.teacher_mode = arm, momentum, teacher_mode
        self.joint_views, self.bn_splits, self.seed_temperature = joint_views, bn_splits, seed_temperature
        contrasts = arm not in ("mse_only", "seed")
        self.key = copy.deepcopy(student).requires_grad_(False) if contrasts else None
        self.loss = DisCoLoss(
            self.dim, queue_size, temperature, distill_weight, distill_reduction,
            contrast_weight=float(arm != "mse_only"), generator=generator,
        )  # fmt: skip
        self.train()

    def forward(
        self,
        view_q: Float[Tensor, "batch 3 height width"],
        view_k: Float[Tensor, "batch_k 3 height_k width_k"],
        teacher_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> DisCoOutput:
        self._check(view_q, view_k)
        if self.arm == "seed":
            return self._seed(view_q, None if teacher_embeddings is None else teacher_embeddings[0])
        student_q, student_k = self._student(view_q, view_k)
        keys = None
        if self.key is not None:
            self._move_key()
            keys = self._keys(view_k)
        teacher_q, teacher_k = teacher_embeddings or self._teach(view_q, view_k)
        output = self._arm(student_q, student_k, teacher_q, teacher_k, keys)
        if self.training and keys is not None:
            self.queue.enqueue(keys)
        return output

    @property
    def queue(self) -> ContrastiveHead:
        """The queue head: ``queue.queue.keys`` are its keys."""
        assert self.loss.contrast is not None
        return self.loss.contrast

    def _arm(self, student_q: Tensor, student_k: Tensor, teacher_q: Any, teacher_k: Any, keys: Any) -> DisCoOutput:
        if self.arm in ("disco", "mse_only"):
            return self.loss(student_q, student_k, teacher_q, teacher_k, keys)
        if self.arm == "rkd+disco":
            output = self.loss(student_q, student_k, teacher_q, teacher_k, keys)
            relation = rkd_loss(student_q, teacher_q)
            return DisCoOutput(output.loss + relation, output.contrast, output.distill + relation.detach())
        contrast = self.queue(student_q, keys)
        relation = rkd_loss(student_q, teacher_q) if self.arm == "rkd" else torch.zeros_like(contrast)
        return DisCoOutput(contrast + relation, contrast.detach(), relation.detach())

    def _seed(self, view: Tensor, teacher: Tensor | None) -> DisCoOutput:
        student = unit(self._in_parts(self.student, view))
        teacher = self._embed_by_teacher(view) if teacher is None else teacher
        queue = self.queue.queue.keys.clone()  # the next keys are written before backward() reads these
        loss = seed_loss(student, teacher, queue, self.queue.temperature, self.seed_temperature)
        if self.training:
            self.queue.enqueue(teacher)
        return DisCoOutput(loss, torch.zeros_like(loss), loss.detach())

    def _student(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor]:
        if self.arm == "moco":  # nothing reads the other view's embedding
            student_q = unit(self._in_parts(self.student, view_q))
            return student_q, student_q.detach()
        if self.joint_views:
            student_q, student_k = unit(self._in_parts(self.student, torch.cat([view_q, view_k]))).chunk(2)
            return student_q, student_k
        return unit(self._in_parts(self.student, view_q)), unit(self._in_parts(self.student, view_k))

    def _in_parts(self, module: nn.Module, images: Tensor) -> Tensor:
        """Batch statistics of ``bn_splits`` parts instead of the whole."""
        if self.bn_splits == 1:
            return module(images)
        return torch.cat([module(part) for part in images.chunk(self.bn_splits)])

    @torch.no_grad()
    def _teach(self, view_q: Tensor, view_k: Tensor) -> tuple[Any, Any]:
        if self.teacher is None:
            return None, None
        if self.teacher_mode == "eval":
            both = self._embed_by_teacher(torch.cat([view_q, view_k]))
            teacher_q, teacher_k = both.chunk(2)
            return teacher_q, teacher_k
        teacher_k = self._embed_by_teacher(view_k)  # the authors' order
        return self._embed_by_teacher(view_q), teacher_k

    @torch.no_grad()
    def _embed_by_teacher(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        return unit(self.teacher(images))

    @torch.no_grad()
    def _move_key(self) -> None:
        """key <- m key + (1 - m) student, parameters alone: the key encoder keeps batch statistics of its own."""
        if self.training and self.key is not None:
            torch._foreach_lerp_(list(self.key.parameters()), list(self.student.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Keys of a batch that is shuffled across processes and parts, so that batch statistics do not betray the positives."""
        assert self.key is not None
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not several and self.bn_splits == 1:
            return unit(self.key(view))
        (everyone,), offset = gather_features(view, with_grad=False)
        order = torch.randperm(len(everyone), device=view.device)
        if several:
            dist.broadcast(order, 0)
        mine = slice(offset, offset + len(view))
        keys = unit(self._in_parts(self.key, everyone[order[mine]]))
        (shuffled,), _ = gather_features(keys, with_grad=False)
        return shuffled[order.argsort()][mine]

    def _check(self, view_q: Tensor, view_k: Tensor) -> None:
        if view_q.shape != view_k.shape:
            raise ValueError(f"the views are {tuple(view_q.shape)} and {tuple(view_k.shape)}: they must be equal")
        if self.training and len(view_q) < 2 * self.bn_splits:
            raise ValueError(
                f"a batch of {len(view_q)} is too small: batch normalisation needs 2 images in each of {self.bn_splits} part(s)"
            )
        check_finite("view_q", view_q)
        check_finite("view_k", view_k)
