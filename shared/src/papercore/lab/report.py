"""How a study is shown: a progress bar while it runs, then a table, JSON and one picture."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from papercore.lab.files import write_json, write_text
from papercore.lab.study import Comparison, Interval, Metric, interval

console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of the processes of a torchrun the first speaks


def progress(title: str, total: int) -> tqdm[Any]:
    """A bar that counts runs, for :meth:`papercore.lab.study.Study.run_missing`."""
    return tqdm(total=total, desc=title, unit="run", dynamic_ncols=True)


def figures(values: Interval, digits: int, signed: bool = False) -> str:
    """An interval in print.

    >>> figures(Interval(2.0, 1.5, 2.5, 3), 2), figures(Interval(2.0, math.nan, math.nan, 1), 1, signed=True)
    ('2.00 [1.50, 2.50]', '+2.0')
    """
    form = f"{'+' if signed else ''}.{digits}f"
    text = f"{values.mean:{form}}"
    return text if math.isnan(values.low) else f"{text} [{values.low:{form}}, {values.high:{form}}]"


def digits_for(values: Iterable[float]) -> int:
    """Decimals that show about four figures of values of this size.

    >>> digits_for([14.92, 15.1]), digits_for([1800.0]), digits_for([0.93])
    (2, 0, 4)
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=1.0)
    return min(4, max(0, 3 - math.floor(math.log10(largest)))) if largest > 0 else 2


def summary_rows(comparison: Comparison) -> list[list[str]]:
    """For each task the study's line: task, metric, baseline, method, gain with its interval, verdict."""
    study, metric = comparison.study, comparison.study.metrics[0]
    rows = []
    for task in comparison.tasks:
        sides = [list(comparison.values(arm, task, metric.name).values()) for arm in (study.baseline, study.method)]
        digits = digits_for(v for side in sides for v in side)
        gain = comparison.gain(study.method, task, metric)
        means = [f"{sum(side) / len(side):.{digits}f}" if side else "-" for side in sides]
        shown = figures(gain, digits, signed=True) if gain else "-"
        rows.append([study.name, task, metric.name, *means, shown, comparison.verdict(task)])
    return rows


SUMMARY_COLUMNS = ["method", "task", "metric", "baseline", "ours", "gain [95 %]", "status"]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal."""
    console.print(f"\n{title}", style="bold", markup=False, soft_wrap=True)
    table = Table()
    for column in columns:
        table.add_column(escape(column))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown_table(["arm", "rmse"], [["a", "1.0"]]))
    | arm | rmse |
    |---|---|
    | a | 1.0 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" if line is not lines[1] else f"|{'|'.join(line)}|" for line in lines)


def tables(comparison: Comparison) -> dict[str, tuple[list[str], list[list[str]]]]:
    """By task, as far as it has run: the columns, and a row for each arm."""
    study, found = comparison.study, {}
    decisive, *more = study.metrics
    for task in comparison.tasks:
        others = [m for m in more if any(comparison.values(arm, task, m.name) for arm in study.arms)]
        paper = ["paper"] if any(task in published for published in study.paper.values()) else []
        rows = []
        for arm in study.arms:
            if first := comparison.values(arm, task, decisive.name):
                gain = None if arm == study.baseline else comparison.gain(arm, task, decisive)
                row = [f"**{arm}**" if arm == study.method else arm, str(len(first)), _mean(first)]
                row += [figures(gain, digits_for(first.values()), signed=True) if gain else ""]
                row += [_mean(comparison.values(arm, task, metric.name)) for metric in others]
                rows.append(row + [str(study.paper.get(arm, {}).get(task, "")) for _ in paper])
        if rows:
            found[task] = ["arm", "seeds", _label(decisive), "better by", *map(_label, others), *paper], rows
    return found


def _mean(values: Mapping[int, float]) -> str:
    return figures(interval(list(values.values())), digits_for(values.values())) if values else ""


def _label(metric: Metric) -> str:
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def print_report(comparison: Comparison) -> None:
    """The tables on the terminal, and where the report is."""
    for task, (columns, rows) in tables(comparison).items():
        print_table(f"{comparison.study.name}, {task}", columns, [[cell.strip("*") for cell in row] for row in rows])
    if comparison.rows:
        console.print(f"{comparison.folder / 'report.md'}, report.json, plot.png", soft_wrap=True)


def write_report(comparison: Comparison) -> None:
    """report.md, report.json and plot.png of what has run so far."""
    if not comparison.rows:
        return
    study, folder = comparison.study, comparison.folder
    sections = [
        f"## {task}: {comparison.verdict(task)}\n\n{markdown_table(*table)}\n"
        for task, table in tables(comparison).items()
    ]
    cells = [
        {"task": task, "arm": arm, "metric": metric.name, "values": values, "gain": gain and gain._asdict()}
        for task in comparison.tasks
        for arm in study.arms
        for metric in study.metrics
        if (values := comparison.values(arm, task, metric.name))
        for gain in [None if arm == study.baseline else comparison.gain(arm, task, metric)]
    ]
    quick = "\nScale quick shows that the study runs; it proves nothing else.\n" if comparison.scale == "quick" else ""
    machines = sorted({row["machine"] for row in comparison.rows})
    versions = comparison.rows[-1]["versions"]
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write_text(
        folder / "report.md",
        f"# {study.name}: {comparison.scale}\n\nClaim: {study.claim}\n"
        f"Baseline: {study.baseline}. Method: {study.method}.\n{quick}\n"
        + "\n".join(sections)
        + f'\nMean over seeds with its 95 % t interval. "Better by": than {study.baseline}, paired by seed.\n\n'
        "![every seed, mean and interval](plot.png)\n\n"
        f"Command: `{command}`. Machine: {'; '.join(machines)}. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}. "
        f"Time: {sum(row['seconds'] for row in comparison.rows) / 60:.0f} minutes of runs.\n",
    )
    write_json(
        folder / "report.json",
        {"study": study.name, "scale": comparison.scale, "claim": study.claim}
        | {"verdicts": {task: comparison.verdict(task) for task in comparison.tasks}, "cells": cells}
        | {"machines": machines, "versions": versions, "command": command},
    )
    _plot(comparison, folder / "plot.png")


def plot_gains(panel: Any, gains: Mapping[str, Interval | None], scale: float = 1.0) -> None:
    """Draw one gain below the other in a matplotlib panel: a dot and its interval, left or right of zero.

    Args:
        gains: by name; None leaves its line empty. scale: what they are multiplied by, such as 100 for points.
    """
    for y, gain in enumerate(gains.values()):
        if gain is not None:
            panel.plot([scale * gain.low, scale * gain.high], [y, y], color="tab:red", linewidth=2, alpha=0.5)
            panel.scatter([scale * gain.mean], [y], color="tab:red")
    panel.axvline(0, color="0.3", linewidth=0.8)
    panel.set_yticks(range(len(gains)), list(gains))
    panel.set_ylim(len(gains) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)


def _plot(comparison: Comparison, path: Path) -> None:
    """Each arm's seeds as dots, its mean and interval as a bar; a panel for each task; the decisive metric."""
    from matplotlib.figure import Figure

    study, metric = comparison.study, comparison.study.metrics[0]
    arms = [arm for arm in study.arms if any(row["arm"] == arm for row in comparison.rows)]
    figure = Figure(figsize=(1.5 + 3.6 * len(comparison.tasks), 1.6 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(comparison.tasks), squeeze=False, sharey=True)[0]
    for panel, task in zip(panels, comparison.tasks, strict=True):
        for y, arm in enumerate(arms):
            values = list(comparison.values(arm, task, metric.name).values())
            if not values:
                continue
            mean = interval(values)
            colour = "tab:red" if arm == study.method else "0.3"
            if not math.isnan(mean.low):
                panel.plot([mean.low, mean.high], [y, y], color=colour, linewidth=2, alpha=0.5)
            panel.scatter(values, [y] * len(values), s=14, color=colour, alpha=0.6)
            panel.scatter([mean.mean], [y], s=60, marker="|", color=colour)
            if task in study.paper.get(arm, {}):
                panel.scatter([study.paper[arm][task]], [y], s=28, marker="D", facecolors="none", edgecolors="tab:blue")
        panel.set_yticks(range(len(arms)), arms)
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.set_title(task)
        better = "lower" if metric.lower_is_better else "higher"
        panel.set_xlabel(f"{_label(metric)}, {better} is better")
        panel.grid(axis="x", alpha=0.3)
    diamonds = ", diamonds the paper" if study.paper else ""
    figure.suptitle(f"{study.name}: dots are seeds, lines 95 % intervals{diamonds}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
