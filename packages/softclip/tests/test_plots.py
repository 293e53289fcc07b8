"""Pictures: all three share a scale on which small probabilities are seen, and an arm is drawn with what it logged."""

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from softclip.plots import plot_targets, plot_training

CLIP = [{"step": s, "loss": 5 / s, "learning_rate": 0.1, "grad_norm": 1.0} for s in (1, 2, 3)]
SOFT = [{"step": s, "soft": 2 / s, "loss": 9 / s, "epoch": s, "eval_loss": 1.0} for s in (1, 2)]


@pytest.fixture
def figure(monkeypatch):
    """Those that were saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


def batch(count=4):
    one_hot = torch.eye(count)
    target = 0.9 * one_hot + 0.1 / count
    return one_hot, target, torch.full((count, count), 1 / count).requires_grad_()


class TestTargets:
    def test_three_panels_of_the_values_on_one_scale(self, tmp_path, figure):
        one_hot, target, predicted = batch()
        captions = ["a cat", "a dog", "a very long caption of which the end is of no use to anybody", "$5_{ or $6"]
        plot_targets(one_hot, target, predicted, captions, None, tmp_path / "new" / "targets.png")
        assert imread(tmp_path / "new" / "targets.png").std() > 0.05
        *panels, _ = figure[0].axes
        assert [panel.get_title() for panel in panels] == ["one-hot target", "softened target", "prediction"]
        for panel, values in zip(panels, (one_hot, target, predicted), strict=True):
            (heat,) = panel.images
            assert torch.equal(torch.tensor(heat.get_array()), values)
            assert heat.norm(0) == 0
            assert heat.norm(1) == 1
            assert heat.norm(0.01) > 0.1
            columns = [label.get_text() for label in panel.get_xticklabels()]
            assert columns[:2] == ["a cat", "a dog"]
            assert columns[2].startswith("a very long")
            assert len(columns[2]) <= 36
        assert [label.get_text() for label in panels[0].get_yticklabels()] == columns

    def test_thumbnails_stand_beside_their_rows(self, tmp_path, figure):
        thumbnails = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
        plot_targets(*batch(), list("abcd"), thumbnails, tmp_path / "targets.png")
        panel = figure[0].axes[0]
        insets = panel.child_axes
        assert [int(inset.images[0].get_array()[0, 0, 0]) for inset in insets] == [0, 1, 2, 3]
        tops = [inset.get_window_extent().y1 for inset in insets]
        assert tops == sorted(tops, reverse=True)
        assert not panel.get_yticklabels()


class TestTraining:
    def test_the_loss_comes_first_and_what_the_engine_logs_is_left_out(self, tmp_path, figure):
        plot_training({"soft": SOFT, "clip": CLIP}, tmp_path / "new" / "loss.png")
        assert imread(tmp_path / "new" / "loss.png").std() > 0.02
        loss, soft = figure[0].axes
        assert [loss.get_title(), soft.get_title()] == ["loss", "soft"]
        assert [line.get_label() for line in loss.lines] == ["soft", "clip"]
        assert loss.lines[1].get_ydata().tolist() == [5, 5 / 2, 5 / 3]

    def test_a_term_that_an_arm_lacks_is_not_drawn(self, tmp_path, figure):
        plot_training({"clip": CLIP, "soft": SOFT}, tmp_path / "loss.png")
        (line,) = figure[0].axes[1].lines
        assert line.get_label() == "soft"
        assert line.get_color() == "C1"

    def test_more_terms_than_columns_begin_another_row(self, tmp_path, figure):
        plot_training({"soft": [{"step": 1, "loss": 1, "a": 1, "b": 2, "c": 3}]}, tmp_path / "loss.png")
        spans = [
            (panel.get_subplotspec().rowspan.start, panel.get_subplotspec().colspan.start) for panel in figure[0].axes
        ]
        assert spans == [(0, 0), (0, 1), (0, 2), (1, 0)]

    def test_nothing_logged_gives_no_picture(self, tmp_path):
        plot_training({"clip": [], "soft": [{"step": 1, "epoch": 1}]}, tmp_path / "loss.png")
        assert not list(tmp_path.iterdir())
