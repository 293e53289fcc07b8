r"""Divergences between the class distributions of a teacher and a student, one row at a time.

What the batch-wise Sinkhorn term is compared and combined with. Throughout, :math:`p = \mathrm{softmax}(z_s / \tau)` is the
student and :math:`q = \mathrm{softmax}(z_t / \tau)` the teacher, and each function has the arguments

- ``student_logits``, ``teacher_logits``: (..., classes). float16 and bfloat16 are computed in float32.
- ``tau``: temperature, > 0. No factor of tau^2 is put on the result.
- ``mask``: (...), bool, True keeps the row; None keeps all. What masked rows hold is not read.

and gives the mean over the kept rows, a scalar, 0 if none is kept. A logit of -inf masks a class: 0 log 0 is 0, and nothing turns
NaN. Where the divergence is infinite, so is the result: :func:`kl` and :func:`cross_entropy` if the student alone masks a class,
:func:`reverse_kl` if the teacher alone does. The other ones are bounded.

Each raises ValueError for logits of different shapes, naming both, and for a tau that is not positive.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Student = Float[Tensor, "*rows classes"]
Teacher = Float[Tensor, "*teacher_rows teacher_classes"]
Mask = Bool[Tensor, "*mask_rows"]


def kl(
    student_logits: Student, teacher_logits: Teacher, tau: float = 1.0, mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence :math:`\sum_c q_c \log (q_c / p_c)`: averages the teacher's modes.

    Example:
        >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]))  # log 2
        tensor(0.6931)
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, tau, mask)
    return _mean(_relative_entropy(log_q, log_p), mask)


def cross_entropy(
    student_logits: Student, teacher_logits: Teacher, tau: float = 1.0, mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""Cross-entropy :math:`-\sum_c q_c \log p_c`: :func:`kl` plus the teacher's entropy, with the same gradient.

    The authors' released code reports this as its KL.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.6931)
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, tau, mask)
    return _mean(-(log_q.exp() * log_p.masked_fill(log_q == -torch.inf, 0.0)).sum(-1), mask)


def reverse_kl(
    student_logits: Student, teacher_logits: Teacher, tau: float = 1.0, mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""Reversed Kullback-Leibler divergence :math:`\sum_c p_c \log (p_c / q_c)`: collapses onto one mode.

    Example:
        >>> reverse_kl(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.6931)
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, tau, mask)
    return _mean(_relative_entropy(log_p, log_q), mask)


def js(
    student_logits: Student, teacher_logits: Teacher, tau: float = 1.0, mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""Jensen-Shannon divergence :math:`\tfrac12 KL(p\|m) + \tfrac12 KL(q\|m)`, :math:`m = (p + q) / 2`; in [0, log 2].

    Example:
        >>> js(torch.tensor([[9.0, -torch.inf]]), torch.tensor([[-torch.inf, 9.0]]))
        tensor(0.6931)
    """
    return generalized_jsd(student_logits, teacher_logits, tau, mask)


def generalized_jsd(
    student_logits: Student,
    teacher_logits: Teacher,
    tau: float = 1.0,
    mask: Mask | None = None,
    *,
    beta: float = 0.5,
) -> Float[Tensor, ""]:
    r"""Generalized Jensen-Shannon divergence of GKD (Agarwal et al., ICLR 2024).

    .. math:: \beta\, KL(q \| m) + (1 - \beta)\, KL(p \| m), \quad m = \beta q + (1 - \beta) p

    Args:
        beta: in [0, 1]. 0.5 is :func:`js`. Divided by beta it tends to :func:`kl` as beta goes to 0, and divided by 1 - beta to
            :func:`reverse_kl` as it goes to 1; at 0 and 1 themselves, where the formula is 0, it is these two, as in TRL.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> generalized_jsd(student, teacher, beta=0.1), generalized_jsd(student, teacher, beta=0.0)
        (tensor(0.0410), tensor(0.4621))
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta in (0, 1):
        return (reverse_kl if beta else kl)(student_logits, teacher_logits, tau, mask)
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, tau, mask)
    parts = torch.stack([log_q + math.log(beta), log_p + math.log1p(-beta)])
    log_m = torch.logsumexp(parts.clamp_min(torch.finfo(parts.dtype).min), 0)  # of -inf alone its gradient is NaN
    return _mean(beta * _relative_entropy(log_q, log_m) + (1 - beta) * _relative_entropy(log_p, log_m), mask)


def tvd(
    student_logits: Student, teacher_logits: Teacher, tau: float = 1.0, mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""Total variation distance :math:`\tfrac12 \sum_c |p_c - q_c|`, in [0, 1].

    Example:
        >>> tvd(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.5000)
    """
    return sample_l1(student_logits, teacher_logits, tau, mask) / 2


def sample_l1(
    student_logits: Student, teacher_logits: Teacher, tau: float = 1.0, mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""L1 distance :math:`\sum_c |p_c - q_c|`, in [0, 2]: the batch-wise term of a batch of one row.

    Example:
        >>> sample_l1(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
        tensor(1.)
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, tau, mask)
    return _mean((log_p.exp() - log_q.exp()).abs().sum(-1), mask)


def sample_sinkhorn(
    student_logits: Student,
    teacher_logits: Teacher,
    tau: float = 1.0,
    mask: Mask | None = None,
    *,
    eps: float = 0.1,
    n_iters: int = 20,
) -> Float[Tensor, ""]:
    r"""Sinkhorn distance of p to q over the classes, where moving mass from one class to any other costs 1.

    The sample-wise counterpart of the batch-wise term; :func:`tvd` as eps goes to 0. The kernel
    :math:`e^{-C/\varepsilon} = k\,11^\top + (1 - k) I`, :math:`k = e^{-1/\varepsilon}`, makes an iteration linear in the classes.

    Args:
        eps: weight of the entropy, > 0.
        n_iters: of rows, then columns; their gradient is exact. 20 suffice for eps 0.1; the need grows as 1 / eps.

    Example:
        >>> sample_sinkhorn(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.5000)
    """
    if not eps > 0 or n_iters < 1:
        raise ValueError(f"eps must be positive and n_iters at least 1, got {eps} and {n_iters}")
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, tau, mask)
    stay = math.log(-math.expm1(-1 / eps))

    def smooth(v: Tensor) -> Tensor:  # log of the kernel times exp(v)
        return torch.logaddexp(torch.logsumexp(v, -1, keepdim=True) - 1 / eps, v + stay)

    v = torch.zeros_like(log_q)
    for _ in range(n_iters):
        u = log_p - smooth(v)
        v = log_q - smooth(u)
    return _mean(1 - (u + v).exp().sum(-1), mask)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": kl,
    "xent": cross_entropy,
    "reverse_kl": reverse_kl,
    "js": js,
    "generalized_jsd": generalized_jsd,
    "tvd": tvd,
    "sample_l1": sample_l1,
    "sample_sinkhorn": sample_sinkhorn,
}


def same_classes(student: Student, teacher: Teacher, allow_truncation: bool = False) -> tuple[Tensor, Tensor]:
    """The two as they are, if their shapes agree; with ``allow_truncation`` cut to the fewer classes, with a warning.

    Raises:
        ValueError: if they differ in rows or classes, or have none.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} differ in rows: "
            "both models must see the same samples"
        )
    classes, others = student.shape[-1], teacher.shape[-1]
    if classes != others:
        if not allow_truncation:
            raise ValueError(
                f"student has {classes} classes, teacher {others}: they must share them. If they are vocabularies that differ "
                "in padding at their ends, set allow_vocab_truncation=True"
            )
        warnings.warn(
            f"student has {classes} classes, teacher {others}: cut to the first {min(classes, others)}", stacklevel=3
        )
        student, teacher = student[..., :others], teacher[..., :classes]
    return student, teacher


def same_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype of the two, at least float32."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _log_probabilities(student: Tensor, teacher: Tensor, tau: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    student, teacher = same_dtype(*same_classes(student, teacher))
    if student.numel() == 0:
        raise ValueError(f"logits {tuple(student.shape)} have no rows or no classes")
    if mask is not None:
        if mask.shape != student.shape[:-1]:
            raise ValueError(f"mask {tuple(mask.shape)} does not fit logits {tuple(student.shape)}: one entry a row")
        student, teacher = (z.masked_fill(~mask.unsqueeze(-1), 0.0) for z in (student, teacher))
    return torch.log_softmax(student / tau, -1), torch.log_softmax(teacher / tau, -1)


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q) over the last axis, with 0 log 0 = 0 in the gradient too."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows.mean() if mask is None else rows.masked_fill(~mask, 0.0).sum() / mask.sum().clamp_min(1)
