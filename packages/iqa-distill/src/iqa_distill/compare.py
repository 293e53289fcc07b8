"""By how much one arm of a study orders the same test images better than another; the verb ``compare``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.study import read_rows

from iqa_distill.data import Rated
from iqa_distill.metrics import bootstrap_gain
from iqa_distill.plots import plot_test_loss


def record(path: Path, run: str, found: np.ndarray, rated: Rated, curve: list[list[float]]) -> None:
    """Append a run's scores of its test images, theirs, and the test loss at some steps, if it was looked at."""
    row = {"run": run, "predictions": found.round(6).tolist(), "scores": rated.scores.round(4).tolist(), "curve": curve}
    list(read_rows(path))  # drops a last line that a kill cut short
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """What :func:`record` wrote, by run; of a run that is there twice the last.

    Raises:
        ValueError: for a line that is not such a record; one that a kill cut short is dropped.
    """
    try:
        return {
            row["run"]: {key: np.array(row[key]) for key in ("predictions", "scores", "curve")}
            for row in read_rows(path)
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the record of `iqa-distill reproduce` ({error!r})") from None


@dataclass
class CompareOptions:
    """Which study."""

    folder: str = flag(
        "results folder of `iqa-distill reproduce`, with results.jsonl and predictions.jsonl", positional=True
    )
    baseline: str | None = flag("arm to compare with; the study's own if not given", None)


def compare(options: CompareOptions) -> list[dict[str, Any]]:
    """The verb ``compare``: gain in SRCC of each arm over the baseline on the same test images, with its 95 % bootstrap interval,
    seed by seed; and a picture of the test loss of the arms that it was recorded of.

    Returns:
        Rows with task, arm, seed, gain, low and high, also written to gains.json.

    Raises:
        ValueError: for a folder without results, an unknown baseline, or a record that is damaged or lacking.
        OSError: for files that are missing.
    """
    from iqa_distill.study import study

    folder, baseline = Path(options.folder), options.baseline or study.baseline
    if baseline not in study.arms:
        raise ValueError(f"baseline must be one of {', '.join(study.arms)}; got {baseline!r}")
    records = read_records(folder / "predictions.jsonl")
    runs = {}
    for row in read_rows(folder / "results.jsonl"):
        if row.get("run") not in records:
            raise ValueError(
                f"{folder / 'predictions.jsonl'}: nothing of the run {row.get('run')!r}, which is in results.jsonl"
            )
        runs[row["task"], row["arm"], row["seed"]] = records[row["run"]]
    rows = []
    for (task, arm, seed), own in runs.items():
        base = runs.get((task, baseline, seed))
        if arm != baseline and base is not None:
            gain, low, high = bootstrap_gain(own["predictions"], base["predictions"], own["scores"])
            rows.append({"task": task, "arm": arm, "seed": seed, "gain": gain, "low": low, "high": high})
    if not rows:
        raise ValueError(f"{folder}: no run of another arm to compare with {baseline!r}")
    rows.sort(key=lambda row: (row["task"], list(study.arms).index(row["arm"]), row["seed"]))
    write_json(folder / "gains.json", rows)
    shown = [
        [r["task"], r["arm"], str(r["seed"]), f"{r['gain']:+.3f}", f"[{r['low']:+.3f}, {r['high']:+.3f}]"] for r in rows
    ]
    print_table(f"SRCC on the same images, against {baseline}", ["task", "arm", "seed", "gain", "95 % interval"], shown)
    curves: dict[str, dict[int, list[float]]] = {}
    for (task, arm, _), own in runs.items():
        for step, loss in own["curve"]:
            curves.setdefault(f"{task}, {arm}", {}).setdefault(int(step), []).append(loss)
    if curves:
        plot_test_loss(folder / "test-loss.png", curves)
        console.print(f"test loss of the arms: {folder / 'test-loss.png'}", soft_wrap=True)
    return rows
