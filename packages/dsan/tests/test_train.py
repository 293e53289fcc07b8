"""The verb train, and what it says to wrong input."""

import json
import shutil

import numpy as np
import pytest
import torch
from dsan import DSAN, sample
from dsan import train as module
from dsan.cli import app
from dsan.data import DataOptions
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file

TINY = ["--widths", "4", "4", "8", "8", "--hidden", "4"]
QUICK = ["--max_steps", "4", "--validation", "8", "--per_device_train_batch_size", "16"]


@pytest.fixture(scope="module", autouse=True)
def few():
    """A sample that is drawn at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "TRAIN", 56)
        patch.setattr(sample, "TEST", 30)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command writes."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert command(folder, "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2") == 0
    return folder


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """24 crops of noise in a folder, without any to judge on."""
    folder = tmp_path_factory.mktemp("data") / "signs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (20, 50), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "gt.txt").write_text("".join(f"{i}.png\tSign{i}\n" for i in range(24)))
    return folder


def command(folder, *flags):
    return app(["train", *QUICK, *TINY, *flags, "--output_dir", str(folder)])


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


class TestSample:
    def test_judges_each_branch(self, trained):
        assert list(metrics(trained)) == ["ctx", "enh", "fuse"]
        assert all(found["words"] == 30 and 0 <= found["accuracy"] <= 1 for found in metrics(trained).values())

    def test_draws_pictures(self, trained):
        for name in ("training.png", "predictions.png"):
            assert imread(trained / name).std() > 0.02

    def test_leaves_a_network_that_can_be_loaded(self, trained):
        model = DSAN.from_pretrained(trained)
        assert model.context.blstm.lstms[0].hidden_size == 4
        (reading,) = model.read([np.zeros((32, 100), np.uint8)])
        assert isinstance(reading.text, str)
        checkpoint = load_file(trained / "checkpoint-4" / "model.safetensors")
        assert all(torch.equal(weight, checkpoint[name]) for name, weight in model.state_dict().items())

    def test_the_same_command_trains_no_more_and_another_one_is_refused(self, trained, capsys):
        flags = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]
        before, judged = (trained / "model.safetensors").read_bytes(), metrics(trained)
        assert command(trained, *flags) == 0
        assert (trained / "model.safetensors").read_bytes() == before
        assert metrics(trained) == judged
        assert command(trained, *flags, "--enhancement_weight", "0.5") == 2
        assert "holds a run with enhancement_weight 1.0, now 0.5" in capsys.readouterr().err

    def test_stopped_the_same_command_ends_as_if_it_had_not_been(self, trained, tmp_path):
        stopped = tmp_path / "run"
        shutil.copytree(trained, stopped, ignore=shutil.ignore_patterns("checkpoint-4", "metrics.json"))
        (stopped / "model.safetensors").unlink()
        assert command(stopped, "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2") == 0
        assert (stopped / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
        assert metrics(stopped) == metrics(trained)

    def test_has_steps_and_a_rate_of_its_own_unless_they_are_given(self, tmp_path, monkeypatch):
        seen = []

        def stop(model, splits, config, *record):
            seen.append({name: getattr(config, name) for name in module.SAMPLE})
            raise ValueError("enough")

        monkeypatch.setattr(module, "fit", stop)
        assert command(tmp_path) == command(tmp_path, "--learning_rate", "0.5") == 2
        assert seen == [module.SAMPLE, {**module.SAMPLE, "learning_rate": 0.5}]


@pytest.mark.parametrize(
    "flags",
    [
        ["--enhancement", "none", "--attention", "False"],
        ["--enhancement", "frame", "--mask_weight", "1"],
        ["--context", "attn", "--keep_ratio", "True"],
    ],
)
def test_other_networks(flags, tmp_path):
    assert command(tmp_path, *flags, "--max_steps", "2") == 0
    assert list(metrics(tmp_path)) == (["ctx", "enh", "fuse"] if "attn" in flags else ["ctx"])
    assert (DSAN.from_pretrained(tmp_path).attention is None) == ("none" in flags)


class TestOwnData:
    def test_is_told_and_trains_without_judging(self, crops, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        flags = ["--data", str(crops), "--max_steps", "2", "--validation", "4"]
        assert app(["train", *QUICK, *TINY, *flags]) == 0
        said = capsys.readouterr().out
        assert "24 crops, 24 kept" in said
        assert "24 labels lower-cased ('Sign0' is now 'sign0')" in said
        folder = tmp_path / "runs" / "dsan-signs"
        assert (folder / "training.png").exists()
        assert not (folder / "metrics.json").exists()

    def test_may_start_from_another_run(self, trained, crops, tmp_path):
        """A rate of 0 leaves its weights, not its statistics; the network is what that folder says."""
        flags = ["--data", str(crops), "--pretrained", str(trained), "--learning_rate", "0", "--max_steps", "2"]
        assert app(["train", *QUICK, *flags, "--output_dir", str(tmp_path)]) == 0
        before, after = DSAN.from_pretrained(trained), DSAN.from_pretrained(tmp_path)
        assert all(map(torch.equal, before.parameters(), after.parameters()))
        assert not torch.equal(before.backbone.stem[1].running_mean, after.backbone.stem[1].running_mean)


@pytest.mark.parametrize(
    ("data", "name"), [(["a/my words.zip", "b"], "my-words"), (["set/"], "set"), (["/"], "data"), ([], "synthetic")]
)
def test_a_run_is_named_by_its_data(data, name):
    assert module.name_of(DataOptions(data, synthetic=1)) == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "no/such"], "no/such"),
        (["--backbone", "x"], "backbone must be one of tiny, base, vgg or timm/NAME; got 'x'"),
        (["--widths", "4"], "takes 4 width(s), got 1"),
        (["--enhancement", "x"], "enhancement must be one of ctc, attn, frame or None; got 'x'"),
        (["--pretrained", "no/such"], "no/such"),
        (["--optimizer", "sgd"], "optimizer must be adamw or adadelta"),
        (["--attention", "False", "--mask_weight", "1"], "mask_weight needs text attention"),
        (["--width", "16"], "frames"),
        (["--context", "attn", "--max_length", "2"], "the attention decoder has room for 2"),
        (["--per_device_train_batch_size", "49"], "48 crops are fewer than the 49 of a step"),
        (["--data", "{crops}", "--mask_weight", "1"], "no boxes of characters"),
        (["--validation", "56"], "holds out all 56 training crops"),
    ],
)
def test_wrong_input_is_one_line(flags, message, crops, tmp_path, capsys):
    assert command(tmp_path / "run", *(flag.format(crops=crops) for flag in flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsan: ")]
    assert message in line
