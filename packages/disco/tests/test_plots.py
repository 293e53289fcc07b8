"""Pictures: every run gives one, and a red frame is a wrong neighbour."""

import json

import pytest
import torch
from disco import plots
from disco.data import Images
from disco.plots import plot_neighbours, plot_training
from matplotlib.figure import Figure
from matplotlib.image import imread

DISCO = [{"step": s, "contrast": 5 / s, "distill": 2 / s, "loss": 9 / s} for s in (1, 2, 3)]
MOCO = [{"step": s, "contrast": 6 / s, "distill": 0.0} for s in (1, 2, 3)]
RESULTS = {"random": {"knn_10": 30.0, "knn_20": 31.0}, "disco": {"knn_10": 70.0, "knn_20": 71.0}}


@pytest.fixture
def figure(monkeypatch):
    """The last one that was saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


class TestTraining:
    @pytest.mark.parametrize(
        ("histories", "results"),
        [
            ({"disco": DISCO}, RESULTS),
            ({"disco": DISCO}, {}),
            ({"MoCo-v2": MOCO}, {}),
            ({"x": MOCO, "disco": DISCO}, {}),
        ],
    )
    def test_every_run_gives_a_picture(self, histories, results, tmp_path):
        plot_training(histories, results, tmp_path / "new" / "plot.png")
        assert imread(tmp_path / "new" / "plot.png").std() > 0.02

    def test_a_run_without_a_log_gives_the_accuracies(self, tmp_path, figure):
        plot_training({"disco": []}, RESULTS, tmp_path / "plot.png")
        assert [panel.get_title() for panel in figure[0].axes] == ["knn_20"]

    def test_a_run_with_nothing_to_show_gives_none(self, tmp_path):
        plot_training({"disco": []}, {}, tmp_path / "plot.png")
        assert not list(tmp_path.iterdir())

    def test_a_term_that_an_arm_lacks_is_not_drawn(self, tmp_path, figure):
        plot_training({"MoCo-v2": MOCO, "disco": DISCO}, {}, tmp_path / "plot.png")
        contrast, teacher = figure[0].axes
        assert [line.get_label() for line in contrast.lines] == ["MoCo-v2", "disco"]
        (line,) = teacher.lines
        assert line.get_label() == "disco"
        assert line.get_color() == "C1"
        assert line.get_ydata().tolist() == [2, 1, 2 / 3]

    @pytest.mark.parametrize(
        ("results", "shown"),
        [
            (RESULTS, "knn_20"),
            ({"a": {"knn_10": 5.0, "linear_top1": 6.0}}, "knn_10"),
            ({"a": {"linear_top1": 6.0}}, "linear_top1"),
        ],
    )
    def test_bars_are_the_metric_that_all_have(self, results, shown, tmp_path, figure):
        plot_training({"disco": DISCO}, results, tmp_path / "plot.png")
        panel = figure[0].axes[-1]
        assert panel.get_title() == shown
        assert [bar.get_width() for bar in panel.patches] == [metrics[shown] for metrics in results.values()]


class TestNeighbours:
    @pytest.fixture
    def shown(self, monkeypatch):
        """(first value, frame) of each image."""
        seen = []
        show = plots._show

        def recording(panel, x, y, image, frame=None):
            seen.append((int(image[0, 0, 0]), frame))
            show(panel, x, y, image, frame)

        monkeypatch.setattr(plots, "_show", recording)
        return seen

    @staticmethod
    def images(values, labels):
        pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
        return Images(pixels, None if labels is None else torch.tensor(labels))

    def test_the_most_alike_come_first_and_other_classes_are_framed(self, tmp_path, shown):
        train, test = self.images([10, 20, 30], [0, 1, 0]), self.images([99], [0])
        bank, asked = torch.tensor([[1.0, 0.1], [10.0, 2.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.1]])
        plot_neighbours({"net": [bank, asked]}, train, test, tmp_path / "n.png", queries=1, nearest=2)
        assert shown == [(99, None), (10, None), (20, "tab:red")]  # by angle; the inner product would have 20 first
        assert imread(tmp_path / "n.png").std() > 0.02

    def test_a_column_for_each_network_and_few_images_are_enough(self, tmp_path, shown):
        train, test = self.images([10, 20], [0, 1]), self.images([99, 98], [0, 1])
        features = [torch.eye(2), torch.eye(2)]
        plot_neighbours({"a": features, "b": features}, train, test, tmp_path / "n.png", queries=2, nearest=4)
        assert len(shown) == 2 + 2 * 2 * 2
        assert [frame for _, frame in shown].count("tab:red") == 4

    def test_without_labels_nothing_is_framed(self, tmp_path, shown):
        train, test = self.images([10, 20], None), self.images([99], None)
        plot_neighbours({"a": [torch.eye(2), torch.eye(2)[:1]]}, train, test, tmp_path / "n.png", queries=1)
        assert {frame for _, frame in shown} == {None}


class TestBottleneck:
    def rows(self, folder, *cells):
        lines = [
            {
                "options": {"arm": arm, "student": "cnn:4-8", **hidden},
                "metrics": {"knn_20": value, "linear_top1": value},
            }
            for arm, hidden, value in cells
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def test_a_point_for_each_width_and_a_head_as_wide_as_the_features(self, tmp_path, figure):
        self.rows(
            tmp_path, ("disco", {}, 50.0), ("disco", {}, 52.0), ("disco", {"hidden": -1}, 40.0), ("moco", {}, 45.0),
            ("seed", {}, 9.0),
        )  # fmt: skip
        path = plots.plot_bottleneck(plots.BottleneckOptions(str(tmp_path)))
        assert path.stat().st_size > 5000
        lines = {line.get_label(): line for line in figure[0].axes[0].lines}
        assert list(lines) == ["DisCo", "MoCo-v2"]
        assert lines["DisCo"].get_xdata().tolist() == [8, 2048]
        assert lines["DisCo"].get_ydata().tolist() == [40.0, 51.0]

    def test_one_width_is_refused(self, tmp_path):
        self.rows(tmp_path, ("disco", {}, 50.0))
        with pytest.raises(ValueError, match="with students of DisCo of several hidden widths"):
            plots.plot_bottleneck(plots.BottleneckOptions(str(tmp_path)))
