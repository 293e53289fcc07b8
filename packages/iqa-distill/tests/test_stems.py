import pytest
import torch
from iqa_distill.involution import Involution
from iqa_distill.stems import ConvStem, TokenStem


@pytest.mark.parametrize(("side", "patch", "dim"), [(96, 16, 64), (32, 8, 48)])
def test_conv_stem_makes_one_token_of_each_patch(side, patch, dim):
    stem = ConvStem(side, patch, embed_dim=dim).eval()
    images = torch.rand(2, 3, side, side)
    tokens = stem(images)
    grid = side // patch
    assert tokens.shape == (2, grid**2, dim) == (2, stem.num_patches, dim)
    assert stem.grid_size == (grid, grid)
    images[:, :, -patch // 2 :, : patch // 2] += 1  # within the patch at the lower left
    moved = (stem(images) - tokens).abs().sum((0, 2)).view(grid, grid)
    assert moved.argmax() == grid * (grid - 1)
    assert not moved[0].any()


@pytest.mark.parametrize(("side", "patch"), [(96, 12), (40, 16)])
def test_conv_stem_needs_a_power_of_two_and_a_multiple_of_it(side, patch):
    with pytest.raises(ValueError, match="must be a multiple of the patch"):
        ConvStem(side, patch)


@pytest.mark.parametrize("kind", ["conv", "inv"])
def test_token_stem_is_zero_at_first_and_learns(kind):
    stem = TokenStem(kind, 24)
    token = stem(torch.randn(2, 3, 32, 32))
    assert token.shape == (2, 24)
    assert not token.any()
    assert any(isinstance(m, Involution) for m in stem.modules()) == (kind == "inv")
    token.sum().backward()
    assert stem.project.weight.grad.any()
    torch.nn.init.normal_(stem.project.weight)
    first, second = stem(torch.randn(2, 3, 32, 32))
    assert not torch.allclose(first, second)
