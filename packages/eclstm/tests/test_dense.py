import torch
from eclstm._dense import ConvolutionMatrix, conv, same_padding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close


@given(
    cycles=st.integers(1, 7),
    sensors=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    gates=st.sampled_from([1, 4]),
    stride=st.integers(1, 3),
    same=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_matrix_does_what_the_convolution_does(cycles, sensors, kernel, channels, gates, stride, same):
    torch.manual_seed(0)
    into, out = channels
    weight = torch.randn(gates * out, into, *kernel)
    if same:
        stride = 1
    else:
        cycles, sensors = cycles + kernel[1], sensors + kernel[0] - 1
    x = torch.randn(2, gates * into, sensors, cycles)
    expected = conv(x, weight, None, stride, gates, same)
    matrix = ConvolutionMatrix(weight.shape, (cycles, sensors), expected.shape[:1:-1], gates, stride, same)
    flat = x.unflatten(1, (gates, into)).permute(1, 0, 4, 3, 2).flatten(2)  # gates, batch, (cycles, sensors, channels)
    result = (flat @ matrix(weight)).unflatten(2, (*expected.shape[:1:-1], out)).permute(1, 0, 4, 3, 2).flatten(1, 2)
    assert_close(result, expected, rtol=0, atol=1e-5)


def test_same_padding_keeps_the_size_and_puts_the_smaller_half_before():
    assert [same_padding(k) for k in (1, 2, 3, 4, 5)] == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]
    for kernel in range(1, 6):
        x = torch.zeros(1, 1, 4, 7)
        assert conv(x, torch.zeros(1, 1, kernel, kernel), None, 1, 1, same=True).shape == x.shape


def test_the_matrix_is_no_part_of_a_checkpoint_but_moves_with_the_module():
    matrix = ConvolutionMatrix(torch.Size([4, 1, 1, 3]), (5, 1), (5, 1), same=True)
    assert not matrix.state_dict()
    assert matrix.double().incidence.dtype == torch.float64
