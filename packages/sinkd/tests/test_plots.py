import pytest
from matplotlib.image import imread
from sinkd.plots import plot_training

HISTORY = [{"epoch": e, "ce": 2 / e, "kd": 1 / e, "sinkhorn": 0.5 / e, "loss": 1 / e} for e in (1, 2, 3)]


@pytest.mark.parametrize("history", [HISTORY, [{"epoch": 1, "loss": 1.0}], []])
def test_every_history_gives_a_picture(history, tmp_path):
    results = {"teacher": {"accuracy": 0.9}, "SinKD": {"accuracy": 0.8, "agreement": 0.7}}
    plot_training({"SinKD": history}, results, tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").std() > 0.05
