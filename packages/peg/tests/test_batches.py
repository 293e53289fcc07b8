import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peg.batches import PegCollator


def preprocess(texts, prompt=None, max_length=None):
    """Instead of tokens, what was asked for."""
    return {"texts": texts, "prompt": prompt, "max_length": max_length}


def collate(rows, hard_negatives=2, **options):
    return PegCollator(preprocess, hard_negatives, **options)(rows)


def row(query="q", pos=("p",), neg=(), **more):
    return {"query": query, "pos": list(pos), "neg": list(neg), **more}


def candidates(batch):
    """The texts behind the candidates: positives, first negatives, second ones, ..."""
    return [batch["passages"]["texts"][i] for i in batch["batch"]["candidates"].tolist()]


def known(batch):
    """(queries, candidates): which candidates are known positives, by the meaning of the ids."""
    ids, of_queries = batch["batch"]["candidate_ids"], batch["batch"]["positive_ids"]
    match = ids[None, :, :, None] == of_queries[:, None, None, :]
    return (match & (ids != -1)[None, :, :, None]).any(-1).any(-1)


def test_columns_and_distinct_texts():
    """Positives first, then all first negatives; each text stands once among those to encode."""
    rows = [row("a", ["p"], ["n", "p"]), row("b", ["n"], ["m", "o"]), row("a", ["m"], ["p", "n"])]
    batch = collate(rows, hard_negatives=2)
    assert batch["queries"]["texts"] == ["a", "b"]
    assert batch["batch"]["queries"].tolist() == [0, 1, 0]
    assert batch["passages"]["texts"] == ["p", "n", "m", "o"]
    assert candidates(batch) == ["p", "n", "m", "n", "m", "p", "p", "o", "n"]
    assert batch["batch"]["mask"].tolist() == [[True, True]] * 3


def test_prompts_and_lengths_are_those_of_each_side():
    batch = collate([row()], query_prompt="Q: ", passage_prompt="P: ", query_length=5, passage_length=9)
    assert (batch["queries"]["prompt"], batch["queries"]["max_length"]) == ("Q: ", 5)
    assert (batch["passages"]["prompt"], batch["passages"]["max_length"]) == ("P: ", 9)


def test_without_a_length_the_model_decides():
    PegCollator(lambda texts, prompt: {}, 0)([row()])  # would not take a max_length


def test_missing_hard_negatives_are_masked_and_no_text_stands_for_them():
    batch = collate([row("a", ["p"], ["n"]), row("b", ["o"]), row("c", ["r"], neg=["s", "t"])])
    assert batch["batch"]["mask"].tolist() == [[True, False], [False, False], [True, True]]
    assert candidates(batch) == ["p", "o", "r", "n", "o", "s", "p", "o", "t"]
    assert "" not in batch["passages"]["texts"]


def test_rows_without_a_column_of_negatives():
    batch = collate([{"query": "a", "pos": ["p"]}, {"query": "b", "pos": ["o"], "neg": None}], hard_negatives=1)
    assert batch["batch"]["mask"].tolist() == [[False], [False]]
    assert collate([{"query": "a", "pos": ["p"]}], hard_negatives=0)["batch"]["mask"].shape == (1, 0)


def test_known_positives_by_text_and_by_id():
    rows = [
        row("a", ["p"], ["n"], pos_ids=["1"], neg_ids=["2"]),
        row("b", ["n"], ["other wording"], pos_ids=["2"], neg_ids=["1"]),
        row("c", ["r"], ["p"], pos_ids=["4"], neg_ids=["9"]),
    ]
    batch = collate(rows, hard_negatives=1)  # candidates p n r | n "other wording" p
    assert known(batch).int().tolist() == [
        [1, 0, 0, 0, 1, 1],  # by id 1: another wording; by text: the same under another id
        [0, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]


def test_rows_of_the_same_query_share_their_known_positives():
    rows = [row("a", ["p"], pos_ids=["1"]), row("a", ["o"], pos_ids=["2"]), row("b", ["n"], pos_ids=["3"])]
    assert known(collate(rows, hard_negatives=0)).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_all_positives_of_a_row_are_known_not_only_the_one_drawn():
    batch = collate([row("a", ["p", "o", "r"]), row("b", ["s"], ["p", "o"]), row("c", ["t"], ["r"])])
    texts = candidates(batch)
    assert [texts[i] for i in known(batch)[0].nonzero().flatten().tolist()][1:] == [
        t for t in texts[3:6] + texts[6:] if t in ("p", "o", "r")
    ]


def test_an_id_is_not_a_text():
    batch = collate([row("a", ["1"], pos_ids=["x"]), row("b", ["y"], pos_ids=["1"])], hard_negatives=0)
    assert known(batch).int().tolist() == [[1, 0], [0, 1]]


def test_known_positives_on_demand_only():
    assert not {"candidate_ids", "positive_ids"} & collate([row()], mask_known=False)["batch"].keys()


NEGATIVES = [f"n{i}" for i in range(20)]


@given(st.integers(0, 9), st.integers(0, 9), st.lists(st.text(min_size=1), unique=True, min_size=2, max_size=5))
def test_draws_depend_on_seed_epoch_and_query_alone(seed, epoch, names):
    rows = [row(name, ["p1", "p2", "p3"], NEGATIVES) for name in names]

    def drawn(rows):
        batch = collate(rows, hard_negatives=3, seed=seed, epoch=epoch)
        texts = candidates(batch)
        return {r["query"]: texts[i :: len(rows)] for i, r in enumerate(rows)}

    together = drawn(rows)
    assert together == drawn(rows[::-1]) == {k: v for r in rows for k, v in drawn([r]).items()}
    for positive, *negatives in together.values():
        assert positive in ("p1", "p2", "p3")
        assert len({*negatives} & {*NEGATIVES}) == 3


def test_other_seeds_epochs_and_queries_draw_otherwise():
    def drawn(query="q", **options):
        return tuple(candidates(collate([row(query, ["p"], NEGATIVES)], hard_negatives=5, **options)))

    assert len({drawn(), drawn(seed=1), drawn(epoch=1), drawn("r")}) == 4


def test_a_text_and_its_id_are_drawn_together():
    rows = [row("q", ["p1", "p2"], NEGATIVES, pos_ids=["1", "2"], neg_ids=[f"id{n}" for n in NEGATIVES])]
    collator = PegCollator(preprocess, 4)
    names = {f"id{n}": n for n in NEGATIVES} | {"1": "p1", "2": "p2"}
    numbers = {number(f"id {name}"): text for name, text in names.items()}
    for collator.epoch in range(5):
        batch = collator(rows)
        assert [numbers[i] for i in batch["batch"]["candidate_ids"][:, 1].tolist()] == candidates(batch)


def number(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def test_ids_are_the_same_in_every_process():
    """Or candidates of another rank would not be recognised."""
    ids = collate([row(pos_ids=["7"])], hard_negatives=0)["batch"]["candidate_ids"]
    assert ids.tolist() == [[484_535_939_939_021_967, 7_450_989_293_997_253_333]] == [[number("p"), number("id 7")]]


def test_sources_are_numbered_in_the_order_given():
    rows = [row("a", source="web"), row("b", source="books"), row("c", source="web")]
    assert collate(rows, sources=["books", "web"])["batch"]["sources"].tolist() == [1, 0, 1]
    assert "sources" not in collate(rows)["batch"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row(), row("")], {}, "a training row needs a query and a positive: {'query': ''"),
        ([row(pos=[])], {}, "a training row needs a query and a positive"),
        ([{"pos": ["p"]}], {}, "a training row needs a query and a positive"),
        ([row(source="web")], {"sources": ["a", "b"]}, "a row is of source 'web'; known are a, b"),
        ([row()], {"sources": ["a"]}, "a row is of source None; known are a"),
    ],
)
def test_wrong_rows(rows, options, message):
    with pytest.raises(ValueError, match=message):
        collate(rows, **options)


def test_numbers_fit_torch():
    batch = collate([row("a", ["p"], ["n"], pos_ids=["1"], neg_ids=["2"])])["batch"]
    assert batch["candidate_ids"].dtype == batch["positive_ids"].dtype == torch.int64
    assert (batch["candidate_ids"] >= -1).all()
