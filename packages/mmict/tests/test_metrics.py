import gzip
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mmict.metrics import (
    bleu,
    cider_d,
    copy_rate,
    exact_match,
    normalized_answer,
    rouge_l,
    scores,
    token_f1,
    tokens,
    vqa_accuracy,
)

GOLDEN = Path(__file__).parent / "golden"
COCO = Path(os.environ.get("PAPERCORE_DATA", "absent")) / "mmict" / "coco_val2017_captions.jsonl.gz"
needs_coco = pytest.mark.skipif(not COCO.is_file(), reason="PAPERCORE_DATA has no mmict/coco_val2017_captions.jsonl.gz")


@cache
def coco():
    with gzip.open(COCO, "rt") as file:
        return {row["image_id"]: row["captions"] for row in map(json.loads, file)}


def test_tokens():
    assert tokens("A man's T-shirt: 2.50!") == ["a", "man's", "t", "shirt", "2", "50"]
    assert tokens(" ?! ") == []


@needs_coco
def test_caption_metrics_are_those_of_the_coco_tool():
    golden = json.loads((GOLDEN / "caption_metrics.json").read_text())
    predictions = [golden["hyp"][str(i)] for i in golden["image_ids"]]
    references = [coco()[i][1:5] for i in golden["image_ids"]]
    assert bleu(predictions, references) == pytest.approx(golden["BLEU"], abs=1e-6)
    assert rouge_l(predictions, references) == pytest.approx(golden["ROUGE_L"], abs=1e-6)
    mean, items = cider_d(predictions, references)
    assert mean == pytest.approx(golden["CIDEr"], abs=1e-6)
    assert items[:10] == pytest.approx(golden["CIDEr_first10"], abs=1e-6)
    for i in range(10):
        assert rouge_l(predictions[i : i + 1], references[i : i + 1]) == pytest.approx(
            golden["ROUGE_first10"][i], abs=1e-6
        )


@needs_coco
def test_scores_of_a_thousand_images():
    captions = list(coco().values())[:1000]
    predictions, references = [c[0] for c in captions], [c[1:] for c in captions]
    found = scores(
        predictions,
        references,
        [""] * len(captions),
        nll=np.ones(len(captions)),
        tokens=np.ones(len(captions)),
        demonstrations=references,
    )
    assert 0.5 < found["cider_d"] < 1.5


class TestBleu:
    def test_by_hand(self):
        one, two = bleu(["a a b"], [["a b c", "a b d e"]], n=2)
        assert one == pytest.approx(2 / 3)  # of the two a, one counts
        assert two == pytest.approx((2 / 3 * 1 / 2) ** 0.5)

    def test_the_shorter_of_two_close_references_sets_the_brevity(self):
        assert bleu(["a b c"], [["a b", "a b c d"]], n=1)[0] == pytest.approx(1)
        assert bleu(["a b c"], [["a b c d"]], n=1)[0] == pytest.approx(np.exp(1 - 4 / 3))

    def test_nothing_said(self):
        assert bleu([""], [["a dog"]]) == pytest.approx([0, 0, 0, 0], abs=1e-6)


class TestRougeL:
    def test_order_counts(self):
        assert rouge_l(["a b c"], [["a b c"]]) == pytest.approx(1)
        p, r = 2 / 3, 2 / 4
        assert rouge_l(["c a b"], [["a x b y"]]) == pytest.approx(2.44 * p * r / (r + 1.44 * p))

    def test_nothing_said(self):
        assert rouge_l(["", "..."], [["a dog"], ["?"]]) == 0

    def test_the_common_part_against_the_table(self):
        def slow(a, b):
            table = np.zeros((len(a) + 1, len(b) + 1), int)
            for i in range(len(a)):
                for j in range(len(b)):
                    table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
            return table[-1, -1]

        random = np.random.default_rng(0)
        for _ in range(50):
            a, b = (" ".join(random.choice(list("abcd"), random.integers(1, 12))) for _ in range(2))
            p, r = (slow(a.split(), b.split()) / len(words.split()) for words in (a, b))
            assert rouge_l([a], [[b]]) == pytest.approx(2.44 * p * r / (r + 1.44 * p) if p else 0)


class TestCiderD:
    def test_one_image_is_told(self):
        with pytest.warns(UserWarning, match="fewer than 2 images is 0"):
            assert cider_d(["a dog"], [["a dog"]])[0] == 0

    def test_a_perfect_caption_of_rare_words_has_ten(self):
        mean, items = cider_d(["one two three four", "five"], [["one two three four"], ["six seven eight nine"]])
        assert items == pytest.approx([10, 0])
        assert mean == pytest.approx(5)

    def test_too_long_is_worse(self):
        references = [["a b c d"], ["e f g h"]]
        short, long = cider_d(["a b c d", "x"], references)[1][0], cider_d(["a b c d c d", "x"], references)[1][0]
        assert long < short


class TestVqaAccuracy:
    def test_official_cases(self):
        golden = json.loads((GOLDEN / "vqa_accuracy.json").read_text())
        cases = golden["cases"]
        mean, items = vqa_accuracy([case["prediction"] for case in cases], [case["answers"] for case in cases])
        assert 100 * items == pytest.approx([case["accuracy"] for case in cases])
        assert 100 * mean == pytest.approx(golden["overall"], abs=1e-4)

    def test_fewer_annotators(self):
        answers = [["a red Car."], ["red car"], ["two", "three"], ["two", "2", "three"], ["dog"] * 3 + ["cat"]]
        predictions = ["red car", "red cart", "2", "2", "dog"]
        assert vqa_accuracy(predictions, answers)[1] == pytest.approx([1, 0, 0.5, 2 / 3, 0.75])

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1,000.5", "1000.5"),
            ("The dog's", "dog's"),
            ("None", "0"),
            ("black/white", "black white"),
            ("yes , sir", "yes sir"),
            ("couldnt've", "couldn't've"),
            ("TEN\n an\tapples!", "10 apples"),
            ("its", "its"),
            ("the", ""),
        ],
    )
    def test_normalisation(self, text, expected):
        assert normalized_answer(text) == expected


def test_bags_of_words_and_exact_matches():
    references = [["a dog", "two dogs run"], ["a cat"]]
    assert token_f1(["two dogs", ""], references) == pytest.approx(0.8 / 2)
    assert token_f1(["dog dog", "a cat"], references) == pytest.approx((0.5 + 1) / 2)
    assert exact_match(["Two dogs run.", "cat a"], references) == 0.5


def test_copies_count_unless_they_are_right():
    predictions, shown = ["A dog", "a cat", "a bird", "a cow"], [["a dog"], ["a dog", "a cat."], ["a dog"], []]
    assert copy_rate(predictions, shown) == 0.5
    assert copy_rate(predictions, shown, [["a dog"], ["a lion"], ["a bird"], ["a cow"]]) == 0.25


class TestScores:
    def test_captions(self):
        texts, right = ["a red dog", "a blue cat"], [["a red dog"], ["a green cat"]]
        found = scores(
            texts, right, ["", ""], nll=[2.0, 4.0], tokens=[1, 2], demonstrations=[["a red dog"], ["a blue cat"]]
        )
        assert found["nll"] == pytest.approx(2)
        assert found["copy_rate"] == 0.5
        assert found["exact_match"] == 0.5
        assert found["cider_d"] == cider_d(texts, right)[0]
        assert found["bleu_4"] == bleu(texts, right)[3]
        assert list(found) == ["nll", "token_f1", "exact_match", "cider_d", "bleu_4", "rouge_l", "copy_rate"]

    def test_yes_no_apart_and_no_copy_rate_without_demonstrations(self):
        texts, right = ["yes", "no", "red"], [["yes"], ["yes"], ["blue"]]
        asked = {"nll": np.ones(3), "tokens": np.ones(3)}
        found = scores(texts, right, ["q"] * 3, demonstrations=[[], [], []], **asked)
        assert found == pytest.approx({"nll": 1, "vqa_accuracy": 1 / 3, "yes_no": 0.5, "other": 0})
        found = scores(texts, right, ["q"] * 3, demonstrations=[["yes"], ["no"], ["red"]], **asked)
        assert found["copy_rate_other"] == 1  # the wrong "no" is not counted
        found = scores(texts[:2], right[:2], ["q"] * 2, nll=[1, 1], tokens=[1, 1], demonstrations=[["no"]] * 2)
        assert list(found) == ["nll", "vqa_accuracy", "yes_no"]

    def test_both_kinds_do_not_mix(self):
        texts, right, questions = ["a dog", "red", "a cat"], [["a dog"], ["red"], ["a cat"]], ["", "what colour", ""]
        found = scores(texts, right, questions, nll=np.ones(3), tokens=np.ones(3), demonstrations=[[]] * 3)
        assert found["exact_match"] == found["vqa_accuracy"] == found["other"] == 1
        assert "yes_no" not in found


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d, vqa_accuracy, token_f1, exact_match])
def test_wrong_input(metric):
    with pytest.raises(ValueError, match="no predictions"):
        metric([], [])
    with pytest.raises(ValueError, match="2 predictions, but 1 rows"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"item 1: expected a list of one or more texts, got \[\]"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="item 0: expected a list of one or more texts, got 'a dog'"):
        metric(["a"], ["a dog"])
