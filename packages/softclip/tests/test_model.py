"""Regions through the towers against a literal computation; the model's outputs, state, and accumulation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from softclip import SoftClipLoss, SoftClipModel
from softclip.batch import ImageRoiBatch, TextTagBatch
from softclip.checkpoints import new_clip
from softclip.model import RoiEncoder
from torch import nn
from torch.testing import assert_close


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        yield


def tower(kind):
    if kind == "resnet":
        visual = ModifiedResNet([1, 1, 1, 1], output_dim=6, heads=4, image_size=32, width=4)
    else:
        visual = VisionTransformer(8, 4, width=16, layers=5, heads=2, mlp_ratio=2.0, output_dim=6)
    for parameter in visual.parameters():  # norms and biases, too, must matter
        nn.init.normal_(parameter, std=0.3)
    return visual.double().eval()


def regions(width=7):
    """Of three images with 4, 2 and no regions."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    return torch.randn(3, 4, width, dtype=torch.float64), mask


def attend(x, q, k, v, out, heads):
    """Multi-head attention over tokens (length, width), each argument but x a linear map."""
    queries, keys, values = (f(x).unflatten(1, (heads, -1)).transpose(0, 1) for f in (q, k, v))
    weights = torch.softmax(queries @ keys.transpose(1, 2) / queries.shape[2] ** 0.5, 2)
    return out((weights @ values).transpose(0, 1).flatten(1))


def literal_resnet(encoder, visual, roi):
    """Projection, mean in front, norm, attention pooling of one image's regions; no position embedding."""
    x = roi @ encoder.projection
    x = encoder.norm(torch.cat([x.sum(0, keepdim=True) / max(len(x), 1), x]))
    pool = visual.attnpool
    return attend(x, pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj, pool.num_heads)[0]


def literal_vit(encoder, visual, roi):
    """Projection, class token in front, the third, fourth and fifth of five blocks; no position embedding."""
    x = visual.ln_pre(torch.cat([visual.class_embedding[None], roi @ encoder.projection]))
    for block in list(visual.transformer.resblocks)[2:]:
        attention = block.attn
        maps = [
            lambda y, w=w, b=b: y @ w.T + b
            for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        ]
        x = x + attend(block.ln_1(x), *maps, attention.out_proj, attention.num_heads)
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[0]) @ visual.proj


@pytest.mark.parametrize(("kind", "literal"), [("resnet", literal_resnet), ("vit", literal_vit)])
class TestRoiEncoder:
    def make(self, kind):
        visual = tower(kind)
        encoder = RoiEncoder(visual, 7).double().eval()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter)
        return visual, encoder

    def test_it_is_the_literal_computation_of_each_images_own_regions(self, kind, literal):
        visual, encoder = self.make(kind)
        roi, mask = regions()
        found = encoder(visual, roi, mask)
        assert found.shape == (3, 6)
        expected = torch.stack([literal(encoder, visual, r[m]) for r, m in zip(roi, mask, strict=True)])
        assert_close(found, expected)
        leaves = [*encoder.parameters(), *(visual.attnpool if kind == "resnet" else visual.transformer).parameters()]
        weights = torch.randn(3, 6, dtype=torch.float64)
        ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True) for x in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one, other)

    def test_neither_padding_nor_order_matters(self, kind, literal):
        visual, encoder = self.make(kind)
        roi, mask = regions()
        found = encoder(visual, roi, mask)
        assert_close(encoder(visual, torch.where(mask[..., None], roi, 1e3), mask), found)
        more = torch.cat([roi, torch.ones(3, 3, 7)], 1), F.pad(mask, (0, 3))
        assert_close(encoder(visual, *more), found)
        order = torch.tensor([2, 0, 3, 1])
        assert_close(encoder(visual, roi[:, order], mask[:, order]), found)
        assert_close(encoder(visual, roi[:1]), found[:1])  # no mask: no padding

    def test_only_projection_and_norm_are_its_own(self, kind, literal):
        _, encoder = self.make(kind)
        names = {"projection"} | ({"norm.weight", "norm.bias"} if kind == "resnet" else set())
        assert set(encoder.state_dict()) == names

    def test_width(self, kind, literal):
        visual, encoder = self.make(kind)
        with pytest.raises(ValueError, match="regions are 8 wide, and this encoder is for 7"):
            encoder(visual, torch.zeros(2, 3, 8))

    def test_new_projections_keep_the_scale_of_their_inputs_width(self, kind, literal):
        encoder = RoiEncoder(tower(kind), 500)
        width = encoder.projection.shape[1]
        assert encoder.projection.std().item() == pytest.approx(width**-0.5, rel=0.05)


def test_towers_without_a_known_rear_are_refused():
    pooled = VisionTransformer(
        8, 4, width=16, layers=1, heads=2, mlp_ratio=2.0, attentional_pool=True, attn_pooler_heads=2
    )
    for visual in (nn.Linear(3, 3), pooled):
        with pytest.raises(ValueError, match=f"no way is known to encode regions by a {type(visual).__name__}"):
            RoiEncoder(visual, 7)


def model_of(name="tiny-vit", roi=True):
    clip, _ = new_clip(name, seed=0)
    return SoftClipModel(clip, RoiEncoder(clip.visual, 7) if roi else None).double().eval()


def batch(n=6):
    roi, mask = torch.randn(n, 4, 7, dtype=torch.float64), torch.rand(n, 4) > 0.3
    mask[1] = False
    images = ImageRoiBatch(torch.randn(n, 3, 32, 32, dtype=torch.float64), roi, mask)
    words = torch.randint(1, 40000, (2, n, 16))
    words[..., -1] = 49407  # end of text, the largest token
    tagged = torch.ones(n).bool()
    tagged[2] = False
    return images, TextTagBatch(words[0], words[1], tagged, torch.arange(n) // 2)


class TestOutput:
    @pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
    def test_everything(self, name):
        model, (images, texts) = model_of(name), batch()
        output = model(images, texts)
        assert set(output) == {
            "image_features", "text_features", "roi_features", "tag_features", "roi_valid", "tag_valid", "group_ids",
            "logit_scale",
        }  # fmt: skip
        assert output["roi_valid"].tolist() == [True, False, True, True, True, True]
        assert torch.equal(output["tag_valid"], texts.tag_mask)
        assert torch.equal(output["group_ids"], texts.group_ids)
        expected = {
            "image_features": model.clip.encode_image(images.images),
            "text_features": model.clip.encode_text(texts.texts),
            "tag_features": model.clip.encode_text(texts.tags),
            "roi_features": model.roi_encoder(model.clip.visual, images.roi, images.roi_mask),
        }
        for key, rows in expected.items():
            assert_close(output[key], F.normalize(rows, dim=1))
        assert output["logit_scale"].item() == pytest.approx(1 / 0.07)
        SoftClipLoss(roi_tag_weight=0.5)(**output).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert model.roi_encoder.projection.grad.any()

    def test_plain_tensors_are_clips_own(self):
        model, (images, texts) = model_of(), batch()
        output = model(images.images, texts.texts)
        theirs = model.clip(images.images, texts.texts)
        assert_close(output["image_features"], theirs[0])
        assert_close(output["text_features"], theirs[1])
        assert_close(output["logit_scale"], theirs[2])
        assert set(output) == {"image_features", "text_features", "logit_scale"}
        assert set(model(image=images.images)) == {"image_features", "logit_scale"}  # as open_clip calls it
        assert set(model(text=texts.texts)) == {"text_features", "logit_scale"}

    def test_frozen_guides_pass_as_they_are(self):
        model, (images, texts) = model_of(roi=False), batch()
        texts.tags = torch.rand(6, 11, dtype=torch.float64)
        output = model(images, texts)
        assert_close(output["tag_features"], F.normalize(texts.tags, dim=1))
        mean = torch.stack([r[m].sum(0) for r, m in zip(images.roi, images.roi_mask, strict=True)])
        assert_close(output["roi_features"], F.normalize(mean, dim=1))
        assert not output["roi_features"].requires_grad
        assert not output["roi_features"][1].any()  # an image without regions

    def test_a_bias_is_handed_on(self):
        model, (images, texts) = model_of(), batch()
        model.clip.logit_bias = nn.Parameter(torch.tensor(-10.0))
        output = model(images, texts)
        assert output["logit_bias"] == -10
        SoftClipLoss()(**output)

    def test_half_precision_is_normalised_in_float32(self):
        model, (images, texts) = model_of().float(), batch()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images.to(dtype=torch.float32), texts)
        for key in ("image_features", "text_features", "roi_features", "tag_features"):
            assert output[key].dtype == torch.float32
            assert_close(output[key].norm(dim=1), torch.ones(6), rtol=1e-5, atol=0)


class TestState:
    def test_keys_are_the_clips(self):
        model = model_of(roi=False)
        assert list(model.state_dict()) == list(model.clip.state_dict())
        whole = model_of()
        own = {name for name in whole.state_dict() if name not in whole.clip.state_dict()}
        assert own == {"roi_encoder.projection"}

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_it_comes_back(self, prefix):
        model, other = model_of(), model_of()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        outer = nn.Module()  # as DistributedDataParallel has it
        outer.module = other
        (outer if prefix else other).load_state_dict({prefix + k: v for k, v in model.state_dict().items()})
        for one, another in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, another)
        model.clip.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("roi_encoder.")})
        with pytest.raises(RuntimeError, match=r"roi_encoder\.projection"):
            model.load_state_dict(model.clip.state_dict())

    def test_the_clip_answers_for_what_the_model_lacks(self):
        model = model_of()
        assert model.visual is model.clip.visual
        assert model.encode_text == model.clip.encode_text
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = model.no_such_thing
        assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())


class TestMicroBatches:
    @pytest.mark.parametrize("size", [1, 4, 6, 100])
    def test_they_are_the_whole_batch(self, size):
        model, given = model_of(), batch()
        loss, found = SoftClipLoss(roi_tag_weight=0.5), []
        for micro in (None, size):
            model.zero_grad()
            output = model(*given, micro_batch_size=micro)
            value = loss(**output)
            features = {k: v for k, v in output.items() if v.requires_grad and k != "logit_scale"}
            for tensor in features.values():
                tensor.retain_grad()
            value.backward()
            grads = {k: v.grad for k, v in (features | dict(model.named_parameters())).items() if v.grad is not None}
            found.append((value.detach(), {k: v.detach() for k, v in output.items()}, grads))
        for whole, parts in zip(*found, strict=True):
            assert_close(parts, whole, rtol=1e-9, atol=1e-12)
        assert len(found[0][2]) > 20

    def test_fewer_activations_are_held(self):
        model, given = model_of(), batch()

        def held(micro):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                model(*given, micro_batch_size=micro)
            return sum(kept)

        assert held(2) < 0.2 * held(None)

    def test_batch_norm_is_refused(self):
        with pytest.raises(ValueError, match="micro_batch_size: batch norm would see one micro-batch at a time"):
            model_of("tiny-resnet")(*batch(), micro_batch_size=2)
