"""Inductive-bias regularization: the student's Conv and Inv tokens score as the convolution and involution teachers do.

A learnable bridge stands between each teacher and the student: from three maps of the frozen teacher it makes a score, drawn to
the teacher's score and to the student's alike ("reverse distillation").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from iqa_distill.bias import KINDS, BiasOutput


class Bridge(nn.Module):
    """MLP((A1(F1) + A2(F2)) + A3(F3)): from three maps, (batch, channels, height, width) each, to a score (batch,).

    A_k is the mean over the map and a linear layer, which is a 1 x 1 convolution and the mean in the other order. The MLP is a
    ReLU and a linear layer (both ours).
    """

    def __init__(self, channels: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(width, hidden) for width in channels)
        self.head = nn.Linear(hidden, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        adapted = [adapter(x.mean((2, 3))) for adapter, x in zip(self.adapters, maps, strict=True)]
        return self.head(F.relu(sum(adapted))).squeeze(1)


class InductiveBiasRegularization(nn.Module):
    """L_reg = sum over teachers t of mean |sg(Y_t) - Y'_t| + mean |Y_S,t - Y'_t|.

    Y_t: the teacher's score, Y'_t: its :class:`Bridge`'s, Y_S,t: the student's, from the token of that bias; sg: no gradient.
    Teachers never get one. All scores are normalised. L1, as a score is a scalar: a KL divergence of softmaxes over one value
    is always 0. The equation is second-hand, and that the bridge takes part in the second term is our reading of it.

    Args:
        channels: of the teachers' maps, by kind ("conv", "inv"); a kind left out is not taught.
        hidden: width of the bridges (ours).
        reverse: the second term also moves the bridge; if not, only the student.
        bridge: if not, there are no bridges, and the loss is the sum of mean |Y_S,t - sg(Y_t)| ("direct logits").

    Shape:
        teachers: outputs by kind, of at least the kinds in ``channels``. student_conv, student_inv: (batch,).
        Returns the loss and its parts without gradient: ``bridge``, the first terms, and ``student``, the second.

    Raises:
        ValueError: for no kind or an unknown one.

    Example:
        >>> import torch
        >>> from iqa_distill.bias import BiasTeacher
        >>> teachers = {kind: BiasTeacher(kind).eval() for kind in ("conv", "inv")}
        >>> regularize = InductiveBiasRegularization({kind: teacher.channels for kind, teacher in teachers.items()})
        >>> images = torch.randn(4, 3, 32, 32)
        >>> outputs = {kind: teacher(images) for kind, teacher in teachers.items()}
        >>> loss, parts = regularize(outputs, torch.zeros(4), torch.zeros(4))
        >>> sorted(parts)
        ['bridge', 'student']
    """

    def __init__(
        self,
        channels: Mapping[str, Sequence[int]],
        *,
        hidden: int = 128,
        reverse: bool = True,
        bridge: bool = True,
    ) -> None:
        if not channels or not set(channels) <= set(KINDS):
            raise ValueError(f"channels must be given by kind ({', '.join(KINDS)}); got the kinds {list(channels)}")
        super().__init__()
        self.kinds, self.reverse = tuple(channels), reverse
        self.bridges = nn.ModuleDict({kind: Bridge(channels[kind], hidden) for kind in channels} if bridge else {})

    def forward(
        self,
        teachers: Mapping[str, BiasOutput],
        student_conv: Float[Tensor, " b"],
        student_inv: Float[Tensor, " b"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        students = {"conv": student_conv, "inv": student_inv}
        to_bridge = to_student = student_conv.new_zeros(())
        for kind in self.kinds:
            target = teachers[kind].score.detach()
            if kind in self.bridges:
                bridged = self.bridges[kind]([x.detach() for x in teachers[kind].maps])
                to_bridge = to_bridge + F.l1_loss(bridged, target)
                target = bridged if self.reverse else bridged.detach()
            to_student = to_student + F.l1_loss(students[kind], target)
        return to_bridge + to_student, {"bridge": to_bridge.detach(), "student": to_student.detach()}
