import json

import disco.evaluate
import disco.linear
import numpy as np
import pytest
import torch
from disco.augment import Augmentation
from disco.data import DataOptions, Images, Splits, load_data
from disco.encoder import Encoder
from disco.evaluate import (
    EvalOptions,
    evaluate,
    evaluate_checkpoint,
    evaluation_view,
    extract_features,
    labelled_share,
    linear_evaluation,
)
from disco.images import Undecoded
from disco.knn import knn_accuracy
from disco.linear import Protocol, linear_probe
from disco.readers import read
from papercore.lab.cli import App, parse
from PIL import Image
from torch import nn

SHORT = Protocol(epochs=2, learning_rate=1.0, batch_size=64)


def encoder(size=16, seed=0, widths="8-16-32"):
    torch.manual_seed(seed)
    return Encoder(f"cnn:{widths}", dim=8, hidden=16, image_size=size)


def settled(images):
    """An encoder whose running statistics are as after a training on these images: features of unit size."""
    model = encoder().train()
    with torch.no_grad():
        for _ in range(50):
            model.backbone(model.normalize(images.pixels))
    return model


def noise(n=10, side=16, classes=2, seed=0):
    pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(pixels, torch.arange(n) % classes, tuple(map(str, range(classes))))


@pytest.fixture(scope="module")
def digits():
    return load_data(DataOptions(max_train=500))


def photo(side):
    """Smooth, with sharp edges: colour gradients, and a square."""
    ramp = torch.linspace(0, 255, side)
    pixels = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), (ramp + ramp[:, None]) / 2])
    pixels[:, side // 4 : side // 2, side // 3 : side // 2] = torch.tensor([255.0, 0, 90])[:, None, None]
    return pixels.round().to(torch.uint8)[None]


def pil(images, size, how):
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((size, size), how)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


# Views and features


def test_smaller_images_are_enlarged_bicubically():
    images = photo(32)
    view = evaluation_view(images, 224)
    assert view.dtype == torch.uint8
    assert (view.int() - pil(images, 224, Image.Resampling.BICUBIC).int()).abs().max() <= 1


def test_larger_images_are_resized_to_256_of_224_and_their_centre_is_kept():
    images = photo(300)
    expected = pil(images, 256, Image.Resampling.BILINEAR)[..., 16:240, 16:240]
    assert (evaluation_view(images, 224).int() - expected.int()).abs().max() <= 1
    assert evaluation_view(photo(40), 32).shape == (1, 3, 32, 32)


def test_images_of_the_size_are_left_alone():
    images = photo(32)
    assert evaluation_view(images, 32) is images


@pytest.mark.parametrize("side", [8, 16, 24])
def test_features_are_the_backbones_of_each_image_alone(side):
    model, images = encoder().eval(), noise(side=side)
    with torch.no_grad():
        alone = [model.backbone(model.normalize(evaluation_view(image[None], 16))) for image in images.pixels]
    for batch_size in (1, 3, 256):
        features = extract_features(model, images, batch_size)
        torch.testing.assert_close(features, torch.cat(alone))
    assert features.dtype == torch.float32
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3  # not normalised
    assert not features.is_inference()
    assert not features.requires_grad


def test_modules_come_back_in_their_modes():
    model = encoder().train()
    model.backbone[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract_features(model, noise())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(IndexError):
        extract_features(model, Broken(noise().pixels))
    assert [module.training for module in model.modules()] == modes


class Broken(Images):
    def __getitems__(self, indices):
        raise IndexError("broken")


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract_features(encoder(), noise(), 0)


def test_autocast_is_where_the_device_is_fast_at_it(monkeypatch):
    exact = extract_features(encoder(), noise())
    monkeypatch.setattr(disco.evaluate, "autocast_dtype", lambda device: torch.bfloat16)
    half = extract_features(encoder(), noise(), autocast=True)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.equal(extract_features(encoder(), noise()), exact)
    monkeypatch.setattr(disco.evaluate, "autocast_dtype", lambda device: torch.float32)
    assert torch.equal(extract_features(encoder(), noise(), autocast=True), exact)


def test_images_that_are_not_in_memory_give_the_same_features(digits, monkeypatch):
    pictures = read("sample")[1].select(range(40))
    lazy = Images(Undecoded(pictures, 16), pictures.label_tensor, pictures.classes)
    monkeypatch.setattr(disco.evaluate.os, "cpu_count", lambda: 2)
    features = extract_features(encoder(), lazy, batch_size=16)
    torch.testing.assert_close(features, extract_features(encoder(), digits.test.select(range(40))))


# Linear evaluation


class Spy(nn.Module):
    """A backbone that remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen, self.modes = [], []

    def forward(self, images):
        self.seen.append(images.clone())
        self.modes.append(self.training)
        return self.scale * images.mean((2, 3))


@pytest.mark.parametrize("side", [12, 16, 24])
def test_each_epoch_has_new_crops_of_the_frozen_backbones_training_images(side):
    train, test = noise(20, side), noise(6, side, seed=1)
    model = Encoder(Spy(), image_size=16).train()
    model.backbone.seen.clear()
    model.backbone.modes.clear()
    result = linear_evaluation(model, train, test, protocol=Protocol(epochs=2, batch_size=8), seed=3)
    seen = model.backbone.seen
    assert [len(images) for images in seen] == [6, 8, 8, 4, 8, 8, 4]
    assert torch.equal(seen[0], model.normalize(evaluation_view(test.pixels, 16)))
    assert not any(model.backbone.modes)
    assert model.training

    generator, order = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.randn(2, 3, generator=order)  # the classifier's weights
    augmentation = Augmentation.crop_flip(16)
    batches = [rows for _ in range(2) for rows in torch.randperm(20, generator=order).split(8)]
    for images, rows in zip(seen[1:], batches, strict=True):
        pixels = evaluation_view(train.pixels[rows], 16) if side < 16 else train.pixels[rows]
        expected = augmentation(pixels, augmentation.draw(len(rows), generator))
        torch.testing.assert_close(images, model.normalize(expected))
    assert (result.method, result.top5) == ("sgd", None)


def test_without_crops_and_flips_it_is_the_sgd_probe_on_fixed_features(digits, monkeypatch):
    whole = Augmentation(16, area=(1.0, 1.0), jitter=None, grey=0.0, blur=0.0, flip=0.0)
    monkeypatch.setattr(Augmentation, "crop_flip", lambda size: whole)
    model, protocol = settled(digits.train), Protocol(epochs=5, learning_rate=0.1, batch_size=64)
    result = linear_evaluation(model, digits.train, digits.test, protocol=protocol, seed=2)
    features, queries = extract_features(model, digits.train), extract_features(model, digits.test)
    fixed = linear_probe(
        features, digits.train.labels, queries, digits.test.labels, method="sgd", protocol=protocol, seed=2
    )
    assert (result.top1, result.top5) == pytest.approx((fixed.top1, fixed.top5), abs=0.6)  # two of 360
    assert result.top1 > 30  # chance is 10
    assert (
        linear_evaluation(model, digits.train, digits.test, protocol=protocol, seed=3) != result
    )  # so equality says something


def colours(n, seed):
    """Three classes that crops and flips do not change."""
    images = noise(n, classes=3, seed=seed)
    tint = 90 * torch.eye(3, dtype=torch.uint8)[images.labels]
    return Images(images.pixels // 2 + tint[:, :, None, None], images.labels, images.classes)


def test_linear_evaluation_learns_and_leaves_the_backbone_as_it_was():
    train, test = colours(120, 0), colours(60, 1)
    model = settled(train)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    protocol = Protocol(epochs=10, learning_rate=0.3, milestones=(5,), batch_size=32)
    result = linear_evaluation(model, train, test, protocol=protocol)
    assert result.best_epoch_top1 >= result.top1 > 90  # chance is 33
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert linear_evaluation(model, train, test, protocol=protocol) == result


class Drifting(Spy):
    """A backbone with a statistic that moves in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, images):
        self.count += 1
        return super().forward(images)


def test_a_backbone_that_changes_is_told():
    with pytest.raises(RuntimeError, match="linear evaluation changed the backbone it should only read: count"):
        linear_evaluation(Encoder(Drifting(), image_size=16), noise(), noise(), protocol=SHORT)


def test_one_bar_counts_the_steps(monkeypatch, capsys):
    bars = []

    class Bar(disco.linear.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(disco.linear, "tqdm", Bar)
    linear_evaluation(encoder(), noise(20), noise(), protocol=Protocol(epochs=3, batch_size=8))
    assert [(bar.n, bar.total) for bar in bars] == [(9, 9)]
    assert capsys.readouterr().err.strip() == ""  # what takes less than a second shows none


# Everything at once


def test_evaluate(digits):
    model = encoder().train()
    metrics = evaluate(model, digits)
    bank, queries = extract_features(model, digits.train), extract_features(model, digits.test)
    labels, test_labels = digits.train.labels, digits.test.labels
    expected = {f"knn_{k}": a for k, a in knn_accuracy(bank, labels, queries, test_labels, k=[10, 20, 200]).items()}
    probe = linear_probe(bank, labels, queries, test_labels)
    assert metrics == expected | {"linear_top1": probe.top1, "linear_top5": probe.top5}
    assert model.training
    few = Splits(digits.train.select(range(15)), digits.test)
    assert list(evaluate(model, few)) == ["knn_10", "linear_top1", "linear_top5"]
    assert list(evaluate(model, Splits(noise(8), noise()))) == ["linear_top1"]


def test_judging_draws_no_random_numbers_of_the_training(digits):
    model, state = encoder(), torch.get_rng_state()
    evaluate(model, digits)
    linear_evaluation(model, noise(), noise(), protocol=SHORT)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_judged():
    bare = Images(noise().pixels)
    for splits in (Splits(bare, noise()), Splits(bare, None)):
        with pytest.raises(ValueError, match="the training images have no labels"):
            evaluate(encoder(), splits)
    with pytest.raises(ValueError, match="the test images have no labels"):
        linear_evaluation(encoder(), noise(), bare)
    with pytest.raises(ValueError, match=r"no test split to judge on: hold some images out with --validation 0.1"):
        evaluate(encoder(), Splits(noise(), None))


def test_a_share_of_the_labels_is_balanced_and_part_of_a_larger_one():
    labels = torch.arange(600) % 3
    labels[:5] = 3
    one, ten = (labelled_share(labels, fraction) for fraction in (0.01, 0.1))
    assert labels[one].bincount().tolist() == [2, 2, 2, 1]
    assert labels[ten].bincount().tolist() == [20, 20, 20, 1]
    assert set(one.tolist()) < set(ten.tolist())
    assert torch.equal(labelled_share(labels, 0.1), ten)
    assert not torch.equal(labelled_share(labels, 0.1, seed=1), ten)
    assert torch.equal(labelled_share(labels, 1.0), torch.arange(600))
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="label_fraction must be above 0 and at most 1, got"):
            labelled_share(labels, fraction)


# The verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    encoder().save_pretrained(path)
    return path


def judge(kind, model, *flags):
    return evaluate_checkpoint(*parse(evaluate_checkpoint, [str(word) for word in (kind, "--model", model, *flags)]))


def test_knn_of_the_sample(folder, capsys):
    metrics = judge("knn", folder, "--k", 1, 20)
    splits = load_data(DataOptions())
    bank, queries = extract_features(encoder(), splits.train), extract_features(encoder(), splits.test)
    expected = knn_accuracy(bank, splits.train.labels, queries, splits.test.labels, k=[1, 20])
    assert metrics == {f"knn_{k}": pytest.approx(value) for k, value in expected.items()}
    assert metrics["knn_20"] > 50
    out = " ".join(capsys.readouterr().out.split())
    assert "sample, knn: 1437 training and 360 test images; temperature 0.07" in out
    assert f"{metrics['knn_20']:.2f}" in out
    record = json.loads((folder / "eval-sample-knn" / "metrics.json").read_text())
    assert record["metrics"] == metrics
    assert (record["train"], record["test"], record["classes"], record["temperature"]) == (1437, 360, 10, 0.07)


def test_linear_of_the_sample(folder, tmp_path):
    metrics = judge("linear", folder, "--max_train", 500, "--output_dir", tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert (record["method"], record["train"], record["label_fraction"]) == ("lbfgs", 500, 1.0)
    assert record["penalty"] in disco.linear.PENALTIES
    assert list(metrics) == ["linear_top1", "linear_top5"]
    assert metrics["linear_top1"] > 60


@pytest.mark.parametrize("augment", [False, True])
def test_sgd_of_the_sample(folder, tmp_path, augment, capsys):
    words = ["--method", "sgd", "--protocol", "semi", "--label_fraction", "0.1", "--epochs", 3, "--learning_rate", 0.5]
    metrics = judge("linear", folder, *words, "--augment", augment, "--output_dir", tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert (record["method"], record["protocol"], record["augment"]) == ("sgd", "semi", augment)
    assert record["schedule"] == {"epochs": 3, "learning_rate": 0.5, "milestones": [60, 80], "batch_size": 256}
    assert record["train"] == pytest.approx(144, abs=5)
    assert record["label_fraction"] == 0.1
    assert list(metrics) == ["linear_top1", "linear_top5", "linear_best_epoch_top1"]
    assert metrics["linear_best_epoch_top1"] >= metrics["linear_top1"]
    assert f"method sgd, augment {augment}, protocol semi" in " ".join(capsys.readouterr().out.split())


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_transfer_to_other_classes_and_sizes(folder, tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (random.integers(0, 60, (60, 20, 20, 3)) + 80 * np.eye(3)[labels][:, None, None]).astype(np.uint8)
    data = npz(
        tmp_path / "colours.npz",
        images=images[:40],
        labels=labels[:40],
        test_images=images[40:],
        test_labels=labels[40:],
    )
    assert judge("knn", folder, "--data", data, "--k", 5) == {"knn_5": 100}
    assert judge("linear", folder, "--data", data) == {"linear_top1": 100}
    record = json.loads((folder / "eval-colours.npz-linear" / "metrics.json").read_text())
    assert (record["classes"], record["train"], record["test"]) == (3, 40, 20)


def test_data_that_cannot_be_judged(folder, tmp_path):
    images = np.zeros((20, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="the training images have no labels"):
        judge("knn", folder, "--data", npz(tmp_path / "bare.npz", images=images))
    whole = npz(tmp_path / "whole.npz", images=images, labels=np.arange(20) % 2)
    with pytest.raises(ValueError, match=r"hold some images out with --validation 0.1"):
        judge("linear", folder, "--data", whole)
    assert "linear_top1" in judge("linear", folder, "--data", whole, "--validation", 0.2)
    with pytest.raises(ValueError, match="k must be 1 to the size of the bank, 16; got 20"):
        judge("knn", folder, "--data", whole, "--validation", 0.2, "--k", 10, 20)


def test_models_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        judge("knn", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        judge("knn", tmp_path)
    encoder().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not an encoder of disco"):
        judge("knn", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trees"], "eval 'trees' is unknown: choose knn or linear"),
        (["linear", "--method", "adam"], "method 'adam' is unknown: choose from lbfgs, sgd"),
        (
            ["linear", "--method", "sgd", "--protocol", "quick"],
            "protocol 'quick' is unknown: choose from imagenet, semi, transfer",
        ),
        (
            ["linear", "--augment"],
            "--augment, --epochs and --learning_rate go with `disco eval linear --model FOLDER --method sgd`",
        ),
        (["knn", "--method", "sgd", "--epochs", "3"], "--augment, --epochs and --learning_rate go with"),
        (["linear", "--method", "sgd", "--epochs", "0"], "epochs must be above 0, got 0"),
        (["knn", "--label_fraction", "0"], "label_fraction must be above 0 and at most 1, got 0.0"),
        (["knn", "--temperature", "0"], "the temperature must be above 0, got 0.0"),
        (["knn", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_flags(folder, words, message):
    kind, *flags = words
    with pytest.raises(ValueError, match=message):
        judge(kind, folder, *flags)


def test_wrong_input_is_one_line(folder, capsys):
    app = App("disco", help="")
    app.command("eval", "disco.evaluate:evaluate_checkpoint", help="")
    assert app(["eval", "knn", "--model", str(folder / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert app(["eval", "knn", "--model", str(folder), "--max_train", "100", "--k", "1"]) == 0


def test_options_are_documented():
    assert all(field.metadata["help"] for field in EvalOptions.__dataclass_fields__.values())
