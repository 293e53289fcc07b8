import pytest
import timm
import torch
from iqa_distill.deit3 import from_deit3, load_deit3, resample_positions, to_deit3
from timm.models.vision_transformer import VisionTransformer


def small(side=64, **options):
    """DeiT III's layout."""
    torch.manual_seed(options.pop("seed", 0))
    vit = VisionTransformer(side, embed_dim=8, depth=2, num_heads=2, no_embed_class=True, init_values=1e-4, **options)
    for block in vit.blocks:
        torch.nn.init.normal_(block.ls1.gamma)
        torch.nn.init.normal_(block.ls2.gamma)
    return vit.eval()


def test_names_of_the_papers_backbone():
    with torch.device("meta"):
        vit = timm.create_model("deit3_small_patch16_224", num_classes=0)
    ours = vit.state_dict()
    theirs = to_deit3(ours)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(21.67, abs=0.01)
    assert ours["pos_embed"].shape == (1, 196, 384)
    assert set(theirs) - set(ours) == {f"blocks.{block}.gamma_{n}" for block in range(12) for n in (1, 2)}
    assert from_deit3(theirs) == ours == from_deit3(ours)


def test_same_features(tmp_path):
    source, vit, images = small(num_classes=5), small(num_classes=0, seed=1), torch.randn(2, 3, 64, 64)
    torch.save({"model": to_deit3(source.state_dict()), "epoch": 3}, tmp_path / "deit3.pth")
    assert not torch.allclose(vit.forward_features(images), source.forward_features(images))
    assert load_deit3(vit, tmp_path / "deit3.pth") == ["head.weight", "head.bias"]
    assert torch.equal(vit.forward_features(images), source.forward_features(images))


def test_another_crop_size(tmp_path):
    source, vit = small(), small(96, num_classes=0, seed=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_deit3(vit, tmp_path / "w.pth")
    torch.testing.assert_close(vit.pos_embed, resample_positions(source.pos_embed, (6, 6)))
    assert torch.equal(vit.blocks[1].ls2.gamma, source.blocks[1].ls2.gamma)


def test_positions_keep_their_places():
    """A ramp over rows and one over columns stay ramps, away from the border."""
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    positions = torch.stack([rows, columns], -1).reshape(1, 196, 2)
    assert torch.equal(resample_positions(positions, (14, 14)), positions)
    grid = resample_positions(positions, (24, 7)).reshape(24, 7, 2)
    at = [(torch.arange(n) + 0.5) * 14 / n - 0.5 for n in (24, 7)]
    torch.testing.assert_close(grid[4:-4, 0, 0], at[0][4:-4])
    torch.testing.assert_close(grid[0, 2:-2, 1], at[1][2:-2])


def test_refuses(tmp_path):
    positions = small().state_dict()
    positions["pos_embed"] = torch.zeros(1, 17, 8)
    torch.save(positions, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="17 position embeddings are no square grid"):
        load_deit3(small(), tmp_path / "w.pth")
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: 14 of the network's 50 weights are missing: blocks\.2\."):
        load_deit3(
            VisionTransformer(64, embed_dim=8, depth=3, num_heads=2, no_embed_class=True, init_values=1),
            tmp_path / "w.pth",
        )
