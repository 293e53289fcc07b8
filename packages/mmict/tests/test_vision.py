import numpy as np
import pytest
import timm
import torch
from mmict.lm import add_lora
from mmict.vision import MEAN, STD, VisionEncoder, fingerprint, load_vision
from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 24}
VIT = {**SIZES, "patch_size": 8}


def noise(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


@pytest.fixture
def patches():
    torch.manual_seed(0)
    return VisionEncoder(nn.Conv2d(3, 8, 4, 4), source="patches", image_size=16)


class TestEncoder:
    def test_tokens_are_the_networks_last_hidden_state_with_the_class_token(self):
        torch.manual_seed(0)
        clip = CLIPVisionModel(CLIPVisionConfig(**VIT)).eval()
        encoder = VisionEncoder(clip, source="clip", image_size=24)
        pixels = torch.randn(2, 3, 24, 24)
        torch.testing.assert_close(encoder(pixels), clip(pixels).last_hidden_state)
        assert (encoder.tokens, encoder.width) == (10, 16)

    def test_a_map_becomes_tokens_row_by_row(self, patches):
        pixels = torch.randn(2, 3, 16, 16)
        found = patches.network(pixels)
        torch.testing.assert_close(patches(pixels)[:, 4 * 1 + 2], found[:, :, 1, 2])

    def test_a_map_of_timm_with_channels_last_too(self):
        swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=0,
                                 img_size=56).eval()  # fmt: skip
        encoder = VisionEncoder(swin, source="swin", image_size=56)
        pixels = torch.randn(1, 3, 56, 56)
        torch.testing.assert_close(encoder(pixels)[0, 7 + 3], swin.forward_features(pixels)[0, 1, 3])
        assert (encoder.tokens, encoder.width) == (49, 16)

    def test_stays_frozen_in_eval_mode_and_statistics_of_batches_do_not_move(self):
        network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5))
        holder = nn.ModuleList([VisionEncoder(network, source="cnn", image_size=16)]).train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        pixels = torch.randn(4, 3, 16, 16, requires_grad=True)
        assert torch.equal(holder[0](pixels), holder[0](pixels))
        assert not holder[0](pixels).requires_grad
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert not any(parameter.requires_grad for parameter in holder.parameters())

    def test_takes_pixels_in_the_precision_of_its_weights(self, patches):
        assert patches.bfloat16()(torch.randn(1, 3, 16, 16)).dtype == torch.bfloat16

    @pytest.mark.parametrize("truncate", [1, 2])
    def test_truncate_drops_the_last_blocks(self, truncate):
        torch.manual_seed(0)
        vit = ViTModel(ViTConfig(**VIT), add_pooling_layer=False).eval()
        pixels = torch.randn(1, 3, 24, 24)
        wanted = vit.layernorm(vit(pixels, output_hidden_states=True).hidden_states[3 - truncate])
        torch.testing.assert_close(VisionEncoder(vit, source="vit", image_size=24, truncate=truncate)(pixels), wanted)

    @pytest.mark.parametrize("truncate", [-1, 3, 4])
    def test_truncate_leaves_at_least_a_block(self, truncate):
        with pytest.raises(ValueError, match="has 3 blocks, of which 1 must stay"):
            VisionEncoder(CLIPVisionModel(CLIPVisionConfig(**VIT)), source="", image_size=24, truncate=truncate)

    def test_refuses_pictures_of_another_size(self):
        with pytest.raises(ValueError, match="clip: cannot encode pictures of 16 x 16: Input image size"):
            VisionEncoder(CLIPVisionModel(CLIPVisionConfig(**VIT)), source="clip", image_size=16)

    def test_refuses_pooled_features(self):
        with pytest.raises(ValueError, match=r"expected tokens \(b, P, width\) or a map"):
            VisionEncoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), source="pooled", image_size=4)


class TestPixels:
    def test_are_bicubic_and_normalised(self, patches):
        (image,) = noise((30, 40))
        wanted = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) / 255
        wanted = (wanted - np.array(MEAN)) / np.array(STD)
        found = patches.pixels([image])[0].permute(1, 2, 0)
        torch.testing.assert_close(found, torch.from_numpy(wanted).float())

    def test_augmented_come_from_the_generator_alone(self, patches):
        images = noise((30, 40), (20, 20))
        torch.manual_seed(1)
        first = patches.augmented(images, torch.Generator().manual_seed(0))
        torch.manual_seed(2)
        assert torch.equal(patches.augmented(images, torch.Generator().manual_seed(0)), first)
        assert not torch.equal(patches.augmented(images, torch.Generator().manual_seed(1)), first)

    def test_augmented_are_half_to_all_of_the_picture_some_flipped(self):
        encoder = VisionEncoder(nn.Conv2d(3, 8, 4, 4), source="", image_size=64, mean=(0, 0, 0), std=(1, 1, 1))
        # Red grows to the right, green to the bottom: their ranges say which part was taken.
        down, right = np.mgrid[:128, :128]
        picture = np.stack([right, down, 0 * down], 2).astype(np.uint8)
        views = encoder.augmented([picture] * 200, torch.Generator().manual_seed(0)) * 255 / 128
        width, height = views[:, 0, 32, -1] - views[:, 0, 32, 0], views[:, 1, -1, 32] - views[:, 1, 0, 32]
        area, ratio = (width * height).abs(), (width / height).abs()
        assert 0.44 < area.min() < 0.55
        assert 0.9 < area.max() <= 1
        assert 0.7 < ratio.min() < 0.85
        assert 1.18 < ratio.max() < 1.42
        assert 70 < (width < 0).sum() < 130
        assert (height > 0).all()

    def test_a_long_picture_that_no_crop_fits_is_taken_whole(self, patches):
        image = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 3, 2)
        found = patches.augmented([image], torch.Generator().manual_seed(0))
        both = patches.pixels([image, np.ascontiguousarray(image[:, ::-1])])
        assert any(torch.equal(found[0], whole) for whole in both)


class TestLoad:
    @pytest.mark.parametrize(
        "model",
        [
            lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
            lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
            lambda: ViTModel(ViTConfig(**VIT)),
            lambda: Blip2VisionModel(Blip2VisionConfig(**VIT, initializer_range=0.02)),
            lambda: ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])),
        ],
        ids=["clip", "siglip", "vit", "blip2", "resnet"],
    )
    def test_a_folder_of_transformers(self, model, tmp_path):
        torch.manual_seed(0)
        saved = model().eval()
        saved.save_pretrained(tmp_path)
        encoder = load_vision(str(tmp_path))
        pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size)
        wanted = saved(pixels).last_hidden_state.detach()
        torch.testing.assert_close(
            encoder(pixels).flatten(), (wanted.mT if wanted.dim() == 3 else wanted).flatten(2).mT.flatten()
        )
        assert encoder.image_size == (24 if hasattr(saved.config, "image_size") else 224)
        assert (encoder.mean, encoder.record()) == (MEAN, {"name": str(tmp_path), "truncate": 0})
        assert fingerprint(load_vision(**encoder.record()).network) == fingerprint(encoder.network)

    def test_of_a_pair_the_vision_part_with_its_preprocessor(self, tmp_path):
        torch.manual_seed(0)
        text = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
        }
        pair = CLIPModel(
            CLIPConfig(vision_config=VIT, text_config={**text, "eos_token_id": 2, "bos_token_id": 1})
        ).eval()
        pair.save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(
            '{"image_mean": [0, 0.5, 1], "image_std": [1, 2, 3], "size": 99}'
        )
        encoder = load_vision(str(tmp_path), truncate=1)
        pixels = torch.randn(1, 3, 24, 24)
        wanted = pair.vision_model(pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(encoder(pixels), wanted)
        assert (encoder.mean, encoder.std, encoder.image_size) == ((0, 0.5, 1), (1, 2, 3), 24)
        assert "text" not in " ".join(encoder.state_dict())

    def test_a_classifier_without_its_head(self, tmp_path):
        torch.manual_seed(0)
        saved = ViTForImageClassification(ViTConfig(**VIT)).eval()
        saved.save_pretrained(tmp_path)
        pixels = torch.randn(1, 3, 24, 24)
        torch.testing.assert_close(load_vision(str(tmp_path))(pixels), saved.vit(pixels).last_hidden_state)

    def test_a_network_of_timm(self, monkeypatch):
        made = timm.create_model("resnet10t", pretrained=False, num_classes=0)
        asked = []
        monkeypatch.setattr(timm, "create_model", lambda *args, **options: asked.append((*args, options)) or made)
        encoder = load_vision("timm/resnet10t")
        assert asked == [("resnet10t", {"pretrained": True, "num_classes": 0})]
        assert (encoder.image_size, encoder.tokens, encoder.width) == (176, 36, 512)
        assert encoder.mean == pytest.approx((0.485, 0.456, 0.406))

    def test_refuses_what_is_no_vision_model(self, tmp_path):
        sizes = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
        }
        BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="BertModel is no vision model"):
            load_vision(str(tmp_path))

    def test_refuses_a_checkpoint_without_all_weights(self, tmp_path):
        ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
        with pytest.raises(ValueError, match=r"lacks weights of its encoder, such as .*layers?\.3"):
            load_vision(str(tmp_path))

    def test_refuses_an_unknown_name_of_timm(self):
        with pytest.raises(ValueError, match="timm/nonesuch: Unknown model"):
            load_vision("timm/nonesuch")


class TestFingerprint:
    def test_sees_weights_buffers_and_names(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        found = {fingerprint(network)}
        with torch.no_grad():
            network[0].weight.mul_(1.05)
        found.add(fingerprint(network))
        network[1].running_mean.add_(1)
        found |= {fingerprint(network), fingerprint(nn.ModuleDict({"a": network}))}
        assert len(found) == 4
        assert all(len(digits) == 16 for digits in found)

    def test_is_blind_to_bfloat16_and_to_lora(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
        lm = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16))
        before = fingerprint(lm)
        assert fingerprint(add_lora(lm, 2, 4).get_base_model()) == before
        assert fingerprint(lm.bfloat16()) == before
