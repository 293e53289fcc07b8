import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from mmict.plots import RIGHT, WRONG, plot_dialogs, plot_training


@pytest.fixture
def figure(monkeypatch):
    """Those that were saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


def grey(value, height=48, width=48):
    return np.full((height, width, 3), value, np.uint8)


HISTORIES = {
    "ft": [{"step": 1, "loss": 3.0, "learning_rate": 1e-3}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}],
    "mmict": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "train_runtime": 9.0}],
}


class TestTraining:
    def test_arms_and_their_colours(self, tmp_path, figure):
        plot_training(tmp_path / "new" / "t.png", {"none yet": [], **HISTORIES})
        training, validation = figure[0].axes
        assert [line.get_label() for line in training.lines] == ["ft", "mmict"]
        assert training.lines[1].get_ydata().tolist() == [2, 1]
        (line,) = validation.lines
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2], [2.5])
        assert line.get_color() == training.lines[0].get_color()
        assert imread(tmp_path / "new" / "t.png").std() > 0.02

    def test_what_was_not_logged_is_not_drawn(self, tmp_path, figure):
        plot_training(tmp_path / "t.png", {"mmict": HISTORIES["mmict"]})
        assert len(figure[0].axes) == 1
        plot_training(tmp_path / "none.png", {"mmict": HISTORIES["mmict"][2:]})
        assert not (tmp_path / "none.png").exists()


class TestDialogs:
    def test_demonstrations_query_and_what_is_right(self, tmp_path, figure):
        demos = [[(grey(1), "a $1 dog"), (grey(2), "a cat")], [(grey(3), "a cow")]]
        said = {"ft": ["a bird", "a fish!"], "mmict": ["the fly", "a fish"]}
        plot_dialogs(
            tmp_path / "new" / "d.png", [grey(4), grey(5, 20, 60)], demos, [["a fly", "the fly"], ["a fish"]], said
        )
        (panel,) = figure[0].axes
        shown = {int(image.get_array()[0, 0, 0]): image.get_extent() for image in panel.images}
        middle = {value: (left + right) / 2 for value, (left, right, _, _) in shown.items()}
        assert middle[1] < middle[2] < middle[4]
        assert middle[3] == pytest.approx(middle[2])  # the only one stands next to its query
        left, right, bottom, top = shown[5]
        assert (right - left) / (bottom - top) == pytest.approx(3)
        texts = {text.get_text(): to_rgba(text.get_color()) for text in panel.texts}
        assert texts["✓ the fly"] == texts["✓ a fish"] == texts["✓ a fish!"] == to_rgba(RIGHT)
        assert texts["a bird"] == to_rgba(WRONG)
        assert {"a fly", "truth", "a $1 dog", "a cow", "ft", "mmict"} <= texts.keys()
        assert imread(tmp_path / "new" / "d.png").std() > 0.02

    def test_four_frames_of_a_video_and_a_question(self, tmp_path, figure):
        video = [grey(value) for value in range(7)]
        plot_dialogs(tmp_path / "d.png", [video], [[]], [["red"]], {"ft": ["blue"]}, ["what colour?"])
        (panel,) = figure[0].axes
        assert [int(image.get_array()[0, 0, 0]) for image in panel.images] == [0, 2, 4, 6]
        assert {"what colour?", "query"} <= {text.get_text() for text in panel.texts}
        assert "demonstrations" not in {text.get_text() for text in panel.texts}

    def test_wrong_input(self, tmp_path):
        with pytest.raises(ValueError, match="0 queries to draw"):
            plot_dialogs(tmp_path / "d.png", [], [], [], {})
        with pytest.raises(ValueError, match=r"1 queries to draw, but .* have \[1, 1, 2, 1\]"):
            plot_dialogs(tmp_path / "d.png", [grey(0)], [[]], [["a"]], {"ft": ["a", "b"]})
