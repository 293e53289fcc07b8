"""Pictures: what was read stands by its crop, red if it is wrong."""

import numpy as np
import pytest
import torch
from dsan.decode import Reading
from dsan.plots import contact_sheet, overlay, plot_training
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

LOSSES = [{"step": s, "loss": 9 / s, "context": 5 / s, "enhancement": 4 / s, "learning_rate": 1e-3} for s in (1, 2, 3)]
ACCURACY = [{"step": s, "eval_loss": 1.0, "eval_accuracy": s / 4, "epoch": 1.0} for s in (1, 3)]
RAMP = np.linspace(0, 255, 32 * 100).astype(np.uint8).reshape(32, 100)


@pytest.fixture
def figure(monkeypatch):
    """The last one that was saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


class TestTraining:
    def test_losses_and_accuracy(self, tmp_path, figure):
        plot_training(tmp_path / "new" / "plot.png", LOSSES + ACCURACY)
        losses, accuracy = figure[0].axes
        assert [line.get_label() for line in losses.lines] == ["loss", "context", "enhancement"]
        assert losses.lines[1].get_ydata().tolist() == [5, 2.5, 5 / 3]
        (line,) = accuracy.lines
        assert (line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) == (
            "accuracy",
            [1, 3],
            [25, 75],
        )
        assert imread(tmp_path / "new" / "plot.png").std() > 0.02

    def test_what_was_not_logged_has_no_panel(self, tmp_path, figure):
        plot_training(tmp_path / "plot.png", LOSSES)
        assert len(figure[0].axes) == 1
        plot_training(tmp_path / "none.png", [{"step": 3, "epoch": 1.0, "train_runtime": 9.0}])
        assert not (tmp_path / "none.png").exists()


class TestContactSheet:
    def test_texts_and_colours(self, tmp_path, figure):
        readings = [Reading("cafe", 0.9), Reading("$x$", 0.5), Reading("", 0.0)]
        contact_sheet(tmp_path / "new" / "s.png", [RAMP[None]] * 3, readings, ["cafe", "six", "a"])
        texts = [(text.get_text(), text.get_color()) for text in figure[0].axes[0].texts]
        assert texts == [
            ("cafe 0.90", "tab:green"), ("$x$ 0.50  not six", "tab:red"), ("(nothing) 0.00  not a", "tab:red")
        ]  # fmt: skip
        assert imread(tmp_path / "new" / "s.png").std() > 0.02

    def test_without_truths_nothing_is_judged(self, tmp_path, figure):
        contact_sheet(tmp_path / "s.png", [RAMP[None]], [Reading("cafe", 0.9)])
        (text,) = figure[0].axes[0].texts
        assert (text.get_text(), text.get_color()) == ("cafe 0.90", "0.2")

    def test_every_kind_of_crop_keeps_its_proportions(self, tmp_path, figure):
        grey = Image.fromarray(RAMP)
        images = [
            grey,
            grey.convert("RGB"),
            RAMP[None],
            torch.from_numpy(RAMP)[None].expand(3, -1, -1),
            RAMP[:, :20][None],
        ]
        attention = [np.full((32, 100), 0.5, np.float32)] * 4 + [np.eye(8, 5)]
        contact_sheet(tmp_path / "s.png", images, [Reading("a", 1.0)] * 5, attention=attention)
        shown = figure[0].axes[0].images
        assert len(shown) == 10
        for image in shown:
            left, right, bottom, top = image.get_extent()
            height, width = image.get_array().shape[:2]
            assert (right - left) / (bottom - top) == pytest.approx(width / height)
            assert right - left <= 4.0001
            assert bottom - top <= 1.0001

    def test_no_crops(self, tmp_path):
        with pytest.raises(ValueError, match="no crops to draw"):
            contact_sheet(tmp_path / "s.png", [], [])


class TestOverlay:
    def test_attention_is_red_where_it_is_high(self, tmp_path, figure):
        attention = np.zeros((32, 100), np.float32)
        attention[:, 60:] = 0.3
        overlay(tmp_path / "new" / "o.png", RAMP[None], attention, Reading("a1", 0.8, [0.9, 0.7]))
        plain, heat = (panel.images[0].get_array() for panel in figure[0].axes)
        assert np.array_equal(plain, RAMP)
        assert (heat[:, 70:, 0] > heat[:, 70:, 2]).all()
        assert (heat[:, :50, 0] < heat[:, :50, 2]).all()
        assert figure[0].get_suptitle() == "a1   0.80"
        assert figure[0].get_supxlabel() == "a 0.90  1 0.70"
        assert imread(tmp_path / "new" / "o.png").std() > 0.02

    def test_without_attention(self, tmp_path, figure):
        overlay(tmp_path / "o.png", Image.fromarray(RAMP), None, Reading("", 0.0))
        assert len(figure[0].axes) == 1
