"""The verb train, end to end with tiny stages, and what it says to wrong input."""

import json
from functools import partial

import mmict.train
import numpy as np
import pytest
from matplotlib.image import imread
from mmict import MMICTModel, data
from mmict.cli import app
from mmict.hub import MHubConfig
from mmict.small import SmallOptions, StageTrainer
from mmict.trainer import MMICTTrainer
from PIL import Image
from safetensors.torch import load_file
from tiny_mmict import processor, save_parts

STAGES = SmallOptions((2, 2, 2), image_size=16, patch=8, vision_width=16, width=16, queries=2, layers=2, vocabulary=100)
QUICK = ["--max_train", "40", "--max_test", "6", "--max_steps", "4", "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Small stages, few samples, hubs for --vision and --lm that are small too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmict.train, "STAGES", STAGES)
        patch.setattr(data, "SAMPLE", 80)
        patch.setattr(mmict.train, "MHubConfig", partial(MHubConfig, hidden=16, heads=2, intermediate=16))
        yield


@pytest.fixture(autouse=True)
def fast(trained, monkeypatch):
    """No pictures and short texts, but for the first command."""
    for name in ("plot_training", "plot_dialogs"):
        monkeypatch.setattr(mmict.train, name, lambda *args: None)
    monkeypatch.setattr(mmict.train, "judge", partial(mmict.train.judge, max_new_tokens=3))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """What the first command writes."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert app(["train", *QUICK, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    for kind in ("t5", "opt"):
        processor().lm_tokenizer.save_pretrained(str(folder / kind))
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """12 captions of pictures, of which 3 are to be judged on, in a file of their own words; one names its demonstrations."""
    folder = tmp_path_factory.mktemp("own")
    random, rows = np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        text = f"a {['red', 'blue'][i % 2]} cat" if i < 9 else f"secret{i} cat"
        rows.append({"image": f"{i}.png", "text": text, "id": f"s{i}", "split": "train" if i < 9 else "test"})
    rows[0]["demos"] = ["s3", "s4"]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "own.jsonl"


def last_checkpoint(folder):
    return load_file(max(folder.glob("checkpoint-*")) / "model.safetensors")


class TestSample:
    def test_stands_beside_the_arms_without_its_features(self, trained):
        metrics = json.loads((trained / "metrics.json").read_text())
        assert list(metrics) == ["ft", "ict", "mmict"]
        assert all({"nll", "token_f1", "exact_match", "cider_d"} <= set(found) for found in metrics.values())
        assert len({found["nll"] for found in metrics.values()}) == 3

    def test_draws_pictures(self, trained):
        for name in ("training.png", "dialogs.png"):
            assert imread(trained / name).std() > 0.02

    def test_all_arms_begin_with_one_model(self, trained):
        arms = {"mmict": trained, "ft": trained / "ft", "ict": trained / "ict"}
        models = {arm: MMICTModel.from_pretrained(folder) for arm, folder in arms.items()}
        assert {arm: (m.config.demonstration, m.config.guided) for arm, m in models.items()} == {
            "mmict": ("vt_text", True), "ft": ("none", False), "ict": ("visual+raw_text", False),
        }  # fmt: skip
        configs = {arm: json.loads((folder / "config.json").read_text()) for arm, folder in arms.items()}
        assert len({json.dumps(config["fingerprints"]) for config in configs.values()}) == 1
        assert not (trained / "ft" / "small").exists()

    def test_the_same_command_trains_no_more_and_another_one_is_refused(self, trained, capsys, monkeypatch):
        for trainer in (MMICTTrainer, StageTrainer):
            monkeypatch.setattr(trainer, "training_step", None)
        before = (trained / "model.safetensors").read_bytes()
        assert app(["train", *QUICK, "--output_dir", str(trained)]) == 0
        assert (trained / "model.safetensors").read_bytes() == before
        assert "dialogs.png" in capsys.readouterr().out
        assert app(["train", *QUICK, "--k", "3", "--output_dir", str(trained)]) == 2
        assert "k 2, now 3" in capsys.readouterr().err

    def test_questions(self, trained, tmp_path):
        flags = [
            *QUICK,
            "--init",
            str(trained),
            "--data",
            "sample-vqa",
            "--sampler",
            "mixed",
            "--compare",
            "False",
            "--vary_k",
            "--augment",
        ]
        assert app(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert set(metrics) == {"mmict"}
        assert "vqa_accuracy" in metrics["mmict"]


class TestOwnData:
    def test_after_a_stop_in_the_small_model_other_data_are_refused(self, own, tmp_path, capsys, monkeypatch):
        """Or its language model would have read what is a test sample now."""
        flags = [
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "3",
            "--eval_strategy",
            "epoch",
            "--output_dir",
            str(tmp_path / "run"),
        ]
        monkeypatch.setattr(StageTrainer, "training_step", interrupt(3, StageTrainer))
        assert app(["train", "--data", str(own), *flags]) == 130
        assert app(["train", "--data", str(own), "--max_train", "5", *flags]) == 2
        assert "holds a run with" in capsys.readouterr().err
        assert app(["train", "--data", str(own), *flags]) == 0
        assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == {"mmict"}
        known = MMICTModel.from_pretrained(tmp_path / "run").processor.lm_tokenizer.get_vocab()
        assert {"red", "blue", "cat"} <= set(known)
        assert not [word for word in known if word.startswith("secret")]


class TestOtherModels:
    @pytest.mark.parametrize("kind", ["t5", "opt"])
    def test_any_encoder_and_language_model(self, parts, kind, tmp_path):
        flags = [*QUICK, "--compare", "False", "--vision", str(parts / "vision"), "--lm", str(parts / kind)]
        flags += ["--queries", "3", "--layers", "2", "--gradient_checkpointing"]
        assert app(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 0
        found = MMICTModel.from_pretrained(tmp_path / "run")
        assert found.hub.query_tokens.shape == (1, 3, 16)
        assert found.processor.causal == (kind == "opt")

    def test_lora_from_a_checkpoint_goes_on_where_it_was_stopped(self, trained, tmp_path, monkeypatch, capsys):
        flags = ["train", *QUICK, "--init", str(trained), "--arm", "ict", "--lora_rank", "2", "--compare", "False"]
        flags += ["--save_strategy", "steps", "--save_steps", "1"]
        stopped, whole = tmp_path / "stopped", tmp_path / "whole"
        with monkeypatch.context() as patch:
            patch.setattr(MMICTTrainer, "training_step", interrupt(3, MMICTTrainer))
            assert app([*flags, "--output_dir", str(stopped)]) == 130
        assert "the same command goes on" in capsys.readouterr().err.splitlines()[-1]
        assert not (stopped / "model.safetensors").exists()
        for folder in (stopped, whole):
            assert app([*flags, "--output_dir", str(folder)]) == 0
        assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        weights = load_file(whole / "model.safetensors")
        assert any(".lora_B." in name and value.any() for name, value in weights.items())
        assert MMICTModel.from_pretrained(whole).config.demonstration == "visual+raw_text"


def interrupt(at, trainer):
    """A step of training that is stopped the at-th time."""
    step, count = trainer.training_step, 0

    def stop(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    return stop


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "x"], "arm must be one of ft, "),
        (["--sampler", "text"], "sampler 'text' compares questions"),
        (["--k", "9"], "must be 0 to 8; got 9"),
        (["--fp16"], "float16 overflows in T5"),
        (["--reduction", "sum"], "reduction must be one of token, dialog"),
        (["--init", "{parts}"], "{parts}"),
        (["--init", "{parts}/t5"], "{parts}/t5"),
        (["--vision", "{parts}/vision"], "--vision and --lm come together"),
        (["--vision", "{parts}/vision", "--lm", "{parts}/t5", "--init", "small"], "not both"),
        (["--vision", "{parts}/t5", "--lm", "{parts}/t5"], "is no vision model"),
        (["--data", "no.jsonl"], "no.jsonl"),
    ],
)
def test_wrong_input_is_one_line(flags, message, parts, trained, tmp_path, capsys):
    flags = [flag.format(parts=parts) for flag in flags]
    if not any(flag in ("--init", "--vision") for flag in flags):
        flags += ["--init", str(trained)]
    assert app(["train", *QUICK, "--compare", "False", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmict: ")]
    assert message.format(parts=parts) in line
