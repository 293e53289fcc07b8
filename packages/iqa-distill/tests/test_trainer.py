"""The engine: crops, draws of pristine images, schedule, and that a stopped training goes on as if nothing had happened."""

import json

import numpy as np
import pytest
import torch
from iqa_distill.bias import BiasTeacher
from iqa_distill.fit import fit, judge
from iqa_distill.metrics import srcc
from iqa_distill.scoring import score_images
from iqa_distill.teacher import NARTeacher
from iqa_distill.trainer import CropDraws, IQAConfig, IQATrainer, predict, score_of
from iqa_distill.training import BiasTraining, Distillation, TeacherTraining
from safetensors.torch import load_file
from tiny_rkiqt import tiny_rkiqt
from tiny_sample import CROPS, SCALE, pool, rated


def teacher():
    torch.manual_seed(1)
    return NARTeacher("tiny", crop_size=32, dim=8, depth=1, crops=2).eval()


def distillation(nar=True, **how):
    torch.manual_seed(2)
    return Distillation(tiny_rkiqt(crops=2), teacher() if nar else None, **how)


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        how = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 6, "max_steps": 4, "learning_rate": 1e-3,
            "disable_tqdm": True, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no",
        }  # fmt: skip
        return IQAConfig(**{**how, **changes})

    return make


@pytest.fixture
def trainer(config):
    def make(model=None, validation=None, **changes):
        model = model or distillation()
        return IQATrainer(
            model,
            config(**changes),
            rated=rated(slice(18)),
            preprocessing=CROPS,
            scale=SCALE,
            pool=pool(),
            validation=validation,
        )

    return make


def seen_by(trainer, step=0):
    """What the model is given at a step."""
    given = {}

    class Spy(torch.nn.Module):
        def forward(self, images, targets, **rest):
            given.update(rest, images=images, targets=targets)
            return images.sum(), {}

    trainer.state.global_step, trainer.at = step, (-1, 0)
    trainer.compute_loss(Spy(), CropDraws(18, 2).__getitems__([0, 4, 20, 35]))
    return given


class TestBatches:
    def test_an_epoch_shows_each_image_so_many_times(self):
        draws = CropDraws(3, 2)
        assert len(draws) == 6
        assert sorted(draws.__getitems__(list(range(6)))["index"].tolist()) == [0, 0, 1, 1, 2, 2]

    def test_targets_are_normalised_scores_of_the_images(self, trainer):
        one = trainer()
        expected = SCALE.normalize(one.rated.scores[[0, 4, 2, 17]])
        np.testing.assert_allclose(seen_by(one)["targets"], expected, rtol=1e-6)

    def test_crops_depend_on_step_and_seed_alone_so_that_arms_share_them(self, trainer):
        first = seen_by(trainer(), 3)["images"]
        assert first.shape == (4, 3, 32, 32)
        for model in (distillation(nar=False), TeacherTraining(teacher())):
            assert torch.equal(seen_by(trainer(model), 3)["images"], first)
        assert not torch.equal(seen_by(trainer(), 4)["images"], first)
        assert not torch.equal(seen_by(trainer(seed=1), 3)["images"], first)

    def test_crops_are_pieces_of_their_images(self, trainer):
        one = trainer()
        crop = (
            seen_by(one)["images"][1] * torch.tensor(CROPS.std).view(3, 1, 1) + torch.tensor(CROPS.mean).view(3, 1, 1)
        ) * 255
        image = one.rated.pixels[4].float()
        pieces = image.unfold(1, 32, 1).unfold(2, 32, 1)
        distances = [(pieces.movedim(0, 2) - c).abs().amax((2, 3, 4)).min() for c in (crop, crop.flip(2))]
        assert min(distances) < 0.01

    def test_kinds_are_numbered(self, trainer):
        assert seen_by(trainer())["kinds"].tolist() == [1, 0, 1, 0]  # of dark and noise


class TestPristine:
    @pytest.mark.parametrize("hq_crops", [0, 3])
    def test_is_never_an_images_own(self, trainer, monkeypatch, hq_crops):
        one = trainer(hq_crops=hq_crops)
        rows = []
        draw = one.pool.draw
        monkeypatch.setattr(one.pool, "draw", lambda *given: rows.append(draw(*given)) or rows[-1])
        for step in range(20):
            features = seen_by(one, step)["hq_features"]
        assert features.shape == (4, 8, 2, 2)
        drawn = [one.pool.ids[row] for row in torch.cat(rows).tolist()]
        own = [one.rated.references[i] for i in (0, 4, 2, 17)] * 20
        assert all(a != b for a, b in zip(drawn, own, strict=True))
        assert len(set(drawn)) == 7

    def test_the_bank_holds_the_features_of_its_crops(self, trainer, monkeypatch):
        one = trainer(hq_crops=3)
        cut = one.pool.pixels.crops
        calls = []
        monkeypatch.setattr(one.pool.pixels, "crops", lambda *given: calls.append(cut(*given)) or calls[-1])
        first = seen_by(one)["hq_features"]
        (crops,) = calls
        assert len(crops) == 7 * 3
        assert len({crop.numpy().tobytes() for crop in crops}) == 21
        expected = one.model.nar.features(CROPS.normalize(crops))
        torch.testing.assert_close(one.bank, expected)
        for feature in first:
            assert (one.bank == feature).flatten(1).all(1).sum() == 1
        assert torch.equal(seen_by(one)["hq_features"], first)
        assert len(calls) == 1
        other = trainer(hq_crops=3)
        seen_by(other, 7)
        assert torch.equal(other.bank, one.bank)  # as a resumed run has it

    def test_a_teacher_in_training_gets_crops(self, trainer):
        given = seen_by(trainer(TeacherTraining(teacher())))
        assert given["hq"].shape == (4, 3, 32, 32)
        assert "hq_features" not in given

    def test_is_not_drawn_where_nothing_compares(self, trainer):
        assert not {"hq", "hq_features"} & set(seen_by(trainer(distillation(nar=False))))

    def test_is_needed_where_something_compares(self, config):
        with pytest.raises(ValueError, match="needs a pool of pristine images: give --references"):
            IQATrainer(distillation(), config(), rated=rated(), preprocessing=CROPS, scale=SCALE)


class TestOptimiser:
    def test_rates_are_deiqts(self, trainer):
        """As measured with timm: 2e-7 to 2e-4 in 3 epochs, 2e-4 in epochs 3 to 5, 2e-5 in 6 to 8."""
        one = trainer(distillation(nar=False), num_train_epochs=9, max_steps=-1, learning_rate=2e-4)
        schedule = one.create_scheduler(90, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2e-4))
        rates = [2e-4 * schedule.lr_lambdas[0](step) for step in range(90)]
        np.testing.assert_allclose(rates[:30], np.linspace(2e-7, 2e-4, 31)[:30])
        np.testing.assert_allclose(rates[30:60], 2e-4)
        np.testing.assert_allclose(rates[60:90], 2e-5)

    def test_rates_of_a_number_of_steps_have_the_same_shape(self, trainer):
        one = trainer(distillation(nar=False), max_steps=9)
        schedule = one.create_scheduler(9, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0))
        found = [schedule.lr_lambdas[0](step) for step in range(9)]
        np.testing.assert_allclose(found, [0.001, 0.334, 0.667, 1, 1, 1, 0.1, 0.1, 0.1])

    def test_the_engines_schedules_can_be_had(self, trainer):
        one = trainer(distillation(nar=False), step_schedule=False, lr_scheduler_type="linear")
        one.create_optimizer_and_scheduler(4)
        assert one.lr_scheduler.lr_lambdas[0](2) == pytest.approx(0.5)

    @pytest.mark.parametrize("make", [distillation, lambda: TeacherTraining(teacher())])
    def test_vectors_positions_and_tokens_do_not_decay(self, trainer, make):
        one = trainer(make())
        decaying = set(one.get_decay_parameter_names(one.model))
        everything = dict(one.model.named_parameters())
        for name, value in everything.items():
            special = name.endswith(("pos_embed", "cls_token", "tokens", "queries", "positions"))
            assert (name in decaying) == (value.ndim > 1 and not special), name
        one.create_optimizer()
        decays = {p: group["weight_decay"] for group in one.optimizer.param_groups for p in group["params"]}
        assert isinstance(one.optimizer, torch.optim.AdamW)
        assert all(decays[everything[name]] == (0.05 if name in decaying else 0) for name in everything)

    def test_special_vectors_are_found(self, trainer):
        apart = {n.rsplit(".", 1)[-1] for n, p in distillation().named_parameters() if p.ndim > 2}
        assert {"pos_embed", "cls_token", "tokens", "queries"} <= apart


class TestTraining:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: distillation(bias={kind: BiasTeacher(kind) for kind in ("conv", "inv")}),
            lambda: TeacherTraining(teacher()),
            lambda: BiasTraining(BiasTeacher("conv")),
        ],
    )
    def test_every_part_learns(self, trainer, make):
        model = make()
        one = trainer(model, max_steps=2)
        before = {name: p.clone() for name, p in model.named_parameters()}
        one.train()
        assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []

    def test_terms_are_logged(self, trainer):
        one = trainer(max_steps=2)
        one.train()
        assert {"loss", "score", "mcd", "learning_rate"} <= set(one.state.log_history[0])
        row = one.state.log_history[0]
        assert row["loss"] == pytest.approx(row["score"] + row["mcd"], rel=1e-3)

    def test_resumed_is_as_uninterrupted(self, trainer, tmp_path):
        how = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "hq_crops": 2}
        whole, cut = trainer(**how), trainer(**how)
        whole.train()
        cut.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        weights = whole.model.state_dict()
        assert [name for name, value in cut.model.state_dict().items() if not torch.equal(value, weights[name])] == []
        assert cut.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


class TestValidation:
    def test_finds_the_networks_srcc_in_the_middle_of_training(self, trainer):
        one = trainer(distillation(nar=False), rated(slice(18, 42)))
        one.model.train()
        found = one.evaluate()
        scores = score_images(one.model.network, [one.eval_dataset.pixels[i].movedim(0, 2).numpy() for i in range(24)])
        assert found["eval_srcc"] == pytest.approx(srcc(scores, one.eval_dataset.scores))
        normal = one.model.network.scale.normalize(scores)
        assert found["eval_mae"] == pytest.approx(
            np.abs(normal - SCALE.normalize(one.eval_dataset.scores)).mean(), rel=1e-4
        )

    def test_select_val_keeps_the_best(self, config, tmp_path):
        own = config(
            select="val", eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, learning_rate=0.03
        )
        one = fit(
            distillation(nar=False), rated(slice(18)), CROPS, SCALE, own, validation=rated(slice(18, 42))
        )  # fmt: skip
        found = [row["eval_srcc"] for row in one.state.log_history if "eval_srcc" in row]
        assert len(set(found)) > 1
        assert max(found) == pytest.approx(
            srcc(judge(one.model.network, rated(slice(18, 42))), rated(slice(18, 42)).scores)
        )
        saved = load_file(tmp_path / "run" / "model.safetensors")
        assert torch.equal(saved["tokens"], one.model.network.tokens)

    def test_select_val_needs_validation_images(self, trainer):
        with pytest.raises(ValueError, match="select val needs validation images: give --validation"):
            trainer(select="val")


class TestPredict:
    def test_averages_the_test_crops_of_each_image_whatever_the_batch(self):
        network, some = tiny_rkiqt(crops=2), rated(slice(7))
        score = score_of(network, some, None)
        found = predict(score, some, CROPS, batch=4)
        np.testing.assert_allclose(found, predict(score, some, CROPS, batch=1), atol=1e-5)
        with torch.no_grad():
            one = network(CROPS.normalize(CROPS.crops_of(some.pixels[5]))).score.mean()
        assert found[5] == pytest.approx(float(one), abs=1e-5)

    def test_a_teacher_compares_with_others_than_the_images_own(self, monkeypatch):
        network, some, pristine = teacher(), rated(slice(7)), pool()
        asked = []
        draw = pristine.draw
        monkeypatch.setattr(pristine, "draw", lambda own, g: asked.extend(own) or draw(own, g))
        found = judge(network, some, pristine)
        assert asked == [name for name in some.references for _ in range(2)]
        np.testing.assert_array_equal(found, judge(network, some, pristine))
        assert len(set(found)) == 7

    def test_a_teacher_of_inductive_bias_has_scores(self):
        network, some = BiasTeacher("conv").eval(), rated(slice(3))
        with torch.no_grad():
            expected = network(CROPS.normalize(CROPS.crops_of(some.pixels[2]))).score.mean()
        found = predict(score_of(network, some, None), some, CROPS)
        assert found[2] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"arm": "x"}, "arm must be full, base, reg, mcd or drd"),
        ({"loss": "l2"}, "loss must be one of l1, smooth_l1"),
        ({"mask": "x"}, "mask one of spatial, channel, none"),
        ({"mask_ratio": 1.0}, r"in \[0, 1\)"),
        ({"select": "test"}, "select must be last or val"),
        ({"mcd_weight": -1.0}, "must not be negative"),
    ],
)
def test_errors(config, how, message):
    with pytest.raises(ValueError, match=message):
        config(**how)


def test_fewer_crops_than_a_step_takes_are_refused(trainer):
    with pytest.raises(ValueError, match="36 crops are fewer than the 99 of a step"):
        trainer(per_device_train_batch_size=99)


def test_what_is_chosen_is_recorded(config):
    one = config(select="val", eval_strategy="epoch", save_strategy="epoch")
    assert (one.load_best_model_at_end, one.metric_for_best_model) == (True, "srcc")
    assert json.loads(json.dumps(one.to_dict()))["select"] == "val"
