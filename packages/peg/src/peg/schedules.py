"""Is there a progressive schedule that beats a constant temperature? Families of them, tuned alike on validation data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from papercore.lab.report import console
from papercore.lab.study import Comparison, Metric, ReproduceOptions, Scale, Study

from peg.plots import plot_schedules
from peg.study import PIECES, compare

CONTROL = "constant temperature"
# What a family fixes; (lowest, highest) is drawn, evenly on a logarithmic scale. The temperature is 1 / inverse.
INVERSE = (12.0, 40.0)
FAMILIES: dict[str, dict[str, Any]] = {
    CONTROL: {"hardness_end": 0.0},
    "constant margin": {"margin": (0.2, 4.0)},
    "constant weights": {"hardness_shape": "constant", "hardness_end": (1.0, 20.0)},
    "ramp": {"hardness_end": (1.0, 20.0)},
    "reversed ramp": {"hardness_start": (1.0, 20.0), "hardness_end": 0.0},
    "easy to hard": {"hardness_start": (-8.0, -1.0), "hardness_end": (1.0, 20.0)},
    "ramp, margin": {"difficulty": "margin", "hardness_end": (1.0, 20.0)},
    "ramp, mean 1": {"normalise": "mean1", "hardness_end": (1.0, 20.0)},
    "ramp, hard negatives": {"apply_to": "hard", "hardness_end": (1.0, 20.0)},
    "pairs first": {"hardness_end": 0.0, "pairs_until": (0.1, 0.6)},
    "hard queries": {"hardness_end": 0.0, "query_weighting": "loss"},
}
TRIALS_EACH = 6


def _trials() -> dict[str, dict[str, Any]]:
    """The same number for each family: a Latin hypercube, each range cut into as many parts and each part used once."""
    trials: dict[str, dict[str, Any]] = {}
    for family, options in FAMILIES.items():
        rng = np.random.default_rng(0)
        inverse = _spread(INVERSE, np.arange(TRIALS_EACH))
        drawn = {name: _spread(v, rng.permutation(TRIALS_EACH)) for name, v in options.items() if isinstance(v, tuple)}
        for i in range(TRIALS_EACH):
            trial = {name: drawn[name][i] if name in drawn else value for name, value in options.items()}
            trials[f"{family} {i}"] = {"temperature": round(1 / inverse[i], 5), **trial}
    return trials


def _spread(ends: tuple[float, float], parts: np.ndarray) -> list[float]:
    """The middles of these of TRIALS_EACH equal parts between two numbers of one sign, on a logarithmic scale."""
    low, high = np.log(np.abs(ends))
    return [round(float(np.sign(ends[0]) * np.exp(low + (high - low) * (i + 0.5) / TRIALS_EACH)), 3) for i in parts]


TRIALS = _trials()

search = Study(
    name="peg",
    claim="Which schedules help, on validation queries?",
    metrics=[Metric("dev nDCG@10")],
    baseline=f"{CONTROL} 0",
    method="ramp 0",
    arms=TRIALS,
    scales={
        "quick": Scale({"sample": {"task": "sample", "width": 32}}, seeds=1, options={**PIECES, "num_train_epochs": 1}),
        "small": Scale({"medquad": {"task": "medquad", "width": 128}}, seeds=2, options=PIECES),
    },
    run=lambda options, seed, folder: compare(options, 1000 + seed, folder),
)


def schedules(options: ReproduceOptions) -> Comparison:
    """The verb ``schedules``: all trials on validation queries, then the best of each family from new seeds on test queries.

    ``seeds`` is that of the second part.

    Raises:
        ValueError: for an unknown scale, or a choice of arms.
    """
    if options.arms:
        raise ValueError("schedules tunes the trials of all families alike: leave out --arms")
    folder = Path(options.output_dir or f"runs/peg-schedules-{options.scale}")
    tried = search.reproduce(dataclasses.replace(options, seeds=None, output_dir=str(folder / "search")))
    scale = search.scales[options.scale]
    (task,) = scale.tasks
    chosen = {family: TRIALS[name] for family, name in best(tried, task).items()}
    leader = max(
        (family for family in chosen if family != CONTROL), key=lambda f: validation(tried, task, best(tried, task)[f])
    )
    final = Study(
        name="peg",
        claim="A schedule, chosen on validation queries, beats the best constant temperature, chosen likewise.",
        metrics=[Metric("nDCG@10"), Metric("MRR@10"), Metric("Recall@10")],
        baseline=CONTROL,
        method=leader,
        arms=chosen,
        scales={options.scale: dataclasses.replace(scale, seeds=5)},
        run=lambda options, seed, folder: compare(options, 2000 + seed, folder),
    )
    tested = final.reproduce(dataclasses.replace(options, output_dir=str(folder / "test")))
    scores = {
        family: [
            (TRIALS[name]["temperature"], validation(tried, task, name)) for name in TRIALS if _family(name) == family
        ]
        for family in FAMILIES
    }
    gains = {family: tested.gain(family, task, final.metrics[0]) for family in FAMILIES if family != CONTROL}
    plot_schedules(scores, gains, folder / "schedules.png")
    console.print(f"{folder / 'schedules.png'}", soft_wrap=True)
    return tested


def best(tried: Comparison, task: str) -> dict[str, str]:
    """The trial of each family with the highest mean on validation queries; the first of equals."""
    return {
        family: max(
            (name for name in TRIALS if _family(name) == family), key=lambda name: validation(tried, task, name)
        )
        for family in FAMILIES
    }


def validation(tried: Comparison, task: str, name: str) -> float:
    """A trial's mean nDCG@10 on validation queries."""
    return float(np.mean(list(tried.values(name, task, "dev nDCG@10").values())))


def _family(name: str) -> str:
    return name.rsplit(" ", 1)[0]
