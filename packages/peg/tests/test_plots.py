import pytest
from matplotlib.image import imread
from papercore.lab.study import Interval
from peg.plots import plot_schedules, plot_training

HISTORY = [
    {"step": s, "loss": 1 / s, "positive_probability": s / 4, "hardness": s, "effective_negatives": 9}
    for s in (1, 2, 3)
]
METRICS = {
    "before": {"nDCG@10": 0.5, "MRR@10": 0.4, "Recall@10": 0.7, "MAP@100": 0.1},
    "after": {"nDCG@10": 0.6, "MRR@10": 0.5, "Recall@10": 0.8, "MAP@100": 0.2},
}


@pytest.mark.parametrize(
    ("history", "results"),
    [
        (HISTORY, METRICS),
        ([{"step": 1, "loss": 1.0}, {"step": 1, "train_loss": 1.0}], {"after": METRICS["after"]}),
        ([], {}),
    ],
)
def test_every_run_gives_a_picture(history, results, tmp_path):
    plot_training(history, results, tmp_path / "new" / "plot.png")
    assert imread(tmp_path / "new" / "plot.png").std() > 0.05


def test_pictures_show_what_they_are_given(tmp_path):
    for number, (history, results) in enumerate(((HISTORY, METRICS), (HISTORY[:2], METRICS), (HISTORY, {}))):
        plot_training(history, results, tmp_path / f"{number}.png")
    pictures = [imread(tmp_path / f"{number}.png") for number in range(3)]
    assert not (pictures[0] == pictures[1]).all()
    assert not (pictures[0] == pictures[2]).all()


def test_schedules_with_and_without_a_tested_gain(tmp_path):
    scores = {"constant": [(0.05, 0.5), (0.02, 0.6)], "ramp": [(0.02, 0.61), (0.05, 0.55)]}
    for number, gain in enumerate(
        [Interval(0.01, -0.01, 0.03, 3), Interval(0.01, float("nan"), float("nan"), 1), None]
    ):
        plot_schedules(scores, {"ramp": gain}, tmp_path / f"{number}.png")
        assert imread(tmp_path / f"{number}.png").std() > 0.05
