from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from iqa_distill.involution import Involution, _Aggregate
from torch import nn

GOLDEN = Path(__file__).parent / "golden" / "involution.npz"


def unfolded(x, kernels, stride):
    """Literally: every neighbourhood copied, times its kernel, summed."""
    b, g, places, h, w = kernels.shape
    size = round(places**0.5)
    patches = F.unfold(x, size, padding=size // 2, stride=stride).view(b, g, -1, places, h, w)
    return (kernels[:, :, None] * patches).sum(3).view(b, -1, h, w)


def test_equals_the_published_layer():
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    layer = Involution(32, 3).eval()
    layer.load_state_dict({name[2:]: value for name, value in golden.items() if name.startswith("w.")})
    torch.testing.assert_close(layer(golden["x"]), golden["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"), [(3, 1, 5, 6), (7, 1, 4, 3), (3, 2, 6, 5), (5, 3, 7, 9)]
)
def test_fast_sum_equals_the_unfolded_one(size, stride, height, width):
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    shape = -(-height // stride), -(-width // stride)
    kernels = torch.randn(2, 3, size * size, *shape, dtype=torch.float64, requires_grad=True)
    fast, slow = _Aggregate.apply(x, kernels, stride), unfolded(x, kernels, stride)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weight).sum(), (x, kernels)) for y in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    layer = Involution(4, 3, 2, group_channels=2, reduction_ratio=2).double()
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_kernel_for_every_position_shared_by_a_group():
    layer = Involution(8, 3, group_channels=4).eval()
    x = torch.randn(1, 8, 6, 6)
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    layer.conv1.conv.weight.data[:, 1] = layer.conv1.conv.weight.data[:, 0]  # so that the kernels don't change
    torch.testing.assert_close(layer(swapped), layer(x)[:, [1, 0, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_overflow(dtype):
    """The sum of 49 products of 100 and 20 is above float16's 65,504."""
    layer = Involution(16).eval()
    nn.init.zeros_(layer.conv2.conv.weight)
    nn.init.constant_(layer.conv2.conv.bias, 20.0)
    with torch.autocast("cpu", dtype):
        y = layer(torch.full((1, 16, 9, 9), 100.0, dtype=dtype))
    assert y.dtype == torch.float32
    assert y[0, 0, 4, 4] == 49 * 100 * 20


def test_half_precision_parameters_stay():
    assert Involution(16).bfloat16()(torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel_size": 4}, "kernel_size must be odd"), ({"group_channels": 5}, "multiple of group_channels 5")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Involution(16, **options)
