"""The verb train, end to end on a stand-in for the sample."""

import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from iqa_distill import train as module
from iqa_distill.cli import app
from iqa_distill.data import DataOptions, load_ratings
from iqa_distill.model import RKIQT
from iqa_distill.train import ModelOptions, bias_teachers, new_student
from iqa_distill.trainer import IQAConfig
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sample import ratings, references, stand_in

QUICK = ["--crop_size", "32", "--crops", "2", "--max_steps", "3", "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module", autouse=True)
def sample():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command leaves."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert app(["train", *QUICK, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The stand-in as files."""
    folder, rated = tmp_path_factory.mktemp("own"), ratings()
    for name, image in references().items():
        (folder / "pristine").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "pristine" / f"{name}.png")
    for i, name in enumerate(rated.names):
        Image.fromarray(rated.open(i)).save(folder / f"{name}.png")
    table = {"image": [f"{name}.png" for name in rated.names], "mos": rated.scores, "reference": rated.references}
    pd.DataFrame(table).to_csv(folder / "scores.csv", index=False)
    return folder


def last_checkpoint(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def first_log(folder):
    return json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())["log_history"][0]


class TestSample:
    def test_judges_the_test_images(self, trained):
        metrics = json.loads((trained / "metrics.json").read_text())
        assert {"srcc", "krcc", "plcc", "plcc_fitted", "rmse_fitted"} <= set(metrics)
        for name in ("training.png", "test.png"):
            assert imread(trained / name).std() > 0.02

    def test_leaves_a_student_that_knows_crops_and_units(self, trained):
        student = RKIQT.from_pretrained(trained)
        assert (student.preprocessing.crop_size, student.preprocessing.crops) == (32, 2)
        assert (student.scale.low, student.scale.high) == (0, 100)
        assert 20 < student.scale.mean < 80

    def test_teachers_lie_beside_it_and_in_no_checkpoint(self, trained):
        assert json.loads((trained / "teacher" / "config.json").read_text())["crop_size"] == 32
        assert [(trained / kind / "model.safetensors").exists() for kind in ("conv", "inv")] == [True, True]
        weights = load_file(last_checkpoint(trained) / "model.safetensors")
        assert {name.split(".")[0] for name in weights} == {"network", "mcd", "reg"}
        assert torch.equal(weights["network.tokens"], RKIQT.from_pretrained(trained).tokens)

    def test_a_weak_teacher_is_told(self, tmp_path, trained, capsys):
        place = tmp_path / "teacher"
        place.mkdir()
        for name in ("config.json", "model.safetensors"):
            (place / name).write_bytes((trained / "teacher" / name).read_bytes())
        (place / "teacher.json").write_text(json.dumps({"held_out_srcc": 0.41, "ids": []}))
        words = ["train", *QUICK, "--arm", "mcd", "--teacher", str(place), "--output_dir", str(tmp_path / "run")]
        assert app(words) == 0
        assert "SRCC on held-out images is 0.41; below 0.7 nothing can be concluded" in capsys.readouterr().out
        assert not (tmp_path / "run" / "teacher").exists()

    def test_the_same_command_trains_no_more_and_another_one_is_refused(self, trained, capsys):
        before = (trained / "model.safetensors").read_bytes()
        assert app(["train", *QUICK, "--output_dir", str(trained)]) == 0
        assert (trained / "model.safetensors").read_bytes() == before
        assert app(["train", *QUICK, "--mask_ratio", "0.3", "--output_dir", str(trained)]) == 2
        assert "mask_ratio 0.5, now 0.3" in capsys.readouterr().err

    @pytest.mark.parametrize(("arm", "terms"), [("base", set()), ("reg", {"reg"}), ("drd", {"mcd"})])
    def test_arms_differ_in_their_terms_and_share_all_else(self, trained, arm, terms, tmp_path):
        words = ["--arm", arm, "--teacher", str(trained / "teacher")]
        assert app(["train", *QUICK, *words, "--output_dir", str(tmp_path)]) == 0
        row, full = first_log(tmp_path), first_log(trained)
        assert {"mcd", "reg"} & set(row) == terms
        assert {"score", "mcd", "reg"} <= set(full)
        assert row["score"] == pytest.approx(full["score"], rel=1e-6)
        names = {
            name.split(".")[1] for name in load_file(last_checkpoint(tmp_path) / "model.safetensors") if "mcd" in name
        }
        assert names == ({"align"} if arm == "drd" else set())


class TestOwnData:
    def test_trains_with_pristine_images_of_ones_own(self, own, trained, tmp_path, capsys):
        words = [
            "--data",
            str(own / "scores.csv"),
            "--references",
            str(own / "pristine"),
            "--teacher",
            str(trained / "teacher"),
        ]
        words += [
            "--validation",
            "0.2",
            "--select",
            "val",
            "--loss",
            "smooth_l1",
            "--arm",
            "mcd",
            "--num_train_epochs",
            "1",
            "--mcd_blocks",
            "0",
            "2",
        ]
        words += [*QUICK[:4], *QUICK[6:], "--step_schedule", "False", "--lr_scheduler_type", "constant"]
        assert app(["train", *words, "--output_dir", str(tmp_path)]) == 0
        state = json.loads((last_checkpoint(tmp_path) / "trainer_state.json").read_text())
        assert "eval_srcc" in state["log_history"][-1]
        assert np.isfinite(state["best_metric"])

    def test_a_teacher_that_saw_a_test_image_is_refused(self, own, trained, tmp_path, capsys):
        table = pd.read_csv(own / "scores.csv")
        record = json.loads((trained / "teacher" / "teacher.json").read_text())
        table["split"] = ["test" if "picture 1" in name else "train" for name in table["image"]]
        table.to_csv(own / "split.csv", index=False)
        seen = load_ratings(DataOptions(data=str(own / "split.csv"))).test.ids[0]
        (tmp_path / "teacher").mkdir()
        (tmp_path / "teacher" / "teacher.json").write_text(json.dumps({**record, "ids": [*record["ids"], seen]}))
        words = [
            "--data",
            str(own / "split.csv"),
            "--references",
            str(own / "pristine"),
            "--teacher",
            str(tmp_path / "teacher"),
        ]
        assert app(["train", *QUICK, *words, "--output_dir", str(tmp_path / "run")]) == 2
        assert "1 of 6 test images were trained on by a teacher" in capsys.readouterr().err


class TestPretrained:
    def test_weights_go_into_each_network(self, tmp_path):
        """Those of timm's, with a classifier that is not used."""
        student = RKIQT("tiny", crop_size=32)
        save_file({name: value + 1 for name, value in student.vit.state_dict().items()}, tmp_path / "vit.safetensors")
        data = DataOptions(crop_size=32, crops=2)
        splits = load_ratings(data)
        new = new_student(ModelOptions(weights=str(tmp_path / "vit.safetensors")), data, splits, 0)
        assert new.vit.cls_token.mean() > 0.9
        import timm

        name = "mobilenetv3_small_050"
        weights = timm.create_model(name).state_dict()
        save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "conv.safetensors")
        config = IQAConfig(output_dir=str(tmp_path / "bias"), max_steps=1, learning_rate=0.0, disable_tqdm=True)
        options = ModelOptions(conv_teacher=name, conv_weights=str(tmp_path / "conv.safetensors"))
        conv = bias_teachers(tmp_path / "bias", options, new, splits, config)["conv"]
        assert torch.equal(conv.trunk.model.conv_stem.weight, weights["conv_stem.weight"])

    def test_a_larger_student_has_a_teacher_of_its_crops(self, tmp_path, monkeypatch):
        seen = []

        def stop(pool, data, options, config):
            seen.append(data.crop_size)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "teach_by_gmsd", stop)
        assert app(["train", "--backbone", "vit_tiny_patch16_224", "--output_dir", str(tmp_path)]) == 130
        assert seen == [224]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{own}/scores.csv"], "give --teacher: train one with `iqa-distill teacher`"),
        (["--data", "{own}/none.csv", "--arm", "base"], "none.csv"),
        (
            ["--data", "{own}/alone.csv", "--teacher", "{own}"],
            "has no pristine images to compare with: give --references",
        ),
        (["--teacher", "{own}/nowhere"], "nowhere"),
        (["--backbone", "resnet1000"], "'resnet1000'"),
        (["--crop_size", "40"], "must be a multiple of the patch, 16"),
        (["--arm", "both"], "arm must be full, base, reg, mcd or drd"),
        (["--mask_ratio", "1"], "in [0, 1), got 1"),
        (["--select", "val", "--arm", "base"], "select val needs validation images"),
        (["--arm", "base", "--weights", "{own}/no.pth"], "no such file"),
        (["--arm", "reg", "--inv_teacher", "resnet50"], "an involution backbone must be one of tiny"),
        (["--arm", "base", "--per_device_train_batch_size", "999"], "fewer than the 999 of a step"),
    ],
)
def test_wrong_input_is_one_line(words, message, own, tmp_path, capsys):
    pd.read_csv(own / "scores.csv").drop(columns="reference").to_csv(own / "alone.csv", index=False)
    words = [word.format(own=own) for word in words]
    assert app(["train", *QUICK, *words, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("iqa-distill: ")]
    assert message in line


def test_interrupted_the_same_command_ends_as_if_it_had_not_been(launch, tmp_path):
    words = ["train", *QUICK, "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "1", "--arm", "base"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    running = launch("tiny_sample", [*words, "--output_dir", stopped])
    code, error = running.wait_for(stopped, "trainer_state.json").end(signal.SIGINT)
    assert code == 130
    assert "the same command goes on" in error.splitlines()[-1]
    assert not (stopped / "model.safetensors").exists()
    for folder in (stopped, whole):
        assert app([*words, "--output_dir", str(folder)]) == 0
    ours, theirs = (load_file(last_checkpoint(folder) / "model.safetensors") for folder in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (stopped / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
