import dataclasses

import pytest
import torch
from peg.batches import PegCollator
from peg.loss import HardnessSchedule, progressive_info_nce
from peg.sentence_loss import ProgressiveContrastiveLoss
from peg.trainer import PegConfig, PegTrainer
from sentence_transformers import SentenceTransformer
from tiny_training import CORPUS, QUERIES, assert_close, bert, gradients, rows, same, static, weights
from transformers import TrainerCallback


@pytest.fixture
def config(tmp_path):
    return PegConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=5, num_train_epochs=2, hard_negatives=2,
        learning_rate=1e-2, disable_tqdm=True, logging_steps=1, save_strategy="no", temperature=0.1,
    )  # fmt: skip


@pytest.fixture
def make(config):
    def trainer(model=None, data=None, callbacks=None, schedule=None, **changes):
        own = dataclasses.replace(config, **changes)
        return PegTrainer(static() if model is None else model, own, rows() if data is None else data,
                          schedule=schedule, callbacks=callbacks)  # fmt: skip

    return trainer


@pytest.fixture
def train(make):
    """A trainer that has trained."""

    def run(*args, resume=None, **options):
        trainer = make(*args, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def first_step(trainer):
    """(loss, gradients) of all rows in one batch."""
    model = trainer.model.train()
    model.zero_grad()
    trainer.loss.step, trainer.loss.total_steps = 1, 2
    inputs = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item(), gradients(model)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def steps(trainer):
    """What the log says of each step, but for times."""
    wanted = ("step", "loss", "hardness", "learning_rate", "grad_norm", "positive_probability")
    return [{name: row[name] for name in wanted} for row in trainer.state.log_history if "loss" in row]


class TestLearning:
    def test_it_learns_and_logs_its_figures(self, train):
        trainer = train(num_train_epochs=10, learning_rate=0.05)
        history = [row for row in trainer.state.log_history if "loss" in row]
        assert {"hardness", "positive_probability", "mean_weight", "effective_negatives", "masked"} <= set(history[0])
        assert history[-1]["loss"] < 0.2 * history[0]["loss"]
        assert history[-1]["positive_probability"] > 0.8
        assert len(history) == 40

    def test_hardness_follows_the_steps_not_the_epochs(self, train):
        """Trap 12: four epochs of 4 steps and one of 16 have the same schedule."""
        four = logged(train(num_train_epochs=4), "hardness")
        longer = rows(20).select([i % 20 for i in range(80)])
        one = logged(train(data=longer, num_train_epochs=1), "hardness")
        cut = logged(train(max_steps=16), "hardness")
        expected = [HardnessSchedule().lam(step, 16) for step in range(16)]
        assert four == one == cut == pytest.approx(expected)
        assert expected[0] == 0 < expected[1] < expected[13] == 5.0

    def test_flags_describe_the_schedule(self, make):
        changes = {"hardness_start": 1.0, "hardness_end": 2.0, "hardness_ramp": 0.5, "hardness_shape": "step"}
        trainer = make(difficulty="margin", **changes)
        assert trainer.loss.schedule == HardnessSchedule(1.0, 2.0, 0.5, "step", "margin")

    def test_a_schedule_of_ones_own(self, train):
        class Falling:
            def lam(self, step, total):
                return float(total - step)

            def log_weight(self, sim, sim_pos, lam):
                return lam * sim

        assert logged(train(schedule=Falling()), "hardness") == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]

    def test_a_loss_of_ones_own(self, config):
        loss = ProgressiveContrastiveLoss(static(), 0.0)
        trainer = PegTrainer(loss.model, config, rows(), loss=loss)
        trainer.train()
        assert trainer.loss is loss
        assert set(logged(trainer, "hardness")) == {0.0}


class TestTexts:
    def test_each_distinct_text_is_encoded_once_and_nothing_else_changes(self, make):
        """Against every query and every candidate encoded for itself."""
        data = rows(12, negatives=3).select([i % 12 for i in range(18)])
        model = bert(dropout=0.0)
        trainer = make(model, data)
        encoded = []
        handle = model.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0]["input_ids"])))
        loss, gradient = first_step(trainer)
        handle.remove()
        assert sum(encoded) == 12 + len({text for row in data for text in (*row["pos"], *self.drawn(trainer, row))})
        inputs = trainer.data_collator(list(data))
        for side, name in (("queries", "queries"), ("passages", "candidates")):
            places = inputs["batch"][name]
            inputs[side] = {k: v[places] if torch.is_tensor(v) else v for k, v in inputs[side].items()}
            inputs["batch"][name] = torch.arange(len(places))
        model.zero_grad()
        repeated = trainer.compute_loss(model, inputs)
        repeated.backward()
        assert len(inputs["queries"]["input_ids"]) == 18
        assert repeated.item() == pytest.approx(loss, rel=1e-5)
        assert_close(gradients(model), gradient, rtol=1e-3, atol=1e-5)

    @staticmethod
    def drawn(trainer, row):
        collator = dataclasses.replace(trainer.data_collator, preprocess=lambda texts, **_: texts)
        return collator([row])["passages"]

    def test_prompts_of_the_flags_are_saved_for_search(self, make, tmp_path):
        trainer = make(query_prompt="find: ")
        trainer.save_model(str(tmp_path / "saved"))
        saved = SentenceTransformer(str(tmp_path / "saved"))
        assert saved.prompts["query"] == "find: "
        assert saved.prompts.get("document", "") == ""
        text = QUERIES[0]
        torch.testing.assert_close(
            saved.encode_query(text, convert_to_tensor=True), saved.encode(f"find: {text}", convert_to_tensor=True)
        )

    def test_prompts_of_the_model_and_of_the_flags(self, make):
        model = bert()
        model.prompts = {"query": "find: ", "document": "read: "}
        seen = []
        model.preprocess = lambda texts, prompt=None, **options: seen.append((prompt, options))
        make(model).data_collator(list(rows(3)))
        make(model, query_prompt="Q", passage_prompt="P", query_length=7, passage_length=9).data_collator(list(rows(3)))
        assert [prompt for prompt, _ in seen] == ["find: ", "read: ", "Q", "P"]
        assert [options["max_length"] for _, options in seen] == [64, 256, 7, 9]

    def test_texts_are_cut(self, make):
        model = bert()
        batch = make(model, query_length=4, passage_length=6).data_collator(list(rows(3)))
        assert batch["queries"]["input_ids"].shape[1] == 4
        assert batch["passages"]["input_ids"].shape[1] == 6


class TestMasks:
    def losses(self, make, data):
        return [first_step(make(data=data, mask_known=known))[0] for known in (True, False)]

    def test_known_positives_by_text(self, make):
        """A row's hard negative is its own positive, and another's is the positive of a third."""
        data = rows(6, neg=[[CORPUS[i]] for i in (0, 11, 12, 4, 14, 15)])
        trainer = make(data=data, hard_negatives=1)
        loss, _ = first_step(trainer)
        model = trainer.model
        q, p, n = (model(model.preprocess(texts))["sentence_embedding"]
                   for texts in (data["query"], *([row[0] for row in data[name]] for name in ("pos", "neg"))))  # fmt: skip
        keep = torch.ones(6, 12, dtype=torch.bool)
        keep[0, 6] = keep[4, 9] = False
        expected = progressive_info_nce(q, p, n[:, None], temperature=0.1, hardness=trainer.loss.hardness(), mask=keep)
        assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
        assert loss < first_step(make(data=data, hard_negatives=1, mask_known=False))[0]

    def test_known_positives_by_id(self, make):
        """The same document in other words."""
        ids = {"pos_ids": [[str(i)] for i in range(6)], "neg": [[CORPUS[10 + i]] for i in range(6)]}
        other = rows(6, neg_ids=[["9"] for i in range(6)], **ids)
        own = rows(6, neg_ids=[["0"] for i in range(6)], **ids)  # all negatives are the positive of query 0
        masked, not_masked = self.losses(make, own)
        assert masked < not_masked == self.losses(make, other)[0]

    def test_rows_of_the_same_query_share_theirs(self, make):
        data = rows(6, negatives=0, query=[QUERIES[0], QUERIES[0], *QUERIES[2:6]])
        masked, not_masked = self.losses(make, data)
        assert masked < not_masked

    def test_ragged_negatives(self, make):
        """Whatever stands for a missing one (trap 13) makes no difference, nor do rows without any."""
        ragged = rows(6, neg=[[], [CORPUS[10]], [], [], [CORPUS[11], CORPUS[12]], []])
        loss, gradient = first_step(make(data=ragged, hard_negatives=2))
        wider, wider_gradient = first_step(make(data=ragged, hard_negatives=4))
        assert loss == pytest.approx(wider, rel=1e-6)
        assert_close(gradient, wider_gradient)
        assert loss > first_step(make(data=rows(6, negatives=0)))[0]

    def test_ragged_rows_train(self, train):
        assert len(logged(train(data=rows(10, neg=[[CORPUS[15]] * (i % 2) for i in range(10)])), "loss")) == 4


SOURCES = ["a", "a", "b", "b", "c", "c", "c"]


class TestSources:
    def loss(self, make, **changes):
        return first_step(make(data=rows(7, 1, source=SOURCES), hard_negatives=1, mask_known=False, **changes))[0]

    def parts(self, make):
        """The sum of the losses of a source's queries: among all candidates, of its own source alone, of the query alone."""
        found = {}
        for source in "abc":
            numbers = [i for i, s in enumerate(SOURCES) if s == source]
            table = rows(7, 1, source=SOURCES)
            for rule, groups in (("own", [numbers]), ("none", [[i] for i in numbers])):
                found[source, rule] = sum(
                    len(group) * first_step(make(data=table.select(group), hard_negatives=1, mask_known=False))[0]
                    for group in groups
                )
        return found

    def test_own_and_lone_sources(self, make):
        parts = self.parts(make)
        with_own = self.loss(make, own_sources=["a", "b", "c"])
        assert 7 * with_own == pytest.approx(sum(parts[s, "own"] for s in "abc"), rel=1e-5)
        mixed = self.loss(make, in_batch="own", lone_sources=["b"])
        assert 7 * mixed == pytest.approx(parts["a", "own"] + parts["b", "none"] + parts["c", "own"], rel=1e-5)
        lone = self.loss(make, in_batch="none")
        assert 7 * lone == pytest.approx(sum(parts[s, "none"] for s in "abc"), rel=1e-5)
        one = self.loss(make, own_sources=["a"])
        assert lone < with_own < one < self.loss(make)

    def test_batches_of_one_source(self, train, monkeypatch):
        seen = []
        collate = PegCollator.__call__
        monkeypatch.setattr(
            PegCollator,
            "__call__",
            lambda self, batch: (seen.append([row["source"] for row in batch]), collate(self, batch))[1],
        )
        data = rows(20, source=["a", "b", ""] * 6 + ["a", "b"])
        train(data=data, same_source_batches=True, num_train_epochs=1)
        assert all(len(set(batch)) == 1 for batch in seen)
        assert sorted(source for batch in seen for source in batch) == sorted(data["source"])

    @pytest.mark.parametrize("name", ["own_sources", "lone_sources"])
    def test_unknown_sources(self, make, name):
        with pytest.raises(ValueError, match="no source 'd' in the data; there are a, b, c"):
            make(data=rows(7, source=SOURCES), **{name: ["d"]})


class TestBatchSize:
    @pytest.mark.parametrize(("target", "k", "queries"), [(12, 2, 4), (13, 2, 5), (3, 2, 1), (7, 0, 7)])
    def test_target_negatives_sets_it(self, config, target, k, queries):
        changed = dataclasses.replace(config, target_negatives=target, hard_negatives=k)
        assert changed.per_device_train_batch_size == queries

    def test_all_steps_have_it(self, make):
        assert len(next(iter(make(target_negatives=18).get_train_dataloader()))["batch"]["candidates"]) == 18

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target_negatives": 2}, "target_negatives 2 is less than the 3 candidates of one query"),
            (
                {"target_negatives": 9, "gradient_accumulation_steps": 2},
                "gradient_accumulation_steps adds no negatives",
            ),
            ({"hard_negatives": -1}, "hard_negatives must be at least 0, got -1"),
            ({"hardness_shape": "quadratic"}, "shape must be one of linear, cosine, step, constant"),
            ({"hardness_ramp": 0.0}, "ramp is a share of training"),
        ],
    )
    def test_wrong_options(self, config, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)

    def test_more_than_the_data_has(self, make):
        with pytest.raises(ValueError, match="target_negatives 63 needs 21 queries in a step, the data has 20"):
            make(target_negatives=63)

    @pytest.mark.parametrize(("columns", "missing"), [(["query"], "query"), (["query", "pos"], "pos and no query")])
    def test_missing_columns(self, make, columns, missing):
        message = (
            f"training rows need a text `query` and a list of texts `pos`; there is no {missing} among .*load_rows"
        )
        with pytest.raises(ValueError, match=message):
            make(data=rows().remove_columns(columns))


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


class TestResume:
    def test_killed_it_goes_on_as_if_it_had_not_been(self, train, config):
        """In the middle of the schedule, early and late in an epoch and between two, with draws and dropout (trap 12)."""
        options = {"data": rows(20, negatives=6), "num_train_epochs": 3}
        saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
        whole = train(bert(), **options)
        with pytest.raises(KeyboardInterrupt):
            train(bert(), callbacks=[Kill()], **saving, **options)
        for step in (3, 4, 7):
            again = train(bert(seed=5), resume=f"{config.output_dir}/checkpoint-{step}", **options)
            assert len(steps(again)) == 12
            assert steps(again) == steps(whole)
            assert same(weights(again.model), weights(whole.model))

    def test_other_negatives_in_each_epoch_and_the_same_after_resuming(self, train, config, monkeypatch):
        epochs = []
        collate = PegCollator.__call__
        monkeypatch.setattr(
            PegCollator, "__call__", lambda self, batch: (epochs.append(self.epoch), collate(self, batch))[1]
        )
        train(num_train_epochs=3, save_strategy="steps", save_steps=7, save_total_limit=2)
        assert epochs == [0] * 4 + [1] * 4 + [2] * 4
        epochs.clear()
        train(num_train_epochs=3, resume=f"{config.output_dir}/checkpoint-7", save_steps=7)
        assert epochs == [1] + [2] * 4  # of epoch 1 three batches are skipped


class TestOutput:
    @pytest.mark.parametrize("model", [static, bert])
    def test_it_is_a_sentence_transformer(self, model, train, config):
        trainer = train(model())
        trainer.save_model()
        again = SentenceTransformer(config.output_dir, device="cpu")
        texts = [*QUERIES[:3], *CORPUS[:3]]
        expected = trainer.model.eval().encode(texts, convert_to_tensor=True)
        assert torch.equal(again.encode(texts, convert_to_tensor=True), expected)
        assert same(weights(again), weights(trainer.model))

    def test_its_card_cites_the_paper_and_shows_no_training_text(self, train, config, tmp_path):
        train().save_model()
        card = (tmp_path / "run" / "README.md").read_text()
        assert "arXiv:2311.11691" in card
        assert "ProgressiveContrastiveLoss" in card
        assert not [text for text in (*QUERIES, *CORPUS) if text in card]
