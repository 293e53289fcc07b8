"""Which training samples are shown as demonstrations of a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

SAMPLERS = {"random": (), "visual": ("visual",), "text": ("text",), "mixed": ("visual", "text")}  # with what they need
MOST = 8  # demonstrations
BLOCK = 1 << 22  # similarities at a time


class DemonstrationSampler:
    """Draws the k demonstrations of each query from a pool of n training samples.

    No demonstration has the query's id or group, and no two are of one group (ours). How the authors choose demonstrations was
    not found; all of this is ours. The samplers:

    - "random": uniform over the samples. What is drawn depends on the seed, the epoch and the query's id alone.
    - "visual", "text": those with the largest cosine of embeddings, the most similar last, next to the query. The same in each
      epoch. Which of equally similar ones is taken (cosines equal to 6 decimals) depends on the seed and the query's id, so that
      one question about many pictures does not always get the same few.
    - "mixed": the same by the mean of both cosines.

    Args:
        ids, groups: of the pool, n of each.
        k: demonstrations of a query, 0 to 8.
        sampler: see above.
        seed: of all that is random.
        visual, text: embeddings of the pool, where the sampler needs them.

    Raises:
        ValueError: for another sampler or k, embeddings that are missing or not (n, w).

    >>> sampler = DemonstrationSampler(list("abcd"), ["cat", "cat", "dog", "cow"], k=2)
    >>> sorted(sampler.draw(["a"], ["cat"])[0].tolist())
    [2, 3]
    """

    def __init__(
        self,
        ids: Sequence[str],
        groups: Sequence[str],
        *,
        k: int = 2,
        sampler: str = "random",
        seed: int = 0,
        visual: Float[Tensor, "n w"] | None = None,
        text: Float[Tensor, "n v"] | None = None,
    ) -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        if len(ids) != len(groups):
            raise ValueError(f"the pool needs a group for each id; got {len(ids)} ids and {len(groups)} groups")
        _check_k(k)
        self.k, self.sampler, self.seed = k, sampler, seed
        self._row = {name: i for i, name in enumerate(ids)}
        self._code = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        self._codes = np.array([self._code[name] for name in groups], np.int64)
        self._pool = self._embeddings({"visual": visual, "text": text}, len(ids))

    def draw(
        self,
        ids: Sequence[str],
        groups: Sequence[str],
        *,
        visual: Float[Tensor, "b w"] | None = None,
        text: Float[Tensor, "b v"] | None = None,
        epoch: int = 0,
        k: int | None = None,
    ) -> Int[Tensor, "b k"]:
        """Rows of the pool for each query, which need not be in it.

        Args:
            ids, groups: of the queries. visual, text: their embeddings, where the sampler needs them.
            epoch: random demonstrations change with it.
            k: another number of demonstrations than the sampler's own.

        Raises:
            ValueError: for a k outside 0 to 8, fewer than k eligible samples or groups, with counts, and embeddings that are
                missing or not (b, w).
        """
        k = self.k if k is None else k
        _check_k(k)
        queries = self._embeddings({"visual": visual, "text": text}, len(ids))
        if self.sampler == "random" or k == 0:
            rows = [self._random(name, group, epoch, k) for name, group in zip(ids, groups, strict=True)]
            return torch.tensor(rows, dtype=torch.int64).reshape(len(ids), k)
        size = max(1, BLOCK // max(1, len(self._row)))
        blocks = [slice(start, start + size) for start in range(0, len(ids), size)]
        found = [self._nearest(ids[b], groups[b], [each[b] for each in queries], k) for b in blocks]
        return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)

    def _embeddings(self, given: dict[str, Tensor | None], count: int) -> list[Tensor]:
        """Those that the sampler needs, as rows of length 1."""
        needed = {name: given[name] for name in SAMPLERS[self.sampler]}
        for name, values in needed.items():
            if values is None:
                raise ValueError(f"sampler {self.sampler!r} needs {name} embeddings of the pool and of the queries")
            if values.ndim != 2 or len(values) != count:
                raise ValueError(f"{name} embeddings must be ({count}, width), got {tuple(values.shape)}")
        return [normalize(values.float(), dim=1) for values in needed.values() if values is not None]

    def _random(self, name: str, group: str, epoch: int, k: int) -> list[int]:
        random = Random(f"{self.seed} {epoch} {name}")  # by SHA-512, the same everywhere
        count, own, seen = len(self._codes), self._row.get(name), {self._code.get(group)}
        rows: list[int] = []
        draws = (int(random.random() * count) for _ in range(4 * MOST))
        for row in chain(draws, _shuffled(count, random)) if count else ():  # all rows only if the draws are too few
            if len(rows) == k:
                break
            if row != own and self._codes[row] not in seen:
                rows.append(row)
                seen.add(self._codes[row])
        if len(rows) < k:
            raise self._too_few(name, group, k)
        return rows

    def _nearest(self, ids: Sequence[str], groups: Sequence[str], queries: list[Tensor], k: int) -> Tensor:
        if not len(self._codes):
            raise self._too_few(ids[0], groups[0], k)
        device = queries[0].device
        cosine = sum(
            (q @ p.to(device).T for q, p in zip(queries, self._pool, strict=True)), torch.zeros((), device=device)
        )
        similarity = (cosine / len(queries)).double().round_(decimals=6)
        turn = [crc32(f"{self.seed} {name}".encode()) / 2**32 for name in ids]
        order = torch.from_numpy(np.random.RandomState(self.seed).random_sample(len(self._codes))).to(device)
        similarity += (order + torch.tensor(turn, device=device, dtype=order.dtype)[:, None]).frac_() * 5e-7
        codes = torch.from_numpy(self._codes).to(device)
        taken = torch.tensor([self._code.get(group, -1) for group in groups], device=device)
        own = [(i, self._row[name]) for i, name in enumerate(ids) if name in self._row]
        if own:
            similarity[tuple(torch.tensor(own, device=device).T)] = -torch.inf
        rows = torch.empty(len(ids), k, dtype=torch.int64)
        for place in reversed(range(k)):
            similarity.masked_fill_(codes == taken[:, None], -torch.inf)
            best, row = similarity.max(1)
            if bool((best == -torch.inf).any()):
                short = int((best == -torch.inf).nonzero()[0])
                raise self._too_few(ids[short], groups[short], k)
            rows[:, place], taken = row.cpu(), codes[row]
        return rows

    def _too_few(self, name: str, group: str, k: int) -> ValueError:
        eligible = self._codes != self._code.get(group, -1)
        if name in self._row:
            eligible[self._row[name]] = False
        samples, kinds = int(eligible.sum()), len(np.unique(self._codes[eligible]))
        only = f"{kinds} different groups among {samples}" if samples >= k else str(samples)
        return ValueError(
            f"k={k} demonstrations asked, only {only} eligible samples after excluding group {group!r}; "
            "lower k or add samples"
        )


def _shuffled(count: int, random: Random) -> Iterator[int]:
    yield from sorted(range(count), key=lambda _: random.random())


def _check_k(k: int) -> None:
    if not 0 <= k <= MOST:
        raise ValueError(f"k, the number of demonstrations, must be 0 to {MOST}; got {k}")
