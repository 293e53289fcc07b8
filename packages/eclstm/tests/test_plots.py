import matplotlib.image
import numpy as np
import pytest
from eclstm.evaluate import Evaluation
from eclstm.plots import plot_life, plot_predictions
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to be looked into."""
    saved = []
    save = Figure.savefig

    def remember(figure, path, **options):
        saved.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


RESULT = Evaluation(
    ["a", "b", "c"], np.array([9.0, 60.0, 100.0]), np.array([10.0, 50.0, 140.0]), np.array([10.0, 50.0, 120.0]), 120
)


def points(panel):
    return np.concatenate([dots.get_offsets() for dots in panel.collections]).tolist()


def test_every_unit_is_a_dot_and_those_beyond_the_cap_are_told_apart(figures, tmp_path):
    plot_predictions(RESULT, tmp_path / "p.png", "FD001")
    (panel,) = figures[0].axes
    assert points(panel) == [[10, 9], [50, 60], [140, 100]]
    assert [len(dots.get_offsets()) for dots in panel.collections] == [2, 1]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["units", "truly beyond the cap of 120"]
    assert matplotlib.image.imread(tmp_path / "p.png").ndim == 3


def test_training_and_validation_error_are_drawn_in_cycles(figures, tmp_path):
    history = [
        {"epoch": 1, "loss": 400.0},
        {"epoch": 1, "eval_rmse": 15.0},
        {"epoch": 2, "loss": 100.0},
        {"epoch": 2, "eval_rmse": 12.0},
    ]
    plot_predictions(RESULT, tmp_path / "p.png", "FD001", history)
    training = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[1].lines}
    assert training == {"training": [[1, 20], [2, 10]], "validation": [[1, 15], [2, 12]]}


def test_a_history_without_validation_is_drawn_too(figures, tmp_path):
    plot_predictions(RESULT, tmp_path / "p.png", "FD001", [{"epoch": 1, "loss": 400.0}])
    labels = [line.get_label() for line in figures[0].axes[1].lines]
    assert labels == ["training"]


def test_a_life_is_a_line_over_time(figures, tmp_path):
    plot_life("pump 7", np.array([1.0, 2.0, 4.0]), np.array([30.0, 20.0, -3.0]), tmp_path / "l.png", "hours")
    (panel,) = figures[0].axes
    assert panel.lines[0].get_xydata().tolist() == [[1, 30], [2, 20], [4, -3]]
    assert panel.get_xlabel() == "hours"
    assert "pump 7" in panel.get_title()
    assert panel.get_ylim()[0] <= -3
