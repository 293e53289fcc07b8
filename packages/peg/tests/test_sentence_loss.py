"""The loss in trainers that know nothing of it."""

import pytest
import torch
from datasets import Dataset
from peg.loss import HardnessSchedule, WeightSchedule, progressive_info_nce
from peg.sentence_loss import ProgressiveContrastiveLoss
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from tiny_training import CORPUS, QUERIES, assert_close, bert, gradients, static

COLUMNS = Dataset.from_dict(
    {
        "anchor": QUERIES[:16],
        "positive": CORPUS[:16],
        "negative_1": CORPUS[3:19],
        "negative_2": CORPUS[4:20],
    }
)


@pytest.fixture
def train(tmp_path):
    """An unmodified trainer, after training; the gradients of its steps are kept."""

    def run(loss, callbacks=None, **options):
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
            **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "max_grad_norm": 0, **options},
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=loss.model, args=args, train_dataset=COLUMNS, loss=loss, callbacks=callbacks
        )
        trainer.steps = []
        training_step = trainer.training_step

        def kept(model, *rest):
            value = training_step(model, *rest)
            trainer.steps.append((value.item(), gradients(model)))
            return value

        trainer.training_step = kept
        trainer.train()
        return trainer

    return run


def features(model, columns=4):
    return [model.preprocess(column) for column in list(COLUMNS.to_dict().values())[:columns]]


class TestAgainstSentenceTransformers:
    @pytest.mark.parametrize(
        ("ours", "theirs", "options"),
        [
            ({}, MultipleNegativesRankingLoss, {}),
            ({"micro_batch_tokens": 60}, CachedMultipleNegativesRankingLoss, {"mini_batch_size": 4}),
        ],
    )
    def test_without_weights_it_is_multiple_negatives_ranking(self, train, ours, theirs, options):
        ours = train(ProgressiveContrastiveLoss(bert(dropout=0.0), 0.0, temperature=0.1, **ours))
        theirs = train(theirs(bert(dropout=0.0), scale=10.0, **options))
        assert len(ours.steps) == len(theirs.steps) == 4
        for (loss, gradient), (their_loss, their_gradient) in zip(ours.steps, theirs.steps, strict=True):
            assert loss == pytest.approx(their_loss, rel=1e-4)
            assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-5)

    def test_with_weights_it_is_their_hardness(self):
        model = bert(dropout=0.0).train()
        both = []
        for loss in (
            ProgressiveContrastiveLoss(model, 5.0, temperature=0.1),
            MultipleNegativesRankingLoss(model, scale=10.0, hardness_mode="all_negatives", hardness_strength=5.0),
        ):
            model.zero_grad()
            value = loss(features(model), None)
            value.backward()
            both.append((value, gradients(model)))
        torch.testing.assert_close(both[0][0], both[1][0])
        assert_close(both[0][1], both[1][1], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("columns", [2, 3])
    def test_pairs_and_triplets(self, columns):
        model = bert(dropout=0.0).train()
        ours = ProgressiveContrastiveLoss(model, 0.0, temperature=0.1)(features(model, columns))
        theirs = MultipleNegativesRankingLoss(model, scale=10.0)(features(model, columns), None)
        torch.testing.assert_close(ours, theirs)


class Recorded:
    """A schedule of one's own."""

    def __init__(self):
        self.asked = []

    def lam(self, step, total):
        self.asked.append((step, total))
        return 3.0

    def log_weight(self, sim, sim_pos, lam):
        return lam * (sim - sim_pos)


class TestSchedule:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_follows_optimiser_steps(self, train, accumulation):
        """Trap 12: not batches, not epochs."""
        schedule = Recorded()
        loss = ProgressiveContrastiveLoss(static(), schedule)
        train(
            loss, [loss.callback()], per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
        )  # fmt: skip
        total = 8 // accumulation
        assert schedule.asked == [(step // accumulation, total) for step in range(8)]

    def test_a_schedule_of_ones_own_weighs(self):
        model = static().train()
        loss = ProgressiveContrastiveLoss(model, Recorded(), temperature=0.1)
        loss.step, loss.total_steps = 1, 10
        embeddings = [model(dict(f))["sentence_embedding"] for f in features(model)]
        expected = progressive_info_nce(
            embeddings[0], embeddings[1], embeddings[2:], temperature=0.1, hardness=3.0, difficulty="margin"
        ).loss
        torch.testing.assert_close(loss(features(model)), expected)
        assert isinstance(loss.schedule, WeightSchedule)

    def test_the_difficulty_of_ours_is_used(self):
        model = static().train()
        losses = []
        for difficulty in ("cosine", "margin"):
            loss = ProgressiveContrastiveLoss(model, HardnessSchedule(0.0, 5.0, difficulty=difficulty), temperature=0.1)
            loss.step, loss.total_steps = 10, 10
            losses.append(loss(features(model)).item())
        assert abs(losses[0] - losses[1]) > 0.01

    def test_without_the_callback_training_says_what_to_do(self, train):
        with pytest.raises(ValueError, match=r"give the trainer callbacks=\[loss.callback\(\)\], or set loss.step"):
            train(ProgressiveContrastiveLoss(static()))

    @pytest.mark.parametrize("options", [{"pairs_until": 0.5}, {"query_weighting": "loss"}])
    def test_what_else_follows_training_needs_the_callback_too(self, options):
        model = static()
        loss = ProgressiveContrastiveLoss(model, 0.0, **options).train()
        with pytest.raises(ValueError, match=r"callbacks=\[loss.callback\(\)\]"):
            loss(features(model, 3))

    def test_outside_training_the_last_hardness_is_used(self):
        model = static()
        default = ProgressiveContrastiveLoss(model)
        constant = ProgressiveContrastiveLoss(model, 5.0)
        with torch.no_grad():
            assert default.train()(features(model)) == constant(features(model))
        assert default.eval()(features(model)) == constant(features(model))

    def test_a_constant_one_needs_no_callback(self, train):
        for schedule in (2.0, 2, HardnessSchedule(end=2.0, shape="constant")):
            loss = ProgressiveContrastiveLoss(static(), schedule)
            assert len(train(loss).steps) == 4
            assert loss.hardness() == 2.0

    @pytest.mark.parametrize("wrong", ["linear", object(), lambda step, total: 1.0])
    def test_what_is_no_schedule_is_refused(self, wrong):
        with pytest.raises(
            ValueError, match=r"a schedule needs lam\(step, total\) and log_weight\(sim, sim_pos, lam\)"
        ):
            ProgressiveContrastiveLoss(static(), wrong)

    def test_wrong_query_weighting(self):
        with pytest.raises(ValueError, match="query_weighting must be none or loss, got 'rank'"):
            ProgressiveContrastiveLoss(static(), query_weighting="rank")


class TestStages:
    def test_pairs_first(self):
        model = static().train()
        loss = ProgressiveContrastiveLoss(model, 0.0, temperature=0.1, pairs_until=0.5)
        pairs, all_columns = (
            ProgressiveContrastiveLoss(model, 0.0, temperature=0.1)(features(model, n)) for n in (2, 4)
        )
        loss.total_steps = 10
        for loss.step, expected in ((0, pairs), (4, pairs), (5, all_columns), (9, all_columns)):
            torch.testing.assert_close(loss(features(model)), expected)

    def test_pairs_first_with_masks(self):
        """Of a collator's batch the parts that belong to hard negatives go, too."""
        model = static().train()
        loss = ProgressiveContrastiveLoss(model, 0.0, temperature=0.1, pairs_until=0.5)
        loss.step, loss.total_steps = 0, 10
        batch = {
            "queries": torch.arange(4), "candidates": torch.arange(8), "mask": torch.ones(4, 1, dtype=torch.bool),
            "candidate_ids": torch.arange(8), "positive_ids": torch.tensor([[0], [1], [2], [2]]),
        }  # fmt: skip
        masked = loss([model.preprocess(QUERIES[:4]), model.preprocess(CORPUS[:8])], batch)
        keep = torch.ones(4, 4, dtype=torch.bool)
        keep[3, 2] = False
        q, p = (model(model.preprocess(texts[:4]))["sentence_embedding"] for texts in (QUERIES, CORPUS))
        torch.testing.assert_close(masked, progressive_info_nce(q, p, temperature=0.1, mask=keep).loss)

    def test_hard_queries_weigh_more_and_more(self):
        model = static().train()
        loss = ProgressiveContrastiveLoss(model, 0.0, temperature=0.1, query_weighting="loss")
        embeddings = [model(dict(f))["sentence_embedding"] for f in features(model)]
        loss.total_steps = 10
        for loss.step in (0, 5, 10):
            expected = progressive_info_nce(
                embeddings[0], embeddings[1], embeddings[2:], temperature=0.1, gamma=loss.step / 10
            ).loss
            torch.testing.assert_close(loss(features(model)), expected)


def test_options_reach_the_loss():
    model = static().train()
    options = {"normalise": "mean1", "apply_to": "hard", "false_negative_margin": -0.1, "margin_strategy": "relative"}
    embeddings = [model(dict(f))["sentence_embedding"] for f in features(model)]
    plain = ProgressiveContrastiveLoss(model, 9.0, temperature=0.1)(features(model))
    expected = progressive_info_nce(
        embeddings[0], embeddings[1], embeddings[2:], temperature=0.1, hardness=9.0, **options
    ).loss
    ours = ProgressiveContrastiveLoss(model, 9.0, temperature=0.1, **options)
    torch.testing.assert_close(ours(features(model)), expected)
    assert abs(plain - expected) > 1e-3
    assert options.items() <= ours.get_config_dict().items()


def test_figures_on_demand():
    model = static().train()
    loss = ProgressiveContrastiveLoss(model, 5.0)
    loss(features(model))
    assert loss.output.mean_weight is None
    assert not loss.output.loss.requires_grad
    loss.statistics = True
    loss(features(model))
    assert 1 < loss.output.effective_negatives < 47
