import json

import pytest
import torch
from iqa_distill.images import Preprocessing, ScoreScale
from iqa_distill.model import RKIQT
from tiny_rkiqt import tiny_rkiqt


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_papers_student_has_its_size():
    """DEIQT with DeiT III's ViT-S: measured 21.67 million parameters, and 2.37 million of the panel."""
    with torch.device("meta"):
        model = RKIQT("deit3_small_patch16_224", token_init="learned")
        output = model(torch.zeros(1, 3, 224, 224))
    millions = [round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for part in (model.vit, model.panel)]
    assert millions == [21.67, 2.37]
    assert model.vit.pos_embed.shape == (1, 196, 384)
    assert (output.patches.shape, output.cls.shape) == ((1, 196, 384), (1, 384))
    assert model.panel.queries.shape == (1, 6, 384)
    assert model.panel.layer.self_attn.num_heads == 6


def test_the_panel_reads_class_token_and_patches_not_the_special_tokens(images):
    model = tiny_rkiqt()
    last, seen = [], []
    model.vit.norm.register_forward_hook(lambda m, given, x: last.append(x))
    model.panel.register_forward_pre_hook(lambda m, given: seen.extend(given))
    output = model(images)
    (x,) = last
    assert x.shape == (2, 3 + 4, 16)
    assert torch.equal(seen[0], x[:, 0])
    assert torch.equal(seen[1], x[:, 3:])
    assert torch.equal(output.patches, x[:, 3:])
    torch.testing.assert_close(output.score, model.panel(x[:, 0], x[:, 3:]))
    torch.testing.assert_close(output.conv, model.conv_head(x[:, 1])[:, 0])
    torch.testing.assert_close(output.inv, model.inv_head(x[:, 2])[:, 0])


def test_positions_are_added_to_patches_alone(images):
    model = tiny_rkiqt()
    first = []
    model.vit.blocks[0].register_forward_pre_hook(lambda m, given: first.append(given[0]))
    model(images)
    with torch.no_grad():
        model.vit.pos_embed += 1
    model(images)
    moved = first[1] - first[0]
    assert not moved[:, :3].any()
    torch.testing.assert_close(moved[:, 3:], torch.ones_like(moved[:, 3:]))


def test_aligned_tokens_leave_the_first_output_as_learned_ones(images):
    aligned, learned = RKIQT("tiny", crop_size=32).eval(), RKIQT("tiny", crop_size=32, token_init="learned").eval()
    missing = learned.load_state_dict(aligned.state_dict(), strict=False)
    assert all(name.startswith("stems.") for name in missing.unexpected_keys)
    assert not missing.missing_keys
    assert all(torch.equal(one, other) for one, other in zip(aligned(images)[:5], learned(images)[:5], strict=True))
    torch.nn.init.normal_(aligned.stems[0].project.weight)
    assert not torch.equal(aligned(images).conv, learned(images).conv)


def test_blocks_are_given_in_the_order_asked_for(images):
    model = tiny_rkiqt(options={"depth": 3, "embed_dim": 16, "num_heads": 2})
    blocks = model(images, blocks=(2, 0)).blocks
    assert [block.shape for block in blocks] == [(2, 4, 16)] * 2
    output = model(images)
    assert output.blocks == []
    torch.testing.assert_close(model.vit.norm(blocks[0]), output.patches)
    assert not torch.equal(blocks[0], blocks[1])
    with pytest.raises(ValueError, match=r"no blocks \[3\]: they are numbered 0 to 2"):
        model(images, blocks=[3])


def test_the_mean_of_the_heads_can_be_the_score(images):
    model = tiny_rkiqt()
    output = model(images)
    assert torch.equal(model.predict(images), output.score)
    model.infer = "mean"
    torch.testing.assert_close(model.predict(images), (output.score + output.conv + output.inv) / 3)


def test_all_that_a_score_depends_on_is_saved(images, tmp_path):
    how = {
        "crops": 3, "resize": [48, 40], "crop_seed": 5, "mean": [0.5] * 3, "std": [0.25] * 3, "scale": [5.0, 2.0, 0.0, 9.0],
        "infer": "mean", "queries": 4, "token_init": "learned",
    }  # fmt: skip
    model = tiny_rkiqt(**how)
    model.save_pretrained(tmp_path)
    loaded = RKIQT.from_pretrained(tmp_path).eval()
    assert loaded.preprocessing == model.preprocessing == Preprocessing(32, 3, (48, 40), 5, (0.5,) * 3, (0.25,) * 3)
    assert loaded.scale == ScoreScale(5.0, 2.0, 0.0, 9.0)
    assert torch.equal(loaded.predict(images), model.predict(images))
    assert json.loads((tmp_path / "config.json").read_text())["options"] == {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
    }


def test_other_crops_have_positions_of_their_own():
    with torch.device("meta"):
        assert RKIQT("deit3_small_patch16_224", crop_size=96, options={"depth": 1}).vit.pos_embed.shape == (1, 36, 384)
        assert RKIQT("tiny").preprocessing.crop_size == 96


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_other_vits_with_positions_or_registers(backbone):
    side = 56 if "14" in backbone else 64
    with torch.device("meta"):
        model = RKIQT(backbone, crop_size=side, token_init="learned", options={"depth": 1})
        assert model(torch.zeros(1, 3, side, side), blocks=[0]).patches.shape[1] == 16


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"token_init": "zero"}, "token_init is one of aligned, learned"),
        ({"infer": "conv"}, "infer one of cls, mean"),
        ({"backbone": "rkiqt"}, "neither tiny nor a name that timm knows"),
        ({"backbone": "resnet18"}, "'resnet18'"),
        ({"backbone": "vit_small_patch16_18x2_224", "crop_size": 100}, "100"),
        ({"crop_size": 100}, "must be a multiple of the patch, 16"),
        ({"scale": (0.0, 0.0, 0.0, 1.0)}, "positive deviation"),
    ],
)
def test_errors(how, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        RKIQT(**{"backbone": "tiny", **how})


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 32, 32\)"):
        tiny_rkiqt()(torch.zeros(1, 3, 48, 48))
