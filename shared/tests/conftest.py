import numpy as np
import pytest
from papercore.lab.study import Metric, Scale, Study


class Recorder:
    """Stands for an experiment: values by arm, with noise that all arms of a seed share, and a list of what has run."""

    def __init__(self):
        self.ran = []

    def __call__(self, options, seed, folder):
        self.ran.append((options["arm"], options["task"], seed))
        noise = np.random.default_rng(seed).normal(0, 5)
        error = options["error"] + noise + 0.1 * np.random.default_rng([seed, options["error"]]).normal()
        return {"error": error, "accuracy": 1 / (1 + abs(error))}


@pytest.fixture
def run():
    return Recorder()


@pytest.fixture
def study(run):
    """Three arms on two tasks: the method is better by 2, the rival worse by 3."""
    return Study(
        name="papercore",
        claim="The new way errs less.",
        metrics=[Metric("error", lower_is_better=True, unit="mm"), Metric("accuracy")],
        baseline="old way",
        method="new way",
        arms={
            "old way": {"arm": "old way", "error": 20},
            "rival": {"arm": "rival", "error": 23},
            "new way": {"arm": "new way", "error": 18},
        },
        scales={
            "quick": Scale({"maps": {"task": "maps"}}, seeds=1),
            "small": Scale({"maps": {"task": "maps"}, "faces": {"task": "faces"}}, seeds=3, options={"epochs": 2}),
        },
        run=run,
        paper={"new way": {"maps": 17.5}, "old way": {"maps": 19.25}},
    )
