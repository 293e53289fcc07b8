"""The distillation loss: a Sinkhorn distance between the batch of student outputs and the batch of teacher outputs.

Paper: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation", LREC-COLING 2024 (arXiv 2402.17110). Its text
was not available to us; the equations are those of the authors' released code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from papercore.ops import gather_features, sinkhorn_cost, sinkhorn_divergence
from torch import Tensor, nn

from sinkd.divergences import DIVERGENCES, same_classes, same_dtype, sample_sinkhorn

# alpha, kd_temperature and whether it is annealed, in the authors' scripts.
GLUE = {
    "cola": (0.9, 1.0, False),
    "mnli": (0.8, 3.0, True),
    "mrpc": (1.0, 4.0, True),
    "qnli": (0.8, 3.0, False),
    "qqp": (1.0, 4.0, True),
    "rte": (0.9, 3.5, False),
    "sst2": (0.9, 2.0, False),
}


class SinKDOutput(NamedTuple):
    """``loss`` to differentiate; ``kd``, ``ce`` and ``sinkhorn`` are its parts before their weights, detached.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> output = SinKDLoss()(logits, logits, torch.tensor([0, 1]))  # the student is its teacher
    >>> output.kd, output.ce
    (tensor(0.), tensor(0.1269))
    """

    loss: Float[Tensor, ""]
    kd: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    sinkhorn: Float[Tensor, ""]


class SinKDLoss(nn.Module):
    r"""Cross-entropy, sample-wise distillation, and the batch-wise Sinkhorn distance.

    .. math::
        L &= \alpha L_{KD} + (1 - \alpha) L_{CE} + \beta \cdot \mathrm{scale} \cdot S \\
        S &= \sum_{ij} P_{ij} D_{ij}, \quad
            D_{ij} = \bigl\| \mathrm{softmax}(z^s_i / \tau) - \mathrm{softmax}(z^t_j / \tau) \bigr\|_1

    P is exp(-D / eps) after ``n_iters`` normalisations of rows, then columns, to sum 1: the cloud of the student's outputs is
    carried onto the cloud of the teacher's. S sees sets, so it does not tie a sample to its label (permuting the student's rows
    leaves it as it is): keep one of the other two terms. It also has an entropic bias: where student and teacher agree it is not
    0, and pulls near predictions together (``debias`` removes that). Its cost lives in probabilities: where both are saturated
    its gradient vanishes. The cloud is the batch of one call, on one device unless ``gather``; gradient accumulation does not
    enlarge it.

    Args:
        alpha: share of the distillation term, in [0, 1]; the rest goes to the cross-entropy.
        beta: weight of the Sinkhorn term, >= 0, multiplied by ``scale``.
        kd_temperature: of ``kd``. tau: of the Sinkhorn term (authors: 2).
        eps: entropic weight in the unit of D (authors: 0.1); geomloss's blur for p = 1. n_iters: authors: 20.
        cost_p: 1 (authors), or 2 for the Euclidean norm in D.
        reduction: "mean" divides S by the rows of the cloud, so that beta does not depend on the batch size; "sum" is the
            authors': w * scale of "sum" is w * scale * rows of "mean" (16 rows, 0.8 * 0.001: 0.0128).
        scale: authors: 0.001 on GLUE, 0.0008 on language models, with "sum".
        kd: "kl"; "xent", the authors', which adds the teacher's entropy and has the same gradient; another of
            :data:`sinkd.divergences.DIVERGENCES`; a function like these; "none" leaves the term out.
        ce_weight: of the cross-entropy; None: 1 - alpha.
        scale_by_T2: multiply the distillation term by kd_temperature^2, as Hinton et al. do; the authors do not.
        debias: Sinkhorn divergence instead of S, by the entropic cost <P, D> + eps KL: 0 for equal clouds.
        sinkhorn: "batch", or "sample" for :func:`sinkd.divergences.sample_sinkhorn` in its place (an ablation).
        mode: "regression": L_KD and L_CE are mean squared errors, of logits / kd_temperature and of the labels, and D is the
            distance of logits / tau. The softmax of one class is 1, so this is what one output needs.
        anneal: whether :meth:`kd_temperature_at` goes to 1.
        allow_vocab_truncation: cut to the smaller number of classes, with a warning, instead of an error.
        gather: join the rows of all processes to one batch, and compute the whole loss of it on each. Averaged over processes,
            as DistributedDataParallel does, gradients are those of one process with that batch. All need equally many rows.
        ignore_index: rows with this label are left out of every term (not in regression).
        check: look for NaN, infinite logits and wrong labels. None: on a CPU only, since looking waits for the device.

    Shape:
        student_logits, teacher_logits: (N, C); float16 and bfloat16 are computed in float32, outside autocast. A class may be
        masked by -inf. The teacher is detached.
        labels: (N), or None for no cross-entropy. mask: (N), bool, True keeps; or None.
        With (B, N, C) and labels and mask of (B, N), each of the B is a cloud of its own, and S is their average.
        Returns :class:`SinKDOutput`. A term of weight 0 is not computed and reads 0; without any row the loss is 0.

    Raises:
        ValueError: for options out of range; logits that differ in shape; one class; NaN, +inf and wrong labels (see check).

    Example:
        >>> criterion = SinKDLoss(alpha=0.9, beta=0.8)
        >>> student_logits = torch.tensor([[2.0, -1.0], [0.5, 0.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[3.0, -3.0], [-1.0, 2.0]])
        >>> out = criterion(student_logits, teacher_logits, torch.tensor([0, 1]))
        >>> out.loss.backward()
        >>> out.sinkhorn
        tensor(0.5214)
    """

    def __init__(
        self,
        alpha: float = 0.9,
        beta: float = 0.8,
        kd_temperature: float = 2.0,
        tau: float = 2.0,
        eps: float = 0.1,
        n_iters: int = 20,
        cost_p: int = 1,
        reduction: str = "mean",
        scale: float = 1.0,
        kd: str | Callable[..., Tensor] = "kl",
        debias: bool = False,
        *,
        ce_weight: float | None = None,
        scale_by_T2: bool = False,  # noqa: N803
        sinkhorn: str = "batch",
        mode: str = "classification",
        anneal: bool = False,
        allow_vocab_truncation: bool = False,
        gather: bool = False,
        ignore_index: int = -100,
        check: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("reduction", reduction, ("mean", "sum")),
            ("kd", kd, ("none", *DIVERGENCES)),
            ("sinkhorn", sinkhorn, ("batch", "sample")),
            ("mode", mode, ("classification", "regression")),
            ("cost_p", cost_p, (1, 2)),
        ):
            if value not in known and not callable(value):
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
        for name, number in (("kd_temperature", kd_temperature), ("tau", tau), ("eps", eps), ("n_iters", n_iters)):
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if ce_weight is None:
            if not 0 <= alpha <= 1:
                raise ValueError(f"alpha must be in [0, 1], got {alpha}: for other weights give ce_weight as well")
            ce_weight = 1 - alpha
        for name, number in (("alpha", alpha), ("beta", beta), ("scale", scale), ("ce_weight", ce_weight)):
            if not number >= 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        if sinkhorn == "sample" and (debias or mode == "regression"):
            raise ValueError(
                'sinkhorn="sample" compares classes one sample at a time: leave out debias and mode="regression"'
            )
        self.alpha, self.ce_weight, self.beta, self.scale = alpha, ce_weight, beta, scale
        self.kd_temperature, self.tau, self.eps, self.n_iters = kd_temperature, tau, eps, n_iters
        self.cost_p, self.reduction, self.debias, self.sinkhorn = cost_p, reduction, debias, sinkhorn
        self.kd, self.scale_by_T2, self.mode, self.anneal = kd, scale_by_T2, mode, anneal
        self.allow_vocab_truncation, self.gather = allow_vocab_truncation, gather
        self.ignore_index, self.check = ignore_index, check
        self._warned_of_no_rows = False
        if beta * scale and sinkhorn == "batch" and not ce_weight and (kd == "none" or not alpha):
            warnings.warn(
                "the batch-wise Sinkhorn term alone does not tell samples apart: give kd or the cross-entropy a weight",
                stacklevel=2,
            )

    @classmethod
    def paper(cls, task: str, **options: Any) -> SinKDLoss:
        """The authors' weights for a GLUE task, or for T0 ("t0", also meant for GPT-Neo); ``options`` change some.

        GLUE: alpha and the temperature of the task, beta 0.8, scale 0.001. T0: L = CE + 0.1 KD + 0.0008 S, kd_temperature 1.

        Raises:
            ValueError: for another name, listing these.

        Example:
            >>> SinKDLoss.paper("rte").kd_temperature
            3.5
        """
        name = task.lower().replace("-", "")
        if name == "t0":
            weights: dict[str, Any] = {
                "alpha": 0.1,
                "ce_weight": 1.0,
                "beta": 1.0,
                "scale": 0.0008,
                "kd_temperature": 1.0,
            }
        elif name in GLUE:
            alpha, temperature, anneal = GLUE[name]
            weights = {"alpha": alpha, "beta": 0.8, "scale": 0.001, "kd_temperature": temperature, "anneal": anneal}
        else:
            raise ValueError(f"no released weights for task {task!r}: choose from {', '.join([*GLUE, 't0'])}")
        return cls(**{"reduction": "sum", "kd": "xent", **weights, **options})

    def kd_temperature_at(self, epoch: int, epochs: int) -> float:
        """The distillation temperature in an epoch from 0 to ``epochs`` - 1: with ``anneal`` linear down to 1, else constant.

        A single epoch keeps the temperature, where the authors' code divides by zero.

        Example:
            >>> [SinKDLoss.paper("mrpc").kd_temperature_at(epoch, 3) for epoch in range(3)]
            [4.0, 2.5, 1.0]
        """
        share = epoch / (epochs - 1) if self.anneal and epochs > 1 else 0.0
        return self.kd_temperature + (1 - self.kd_temperature) * share

    def forward(
        self,
        student_logits: Float[Tensor, "*rows classes"],
        teacher_logits: Float[Tensor, "*teacher_rows teacher_classes"],
        labels: Num[Tensor, "*_"] | None = None,
        mask: Bool[Tensor, "*_"] | None = None,
        kd_temperature: float | None = None,
    ) -> SinKDOutput:
        """``kd_temperature`` replaces that of the constructor, for this call."""
        kd, ce, sinkhorn = self._terms(student_logits, teacher_logits, labels, mask, kd_temperature)
        loss = self.alpha * kd + self.ce_weight * ce + self.beta * self.scale * sinkhorn
        return SinKDOutput(loss, kd.detach(), ce.detach(), sinkhorn.detach())

    def gradient_ratio(
        self,
        student_logits: Float[Tensor, "*rows classes"],
        teacher_logits: Float[Tensor, "*teacher_rows teacher_classes"],
        labels: Num[Tensor, "*_"] | None = None,
        mask: Bool[Tensor, "*_"] | None = None,
        kd_temperature: float | None = None,
    ) -> float:
        """How strongly the weighted Sinkhorn term pulls at the student's logits, relative to the other terms together.

        The ratio of the two gradients' norms; infinite if there is no other term. Waits for the device. With the authors' weights
        it is a few percent at best.

        Example:
            >>> student, teacher = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([[3.0, -3.0], [-1.0, 2.0]])
            >>> round(SinKDLoss.paper("cola").gradient_ratio(student, teacher, torch.tensor([0, 1])), 5)
            0.00079
        """
        with torch.enable_grad():
            student = same_dtype(student_logits.detach(), student_logits)[0].requires_grad_()
            kd, ce, sinkhorn = self._terms(student, teacher_logits, labels, mask, kd_temperature)
            terms = self.beta * self.scale * sinkhorn, self.alpha * kd + self.ce_weight * ce
            ours, others = (float(torch.autograd.grad(t, student, retain_graph=True)[0].norm()) for t in terms)
        return ours / others if others else math.inf

    def extra_repr(self) -> str:
        names = "alpha ce_weight beta scale kd kd_temperature tau eps n_iters cost_p reduction debias sinkhorn mode"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())

    def _terms(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, temperature: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        regression = self.mode == "regression"
        student, teacher = same_classes(student, teacher.detach(), self.allow_vocab_truncation)
        labels = self._fit(student, labels, mask)
        keep = mask
        if labels is not None and not regression:
            keep = labels != self.ignore_index if mask is None else mask & (labels != self.ignore_index)
        if self.gather:
            (student, teacher, *rest), _ = gather_features(
                student, teacher, *(t for t in (labels, keep) if t is not None)
            )
            keep = rest.pop() if keep is not None else None
            labels = rest.pop() if labels is not None else None
        student, teacher = same_dtype(student, teacher)
        check = not student.is_cuda and not torch.compiler.is_compiling() if self.check is None else self.check
        kept = student.shape[:-1].numel()
        if check and keep is not None:
            kept = int(keep.sum())
            keep = None if bool(keep.all()) else keep
        # 0, with the student's graph and whatever the student holds.
        kd = ce = sinkhorn = student[..., :0].sum()
        if kept == 0:
            self._warn_of_no_rows()
            return kd, ce, sinkhorn
        if check:
            self._check(student, teacher, labels, keep)
        if keep is not None:
            student, teacher = (z.masked_fill(~keep.unsqueeze(-1), 0.0) for z in (student, teacher))
        temperature = self.kd_temperature if temperature is None else temperature
        with torch.autocast(student.device.type, enabled=False):
            if self.alpha and self.kd != "none":
                kd = self._distil(student, teacher, temperature, keep)
            if self.ce_weight and labels is not None:
                ce = self._fit_labels(student, labels, keep)
            if self.beta * self.scale:
                sinkhorn = self._transport(student, teacher, keep)
        return kd, ce, sinkhorn

    def _distil(self, student: Tensor, teacher: Tensor, temperature: float, keep: Tensor | None) -> Tensor:
        factor = temperature**2 if self.scale_by_T2 else 1.0
        if self.mode == "regression":
            return factor * _mean_square((student - teacher) / temperature, keep)
        divergence = self.kd if callable(self.kd) else DIVERGENCES[self.kd]
        return factor * divergence(student, teacher, temperature, keep)

    def _fit_labels(self, student: Tensor, labels: Tensor, keep: Tensor | None) -> Tensor:
        if self.mode == "regression":
            return _mean_square(student - labels.to(student), keep)
        if keep is None:
            return F.cross_entropy(student.flatten(0, -2), labels.flatten())
        labels = labels.masked_fill(~keep, self.ignore_index)
        total = F.cross_entropy(
            student.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="sum"
        )
        return total / keep.sum().clamp_min(1)

    def _transport(self, student: Tensor, teacher: Tensor, keep: Tensor | None) -> Tensor:
        """S of each cloud, averaged over the clouds that are not empty."""
        rows = torch.full_like(student[..., 0, 0], student.shape[-2]) if keep is None else keep.sum(-1).to(student)
        clouds = (rows > 0).sum().clamp_min(1)
        if self.sinkhorn == "sample":
            term = sample_sinkhorn(student, teacher, self.tau, keep, eps=self.eps, n_iters=self.n_iters)
            return term if self.reduction == "mean" else term * rows.sum() / clouds
        x, y, largest = student / self.tau, teacher / self.tau, None
        if self.mode == "classification":
            x, y, largest = x.softmax(-1), y.softmax(-1), 2.0 ** (1 / self.cost_p)
        options: dict[str, Any] = {
            "p": self.cost_p, "eps": self.eps, "n_iters": self.n_iters, "mass": "count", "row_mask": keep, "col_mask": keep,
            "cost_max": largest, "check": False if largest else None,
        }  # fmt: skip
        cost = sinkhorn_divergence(x, y, **options) if self.debias else sinkhorn_cost(x, y, **options).linear_cost
        return (cost / rows.clamp_min(1) if self.reduction == "mean" else cost).sum() / clouds

    def _fit(self, student: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Labels in the shape of the terms, if all shapes are right."""
        rows, classes = student.shape[:-1], student.shape[-1]
        if len(rows) not in (1, 2) or (self.gather and len(rows) != 1):
            wanted = "(rows, classes)" if self.gather else "(rows, classes) or (clouds, rows, classes)"
            raise ValueError(
                f"logits {tuple(student.shape)}: expected {wanted}; select_token_logits picks rows of a language model"
            )
        if self.mode == "classification" and classes == 1:
            raise ValueError('logits with 1 class have a softmax of 1 whatever they are: set mode="regression"')
        if mask is not None and mask.shape != rows:
            raise ValueError(f"mask {tuple(mask.shape)} does not fit logits {tuple(student.shape)}: one entry a row")
        if labels is None:
            return None
        if self.mode == "regression":
            if labels.numel() != student.numel():
                raise ValueError(
                    f"labels {tuple(labels.shape)} do not fit logits {tuple(student.shape)}: one number an output"
                )
            return labels.reshape(student.shape)
        if labels.shape != rows:
            raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(student.shape)}: one class a row")
        if labels.is_floating_point():
            raise ValueError(
                f'labels are {labels.dtype}: class numbers must be integers; for scores set mode="regression"'
            )
        return labels

    def _check(self, student: Tensor, teacher: Tensor, labels: Tensor | None, keep: Tensor | None) -> None:
        regression = self.mode == "regression"
        for name, z in (("student_logits", student), ("teacher_logits", teacher)):
            bad = ~(z.detach().abs() if regression else z.detach()).amax(-1).isfinite()  # NaN is the largest of all
            bad = bad if keep is None else bad & keep
            if bad.any():
                what = "NaN or infinite numbers" if regression else "NaN or +inf, or -inf alone"
                raise ValueError(f"{name}: {int(bad.sum())} of {bad.numel()} rows hold {what}")
        if labels is None:
            return
        if regression:
            wrong, wanted = ~labels.isfinite().all(-1), "finite"
        else:
            wrong = (labels < 0) | (labels >= student.shape[-1])
            wanted = f"in 0 to {student.shape[-1] - 1}, or ignore_index {self.ignore_index}"
        wrong = wrong if keep is None else wrong & keep
        if wrong.any():
            raise ValueError(
                f"labels must be {wanted}: {int(wrong.sum())} are not, such as {labels[wrong].flatten()[0].item()}"
            )

    def _warn_of_no_rows(self) -> None:
        if not self._warned_of_no_rows:
            self._warned_of_no_rows = True
            warnings.warn(
                f"no row to learn from (all labels are {self.ignore_index}, or masked): the loss is 0", stacklevel=5
            )


def _mean_square(difference: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return difference.square().mean()
    rows = difference.square().mean(-1).masked_fill(~keep, 0.0)
    return rows.sum() / keep.sum().clamp_min(1)
