"""Where does the Sinkhorn term help? Its weight and eps, batch sizes, and numbers of classes; both losses tuned alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from papercore.lab.report import console
from papercore.lab.study import Comparison, Metric, ReproduceOptions, Scale, Study

from sinkd.plots import plot_regimes
from sinkd.study import train_and_evaluate

WEIGHTS, EPS = (0.1, 0.5, 2.0, 8.0), (0.02, 0.1, 0.5)
# Twelve trials for each loss; alpha 0 is cross-entropy alone. A trial of SinKD repeats one of KL with the term added: which
# of them with which weight and eps is drawn once.
COMMON = [
    {"kd_temperature": temperature, "alpha": alpha, "learning_rate": rate}
    for temperature in (1.0, 2.0)
    for alpha in (0.0, 0.5, 0.9)
    for rate in (5e-4, 1e-3)
]
TERMS = [{"beta": weight, "eps": eps} for weight in WEIGHTS for eps in EPS]
PARTNERS = np.random.default_rng(0).permutation(len(COMMON)).tolist()
TRIALS: dict[str, dict[str, Any]] = {
    **{f"KL {i}": {**common, "beta": 0.0} for i, common in enumerate(COMMON)},
    **{f"SinKD {i}": {**COMMON[i], **term} for i, term in zip(PARTNERS, TERMS, strict=True)},
}
METRICS = [Metric("score"), Metric("agreement"), Metric("teacher_l1", lower_is_better=True)]


def _clinc150(classes: int, batch: int, epochs: int) -> dict[str, Any]:
    return {"classes": classes, "per_device_train_batch_size": batch, "num_train_epochs": epochs}


search = Study(
    name="sinkd",
    claim="Which settings of the Sinkhorn term help, on validation rows?",
    metrics=METRICS,
    baseline="KL 0",
    method=f"SinKD {PARTNERS[0]}",
    arms=TRIALS,
    scales={
        "quick": Scale(
            {"sample": {"data": "sample", "max_train": 100, "num_train_epochs": 1, "teacher_epochs": 1}},
            seeds=1,
            options={"split": "validation", "teacher_learning_rate": 2e-3},
        ),
        "small": Scale(
            {
                "20 classes, batch 16": _clinc150(20, 16, 12),
                "20 classes, batch 64": _clinc150(20, 64, 12),
                "60 classes, batch 16": _clinc150(60, 16, 6),
                "60 classes, batch 64": _clinc150(60, 64, 6),
            },
            seeds=1,
            options={
                "data": "clinc150", "teacher": "minilm", "student_layers": 2, "max_train": 2000, "max_length": 48,
                "teacher_learning_rate": 2e-4, "teacher_epochs": 12, "bf16": True, "warmup_steps": 0.1, "split": "validation",
            },
        ),
    },
    run=train_and_evaluate,
)  # fmt: skip


def regimes(options: ReproduceOptions) -> Comparison:
    """The verb ``regimes``: all trials on validation rows, then the best of each loss from new seeds on test rows.

    ``seeds`` is that of the second part.

    Raises:
        ValueError: for an unknown scale, or a choice of arms.
    """
    if options.arms:
        raise ValueError("regimes tunes all trials of both losses alike: leave out --arms")
    folder = Path(options.output_dir or f"runs/sinkd-regimes-{options.scale}")
    tried = search.reproduce(dataclasses.replace(options, seeds=None, output_dir=str(folder / "search")))
    scale = search.scales[options.scale]
    tasks = {task: {**scale.tasks[task], "choices": best(tried, task)} for task in options.tasks or tried.tasks}
    final = Study(
        name="sinkd",
        claim="With equally many trials on validation rows, SinKD's best beats KL's best.",
        metrics=METRICS,
        baseline="KL",
        method="SinKD",
        arms={"KL": {"loss": "KL"}, "SinKD": {"loss": "SinKD"}},
        scales={options.scale: Scale(tasks, seeds=5, options={**scale.options, "split": "test"})},
        run=_chosen,
    )
    tested = final.reproduce(dataclasses.replace(options, output_dir=str(folder / "test")))
    gains = {task: gains_of(tried, task) for task in tasks}
    plot_regimes(gains, {task: tested.gain("SinKD", task, METRICS[0]) for task in tasks}, folder / "regimes.png")
    console.print(f"{folder / 'regimes.png'}", soft_wrap=True)
    return tested


def best(tried: Comparison, task: str) -> dict[str, dict[str, Any]]:
    """The trial of each loss with the highest mean validation score; the first of equals."""

    def score(arm: str) -> float:
        return float(np.mean(list(tried.values(arm, task, "score").values())))

    return {loss: TRIALS[max((arm for arm in TRIALS if arm.startswith(loss)), key=score)] for loss in ("KL", "SinKD")}


def gains_of(tried: Comparison, task: str) -> dict[tuple[float, float], float]:
    """(weight, eps) -> validation score minus that of the trial without the term."""
    gains = {}
    for i, term in zip(PARTNERS, TERMS, strict=True):
        with_term, without = (tried.values(f"{loss} {i}", task, "score") for loss in ("SinKD", "KL"))
        gains[term["beta"], term["eps"]] = float(np.mean([with_term[seed] - without[seed] for seed in without]))
    return gains


def _chosen(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """A cell of the second part, with the search's teachers. Its seeds are not those of the search."""
    choice = options.pop("choices")[options.pop("loss")]
    beside = folder.parents[2] / "search" / folder.parent.name / f"test-{folder.name}"
    return train_and_evaluate({**options, **choice}, 100 + seed, beside)
