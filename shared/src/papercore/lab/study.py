"""A paper's comparison as data: arms x tasks x seeds, appended to a file as they finish, and a paired statistic."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from papercore.lab.cli import flag

Run = Callable[[dict[str, Any], int, Path], Mapping[str, float]]


@dataclass(frozen=True)
class Metric:
    """What an arm is judged by. ``name`` is a key of what ``run`` returns: the first always, others where they apply."""

    name: str
    lower_is_better: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Scale:
    """How much of a study to run: on which tasks (data sets) and with which options of their own, how many seeds, and
    options that all share."""

    tasks: Mapping[str, Mapping[str, Any]]
    seeds: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class ReproduceOptions:
    """Which part of a study to run."""

    scale: str = flag("quick: a few minutes, shows that it runs; small: real data; full: a GPU", "quick")
    seeds: int | None = flag("seeds for each arm; the scale's own if not given", None)
    output_dir: str | None = flag("results folder; runs/NAME-SCALE if not given", None)
    arms: list[str] | None = flag("run only these arms now", None)
    tasks: list[str] | None = flag("run only these tasks now", None)


class Interval(NamedTuple):
    """A mean with its 95 % Student interval; ``low`` and ``high`` are NaN below two values."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent repeats with its 95 % t interval.

    >>> [round(figure, 6) for figure in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484138, 4.484138, 3]
    """
    from scipy import stats  # half a second that a plain --help need not wait for

    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, n)


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["arm"], row["task"], row["seed"], row["options"]], sort_keys=True)


@dataclass
class Study:
    """A paper's claim, the arms that test it, and how to run one of them.

    ``reproduce`` runs what is not yet in ``results.jsonl`` and writes report.md, report.json and plot.png beside it. All arms of
    a seed must share initialisation, data order and budget as far as they can: ``run`` sees to that from the seed.

    Args:
        name: the package. claim: one sentence that the study could refute.
        metrics: what ``run`` returns; the first decides.
        baseline: arm to compare with. method: arm that the claim is about.
        arms: options of each arm, by name.
        scales: by name, among them ``"quick"``.
        run: (options of scale, task and arm; seed; folder of its own) -> value of each metric.
        paper: the paper's own figures of the first metric, by arm and task.

    Example:
        >>> def run(options, seed, folder):  # in earnest: train in the folder; equal seeds begin alike
        ...     return {"error": options["rate"] + 0.01 * seed}
        >>> study = Study(
        ...     name="toy",
        ...     claim="A lower rate errs less.",
        ...     metrics=[Metric("error", lower_is_better=True)],
        ...     baseline="fast",
        ...     method="slow",
        ...     arms={"fast": {"rate": 0.5}, "slow": {"rate": 0.1}},
        ...     scales={"quick": Scale(tasks={"sample": {}}, seeds=2)},
        ...     run=run,
        ... )
        >>> [(cell["arm"], cell["seed"]) for cell in study.cells(ReproduceOptions())]
        [('fast', 0), ('slow', 0), ('fast', 1), ('slow', 1)]
    """

    name: str
    claim: str
    metrics: Sequence[Metric]
    baseline: str
    method: str
    arms: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, Scale]
    run: Run
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def reproduce(self, options: ReproduceOptions) -> Comparison:
        """Run what is missing at a scale under a bar of its own; then write and show the report.

        Raises:
            ValueError: for an unknown scale, arm or task.
        """
        from papercore.lab.report import print_report, progress

        with progress(f"{self.name} {options.scale}", len(self.cells(options))) as bar:
            comparison = self.run_missing(options, bar)
        print_report(comparison)
        return comparison

    def cells(self, options: ReproduceOptions) -> list[dict[str, Any]]:
        """Which arms ``options`` asks for, on which tasks, from which seeds, each with all its options.

        Raises:
            ValueError: for an unknown scale, arm or task.
        """
        scale = _pick("scale", options.scale, self.scales)
        seeds = scale.seeds if options.seeds is None else options.seeds
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        for arm in options.arms or ():
            _pick("arm", arm, self.arms)
        for task in options.tasks or ():
            _pick("task", task, scale.tasks)
        return [
            {"arm": arm, "task": task, "seed": seed, "options": self._options(scale, task, arm)}
            for seed in range(seeds)
            for task in scale.tasks
            for arm in self.arms
            if arm in (options.arms or self.arms) and task in (options.tasks or scale.tasks)
        ]

    def run_missing(self, options: ReproduceOptions, bar: Any) -> Comparison:
        """Run what is missing at a scale, appending each result as it is known, and write the report of all there is.

        Args:
            bar: a tqdm bar, which counts these runs and names the running one.
        """
        from papercore.lab.report import write_report

        wanted = self.cells(options)
        folder = Path(options.output_dir or f"runs/{self.name}-{options.scale}")
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "results.jsonl"
        done = {_key(row): row for row in read_rows(log)}
        todo = [cell for cell in wanted if _key(cell) not in done]
        bar.initial += len(wanted) - len(todo)  # they took no time
        bar.update(len(wanted) - len(todo))
        for cell in todo:
            bar.set_postfix_str(f"{self.name}: {cell['task']}, {cell['arm']}, seed {cell['seed']}")
            started = time.perf_counter()
            words = f"{cell['task']}-{cell['arm']}-{cell['seed']}".replace(" ", "-").replace(",", "")
            work = folder / "work" / f"{words}-{zlib.crc32(_key(cell).encode()):08x}"  # other options, another folder
            values = self.run(dict(cell["options"]), cell["seed"], work)
            row = {**cell, "metrics": {k: float(v) for k, v in values.items()}, "run": work.name}
            row["seconds"] = round(time.perf_counter() - started, 1)
            row |= {"machine": machine(), "versions": versions(self.name)}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            done[_key(cell)] = row
            bar.update()
        tasks = list(self.scales[options.scale].tasks)
        everything = self.cells(dataclasses.replace(options, arms=None, tasks=None))
        rows = [done[_key(cell)] for cell in everything if _key(cell) in done]
        comparison = Comparison(self, options.scale, tasks, rows, folder)
        write_report(comparison)
        return comparison

    def _options(self, scale: Scale, task: str, arm: str) -> dict[str, Any]:
        return json.loads(json.dumps({**scale.options, **scale.tasks[task], **self.arms[arm]}))


@dataclass
class Comparison:
    """The finished rows of a study at one scale, and the folder they are kept in."""

    study: Study
    scale: str
    tasks: list[str]
    rows: list[dict[str, Any]]
    folder: Path = Path()

    def values(self, arm: str, task: str, metric: str) -> dict[int, float]:
        """One value for each seed; none where the task has no such metric."""
        rows = [r for r in self.rows if r["arm"] == arm and r["task"] == task and metric in r["metrics"]]
        return {r["seed"]: r["metrics"][metric] for r in rows}

    def gain(self, arm: str, task: str, metric: Metric) -> Interval | None:
        """By how much an arm is better than the baseline (positive is better), paired by seed; None without a pair."""
        ours, base = self.values(arm, task, metric.name), self.values(self.study.baseline, task, metric.name)
        sign = -1.0 if metric.lower_is_better else 1.0
        pairs = [sign * (ours[seed] - base[seed]) for seed in sorted(ours.keys() & base.keys())]
        return interval(pairs) if pairs else None

    def verdict(self, task: str) -> str:
        """What the method's gain on the first metric shows: ``shown``, ``contrary``, ``not shown``, or that it only ran."""
        gain = self.gain(self.study.method, task, self.study.metrics[0])
        if self.scale == "quick" or gain is None or gain.n < 2:
            return "ran" if gain is not None else "not compared"
        return "shown" if gain.low > 0 else "contrary" if gain.high < 0 else "not shown"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The finished rows of a results file; a last line cut short by a kill is dropped from the file.

    Raises:
        ValueError: if any other line is not JSON.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}: not JSON; mend or remove that line") from None


def _pick(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"no {what} {name!r}: choose from {', '.join(known)}")
    return known[name]


def machine() -> str:
    """The processor (or GPU) and its number of cores, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def versions(package: str) -> dict[str, str]:
    """Versions of what decides a result."""
    known = {"python": platform.python_version()}
    for name in (package, "papercore", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known
