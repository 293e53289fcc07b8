"""A block of rows of the loss, and its gradient in place: the one thing :mod:`softclip.loss` streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The guide's logits of some rows, (rows, m); their softmax is P of the paper's softened target.
Guide = Callable[[slice], Tensor]


class SoftRows:
    """The loss of rows of one direction; see :func:`softclip.softclip_loss` for what it is.

    Args:
        guide: None if ``beta`` and ``lam`` are 0.
        groups: of the rows, int (n), and of the columns, int (m): pairs of equal numbers are positives.
        guided: bool (n), False: this row has no guide; its target is one-hot and its relation term 0. None: all have.

    After the last block ``soft``, ``relation``, ``clip`` and ``entropy`` are sums over rows.
    """

    def __init__(
        self,
        guide: Guide | None,
        groups: tuple[Tensor, Tensor],
        guided: Tensor | None,
        beta: float,
        lam: float,
        clip_weight: float,
        divergence: str,
    ) -> None:
        self.guide, self.groups, self.guided = guide, groups, guided
        self.beta, self.lam, self.clip_weight, self.divergence = beta, lam, clip_weight, divergence
        self.soft = self.relation = self.clip = self.entropy = 0.0 * groups[0][0]

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        rows, columns = self.groups
        positive = rows[part].unsqueeze(1) == columns
        hard = positive / positive.sum(1, keepdim=True).to(logits.dtype)
        soft = logits.new_full((len(logits), 1), float(self.beta > 0))  # rows whose target is not one-hot
        if self.guided is not None:
            soft *= self.guided[part].unsqueeze(1)
        guide = None if self.guide is None else self.guide(part)
        relation, gradient = torch.zeros_like(soft), torch.zeros_like(logits)
        if self.lam and guide is not None:
            # A row has nothing to relate if it has no negatives, or the guide gives them nothing.
            some = (guide > -torch.inf).logical_and_(~positive).any(1, keepdim=True)
            if self.guided is not None:
                some &= self.guided[part].unsqueeze(1)
            log_n, log_t = (torch.log_softmax(x.masked_fill(positive & some, -torch.inf), 1) for x in (logits, guide))
            relation, slope = _divergence(log_t, log_n, self.divergence, torch.ones_like(soft), positive)
            relation *= some
            gradient.add_(slope.mul_(some), alpha=self.lam)
        log_q = torch.log_softmax(logits, 1)
        if guide is None or not self.beta:
            log_t = hard.log()
        else:
            log_t = torch.log_softmax(guide, 1).add_((self.beta * soft).log())
            share = ((1 - self.beta * soft) * hard).log()
            log_t = torch.where(positive, torch.logaddexp(log_t, share), log_t)
        distance, slope = _divergence(log_t, log_q, self.divergence, soft, None)
        gradient += slope
        loss = distance + self.lam * relation
        if self.clip_weight:
            clip = -(hard * log_q).sum(1, keepdim=True)
            gradient.add_(log_q.exp() - hard, alpha=self.clip_weight)
            loss = loss + self.clip_weight * clip
            self.clip = self.clip + clip.sum()
        self.soft, self.relation = self.soft + distance.sum(), self.relation + relation.sum()
        self.entropy = self.entropy - torch.where(log_t == -torch.inf, 0.0, log_t.exp() * log_t).sum()
        logits.copy_(gradient)
        return loss.squeeze(1)


def _divergence(log_t: Tensor, log_q: Tensor, kind: str, soft: Tensor, absent: Tensor | None) -> tuple[Tensor, Tensor]:
    """D(t, q) of each row, (rows, 1), and its gradient with respect to the logits of q, (rows, m).

    KL(q || t) is infinite for a one-hot t: rows with ``soft`` 0 have KL(t || q) whole, which is CLIP's cross-entropy.
    ``absent`` pairs are in neither distribution.
    """
    t, q = log_t.exp(), log_q.exp()
    lacking = log_t == -torch.inf
    gap = (log_t - log_q).masked_fill_(lacking if absent is None else lacking | absent, 0.0)
    if kind == "ce":
        terms = t * log_q
        return -terms.masked_fill_(t == 0, 0.0).sum(1, keepdim=True), q.sub_(t)
    forward = (t * gap).sum(1, keepdim=True)
    if kind == "kl":
        return forward, q.sub_(t)
    backward = -(q * gap).sum(1, keepdim=True)
    reverse = soft / 2
    slope = (q - t).mul_(1 - reverse) - q * (gap + backward) * reverse
    return forward * (1 - reverse) + backward * reverse, slope
