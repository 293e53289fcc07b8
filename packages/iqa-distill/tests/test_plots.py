import numpy as np
import pytest
from iqa_distill.plots import plot_falling, plot_scatter, plot_test_loss, plot_training
from matplotlib.figure import Figure
from matplotlib.image import imread

LOSSES = [{"step": s, "loss": 9 / s, "score": 5 / s, "mcd": 4 / s, "learning_rate": 1e-3} for s in (1, 2, 3)]
JUDGED = [{"step": s, "eval_srcc": s / 4, "eval_mae": 0.5, "epoch": 1.0} for s in (1, 3)]


@pytest.fixture
def figure(monkeypatch):
    """The last one that was saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


class TestTraining:
    def test_parts_of_the_loss_and_srcc(self, tmp_path, figure):
        plot_training(tmp_path / "new" / "plot.png", LOSSES + JUDGED)
        losses, srcc = figure[0].axes
        assert [line.get_label() for line in losses.lines] == ["loss", "score", "mcd"]
        assert losses.lines[1].get_ydata().tolist() == [5, 2.5, 5 / 3]
        (line,) = srcc.lines
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 3], [0.25, 0.75])
        assert imread(tmp_path / "new" / "plot.png").std() > 0.02

    def test_what_was_not_logged_has_no_panel(self, tmp_path, figure):
        plot_training(tmp_path / "plot.png", LOSSES)
        assert len(figure[0].axes) == 1
        plot_training(tmp_path / "none.png", [{"step": 3, "epoch": 1.0, "train_runtime": 9.0}])
        assert not (tmp_path / "none.png").exists()


class TestFalling:
    @pytest.mark.parametrize("count", [1, 5, 40])
    def test_thumbnails_stand_below_their_scores_in_their_proportions(self, tmp_path, figure, count):
        pictures = [np.full((40, 60 if i % 2 else 30, 3), i, np.uint8) for i in range(count)]
        scores = np.linspace(80, 20, count)
        plot_falling(tmp_path / "new" / "f.png", pictures, scores, [f"{i}.png" for i in range(count)])
        line, strip = figure[0].axes
        assert line.lines[0].get_ydata().tolist() == scores.tolist()
        assert line.get_xlim() == strip.get_xlim()
        assert len(strip.images) == {1: 1, 5: 5, 40: 10}[count]
        size = (
            strip.get_window_extent().width / np.ptp(strip.get_xlim()),
            strip.get_window_extent().height / np.ptp(strip.get_ylim()),
        )
        for image, text in zip(strip.images, strip.texts, strict=True):
            left, right, bottom, top = image.get_extent()
            number = int(image.get_array()[0, 0, 0])
            assert (left + right) / 2 == pytest.approx(number)
            assert text.get_text() == f"{number}.png"
            wide = 60 if number % 2 else 30
            assert (right - left) * size[0] / ((bottom - top) * size[1]) == pytest.approx(wide / 40)
        assert imread(tmp_path / "new" / "f.png").std() > 0.02

    def test_long_names_keep_their_end(self, tmp_path, figure):
        plot_falling(tmp_path / "f.png", [np.zeros((9, 9, 3), np.uint8)], [1.0], ["a-very-long-name-of-$one$.png"])
        assert figure[0].axes[1].texts[0].get_text() == "…name-of-$one$.png"

    def test_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="no scores to draw"):
            plot_falling(tmp_path / "f.png", [], [], [])


class TestScatter:
    X = np.linspace(0, 10, 30)

    def test_groups_and_the_fit(self, tmp_path, figure):
        y = 90 / (1 + np.exp(5 - self.X))
        plot_scatter(tmp_path / "new" / "s.png", self.X, y, ["blur", "noise", "jpeg"] * 10, title="test")
        (panel,) = figure[0].axes
        assert [found.get_label() for found in panel.collections] == ["blur", "jpeg", "noise"]
        assert panel.collections[1].get_offsets()[0].tolist() == pytest.approx([self.X[2], y[2]])
        (fit,) = panel.lines
        assert fit.get_ydata() == pytest.approx(90 / (1 + np.exp(5 - fit.get_xdata())), abs=0.1)
        assert imread(tmp_path / "new" / "s.png").std() > 0.02

    def test_equal_predictions_have_no_curve(self, tmp_path, figure):
        plot_scatter(tmp_path / "s.png", np.ones(30), self.X)
        assert not figure[0].axes[0].lines


class TestTestLoss:
    def test_mean_and_span_over_seeds(self, tmp_path, figure):
        curves = {"with Reg": {10: [0.4, 0.6], 0: [1.0, 1.2]}, "without": {0: [1.0], 10: [0.8]}}
        plot_test_loss(tmp_path / "new" / "t.png", curves)
        (panel,) = figure[0].axes
        assert [line.get_label() for line in panel.lines] == ["with Reg", "without"]
        assert panel.lines[0].get_ydata().tolist() == pytest.approx([1.1, 0.5])
        assert panel.collections[0].get_paths()[0].get_extents().intervaly.tolist() == pytest.approx([0.4, 1.2])
        assert imread(tmp_path / "new" / "t.png").std() > 0.02

    def test_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="no losses to draw"):
            plot_test_loss(tmp_path / "t.png", {"a": {}})
