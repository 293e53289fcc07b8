"""Two supervisions of one word: of the sequence model, and of the visual columns before it (Gao et al., VCIP 2019).

The paper's abstract says that there are two and what the second is for; kinds and weights here are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

KINDS = ("ctc", "attn", "frame")
GO, END = 0, 1  # classes of attention decoders, as in the deep-text-recognition-benchmark; characters follow from 2


class DoubleSupervisionOutput(NamedTuple):
    """``loss`` is ``context + weight * enhancement``, whose parts are detached; ``infeasible`` counts words left out."""

    loss: Tensor
    context: Tensor
    enhancement: Tensor
    infeasible: int


class DoubleSupervisionLoss(nn.Module):
    r"""The word's loss of the context branch, and its loss of the supervision enhancement branch.

    .. math:: L = L_{ctx} + \lambda L_{enh}, \quad L_{ctc} = -\frac1B \sum_b \log p(y_b | x_b)

    Args:
        weight: lambda, >= 0 (the paper's is not known; ours: 1).
        context: "ctc" or "attn". enhancement: "ctc", "attn" or "frame" (cross-entropy of single columns; needs boxes).
        ctc_reduction: "mean_per_sample": over words; "torch_mean": each word's loss is divided by its length, as PyTorch does.
        on_infeasible: "raise" an error for words that need more frames than there are, or "skip" and count them.

    Shape:
        context: (batch, frames, K + 1) logits with blank 0, or for "attn" (batch, steps, K + 2) with [GO] 0 and [s] 1.
        enhancement: likewise, or None: then the loss is the context's alone.
        targets: (sum of lengths,), ids 1 to K of all words in one row. target_lengths: (batch,).
        input_lengths: (batch,), frames that count, or None for all. columns: (batch, frames), classes of "frame", -100 ignored.

    Raises:
        ValueError: for a negative weight or an unknown kind; for a word that has too few frames, naming its place, the frames it
            has and those it needs.

    Example:
        >>> loss = DoubleSupervisionLoss(weight=1.0)
        >>> context, enhancement = torch.randn(2, 2, 26, 37, requires_grad=True)
        >>> output = loss(context, enhancement, torch.tensor([11, 12, 13]), torch.tensor([2, 1]))
        >>> output.loss.backward()
    """

    def __init__(
        self, weight: float = 1.0, *, context: str = "ctc", enhancement: str = "ctc",
        ctc_reduction: str = "mean_per_sample", on_infeasible: str = "raise",
    ) -> None:  # fmt: skip
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        for name, value, known in (
            ("context", context, KINDS[:2]), ("enhancement", enhancement, KINDS),
            ("ctc_reduction", ctc_reduction, ("mean_per_sample", "torch_mean")),
            ("on_infeasible", on_infeasible, ("raise", "skip")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        self.weight, self.context, self.enhancement = weight, context, enhancement
        self.ctc_reduction, self.on_infeasible = ctc_reduction, on_infeasible

    def forward(
        self,
        context: Float[Tensor, "batch steps classes"],
        enhancement: Float[Tensor, "batch frames enh_classes"] | None,
        targets: Int[Tensor, " ids"],
        target_lengths: Int[Tensor, " batch"],
        input_lengths: Int[Tensor, " batch"] | None = None,
        columns: Int[Tensor, "batch frames"] | None = None,
    ) -> DoubleSupervisionOutput:
        def branch(kind: str, logits: Tensor) -> tuple[Tensor, int]:
            if kind == "attn":
                return attention_loss(logits, targets, target_lengths), 0
            if kind == "frame":
                if columns is None:
                    raise ValueError(
                        "enhancement 'frame' needs the classes of columns: train on data with character boxes"
                    )
                wanted = columns.to(logits.device).flatten()
                total = F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum")
                return total / (wanted != -100).sum().clamp_min(1), 0
            each, feasible = ctc_loss(logits, targets, target_lengths, input_lengths, self.on_infeasible)
            if self.ctc_reduction == "torch_mean":
                each = each / target_lengths.to(each.device).clamp_min(1)
            infeasible = int((~feasible).sum())
            return each.sum() / max(1, len(each) - infeasible), infeasible

        loss, infeasible = branch(self.context, context)
        first, second = loss.detach(), torch.zeros_like(loss)
        if enhancement is not None and self.weight:
            added, other = branch(self.enhancement, enhancement)
            loss, second, infeasible = loss + self.weight * added, added.detach(), max(infeasible, other)
        return DoubleSupervisionOutput(loss, first, second, infeasible)


def ctc_loss(
    logits: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    input_lengths: Tensor | None = None,
    on_infeasible: str = "raise",
) -> tuple[Tensor, Tensor]:
    """-log p(word) of each word by CTC (Graves et al. 2006), in float32 under any autocast; 0 where frames do not suffice.

    Returns:
        (batch,) losses, and (batch,) whether the word's frames suffice.
    """
    batch, frames = logits.shape[:2]
    have = torch.full((batch,), frames) if input_lengths is None else input_lengths.cpu()
    need = needed_frames(targets.cpu(), target_lengths.cpu())
    feasible = need <= have
    if on_infeasible == "raise" and not feasible.all():
        at = int((~feasible).nonzero()[0, 0])
        raise ValueError(
            f"word {at} of the batch needs {int(need[at])} frames for its {int(target_lengths[at])} characters and has "
            f'{int(have[at])}: use wider images, leave it out, or on_infeasible="skip"'
        )
    with torch.autocast(logits.device.type, enabled=False):
        each = F.ctc_loss(
            logits.float().log_softmax(2).transpose(0, 1), targets, have, target_lengths.cpu(),
            blank=0, reduction="none", zero_infinity=True,
        )  # fmt: skip
    return each, feasible


def needed_frames(targets: Tensor, lengths: Tensor) -> Tensor:
    """One frame for each character, and a blank between equal neighbours: (batch,)."""
    word = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    repeats = (targets[1:] == targets[:-1]) & (word[1:] == word[:-1])
    return lengths.index_add(0, word[1:], repeats.to(lengths.dtype)) if len(word) > 1 else lengths


def attention_targets(targets: Tensor, lengths: Tensor, steps: int) -> Tensor:
    """(batch, steps) classes of an attention decoder: the word's, [s], and [GO], which losses ignore, behind.

    Raises:
        ValueError: for a word that has not room for [s], naming its place.
    """
    if len(lengths) and int(lengths.max()) + 1 > steps:
        at = int(lengths.argmax())
        raise ValueError(
            f"word {at} of the batch has {int(lengths[at])} characters; the attention decoder has room for {steps - 1}: "
            "give a greater max_length, or use CTC, which has no such limit"
        )
    wanted = torch.full((len(lengths), steps), GO, dtype=torch.int64, device=targets.device)
    place = torch.arange(steps, device=targets.device)
    lengths = lengths.to(targets.device).unsqueeze(1)
    wanted[place < lengths] = targets + 1
    wanted[place == lengths] = END
    return wanted


def attention_loss(logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Cross-entropy of (batch, steps, K + 2) logits over all characters and [s] of the batch."""
    wanted = attention_targets(targets.to(logits.device), lengths, logits.shape[1])
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=GO)
