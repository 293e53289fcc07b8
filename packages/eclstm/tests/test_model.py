import json

import pytest
import torch
from eclstm.cell import ECLSTM
from eclstm.model import NETWORKS, ECLSTMNetwork, ECLSTMRegressor, Standardize
from torch import nn
from torch.testing import assert_close

FEATURES = ["heat", "flow", "noise"]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


class TestParameterCount:
    def test_naive_network_is_the_authors(self):
        network = ECLSTMNetwork(sensors=16, length=16)
        assert [parameters(m) for m in (*network.layers, *network.norms)] == [5900, 18160, 20, 40]
        assert network.output_size == 160
        regressor = ECLSTMRegressor([f"sensor_{i}" for i in range(16)])
        assert [parameters(m) for m in (regressor.dense, regressor.output)] == [24150, 151]
        assert parameters(regressor) == 48421
        running = sum(norm.running_mean.numel() + norm.running_var.numel() for norm in regressor.network.norms)
        assert parameters(regressor) + running == 48481  # as Keras counts

    def test_with_15_sensors_too(self):
        assert parameters(ECLSTMRegressor([f"sensor_{i}" for i in range(15)])) == 48301


class TestStandardize:
    rows = torch.tensor([[1.0, 10.0], [3.0, 10.0], [8.0, 10.0]])

    def test_is_the_z_score_with_the_sample_deviation(self):
        scaler = Standardize(2)
        scaler.fit(self.rows)
        expected = (self.rows[:, 0] - 4) / 13.0**0.5
        assert_close(scaler(self.rows)[:, 0], expected)

    def test_a_deviation_of_zero_counts_as_1(self):
        scaler = Standardize(2)
        scaler.fit(self.rows)
        assert scaler.deviation[0, 1] == 1
        assert_close(scaler(torch.tensor([[4.0, 12.5]])), torch.tensor([[0.0, 2.5]]))

    def test_a_constant_that_is_not_exact_in_float32_counts_as_constant(self):
        scaler = Standardize(1)
        scaler.fit(torch.full((1001, 1), 518.67))
        assert scaler.deviation.item() == 1

    def test_tiny_features_keep_their_own_scale(self):
        rows = torch.tensor([[1e-7], [3e-7], [2e-7]])
        scaler = Standardize(1)
        scaler.fit(rows)
        assert_close(scaler(rows), torch.tensor([[-1.0], [1.0], [0.0]]))

    def test_each_condition_has_its_own_scaler_and_its_columns_are_not_passed_on(self):
        low = torch.tensor([[0.1, 1.0, 5.0], [-0.1, 3.0, 6.0], [0.0, 5.0, 7.0]])
        high = torch.tensor([[9.0, 100.0, 5.0], [11.0, 300.0, 5.0], [10.0, 200.0, 5.0]])
        scaler = Standardize(2, condition_columns=1, conditions=2)
        scaler.fit(torch.cat([high, low]), centres=torch.tensor([[0.0], [10.0]]))
        assert_close(scaler.mean, torch.tensor([[3.0, 6.0], [200.0, 5.0]]))
        assert_close(scaler.deviation, torch.tensor([[2.0, 1.0], [100.0, 1.0]]))
        segments = torch.stack([torch.cat([low, high]), torch.cat([high, low])])
        expected_low, expected_high = (
            torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]),
            torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
        )
        assert_close(
            scaler(segments),
            torch.stack([torch.cat([expected_low, expected_high]), torch.cat([expected_high, expected_low])]),
        )

    def test_the_condition_is_the_nearest_centre_in_all_condition_columns(self):
        scaler = Standardize(1, condition_columns=2, conditions=3)
        scaler.fit(torch.rand(9, 3), centres=torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        assert scaler.condition(torch.tensor([[0.1, 0.9, 5.0], [0.9, 0.2, 5.0], [0.2, 0.1, 5.0]])).tolist() == [1, 2, 0]

    def test_one_condition_ignores_no_column(self):
        scaler = Standardize(2)
        assert_close(scaler(self.rows), self.rows)  # mean 0, deviation 1 until fitted


class TestNetwork:
    @pytest.mark.parametrize("fusion", ["early", "hybrid"])
    def test_features_of_the_last_step_are_flattened_filters_fastest(self, fusion):
        """Trap: [L', S', F] as in Keras, or its dense weights fit nothing."""
        network = ECLSTMNetwork(3, 8, layers=[{"filters": [2, 5], "fusion": fusion}]).eval()
        segments = torch.randn(2, 10, 3)
        layer, norm = network.layers[0], network.norms[0]
        h = layer.forward_segment(segments.unsqueeze(3))[1][0]
        assert h.shape == (2, 4, 1 if fusion == "early" else 3, 5)
        assert network.output_size == h[0].numel()
        features = network(segments)
        for position, sensor, channel in torch.cartesian_prod(*map(torch.arange, h.shape[1:])).tolist():
            index = (position * h.shape[2] + sensor) * 5 + channel
            expected = h[:, position, sensor, channel] / (1 + norm.eps) ** 0.5  # running statistics are 0 and 1
            assert_close(features[:, index], expected)

    def test_layers_follow_each_other_with_normalisation_between(self):
        network = ECLSTMNetwork(3, 12).eval()
        for norm in network.norms:
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 1, 2)
        segments = torch.randn(2, 14, 3)
        first, second = (ECLSTM(layer.input_size, layer.cell.filters) for layer in network.layers)
        first.load_state_dict(network.layers[0].state_dict()), second.load_state_dict(network.layers[1].state_dict())
        windows = torch.stack([segments[:, t : t + 12] for t in range(3)], 1).unsqueeze(4)
        x = network.norms[0](first(windows)[0])
        assert_close(network(segments), network.norms[1](second(x)[1][0]).flatten(1))

    def test_preprocessing_convolves_each_sub_window(self):
        specs = [{"filters": 4, "kernel_size": 3, "stride": 1}, {"filters": 2, "kernel_size": 2, "stride": 2}]
        layers = [{"filters": [3], "kernel_sizes": 2}]
        network = ECLSTMNetwork(5, 9, layers, preprocessing=specs).eval()
        assert network.layers[0].input_size == (3, 5, 2)  # 9 -> 7 -> 3 cycles, 5 sensors, 2 channels
        segments = torch.randn(2, 11, 5)
        steps = []
        for t in range(3):
            x = segments[:, None, t : t + 9].transpose(2, 3)  # batch, channel, sensors, cycles
            for convolution in network.preprocessing[::2]:
                x = nn.functional.conv2d(x, convolution.weight, convolution.bias, stride=convolution.stride).relu()
            steps.append(x.permute(0, 3, 2, 1))
        layer = ECLSTM((3, 5, 2), [3], 2)
        layer.load_state_dict(network.layers[0].state_dict())
        expected = network.norms[0](layer(torch.stack(steps, 1))[1][0])
        assert_close(network(segments), expected.flatten(1))

    def test_preprocessing_is_the_authors_unless_told_otherwise(self):
        convolution = ECLSTMNetwork(5, 24, preprocessing=[{}]).preprocessing[0]
        assert (convolution.out_channels, convolution.kernel_size, convolution.stride) == (10, (1, 3), (1, 2))

    @pytest.mark.parametrize("network", NETWORKS)
    def test_every_network_learns_with_all_its_parameters(self, network):
        torch.manual_seed(0)
        model = ECLSTMRegressor(FEATURES, network=network)
        output = model(torch.randn(4, 20, 3))
        assert output.shape == (4,)
        output.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    @pytest.mark.parametrize("network", NETWORKS)
    def test_every_network_looks_at_each_row_of_the_segment(self, network):
        torch.manual_seed(0)
        model = ECLSTMRegressor(FEATURES, network=network).eval()
        segments = torch.randn(1, 20, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(segments).sum(), segments)
        assert (gradient != 0).any(2).all()


class TestRegressor:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"network": "lstm", "layers": [8]},
            {
                "layers": [{"filters": [3], "fusion": "hybrid"}],
                "preprocessing": [{"filters": 2}],
                "dense": [5, 4],
                "dropout": 0.3,
            },
            {"condition_columns": ["altitude"], "conditions": 2, "cap": None},
        ],
    )
    def test_a_saved_model_comes_back_bit_for_bit(self, tmp_path, options):
        torch.manual_seed(0)
        model = ECLSTMRegressor(FEATURES, **options)
        centres = torch.tensor([[0.0], [1.0]]) if "conditions" in options else None
        model.standardize.fit(torch.rand(50, len(model.columns)) * 3 + 5, centres)
        segments = torch.rand(4, model.rows, len(model.columns)) * 3 + 5
        model(segments)  # moves the running statistics
        model.eval().save_pretrained(tmp_path)
        again = ECLSTMRegressor.from_pretrained(tmp_path).eval()
        assert torch.equal(again(segments), model(segments))
        assert again.columns == model.columns
        assert again.cap == model.cap
        assert again.rows == model.rows

    def test_a_checkpoint_is_safetensors_and_json(self, tmp_path):
        ECLSTMRegressor(FEATURES, window_size=12).save_pretrained(tmp_path)
        assert {"config.json", "model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
        assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["features"] == FEATURES
        assert config["window_size"] == 12

    def test_predicts_from_raw_rows_through_the_scaler(self):
        torch.manual_seed(0)
        model = ECLSTMRegressor(FEATURES).eval()
        rows = torch.randn(100, 3)
        segments = torch.randn(4, 20, 3)
        expected = model(segments)
        mean, deviation = torch.tensor([500.0, -3.0, 0.0]), torch.tensor([20.0, 0.1, 1.0])
        model.standardize.fit((rows - rows.mean(0)) / rows.std(0) * deviation + mean)
        assert_close(model(segments * deviation + mean), expected, rtol=0, atol=1e-4)

    def test_dropout_precedes_each_dense_layer(self):
        model = ECLSTMRegressor(FEATURES, dense=[6, 5], dropout=0.5)
        assert [type(m).__name__ for m in model.dense] == ["Dropout", "Linear", "ReLU"] * 2
        assert model.dense[0].p == 0.5
        segments = torch.randn(8, 20, 3)
        model.eval()
        assert torch.equal(model(segments), model(segments))
        assert not torch.equal(model.train()(segments), model(segments))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"network": "transformer"},
                "network 'transformer' is unknown: choose from eclstm, lstm, cnn-lstm, convlstm",
            ),
            ({"features": []}, "features is empty: name at least one sensor column"),
            ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
            ({"window_size": 4}, r"layers\[0\]: window 4 < 5 needed by kernels \[3, 3\]"),
            ({"window_size": 7}, r"layers\[1\]: window 3 < 5 needed by kernels \[3, 3\]"),
            ({"conditions": 3}, r"conditions 3 and condition_columns \[\] need each other"),
            ({"condition_columns": ["altitude"]}, "conditions 1 and condition_columns .'altitude'. need each other"),
            ({"conditions": 0}, "conditions must be at least 1, got 0"),
            ({"layers": []}, "layers must be a list with an entry for each layer"),
            ({"layers": {"filters": [3]}}, "layers must be a list with an entry for each layer"),
            ({"layers": [{"filters": [3], "filtres": [3]}]}, r"layers\[0\]: .*unexpected keyword argument 'filtres'"),
            (
                {"layers": [{"filters": [3]}, {"filters": [3], "fusion": "late"}]},
                r"layers\[1\]: fusion 'late' is unknown",
            ),
            ({"layers": [10, 20]}, r"layers\[0\]: .*must be a mapping"),
            ({"network": "lstm", "layers": [{"filters": [3]}]}, "layers of lstm are widths, positive whole numbers"),
            ({"network": "convlstm", "layers": [0]}, "layers of convlstm are widths"),
            ({"network": "cnn-lstm", "layers": []}, "layers must be a list"),
            ({"dense": [150, 0]}, r"dense widths must be positive, got \[150, 0\]"),
            ({"dropout": 1.5}, "dropout probability has to be between 0 and 1"),
            ({"preprocessing": [{"kernel_size": 17}]}, r"preprocessing\[0\]: window 16 < 17 needed by kernels \[17\]"),
            ({"preprocessing": [{"filter": 4}]}, r"preprocessing\[0\]: .*unexpected keyword argument 'filter'"),
            (
                {"preprocessing": [{"filters": 0}]},
                r"preprocessing\[0\]: filters, kernel_size and stride must be positive, got 0",
            ),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            ECLSTMRegressor(**{"features": FEATURES, **options})

    @pytest.mark.parametrize("shape", [(2, 19, 3), (2, 20, 4)])
    def test_segments_of_another_shape_are_refused(self, shape):
        with pytest.raises(
            ValueError, match=rf"expected segments of 20 rows and 3 columns, got \({shape[1]}, {shape[2]}\)"
        ):
            ECLSTMRegressor(FEATURES)(torch.zeros(shape))
