import pytest
import torch
from dsan import TextAttention
from torch import nn


def moved(attention):
    """With a mask that is not flat."""
    nn.init.normal_(attention.mask.weight)
    return attention.eval()


def test_equals_its_equations():
    attention = moved(TextAttention(6, 4))
    x = torch.randn(2, 6, 8, 25)
    conv = lambda layers, y: layers[2](layers[1](layers[0](y)))  # noqa: E731
    pool = lambda y: nn.functional.max_pool2d(y, 2, ceil_mode=True)  # noqa: E731
    up = lambda y, like: nn.functional.interpolate(y, like.shape[2:], mode="bilinear", align_corners=False)  # noqa: E731
    a0 = conv(attention.enter, x)
    a1 = conv(attention.down[0][1:], pool(a0))
    a2 = conv(attention.down[1][1:], pool(a1))
    u0 = a0 + up(conv(attention.up, a1 + up(a2, a1)), a0)
    mask = torch.sigmoid(attention.mask(u0))
    weighed, found = attention(x)
    torch.testing.assert_close(found, mask)
    torch.testing.assert_close(weighed, (1 + mask) * x)


def test_starts_neutral_and_never_erases():
    x = torch.randn(2, 6, 8, 25)
    weighed, mask = TextAttention(6, 4)(x)
    assert (mask == 0.5).all()
    torch.testing.assert_close(weighed, 1.5 * x)
    weighed, mask = moved(TextAttention(6, 4))(x)
    assert ((mask > 0) & (mask < 1)).all()
    assert (weighed.abs() >= x.abs()).all()


def test_gate_and_channel_maps():
    attention = moved(TextAttention(6, 4, mode="gate", maps="channel"))
    x = torch.randn(2, 6, 8, 24)
    weighed, mask = attention(x)
    assert mask.shape == x.shape
    torch.testing.assert_close(weighed, mask * x)


@pytest.mark.parametrize("width", [1, 2, 5, 12, 25])
def test_padding_changes_nothing(width):
    attention = moved(TextAttention(3, 4))
    x = torch.randn(1, 3, 8, width)
    alone, alone_mask = attention(x)
    padded = torch.nn.functional.pad(x, (0, 30 - width), value=9.0)
    both, mask = attention(torch.cat([padded, torch.randn(1, 3, 8, 30)]), torch.tensor([width, 30]))
    torch.testing.assert_close(both[:1, ..., :width], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mask[:1, ..., :width], alone_mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("option", "message"), [({"mode": "x"}, "mode must be"), ({"maps": "x"}, "maps must be")])
def test_unknown_options(option, message):
    with pytest.raises(ValueError, match=message):
        TextAttention(3, **option)
