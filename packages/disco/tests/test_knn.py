import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from disco.images import decoded
from disco.knn import knn_accuracy, knn_predict
from disco.readers import read
from papercore.ops import peak_memory

GOLDEN = np.load(Path(__file__).parent / "golden" / "knn.npz")


def golden():
    names = ("bank", "bank_y", "query", "query_y")
    return [torch.from_numpy(GOLDEN[name]) for name in names]


def random_set(seed, bank=60, queries=25, width=7, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(bank, width, generator=generator),
        torch.randint(classes, (bank,), generator=generator),
        torch.randn(queries, width, generator=generator),
        torch.randint(classes, (queries,), generator=generator),
    )


def literal(bank, labels, queries, k, temperature):
    """One query, one neighbour, one vote at a time, in float64."""
    bank, labels, queries = bank.double().numpy(), labels.numpy(), queries.double().numpy()
    predicted = []
    for query in queries:
        cosines = [float(query @ row) / math.sqrt((query @ query) * (row @ row)) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: (-cosines[i], i))[:k]
        votes = [0.0] * (labels.max() + 1)
        for i in nearest:
            votes[labels[i]] += math.exp(cosines[i] / temperature)
        predicted.append(votes.index(max(votes)))
    return torch.tensor(predicted)


def test_golden():
    bank, bank_labels, queries, query_labels = golden()
    k, temperature = int(GOLDEN["k"]), float(GOLDEN["T"])
    predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature)
    assert predicted.tolist() == GOLDEN["pred"].tolist()
    assert knn_predict(bank, bank_labels, queries, k=1).tolist() == GOLDEN["pred_k1"].tolist()
    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, k=[k, 1], temperature=temperature)
    assert accuracy == {k: pytest.approx(float(GOLDEN["top1"])), 1: pytest.approx(float(GOLDEN["top1_k1"]))}


@pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")
def test_raw_pixels_of_cifar10_reach_the_measured_level():
    random = np.random.default_rng(0)
    train, test = read("cifar10")
    bank = decoded(train.select(random.permutation(50_000)[:10_000].tolist()), 32)
    queries = decoded(test.select(random.permutation(10_000)[:2000].tolist()), 32)
    pixels, query_pixels = (part.pixels.flatten(1) / 255 for part in (bank, queries))
    mean = pixels.mean(0)
    assert round(knn_accuracy(pixels - mean, bank.labels, query_pixels - mean, queries.labels, k=20), 1) in (41.3, 41.4)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 3, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_literal_loop(seed, k, temperature):
    bank, labels, queries, _ = random_set(seed)
    predicted = knn_predict(bank, labels, queries, k=k, temperature=temperature)
    assert torch.equal(predicted, literal(bank, labels, queries, k, temperature))


@pytest.mark.parametrize("rows", [1, 7, 24, 25, 1000])
def test_blocks_do_not_matter(rows):
    bank, labels, queries, query_labels = random_set(0)
    expected = knn_accuracy(bank, labels, queries, query_labels, k=[1, 5, 30])
    assert knn_accuracy(bank, labels, queries, query_labels, k=[1, 5, 30], block_rows=rows) == expected


def test_memory_is_that_of_a_block():
    bank, labels, queries, _ = random_set(0, bank=2000, queries=1000)
    with peak_memory() as peak:
        knn_predict(bank, labels, queries, k=5, block_rows=20)
    assert peak.bytes < 2 * 4 * 20 * 2000  # a block of cosines, and the bank; all pairs at once would take 8 MB


def test_several_k_are_each_k_alone():
    bank, labels, queries, query_labels = random_set(1)
    together = knn_accuracy(bank, labels, queries, query_labels, k=[30, 2, 9])
    assert together == {k: knn_accuracy(bank, labels, queries, query_labels, k=k) for k in (30, 2, 9)}
    assert isinstance(knn_accuracy(bank, labels, queries, query_labels, k=2), float)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    bank, labels, queries, _ = random_set(2)
    bank, queries = bank.to(dtype), queries.to(dtype)
    expected = literal(bank, labels, queries, 10, 0.07)
    assert torch.equal(knn_predict(bank, labels, queries, k=10), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_predict(bank, labels, queries, k=10), expected)


def test_length_does_not_matter():
    bank, labels, queries, _ = random_set(3)
    scaled = knn_predict(bank * torch.logspace(-6, 6, 60)[:, None], labels, queries * 1e-8, k=10)
    assert torch.equal(scaled, knn_predict(bank, labels, queries, k=10))


def test_small_temperatures_do_not_overflow():
    bank, labels, queries, _ = random_set(4)
    nearest = knn_predict(bank, labels, queries, k=1)
    for temperature in (0.01, 1e-4):
        assert torch.equal(knn_predict(bank, labels, queries, k=60, temperature=1e-4), nearest), temperature
    assert math.exp(1 / 0.01) > torch.finfo(torch.float32).max  # it would


def test_equal_neighbours_count_in_the_bank_order_and_equal_votes_go_to_the_lower_class():
    bank, query = torch.tensor([1.0, 0.0]).repeat(40, 1), torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([2, 2, 1, 1, 1] + 35 * [0])
    predicted = {k: int(knn_predict(bank, labels, query, k=k)) for k in (1, 2, 4, 5, 40)}
    assert predicted == {1: 2, 2: 2, 4: 1, 5: 1, 40: 0}  # at k = 4 it is two votes against two
    assert {k: int(a) for k, a in knn_accuracy(bank, labels, query, torch.tensor([2]), k=[1, 2, 5, 40]).items()} == {
        1: 100, 2: 100, 5: 0, 40: 0,
    }  # fmt: skip


def test_a_feature_of_zeros_is_as_near_to_all():
    assert knn_predict(torch.eye(2), torch.tensor([0, 1]), torch.zeros(1, 2), k=2).tolist() == [0]


def test_a_class_the_bank_lacks_is_missed():
    bank, labels, queries, _ = random_set(0)
    assert knn_accuracy(bank, labels, queries, torch.full((25,), 9), k=5) == 0


NAN = torch.tensor([[0.0, 1], [float("nan"), 0], [1, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, r"k must be 1 to the size of the bank, 3; got 4"),
        ({"k": [1, 0]}, r"k must be 1 to the size of the bank, 3; got 0"),
        ({"k": []}, "k is an empty list"),
        ({"temperature": 0.0}, "the temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "the temperature must be above 0, got nan"),
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
        ({"queries": torch.ones(2, 5)}, "the bank's features are 2 wide, those of the queries 5"),
        ({"bank": NAN}, "bank, row 1: a feature is NaN or infinite"),
        ({"queries": NAN[1:]}, "queries, row 0: a feature is NaN or infinite"),
        (
            {"queries": torch.empty(0, 2)},
            r"queries: expected features of shape \(n, width\) with n above 0, got \(0, 2\)",
        ),
        ({"bank": torch.ones(3)}, r"bank: expected features of shape .*, got \(3,\)"),
        ({"bank_labels": None}, "bank: no labels, and without labels nothing can be judged"),
        ({"query_labels": None}, "queries: no labels"),
        ({"bank_labels": torch.tensor([0, 1])}, r"bank: labels must be 3 whole numbers.*got \(2,\)"),
        ({"query_labels": torch.tensor([0.0, 1.0])}, "queries: labels must be 2 whole numbers.*float32"),
        ({"bank_labels": torch.tensor([0, -1, 1])}, "bank, row 1: the label is -1"),
    ],
)
def test_wrong_input(change, message):
    arguments = {
        "bank": torch.ones(3, 2), "bank_labels": torch.tensor([0, 1, 1]), "queries": torch.ones(2, 2),
        "query_labels": torch.tensor([0, 1]), "k": 1,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments)
