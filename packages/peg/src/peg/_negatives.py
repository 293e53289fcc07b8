"""Which candidates are a query's negatives, and with what weight: applied to one block of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from papercore.ops import gather_features
from torch import Tensor

# (cosines (rows, C), those of the positives (rows, 1), lambda) -> log-weights (rows, C).
LogWeight = Callable[[Tensor, Tensor, float], Tensor]
RULES = ("all", "own", "none")


class Negatives:
    """Masks and log-weights of b queries and k hard negatives each, as ``papercore.ops.info_nce`` wants them.

    Columns are a rank's positives, then its first hard negatives, and so on; with ``gather`` rank after rank. Every ``mask_*``
    method adds one reason to leave a pair out; no method keeps a matrix of all pairs that it was not given.
    """

    def __init__(
        self, cosines: Tensor, k: int, temperature: float, gather: bool = False, group: dist.ProcessGroup | None = None
    ) -> None:
        """``cosines`` (b, 1) are those of the positives."""
        self.cosines, self.b, self.k, self.temperature = cosines, len(cosines), k, temperature
        self.gather, self.group = gather, group
        device = cosines.device
        (first,), offset = self._of_all_ranks(torch.zeros(self.b * (1 + k), dtype=torch.bool, device=device))
        self.count = len(first)
        self.own = (torch.arange(self.b, device=device) + offset).unsqueeze(1)  # (b, 1), each query's positive
        self.hard = self.own + self.b * torch.arange(1, k + 1, device=device)  # (b, k), its hard negatives
        self.masks: list[Callable[[Tensor, slice], object]] = []  # each fills in a block
        self.limit: Tensor | None = None
        self.factor = 1.0
        self.weight: Callable[[Tensor, Tensor], Tensor] | None = None
        self.apply_to, self.mean1 = "all", False
        self.figures: dict[str, Tensor] | None = None

    def _of_all_ranks(self, *tensors: Tensor) -> tuple[list[Tensor], int]:
        return gather_features(*tensors, with_grad=False, group=self.group) if self.gather else (list(tensors), 0)

    # --- masks

    def mask_given(self, mask: Tensor) -> None:
        """(b, k): which hard negatives there are. (b, C): which pairs count."""
        if mask.dtype != torch.bool or tuple(mask.shape) not in ((self.b, self.k), (self.b, self.count)):
            raise ValueError(
                f"mask must be bool, ({self.b}, {self.k}) for the hard negatives or ({self.b}, {self.count}) for all pairs; "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        if mask.shape[1] == self.count:
            self.masks.append(lambda block, part: block.masked_fill_(~mask[part], -torch.inf))
            return
        (absent,), _ = self._of_all_ranks(torch.cat([mask.new_zeros(self.b), ~mask.T.flatten()]))
        columns = absent.nonzero().squeeze(1)
        self.masks.append(lambda block, part: block.index_fill_(1, columns, -torch.inf))

    def mask_known(self, candidate_ids: Tensor, positive_ids: Tensor) -> None:
        """Candidates one of whose ids is among a query's known positives; ids of -1 match nothing."""
        for name, ids, wanted_rows in (
            ("candidate_ids", candidate_ids, self.b * (1 + self.k)),
            ("positive_ids", positive_ids, self.b),
        ):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise ValueError(f"{name} must be integers, got {ids.dtype}")
            if len(ids) != wanted_rows:
                raise ValueError(f"{name} {tuple(ids.shape)} must have {wanted_rows} rows")
        (everyone,), _ = self._of_all_ranks(candidate_ids.reshape(len(candidate_ids), -1).long())
        values, order = everyone.flatten().sort()
        wanted = positive_ids.long().flatten()
        low, high = torch.searchsorted(values, wanted), torch.searchsorted(values, wanted, right=True)
        counts = torch.where(wanted >= 0, high - low, 0)
        rows = torch.arange(self.b, device=wanted.device).repeat_interleave(positive_ids.shape[1])
        rows = rows.repeat_interleave(counts)  # in ascending order, so that a block's are next to each other
        step = torch.arange(len(rows), device=wanted.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        columns = order[low.repeat_interleave(counts) + step] // everyone.shape[1]

        def fill(block: Tensor, part: slice) -> None:
            ends = torch.searchsorted(rows, rows.new_tensor([part.start, part.stop]))
            here = slice(int(ends[0]), int(ends[1]))
            block[rows[here] - part.start, columns[here]] = -torch.inf

        self.masks.append(fill)

    def mask_sources(self, sources: Tensor, in_batch: str | Sequence[str]) -> None:
        """Each source's rule: all candidates of the batch, those of the own source, or none but the query's hard negatives."""
        if sources.is_floating_point() or sources.shape != (self.b,):
            raise ValueError(f"sources must be {self.b} integers, got {sources.dtype} {tuple(sources.shape)}")
        words = [in_batch] * (int(sources.max()) + 1) if isinstance(in_batch, str) else list(in_batch)
        if any(word not in RULES for word in words) or len(words) <= int(sources.max()) or int(sources.min()) < 0:
            raise ValueError(
                f"in_batch must be one of {', '.join(RULES)}, or one such word for each source from 0 to {int(sources.max())}; "
                f"got {in_batch}"
            )
        rule = sources.new_tensor([RULES.index(word) for word in words])[sources].unsqueeze(1)
        (of_columns,), _ = self._of_all_ranks(sources.repeat(1 + self.k))

        def fill(block: Tensor, part: slice) -> None:
            keep = (rule[part] == 0) | ((rule[part] == 1) & (sources[part].unsqueeze(1) == of_columns))
            keep.scatter_(1, self.hard[part], True)
            block.masked_fill_(~keep, -torch.inf)

        self.masks.append(fill)

    def mask_more_similar(self, margin: float, relative: bool) -> None:
        """Pairs more similar than the positive by more than a margin, absolute or relative to its |cosine|."""
        self.limit = (self.cosines + margin * (self.cosines.abs() if relative else 1.0)) / self.temperature

    # --- weights

    def weigh(self, lam: float, difficulty: str | LogWeight, apply_to: str, mean1: bool) -> None:
        """lambda times the difficulty of each negative, or what a function says."""
        if difficulty == "cosine" and apply_to == "all" and not mean1 and self.figures is None:
            self.factor = 1 + lam * self.temperature  # s / tau + lambda s: another temperature, and nothing to add
            return
        self.apply_to, self.mean1 = apply_to, mean1
        if callable(difficulty):
            self.weight = lambda sim, sim_pos: difficulty(sim, sim_pos, lam)
        elif difficulty == "margin":
            self.weight = lambda sim, sim_pos: lam * (sim - sim_pos)
        else:
            self.weight = lambda sim, sim_pos: lam * sim

    def count_figures(self) -> None:
        """From now on, sum up over the queries: the weight of their negatives, how many these amount to, the masked ones."""
        self.figures = {name: self.cosines.new_zeros(()) for name in ("weight", "effective", "negatives")}

    @property
    def acts(self) -> bool:
        """Whether there is anything to mask, weigh or count."""
        return (
            bool(self.masks)
            or self.factor != 1.0
            or any(x is not None for x in (self.limit, self.weight, self.figures))
        )

    def __call__(self, block: Tensor, part: slice) -> None:
        """Mask and weigh logits cosine / tau (rows, C) in place; what becomes of the positives does not matter."""
        beyond = None if self.limit is None else block > self.limit[part]
        weights = None
        if self.weight is not None:
            weights = self.weight(block * self.temperature, self.cosines[part])
            if self.apply_to != "all":
                hard = torch.zeros_like(block, dtype=torch.bool).scatter_(1, self.hard[part], True)
                weights = weights.masked_fill(~hard if self.apply_to == "hard" else hard, 0.0)
        if self.factor != 1.0:
            block.mul_(self.factor)
        if beyond is not None:
            block.masked_fill_(beyond, -torch.inf)
        for fill in self.masks:
            fill(block, part)
        if self.mean1 or self.figures is not None:
            out = (block == -torch.inf).scatter_(1, self.own[part], True)
            weights = self._over_negatives(torch.zeros_like(block) if weights is None else weights, out)
        if weights is not None:
            block += weights

    def _over_negatives(self, weights: Tensor, out: Tensor) -> Tensor:
        """What needs all negatives of a query: the mean of their weights, and the figures."""
        counts = (~out).sum(1)
        some = counts.clamp_min(1).to(weights)
        inside = weights.masked_fill(out, -torch.inf)
        total = inside.logsumexp(1)
        if self.mean1:
            mean = torch.where(counts > 0, total - some.log(), 0.0).unsqueeze(1)
            weights, inside, total = weights - mean, inside - mean, total - mean.squeeze(1)
        if self.figures is not None:
            effective = torch.where(counts > 0, (2 * total - (2 * inside).logsumexp(1)).exp(), 0.0)
            self.figures["weight"] += total.exp().sum()
            self.figures["effective"] += effective.sum()
            self.figures["negatives"] += counts.sum()
        return weights
