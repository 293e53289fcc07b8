"""The engine: options, crops, optimiser, arms, and that a stopped training goes on as if nothing had happened."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from papercore.ops import info_nce
from safetensors.torch import load_file
from softclip.checkpoints import load_clip, load_roi, new_clip, tokenizer_of
from softclip.dataset import PairDataset
from softclip.guidance import GuideOptions, collect_guides
from softclip.model import RoiEncoder, SoftClipModel, normalized
from softclip.sample import render_scenes
from softclip.trainer import ARMS, MOST_SCALE, SoftClipConfig, SoftClipTrainer, random_crops, save

PAIRS = 24
MODEL_CFG = new_clip("tiny-vit", seed=0)[1]


@pytest.fixture(scope="module")
def datasets():
    """Without guides, with those to encode, and with frozen ones."""
    pairs, tokenizer = render_scenes(PAIRS), tokenizer_of(MODEL_CFG)
    trained, frozen = (collect_guides(pairs, GuideOptions("thumbnails", guides)) for guides in ("trained", "frozen"))
    return {None: PairDataset(pairs, tokenizer, 32)} | {
        name: PairDataset(pairs, tokenizer, 32, roi=(guides.roi, guides.roi_mask), tags=guides.tags)
        for name, guides in (("trained", trained), ("frozen", frozen))
    }


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        options = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "num_train_epochs": 1, "disable_tqdm": True,
            "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0,
        }  # fmt: skip
        return SoftClipConfig(**{**options, **changes})

    return make


@pytest.fixture
def trainer(config, datasets):
    """For new weights of seed 0."""

    def make(arm="soft_re", guides="trained", clip="tiny-vit", **changes):
        own = config(arm=arm, **changes)
        dataset = datasets[guides if own.needs else None]
        network, model_cfg = new_clip(clip, seed=0)
        torch.manual_seed(0)
        roi = RoiEncoder(network.visual, dataset.roi.shape[2]) if own.needs and guides == "trained" else None
        return SoftClipTrainer(SoftClipModel(network, roi), model_cfg, own, train_dataset=dataset)

    return make


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def losses(one):
    return [row for row in one.state.log_history if "loss" in row]


class TestCrops:
    def test_are_squares_inside_the_image(self):
        """Of ramps from left to right and from top to bottom, crops are ramps; beyond the border they would be flat."""
        ramp = torch.arange(64.0)
        images = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.ones(64, 64)]).expand(50, 3, 64, 64)
        crops = random_crops(images, 0.25, torch.Generator().manual_seed(0))
        across, down = crops[:, 0, 30].diff(dim=1)[:, 1:-1], crops[:, 1, :, 30].diff(dim=1)[:, 1:-1]
        side = across.mean(1)
        torch.testing.assert_close(across, side[:, None].expand_as(across), atol=1e-3, rtol=0)
        torch.testing.assert_close(across, down, atol=1e-3, rtol=0)
        area = side**2
        assert 0.25 <= area.min() < 0.35
        assert 0.9 < area.max() <= 1
        assert crops[:, 0, 0, 0].std() > 1
        assert not torch.allclose(crops[:, 0, 0, 0], crops[:, 1, 0, 0])

    def test_of_the_whole_image_are_the_image(self):
        images = torch.rand(2, 3, 8, 8)
        assert random_crops(images, 1.0, torch.Generator()) is images

    def seen(self, one, step=0, images=None):
        """The pixels that the network is shown at a step."""
        shown = []

        def network(images, texts, size):
            shown.append(images.images)
            return one.model(images, texts, size)

        one.state.global_step = step
        batch, texts = one.train_dataset.__getitems__(list(range(8)))
        one.compute_loss(network, (replace(batch, images=batch.images if images is None else images), texts))
        return shown[0]

    def test_are_decided_by_step_seed_and_process(self, trainer, monkeypatch):
        one = trainer("clip")
        first = self.seen(one, 3)
        torch.manual_seed(7)
        assert torch.equal(self.seen(trainer("clip"), 3), first)
        others = [self.seen(one, 4), self.seen(trainer("clip", seed=1), 3)]
        monkeypatch.setattr(SoftClipConfig, "world_size", property(lambda self: 2))
        for rank in (0, 1):
            monkeypatch.setattr(SoftClipConfig, "process_index", property(lambda self, rank=rank: rank))
            others.append(self.seen(one, 3))
        assert all(not torch.equal(a, b) for i, a in enumerate([first, *others]) for b in others[i:])

    def test_of_bytes_are_normalised_as_the_tower_says_and_what_is_normalised_stays(self, trainer):
        one = trainer("clip")
        white = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
        shown = self.seen(one, images=white)
        config = one.model.visual.preprocess_cfg
        expected = [(1 - mean) / std for mean, std in zip(config["mean"], config["std"], strict=True)]
        torch.testing.assert_close(shown[:, :, 5, 5], torch.tensor(expected).expand(8, 3))
        ready = torch.randn(8, 3, 32, 32)
        assert self.seen(one, images=ready) is ready

    def test_normalised_by_clips_mean_where_the_tower_says_nothing(self):
        image = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
        assert torch.equal(normalized(image, SimpleNamespace()), torch.zeros(1, 3, 1, 1))


class TestOptimiser:
    def test_decays_matrices_alone(self, trainer):
        one = trainer(clip="tiny-resnet")
        groups = {
            group["weight_decay"]: {id(p) for p in group["params"]} for group in one.create_optimizer().param_groups
        }
        assert set(groups) == {0.2, 0.0}
        named = dict(one.model.named_parameters())
        assert groups[0.2] == {id(p) for p in named.values() if p.ndim >= 2}
        assert groups[0.0] == {id(p) for p in named.values() if p.ndim < 2}
        assert id(named["clip.logit_scale"]) in groups[0.0]
        assert id(named["roi_encoder.projection"]) in groups[0.2]

    @pytest.mark.parametrize(("start", "end"), [(6.0, MOST_SCALE), (-1.0, 0.0)])
    def test_keeps_the_scale_from_1_to_100_after_each_step(self, trainer, start, end):
        one = trainer("clip", max_steps=1)
        one.model.logit_scale.data.fill_(start)
        one.train()
        assert one.model.logit_scale.item() == pytest.approx(end)
        assert pytest.approx(math.log(100)) == MOST_SCALE


class TestArms:
    @pytest.mark.parametrize("arm", ARMS)
    def test_train_a_step_and_log_their_terms(self, trainer, arm):
        one = trainer(arm, max_steps=1)
        before = state(one.model)
        one.train()
        (row,) = losses(one)
        options = one.loss.options
        weights = {"soft": 1, "relation": options["lam"], "roi_tag": options["roi_tag_weight"]}
        assert row["loss"] == pytest.approx(
            sum(weight * row.get(term, 0) for term, weight in weights.items()), abs=1e-3
        )
        assert row["scale"] == pytest.approx(1 / 0.07, rel=1e-4)
        logged = {term for term in ("relation", "roi_tag", "target_entropy") if term in row}
        given = {"relation": options["lam"], "roi_tag": one.args.needs, "target_entropy": options["beta"]}
        assert logged == {term for term, weight in given.items() if weight}
        moved = {name for name, tensor in one.model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {"visual.conv1.weight", "token_embedding.weight", "logit_scale"} <= moved
        assert ("roi_encoder.projection" in moved) == one.args.needs

    def test_clip_is_clip(self, trainer):
        one = trainer("clip", crop=1.0)
        batch = one.train_dataset.__getitems__(list(range(8)))
        loss, output = one.compute_loss(one.model, batch, return_outputs=True)
        assert "roi_features" not in output
        v, t, s = (output[name] for name in ("image_features", "text_features", "logit_scale"))
        torch.testing.assert_close(loss, info_nce(v, t, s, symmetric=True))

    def test_frozen_guides_have_no_weights_and_no_loss(self, trainer):
        one = trainer(guides="frozen", max_steps=1)
        one.train()
        (row,) = losses(one)
        assert {"target_entropy", "relation"} < row.keys()
        assert "roi_tag" not in row
        assert not [name for name in one.model.state_dict() if "roi" in name]

    def test_options_reach_the_loss_where_the_arm_does_not_decide(self, config):
        loss = config(beta=0.2, lam=0.5, divergence="kl", target_scale=7.0, clip_weight=2.0, chunk_size=3).build_loss()
        expected = {
            "beta": 0.2,
            "lam": 0.5,
            "divergence": "kl",
            "target_scale": 7.0,
            "clip_weight": 2.0,
            "chunk_size": 3,
        }
        assert {name: loss.options[name] for name in expected} == expected
        assert config(arm="clip", beta=0.2, lam=0.5).build_loss().options["beta"] == 0
        assert config(arm="soft", lam=0.5).build_loss().options["lam"] == 0

    def test_group_ids_make_several_positives(self, trainer):
        one = trainer("clip", crop=1.0)
        images, texts = one.train_dataset.__getitems__(list(range(8)))
        alone = one.compute_loss(one.model, (images, texts))
        together = one.compute_loss(one.model, (images, replace(texts, group_ids=torch.arange(8) // 2)))
        assert not torch.isclose(alone, together)


@pytest.mark.parametrize("clip", ["tiny-resnet", "tiny-vit"])
def test_killed_and_resumed_gives_the_same_bits(clip, trainer):
    """CLIP with its statistics, and the encoder of regions; the kill is in the midst of the second epoch."""

    def make():
        return trainer(clip=clip, num_train_epochs=2, save_strategy="steps", save_steps=4, save_total_limit=None)

    whole = make()
    whole.train()
    torch.manual_seed(99)
    again = make()
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-4")
    assert again.state.global_step == whole.state.global_step == 6
    assert losses(again) == losses(whole)
    ours, theirs = state(again.model), state(whole.model)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_pairs_in_parts_give_the_loss_of_the_whole(trainer):
    whole, parts = trainer(max_steps=2), trainer(max_steps=2, micro_batch_size=3)
    for one in (whole, parts):
        one.train()
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_saved_is_the_clip_and_beside_it_the_encoder_of_regions(trainer, tmp_path):
    model = trainer().model
    save(tmp_path / "both", model, MODEL_CFG)
    loaded = load_clip(str(tmp_path / "both"))
    assert all(torch.equal(a, b) for a, b in zip(model.clip.parameters(), loaded.clip.parameters(), strict=True))
    assert torch.equal(load_roi(tmp_path / "both", loaded.clip.visual).projection, model.roi_encoder.projection)
    assert not [name for name in load_file(tmp_path / "both" / "open_clip_model.safetensors") if "roi" in name]
    save(tmp_path / "alone", trainer("clip").model, MODEL_CFG)
    assert load_roi(tmp_path / "alone", loaded.clip.visual) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arm": "x"}, "arm must be one of soft_re, soft, soft_self, clip_roitag, label_smoothing, clip; got 'x'"),
        ({"divergence": "x"}, "divergence must be one of symmetric_kl, kl, ce; got 'x'"),
        ({"crop": 0.0}, "crop is a share of the area, above 0 and at most 1; got 0.0"),
        ({"crop": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 2}, "give the whole batch and --micro_batch_size"),
        ({"beta": 1.5}, "beta"),
        ({"lam": -1.0}, "lam"),
    ],
)
def test_wrong_options(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**options)


class TestRefused:
    def test_fewer_pairs_than_a_step(self, trainer):
        with pytest.raises(ValueError, match=r"^24 pairs are fewer than the 25 of a step: give a smaller --per_device"):
            trainer("clip", per_device_train_batch_size=25)
        one = trainer("clip", per_device_train_batch_size=25, dataloader_drop_last=False)
        one.train()
        assert one.state.global_step == 1

    def test_an_encoder_of_regions_that_nothing_trains(self, trainer):
        with pytest.raises(ValueError, match="roi_tag_weight 0 leaves the encoder of regions as random as it starts"):
            trainer(roi_tag_weight=0.0)
        trainer(roi_tag_weight=0.0, guides="frozen")
        trainer(roi_tag_weight=0.0, allow_untrained_teacher=True)

    def test_parts_of_a_batch_for_batch_norm(self, trainer):
        with pytest.raises(ValueError, match="batch norm would see one micro-batch at a time; take a ViT"):
            trainer("clip", clip="tiny-resnet", micro_batch_size=4).train()


def test_the_default_folder_is_left_to_the_verb():
    assert SoftClipConfig().output_dir == ""
