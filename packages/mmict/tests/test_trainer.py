"""The engine: which demonstrations a step shows, resuming, the validation loss, and what is refused."""

import mmict.trainer
import pytest
import torch
from mmict import MMICTConfig, MMICTTrainer, MMICTTrainingConfig
from mmict.corpus import new_sampler, prepare
from mmict.judge import judge
from mmict.trainer import ARMS
from safetensors.torch import load_file
from tiny_mmict import model, samples, save_parts
from transformers import TrainerCallback


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


@pytest.fixture
def trainer(parts, tmp_path):
    def make(callbacks=(), folder="run", **changes):
        how = {
            "output_dir": str(tmp_path / folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
            "warmup_steps": 0, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        }  # fmt: skip
        config = MMICTTrainingConfig(**{**how, **changes})
        tuned = model(parts, dropout=0.1, demonstration=ARMS[config.arm][0], guided=ARMS[config.arm][1])
        corpus = prepare(tuned, samples())
        sampler = new_sampler(corpus, config.sampler, config.k, config.seed)
        validation = prepare(tuned, samples(7, seed=1))
        return MMICTTrainer(
            model=tuned, args=config, corpus=corpus, sampler=sampler, validation=validation, callbacks=list(callbacks)
        )

    return make


@pytest.fixture
def steps(monkeypatch):
    """(rows, demonstrations, prompts) of every step, as they are made."""
    found, make = [], mmict.trainer.make_dialogs

    def spy(queries, rows, pool, shown, choices=None):
        if choices is not None:
            found.append((rows, shown, choices))
        return make(queries, rows, pool, shown, choices)

    monkeypatch.setattr(mmict.trainer, "make_dialogs", spy)
    return found


class Stop(TrainerCallback):
    """Interrupts after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestDemonstrations:
    def test_are_drawn_from_seed_epoch_and_query(self, trainer, steps):
        one = trainer(seed=3)
        one.train()
        names, groups = one.corpus.samples.ids, one.corpus.samples.groups
        assert len(steps) == 6  # two epochs of three
        for step, (rows, shown, _) in enumerate(steps):
            drawn = one.sampler.draw([names[i] for i in rows], [groups[i] for i in rows], epoch=step // 3)
            assert shown == drawn.tolist()
        epochs = [{row: of for rows, shown, _ in part for row, of in zip(rows, shown, strict=True)}
                  for part in (steps[:3], steps[3:])]  # fmt: skip
        assert epochs[0].keys() == epochs[1].keys() == set(range(12))
        assert epochs[0] != epochs[1]
        assert {choice for _, _, choices in steps for choice in choices} == set(range(6))  # prompts too
        assert steps[0][2] != steps[1][2]

    def test_vary_k(self, trainer, steps):
        trainer(vary_k=True, k=2, max_steps=9).train()
        counts = [{len(of) for of in shown} for _, shown, _ in steps]
        assert all(len(count) == 1 for count in counts)
        assert {count for (count,) in counts} == {0, 1, 2}

    def test_arms_without_demonstrations_get_none(self, trainer, steps):
        trainer(arm="ft", max_steps=1).train()
        assert steps[0][1] == [[]] * 4

    def test_arms_see_the_same_queries_prompts_and_demonstrations(self, trainer, steps):
        for arm in ("ict", "mmict"):
            trainer(arm=arm, max_steps=3, folder=arm).train()
        assert steps[:3] == steps[3:]


class TestResume:
    def test_an_interrupted_run_ends_like_a_whole_one(self, trainer, tmp_path):
        how = {
            "augment": True,
            "vary_k": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": None,
        }
        trainer(folder="whole", **how).train()
        with pytest.raises(KeyboardInterrupt):
            trainer(callbacks=[Stop(5)], folder="stopped", **how).train()  # in the second epoch
        trainer(folder="stopped", **how).train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
        whole, stopped, before = (
            load_file(tmp_path / name / "model.safetensors")
            for name in ("whole/checkpoint-6", "stopped/checkpoint-6", "whole/checkpoint-4")
        )
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)
        assert not torch.equal(whole["separator"], before["separator"])

    def test_a_checkpoint_can_be_loaded(self, trainer, tmp_path):
        one = trainer(save_strategy="steps", save_steps=1, max_steps=1)
        one.train()
        found = type(one.model).from_pretrained(tmp_path / "run" / "checkpoint-1")
        assert torch.equal(found.hub.query_tokens, one.model.hub.query_tokens)


def test_the_validation_loss_is_that_of_the_judge(trainer):
    """Of whole pictures, even if crops are learned from."""
    one = trainer(augment=True, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=3)
    one.train()
    found = judge(one.model, one.validation, one.corpus, one.sampler, 2, progress=False, num_beams=1, max_new_tokens=1)
    logged = [row["eval_loss"] for row in one.state.log_history if "eval_loss" in row]
    assert len(logged) == 2
    assert logged[-1] == pytest.approx(found.nll.sum() / found.tokens.sum(), abs=1e-5)


def test_matrices_alone_decay(trainer):
    one = trainer()
    names = one.get_decay_parameter_names(one.model)
    assert {"hub.query_tokens", "hub.proj.weight"} <= set(names)
    assert not any(
        name.endswith("bias") or "norm" in name.lower() or name.startswith(("lm", "vision")) for name in names
    )
    groups = one.create_optimizer().param_groups
    trained = sum(p.requires_grad for p in one.model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained


def test_defaults_are_the_authors():
    config = MMICTTrainingConfig(output_dir="x")
    assert (config.learning_rate, config.weight_decay, config.num_train_epochs) == (1e-5, 0.05, 5)
    assert (config.warmup_steps, config.seed, config.max_grad_norm, config.adam_beta2) == (1000, 42, 0, 0.999)
    assert (config.k, config.sampler, config.shown) == (2, "random", 2)
    assert config.model_config() == MMICTConfig()


def test_arms():
    configs = {arm: MMICTTrainingConfig(output_dir="x", arm=arm, reduction="dialog") for arm in ARMS}
    assert configs["ict"].model_config() == MMICTConfig("visual+raw_text", guided=False, reduction="dialog")
    assert configs["ft"].model_config() == MMICTConfig("none", guided=False, reduction="dialog")
    assert configs["ft+text"].model_config() == MMICTConfig("none", guided=True, reduction="dialog")
    assert {arm for arm, config in configs.items() if config.shown == 0} == {"ft", "ft+text"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "x"}, "arm must be one of ft, "),
        ({"sampler": "x"}, "sampler must be one of random"),
        ({"fp16": True}, "float16 overflows in T5"),
        ({"reduction": "sum"}, "reduction must be one of token, dialog"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MMICTTrainingConfig(output_dir="x", **changes).model_config()


def test_more_demonstrations_than_there_are(trainer):
    with pytest.raises(ValueError, match="k=8 demonstrations asked, only 5 different groups among 10"):
        trainer(k=8, max_steps=1).train()
