"""DisCo on SwAV: online clustering of many crops instead of a queue of negatives, and the teacher's embedding of each crop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from papercore.ops import MemoryBank, balanced_assignment, gather_features
from torch import Tensor, nn

from disco.augment import Augmentation
from disco.encoder import Encoder
from disco.loss import DisCoOutput, distillation, unit
from disco.model import Distillation, check_finite

ASSIGNING = 2  # the first crops, which are large: their codes are what the other crops predict


def swav_crops(size: int, small: int = 6) -> list[Augmentation]:
    """SwAV's multi-crop: two of ``size`` pixels, of 0.14 to 1 of an image's area; small ones, 96/224 as large, of 0.05 to 0.14.

    Args:
        size: pixels. small: how many small ones, at least 0 (authors: 6).

    >>> [crop.size for crop in swav_crops(224)]
    [224, 224, 96, 96, 96, 96, 96, 96]
    """
    if small < 0:
        raise ValueError(f"small_crops must be at least 0, got {small}")
    large, others = Augmentation.swav(size, (0.14, 1.0)), Augmentation.swav(round(size * 96 / 224), (0.05, 0.14))
    return [large] * ASSIGNING + [others] * small


def swav_loss(
    embeddings: Float[Tensor, "crops batch dim"],
    prototypes: Float[Tensor, "count dim_p"],
    queues: Sequence[Float[Tensor, "_ _"]] = (),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Float[Tensor, ""]:
    r"""SwAV (Caron et al., NeurIPS 2020): each crop predicts the codes of the two assigning ones, v = 1, 2, the first.

    .. math:: L = -\sum_{v=1}^2 \frac1{V-1} \sum_{w \ne v} \frac1B \sum_i q_{v,i} \log \mathrm{softmax}(C z_{w,i} / T)

    The codes q are a balanced assignment of the crop's embeddings, over all processes, to the prototypes C; they are constants.
    SwAV's own loss is half of this, the mean over v.

    Args:
        embeddings: of V >= 2 crops, unit rows. prototypes: unit rows.
        queues: for each assigning crop, earlier embeddings that join its assignment, so that small batches can be balanced; their
            own codes are dropped. temperature: T, > 0. epsilon, iterations: of :func:`papercore.ops.balanced_assignment`.

    Raises:
        ValueError: for fewer than two crops, another width of the prototypes, or another number of queues.

    Example:
        >>> crops, prototypes = torch.eye(4).expand(3, 4, 4), torch.eye(4)
        >>> swav_loss(crops, prototypes) < swav_loss(-crops, prototypes)
        tensor(True)
    """
    if embeddings.dim() != 3 or len(embeddings) < ASSIGNING or embeddings.shape[2] != prototypes.shape[1]:
        shapes = f"{tuple(embeddings.shape)} and {tuple(prototypes.shape)}"
        raise ValueError(
            f"embeddings and prototypes are {shapes}: expected (2 or more crops, batch, dim) and (count, dim)"
        )
    if len(queues) not in (0, ASSIGNING):
        raise ValueError(f"one queue for each of the {ASSIGNING} assigning crops, or none; got {len(queues)}")
    crops, batch, _ = embeddings.shape
    with torch.autocast(embeddings.device.type, enabled=False):
        log_p = (embeddings @ prototypes.T / temperature).log_softmax(2)
        total, loss = log_p.sum(0), embeddings.new_zeros(())
        for crop in range(ASSIGNING):
            with torch.no_grad():
                (everyone,), mine = gather_features(embeddings[crop], with_grad=False)
                everyone = torch.cat([everyone, *queues[crop : crop + 1]])
                codes = balanced_assignment(everyone @ prototypes.T, epsilon, iterations)[mine : mine + batch]
            loss = loss - (codes * (total - log_p[crop])).sum(1).mean() / (crops - 1)
    return loss


class DisCoSwAV(Distillation):
    r"""The training module of DisCo on SwAV: from several crops of a batch of images to the loss.

    .. math:: L = (L_{SwAV} + \lambda\, \mathrm{mean}\,(s - t)^2) / 2

    The mean is over all crops, images and dimensions of the unit embeddings of student and teacher. (The authors' program
    normalises the student's alone; a distance between the two makes sense only if both are, so here both are.)

    The prototypes, a parameter, are divided by their norms at each call in training mode, and receive no gradient in the first of
    them: under DistributedDataParallel set ``find_unused_parameters``, as transformers' Trainer does. The latest embeddings are
    kept from the start, all processes' in one queue for each assigning crop.

    A SwAV loss that stays at 2 ln(prototypes) says that all crops have one embedding: see that the student's head normalises.

    Args:
        student, teacher, dim: as in :class:`disco.DisCo`. teacher None: SwAV alone. In SwAV a student's head has batch
            normalisation, ``Encoder(..., batch_norm=True)``, and sees all crops at once; the backbone sees those of one size.
        prototypes: how many. temperature, epsilon, iterations: see :func:`swav_loss`.
        queue_size: embeddings to keep of each assigning crop, 0 for none. queue_after: calls in training mode after which they
            join the assignment, once the queue is full (authors: 15 of 200 epochs).
        frozen_prototype_steps: calls in training mode during which prototypes stay.
        distill_weight: lambda, >= 0 (authors: 1). The mean is at most 4 / dim, little beside the SwAV loss; with dim as
            weight it is the mean squared distance. generator: of the first prototypes, random unit vectors.

    Shape:
        crops: two or more of (batch, 3, height, width), normalised, each of the same images; those of one size side by side, the
        assigning ones first. Returns a :class:`disco.DisCoOutput`; ``contrast`` is the SwAV loss.

    Raises:
        ValueError: for options out of range, the student as its own teacher, widths that differ, fewer than 2 crops or images,
            crops of other numbers of images, more images than the queue holds, or images that are not finite (with their places).

    Example:
        >>> teacher, student = (Encoder(f"cnn:{w}", dim=16, hidden=32, batch_norm=True, image_size=8) for w in ("8-16", "4-4"))
        >>> disco = DisCoSwAV(student, teacher, prototypes=10, queue_size=64)
        >>> output = disco([torch.randn(4, 3, size, size) for size in (8, 8, 4, 4)])
        >>> output.loss.backward()
    """

    steps: Tensor
    queues: Sequence[MemoryBank]

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        dim: int | None = None,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue_size: int = 3840,
        queue_after: int = 0,
        frozen_prototype_steps: int = 5005,
        distill_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(student, teacher, dim)
        if temperature <= 0 or epsilon <= 0:
            raise ValueError(f"temperature and epsilon must be positive, got {temperature} and {epsilon}")
        for name, value, least in (
            ("prototypes", prototypes, 1), ("iterations", iterations, 1), ("queue_size", queue_size, 0),
            ("queue_after", queue_after, 0), ("frozen_prototype_steps", frozen_prototype_steps, 0),
            ("distill_weight", distill_weight, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.assignment: dict[str, Any] = {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}
        self.queue_after, self.frozen_prototype_steps = queue_after, frozen_prototype_steps
        self.distill_weight = distill_weight
        self.prototypes = nn.Parameter(unit(torch.randn(prototypes, self.dim, generator=generator)))
        banks = [MemoryBank(queue_size, self.dim) for _ in range(ASSIGNING if queue_size else 0)]
        self.queues = nn.ModuleList(banks)  # type: ignore[assignment]
        for queue in banks:
            queue.keys.zero_()  # so that the last row tells whether it is full
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.train()

    def forward(self, crops: Sequence[Float[Tensor, "_ 3 _ _"]]) -> DisCoOutput:
        self._check(crops)
        step = int(self.steps)
        student = _embed(self.student, crops)
        queues = [queue.keys for queue in self.queues] if step >= self.queue_after else []
        full = all(bool(keys[-1].any()) for keys in queues)
        swav = swav_loss(student, self._prototypes(step), queues if full else (), **self.assignment)
        distill = torch.zeros_like(swav)
        if self.teacher is not None:
            with torch.no_grad():
                teacher = _embed(self.teacher, crops)
            distill = distillation(student.flatten(0, 1), teacher.flatten(0, 1)) / self.dim
        if self.training:
            for queue, embeddings in zip(self.queues, student.detach(), strict=False):
                (everyone,), _ = gather_features(embeddings, with_grad=False)
                queue.enqueue(everyone)
            self.steps += 1
        return DisCoOutput((swav + self.distill_weight * distill) / 2, swav.detach(), distill.detach())

    def _prototypes(self, step: int) -> Tensor:
        """Unit rows; in training, and no longer frozen, the parameter itself."""
        rows = unit(self.prototypes.detach())
        if not self.training or step < self.frozen_prototype_steps:
            return rows
        with torch.no_grad():
            self.prototypes.copy_(rows)
        return self.prototypes

    def _check(self, crops: Sequence[Tensor]) -> None:
        counts = [len(crop) for crop in crops]
        if len(counts) < ASSIGNING or len(set(counts)) > 1:
            raise ValueError(f"expected {ASSIGNING} or more crops of the same images, got crops of {counts} images")
        if self.training and counts[0] < 2:
            raise ValueError("a batch of 1 is too small: batch normalisation needs 2 images")
        for place, crop in enumerate(crops):
            check_finite(f"crop {place}", crop)


def _embed(network: nn.Module, crops: Sequence[Tensor]) -> Float[Tensor, "crops batch dim"]:
    """Unit rows. Neighbours of one size take one pass; an Encoder's head, with its batch statistics, sees all crops at once."""
    groups = [torch.cat(list(group)) for _, group in itertools.groupby(crops, lambda crop: crop.shape[2:])]
    if isinstance(network, Encoder):
        embedded = network.head(torch.cat([network.backbone(group) for group in groups]))
    else:
        embedded = torch.cat([network(group) for group in groups])
    return unit(embedded).view(len(crops), -1, embedded.shape[1])
