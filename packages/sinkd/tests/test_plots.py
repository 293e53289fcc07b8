import pytest
from matplotlib.image import imread
from papercore.lab.study import Interval
from sinkd.plots import plot_regimes, plot_training

HISTORY = [{"epoch": e, "ce": 2 / e, "kd": 1 / e, "sinkhorn": 0.5 / e, "loss": 1 / e} for e in (1, 2, 3)]


@pytest.mark.parametrize("history", [HISTORY, [{"epoch": 1, "loss": 1.0}], []])
def test_every_history_gives_a_picture(history, tmp_path):
    results = {"teacher": {"accuracy": 0.9}, "SinKD": {"accuracy": 0.8, "agreement": 0.7}}
    plot_training({"SinKD": history}, results, tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").std() > 0.05


def test_regimes_with_and_without_a_tested_gain(tmp_path):
    gains = {"20 classes": {(w, e): w * e / 10 for w in (0.1, 1.0) for e in (0.1, 0.5)}}
    nan = float("nan")
    for number, gain in enumerate([Interval(0.01, -0.01, 0.03, 3), Interval(0.01, nan, nan, 1), None]):
        plot_regimes(gains, {"20 classes": gain}, tmp_path / f"{number}.png")
        assert imread(tmp_path / f"{number}.png").std() > 0.05
