import dataclasses

import pytest
import torch
from sinkd import SinKDConfig, SinKDLoss, SinKDTrainer
from sinkd.encode import Collator, encode_language, encode_texts, numbered, with_teacher_inputs
from sinkd.sample import train_tokenizer
from sinkd.tasks import generic
from sinkd.trainer import spread


@pytest.fixture
def config(tmp_path):
    return SinKDConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-3,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip


@pytest.fixture
def train(tokenizer, examples, config):
    """A trainer that has trained, on the texts or as a language model."""

    def run(model, teacher, rows=None, collator=None, resume=None, **changes):
        own = dataclasses.replace(config, **changes)
        rows = encode_texts(examples, tokenizer, 32) if rows is None else rows
        trainer = SinKDTrainer(
            model,
            teacher,
            own,
            train_dataset=rows,
            data_collator=collator or Collator(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_student_learns_its_teacher_and_terms_are_logged(train, make_model):
    teacher, student = make_model(layers=2, seed=1), make_model(seed=2)
    with torch.no_grad():
        teacher.classifier.weight *= 50
    history = train(student, teacher, num_train_epochs=6).state.log_history
    steps = [row for row in history if "kd" in row]
    assert {"ce", "kd", "sinkhorn", "loss"} <= set(steps[0])
    assert steps[-1]["kd"] < 0.8 * steps[0]["kd"]
    first = steps[0]
    assert first["loss"] == pytest.approx(0.1 * first["ce"] + 0.9 * first["kd"] + 0.03 * first["sinkhorn"], rel=1e-3)


def test_the_teacher_stays_as_it_is_in_eval_mode(train, make_model):
    teacher = make_model(seed=1).train()
    before = weights(teacher)
    trainer = train(make_model(), teacher)
    assert same(before, weights(teacher))
    assert not trainer.teacher.training
    assert not any(p.requires_grad for p in trainer.teacher.parameters())


def test_the_teacher_is_not_saved(train, make_model, config, tokenizer):
    trainer = train(make_model(), make_model(seed=1, layers=2))
    trainer.save_model()
    again = type(trainer.model).from_pretrained(config.output_dir)
    assert same(weights(again), weights(trainer.model))
    assert type(tokenizer).from_pretrained(config.output_dir).get_vocab() == tokenizer.get_vocab()


def test_a_teacher_from_a_folder_is_the_same(train, make_model, tmp_path):
    teacher = make_model(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    a = train(make_model(), teacher).model
    b = train(make_model(), str(tmp_path / "teacher"), output_dir=str(tmp_path / "other")).model
    assert same(weights(a), weights(b))


def test_without_a_teacher_it_learns_the_labels(train, make_model):
    history = train(make_model(), None, num_train_epochs=10, learning_rate=1e-2).state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.3 * losses[0]
    assert not any("sinkhorn" in row for row in history)


def test_gradient_ratio_on_demand(train, make_model):
    history = train(make_model(), make_model(seed=1), log_gradient_ratio=True).state.log_history
    assert all(row["gradient_ratio"] > 0 for row in history if "kd" in row)
    assert not any("gradient_ratio" in row for row in train(make_model(), make_model(seed=1)).state.log_history)


def test_the_paper_preset_is_the_papers_loss(config):
    preset = dataclasses.replace(config, preset="rte").criterion()
    assert repr(preset) == repr(SinKDLoss.paper("rte"))


def test_temperature_anneals_by_epoch(train, make_model, monkeypatch):
    seen = []
    forward = SinKDLoss.forward
    monkeypatch.setattr(SinKDLoss, "forward", lambda self, *a: (seen.append(a[4]), forward(self, *a))[1])
    train(make_model(), make_model(seed=1), anneal=True, kd_temperature=4.0, num_train_epochs=3)
    assert seen == [4.0] * 5 + [2.5] * 5 + [1.0] * 5


def test_killed_and_resumed_gives_the_same_student(train, make_model, tmp_path, config):
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = train(make_model(), make_model(seed=1), **options)
    again = train(make_model(seed=5), make_model(seed=1), resume=f"{config.output_dir}/checkpoint-6", **options)
    assert same(weights(whole.model), weights(again.model))


def test_a_resumed_language_model_draws_the_same_rows(train, make_model, examples, tokenizer, config):
    rows = encode_language(examples.first, tokenizer, 32)
    options = {"rows": rows, "max_rows": 10, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = train(make_model("decoder"), make_model("decoder", seed=1), **options)
    resume = f"{config.output_dir}/checkpoint-6"
    again = train(make_model("decoder", seed=5), make_model("decoder", seed=1), resume=resume, **options)
    assert same(weights(whole.model), weights(again.model))


def test_accumulated_steps_are_the_mean_over_all_rows(train, make_model):
    """KD and cross-entropy are means over rows, so two halves accumulate to the whole; without dropout, of course."""
    results = []
    for size, accumulation in ((8, 1), (4, 2)):
        student = make_model()
        student.config.hidden_dropout_prob = student.config.attention_probs_dropout_prob = 0.0
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = train(
            student, make_model(seed=1), beta=0.0, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, num_train_epochs=1,
        )  # fmt: skip
        results.append(weights(trainer.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


def test_a_teacher_with_another_tokenizer_reads_its_own_ids(train, tokenizer, examples, make_model):
    other = train_tokenizer([text.upper() + " zebra" for text in examples.first], vocab_size=60)
    assert other.get_vocab() != tokenizer.get_vocab()
    teacher, seen = make_model(seed=1), []
    forward = teacher.forward
    teacher.forward = lambda **inputs: (seen.append(inputs["input_ids"]), forward(**inputs))[1]
    rows = with_teacher_inputs(encode_texts(examples, tokenizer, 32), encode_texts(examples, other, 32))
    train(make_model(), teacher, rows=rows, collator=Collator(tokenizer, other))
    known = {tuple(row["input_ids"]) for row in encode_texts(examples, other, 32)}
    shown = {tuple(t for t in row.tolist() if t != other.pad_token_id) for batch in seen for row in batch}
    assert shown == known


def test_regression(train, make_model, examples, tokenizer):
    task = generic("scores", None)
    scored = dataclasses.replace(examples, task=task, labels=[float(i % 3) for i in range(40)])
    history = train(make_model(task=task), make_model(task=task, seed=1), rows=encode_texts(scored, tokenizer, 32))
    assert all(row["loss"] >= 0 for row in history.state.log_history if "kd" in row)
    assert all(row["sinkhorn"] > 0 for row in history.state.log_history if "kd" in row)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize(
    "changes", [{}, {"granularity": "sequence"}, {"topk": 5, "max_rows": 20}, {"granularity": "first_token"}]
)
def test_language_models(kind, changes, train, make_model, examples, tokenizer):
    rows = encode_language(examples.first, tokenizer, 32)
    trainer = train(make_model(kind), make_model(kind, seed=1, layers=2), rows=rows, num_train_epochs=1, **changes)
    steps = [row for row in trainer.state.log_history if "kd" in row]
    assert len(steps) == 5
    assert all(row["sinkhorn"] > 0 and row["ce"] > 0 for row in steps)


def test_language_loss_is_the_sum_of_its_terms(train, make_model, examples, tokenizer):
    rows = encode_language(examples.first, tokenizer, 32)
    trainer = train(
        make_model("decoder"), make_model("decoder", seed=1), rows=rows, alpha=0.25, beta=0.5, max_rows=None
    )
    row = next(row for row in trainer.state.log_history if "kd" in row)
    assert row["loss"] == pytest.approx(0.75 * row["ce"] + 0.25 * row["kd"] + 0.5 * row["sinkhorn"], rel=1e-3)


@pytest.mark.parametrize("shift", [True, False])
def test_cached_rows_find_their_places(shift):
    labels = torch.tensor([[-100, 4, 5], [6, -100, 7]])
    rows = torch.arange(3.0 if shift else 4.0).unsqueeze(1).expand(-1, 2) + 1
    logits = spread(rows, labels, shift)
    expected = [[1, 2, 0], [0, 3, 0]] if shift else [[0, 1, 2], [3, 0, 4]]
    assert logits[..., 0].tolist() == expected


def test_rows_of_a_cache_follow_the_index(train, make_model, examples, tokenizer):
    class Cache:
        def logits(self, index):
            return table[index]

    rows = encode_texts(examples, tokenizer, 32)
    teacher = make_model(seed=1).eval()
    batch = Collator(tokenizer)(rows)
    batch.pop("labels")
    with torch.no_grad():
        table = teacher(**batch).logits
    live = train(make_model(), teacher).model
    trainer = SinKDTrainer(
        make_model(), None, live_config(train, make_model), teacher_cache=Cache(), train_dataset=numbered(rows),
        data_collator=Collator(tokenizer),
    )  # fmt: skip
    trainer.train()
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def live_config(train, make_model):
    return train(make_model(), None).args


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "word"}, "granularity must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"sinkhorn": "x"}, "sinkhorn must be one of"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SinKDConfig(output_dir=str(tmp_path), **options)
