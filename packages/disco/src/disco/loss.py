"""The losses of DisCo (Gao et al., ECCV 2022) and of what it is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from papercore.ops import MemoryBank, gather_features, info_nce
from torch import Tensor, nn

REDUCTIONS = ("mean", "sum")


def unit(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Each row divided by its L2 norm, in float32 at least, whatever autocast does; a zero row stays zero.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1, eps=1e-6)


class ContrastiveHead(nn.Module):
    r"""Cross-entropy of each query's own key among the keys of a queue (MoCo; He et al. 2020).

    .. math:: L = \frac1B \sum_i -\log \frac{\exp(q_i k_i / T)}{\exp(q_i k_i / T) + \sum_j \exp(q_i Q_j / T)}

    Streamed: no matrix of batch x queue is formed. Only queries receive a gradient. Enqueue after the loss, so that no key is a
    negative of its own batch; that may be before backward().

    Args:
        dim: width. queue_size: keys kept, from 1 (authors: 65,536). temperature: T, > 0 (authors: 0.2).
        generator: of the first keys, random unit vectors.

    Shape:
        queries, keys: (batch, dim), unit rows. Returns a scalar.

    Raises:
        ValueError: if temperature <= 0, queue_size < 1, or more keys are enqueued at once than the queue holds.

    Example:
        >>> head = ContrastiveHead(dim=2, queue_size=4, temperature=0.2)
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = head(keys, keys)
        >>> head.enqueue(keys)
        >>> head.queue.keys[:2]
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self,
        dim: int = 128,
        queue_size: int = 65536,
        temperature: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.queue = MemoryBank(queue_size, dim, generator)
        self.temperature = temperature

    def forward(self, queries: Float[Tensor, "batch dim"], keys: Float[Tensor, "batch_k dim_k"]) -> Float[Tensor, ""]:
        return info_nce(queries, self.queue.keys, 1 / self.temperature, own_positives=keys.detach())

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "batch dim"]) -> None:
        """Write the keys of all processes, in the order of their ranks, over the oldest ones."""
        (everyone,), _ = gather_features(keys, with_grad=False)
        self.queue.enqueue(everyone)


class DisCoOutput(NamedTuple):
    """The loss to minimise, and its parts before their weights (detached): contrast with the queue, distance from the teacher.

    >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> output = DisCoLoss(dim=2, contrast_weight=0.0)(student, student, teacher, teacher)
    >>> output.distill, output.loss  # two views, each at a squared distance of 2; weight 32
    (tensor(4.), tensor(128.))
    """

    loss: Tensor
    contrast: Tensor
    distill: Tensor


class DisCoLoss(nn.Module):
    r"""Contrast with a queue, and the squared distance from the teacher's embedding of the same view (section 3 of the paper).

    .. math:: L = c\,L_{co}(s_q, k) + \lambda\,\frac1B \sum_i \left(\|s_{q,i} - t_{q,i}\|^2 + \|s_{k,i} - t_{k,i}\|^2\right)

    The authors' program adds the SUM over a device's batch to the mean cross-entropy, and data-parallel training averages over
    devices: with their 8 devices of 32 images each that is the mean with weight lambda = 32, the default here, which depends
    neither on the batch nor on the number of devices. ``distill_weight=1, distill_reduction="sum"`` is their program to the bit.

    Args:
        dim, queue_size, temperature, generator: see :class:`ContrastiveHead`.
        distill_weight: lambda, >= 0. distill_reduction: over the batch, "mean" or "sum"; over dimensions it is always the sum.
        contrast_weight: c, >= 0; 0 is the authors' "only-mse", without queue and keys.

    Shape:
        student_q, student_k: (batch, dim), unit rows, the student's embeddings of the two views.
        teacher_q, teacher_k: the same of the teacher's, constants. keys: (batch, dim), the key encoder's of view k, constant.
        Returns a :class:`DisCoOutput`.

    Raises:
        ValueError: for widths that differ, weights below 0, another reduction, and as :class:`ContrastiveHead`.

    Example:
        >>> loss = DisCoLoss(dim=8, queue_size=64)
        >>> student_q, student_k, teacher_q, teacher_k, keys = (unit(torch.randn(4, 8)) for _ in range(5))
        >>> output = loss(student_q, student_k, teacher_q, teacher_k, keys)
        >>> loss.contrast.enqueue(keys)  # after the loss
        >>> torch.allclose(output.loss, output.contrast + 32 * output.distill)
        True
    """

    def __init__(
        self,
        dim: int = 128,
        queue_size: int = 65536,
        temperature: float = 0.2,
        distill_weight: float = 32.0,
        distill_reduction: str = "mean",
        contrast_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if distill_reduction not in REDUCTIONS:
            raise ValueError(f"distill_reduction must be one of {', '.join(REDUCTIONS)}; got {distill_reduction!r}")
        if distill_weight < 0 or contrast_weight < 0:
            raise ValueError(f"weights must be at least 0; got {distill_weight} and {contrast_weight}")
        self.distill_weight, self.distill_reduction, self.contrast_weight = (
            distill_weight,
            distill_reduction,
            contrast_weight,
        )
        self.contrast = ContrastiveHead(dim, queue_size, temperature, generator) if contrast_weight else None

    def forward(
        self,
        student_q: Float[Tensor, "batch dim"],
        student_k: Float[Tensor, "batch dim"],
        teacher_q: Float[Tensor, "batch_t dim_t"],
        teacher_k: Float[Tensor, "batch_t dim_t"],
        keys: Float[Tensor, "batch_k dim_k"] | None = None,
    ) -> DisCoOutput:
        distill = distillation(student_q, teacher_q, self.distill_reduction) + distillation(
            student_k, teacher_k, self.distill_reduction
        )
        if self.contrast is None:
            return DisCoOutput(self.distill_weight * distill, torch.zeros_like(distill), distill.detach())
        if keys is None:
            raise ValueError("the contrastive term needs keys, or contrast_weight=0")
        contrast = self.contrast(student_q, keys)
        return DisCoOutput(
            self.contrast_weight * contrast + self.distill_weight * distill, contrast.detach(), distill.detach()
        )


def distillation(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch_t dim_t"], reduction: str = "mean"
) -> Float[Tensor, ""]:
    """Squared Euclidean distance between rows, summed over dimensions, reduced over the batch; of unit rows it is 2 - 2 cos.

    >>> distillation(torch.eye(2), -torch.eye(2)), distillation(torch.eye(2), -torch.eye(2), "sum")
    (tensor(4.), tensor(8.))
    """
    _check_widths(student, teacher)
    distances = (student - teacher.detach()).square().sum(1)
    return distances.mean() if reduction == "mean" else distances.sum()


def seed_loss(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch_t dim_t"],
    queue: Float[Tensor, "size dim_q"],
    student_temperature: float = 0.2,
    teacher_temperature: float = 0.01,
) -> Float[Tensor, ""]:
    r"""SEED (Fang et al., ICLR 2021): the student's similarities to a queue of the teacher's embeddings become the teacher's.

    .. math:: L = -\frac1B \sum_i \sum_j \mathrm{softmax}([1, t_i Q] / T_t)_j \log \mathrm{softmax}([s_i t_i, s_i Q] / T_s)_j

    Args:
        student, teacher: (batch, dim), unit rows of the same images. queue: (size, dim), earlier embeddings of the teacher's.
        student_temperature, teacher_temperature: T_s (its program: 0.2) and T_t, > 0 (its program: 1e-4; 0.01 is ours).

    Raises:
        ValueError: for widths that differ or temperatures <= 0.

    Example:
        >>> rows = unit(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
        >>> bool(seed_loss(rows, rows, torch.eye(8)) < seed_loss(-rows, rows, torch.eye(8)))
        True
    """
    _check_widths(student, teacher)
    _check_widths(teacher, queue)
    if student_temperature <= 0 or teacher_temperature <= 0:
        raise ValueError(f"temperatures must be positive, got {student_temperature} and {teacher_temperature}")
    teacher, queue = teacher.detach(), queue.detach()
    with torch.autocast(student.device.type, enabled=False):
        own = (student * teacher).sum(1, keepdim=True)
        logits = torch.cat([own, student @ queue.T], 1) / student_temperature
        targets = torch.cat([torch.ones_like(own), teacher @ queue.T], 1) / teacher_temperature
    return F.cross_entropy(logits, targets.softmax(1))


def rkd_loss(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch_t dim_t"],
    distance_weight: float = 1.0,
    angle_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Relational knowledge distillation (Park et al., CVPR 2019) as DisCo's Table 2 has it: a batch's distances and angles.

    Smooth L1 between the pairwise distances, each divided by the mean of the positive ones, and between the cosines of the angles
    of all triplets; means over all entries. Memory: batch^3 numbers. The weights of 1 and 1 are those of DisCo's authors; RKD has
    1 and 2.

    Args:
        student, teacher: (batch, dim) and (batch, any width), embeddings of the same images.

    Example:
        >>> rows = torch.randn(5, 8)
        >>> rkd_loss(2 * rows, rows)  # relations do not see the scale
        tensor(0.)
    """
    teacher = teacher.detach()
    loss = student.new_zeros(())
    with torch.autocast(student.device.type, enabled=False):
        if distance_weight:
            loss = loss + distance_weight * F.smooth_l1_loss(_distances(student), _distances(teacher))
        if angle_weight:
            loss = loss + angle_weight * F.smooth_l1_loss(_angles(student), _angles(teacher))
    return loss


def _distances(rows: Tensor) -> Tensor:
    square = rows.square().sum(1)
    squared = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * rows @ rows.T).clamp_min(1e-12)
    distances = squared.sqrt() * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return distances / distances[distances > 0].mean()


def _angles(rows: Tensor) -> Tensor:
    """(batch, batch, batch), cosines of the angles at the first index."""
    directions = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=2)
    return directions @ directions.mT


def _check_widths(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's embeddings are {student.shape[1]} wide and the teacher's {teacher.shape[1]}: they must be equal"
        )
