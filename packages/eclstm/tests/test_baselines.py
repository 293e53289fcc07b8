import pytest
import torch
from eclstm.baselines import ChannelNorm, ConvLSTM, ConvolutionalFlatLSTM, FlatLSTM, sub_windows
from eclstm.model import ECLSTMRegressor
from torch import nn
from torch.testing import assert_close

NETWORKS = {"lstm": FlatLSTM, "convlstm": ConvLSTM, "cnn-lstm": ConvolutionalFlatLSTM}
EPSILON = 1 + 1e-3  # what a fresh normalisation divides the square of its input by in evaluation


def test_sub_windows_overlap_and_move_one_row_each():
    segments = torch.randn(2, 7, 3)
    windows = sub_windows(segments, 5)
    assert_close(windows, torch.stack([segments[:, t : t + 5].transpose(1, 2) for t in range(3)], 1))


class TestChannelNorm:
    def test_normalises_over_all_but_the_last_axis_with_the_epsilon_of_keras(self):
        x = 0.1 * torch.randn(4, 3, 5, 2, 6)  # small, as the layers' outputs are: epsilon counts
        flat = x.flatten(0, 3)
        expected = (x - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-3).sqrt()
        assert_close(ChannelNorm(6)(x), expected)

    def test_running_statistics_move_by_the_momentum(self):
        norm = ChannelNorm(2, momentum=0.01)
        x = torch.randn(100, 2) + 5
        norm(x)
        assert_close(norm.running_mean, 0.01 * x.mean(0))
        assert_close(norm.running_var, 0.99 + 0.01 * x.var(0))

    def test_slow_momentum_leaves_evaluation_far_off_after_a_few_steps(self):
        """Trap: the authors' 0.01 suits runs of thousands of steps only."""

        def distance(momentum):
            torch.manual_seed(0)
            model = ECLSTMRegressor(["heat", "flow", "noise"], norm_momentum=momentum)
            segments = torch.randn(32, 20, 3)
            for _ in range(60):
                model(segments)
            model.eval()
            features = model.network(segments)
            model.train()
            return (features - model.network(segments)).square().mean().item()

        assert distance(0.01) > 5 * distance(0.1)
        assert ECLSTMRegressor(["heat"]).network.norms[0].momentum == 0.1


class TestFlatLSTM:
    def test_is_an_lstm_over_flattened_sub_windows(self):
        network = FlatLSTM(3, 8, [5]).eval()
        segments = torch.randn(2, 10, 3)
        flat = torch.stack([segments[:, t : t + 8].transpose(1, 2).flatten(1) for t in range(3)], 1)
        _, (h, _) = network.layers[0](flat)
        assert_close(network(segments), h[0] / EPSILON**0.5)

    def test_has_the_size_of_the_deep_lstm_in_the_comparison(self):
        network = FlatLSTM(16, 16)
        assert [layer.hidden_size for layer in network.layers] == [120, 160]
        assert 350_000 < sum(p.numel() for p in network.parameters()) < 400_000


class TestConvLSTM:
    def test_is_the_textbook_cell_with_sensors_as_channels(self):
        network = ConvLSTM(3, 16, [4]).eval()
        segments = torch.randn(2, 17, 3)
        convolution = network.gates[0]
        h = c = torch.zeros(2, 4, 16)
        for t in range(2):
            x = torch.cat([segments[:, t : t + 16].transpose(1, 2), h], 1)
            i, f, g, o = nn.functional.conv1d(x, convolution.weight, convolution.bias, padding=1).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        assert_close(network(segments), (h / EPSILON**0.5).flatten(1))


class TestConvolutionalFlatLSTM:
    def test_convolves_each_sub_window_before_it_is_flattened(self):
        network = ConvolutionalFlatLSTM(3, 8, [5]).eval()
        segments = torch.randn(2, 10, 3)
        maps = [network.convolutions(segments[:, t : t + 8].transpose(1, 2)).flatten(1) for t in range(3)]
        assert maps[0].shape == (2, 10 * 4)
        _, (h, _) = network.recurrent.layers[0](torch.stack(maps, 1))
        assert_close(network(segments), h[0] / EPSILON**0.5)


@pytest.mark.parametrize(
    ("name", "widths", "size"),
    [("lstm", [7, 6], 6), ("lstm", [8], 8), ("convlstm", [4, 5], 5 * 16), ("cnn-lstm", [9, 7], 7)],
)
def test_a_width_for_each_layer(name, widths, size):
    network = NETWORKS[name](3, 16, widths)
    assert network.output_size == size
    assert network(torch.randn(2, 20, 3)).shape == (2, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_normalisation_follows_every_layer_with_the_momentum_given(name):
    network = NETWORKS[name](3, 16, [4, 5], momentum=0.03)
    norms = [m for m in network.modules() if isinstance(m, ChannelNorm)]
    assert [norm.num_features for norm in norms] == [4, 5]
    network(torch.randn(2, 20, 3))
    for norm in norms:
        assert norm.momentum == 0.03
        assert norm.num_batches_tracked == 1
