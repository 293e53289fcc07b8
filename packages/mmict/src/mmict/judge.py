"""What a model writes after its demonstrations, and how likely it finds what it should have written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from mmict.corpus import Corpus
from mmict.demonstrations import DemonstrationSampler
from mmict.dialogs import make_dialogs
from mmict.model import MMICTModel


@dataclass
class Judgement:
    """Of n queries: texts, the negative log-likelihood of the true ones (n,), summed over their tokens (n,), and the rows of the
    pool that were shown, with their texts."""

    predictions: list[str]
    nll: np.ndarray
    tokens: np.ndarray
    rows: list[list[int]]
    demonstrations: list[list[str]]


@torch.inference_mode()
def judge(
    model: MMICTModel,
    queries: Corpus,
    pool: Corpus,
    sampler: DemonstrationSampler,
    k: int,
    *,
    batch_size: int = 64,
    progress: bool = True,
    **generate: Any,
) -> Judgement:
    """Judge a model with k demonstrations for each query. ``generate``: num_beams and so on, see :meth:`MMICTModel.generate`;
    what a query gets does not depend on the others."""
    model.eval()
    rows = list(range(len(queries)))
    shown = queries.demonstrations(rows, sampler, pool, k)
    order = sorted(rows, key=lambda row: len(queries.targets[row]))  # of like length, so that little is padded
    predictions, nll, tokens = [""] * len(rows), np.zeros(len(rows)), np.zeros(len(rows), int)
    for start in tqdm(range(0, len(order), batch_size), desc=f"judge, k = {k}", disable=not progress, leave=False):
        part = order[start : start + batch_size]
        dialogs = make_dialogs(queries, part, pool, [shown[row] for row in part]).to(model.device)
        found = model(dialogs)
        nll[part], tokens[part] = found.nll.cpu().numpy(), found.tokens.cpu().numpy()
        for row, text in zip(part, model.generate_dialogs(dialogs, **generate), strict=True):
            predictions[row] = text
    return Judgement(predictions, nll, tokens, shown, [[pool.samples.texts[i] for i in of] for of in shown])
