import json
from pathlib import Path

import numpy as np
import pytest
import torch
from disco.linear import PENALTIES, PROTOCOLS, Protocol, linear_probe, train_linear
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
SHORT = Protocol(epochs=3, learning_rate=1.0, batch_size=32)


@pytest.fixture(scope="module")
def digits():
    """Pixels of 1200 digits to train on and 597 to test."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = torch.tensor(pixels[order]).float(), torch.tensor(labels[order]).long()
    return pixels[:1200], labels[:1200], pixels[1200:], labels[1200:]


def separable(classes, rows=120, width=12, seed=0):
    """Blobs far from each other, and far from 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    features = 5 + 8 * torch.eye(classes, width)[labels] + 0.3 * torch.randn(rows, width, generator=generator)
    half = rows // 2
    return features[:half], labels[:half], features[half:], labels[half:]


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_lbfgs_is_scikit_learns_at_the_same_penalty(digits, penalty):
    train, labels, test, test_labels = digits
    scaler = StandardScaler().fit(train.numpy())
    theirs = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-6, max_iter=1000)
    theirs.fit(scaler.transform(train.numpy()), labels.numpy())
    ours = linear_probe(train, labels, test, test_labels, penalties=[penalty])
    assert ours.top1 == pytest.approx(100 * theirs.score(scaler.transform(test.numpy()), test_labels.numpy()), abs=0.2)
    ranks = np.argsort(-theirs.predict_proba(scaler.transform(test.numpy())), 1)[:, :5]
    assert ours.top5 == pytest.approx(100 * (ranks == test_labels.numpy()[:, None]).any(1).mean(), abs=0.2)
    assert (ours.method, ours.penalty, ours.best_epoch_top1) == ("lbfgs", penalty, None)


def test_the_penalty_is_chosen_on_the_training_features_alone(digits):
    train, labels, test, test_labels = digits
    chosen = linear_probe(train, labels, test, test_labels)
    assert chosen.penalty in PENALTIES
    assert chosen.top1 > 94
    assert linear_probe(train, labels, test, test_labels) == chosen
    assert linear_probe(train, labels, test.flip(0), test_labels).penalty == chosen.penalty
    assert linear_probe(train, labels, test, test_labels, penalties=[chosen.penalty]).top1 == pytest.approx(
        chosen.top1, abs=0.4
    )


def test_few_noisy_labels_get_a_large_penalty_and_many_clean_ones_a_small_one(digits):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(90, 200, generator=generator), torch.randn(4000, 200, generator=generator)
    signal = torch.randn(200, generator=generator) / 14
    labels = ((train @ signal + torch.randn(90, generator=generator)) > 0).long()
    test_labels = ((test @ signal) > 0).long()
    few = linear_probe(train, labels, test, test_labels, penalties=[1.0, 1e-5])
    wide, wide_labels = test[:3000], test_labels[:3000]
    many = linear_probe(wide, wide_labels, test[3000:], test_labels[3000:], penalties=[1.0, 1e-5])
    assert (few.penalty, many.penalty) == (1.0, 1e-5)


@pytest.mark.parametrize("method", ["lbfgs", "sgd"])
@pytest.mark.parametrize("classes", [2, 5, 6])
def test_separable_data_reach_everything(method, classes):
    result = linear_probe(
        *separable(classes), method=method, protocol=Protocol(epochs=100, learning_rate=0.03, batch_size=16)
    )
    assert result.top1 == 100
    assert result.top5 == (None if classes < 6 else 100)
    assert result.method == method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    train, labels, test, test_labels = separable(3)
    assert linear_probe(train.to(dtype), labels, test.to(dtype), test_labels).top1 == 100


def test_scale_shift_and_constant_columns_do_not_matter_to_lbfgs(digits):
    train, labels, test, test_labels = digits  # some of their pixels are constant
    plain = linear_probe(train, labels, test, test_labels, penalties=[1e-3])

    def changed(x):
        return torch.cat([x * torch.logspace(-3, 3, 64) + 7, torch.full((len(x), 1), 0.1)], 1)

    scaled = linear_probe(changed(train), labels, changed(test), test_labels, penalties=[1e-3])
    assert scaled.top1 == pytest.approx(plain.top1, abs=0.4)


def test_it_works_where_gradients_are_off(digits):
    with torch.no_grad():
        assert linear_probe(*separable(3), penalties=[1e-3]).top1 == 100
        assert linear_probe(*separable(3), method="sgd", protocol=SHORT).method == "sgd"


def test_classes_without_training_features_are_missed():
    train, labels, test, test_labels = separable(3)
    assert linear_probe(train, labels, test, test_labels + 7, penalties=[1e-3]).top1 == 0


@pytest.mark.parametrize("name", ["imagenet", "semi"])
def test_learning_rates_are_the_authors(name):
    golden = SCHEDULES[{"imagenet": "linear_eval_steps", "semi": "semi_eval_steps"}[name]]
    protocol = PROTOCOLS[name]
    optimizer, scheduler = protocol.optimizer(nn.Linear(1, 1).parameters())
    rates = []
    for _ in range(protocol.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert protocol.epochs == 100
    assert {epoch: rates[int(epoch)] for epoch in golden["lr_at_epoch"]} == pytest.approx(golden["lr_at_epoch"])
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.9, 0)


def test_transfer_is_200_epochs_at_one_rate():
    assert PROTOCOLS["transfer"] == Protocol(epochs=200, learning_rate=3.0, milestones=(), batch_size=256)


def literal_sgd(train, labels, test, test_labels, protocol, seed):
    """The update rule by hand: momentum, and the halved rate, on features as they are."""
    generator = torch.Generator().manual_seed(seed)
    classes, n = int(labels.max()) + 1, len(labels)
    weight = 0.01 * torch.randn(classes, train.shape[1], generator=generator)
    bias, speed_w, speed_b = torch.zeros(classes), torch.zeros_like(weight), torch.zeros(classes)
    top1 = []
    for epoch in range(protocol.epochs):
        rate = protocol.learning_rate * 0.5 ** sum(epoch >= milestone for milestone in protocol.milestones)
        order = torch.randperm(n, generator=generator)
        for start in range(0, n, protocol.batch_size):
            rows = order[start : start + protocol.batch_size]
            error = torch.softmax(train[rows] @ weight.T + bias, 1) - torch.eye(classes)[labels[rows]]
            speed_w = 0.9 * speed_w + error.T @ train[rows] / len(rows)
            speed_b = 0.9 * speed_b + error.mean(0)
            weight, bias = weight - rate * speed_w, bias - rate * speed_b
        top1.append(100 * ((test @ weight.T + bias).argmax(1) == test_labels).double().mean().item())
    return top1


@pytest.mark.parametrize("rate", [0.3, 0.003])  # at the lower one the first weights still tell
@pytest.mark.parametrize("seed", [0, 3])
def test_sgd_is_the_literal_loop_and_reports_last_and_best(digits, seed, rate):
    train, labels, test, test_labels = (x[:300] for x in digits)
    protocol = Protocol(epochs=6, learning_rate=rate, milestones=(2, 4), batch_size=64)
    train, test = train / 16, test / 16
    history = literal_sgd(train, labels, test, test_labels, protocol, seed)
    result = linear_probe(train, labels, test, test_labels, method="sgd", protocol=protocol, seed=seed)
    assert len(set(history)) > 2
    assert (result.top1, result.best_epoch_top1) == pytest.approx((history[-1], max(history)), abs=0.4)
    assert result.penalty is None


def test_best_is_not_last_where_training_gets_worse(digits):
    train, labels, test, test_labels = digits
    signs = iter((1, 1, -1, -1))  # from the third epoch on the features mislead

    def features_of(batches):
        sign = next(signs)
        return (sign * train[rows] / 16 for rows in batches)

    protocol = Protocol(epochs=4, learning_rate=0.5, batch_size=32)
    result = train_linear(features_of, labels, test / 16, test_labels, protocol=protocol)
    assert result.best_epoch_top1 > 80 > result.top1


def test_seeds(digits):
    train, labels, test, test_labels = digits
    run = [linear_probe(train, labels, test, test_labels, method="sgd", protocol=SHORT, seed=s) for s in (0, 0, 1)]
    assert run[0] == run[1] != run[2]


def test_small_problems():
    features, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    assert linear_probe(features, labels, features, labels).top1 == 100
    assert linear_probe(features, labels, features, labels, method="sgd", protocol=SHORT).method == "sgd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adam"}, "method 'adam' is unknown: choose from lbfgs, sgd"),
        ({"penalties": []}, "penalties must be one or more numbers of at least 0"),
        ({"penalties": [1e-3, -1.0]}, "penalties must be .* at least 0, got .*-1.0"),
        ({"test_features": torch.ones(2, 3)}, "the training features are 2 wide, those of the test 3"),
        ({"train_features": torch.full((3, 2), torch.inf)}, "train, row 0: a feature is NaN or infinite"),
        ({"train_labels": None}, "train: no labels"),
        ({"test_labels": None}, "test: no labels"),
        ({"test_labels": torch.tensor([0])}, r"test: labels must be 2 whole numbers"),
        (
            {"train_labels": torch.tensor([4, 4, 4])},
            "all training labels are 4: a classifier needs at least two classes",
        ),
    ],
)
def test_wrong_input(change, message):
    arguments = {
        "train_features": torch.eye(3, 2), "train_labels": torch.tensor([0, 1, 1]),
        "test_features": torch.eye(2), "test_labels": torch.tensor([0, 1]),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments)


def test_divergence_is_told(digits):
    train, labels, test, test_labels = digits
    with pytest.raises(ValueError, match=r"diverged in epoch 0: lower the learning rate, 1e\+38"):
        linear_probe(train, labels, test, test_labels, method="sgd", protocol=Protocol(epochs=3, learning_rate=1e38))


@pytest.mark.parametrize("field", ["epochs", "learning_rate", "batch_size"])
def test_protocols_refuse_what_is_not_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be above 0, got 0"):
        Protocol(**{field: 0})
