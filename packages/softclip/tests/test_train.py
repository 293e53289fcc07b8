"""The verb train, and what it says to wrong input."""

import json
import signal

import numpy as np
import open_clip
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file
from softclip.checkpoints import load_roi, new_clip, save_clip
from softclip.cli import app
from softclip.data import DataOptions
from softclip.guidance import GuideOptions
from softclip.train import ModelOptions, name_of, new_network, suited
from softclip.trainer import SoftClipConfig

QUICK = ["--max_steps", "4", "--per_device_train_batch_size", "16", "--disable_tqdm", "True"]
WEIGHTS = "open_clip_model.safetensors"
COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown", "gold", "navy"]


@pytest.fixture(scope="module", autouse=True)
def _few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softclip.data.SAMPLE_TRAIN", 64)
        patch.setattr("softclip.data.SAMPLE_TEST", 20)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command writes."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert app(["train", *QUICK, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Pictures of colours with captions and tags, some to train on and some to judge by."""
    folder = tmp_path_factory.mktemp("table")
    noise = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 10)):
        rows = ["filepath\ttitle\twords"]
        for i in range(count):
            colour = COLOURS[i % len(COLOURS)]
            picture = Image.new("RGB", (40, 32), colour)
            Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "patch.png")
            picture.paste(Image.open(folder / "patch.png"), (4, 4))
            picture.save(folder / f"{part}{i}.png")
            rows.append(f"{part}{i}.png\ta picture of {colour}\t{colour};patch")
        (folder / f"{part}.csv").write_text("\n".join(rows) + "\n")
    return folder


def from_table(table, *flags):
    data = ["--data", str(table / "train.csv"), "--test", str(table / "test.csv"), "--clip", "tiny-vit"]
    return ["train", *data, *QUICK, *flags]


class TestSample:
    def test_compares_clip_with_the_method(self, trained):
        metrics = json.loads((trained / "metrics.json").read_text())
        assert list(metrics) == ["clip", "soft_re"]
        assert all(0 <= value <= 100 for figures in metrics.values() for value in figures.values())
        assert {"map", "zero_shot_top1", "text_retrieval_recall@1"} < metrics["clip"].keys()
        assert metrics["clip"] != metrics["soft_re"]

    def test_draws_pictures(self, trained):
        for name in ("training.png", "targets.png"):
            assert imread(trained / name).std() > 0.05

    def test_leaves_a_folder_that_open_clip_loads(self, trained):
        clip = open_clip.create_model(f"local-dir:{trained}")
        weights = load_file(trained / WEIGHTS)
        assert clip.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in clip.state_dict().items())
        assert load_roi(trained, clip.visual) is not None
        assert load_roi(trained / "clip", clip.visual) is None

    def test_both_arms_start_with_the_same_weights(self, trained):
        """After four steps of Adam their weights are near each other."""
        moved = [
            load_file(folder / WEIGHTS)["visual.attnpool.positional_embedding"]
            for folder in (trained, trained / "clip")
        ]
        assert not torch.equal(*moved)
        torch.testing.assert_close(*moved, atol=8e-3, rtol=0)  # 4 steps of Adam each; others differ by 0.06

    def test_the_same_command_trains_no_more_and_another_one_is_refused(self, trained, capsys):
        before = (trained / WEIGHTS).read_bytes()
        assert app(["train", *QUICK, "--output_dir", str(trained)]) == 0
        assert (trained / WEIGHTS).read_bytes() == before
        assert "20 test pairs, percent" in " ".join(capsys.readouterr().out.split())
        assert app(["train", *QUICK, "--beta", "0.5", "--output_dir", str(trained)]) == 2
        assert "beta 0.3, now 0.5" in capsys.readouterr().err


class TestOwnData:
    def test_a_table_from_training_to_judgement(self, table, tmp_path):
        run = tmp_path / "run"
        assert app([*from_table(table, "--roi", "thumbnails", "--tags_field", "words"), "--output_dir", str(run)]) == 0
        metrics = json.loads((run / "metrics.json").read_text())
        assert list(metrics) == ["soft_re"]
        assert (run / "targets.png").exists()
        data = ["--data", str(table / "train.csv"), "--test", str(table / "test.csv")]
        assert app(["eval", "--model", str(run), *data]) == 0
        (path,) = run.glob("eval-*/metrics.json")
        assert json.loads(path.read_text())["metrics"] == pytest.approx(metrics["soft_re"])

    def test_without_regions_and_tests_images_guide_themselves(self, table, tmp_path):
        flags = ["train", "--data", str(table / "train.csv"), *QUICK, "--arm", "soft_self", "--clip", "tiny-vit"]
        assert app([*flags, "--output_dir", str(tmp_path)]) == 0
        assert (tmp_path / "targets.png").exists()
        assert not (tmp_path / "metrics.json").exists()
        assert not (tmp_path / "roi_encoder.safetensors").exists()

    def test_goes_on_from_a_folder(self, table, tmp_path):
        save_clip(tmp_path / "start", *new_clip("tiny-resnet", seed=5))
        flags = ["train", "--data", str(table / "train.csv"), *QUICK, "--arm", "clip", "--learning_rate", "0"]
        assert app([*flags, "--pretrained", str(tmp_path / "start"), "--output_dir", str(tmp_path / "run")]) == 0
        before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("start", "run"))
        assert torch.equal(before["visual.conv1.weight"], after["visual.conv1.weight"])
        assert not (tmp_path / "run" / "targets.png").exists()

    def test_regions_that_no_target_is_made_of_are_encoded_and_no_targets_drawn(self, table, tmp_path):
        flags = from_table(table, "--roi", "thumbnails", "--tags_field", "words", "--arm", "clip_roitag")
        assert app([*flags, "--output_dir", str(tmp_path)]) == 0
        assert (tmp_path / "roi_encoder.safetensors").exists()
        assert not (tmp_path / "targets.png").exists()

    def test_frozen_guides(self, table, tmp_path):
        flags = from_table(table, "--roi", "thumbnails", "--tags_field", "words", "--guides", "frozen")
        assert app([*flags, "--roi_tag_weight", "0", "--output_dir", str(tmp_path)]) == 0
        assert not (tmp_path / "roi_encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{table}/train.csv"], "give --clip, such as RN50"),
        (["--data", "{table}/train.csv", "--clip", "tiny-vit"], "say what they are by --roi, or take --arm soft_self"),
        (["--data", "{table}/train.csv", "--clip", "tiny-vit", "--roi", "thumbnails"], "name them by --tags_field"),
        (["--data", "no/such.csv", "--clip", "tiny-vit"], "no/such.csv"),
        (["--clip", "x"], "model 'x' is unknown"),
        (["--clip", "tiny-vit", "--pretrained", "x:y"], "leave out --clip and --image_size"),
        (["--pretrained", "x:y", "--image_size", "64"], "leave out --clip and --image_size"),
        (["--arm", "x"], "arm must be one of soft_re"),
        (["--guides", "x"], "guides must be trained or frozen"),
        (["--crop", "0"], "crop is a share of the area"),
        (["--gradient_accumulation_steps", "2"], "--micro_batch_size"),
        (["--micro_batch_size", "4", "--compare", "False"], "take a ViT tower"),
        (["--roi_tag_weight", "0", "--compare", "False"], "roi_tag_weight 0 leaves the encoder of regions"),
        (["--per_device_train_batch_size", "100"], "64 pairs are fewer than the 100 of a step"),
        (["--tags_field", "x"], "data sample brings its own tags"),
        (["--lamb", "1"], "'--lam"),
    ],
)
def test_wrong_input_is_one_line(flags, message, table, tmp_path, capsys):
    flags = [flag.format(table=table) for flag in flags]
    assert app(["train", *QUICK, *flags, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("softclip: ")]
    assert message in line


class TestParts:
    def test_what_suits_the_sample_yields_to_what_is_given(self, tmp_path):
        config = SoftClipConfig(output_dir=str(tmp_path), learning_rate=0.5)
        guides, own = suited(DataOptions(), GuideOptions(), config)
        assert (guides.roi, own.learning_rate, own.num_train_epochs, own.per_device_train_batch_size) == (
            "thumbnails", 0.5, 12, 64,
        )  # fmt: skip
        assert suited(DataOptions(), GuideOptions("field"), config)[0].roi == "field"
        guides, own = suited(DataOptions("emoji"), GuideOptions(), config)
        assert (guides.roi, own) == ("thumbnails", config)
        assert suited(DataOptions("x.csv"), GuideOptions(), config)[0].roi is None

    def test_networks_of_a_seed_are_alike(self):
        first, again, other = (new_network(ModelOptions("tiny-vit", image_size=64), seed) for seed in (0, 0, 1))
        assert first.clip.visual.image_size in (64, (64, 64))
        assert torch.equal(first.clip.visual.conv1.weight, again.clip.visual.conv1.weight)
        assert not torch.equal(first.clip.visual.conv1.weight, other.clip.visual.conv1.weight)
        assert first.tokenizer(["a"]).shape == (1, 16)

    @pytest.mark.parametrize(
        ("data", "name"),
        [
            ("sample", "sample"),
            ("a/b.tsv", "b"),
            ("a/pairs/", "pairs"),
            ("a/b-*.tar", "b"),
            ("b-{0000..0003}.tar", "b-0000"),
        ],
    )
    def test_a_run_is_named_after_its_data(self, data, name):
        assert name_of(DataOptions(data)) == name


def test_interrupted_the_same_command_ends_as_if_it_had_not_been(table, launch, tmp_path):
    flags = from_table(table, "--arm", "soft_self", "--save_strategy", "steps", "--save_steps", "1")
    flags[flags.index("--max_steps") + 1] = "6"
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    running = launch("softclip.cli", [*flags, "--output_dir", stopped])
    code, error = running.wait_for(stopped, "trainer_state.json").end(signal.SIGINT)
    assert code == 130
    assert "the same command goes on" in error.splitlines()[-1]
    assert not (stopped / WEIGHTS).exists()
    for folder in (stopped, whole):
        assert app([*flags, "--output_dir", str(folder)]) == 0
    assert (stopped / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
