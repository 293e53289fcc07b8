import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eclstm.cell import ECLSTM, ECLSTMCell, state_length
from eclstm.keras import load_keras_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import keras_arrays, literal_eclstm
from torch.testing import assert_close

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))

CONFIGS = {
    "naive": {"input_size": (16, 7, 1), "filters": [4, 6]},
    "one convolution": {"input_size": (10, 3, 1), "filters": [5]},
    "three convolutions": {"input_size": (14, 4, 1), "filters": [3, 2, 4], "kernel_sizes": [2, 3, 5]},
    "even kernels": {"input_size": (12, 3, 1), "filters": [2, 3], "kernel_sizes": [4, 2]},
    "hybrid, even sensors": {"input_size": (9, 4, 1), "filters": [2, 3], "fusion": "hybrid"},
    "hybrid, odd sensors": {"input_size": (9, 5, 1), "filters": [3], "fusion": "hybrid", "kernel_sizes": 4},
    "hybrid then early": {
        "input_size": (12, 5, 1),
        "filters": [3, 4],
        "kernel_sizes": [3, 5],
        "fusion": ["hybrid", "early"],
    },
    "early then hybrid": {"input_size": (12, 5, 1), "filters": [3, 4], "fusion": ["early", "hybrid"]},
    "stride 2": {"input_size": (19, 3, 1), "filters": [3, 4], "kernel_sizes": [3, 4], "stride": 2},
    "stride 2, hybrid": {"input_size": (15, 2, 1), "filters": [2, 3], "fusion": "hybrid", "stride": 2},
    "several channels": {"input_size": (9, 2, 3), "filters": [3, 4]},
    "recurrent kernel of 1": {"input_size": (5, 3, 1), "filters": [3, 4]},
    "no cell convolution": {"input_size": (10, 3, 1), "filters": [3, 4], "cell_convolution": False},
    "tanh inside": {"input_size": (10, 3, 1), "filters": [3, 4], "recurrent_activation": ["tanh", "sigmoid"]},
    "sigmoid inside": {
        "input_size": (10, 3, 1),
        "filters": [3, 4],
        "recurrent_activation": ["sigmoid", "hard_sigmoid"],
    },
    "hard_sigmoid inside": {
        "input_size": (12, 3, 1),
        "filters": [3, 4, 2],
        "recurrent_activation": ["linear", "hard_sigmoid", "hard_sigmoid"],
    },
    "other activations": {
        "input_size": (12, 3, 1),
        "filters": [3, 4, 2],
        "recurrent_activation": "relu",
        "conv_activation": ["relu", "tanh", "linear"],
    },
    "too large for matrices": {"input_size": (28, 8, 1), "filters": [2, 3], "fusion": "hybrid"},
}
each_config = pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])


def layer_and_input(config, steps=4, seed=0, **more):
    torch.manual_seed(seed)
    layer = ECLSTM(**config, **more)
    for bias in layer.cell.biases:
        torch.nn.init.normal_(bias)
    return layer, torch.randn(3, steps, *config["input_size"])


def literal(layer, x, state=None):
    cell = layer.cell
    return literal_eclstm(x, keras_arrays(cell), cell.recurrent_activation, cell.conv_activation, cell.stride, state)


def gradients(output, module):
    """By every parameter, of a sum that weighs all outputs differently."""
    weights = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return dict(
        zip(
            dict(module.named_parameters()),
            torch.autograd.grad((output * weights).sum(), module.parameters()),
            strict=True,
        )
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
class TestGolden:
    @pytest.fixture
    def golden(self, path):
        arrays = dict(np.load(path).items())
        return json.loads(str(arrays.pop("meta"))), arrays

    @pytest.fixture
    def layer(self, golden):
        meta, arrays = golden
        layer = ECLSTM(
            arrays["x"].shape[2:],
            meta["filters"],
            meta["kernel_size"],
            meta["fusion"],
            meta["recurrent_activation"],
            meta["conv_activation"],
            meta["strides"],
            return_sequences=meta["return_sequences"],
        )
        load_keras_weights(layer, arrays)
        return layer

    def check(self, output, x, parameters, golden):
        arrays = golden[1]
        np.testing.assert_allclose(output.detach(), arrays["y"], rtol=0, atol=1e-5)
        computed = torch.autograd.grad((output * torch.from_numpy(arrays["cot"])).sum(), [x, *parameters.values()])
        for name, gradient in zip(["gx", *(f"g_{name}" for name in parameters)], computed, strict=True):
            np.testing.assert_allclose(gradient, arrays[name], rtol=0, atol=1e-4, err_msg=name)

    def keras_parameters(self, layer, golden):
        """Leaves in the golden layout that fill the layer, so that gradients have that layout too."""
        leaves = {
            k: torch.from_numpy(v).requires_grad_()
            for k, v in golden[1].items()
            if k.startswith(("kernel", "bias", "recurrent"))
        }
        cell, last = layer.cell, len(layer.cell.kernels) - 1
        tensors = {}
        for j in range(last + 1):
            tensors[f"cell.kernels.{j}"] = leaves[f"kernel_{j}"].permute(3, 2, 1, 0)
            tensors[f"cell.biases.{j}"] = leaves[f"bias_{j}"]
            recurrent = leaves[f"recurrent_kernel_{j}"].permute(3, 2, 1, 0)
            tensors[f"cell.recurrent_kernels.{j}"] = recurrent[: 4 * cell.filters[-1]]
        tensors["cell.cell_kernel"] = recurrent[4 * cell.filters[-1] :]
        return leaves, tensors

    def test_layer_equals_the_authors(self, golden, layer):
        x = torch.from_numpy(golden[1]["x"]).requires_grad_()
        leaves, tensors = self.keras_parameters(layer, golden)
        output, _ = torch.func.functional_call(layer, tensors, (x,))
        self.check(output, x, leaves, golden)

    def test_stepping_the_cell_equals_the_authors(self, golden, layer):
        x = torch.from_numpy(golden[1]["x"]).requires_grad_()
        leaves, tensors = self.keras_parameters(layer, golden)
        tensors = {name.removeprefix("cell."): tensor for name, tensor in tensors.items()}
        state, outputs = None, []
        for x_t in x.unbind(1):
            state = torch.func.functional_call(layer.cell, tensors, (x_t, state))
            outputs.append(state[0])
        self.check(torch.stack(outputs, 1) if layer.return_sequences else outputs[-1], x, leaves, golden)

    def test_literal_reference_equals_the_authors(self, golden, layer):
        x = torch.from_numpy(golden[1]["x"]).requires_grad_()
        leaves, _ = self.keras_parameters(layer, golden)
        output, (h, _) = literal_eclstm(x, leaves, layer.cell.recurrent_activation, layer.cell.conv_activation)
        self.check(output if layer.return_sequences else h, x, leaves, golden)

    def test_loaded_weights_give_the_authors_output(self, golden, layer):
        output, _ = layer(torch.from_numpy(golden[1]["x"]))
        np.testing.assert_allclose(output.detach(), golden[1]["y"], rtol=0, atol=1e-5)


@each_config
def test_layer_equals_the_literal_equations(config):
    layer, x = layer_and_input(config)
    output, state = layer(x)
    expected, expected_state = literal(layer, x)
    assert_close(output, expected, rtol=0, atol=1e-5)
    assert_close(state, expected_state, rtol=0, atol=1e-5)
    assert_close(gradients(output, layer), gradients(expected, layer), rtol=0, atol=1e-4)


@each_config
def test_stepping_the_cell_equals_the_layer(config):
    layer, x = layer_and_input(config)
    state, outputs = None, []
    for x_t in x.unbind(1):
        state = layer.cell(x_t, state)
        outputs.append(state[0])
    output, last = layer(x)
    assert_close(output, torch.stack(outputs, 1), rtol=0, atol=1e-5)
    assert_close(last, state, rtol=0, atol=1e-5)


@each_config
def test_forward_segment_equals_forward_on_unfolded_windows(config):
    layer, _ = layer_and_input(config)
    length, sensors, channels = config["input_size"]
    segment = torch.randn(3, length + 3, sensors, channels)
    windows = torch.stack([segment[:, t : t + length] for t in range(4)], 1)
    once, state_once = layer.forward_segment(segment)
    many, state_many = layer(windows)
    assert_close(once, many, rtol=0, atol=1e-6)
    assert_close(state_once, state_many, rtol=0, atol=1e-6)
    assert_close(gradients(once, layer), gradients(many, layer), rtol=0, atol=1e-5)


@each_config
def test_matrices_equal_convolutions(config):
    layer, x = layer_and_input(config)
    output, state = layer(x)
    dense = gradients(output, layer)
    layer.input_matrices = layer.recurrent_matrices = None
    expected, expected_state = layer(x)
    assert_close(output, expected, rtol=0, atol=1e-6)
    assert_close(state, expected_state, rtol=0, atol=1e-6)
    assert_close(dense, gradients(expected, layer), rtol=0, atol=1e-5)


def test_matrices_serve_linear_recurrence_on_small_states_only():
    assert ECLSTM(**CONFIGS["naive"]).recurrent_matrices is not None
    assert ECLSTM(**CONFIGS["tanh inside"]).recurrent_matrices is None
    large = ECLSTM(**CONFIGS["too large for matrices"])
    assert large.recurrent_matrices is None
    assert large.input_matrices is None


@each_config
def test_a_given_state_continues_the_sequence(config):
    layer, x = layer_and_input(config, steps=5)
    whole, end = layer(x)
    first, state = layer(x[:, :2])
    second, continued = layer(x[:, 2:], state)
    assert_close(whole, torch.cat([first, second], 1), rtol=0, atol=1e-6)
    assert_close(continued, end, rtol=0, atol=1e-6)


def test_a_given_state_is_used_as_the_equations_say():
    layer, x = layer_and_input(CONFIGS["naive"])
    state = (torch.randn(3, *layer.output_size), torch.randn(3, *layer.output_size))
    assert_close(layer(x, state), literal(layer, x, state), rtol=0, atol=1e-5)
    assert (layer(x, state)[0] - layer(x)[0]).abs().max() > 0.01


def test_forward_segment_takes_a_state():
    layer, _ = layer_and_input(CONFIGS["naive"])
    segment = torch.randn(2, 20, 7, 1)
    whole, _ = layer.forward_segment(segment)
    first, state = layer.forward_segment(segment[:, :17])
    second, _ = layer.forward_segment(segment[:, 2:], state)
    assert_close(whole, torch.cat([first, second], 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", ["sigmoid", "hard_sigmoid"])
def test_recurrent_stack_acts_on_the_zero_state_too(inner):
    """Trap: r(0) is not 0 for these, so the h branch of the first step is not 0 either."""
    config = {"input_size": (10, 3, 1), "filters": [3, 4], "recurrent_activation": [inner, "hard_sigmoid"]}
    layer, x = layer_and_input(config, steps=1)
    with_branch, _ = layer(x)
    assert_close(with_branch, literal(layer, x)[0], rtol=0, atol=1e-6)
    layer.cell.recurrent_activation[0] = "tanh"  # zero at zero
    without, _ = layer(x)
    assert (with_branch - without).abs().max() > 0.01


def test_batch_first_false_swaps_the_first_two_axes():
    layer, x = layer_and_input(CONFIGS["naive"])
    expected, expected_state = layer(x)
    segment = torch.randn(3, 19, 7, 1)
    expected_segment, _ = layer.forward_segment(segment)
    layer.batch_first = False
    output, state = layer(x.transpose(0, 1))
    assert_close(output, expected.transpose(0, 1))
    assert_close(state, expected_state)
    assert_close(layer.forward_segment(segment)[0], expected_segment.transpose(0, 1))
    layer.return_sequences = False
    assert_close(layer(x.transpose(0, 1))[0], expected[:, -1])


def test_return_sequences_false_gives_the_last_output():
    layer, x = layer_and_input(CONFIGS["naive"])
    sequence, state = layer(x)
    layer.return_sequences = False
    output, (h, c) = layer(x)
    assert_close(output, sequence[:, -1])
    assert_close((h, c), state)


def test_without_cell_convolution_the_state_is_forgotten_pointwise():
    layer, x = layer_and_input(CONFIGS["no cell convolution"])
    assert not [name for name, _ in layer.named_parameters() if "cell_kernel" in name]
    identity, _ = layer_and_input({**CONFIGS["no cell convolution"], "cell_convolution": True})
    identity.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.dirac_(identity.cell.cell_kernel)  # an identity kernel in the middle: the same layer
    assert_close(layer(x)[0], identity(x)[0], rtol=0, atol=1e-6)


class TestDropout:
    def one_number_a_gate(self, **dropout):
        """State and input of one number: u_g = mask_g * x for input dropout, v_g = mask_g * h for the other."""
        layer = ECLSTM((1, 1, 1), [1], 1, recurrent_activation="sigmoid", **dropout)
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        return layer

    def expected(self, u):
        """(h, c) of an empty cell state for u (..., 4)."""
        i, _, g, o = u.unbind(-1)
        c = torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c)

    masks = 2.0 * torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)  # every mask of dropout 0.5

    def test_input_masks_differ_by_gate_and_are_shared_over_time(self):
        layer = self.one_number_a_gate(dropout=0.5)
        torch.nn.init.ones_(layer.cell.kernels[0])
        torch.manual_seed(0)
        output = layer(torch.ones(200, 3, 1, 1, 1))[0].flatten(1)
        assert_close(output, output[:, :1].expand(-1, 3))  # one mask for all steps
        possible = self.expected(self.masks).unique()
        assert len(possible) == 5  # candidate dropped, or any of the other two gates
        assert_close(output[:, 0].unique(), possible)

    def test_recurrent_masks_differ_by_gate_and_are_shared_over_time(self):
        layer = self.one_number_a_gate(recurrent_dropout=0.5)
        torch.nn.init.ones_(layer.cell.recurrent_kernels[0])
        state = (torch.ones(200, 1, 1, 1), torch.zeros(200, 1, 1, 1))
        torch.manual_seed(0)
        output = layer(torch.zeros(200, 2, 1, 1, 1), state)[0].flatten(1)
        first = self.expected(self.masks)  # of each mask, on h = 1
        second = self.expected(self.masks * first[:, None])
        pairs = torch.stack([first, second], 1)
        distance = torch.cdist(output, pairs)
        assert distance.min(1).values.max() < 1e-6  # every row is one mask used twice
        assert len(distance.argmin(1).unique()) >= 5

    def test_share_dropped_is_what_was_asked(self):
        layer = self.one_number_a_gate(dropout=0.2)
        torch.nn.init.ones_(layer.cell.kernels[0])
        torch.manual_seed(0)
        output = layer(torch.ones(4000, 1, 1, 1, 1))[0].flatten()
        assert 0.17 < (output == 0).float().mean() < 0.23  # the candidate's mask is 0

    @pytest.mark.parametrize("dropout", [{"dropout": 0.4}, {"recurrent_dropout": 0.4}])
    def test_evaluation_drops_nothing(self, dropout):
        layer, x = layer_and_input(CONFIGS["naive"], **dropout)
        plain, _ = layer_and_input(CONFIGS["naive"])
        assert (layer(x)[0] - plain(x)[0]).abs().max() > 0.01
        layer.eval()
        assert_close(layer(x)[0], plain(x)[0], rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["naive", "hybrid, even sensors", "tanh inside"])
    def test_segment_route_drops_the_same(self, name):
        layer, _ = layer_and_input(CONFIGS[name], dropout=0.4, recurrent_dropout=0.3)
        length, sensors, _ = layer.input_size
        segment = torch.randn(3, length + 2, sensors, 1)
        windows = torch.stack([segment[:, t : t + length] for t in range(3)], 1)
        torch.manual_seed(1)
        once, _ = layer.forward_segment(segment)
        torch.manual_seed(1)
        assert_close(once, layer(windows)[0])


@pytest.mark.parametrize("config", [
    {"input_size": (6, 2, 1), "filters": [2, 2], "kernel_sizes": [3, 2]},
    {"input_size": (5, 2, 1), "filters": [2], "fusion": "hybrid"},
    {"input_size": (6, 2, 1), "filters": [2, 1], "recurrent_activation": ["sigmoid", "sigmoid"], "conv_activation": "tanh"},
], ids=["matrices", "hybrid", "convolutions"])  # fmt: skip
def test_gradients_are_exact(config):
    torch.manual_seed(0)
    layer = ECLSTM(**config).double()
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 3, *config["input_size"], dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["naive", "hybrid, even sensors", "sigmoid inside", "no cell convolution"])
def test_autocast_stays_close_to_float32(name, dtype):
    layer, x = layer_and_input(CONFIGS[name])
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype):
        output, _ = layer(x)
    output.float().square().mean().backward()
    assert_close(output.float(), expected, rtol=0, atol=0.03)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["naive", "sigmoid inside", "no cell convolution"])
def test_autocast_takes_a_float32_state(name):
    layer, x = layer_and_input(CONFIGS[name])
    state = (torch.rand(3, *layer.output_size), torch.rand(3, *layer.output_size))
    expected, _ = layer(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x, state)
    output.float().square().mean().backward()
    assert_close(output.float(), expected, rtol=0, atol=0.03)


def test_whole_layer_in_bfloat16_stays_close_to_float32():
    layer, x = layer_and_input(CONFIGS["naive"])
    expected, _ = layer(x)
    output, state = layer.bfloat16()(x.bfloat16())
    assert output.dtype == state[1].dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.03)


class TestInitialisation:
    def test_first_naive_layer_has_5900_parameters(self):
        assert sum(p.numel() for p in ECLSTM((16, 16, 1), [10, 10]).parameters()) == 5900

    def test_forget_bias_is_1_at_every_depth(self):
        cell = ECLSTMCell((16, 5, 1), [3, 4, 5])
        for bias, filters in zip(cell.biases, cell.filters, strict=True):
            assert_close(bias.detach().view(4, filters), torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(4, filters))

    def test_recurrent_kernels_are_orthogonal_over_all_gates_and_the_cell_convolution(self):
        cell = ECLSTMCell((16, 5, 1), [10, 10])
        last = torch.cat([cell.recurrent_kernels[1], cell.cell_kernel]).detach().flatten(1)
        assert last.shape == (50, 30)
        assert_close(last.T @ last, torch.eye(30), rtol=0, atol=1e-5)
        first = cell.recurrent_kernels[0].detach().flatten(1)
        assert_close(first.T @ first, torch.eye(30), rtol=0, atol=1e-5)

    def test_recurrent_kernels_without_cell_convolution_are_orthogonal_over_the_gates(self):
        last = ECLSTMCell((16, 5, 1), [10, 10], cell_convolution=False).recurrent_kernels[1].detach().flatten(1)
        assert_close(last.T @ last, torch.eye(30), rtol=0, atol=1e-5)

    def test_input_kernels_are_glorot_uniform_over_all_gates(self):
        kernel = ECLSTMCell((16, 14, 1), [10, 10]).kernels[0].detach()
        bound = (6 / (3 * 14 * (1 + 40))) ** 0.5
        assert 0.97 * bound < kernel.abs().max() <= bound
        assert_close(kernel.std().item(), bound / 3**0.5, rtol=0.05, atol=0)

    def test_recurrent_width_is_at_most_the_unstrided_length_shared_by_the_depths(self):
        widths = lambda *args, **more: [k.shape[3] for k in ECLSTMCell(*args, **more).recurrent_kernels]  # noqa: E731
        assert widths((16, 5, 1), [2, 2]) == [3, 3]
        assert widths((5, 5, 1), [2, 2]) == [1, 1]  # ceil(1 / 2)
        assert widths((7, 5, 1), [2, 2]) == [2, 2]  # ceil(3 / 2)
        assert widths((11, 5, 1), [2, 2], [3, 5], stride=2) == [3, 3]  # ceil(5 / 2), though stride leaves one position
        assert widths((10, 5, 1), [2], [4]) == [4]


@given(length=st.integers(1, 40), kernels=st.lists(st.integers(1, 7), min_size=1, max_size=3), stride=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_state_length_is_what_convolutions_leave(length, kernels, stride):
    x = torch.zeros(1, 1, length)
    for kernel in kernels:
        x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride) if x.shape[2] >= kernel else x[:, :, :0]
    if x.shape[2]:
        assert state_length(length, kernels, stride) == x.shape[2]
    else:
        with pytest.raises(ValueError, match="needed by kernels"):
            state_length(length, kernels, stride)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": (4, 2, 1), "filters": [2, 2]}, r"window 4 < 5 needed by kernels \[3, 3\]"),
        (
            {"input_size": (6, 2, 1), "filters": [2, 2], "stride": 2},
            r"window 6 < 7 needed by kernels \[3, 3\] with stride 2",
        ),
        ({"filters": [2, 2], "kernel_sizes": [3]}, r"kernel_sizes \[3\] has 1 entries and filters \[2, 2\] has 2"),
        ({"filters": [2, 2], "fusion": ["early"]}, "fusion .* has 1 entries"),
        ({"filters": [2, 2], "conv_activation": ["relu"] * 3}, "conv_activation .* has 3 entries"),
        ({"filters": [2], "recurrent_activation": ["linear", "tanh"]}, "recurrent_activation .* has 2 entries"),
        ({"filters": [2], "fusion": "late"}, "fusion 'late' is unknown: choose from early, hybrid"),
        (
            {"filters": [2], "conv_activation": "gelu"},
            "conv_activation 'gelu' is unknown: choose from linear, hard_sigmoid",
        ),
        ({"filters": [2], "recurrent_activation": "gelu"}, "recurrent_activation 'gelu' is unknown"),
        ({"filters": []}, "filters must be one or more positive integers"),
        ({"filters": [2, 0]}, r"filters must be one or more positive integers, got \[2, 0\]"),
        ({"filters": [2], "kernel_sizes": 0}, "kernel_sizes and stride must be positive"),
        ({"filters": [2], "stride": 0}, "kernel_sizes and stride must be positive"),
    ],
)
@pytest.mark.parametrize("module", [ECLSTM, ECLSTMCell])
def test_bad_options_are_named(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**{"input_size": (10, 2, 1), **options})


def test_inputs_of_another_shape_are_refused():
    layer = ECLSTM((10, 3, 1), [2])
    with pytest.raises(ValueError, match=r"\(10, 3, 1\), got \(10, 4, 1\)"):
        layer(torch.zeros(2, 5, 10, 4, 1))
    with pytest.raises(ValueError, match=r"\(10, 3, 1\), got \(9, 3, 1\)"):
        layer.cell(torch.zeros(2, 9, 3, 1))
    with pytest.raises(ValueError, match=r"at least 10 rows .* got 9 of"):
        layer.forward_segment(torch.zeros(2, 9, 3, 1))
    with pytest.raises(ValueError, match=r"\(3, 1\), got 12 of \(4, 1\)"):
        layer.forward_segment(torch.zeros(2, 12, 4, 1))


class TestKerasWeights:
    @pytest.fixture
    def arrays(self):
        return dict(np.load(GOLDEN[0]))

    def test_a_missing_array_is_named(self, arrays):
        with pytest.raises(ValueError, match="'bias_1' is missing: the layer has 2 convolutions"):
            load_keras_weights(ECLSTM((16, 7, 1), [4, 6]), {k: v for k, v in arrays.items() if k != "bias_1"})

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"input_size": (16, 8, 1), "filters": [4, 6]}, "kernel_0"),
            ({"input_size": (16, 7, 1), "filters": [4, 7]}, "recurrent_kernel_0"),
            ({"input_size": (16, 7, 1), "filters": [4, 6], "cell_convolution": False}, "recurrent_kernel_1"),
        ],
    )
    def test_an_array_of_another_shape_is_named(self, arrays, options, name):
        with pytest.raises(ValueError, match=f"array '{name}' has .* where the layer has"):
            load_keras_weights(ECLSTM(**options), arrays)

    def test_a_cell_takes_them_too(self, arrays):
        cell = ECLSTMCell((16, 7, 1), [4, 6])
        load_keras_weights(cell, arrays)
        h, _ = cell(torch.from_numpy(arrays["x"][:, 0]))
        np.testing.assert_allclose(h.detach(), arrays["y"][:, 0], rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives():
    torch.manual_seed(0)
    layer, x = ECLSTM((16, 14, 1), [10, 10]), torch.randn(4, 20, 14, 1)
    expected, _ = layer.forward_segment(x)
    expected.square().sum().backward()
    on_gpu = ECLSTM((16, 14, 1), [10, 10]).cuda()
    on_gpu.load_state_dict(layer.state_dict())
    output, _ = on_gpu.forward_segment(x.cuda())
    output.square().sum().backward()
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-5)
    for ours, reference in zip(on_gpu.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), reference.grad, rtol=1e-3, atol=1e-4)
