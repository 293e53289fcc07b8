"""Which rows and columns of a language model's logits the loss compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkd.divergences import same_classes

IGNORED = -100  # the label of padding and of prompts
GRANULARITIES = ("token_batch", "sequence", "first_token")


class TokenLogits(NamedTuple):
    """What :func:`select_token_logits` chose, in the order of :class:`sinkd.SinKDLoss`'s arguments: ``criterion(*chosen)``."""

    student: Float[Tensor, "*rows columns"]
    teacher: Float[Tensor, "*rows columns"]
    labels: Int[Tensor, "*rows"]
    mask: Bool[Tensor, "*rows"] | None


def select_token_logits(
    student_logits: Float[Tensor, "batch length student_vocab"],
    teacher_logits: Float[Tensor, "teacher_batch teacher_length teacher_vocab"],
    labels: Int[Tensor, "label_batch label_length"],
    *,
    granularity: str = "token_batch",
    shift: bool,
    vocab_ids: Sequence[int] | None = None,
    topk: int | None = None,
    tau: float = 2.0,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
    allow_vocab_truncation: bool = False,
) -> TokenLogits:
    """The rows whose label is not -100, as clouds of outputs over the vocabulary or a part of it.

    The paper's released code hands a language model's logits to its loss as they are, whereby axes are mixed up; this is our
    reading of what was meant. The cross-entropy of a language model is over its whole vocabulary: where columns are chosen here,
    or rows subsampled, use the model's own loss for it, and of :class:`sinkd.SinKDLoss` the other two terms (``ce_weight=0.0``).

    Args:
        student_logits, teacher_logits: (batch, length, vocabulary), of the same tokens.
        labels: (batch, length), -100 where there is nothing to predict (padding, prompt).
        granularity: "token_batch": all rows are one cloud. "sequence": each sequence is a cloud. "first_token": one cloud, of the
            first row of each sequence.
        shift: whether logits at a position predict the label at the next: True for causal models, False for encoder-decoder.
        vocab_ids: keep these columns alone, such as the answer choices, in this order. A label that is not among them becomes
            -100, and SinKDLoss leaves its row out of every term; to keep it in the others, pass it no labels.
        topk: keep the columns of the k largest teacher probabilities, averaged over the chosen rows, and join all others to one
            last column "rest" with the sum of their probabilities. A label among the others becomes k.
        tau: temperature of the probabilities that ``topk`` is about. Softmax of the chosen logits / tau is exactly softmax of all
            logits / tau with the others summed. At another temperature the rest counts as one token: if kd_temperature differs
            from the loss's tau, choose once for each.
        max_rows: of each cloud keep so many rows, drawn at random; the cost of the loss is in their square.
        generator: of these draws; None: torch's default one.
        allow_vocab_truncation: if the vocabularies differ in size, cut the larger, with a warning, instead of an error.

    Shape:
        student, teacher: (rows, columns); labels: (rows), numbers of columns; mask: None. For "sequence" (batch, rows, columns)
        and (batch, rows), padded by zeros, -100 and a False in mask.

    Raises:
        ValueError: for shapes that do not agree, or options out of range.

    Example:
        >>> logits, labels = torch.randn(2, 5, 100), torch.tensor([[-100, -100, 7, 8, 1], [-100, 9, 1, -100, -100]])
        >>> chosen = select_token_logits(logits, logits, labels, shift=True, topk=10)
        >>> chosen.student.shape, chosen.labels.shape
        (torch.Size([5, 11]), torch.Size([5]))
    """
    student, teacher = same_classes(student_logits, teacher_logits.detach(), allow_vocab_truncation)
    _check_options(student, labels, granularity, vocab_ids, topk, tau, max_rows)
    if shift:
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    keep = labels != IGNORED
    if granularity == "first_token":
        keep = keep & (keep.cumsum(1) == 1)
    if max_rows is not None:
        keep = _draw(keep, max_rows, granularity == "sequence", generator)
    if vocab_ids is not None:
        columns = torch.tensor(vocab_ids, device=student.device)
        student, teacher = student[..., columns], teacher[..., columns]
        labels = _renumber(labels, columns, student_logits.shape[-1], IGNORED)
    rows, teacher_rows, golds = student[keep], teacher[keep], labels[keep]
    if topk is not None:
        rows, teacher_rows, golds = _join_rest(rows, teacher_rows, golds, topk, tau)
    if granularity != "sequence":
        return TokenLogits(rows, teacher_rows, golds, None)
    counts = keep.sum(1)
    mask = torch.arange(int(counts.max()), device=keep.device) < counts.unsqueeze(1)
    return TokenLogits(_pad(rows, mask), _pad(teacher_rows, mask), _pad(golds, mask).masked_fill(~mask, IGNORED), mask)


def _check_options(
    logits: Tensor,
    labels: Tensor,
    granularity: str,
    vocab_ids: Sequence[int] | None,
    topk: int | None,
    tau: float,
    max_rows: int | None,
) -> None:
    vocabulary = logits.shape[-1]
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: one token a position")
    if labels.numel() and int(labels.max()) >= vocabulary:
        raise ValueError(f"labels hold token {int(labels.max())}, but the logits have {vocabulary} columns")
    if vocab_ids is not None:
        if topk is not None:
            raise ValueError("vocab_ids and topk both choose columns: give one")
        if len(set(vocab_ids)) < max(2, len(vocab_ids)) or not all(0 <= i < vocabulary for i in vocab_ids):
            raise ValueError(
                f"vocab_ids must be 2 or more different tokens in 0 to {vocabulary - 1}, got {list(vocab_ids)}"
            )
    if topk is not None and not 1 <= topk < vocabulary:
        raise ValueError(f"topk must be in 1 to {vocabulary - 1} for logits {tuple(logits.shape)}, got {topk}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")


def _draw(keep: Tensor, max_rows: int, of_each: bool, generator: torch.Generator | None) -> Tensor:
    """``keep`` with at most ``max_rows`` of its True, in each row or in all."""
    device = keep.device if generator is None else generator.device
    lots = torch.rand(keep.shape, generator=generator, device=device).to(keep.device).masked_fill(~keep, -1.0)
    lots = lots if of_each else lots.flatten().unsqueeze(0)
    drawn = torch.zeros_like(lots, dtype=torch.bool).scatter(
        1, lots.topk(min(max_rows, lots.shape[1]), 1).indices, True
    )
    return drawn.view(keep.shape) & keep


def _renumber(labels: Tensor, columns: Tensor, vocabulary: int, other: int) -> Tensor:
    """Tokens as numbers of ``columns``, ``other`` for those not among them; -100 stays."""
    number = labels.new_full((vocabulary,), other)
    number[columns] = torch.arange(len(columns), device=labels.device, dtype=labels.dtype)
    return torch.where(labels == IGNORED, IGNORED, number[labels.clamp_min(0)])


def _join_rest(student: Tensor, teacher: Tensor, labels: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary = teacher.shape[-1]
    mean = (teacher.float() / tau).softmax(-1).mean(0) if len(teacher) else teacher.new_zeros(vocabulary)
    columns = mean.topk(k).indices

    def join(logits: Tensor) -> Tensor:
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        # The logit whose exp(. / tau) is the sum of the others'. Finite, since the gradient of logsumexp of -inf alone is NaN.
        smallest = torch.finfo(logits.dtype).min / 2
        others = (logits / tau).index_fill(-1, columns, -torch.inf).clamp_min(smallest)
        rest = tau * torch.logsumexp(others, -1, keepdim=True)
        return torch.cat([logits[:, columns], rest], -1)

    return join(student), join(teacher), _renumber(labels, columns, vocabulary, k)


def _pad(rows: Tensor, mask: Tensor) -> Tensor:
    padded = rows.new_zeros(*mask.shape, *rows.shape[1:])
    return padded.index_put(mask.nonzero(as_tuple=True), rows)
