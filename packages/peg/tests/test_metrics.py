import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peg.metrics import retrieval_metrics

GOLDEN = json.loads((Path(__file__).parent / "golden/metrics_graded.json").read_text())
NAMES = {
    "ndcg_cut_1": "nDCG@1", "ndcg_cut_3": "nDCG@3", "ndcg_cut_5": "nDCG@5", "ndcg_cut_10": "nDCG@10",
    "recall_1": "Recall@1", "recall_10": "Recall@10", "recall_50": "Recall@50",
    "map_cut_10": "MAP@10", "map_cut_100": "MAP@100", "recip_rank": "MRR@100",
}  # fmt: skip


def test_every_query_has_the_values_of_pytrec_eval():
    result = retrieval_metrics(GOLDEN["run"], GOLDEN["qrels"], ks=(1, 3, 5, 10, 50, 100))
    judged = [query for query, gains in GOLDEN["qrels"].items() if any(gains.values())]
    assert (len(judged), result.dropped) == (5, 1)
    for theirs, ours in NAMES.items():
        assert list(result.per_query[ours]) == judged
        for query in judged:
            assert result.per_query[ours][query] == pytest.approx(GOLDEN["per_query"][query][theirs], abs=1e-12)
        # pytrec_eval's mean counts the query without a relevant document as 0
        assert result.mean[ours] == pytest.approx(GOLDEN["mean"][theirs] * 6 / 5, abs=1e-12)


def literal(ranking, gains, k):
    """The formulas, one query, word by word."""
    g = [gains.get(document, 0) for document in ranking]
    relevant = [document for document, gain in gains.items() if gain > 0]
    dcg = sum(g[r - 1] / math.log2(r + 1) for r in range(1, min(k, len(g)) + 1))
    ideal = sum(gain / math.log2(r + 1) for r, gain in enumerate(sorted(gains.values(), reverse=True)[:k], 1))
    ranks = [r for r in range(1, min(k, len(g)) + 1) if g[r - 1] > 0]
    precision = [sum(s <= r for s in ranks) / r for r in ranks]
    return dcg / ideal, 1 / ranks[0] if ranks else 0, len(ranks) / len(relevant), sum(precision) / len(relevant)


@given(
    ranking=st.permutations(range(8)).flatmap(lambda p: st.integers(0, 8).map(lambda n: list(map(str, p[:n])))),
    gains=st.dictionaries(st.integers(0, 9).map(str), st.integers(0, 3), min_size=1).filter(lambda g: any(g.values())),
    k=st.integers(1, 10),
)
def test_equal_to_the_formulas(ranking, gains, k):
    result = retrieval_metrics({"q": ranking}, {"q": gains}, ks=[k])
    for name, value in zip(("nDCG", "MRR", "Recall", "MAP"), literal(ranking, gains, k), strict=True):
        assert result.mean[f"{name}@{k}"] == pytest.approx(value, abs=1e-12)
        assert -1e-12 <= result.mean[f"{name}@{k}"] <= 1 + 1e-12


def test_the_ideal_ranking_has_one_everywhere():
    gains = {"a": 3, "b": 1, "c": 2, "d": 0}
    assert set(retrieval_metrics({"q": ["a", "c", "b"]}, {"q": gains}, ks=[5]).mean.values()) == {1.0}


def test_map_can_divide_by_at_most_k():
    qrels = {"q": dict.fromkeys("abcd", 1)}
    run = {"q": ["a", "x"]}
    assert retrieval_metrics(run, qrels, ks=[2]).mean["MAP@2"] == 1 / 4
    assert retrieval_metrics(run, qrels, ks=[2], map_denominator="min").mean["MAP@2"] == 1 / 2


def test_equal_scores_keep_the_order_given():
    qrels = {"q": {"late": 1}}
    for order, rank in ((["late", "early"], 1), (["early", "late"], 2)):
        run = {"q": {"worst": -1.0, **dict.fromkeys(order, 0.5)}}
        assert retrieval_metrics(run, qrels, ks=[5]).mean["MRR@5"] == 1 / rank


def test_queries_without_a_relevant_document_are_dropped_and_others_ignored():
    result = retrieval_metrics({"a": ["d"], "new": ["e"]}, {"a": {"d": 1}, "b": {"d": 0}, "c": {}})
    assert (result.dropped, result.mean["MRR@10"], list(result.per_query["MRR@10"])) == (2, 1.0, ["a"])


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ({}, {}, r"the run lacks 1 judged queries \(q\); give a query without results an empty list"),
        ({"q": ["a", "b", "a"]}, {}, "query q: document a is ranked twice"),
        ({"q": {"a": math.nan}}, {}, "query q: the score of document a is not a number"),
        ({"q": []}, {"ks": [0]}, r"ks must be cutoffs of at least 1, got \(0,\)"),
        ({"q": []}, {"ks": []}, "ks must be cutoffs"),
        ({"q": []}, {"map_denominator": "k"}, "map_denominator must be relevant or min, got 'k'"),
        ({"q": []}, {"qrels": {"q": {"a": 0}}}, "none of the 1 queries has a relevant document"),
    ],
)
def test_errors(run, options, message):
    qrels = options.pop("qrels", {"q": {"a": 1}})
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(run, qrels, **options)


def test_a_query_without_results_scores_0():
    assert set(retrieval_metrics({"q": []}, {"q": {"a": 1}}).mean.values()) == {0.0}
