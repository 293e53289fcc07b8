import json
from pathlib import Path

import pytest
from dsan.metrics import (
    correct,
    exact_accuracy,
    levenshtein,
    mcnemar,
    mean_similarity,
    scores,
    simplify,
    word_accuracy,
)
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())
WORDS = st.text("ab1é", max_size=9)


def by_table(a, b):
    """The distance by the whole table, as in a textbook."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_golden():
    predictions, truths = ([pair[side] for pair in GOLDEN["pairs"]] for side in ("pred", "gt"))
    assert word_accuracy(predictions, truths) == GOLDEN["word_accuracy"]
    assert mean_similarity(predictions, truths) == pytest.approx(GOLDEN["mean_1_minus_ned"], abs=1e-12)
    for pair in GOLDEN["pairs"]:
        one = [pair["pred"]], [pair["gt"]]
        assert correct(*one) == [pair["correct"]]
        assert levenshtein(*map(simplify, (pair["pred"], pair["gt"]))) == pair["edit"]
        assert mean_similarity(*one) == pytest.approx(pair["ned_sim"], abs=1e-12)


@given(WORDS, WORDS)
def test_distance_is_that_of_the_table(a, b):
    assert levenshtein(a, b) == by_table(a, b) == levenshtein(b, a)


def test_distance_of_texts_longer_than_a_machine_word():
    a, b = "ab" * 60, "ba" * 70
    assert levenshtein(a, b) == by_table(a, b)


def test_what_is_compared():
    assert simplify("Caf\u00e9 No. 5") == "cafno5"
    assert simplify("Caf\u00e9 No. 5", cased=True, punctuation=True) == "Caf\u00e9No.5"
    assert correct(["abc", "abc"], ["ABC", "ABD"]) == [True, False]
    assert correct(["abc"], ["ABC"], cased=True) == [False]
    assert correct(["abc"], ["a-bc"], punctuation=True) == [False]
    assert exact_accuracy(["Ab-c", "abc"], ["Ab-c", "Abc"]) == 0.5


def test_empty_words():
    assert mean_similarity(["", "...", "a"], ["", "", "!"]) == pytest.approx(2 / 3)
    assert word_accuracy(["", "a", ""], ["", "", "a"]) == pytest.approx(1 / 3)


def test_mcnemar():
    right, wrong = [True], [False]
    assert mcnemar(right * 5 + wrong * 5, right * 5 + wrong * 5) == (0, 0, 1.0)
    assert mcnemar(right * 10 + wrong * 4, wrong * 10 + right * 4)[:2] == (10, 4)
    # 2 * (C(14,0) + ... + C(14,4)) / 2 ** 14
    assert mcnemar(right * 10 + wrong * 4, wrong * 10 + right * 4).p == pytest.approx(2 * 1471 / 2**14)
    with pytest.raises(ValueError, match="the same words, got 1 and 2"):
        mcnemar(right, right * 2)


def test_scores_of_groups():
    found = scores(["route66", "ab", "boot", "park"], ["Route66", "at", "BOOT", "bark"])
    assert found == {
        "words": 4, "accuracy": 0.5, "exact": 0.0, "similarity": pytest.approx((1 + 0.5 + 1 + 0.75) / 4),
        "words_digit": 1, "accuracy_digit": 1.0, "words_short": 1, "accuracy_short": 0.0,
        "words_repeat": 2, "accuracy_repeat": 1.0,
    }  # fmt: skip
    assert "words_digit" not in scores(["a"], ["a"])


@pytest.mark.parametrize("measure", [word_accuracy, exact_accuracy, mean_similarity, scores])
def test_wrong_numbers_of_words(measure):
    with pytest.raises(ValueError, match="a prediction for each word, got 1 for 2 words"):
        measure(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no words to judge"):
        measure([], [])
