import gc
import math
import re
import subprocess
import sys
import sysconfig
from collections import Counter

import numpy as np
import pytest
from peg import sample as module
from peg.sample import sample, train_tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def splits():
    return sample(0)


@pytest.fixture(scope="module")
def texts(splits):
    return [*splits["train"].queries.values(), *splits["train"].corpus.values()]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts)


def modules(data):
    return {id.split(".")[0].strip("_") for id in data.queries}


def test_three_splits_of_a_few_thousand_pairs_over_one_corpus(splits):
    assert list(splits) == ["train", "dev", "test"]
    assert 2000 <= len(splits["train"].corpus) <= 4000
    assert splits["train"].corpus == splits["dev"].corpus == splits["test"].corpus
    pairs = {name: sum(map(len, data.qrels.values())) for name, data in splits.items()}
    total = sum(pairs.values())
    assert 0.18 * total < pairs["test"] < 0.22 * total
    assert 0.08 * total < pairs["dev"] < 0.12 * total


def test_every_query_and_every_document_has_its_partner(splits):
    for data in splits.values():
        assert set(data.qrels) == set(data.queries)
        assert all(data.qrels.values())
    relevant = {id for data in splits.values() for gains in data.qrels.values() for id in gains}
    assert relevant == set(splits["train"].corpus)
    assert any(len(gains) > 1 for gains in splits["train"].qrels.values())


def test_a_document_is_what_follows_the_query_in_its_docstring(splits):
    assert splits["train"].corpus["statistics.stdev"].startswith("See ``variance`` for arguments")
    queries = {id: text for data in splits.values() for id, text in data.queries.items()}
    assert queries["statistics.stdev?"] == "Return the square root of the sample variance."
    relevant = {id: gains for data in splits.values() for id, gains in data.qrels.items()}
    assert relevant["statistics.stdev?"] == {"statistics.stdev": 1}


def test_texts_are_long_enough_and_occur_once(splits):
    queries = [text for data in splits.values() for text in data.queries.values()]
    documents = list(splits["train"].corpus.values())
    for texts, fewest in ((queries, 4), (documents, 8)):
        assert len(set(texts)) == len(texts)
        assert min(len(text.split()) for text in texts) >= fewest
    assert not any("->" in query for query in queries)  # signatures are no questions


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_module_is_in_two_splits(seed):
    train, dev, test = (modules(data) for data in sample(seed).values())
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_the_seed_decides_the_split_and_nothing_else(splits):
    other = sample(1)
    assert sample(0) == splits
    assert modules(other["test"]) != modules(splits["test"])
    assert other["test"].corpus == splits["test"].corpus
    queries = [{id: text for data in each.values() for id, text in data.queries.items()} for each in (splits, other)]
    assert queries[0] == queries[1]


def test_words_find_some_of_it(splits):
    """BM25 is neither hopeless nor all that can be had."""
    data = splits["test"]
    bags = [Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in data.corpus.values()]
    lengths = np.array([sum(bag.values()) for bag in bags])
    ndcg = []
    for id, query in list(data.queries.items())[::3]:
        scores = np.zeros(len(bags))
        for word in set(re.findall(r"[a-z0-9]+", query.lower())):
            n = np.array([bag[word] for bag in bags])
            weight = math.log(1 + (len(bags) - (n > 0).sum() + 0.5) / ((n > 0).sum() + 0.5))
            scores += weight * n * 1.9 / (n + 0.9 * (0.6 + 0.4 * lengths / lengths.mean()))
        ranked = [
            document in data.qrels[id]
            for document in np.array(list(data.corpus))[np.argsort(-scores, kind="stable")][:10]
        ]
        ideal = sum(1 / math.log2(r + 2) for r in range(min(10, len(data.qrels[id]))))
        ndcg.append(sum(found / math.log2(r + 2) for r, found in enumerate(ranked)) / ideal)
    assert 0.3 < np.mean(ndcg) < 0.5


@pytest.mark.parametrize(
    ("docstring", "query", "document"),
    [
        ("Close the file. Or not.\n\nMore.", "Close the file.", "Or not. More."),
        ("Close the file,\n   at once\n\nMore  of\nit.", "Close the file, at once", "More of it."),
        ("Close e.g. this file.", "Close e.g. this file.", ""),
        ("Version 2.5 of it! `x` is.", "Version 2.5 of it!", "`x` is."),
        ("", "", ""),
    ],
)
def test_where_the_first_sentence_ends(docstring, query, document):
    assert module._split(docstring) == (query, document)


def test_nothing_is_imported_and_the_garbage_collector_is_left_as_it_was(monkeypatch):
    names = ["wsgiref.handlers", "imaplib", "poplib", "xmlrpc.server"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module._pairs.cache_clear()
    sample(0)
    assert not set(names) & set(sys.modules)
    assert gc.isenabled()


def test_a_library_without_sources_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    module._pairs.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="no sources of the standard library"):
            sample(0)
        assert gc.isenabled()
    finally:
        module._pairs.cache_clear()


class TestTokenizer:
    def test_lower_cases_and_frames(self, tokenizer):
        assert tokenizer("The FILE").input_ids == tokenizer("the file").input_ids
        one, two = tokenizer("the file").input_ids, tokenizer("the file", "a name").input_ids
        assert (one[0], one[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert two[: len(one)] == one
        assert two.count(tokenizer.sep_token_id) == 2

    def test_padding_is_token_0_and_masked(self, tokenizer):
        batch = tokenizer(["the", "the name of the file"], padding=True, return_tensors="pt")
        assert tokenizer.pad_token_id == 0
        assert batch.input_ids[0, -1] == batch.attention_mask[0, -1] == 0
        assert batch.attention_mask[1].all()

    def test_its_size_is_the_one_asked_for_and_known_words_are_known(self, texts, tokenizer):
        assert len(tokenizer) == 8000
        assert len(train_tokenizer(texts[:300], vocab_size=300)) == 300
        assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts[:200]).input_ids)

    def test_is_the_same_in_every_process(self, texts, tokenizer):
        code = (
            "from peg.sample import sample, train_tokenizer; data = sample(0)['train'];"
            "print(train_tokenizer([*data.queries.values(), *data.corpus.values()]).backend_tokenizer.to_str())"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed.strip() == tokenizer.backend_tokenizer.to_str()

    def test_reloads_as_auto_tokenizer(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert again("A name, unseen: Zyx!").input_ids == tokenizer("A name, unseen: Zyx!").input_ids
        assert (again.pad_token_id, again.mask_token) == (0, "[MASK]")
