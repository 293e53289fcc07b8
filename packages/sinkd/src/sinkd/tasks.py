"""What a task is: labels, metrics, and the examples that have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A classification task, or with ``labels=None`` a regression on one output.

    Args:
        name: short and lower-case. labels: names of the classes in order. pair: whether an example is two texts.
        metrics: names in :data:`sinkd.metrics.METRICS`; the first decides.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    pair: bool


@dataclass
class Examples:
    """Texts with their labels, one entry for each row in every list.

    Args:
        task: what they belong to.
        first, second: texts; ``second`` is None if the task has no pairs. COPA: the premise, and "cause" or "effect".
        labels: class numbers, or floats for regression; None for a test set whose labels are kept secret.
        ids: what a submission file calls the rows.
        choices: multiple choice only (COPA): the answers of each row.

    Raises:
        ValueError: if the lists differ in length.

    >>> examples = Examples(TASKS["sst2"], ["fine", "dull", "superb"], None, [1, 0, 1], [0, 1, 2])
    >>> examples.select([2, 0]).first
    ['superb', 'fine']
    """

    task: Task
    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None
    ids: list[Any]
    choices: list[tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        for name in ("second", "labels", "ids", "choices"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.first):
                raise ValueError(f"{self.task.name}: first has {len(self.first)} rows, {name} has {len(column)}")

    def __len__(self) -> int:
        return len(self.first)

    def select(self, indices: Sequence[int]) -> Examples:
        """The rows at these places, in this order."""

        def pick(column: list[Any] | None) -> Any:
            return None if column is None else [column[i] for i in indices]

        columns = (self.first, self.second, self.labels, self.ids, self.choices)
        return Examples(self.task, *map(pick, columns))


ENTAILMENT = ("entailment", "not_entailment")
# GLUE and SuperGLUE with the metrics of the paper's code (section 4); labels in the order of the Hub's data sets.
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("unacceptable", "acceptable"), ("matthews",), False),
        Task("sst2", ("negative", "positive"), ("accuracy",), False),
        Task("mrpc", ("not_equivalent", "equivalent"), ("f1", "accuracy"), True),
        Task("qqp", ("not_duplicate", "duplicate"), ("accuracy", "f1"), True),
        Task("mnli", ("entailment", "neutral", "contradiction"), ("accuracy",), True),
        Task("qnli", ENTAILMENT, ("accuracy",), True),
        Task("rte", ENTAILMENT, ("accuracy",), True),
        Task("wnli", ("not_entailment", "entailment"), ("accuracy",), True),
        Task("stsb", None, ("spearman", "pearson"), True),
        Task("boolq", ("false", "true"), ("accuracy",), True),
        Task("cb", ("entailment", "contradiction", "neutral"), ("accuracy", "macro_f1"), True),
        Task("copa", ("choice1", "choice2"), ("accuracy",), True),
        Task("wic", ("false", "true"), ("accuracy",), True),
    )
}
# Intent sets: their labels are read from their files.
INTENTS = ("banking77", "clinc150")
LEFT_OUT = ("record", "multirc", "wsc")


def generic(name: str, labels: tuple[str, ...] | None, pair: bool = False) -> Task:
    """A task made of a file of one's own; ``labels=None`` for regression.

    >>> generic("reviews", ("bad", "good")).metrics
    ('accuracy', 'macro_f1')
    """
    return Task(name, labels, ("spearman", "pearson") if labels is None else ("accuracy", "macro_f1"), pair)


def task_name(name: str) -> str | None:
    """The short name of a known task from the way folders and the Hub write it; None for any other.

    >>> task_name("STS-B"), task_name("CoLA"), task_name("reviews")
    ('stsb', 'cola', None)

    Raises:
        ValueError: for the SuperGLUE tasks that are left out.
    """
    short = re.sub(r"[\W_]", "", name).lower()
    if short in LEFT_OUT:
        raise ValueError(
            f"{name}: {', '.join(LEFT_OUT)} are left out (answers are spans of the text): choose from {', '.join(TASKS)}"
        )
    return short if short in TASKS or short in INTENTS else None
