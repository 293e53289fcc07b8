"""The verbs pretrain-teacher and train, and what they say to wrong input."""

import json
import signal

import numpy as np
import pytest
import torch
from disco import Encoder, load_teacher
from disco.cli import app
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file

QUICK = ["--max_train", "128", "--max_test", "40", "--max_steps", "4", "--per_device_train_batch_size", "32"]
TINY = ["--student", "cnn:4-8", "--hidden", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command writes."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert app(["train", *QUICK, *TINY, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder that was not trained, which the verbs need not know."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    Encoder("cnn:8-16", hidden=-1, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 pictures in a folder, without labels."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def moco_checkpoint(path, teacher, keys, pointer=5):
    """The teacher of a folder as MoCo's program saves it."""
    encoder = Encoder.from_pretrained(teacher)
    weights = {f"module.encoder_q.{name.removeprefix('backbone.')}": v for name, v in encoder.state_dict().items()}
    weights = {name.replace("encoder_q.head.", "encoder_q.fc."): v for name, v in weights.items()}
    weights |= {name.replace("encoder_q", "encoder_k"): v for name, v in weights.items()}
    queue = torch.nn.functional.normalize(torch.randn(128, keys), dim=0)
    weights |= {"module.queue": queue, "module.queue_ptr": torch.tensor([pointer])}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": weights}, path)
    return queue


def last_checkpoint(folder):
    return load_file(max(folder.glob("checkpoint-*")) / "model.safetensors")


class TestSample:
    def test_compares_teacher_random_alone_and_disco(self, trained):
        metrics = json.loads((trained / "metrics.json").read_text())
        assert set(metrics) == {"random", "teacher", "MoCo-v2", "disco"}
        assert all(0 <= m["knn_20"] <= 100 and 0 <= m["linear_top1"] <= 100 for m in metrics.values())
        assert len({json.dumps(m) for m in metrics.values()}) > 1

    def test_draws_pictures(self, trained):
        for name in ("training.png", "neighbours.png"):
            assert imread(trained / name).std() > 0.02

    def test_leaves_networks_that_can_be_loaded(self, trained):
        student, teacher = Encoder.from_pretrained(trained), load_teacher(trained / "teacher")
        assert (student.backbone_name, student.dim, teacher.dim) == ("cnn:4-8", 128, 128)
        assert (student.mean, student.image_size) == (teacher.mean, 16)
        assert not torch.equal(student.head[0].weight, Encoder.from_pretrained(trained / "moco").head[0].weight)

    def test_a_checkpoint_holds_the_students_state_without_the_teacher(self, trained):
        weights = last_checkpoint(trained)
        assert {name.split(".")[0] for name in weights} == {"student", "key", "loss"}
        assert torch.equal(weights["student.head.0.weight"], Encoder.from_pretrained(trained).head[0].weight)

    def test_both_students_start_with_the_same_weights_and_see_the_same_views(self, trained):
        """With the first step's views and the same student the contrast is the same, whatever the teacher says."""
        first = [
            json.loads((max(folder.glob("checkpoint-*")) / "trainer_state.json").read_text())["log_history"][0]
            for folder in (trained, trained / "moco")
        ]
        assert first[0]["contrast"] == pytest.approx(first[1]["contrast"], rel=1e-6)
        assert first[0]["loss"] > first[1]["loss"]

    def test_the_same_command_trains_no_more_and_another_one_is_refused(self, trained, capsys):
        before = (trained / "model.safetensors").read_bytes()
        assert app(["train", *QUICK, *TINY, "--output_dir", str(trained)]) == 0
        assert (trained / "model.safetensors").read_bytes() == before
        assert "loss may rise at first" in capsys.readouterr().out
        assert app(["train", *QUICK, *TINY, "--temperature", "0.3", "--output_dir", str(trained)]) == 2
        assert "temperature None, now 0.3" in capsys.readouterr().err


class TestOwnData:
    def test_images_without_labels_train_and_nothing_is_judged(self, photos, teacher, tmp_path, capsys):
        folder = tmp_path / "run"
        flags = ["--data", str(photos), "--teacher", str(teacher), *TINY, "--num_train_epochs", "2"]
        assert app(["train", *flags, "--per_device_train_batch_size", "16", "--output_dir", str(folder)]) == 0
        assert "no labels or no test images: nothing is judged" in capsys.readouterr().out
        assert Encoder.from_pretrained(folder).mean == pytest.approx((0.5,) * 3)
        assert (folder / "training.png").exists()
        assert not (folder / "metrics.json").exists()

    def test_a_few_labelled_images_are_judged_by_what_they_allow(self, teacher, tmp_path):
        rng = np.random.default_rng(0)
        arrays = {}
        for part, count in (("", 12), ("test_", 4)):
            arrays[f"{part}images"] = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
            arrays[f"{part}labels"] = np.arange(count) % 2
        np.savez(tmp_path / "few.npz", **arrays)
        flags = ["--data", str(tmp_path / "few.npz"), "--teacher", str(teacher), *TINY, "--max_steps", "2"]
        assert app(["train", *flags, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "run")]) == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert all(set(m) == {"knn_10", "linear_top1"} for m in metrics.values())

    def test_moco_takes_no_teacher(self, photos, tmp_path):
        flags = [
            "--data",
            str(photos),
            "--arm",
            "moco",
            *TINY,
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "16",
        ]
        assert app(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 0

    def test_fixed_views_keep_the_teachers_embeddings(self, teacher, tmp_path):
        flags = ["train", *QUICK, *TINY, "--teacher", str(teacher), "--compare", "False", "--fixed_views", "3"]
        assert app([*flags, "--output_dir", str(tmp_path / "run")]) == 0
        kept = load_file(tmp_path / "run" / "teacher-views.safetensors")["embeddings"]
        assert kept.shape == (3, 128, 128)


class TestTeachersQueue:
    def test_is_read_from_a_moco_checkpoint(self, teacher, tmp_path):
        queue = moco_checkpoint(tmp_path / "moco.pth.tar", teacher, keys=128)
        flags = [
            *QUICK,
            *TINY,
            "--max_steps",
            "2",
            "--image_size",
            "16",
            "--compare",
            "False",
            "--teacher_backbone",
            "cnn:8-16",
        ]
        flags += ["--teacher", str(tmp_path / "moco.pth.tar"), "--queue_init", "teacher", "--queue_size", "128"]
        assert app(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 0
        weights = last_checkpoint(tmp_path / "run")
        assert int(weights["loss.contrast.queue.pointer"]) == 69
        kept = torch.isclose(weights["loss.contrast.queue.keys"], queue.T).all(1)
        assert kept.tolist() == [not 5 <= place < 69 for place in range(128)]

    def test_must_have_the_students_size(self, teacher, tmp_path, capsys):
        moco_checkpoint(tmp_path / "moco.pth", teacher, keys=96)
        flags = [*QUICK, *TINY, "--compare", "False", "--teacher_backbone", "cnn:8-16", "--queue_init", "teacher"]
        flags += ["--teacher", str(tmp_path / "moco.pth"), "--output_dir", str(tmp_path / "run")]
        assert app(["train", *flags]) == 2
        assert "give --queue_size 96" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{photos}"], "give --student, such as"),
        (["--data", "{photos}", *TINY], "give --teacher: pre-train one with `disco pretrain-teacher`"),
        (["--teacher", "no/such/teacher"], "no/such/teacher: no such file or folder"),
        (["--teacher", "{photos}"], "no config.json"),
        (["--teacher_backbone", "resnet50"], "teacher_backbone is of a --teacher"),
        (["--arm", "x"], "arm must be one of disco, moco"),
        (["--student", "resnet1000", "--teacher", "{teacher}"], "resnet1000"),
        (["--temperature", "0", "--teacher", "{teacher}"], "temperature must be positive"),
        (["--key_momentum", "2", "--teacher", "{teacher}"], "momentum must be between 0 and 1, got 2"),
        (["--distill_weight", "-1", "--teacher", "{teacher}"], "weights must be at least 0"),
        (["--distill_reduction", "max", "--teacher", "{teacher}"], "distill_reduction must be one of mean, sum"),
        (["--queue_size", "0", "--teacher", "{teacher}"], "at least 1, got 0"),
        (["--queue_size", "16", "--teacher", "{teacher}"], "do not fit a memory bank of 16"),
        (["--queue_init", "teacher"], "queue_init teacher needs a --teacher checkpoint"),
        (["--queue_init", "teacher", "--teacher", "{teacher}"], "queue_init teacher needs a --teacher checkpoint"),
        (["--fixed_views", "1", "--teacher", "{teacher}"], "at least 2 for each image, got 1"),
        (
            ["--per_device_train_batch_size", "200", "--teacher", "{teacher}"],
            "128 images are fewer than the 200 of a step",
        ),
    ],
)
def test_wrong_input_is_one_line(flags, message, photos, teacher, tmp_path, capsys):
    flags = [flag.format(photos=photos, teacher=teacher) for flag in flags]
    assert app(["train", *QUICK, "--compare", "False", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("disco: ")]
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{photos}"], "give --backbone"),
        (["--queue_init", "teacher"], "queue_init teacher needs a --teacher"),
    ],
)
def test_wrong_input_for_a_teacher_is_one_line(flags, message, photos, tmp_path, capsys):
    flags = [flag.format(photos=photos) for flag in flags]
    assert app(["pretrain-teacher", *QUICK, *flags, "--output_dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_of_another_width_decides_the_students(tmp_path):
    """A folder's teacher of width 8 has students of width 8: there is nothing to set wrongly."""
    torch.manual_seed(0)
    Encoder("cnn:4-8", dim=8, hidden=16, image_size=16).save_pretrained(tmp_path / "teacher")
    flags = [*QUICK, *TINY, "--teacher", str(tmp_path / "teacher"), "--compare", "False"]
    assert app(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert Encoder.from_pretrained(tmp_path / "run").dim == 8


def test_interrupted_the_same_command_ends_as_if_it_had_not_been(teacher, launch, tmp_path):
    flags = ["train", "--teacher", str(teacher), *TINY, "--compare", "False", "--max_train", "256", "--max_test", "40"]
    flags += ["--per_device_train_batch_size", "32", "--num_train_epochs", "5", "--save_strategy", "steps"]
    flags += ["--save_steps", "1"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    running = launch("disco.cli", [*flags, "--output_dir", stopped])
    code, error = running.wait_for(stopped, "trainer_state.json").end(signal.SIGINT)
    assert code == 130
    assert "the same command goes on" in error.splitlines()[-1]
    assert not (stopped / "model.safetensors").exists()
    for folder in (stopped, whole):
        assert app([*flags, "--output_dir", str(folder)]) == 0
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ours, theirs = last_checkpoint(stopped), last_checkpoint(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
