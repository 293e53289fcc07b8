"""The loss as sentence-transformers wants it: a module around a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peg.grad_cache import Features, encode_features
from peg.loss import HardnessSchedule, ProgressiveOutput, WeightSchedule, progressive_info_nce

CITATION = """@article{wu2023peg,
  title = {Towards Robust Text Retrieval with Progressive Learning},
  author = {Wu, Tong and Qin, Yulei and Zhang, Enwei and Xu, Zihan and Gao, Yuting and Li, Ke and Sun, Xing},
  journal = {arXiv preprint arXiv:2311.11691},
  year = {2023}
}"""


class ProgressiveContrastiveLoss(nn.Module):
    """:func:`peg.progressive_info_nce` of a SentenceTransformer, whose hardness follows the training's optimiser steps.

    It works in an unmodified ``SentenceTransformerTrainer``, with the columns of MultipleNegativesRankingLoss (anchor, positive,
    any number of negatives) and with large batches instead of CachedMultipleNegativesRankingLoss. The trainer tells it how
    far training is through ``callbacks=[loss.callback()]``; in a loop of your own, set ``loss.step`` and ``loss.total_steps``.

    Args:
        model: the SentenceTransformer.
        schedule: hardness over training; a number: constant.
        temperature, normalise, apply_to, false_negative_margin, margin_strategy, gather: see :func:`peg.progressive_info_nce`.
        query_weighting: none, or loss: queries weigh (1 - p)^gamma, where gamma rises from 0 to 1 over training.
        pairs_until: share of training before which hard negatives are left out, 0 to 1.
        micro_batch_tokens: encode in micro-batches of so many tokens (:func:`peg.grad_cache.encode_features`); None: at once.
        in_batch: which candidates are negatives: see :func:`peg.progressive_info_nce`.

    Raises:
        ValueError: in training, if the schedule needs to know how far it is and nobody said so.

    Example:
        >>> loss = ProgressiveContrastiveLoss(nn.Identity(), schedule=HardnessSchedule(0.0, 5.0))
        >>> loss.step, loss.total_steps = 40, 100
        >>> loss.hardness()
        2.5
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: WeightSchedule | float | None = None,
        *,
        temperature: float = 0.02,
        normalise: str = "none",
        apply_to: str = "all",
        false_negative_margin: float | None = None,
        margin_strategy: str = "absolute",
        query_weighting: str = "none",
        pairs_until: float = 0.0,
        in_batch: str | Sequence[str] = "all",
        gather: bool = False,
        micro_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if schedule is None:
            schedule = HardnessSchedule()
        elif isinstance(schedule, int | float):
            schedule = HardnessSchedule(end=float(schedule), shape="constant")
        if not isinstance(schedule, WeightSchedule):
            raise ValueError(
                f"a schedule needs lam(step, total) and log_weight(sim, sim_pos, lam); {schedule!r} has not both"
            )
        if query_weighting not in ("none", "loss"):
            raise ValueError(f"query_weighting must be none or loss, got {query_weighting!r}")
        self.model, self.schedule = model, schedule
        self.temperature, self.query_weighting, self.pairs_until = temperature, query_weighting, pairs_until
        self.micro_batch_tokens = micro_batch_tokens
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "normalise": normalise,
            "apply_to": apply_to,
            "false_negative_margin": false_negative_margin,
            "margin_strategy": margin_strategy,
            "in_batch": in_batch,
            "gather": gather,
        }
        # A name, where it says the same: it is faster than a function.
        self.difficulty = schedule.difficulty if type(schedule) is HardnessSchedule else schedule.log_weight
        self.step: int | None = None
        self.total_steps: int | None = None
        self.statistics = False
        self.output: ProgressiveOutput | None = None

    def forward(self, sentence_features: Iterable[Features], labels: Any = None) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: tokenised anchors, positives, first negatives, ... of b texts each. With ``labels`` from
                :class:`peg.batches.PegCollator`: distinct queries and distinct passages.
            labels: where in these each query and candidate is, and what masks need; anything else is ignored.
        """
        columns = [encode_features(self.model, features, self.micro_batch_tokens) for features in sentence_features]
        if isinstance(labels, dict):
            queries, passages = columns[0][labels["queries"]], columns[1][labels["candidates"]]
            positives, *negatives = passages.chunk(len(passages) // len(queries))
            masks = {
                name: labels[name] for name in ("mask", "candidate_ids", "positive_ids", "sources") if name in labels
            }
        else:
            queries, positives, *negatives = columns
            masks = {}
        if self.pairs_until and self._progress() < self.pairs_until:
            negatives = []
            masks = {n: m[: len(queries)] if n == "candidate_ids" else m for n, m in masks.items() if n != "mask"}
        output = progressive_info_nce(
            queries,
            positives,
            negatives,
            hardness=self.hardness(),
            difficulty=self.difficulty,
            gamma=self._progress() if self.query_weighting == "loss" else 0.0,
            statistics=self.statistics,
            **masks,
            **self.options,
        )
        self.output = output._replace(loss=output.loss.detach())  # the rest is detached already
        return output.loss

    def hardness(self) -> float:
        """lambda at this step."""
        if isinstance(self.schedule, HardnessSchedule) and self.schedule.shape == "constant":
            return self.schedule.end
        return self.schedule.lam(*self._steps())

    def _progress(self) -> float:
        step, total = self._steps()
        return step / total

    def _steps(self) -> tuple[int, int]:
        """Optimiser steps done and in all; where nobody said so, those of the end, but not in training."""
        if self.step is not None and self.total_steps:
            return self.step, self.total_steps
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "the hardness schedule needs to know how far training is: give the trainer callbacks=[loss.callback()], or "
                "set loss.step and loss.total_steps before each step"
            )
        return 1, 1

    def callback(self) -> TrainerCallback:
        """For a trainer's ``callbacks``: optimiser steps done and in all, which a resumed run goes on with."""
        return _Steps(self)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says."""
        return {"schedule": repr(self.schedule), "query_weighting": self.query_weighting, **self.options}

    @property
    def citation(self) -> str:
        """For the model card."""
        return CITATION


class _Steps(TrainerCallback):
    def __init__(self, loss: ProgressiveContrastiveLoss) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.step, self.loss.total_steps = state.global_step, state.max_steps
        every = state.logging_steps
        self.loss.statistics = bool(every) and (state.global_step + 1) % every == 0
