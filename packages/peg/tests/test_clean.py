import json
from collections import Counter

import pytest
from papercore.lab.cli import parse
from peg.clean import clean_rows, clean_verb, consistent_rows, sample_pool
from peg.data import read_rows
from tiny_retrieval import cosine_model


def row(query, pos, neg=(), **more):
    return {"query": query, "pos": list(pos), "neg": list(neg), **more}


def clean(*rows, **options):
    """(rows as (query, positives, negatives), what was dropped)"""
    dropped = Counter()
    return [(r["query"], r["pos"], r["neg"]) for r in clean_rows(rows, dropped, **options)], dict(dropped)


@pytest.mark.parametrize(
    ("rows", "kept", "dropped"),
    [
        ([row(" ab ", ["cd\n"], [" ef"])], [("ab", ["cd"], ["ef"])], {}),
        ([row(" ", ["cd"])], [], {"rows: query too short": 1}),
        ([row("a", ["cd"])], [], {"rows: query too short": 1}),
        ([row("abcdef", ["cd"])], [], {"rows: query too long": 1}),
        ([row("ab", ["", "cd"])], [("ab", ["cd"], [])], {"positives: too short": 1}),
        ([row("ab", ["abcdefgh"])], [], {"positives: too long": 1, "rows: no positive left": 1}),
        ([row("ab", ["ab "])], [], {"positives: equal to the query": 1, "rows: no positive left": 1}),
        ([row("ab", ["cd", "cd"])], [("ab", ["cd"], [])], {"positives: pair seen before": 1}),
        (
            [row("ab", ["cd"]), row("ab ", ["cd"]), row("ab", ["ef"]), row("gh", ["cd"])],
            [("ab", ["cd"], []), ("ab", ["ef"], []), ("gh", ["cd"], [])],
            {"positives: pair seen before": 1, "rows: no positive left": 1},
        ),
        # Two texts whose concatenation is the same are not the same pair.
        ([row("ab", ["cde"]), row("abc", ["de"])], [("ab", ["cde"], []), ("abc", ["de"], [])], {}),
        (
            [row("ab", ["cd"], ["", "abcdefgh", "ab", " cd", "ef", "ef "])],
            [("ab", ["cd"], ["ef"])],
            {f"negatives: {rule}": 1 for rule in (
                "too short", "too long", "equal to the query", "equal to a positive", "listed twice"
            )},
        ),
        # A positive that is dropped is still no negative.
        ([row("ab", ["cd"]), row("ab", ["cd", "ef"], ["cd"])], [("ab", ["cd"], []), ("ab", ["ef"], [])],
         {"positives: pair seen before": 1, "negatives: equal to a positive": 1}),
    ],
)  # fmt: skip
def test_rules(rows, kept, dropped):
    assert clean(*rows, max_query_characters=5, max_text_characters=7) == (kept, dropped)


def test_ids_stay_with_their_texts_and_other_columns_stay():
    given = row("ab", ["", "cd"], ["cd", "ef"], pos_ids=["1", "2"], neg_ids=["3", "4"], source="s")
    (kept,) = clean_rows([given], Counter())
    assert (kept["pos_ids"], kept["neg_ids"], kept["source"]) == (["2"], ["4"], "s")
    (kept,) = clean_rows([row("ab", ["cd"], pos_ids=[], neg_ids=[])], Counter())
    assert (kept["pos_ids"], kept["neg_ids"]) == ([], [])


@pytest.mark.parametrize("options", [{"min_characters": 0}, {"min_characters": 9, "max_query_characters": 8}])
def test_limits_out_of_order(options):
    with pytest.raises(ValueError, match="min_characters must be at least 1 and below the largest lengths"):
        clean(row("ab", ["cd"]), **options)


def test_the_pool_is_a_uniform_sample():
    rows = [row("q", [f"{i}", f"{i + 50}"]) for i in range(50)]
    assert sorted(sample_pool(rows, 1000), key=int) == [str(i) for i in range(100)]
    assert sample_pool(rows, 10, seed=3) == sample_pool(rows, 10, seed=3) != sample_pool(rows, 10, seed=4)
    counts = Counter(text for seed in range(300) for text in sample_pool(rows, 20, seed))
    assert len(counts) == 100
    assert min(counts.values()) > 30  # 60 expected, standard deviation 7
    assert max(counts.values()) < 90
    assert sample_pool([row("q", ["same", "same"])], 5) == ["same"]


COSINES = {"good": 0.9, "fair": 0.5, "bad": -0.5, "a": 0.7, "b": 0.6, "c": 0.1}


def consistent(*rows, pool=("a", "b", "c"), **options):
    dropped = Counter()
    kept = consistent_rows(cosine_model(COSINES), rows, list(pool), dropped, **options)
    return [r["pos"] for r in kept], dict(dropped)


def test_a_positive_must_be_among_the_best_of_the_pool():
    rows = [row("query", ["good"]), row("query", ["fair", "good"]), row("query", ["bad"])]
    lost = {"positives: not among the best 2 of the pool": 2, "rows: no positive left": 1}
    assert consistent(*rows, k=2) == ([["good"], ["good"]], lost)
    assert consistent(row("query", ["fair"]), k=3, pool="abcz") == ([["fair"]], {})


def test_the_own_positives_do_not_count_as_passages_of_the_pool():
    assert consistent(row("query", ["a", "b"]), k=1) == ([["a", "b"]], {})
    assert consistent(row("query", ["b"]), k=1)[0] == []


def test_rows_are_judged_alike_in_blocks(monkeypatch):
    rows = [row("query", [word]) for word in ("good", "bad", "fair", "a")] * 3
    expected = consistent(*rows, k=2)
    monkeypatch.setattr("peg.clean.ROWS", 5)
    assert consistent(*rows, k=2) == expected == ([["good"], ["a"]] * 3, expected[1])


@pytest.mark.parametrize("k", [0, 3])
def test_a_pool_that_cannot_tell(k):
    with pytest.raises(ValueError, match=f"k must be at least 1 and below the 3 passages of the pool, got {k}"):
        consistent(row("query", ["good"]), k=k)


def test_the_verb(tmp_path, capsys):
    rows = [
        row("query", ["good", ""]),
        row("query", ["bad"]),
        row("", ["a"]),
        *(row("query", [word]) for word in "abc"),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--data", tmp_path / "rows.jsonl", "--output_file", tmp_path / "out.jsonl.gz", "--min_characters", 1]

    def run(*more):
        clean_verb(*parse(clean_verb, [str(word) for word in [*flags, *more]]))
        return [r["pos"] for r in read_rows(tmp_path / "out.jsonl.gz")], " ".join(capsys.readouterr().out.split())

    kept, out = run()
    assert kept == [["good"], ["bad"], ["a"], ["b"], ["c"]]
    assert "positives: too short │ 1" in out
    assert "rows: query too short │ 1" in out
    assert "5 rows kept" in out
    cosine_model(COSINES).save_pretrained(str(tmp_path / "model"))
    kept, out = run("--model", tmp_path / "model", "--k", 3)
    assert kept == [["good"], ["a"], ["b"]]
    assert "positives: not among the best 3 of the pool │ 2" in out
    assert "3 rows kept" in out
