import logging

import peg.mine
import pytest
from papercore.lab.cli import parse
from peg.data import RetrievalData, read_rows
from peg.mine import mine_hard_negatives, mine_verb
from tiny_retrieval import cosine_model, one_query, random_set, word_model


def mined(cosines, positives, **options):
    """The negatives of the one query among documents of these cosines, as a set."""
    options = {"ranks": (0, 100), "num_negatives": 100, **options}
    found = mine_hard_negatives(cosine_model(cosines), one_query(cosines, positives), **options)["q"]
    assert len(set(found)) == len(found)
    return set(found)


def test_what_scores_like_the_best_positive_is_left_out():
    cosines = {"best": 0.8, "poor": 0.2, "above": 0.9, "like": 0.78, "below": 0.74, "easy": -0.5}
    assert mined(cosines, ["best", "poor"]) == {"below", "easy"}
    assert mined(cosines, ["best", "poor"], relative=0.5) == {"easy"}
    assert mined(cosines, ["best", "poor"], relative=1) == {"like", "below", "easy"}
    assert mined(cosines, ["best", "poor"], relative=None) == {"above", "like", "below", "easy"}


def test_the_threshold_is_below_a_positive_of_negative_score():
    """0.95 times -0.5 is above it: a factor would keep what scores better than the positive."""
    cosines = {"best": -0.5, "above": -0.48, "like": -0.52, "below": -0.56, "easy": -0.9}
    assert mined(cosines, ["best"]) == {"below", "easy"}
    assert mined(cosines, ["best"], margin=0.1) == {"easy"}
    assert mined(cosines, ["best"], margin=0) == {"like", "below", "easy"}


def test_ranks_count_all_documents_from_0():
    cosines = {"p": 0.9, "a": 0.5, "b": 0.4, "c": 0.3, "d": 0.2}
    assert mined(cosines, ["p"], ranks=(0, 3)) == {"a", "b"}
    assert mined(cosines, ["p"], ranks=(2, 4)) == {"b", "c"}
    assert mined(cosines, ["p"], ranks=(4, 9)) == {"d"}
    assert mined(cosines, ["p"], ranks=(7, 9)) == set()


def test_judged_without_gain_is_a_negative_and_equal_texts_are_not():
    model = word_model({"query": [1.0, 0.0], "good": [0.9, 0.1], "bad": [0.5, 0.5]})
    corpus = {"p": "good", "copy": "good", "judged": "bad", "again": "bad", "echo": "query"}
    data = RetrievalData({"q": "query"}, corpus, {"q": {"judged": 0, "p": 2}})
    options = {"ranks": (0, 9), "num_negatives": 9, "relative": None}
    assert mine_hard_negatives(model, data, **options) == {"q": ["judged"]}


def test_the_draw_depends_on_seed_and_query_alone(monkeypatch):
    model, data = random_set()
    options = {"ranks": (5, 60), "num_negatives": 4, "relative": None}
    first = mine_hard_negatives(model, data, **options)
    assert list(first) == list(data.queries)
    assert all(len(set(found)) == 4 for found in first.values())
    assert mine_hard_negatives(model, data, **options) == first
    assert mine_hard_negatives(model, data, **options, seed=1) != first
    monkeypatch.setattr(peg.mine, "QUERIES", 7)
    assert mine_hard_negatives(model, data, **options, batch_size=3) == first
    few = dict(list(data.queries.items())[::-5])
    less = RetrievalData(few, data.corpus, {q: data.qrels[q] for q in few})
    assert mine_hard_negatives(model, less, **options) == {q: first[q] for q in few}


def test_every_candidate_can_be_drawn():
    cosines = {"p": 0.9, **{f"n{i}": 0.5 - i / 100 for i in range(6)}}
    drawn = [mined(cosines, ["p"], num_negatives=2, seed=seed) for seed in range(40)]
    assert {len(found) for found in drawn} == {2}
    assert set().union(*drawn) == set(cosines) - {"p"}


def test_queries_of_the_same_candidates_draw_apart():
    cosines = {"p": 0.9, **{f"n{i}": 0.5 - i / 100 for i in range(9)}}
    same = RetrievalData(
        {f"q{i}": "query" for i in range(20)}, {w: w for w in cosines}, {f"q{i}": {"p": 1} for i in range(20)}
    )
    found = mine_hard_negatives(cosine_model(cosines), same, ranks=(0, 10), num_negatives=3)
    assert len(set(map(tuple, found.values()))) > 10


def test_too_few_are_told(caplog):
    cosines = {"p": 0.9, "n": 0.1}
    with caplog.at_level(logging.WARNING):
        assert mined(cosines, ["p"], num_negatives=5) == {"n"}
    assert "1 of 1 queries have fewer than 5 negatives, 0 none" in caplog.text
    caplog.clear()
    mined(cosines, ["p"], num_negatives=1)
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (-1, 5)}, r"ranks must be a first rank of at least 0 and a larger end, got \(-1, 5\)"),
        ({"ranks": (5, 5)}, "ranks must be"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"relative": 0}, "relative must be above 0 and at most 1, or None, got 0"),
        ({"relative": 1.5}, "relative must be above 0 and at most 1, or None, got 1.5"),
        ({"margin": -0.1}, "margin must be at least 0, got -0.1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        mined({"p": 0.9}, ["p"], **options)


def test_queries_without_a_positive():
    data = RetrievalData({f"q{i}": "query" for i in range(7)}, {"p": "a"}, {"q0": {"p": 1}, "q1": {"p": 0}})
    with pytest.raises(ValueError, match="no positive document for 6 of 7 queries: q1, q2, q3, q4, q5; leave them out"):
        mine_hard_negatives(cosine_model({"p": 0.9}), data)


def test_the_verb_writes_rows_to_train_on(tmp_path, capsys):
    cosine_model({"p": 0.9, "n": 0.5, "m": 0.4}).save_pretrained(str(tmp_path / "model"))
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    (tmp_path / "set" / "corpus.jsonl").write_text("".join(f'{{"_id": "{w}", "text": "{w}"}}\n' for w in "pnm"))
    (tmp_path / "set" / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n')
    (tmp_path / "set" / "qrels" / "train.tsv").write_text("q\tp\t1\n")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "set", "--output_file", tmp_path / "rows.jsonl.gz"]
    flags += ["--first_rank", 0, "--num_negatives", 2]
    mine_verb(*parse(mine_verb, [str(word) for word in flags]))
    (row,) = read_rows(tmp_path / "rows.jsonl.gz")
    assert (row["query"], row["pos_ids"], sorted(row["neg_ids"]), row["source"]) == ("query", ["p"], ["m", "n"], "set")
    assert row["neg"] == row["neg_ids"]
    assert "2 negatives for 1 queries" in " ".join(capsys.readouterr().out.split())
