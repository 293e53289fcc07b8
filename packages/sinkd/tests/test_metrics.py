import numpy as np
import pytest
from sinkd.metrics import METRICS, accuracy, f1, likeness, macro_f1, matthews, pearson, spearman


@pytest.mark.parametrize(
    ("true", "predicted", "expected"),
    [
        ([1, 1, 0, 0], [1, 0, 0, 0], 3**-0.5),
        ([1, 0], [0, 1], -1.0),
        ([1, 1, 1], [1, 0, 1], 0.0),  # a factor of 0
        ([1, 0, 1], [1, 1, 1], 0.0),
    ],
)
def test_matthews(true, predicted, expected):
    assert matthews(true, predicted) == pytest.approx(expected)


def test_matthews_is_the_correlation_of_indicators():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 2, (2, 200))
    assert matthews(true, predicted) == pytest.approx(np.corrcoef(true, predicted)[0, 1])


def test_f1_is_of_the_positive_class():
    assert f1([1, 1, 0, 0, 0], [1, 0, 1, 0, 0]) == pytest.approx(0.5)
    assert f1([0, 0], [0, 0]) == 0.0


def test_macro_f1_counts_classes_that_occur_on_either_side():
    assert macro_f1([0, 0, 1], [0, 2, 1]) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_correlations():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 2 * x + 1) == pytest.approx(1)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert pearson(x, np.exp(x)) < 1


def test_accuracy_and_names():
    assert accuracy([0, 1, 2], [0, 1, 1]) == pytest.approx(2 / 3)
    assert set(METRICS) == {"accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"}


def test_likeness_of_a_model_to_itself_and_to_its_opposite():
    logits = np.array([[3.0, -3.0], [-2.0, 2.0]], np.float32)
    assert likeness(logits, logits, 2.0) == {"agreement": 1.0, "teacher_l1": 0.0}
    opposite = likeness(100 * logits, -100 * logits, 2.0)
    assert opposite["agreement"] == 0.0
    assert opposite["teacher_l1"] == pytest.approx(2.0)
